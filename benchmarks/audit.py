"""Whether `holoslide audit` finds what is wrong with a cohort, and nothing else: phantoms with planted faults.

Every kind of fault is planted once: into files, into the table, and into how labels, patients and sites are mixed.
What counts is the set of findings, as (kind, where): what is missing of it, and what is in it that was not planted.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

from benchmarks.common import Figure, Options, Result, main
from holoslide.slides.audit import audit, audit_slides
from holoslide.slides.cohort import Cohort
from holoslide.slides.phantom import LABELS, PhantomConfig, draw_phantom
from holoslide.slides.prepare import PrepareConfig, PrepareJob, prepare
from holoslide.slides.sheet import write_sheet

RGB = NDArray[np.uint8]
MPP = 4.0
QUICK, FULL = 60, 300
CONFIG = PhantomConfig(mpp=MPP, least_um=1600, most_um=2200, pen=0.15)
GLASS = 243


@dataclass
class Planted:
    """A cohort on disk, and what an audit is to find of it: (kind, where)."""

    folder: Path
    draw: Callable[[int], RGB]
    mpp: float
    rows: list[dict[str, str]] = field(default_factory=list)
    expected: set[tuple[str, str]] = field(default_factory=set)
    faults: int = 0

    @property
    def slides(self) -> Path:
        """Where the slide files are."""
        return self.folder / "slides"

    @property
    def table(self) -> Path:
        """The slide table."""
        return self.folder / "slides.csv"

    def add(self, slide_id: str, *, file: bool = True, **changes: str) -> RGB | None:
        """A sound slide, unless something of its row is changed."""
        number = len(self.rows)
        label = ("benign", "tumour")[number % 2]
        part = ("train", "train", "train", "train", "valid", "valid", "test", "test")[number % 8]
        row = {"slide_id": slide_id, "patient_id": f"p{number}", "label": label, "split": part}
        row["site"] = {"benign": "north", "tumour": "south"}[label] if number % 10 else "east"
        self.rows.append(row | changes)
        if not file:
            return None
        pixels = self.draw(number)
        self.write(slide_id, pixels)
        return pixels

    def write(self, name: str, pixels: RGB, *, mpp: float | None = 0.0, compression: str = "zlib") -> Path:
        """A slide file; `mpp` None leaves it out."""
        path = self.slides / f"{name}.tif"
        mpp = self.mpp if mpp == 0 else mpp
        how: dict[str, Any] = {"compression": compression}
        if mpp is not None:
            how |= {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
        tifffile.imwrite(path, pixels, tile=(128, 128), photometric="rgb", metadata=None, **how)
        return path

    def fault(self, *expected: tuple[str, str]) -> None:
        """Count one fault, and what is to be found of it."""
        self.faults += 1
        self.expected |= set(expected)

    def save(self) -> None:
        """Write the table."""
        with self.table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)


def plant(folder: Path, count: int, draw: Callable[[int], RGB], *, mpp: float) -> Planted:
    """A cohort of `count` slides in a folder, 20 faults among them; `draw` gives the pixels of the n-th."""
    planted = Planted(folder, draw, mpp)
    planted.slides.mkdir(parents=True)
    _spoil_files(planted)
    _copy_files(planted)
    _spoil_table(planted)
    planted.fault(("label confounded", "label"))  # the site, of all slides
    while len(planted.rows) < count:
        planted.add(f"sound-{len(planted.rows):03d}")
    planted.save()
    return planted


def _spoil_files(planted: Planted) -> None:
    def spoiled(kind: str, name: str, *, file: bool = True) -> RGB | None:
        planted.fault((kind, name))
        return planted.add(name, file=file)

    spoiled("unreadable", "cut-short")
    path = planted.slides / "cut-short.tif"
    os.truncate(path, path.stat().st_size * 2 // 3)
    spoiled("unreadable", "empty", file=False)
    (planted.slides / "empty.ndpi").touch()
    spoiled("missing companion", "alone", file=False)
    (planted.slides / "alone.mrxs").write_bytes(b"\xff\xd8\xff\xe0")
    spoiled("missing companion", "half", file=False)
    (planted.slides / "half.mrxs").write_bytes(b"\xff\xd8\xff\xe0")
    (planted.slides / "half").mkdir()
    listing = "[HIERARCHICAL]\nINDEXFILE = Index.dat\n[DATAFILE]\nFILE_COUNT = 1\nFILE_0 = Data0000.dat\n"
    (planted.slides / "half" / "Slidedat.ini").write_text(listing, encoding="utf-8-sig")
    (planted.slides / "half" / "Index.dat").touch()
    pixels = spoiled("no mpp", "no-mpp")
    assert pixels is not None
    planted.write("no-mpp", pixels, mpp=None)
    pixels = spoiled("mpp out of line", "odd-mpp")
    assert pixels is not None
    planted.write("odd-mpp", pixels, mpp=planted.mpp * 1.5)
    noise = np.random.default_rng(1).normal(GLASS, 1.5, pixels.shape)
    glass = np.clip(noise, 0, 255).astype(np.uint8)
    spoiled("no tissue", "bare-glass", file=False)
    planted.write("bare-glass", glass)
    side = round(250 / planted.mpp)
    pixels = spoiled("little tissue", "crumb")
    assert pixels is not None
    centre = [length // 2 for length in pixels.shape[:2]]
    crumb = glass[: pixels.shape[0], : pixels.shape[1]].copy()
    crumb = np.full(pixels.shape, GLASS, np.uint8) if crumb.shape != pixels.shape else crumb
    window = np.s_[
        centre[0] - side // 2 : centre[0] + side // 2, centre[1] - side // 2 : centre[1] + side // 2
    ]
    crumb[window] = pixels[window]
    planted.write("crumb", crumb)
    pixels = spoiled("no tissue", "out-of-focus")
    assert pixels is not None
    soft = cv2.GaussianBlur(pixels, (0, 0), 3.0) + np.random.default_rng(2).normal(0, 0.7, pixels.shape)
    planted.write("out-of-focus", np.clip(soft, 0, 255).astype(np.uint8))


def _copy_files(planted: Planted) -> None:
    """Four ways to have a slide twice."""
    for name, kind in (("copied", "same pixels twice"), ("wrapped", "same pixels twice"),
                       ("compressed", "looks the same"), ("linked", "same file twice")):  # fmt: skip
        pixels = planted.add(name)
        assert pixels is not None
        planted.fault((kind, name))
        planted.add(f"{name}-again", file=False)
        source, target = planted.slides / f"{name}.tif", planted.slides / f"{name}-again.tif"
        if name == "copied":
            shutil.copy(source, target)
        elif name == "wrapped":
            planted.write(f"{name}-again", pixels, compression="lzw")
        elif name == "compressed":
            planted.write(f"{name}-again", pixels, compression="jpeg")
        else:
            target.symlink_to(source)


def _spoil_table(planted: Planted) -> None:
    planted.add("no-label", label="")
    planted.fault(("no label", "no-label"))
    planted.add("no-file", file=False)
    planted.fault(("missing file", "no-file"))
    pixels = planted.add("two-files")
    assert pixels is not None
    (planted.slides / "more").mkdir()
    planted.write("more/two-files", pixels)
    planted.fault(("ambiguous file", "two-files"))
    pixels = planted.draw(len(planted.rows))
    planted.write("stray", pixels)
    planted.fault(("file without a row", str(planted.table)))
    planted.add("torn-a", patient_id="torn", split="train")
    planted.add("torn-b", patient_id="torn", split="test", label=planted.rows[-1]["label"])
    planted.fault(("patient in two splits", "torn"))
    planted.add("rare", label="rare", split="train")
    planted.fault(("small class", "rare"))


def phantom(index: int) -> RGB:
    """The pixels of the n-th phantom."""
    label = LABELS["focus"][index % 2]
    return draw_phantom("focus", label, seed=(6, index), config=CONFIG).pixels


def measure(options: Options) -> Result:
    """Faults and slides, what was found, missed and said wrongly, what was prepared after it, and the seconds."""
    count = options.values["slides"] or (QUICK if options.quick else FULL)
    workers = options.values["workers"]
    with tempfile.TemporaryDirectory() as place:
        planted = plant(Path(place) / "cohort", count, phantom, mpp=MPP)
        started = time.perf_counter()
        cohort = Cohort.from_csv(planted.table, slides=planted.slides, require_splits=False)
        opened, surveys = audit_slides(cohort, workers=workers)
        findings = [*audit(cohort), *opened]
        seconds = time.perf_counter() - started
        sheet = options.values["sheet"] or Path(place) / "sheet.html"
        write_sheet(sheet, cohort, findings, surveys)
        size = sheet.stat().st_size
        said = {(finding.kind, finding.where) for finding in findings}
        usable, _ = cohort.usable(labels=False)
        jobs = [PrepareJob(row.slide_id, row.path, row.mpp) for row in usable if row.path is not None]
        prepared = prepare(jobs, Path(place) / "rasters", PrepareConfig(mpp=8.0), workers=workers)
    failed = {each.slide_id for each in prepared if each.status == "failed"}
    figures: dict[str, Figure] = {
        "slides": len(cohort),
        "faults": planted.faults,
        "findings_expected": len(planted.expected),
        "missed": len(planted.expected - said),
        "said_wrongly": len(said - planted.expected),
        "missed_which": "; ".join(map(str, sorted(planted.expected - said))) or None,
        "said_wrongly_which": "; ".join(map(str, sorted(said - planted.expected))) or None,
        "sound_slides": sum(row.slide_id.startswith("sound") for row in cohort),
        "sound_slides_not_prepared": sum(slide_id.startswith("sound") for slide_id in failed),
        "audit_seconds": round(seconds, 1),
        "sheet_bytes": size,
    }
    return Result(figures=figures, configuration={"workers": workers, "mpp": MPP})


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slides", type=int, metavar="N", help=f"({QUICK}, --full {FULL})")
    parser.add_argument("--workers", type=int, default=2, metavar="N")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="keep the contact sheet here")


if __name__ == "__main__":
    main("audit", __doc__, measure, add_arguments=_arguments)
