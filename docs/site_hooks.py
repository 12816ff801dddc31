"""What MkDocs calls while it builds the site: pages made from the code, and links out of docs/.

The pages of commands and settings are made here at each build, so that they cannot fall behind the code.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Iterator
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")
_WIDTH = 100


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from the code."""
    for name, page in (("commands.md", commands_page()), ("configuration.md", configuration_page())):
        files.append(File.generated(config, name, content=page))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository that are not part of the site become the files' names."""
    return _OUTSIDE.sub(lambda link: _named(link[1], link[2]), markdown)


def _named(words: str, path: str) -> str:
    return words if words.strip("`") in path else f"{words} (`{path}`)"


# --- Commands ---------------------------------------------------------------------------------------------------


def commands_page() -> str:
    """Every command with what `--help` says of it."""
    parts = [
        "# Commands",
        "What `holoslide COMMAND --help` says. Exit codes: 0 all went well, 1 something could not be used or found "
        "(each with its reason), 2 the command was not understood.",
    ]
    for name in command_names():
        parts += [f"## {name}", f"```text\n{_help(name)}\n```"]
    return "\n\n".join(parts) + "\n"


def command_names() -> list[str]:
    """In the order of `holoslide --help`."""
    import typer

    from holoslide.cli import app

    return list(typer.main.get_command(app).commands)


def _help(name: str) -> str:
    from typer.testing import CliRunner

    from holoslide.cli import app

    environment = {"COLUMNS": str(_WIDTH), "TERMINAL_WIDTH": str(_WIDTH), "NO_COLOR": "1"} | dict(os.environ)
    result = CliRunner().invoke(app, [name, "--help"], env=environment, prog_name="holoslide")
    assert result.exit_code == 0, result.output
    return result.output.strip()


# --- Configuration ----------------------------------------------------------------------------------------------


def configuration_page() -> str:
    """Every key with its type, default and meaning, from the dataclasses, and the presets."""
    from holoslide.config import PRESETS, RunConfig

    parts = [
        "# Configuration",
        "One YAML file (`--config run.yaml`), or single settings (`--set train.epochs=20`), which go before the "
        "file; the file goes before the preset (`--preset`). Unknown keys are refused with the nearest match. "
        "A run writes all its settings, defaults included, into its `config.yaml`.",
    ]
    for name, kind in _sections(RunConfig):
        rows = [
            f"| `{name}.{key}` | {_type_words(hint)} | `{yaml.safe_dump(_plain(value)).splitlines()[0]}` |"
            for key, hint, value in _keys(kind)
        ]
        table = "\n".join(["| key | type | default |", "| --- | --- | --- |", *rows])
        parts += [f"## {name}", _meaning(kind), table]
    parts += ["## Presets", "What each changes of the defaults."]
    for name, changes in PRESETS.items():
        shown = yaml.safe_dump(changes, sort_keys=False).strip() if changes else "# nothing"
        parts += [f"### {name}", f"```yaml\n{shown}\n```"]
    return "\n\n".join(parts) + "\n"


def _sections(kind: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Dotted names of the dataclasses that hold keys, outer before inner."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield prefix + field.name, hints[field.name]
            yield from _sections(hints[field.name], f"{prefix}{field.name}.")


def _keys(kind: type) -> Iterator[tuple[str, Any, object]]:
    """Name, type and default of the keys of one dataclass."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if not dataclasses.is_dataclass(hints[field.name]):
            yield field.name, hints[field.name], field.default


def _meaning(kind: type) -> str:
    lines = (kind.__doc__ or "").strip().splitlines()
    return "\n".join(line.strip() for line in lines)


def _plain(value: object) -> object:
    return [round(v, 4) for v in value] if isinstance(value, tuple) else value


def _type_words(hint: Any) -> str:
    """A type as a reader of YAML thinks of it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(f"`{a}`" for a in arguments)
    if origin is tuple:
        return "list of numbers"
    if arguments:
        return " or ".join(_type_words(a) for a in arguments)
    words = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))
