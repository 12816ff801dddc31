"""The project as a whole: what installs, what is promised of every file, and the benchmarks' own instruments."""

import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.common import HeldForBackward, paired, peak_memory

REPO = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
BENCHMARKS = sorted(
    path.stem
    for path in (REPO / "benchmarks").glob("*.py")
    if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")
)
WRITTEN = sorted(f"docs/{path.name}" for path in (REPO / "docs").glob("[!_]*.md"))
MADE = {"commands.md", "configuration.md", "api.md"}  # by docs/hooks.py, whose links mkdocs --strict checks
HEAVY = {"torch", "torchvision", "timm", "cv2", "pandas", "matplotlib", "openslide", "sklearn", "tifffile"}
MIB = 2**20


def run_python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPO, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_browser_that_is_missing_can_be_made_an_error(tmp_path: Path) -> None:
    (tmp_path / "test_page.py").write_text("def test_page(browser): ...\n")
    quick = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "-p no:cacheprovider"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", str(tmp_path)],
        cwd=REPO,
        env=os.environ | quick | {"PATH": str(tmp_path), "HOLOSLIDE_REQUIRE_BROWSER": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "no chromium on this machine" in done.stdout
    assert "1 error" in done.stdout


def test_installed_version_is_the_projects() -> None:
    assert importlib.metadata.version("holoslide") == PROJECT["project"]["version"]


def test_command_line_imports_nothing_heavy() -> None:
    # What makes `holoslide --help` answer at once; a time would depend on the machine.
    loaded = run_python("-c", "import sys, holoslide.cli; print(*sys.modules)").split()
    assert "holoslide.cli" in loaded
    assert HEAVY.isdisjoint(loaded)


def test_no_file_of_the_package_is_over_500_lines() -> None:
    files = sorted((REPO / "src").rglob("*.py"))
    assert files
    lengths = {str(f.relative_to(REPO)): len(f.read_text(encoding="utf-8").splitlines()) for f in files}
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_lock_has_every_dependency_with_hashes_and_no_address() -> None:
    lock = (REPO / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in lock
    entries = re.split(r"\n(?=\S)", lock.strip())
    assert [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry] == []
    locked = {entry.partition("==")[0] for entry in entries}
    groups = PROJECT["dependency-groups"]
    assert {"include-group": "docs"} in groups["dev"]
    wanted = [*PROJECT["project"]["dependencies"], *groups["dev"], *groups["docs"]]
    named = {re.split(r"[^\w-]", one)[0] for one in wanted if isinstance(one, str)}
    assert named - locked == set()


def anchors(page: Path) -> set[str]:
    """What a page's headings can be linked by."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *WRITTEN])
def test_every_link_to_a_file_leads_to_one(page: str) -> None:
    text = re.sub(
        r"```.*?^```", "", (REPO / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (REPO / page).parent / path if path else REPO / page
        if "://" in link or path in MADE:
            continue
        assert target.exists(), f"{page}: {link}"
        if anchor and target.suffix == ".md" and target.name not in MADE:
            assert anchor in anchors(target), f"{page}: {link}"


def test_continuous_integration_can_be_run() -> None:
    assert (REPO / ".ci" / "run").stat().st_mode & 0o111


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_says_how_it_is_used(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:  # in this process: importing PyTorch once for each takes minutes
        runpy.run_path(str(REPO / "benchmarks" / f"{name}.py"), run_name="__main__")
    usage = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(option in usage for option in ("--quick", "--full", "--json"))


def test_held_bytes_are_each_storage_once_until_backward_has_freed_it() -> None:
    weight = torch.ones(1000, requires_grad=True)
    with HeldForBackward([weight]) as held:
        doubled = weight * 2  # saves nothing: the factor is a number
        assert held.bytes_now == 0
        square = doubled * doubled  # saves one storage, twice
        assert held.bytes_now == 4000
        total = (square.exp() * weight).sum()  # the exponential, saved by two; the weight is left out
        assert held.bytes_now == 8000
        total.backward()
    assert (held.bytes_now, held.most_bytes) == (0, 8000)


def fill(mib: int) -> int:
    return int(np.ones(mib * MIB, np.uint8)[-1])


def fail() -> None:
    raise ValueError("as asked")


def test_peak_memory_sees_what_is_freed_again_and_not_this_process() -> None:
    ballast = np.ones(1024 * MIB, np.uint8)
    peak = peak_memory(fill, 256)
    assert ballast[-1] == peak.value == 1
    assert 240 * MIB < peak.added_bytes < 320 * MIB


def test_peak_memory_raises_what_the_function_raises() -> None:
    with pytest.raises(ValueError, match="as asked"):
        peak_memory(fail)


def test_paired_timing_takes_turns_and_gives_the_ratio() -> None:
    calls: list[str] = []

    def short() -> None:
        calls.append("a")
        time.sleep(0.02)

    def long() -> None:
        calls.append("b")
        time.sleep(0.06)

    result = paired(short, long, rounds=3, warm_up=1)
    assert calls == ["a", "b"] * 4
    assert 1 < result.ratio_range[0] <= result.ratio <= result.ratio_range[1]
