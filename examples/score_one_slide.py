"""Ask a trained model about one slide: probabilities, and where it looked.

python examples/score_one_slide.py runs/first slide.svs --heatmap heatmap.npz
"""

import argparse
from pathlib import Path

import numpy as np

from holoslide import score


def main() -> None:
    """Read the command line, and do it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run's folder, or hub:owner/name")
    parser.add_argument("slide", type=Path)
    parser.add_argument("--mpp", type=float, help="microns per pixel, where the slide does not say")
    parser.add_argument("--heatmap", type=Path, help="write the raw scores here (.npz)")
    given = parser.parse_args()

    prediction = score(given.run, given.slide, mpp=given.mpp)  # shows itself, if this is a notebook
    for name, p in prediction.probabilities.items():
        print(f"{name:>20} {p:.3f}")

    heatmap = prediction.heatmap
    row, column = np.unravel_index(np.nanargmax(heatmap.attention_HW), heatmap.attention_HW.shape)
    (top, left), (cell_y, cell_x) = heatmap.origin_l0, heatmap.cell_l0
    y, x = top + (row + 0.5) * cell_y, left + (column + 0.5) * cell_x
    print(f"most attention around level-0 pixel x {x:.0f}, y {y:.0f}")
    if given.heatmap is not None:
        heatmap.save(given.heatmap)


if __name__ == "__main__":
    main()
