"""The documentation follows the code: every command and key is told, every page and picture is there."""

import dataclasses
import importlib.util
import re
import typing
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from holoslide import __all__ as public
from holoslide.config import RunConfig

REPO = Path(__file__).resolve().parent.parent
DOCS = REPO / "docs"
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
GENERATED = {"commands.md", "configuration.md"}


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys(kind: type, prefix: str = "") -> list[tuple[str, type, str]]:
    """Dotted name, the dataclass it is in, and its own name, of every key of a configuration."""
    found, hints = [], typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            found += keys(hints[field.name], f"{name}.")
        else:
            found.append((name, kind, field.name))
    return found


def test_every_key_is_on_the_page_and_has_its_meaning_told(hooks: ModuleType) -> None:
    page = hooks.configuration_page()
    everything = keys(RunConfig)
    assert len(everything) > 50
    assert [name for name, _, _ in everything if f"| `{name}` |" not in page] == []
    assert [name for name, kind, own in everything if f"`{own}`" not in (kind.__doc__ or "")] == []


def test_every_command_is_on_the_page_with_its_options(hooks: ModuleType) -> None:
    page = hooks.commands_page()
    for name in hooks.command_names():
        assert f"## {name}\n" in page
        assert f"Usage: holoslide {name} " in page
    assert "--folds" in page
    assert "\x1b" not in page  # no colours of a terminal


def test_every_public_name_is_in_the_reference() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    assert [name for name in public if not re.search(rf"\b{name}\b", page)] == []


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere() -> None:
    navigation = yaml.safe_load((REPO / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = {
        page for part in navigation for pages in part.values() for each in pages for page in each.values()
    }
    assert listed == {path.name for path in DOCS.glob("*.md")} | GENERATED
    pages = [*DOCS.glob("*.md"), REPO / "README.md", REPO / "CONTRIBUTING.md"]
    broken = [
        f"{page.name}: {target}"
        for page in pages
        for target in LINK.findall(page.read_text(encoding="utf-8"))
        if target not in GENERATED and not (page.parent / target).exists()
    ]
    assert broken == []


def test_links_out_of_the_site_become_names(hooks: ModuleType) -> None:
    given = "see [`training/a.py`](../src/holoslide/training/a.py), [a result](../benchmarks/results/a.json)"
    told = hooks.on_page_markdown(given, page=None, config=None, files=None)
    assert told == "see `training/a.py`, a result (`benchmarks/results/a.json`)"
