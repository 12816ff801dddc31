"""Slide tables and files of a test, and what a cohort makes of them."""

from pathlib import Path

from holoslide.slides.cohort import Cohort


def write(folder: Path, text: str | bytes, name: str = "slides.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read(folder: Path, text: str | bytes, **options) -> Cohort:
    return Cohort.from_csv(write(folder, text), **options)


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / "wsi" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder / "wsi"


def columns(cohort: Cohort, *names: str) -> list[tuple]:
    return [tuple(getattr(row, name) for name in names) for row in cohort]
