"""Slides that several tests read."""

from pathlib import Path

import pytest
import tifffile

from tests.slides.reading import noise, per_cm


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """97 x 131 px of noise in small tiles, 0.5 um/px downwards and 0.25 across."""
    path = tmp_path_factory.mktemp("slides") / "uneven.tif"
    resolution = (per_cm(0.25), per_cm(0.5))
    tifffile.imwrite(
        path,
        noise(97, 131),
        photometric="rgb",
        tile=(16, 16),
        resolution=resolution,
        resolutionunit="CENTIMETER",
    )
    return path
