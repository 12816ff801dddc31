"""A cohort of 60 slides with 20 planted faults: all are found, and no sound slide is lost or accused."""

import json
import sys

import cv2
import numpy as np
import pytest
from benchmarks.audit import Planted, plant

from holoslide import cli
from tests.slides.drawn import blobs

MPP = 4.0


def tiny(index: int) -> np.ndarray:
    """Sharp grainy tissue on glass, 1.4 by 1.6 mm, different for every number."""
    rng = np.random.default_rng([7, index])
    tissue = blobs((350, 400), seed=index, reach=0.3)[..., None]
    grain = cv2.GaussianBlur(rng.normal(0, 40, (350, 400)), (0, 0), 0.8)[..., None]
    rgb = np.where(tissue, np.array([200, 120, 170]) + grain, 243.0) + rng.normal(0, 1.5, (350, 400, 1))
    return np.clip(rgb, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted") / "cohort", 60, tiny, mpp=MPP)


def test_all_faults_are_found_and_nothing_else(
    planted: Planted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sheet = planted.folder / "sheet.html"
    command = [
        "holoslide",
        "audit",
        str(planted.table),
        "--slides",
        str(planted.slides),
        "--sheet",
        str(sheet),
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--workers", "2", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert planted.faults == 20
    assert {(f["kind"], f["where"]) for f in found["findings"]} == planted.expected
    assert len(found["slides"]) == 60 - 2  # one has no file, one has two
    sound = [s for s in found["slides"] if s["slide_id"].startswith("sound")]
    assert len(sound) > 25
    assert all(s["tissue_mm2"] > 0.1 for s in sound)
    page = sheet.read_text(encoding="utf-8")
    assert page.count('<li class="card ') == 60
    first, last = page.index(">cut-short<"), page.index(">sound-")
    assert first < last
