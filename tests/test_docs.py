"""The documentation site: what its made pages must name; a page that fetches from elsewhere is refused."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import typer
import yaml

import holoslide
from holoslide import cli, streaming
from holoslide.config import RunConfig

REPO = Path(__file__).resolve().parent.parent
pytest.importorskip("mkdocs", reason="the group docs is not installed")


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """What MkDocs runs when it builds the site."""
    spec = importlib.util.spec_from_file_location("docs_hooks", REPO / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{part.key: value} of a configuration."""
    found = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def test_every_configuration_key_is_told_with_its_default_and_meaning(hooks: ModuleType) -> None:
    defaults = leaves(RunConfig().to_dict())
    told, page = {setting.key: setting for setting in hooks.settings()}, hooks.configuration()
    assert set(told) == set(defaults)
    for key, value in defaults.items():
        meaning = told[key].meaning
        assert meaning.endswith("."), f"{key}: no meaning stands under the field"
        shown = yaml.safe_load(told[key].default)
        assert shown == pytest.approx(value, rel=1e-3) if isinstance(value, list) else shown == value
        assert f"| `{key}` | {told[key].takes} | `{told[key].default}` | {meaning} |" in page


def test_every_command_is_told_with_its_options(hooks: ModuleType) -> None:
    page = hooks.commands()
    command: Any = typer.main.get_command(cli.app)
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE))
    assert list(sections) == list(command.commands)
    for name, one in command.commands.items():
        for parameter in one.params:
            assert parameter.help, f"{name}: {parameter.name} has no help"
            assert parameter.opts[0] in sections[name]
    outside_of_code = re.sub(r"```.*?```|`[^`\n]*`", "", page, flags=re.DOTALL)
    assert "<" not in outside_of_code


def test_every_public_name_is_in_the_reference(hooks: ModuleType) -> None:
    page = hooks.api()
    for module in (holoslide, streaming):
        named = re.findall(rf"^::: {re.escape(module.__name__)}\.(\w+)$", page, re.MULTILINE)
        assert sorted(named) == sorted(module.__all__)


def test_links_out_of_the_folder_lead_to_pages_that_are_made(hooks: ModuleType) -> None:
    linked = [
        path
        for page in sorted((REPO / "docs").glob("*.md"))
        for path in re.findall(r"\]\(\.\./([\w./-]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert linked
    for path in linked:
        assert (REPO / path).exists(), path
    shown = hooks.on_page_markdown("[step](../src/holoslide/training/local.py)", page=None)
    assert shown == "[step](source/src/holoslide/training/local.py.md)"


@pytest.mark.parametrize(
    "fetching",
    [
        '<script src="https://example.org/a.js"></script>',
        "<img alt=x src=//example.org/a.png>",
        '<link rel="stylesheet" href="https://example.org/a.css">',
        "<style>@import url('https://example.org/f.css')</style>",
    ],
)
def test_a_page_that_fetches_from_elsewhere_is_refused(
    hooks: ModuleType, tmp_path: Path, fetching: str
) -> None:
    page = tmp_path / "index.html"
    config = SimpleNamespace(site_dir=str(tmp_path))
    page.write_text('<a href="https://example.org">a link</a><img src="a.png"><link rel=icon href="a.svg">')
    hooks.on_post_build(config)
    page.write_text(fetching)
    with pytest.raises(Exception, match=r"index\.html fetches from elsewhere"):
        hooks.on_post_build(config)
