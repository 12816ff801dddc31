"""Slides that several tests train on."""

import pytest

from tests.training import tiny


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Five to train on and four to validate on; see `tiny.cohort`."""
    return tiny.cohort(tmp_path_factory.mktemp("slides"))
