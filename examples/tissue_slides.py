"""Lay patches of real breast tissue out as slides with one label each: the tissue slides of README and results.

python examples/tissue_slides.py breast-histopathology-images --burden 0.12 --out tissue

The patches, 50 x 50 px of H&E at about 4 um/px, are the public IDC set's (Cruz-Roa et al. 2014; Janowczyk and
Madabhushi 2016): its folder or archive as it is downloaded, say from Kaggle's paultimothymooney/
breast-histopathology-images. `tissue_patches.csv` names those that are used. Each patient gets a normal slide, a
blob of the patient's patches without tumour, and a tumour slide, where a share `--burden` of the tissue, all in one
place, is the patient's patches of tumour: so a patient's stain does not give the label away. `--each` gives several
of both. Patients are drawn for training, validation and test. The same `--seed` gives the same slides, another one
another layout.

Writes slides.csv, slides/*.tiff, and truth/*.png for `benchmarks.heatmaps`: a pixel a patch, white where tumour is.
"""

import argparse
import csv
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from numpy.typing import NDArray

from holoslide.files import write_rows
from holoslide.slides.phantom import write_levels

PATCH_PX, UM_PER_PX, GLASS = 50, 4.0, 243
COLUMNS = "slide_id", "patient_id", "label", "split", "path"
LIST = Path(__file__).with_name("tissue_patches.csv")

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Patches = dict[str, tuple[list[Image], list[Image]]]  # of each patient: without tumour, and of tumour


def read_patches(source: Path) -> Patches:
    """The patches that are listed, from a folder or a zip archive, at whatever depth."""
    files: dict[str, Callable[[], bytes]]
    if zipfile.is_zipfile(source):
        archive = zipfile.ZipFile(source)
        files = {PurePosixPath(name).name: partial(archive.read, name) for name in archive.namelist()}
    else:
        files = {path.name: path.read_bytes for path in source.rglob("*.png")}
    patients: Patches = {}
    with LIST.open(newline="", encoding="utf-8") as table:
        for row in csv.DictReader(table):
            pool = patients.setdefault(row["patient"], ([], []))[int(row["label"])]
            for place in row["places"].split():
                name = f"{row['patient']}_idx5_{place}_class{row['label']}.png"
                if name not in files:
                    sys.exit(f"{source}: holds no {name}; give the whole IDC set, its folder or its archive")
                raw = np.frombuffer(files[name](), np.uint8)
                pool.append(cv2.imdecode(raw, cv2.IMREAD_COLOR)[..., ::-1])
    return patients


def grow(allowed: Mask, cells: int, rng: np.random.Generator) -> Mask:
    """A random connected region of `cells` cells; none of those allowed is at the edge."""
    region = np.zeros_like(allowed)
    places = np.argwhere(allowed)
    frontier = [tuple(places[rng.integers(len(places))])]
    while frontier and cells:
        y, x = frontier.pop(rng.integers(len(frontier)))
        if region[y, x]:
            continue
        region[y, x] = True
        cells -= 1
        around = (y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)
        frontier += [place for place in around if allowed[place] and not region[place]]
    return region


def compose(
    normal: list[Image], tumour: list[Image], *, grid: int, burden: float, rng: np.random.Generator
) -> tuple[Image, Mask]:
    """A slide of `grid` x `grid` patches (H, W, 3), and which of them are tumour; none at a burden of 0."""
    inner = np.zeros((grid, grid), np.bool_)
    inner[2:-2, 2:-2] = True
    tissue = grow(inner, int(rng.uniform(0.35, 0.6) * grid * grid), rng)
    focus = grow(tissue, max(1, round(burden * tissue.sum())), rng) if burden else np.zeros_like(tissue)
    slide = np.full((grid, PATCH_PX, grid, PATCH_PX, 3), GLASS, np.uint8)
    for y, x in np.argwhere(tissue):
        pool = tumour if focus[y, x] else normal
        patch = np.rot90(pool[rng.integers(len(pool))], rng.integers(4))
        slide[y, :, x] = patch[:, ::-1] if rng.random() < 0.5 else patch
    return slide.reshape(grid * PATCH_PX, grid * PATCH_PX, 3), focus


def pyramid(slide: Image) -> list[Image]:
    """The slide, and each level half of the one before; halves are rounded to even, as in the figures' slides."""
    levels = [slide]
    while max(levels[-1].shape) > 600:
        height, width = (n // 2 for n in levels[-1].shape[:2])
        fours = levels[-1][: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3)
        levels.append(fours.mean(axis=(1, 3)).round().astype(np.uint8))
    return levels


def lay_out(
    patients: Patches, out: Path, *, burden: float, grid: int, each: int, seed: int
) -> list[dict[str, str]]:
    """Write all slides and truths, `each` normal and as many tumour ones of a patient; the rows of their table."""
    rng = np.random.default_rng(seed)
    place = np.argsort(rng.permutation(len(patients))) / len(patients)
    parts = ["train" if share < 0.6 else "valid" if share < 0.75 else "test" for share in place]
    for folder in ("slides", "truth"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    rows = []
    for (patient, pools), part in zip(patients.items(), parts, strict=True):
        for index, (label, share) in product(range(each), (("normal", 0.0), ("tumour", burden))):
            slide_id = f"{patient}-{label[0]}{index}"
            slide, focus = compose(*pools, grid=grid, burden=share, rng=rng)
            path = Path("slides", f"{slide_id}.tiff")
            write_levels(out / path, pyramid(slide), mpp=UM_PER_PX, jpeg_quality=92)
            cv2.imwrite(str(out / "truth" / f"{slide_id}.png"), focus.astype(np.uint8) * 255)
            values = slide_id, patient, label, part, path.as_posix()
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def main() -> None:
    """Read the command line, and do it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("patches", type=Path, help="the IDC set: its folder or its archive")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--burden", type=float, default=0.12, help="share of tumour in a tumour slide's tissue"
    )
    parser.add_argument("--grid", type=int, default=20, help="side of a slide, in patches")
    parser.add_argument("--each", type=int, default=1, help="slides of each label that a patient has")
    parser.add_argument("--seed", type=int, default=0, help="the layout")
    given = parser.parse_args()

    patients = read_patches(given.patches)
    rows = lay_out(
        patients, given.out, burden=given.burden, grid=given.grid, each=given.each, seed=given.seed
    )
    write_rows(rows, given.out / "slides.csv")
    print(f"{len(rows)} slides of {len(patients)} patients in {given.out}")


if __name__ == "__main__":
    main()
