"""The command line in this process, and what it wrote."""

import csv
import html
import re
from pathlib import Path

import pytest

from holoslide import cli


def exit_code(patch: pytest.MonkeyPatch, *arguments: object) -> int:
    """What `holoslide` with these arguments ends with."""
    patch.setattr("sys.argv", ["holoslide", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


class Command:
    """Runs `holoslide` in this process; keeps what it printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.out = self.err = ""

    def __call__(self, *arguments: object) -> int:
        code = exit_code(self._monkeypatch, *arguments)
        self.out, self.err = self._capsys.readouterr()
        return code


def rows_of(path: Path) -> list[dict[str, str]]:
    """All rows of a table."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def words_of(page: Path) -> str:
    """All text of a page."""
    text = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(html.unescape(text).split())
