"""Pages that MkDocs makes when it builds the site, so that they say what the code says, and a check of the result.

Commands come from typer, settings from the dataclasses and what stands under their fields, the reference from
`__all__` of `holoslide` and of `holoslide.streaming`. What a page links to outside of docs/ becomes a page or a
file of the site.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import griffe
import typer
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

import holoslide
from holoslide import cli, streaming
from holoslide.config import PRESETS, RunConfig, takes

REPO = Path(__file__).resolve().parent.parent
SHOWN_AS = {".py": "python", ".yaml": "yaml", ".json": "json"}  # what is linked to, and becomes a page
_OUTSIDE = re.compile(r"\]\(\.\./([\w./-]+)\)")
_FETCHED = re.compile(
    r"<(?:script|img|iframe|source|video)\b[^>]*\bsrc=[\"']?(?:https?:)?//|"
    r"<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|icon|preconnect|preload))[^>]*\bhref=[\"']?(?:https?:)?//|"
    r"(?:url\(|@import\s+)[\"']?(?:https?:)?//",
    re.IGNORECASE,
)


# --- What MkDocs calls ------------------------------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages, and what the written ones link to outside of docs/."""
    made = {"commands.md": commands(), "configuration.md": configuration(), "api.md": api()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    for path in sorted({path for file in files.documentation_pages() for path in _outside(file)}):
        name, text = _source_page(path)
        files.append(File.generated(config, name, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let links out of docs/ lead to the pages made of what they name."""
    return _OUTSIDE.sub(lambda found: f"]({_source_name(found[1])})", markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Raise PluginError if a page would fetch anything from elsewhere."""
    site = Path(config.site_dir)
    for path in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
        found = _FETCHED.search(path.read_text(encoding="utf-8"))
        if found:
            message = f"{path.relative_to(site)} fetches from elsewhere: {found[0]}"
            raise PluginError(message)


# --- Commands ---------------------------------------------------------------------------------------------------


def commands() -> str:
    """Every command with its arguments and options, as typer writes them."""
    command = typer.main.get_command(cli.app)
    text = get_docs_for_click(
        obj=command,
        ctx=typer.Context(command, info_name="holoslide"),
        name="holoslide",
        title="Every command",
    )
    text = text.partition("**Commands**:")[0] + re.search(r"\n## .*", text, re.DOTALL)[0]  # type: ignore[index]
    return re.sub(r"^## `holoslide (\w+)`$", r"## \1", _tags_as_text(text), flags=re.MULTILINE)


def _tags_as_text(markdown: str) -> str:
    """A `<word>` that stands outside of code must not become a tag, nor a `[word]` a link."""
    parts = re.split(r"(```.*?```|`[^`\n]*`)", markdown, flags=re.DOTALL)
    return "".join(p if p.startswith("`") else p.replace("<", "&lt;").replace("[", "\\[") for p in parts)


# --- Configuration ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """A key as one writes it, what it takes, its default as YAML, and what it means."""

    key: str
    takes: str
    default: str
    meaning: str


def configuration() -> str:
    """Every key of a run's configuration: one table for each of its parts."""
    text = [(REPO / "docs" / "_configuration.md").read_text(encoding="utf-8")]
    for part, kind in _parts(RunConfig, ""):
        text.append(f"## {part}\n\n{_first_words(kind)}\n")
        text += ["| key | takes | default | meaning |", "| --- | --- | --- | --- |"]
        text += [f"| `{s.key}` | {s.takes} | `{s.default}` | {s.meaning} |" for s in _settings(part, kind)]
        text.append("")
    text.append("## Presets\n\nWhat `--preset` changes; a file and `--set` go before it.\n")
    text += [
        f"`{name}`:\n\n```yaml\n{yaml.safe_dump(p, sort_keys=False)}```\n" for name, p in PRESETS.items() if p
    ]
    return "\n".join(text)


def settings() -> list[Setting]:
    """All keys of a run's configuration."""
    return [setting for part, kind in _parts(RunConfig, "") for setting in _settings(part, kind)]


def _parts(kind: type, prefix: str) -> Iterator[tuple[str, type]]:
    """The dataclasses inside a dataclass, with the keys that lead to them."""
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield f"{prefix}{name}", hint
            yield from _parts(hint, f"{prefix}{name}.")


def _settings(part: str, kind: type) -> Iterator[Setting]:
    hints, said = get_type_hints(kind), _said_of(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        docstring = said.attributes[field.name].docstring
        meaning = " ".join(docstring.value.split()) if docstring else ""
        yield Setting(f"{part}.{field.name}", takes(hints[field.name]), _as_yaml(field.default), meaning)


def _said_of(kind: type) -> Any:
    """A class as it is written, with what stands under its fields."""
    return _module(kind.__module__)[kind.__name__]


@cache
def _module(name: str) -> Any:
    path = importlib.import_module(name).__file__
    assert path is not None
    return griffe.visit(name.rpartition(".")[2], Path(path), Path(path).read_text(encoding="utf-8"))


def _first_words(kind: type) -> str:
    return " ".join(_said_of(kind).docstring.value.split())


def _as_yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(f"{one:.4g}" for one in value) + "]"
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


# --- Reference --------------------------------------------------------------------------------------------------


def api() -> str:
    """The public names, for mkdocstrings to fill in."""
    text = [
        (REPO / "docs" / "_api.md").read_text(encoding="utf-8"),
        *_described("holoslide", holoslide.__all__),
    ]
    how = "[how](streaming.md#on-any-module-of-yours)"
    text.append(f"## Streaming a module of yours\n\n`holoslide.streaming`, {how}.")
    text += _described("holoslide.streaming", streaming.__all__, level=3)
    return "\n\n".join(text)


def _described(module: str, names: Sequence[str], *, level: int = 2) -> list[str]:
    """Functions first, then classes."""
    functions_first = sorted(names, key=lambda name: (name[0].isupper(), name))
    return [f"::: {module}.{name}\n    options:\n      heading_level: {level}" for name in functions_first]


# --- Files outside of docs/ --------------------------------------------------------------------------------------


def _outside(file: File) -> list[str]:
    return _OUTSIDE.findall(file.content_string)


def _source_name(path: str) -> str:
    return f"source/{path}.md" if Path(path).suffix in SHOWN_AS else f"source/{path}/index.md"


def _source_page(path: str) -> tuple[str, str]:
    """A file as a page; of a folder, the names in it."""
    there = REPO / path
    head = f"---\nsearch:\n  exclude: true\nhide: [toc]\n---\n\n# {path}\n\n"
    if there.is_dir():
        names = sorted(one.name for one in there.iterdir() if not one.name.startswith(("_", ".")))
        return _source_name(path), head + "\n".join(f"- `{name}`" for name in names)
    code = there.read_text(encoding="utf-8")
    return _source_name(path), f"{head}````{SHOWN_AS[there.suffix]}\n{code}````\n"
