"""The benchmark of heads on frozen features gives a head the very cells that a run gives it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.heads import VALUES, Setting, Slide, logits, network, pointed, settings, slides_of, touched
from benchmarks.mil import PARTS
from hypothesis import given
from hypothesis import strategies as st

from holoslide.models.heads import Head
from holoslide.models.options import HeadConfig, Norm, StreamConfig
from holoslide.models.streamed import StreamedClassifier
from holoslide.prepared import prepare_cohort
from holoslide.slides.cohort import Cohort, SplitConfig
from holoslide.slides.phantom import PhantomConfig, write_phantoms
from holoslide.slides.prepare import PrepareConfig
from holoslide.slides.raster import Raster
from holoslide.streaming.tissue import Tissue


def test_a_head_reads_what_it_reads_in_a_run(tmp_path: Path) -> None:
    drawn = PhantomConfig(least_um=2000, most_um=2200, mpp=4.0)
    cohort = Cohort.from_csv(write_phantoms(tmp_path, task="focus", slides=8, config=drawn))
    prepared = prepare_cohort(
        cohort.with_splits(SplitConfig()), tmp_path / "rasters", PrepareConfig(mpp=4.0), labels=True
    )
    slides = slides_of(prepared, "none", 2, tmp_path / "truth")
    assert [len(slides[part]) for part in PARTS] == [len(getattr(prepared.cohort, part)) for part in PARTS]

    for slide, row in zip(slides["train"], prepared.cohort.train, strict=True):
        assert slide.lesion_HW.shape == slide.map_CHW.shape[1:]
        assert slide.lesion_HW.any() == (row.label == "lesion")

    row = prepared.cohort.train.rows[0]
    with Raster.open(prepared.rasters[row.slide_id]) as raster:
        trained = network("none", tuple(int(v) for v in raster.glass), 2).model
        run = StreamedClassifier(trained, StreamConfig(tile_cells=24))
        output = run.part_map(0, run.stem_map(raster))
        with torch.no_grad():
            expected = run.heads[0].readout(run.head_cells(run.heads[0], output).cells_NC)
            found = logits(run.heads[0], slides["train"][0], cell_px=16)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)  # maps are kept in half precision


def test_each_question_varies_one_thing_and_holds_the_default() -> None:
    for question in VALUES:
        assert Setting() in settings(question).values()
        assert len(set(settings(question).values())) > 1


@pytest.mark.parametrize("norm", ["cohort", "slide"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_head_that_sees_the_lesion_points_at_it_and_one_that_sees_all_else_does_not(
    norm: Norm, sign: int
) -> None:
    lesion_HW = np.zeros((9, 12), bool)
    lesion_HW[3:6, 4:7] = True
    map_CHW = torch.from_numpy(lesion_HW).half()[None].repeat(2, 1, 1) * sign
    tissue = Tissue.everywhere((9 * 16, 12 * 16))
    slide = Slide(map_CHW, torch.zeros(2), tissue, lesion_HW, label=1, patient="a")
    head = Head(2, 2, HeadConfig(pooling="auto", norm=norm, kernel=3), depth=4)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.ones_(head.readout.norm.weight)
    torch.nn.init.constant_(head.stem.weight[0], 1 / 18)
    head.readout.hidden.weight.data[0, 0] = 1
    head.readout.output.weight.data[1, 0] = 1
    found = pointed(head, [slide], cell_px=16)
    assert found["pointing_evidence"] == found["pointing_attention"] == (sign > 0)
    assert found["auprc_chance"] == pytest.approx(2 / 12)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_touched_squares_are_those_that_hold_any(height: int, width: int, side: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.1
    found = touched(mask, side)
    for y, x in np.ndindex(found.shape):
        assert found[y, x] == mask[y * side : (y + 1) * side, x * side : (x + 1) * side].any()
    assert found.shape == (-(-height // side), -(-width // side))
