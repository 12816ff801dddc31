"""The benchmark of heads on frozen features gives a head the very cells that a run gives it."""

from pathlib import Path

import torch
from benchmarks.heads import VALUES, Setting, logits, network, settings, slides_of
from benchmarks.mil import PARTS

from holoslide.models.options import StreamConfig
from holoslide.models.streamed import StreamedClassifier
from holoslide.prepared import prepare_cohort
from holoslide.slides.cohort import Cohort, SplitConfig
from holoslide.slides.phantom import PhantomConfig, write_phantoms
from holoslide.slides.prepare import PrepareConfig
from holoslide.slides.raster import Raster


def test_a_head_reads_what_it_reads_in_a_run(tmp_path: Path) -> None:
    drawn = PhantomConfig(least_um=2000, most_um=2200, mpp=4.0)
    cohort = Cohort.from_csv(write_phantoms(tmp_path, task="focus", slides=8, config=drawn))
    prepared = prepare_cohort(
        cohort.with_splits(SplitConfig()), tmp_path / "rasters", PrepareConfig(mpp=4.0), labels=True
    )
    slides = slides_of(prepared, "none", 2)
    assert [len(slides[part]) for part in PARTS] == [len(getattr(prepared.cohort, part)) for part in PARTS]

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
