"""What all tests share: where the real data is, and quiet, few-threaded numerics."""

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real slides, tissue and weights; a test that needs it is skipped where it is absent."""
    folder = Path(os.environ.get("HOLOSLIDE_TEST_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real test data is absent: {folder} (set HOLOSLIDE_TEST_DATA)")
    return folder
