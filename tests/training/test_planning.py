"""A run announces what memory it will take, keeps to it, and goes on with its plan when it is resumed."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from holoslide.errors import MemoryPlanError
from holoslide.models import memory
from holoslide.models.classifier import LocalClassifier
from holoslide.models.memory import plan_for
from holoslide.models.options import (
    BackboneConfig,
    HeadConfig,
    ModelConfig,
    ReconstructionConfig,
    StreamConfig,
)
from holoslide.models.streamed import StreamedClassifier
from holoslide.pixels import ArrayPixels
from holoslide.slides.augment import AugmentConfig
from holoslide.streaming.cost import PeakBytes
from holoslide.streaming.plan import parameter_bytes
from holoslide.training.local import LocalStep
from holoslide.training.planning import plan_run
from holoslide.training.samples import Slides
from tests.training import tiny
from tests.training.test_resume import _assert_same_end

GIB = 2**30


class Told:
    def __init__(self):
        self.facts = []

    def started(self, facts):
        self.facts.append(facts)

    def slide_done(self, slide): ...

    def epoch_done(self, row, *, is_best): ...


def _network(
    modules: int, *, barrier_every: int = 1, dtype: torch.dtype = torch.float32, **stream: object
) -> StreamedClassifier:
    backbone = BackboneConfig(name="resnet18", weights="none", truncate="layer2")
    settings = ModelConfig(
        backbone=backbone,
        modules=modules,
        barrier_every=barrier_every,
        heads=HeadConfig(kernel=3),
        reconstruction=ReconstructionConfig(side=16, patches=4),
    )
    generator = torch.Generator().manual_seed(0)
    model = LocalClassifier.from_config(settings, classes=("a", "b"), generator=generator)
    return StreamedClassifier(model.to(dtype), StreamConfig(**stream))


def _slide(side_px: int) -> ArrayPixels:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (side_px, side_px, 3), np.uint8)
    return ArrayPixels(pixels, np.ones((1, 1), np.bool_), mask_cell_px=side_px, glass=(243, 243, 243))


@pytest.mark.parametrize(
    ("modules", "barrier_every", "segment_units"), [(1, 1, 0), (1, 1, 2), (4, 1, 0), (4, 4, 0)]
)
@pytest.mark.parametrize("memory_gib", [0.28, 1.0])
def test_a_step_takes_what_its_plan_says_and_no_more(modules, barrier_every, segment_units, memory_gib):
    stream = {"memory_gib": memory_gib, "segment_units": segment_units}
    network, slide = _network(modules, barrier_every=barrier_every, **stream), _slide(900)
    network.follow(plan := plan_for(network, slide, training=True))
    step = LocalStep(network)
    with PeakBytes() as counted:
        step(slide, 0, generator=torch.Generator().manual_seed(0))
    # The weights are there before; their gradients are made in the step, AdamW's moments after it.
    parameters = parameter_bytes(network.model)
    planned = plan.peak_bytes - plan.fixed_bytes + 2 * parameters
    assert counted.peak <= planned <= memory_gib * GIB
    assert counted.peak >= 0.6 * planned


def _largest_windows(network: StreamedClassifier, slide: ArrayPixels) -> list[int]:
    """Input cells of the largest window of each map, from the stem's to the last."""
    maps = [network.stem_map(slide)]
    maps += [network.part_map(0, maps[0])]
    return [max(window.area for batch in made.batches for window in batch.windows) for made in maps]


def test_no_slide_with_less_tissue_gets_larger_windows_than_were_planned():
    # Tiles are evened out over each slide: 1,100 px are two tiles of 69 cells and 1,024 px one of 128, if both may
    # have 128.
    network, largest = _network(1, memory_gib=0.22), _slide(1100)
    network.follow(plan_for(network, largest, training=True))
    planned = _largest_windows(network, largest)
    for side_px in (1024, 896, 640):
        taken = _largest_windows(network, _slide(side_px))
        assert all(one <= most for one, most in zip(taken, planned, strict=True)), (side_px, taken, planned)


def test_the_smallest_budget_that_is_named_does_and_less_does_not():
    slide = _slide(400)
    with pytest.raises(MemoryPlanError, match="at its smallest tiles") as refused:
        plan_for(_network(2, memory_gib=0.01), slide, training=True)
    needed = float(re.search(r"needs ([\d.]+) GiB", str(refused.value)).group(1))
    plan = plan_for(_network(2, memory_gib=needed + 0.01), slide, training=True)
    assert plan.peak_bytes <= (needed + 0.01) * GIB
    with pytest.raises(MemoryPlanError):
        plan_for(_network(2, memory_gib=needed - 0.01), slide, training=True)


@pytest.mark.parametrize("modules", [1, 4])
def test_a_smaller_budget_changes_the_tiles_and_nothing_but_rounding(modules):
    slide, ends = _slide(300), []
    for memory_gib in (0.14, 2.0):
        network = _network(modules, dtype=torch.float64, memory_gib=memory_gib)
        network.follow(plan := plan_for(network, slide, training=True))
        LocalStep(network)(slide, 0, generator=torch.Generator().manual_seed(0))
        gradients = [p.grad for p in network.model.parameters() if p.grad is not None]
        ends.append(([s.tiles for s in plan.stages], gradients))
    (tiles_small, small), (tiles_large, large) = ends
    assert sum(tiles_small) > sum(tiles_large)
    assert len(small) == len(large) > 0
    for one, other in zip(small, large, strict=True):
        assert (one - other).abs().max() <= 1e-10 * other.abs().max() + 1e-13


def test_training_says_what_it_will_take(tmp_path):
    told = Told()
    tiny.run(tmp_path, tiny.cohort(tmp_path), progress=told, stream=StreamConfig(memory_gib=0.5))
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert told.facts[0].peak_bytes == max(plan[part]["peak_bytes"] for part in ("train", "valid"))
    assert 0 < told.facts[0].peak_bytes <= 0.5 * GIB


def test_validation_holds_no_gradients_as_its_plan_says(tmp_path):
    trained, held = tiny.model(), []

    class Watching(Told):
        def slide_done(self, slide):
            if slide.phase == "valid":
                held.extend(p.grad for p in trained.parameters() if p.grad is not None)

    tiny.run(tmp_path, tiny.cohort(tmp_path), trained=trained, progress=Watching())
    assert held == []


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**32)
    network = _network(1)
    budgets = [plan_for(network, _slide(300), training=True, processes=n).budget_bytes for n in (1, 2, 4)]
    assert budgets[0] == pytest.approx(0.7 * 2**32, rel=1e-6)
    assert budgets == pytest.approx([budgets[0] / n for n in (1, 2, 4)], rel=1e-6)


def test_processes_of_several_machines_each_have_their_share_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**32)
    network = StreamedClassifier(tiny.model(), StreamConfig())
    slides = Slides(*tiny.cohort(tmp_path), open_pixels=tiny.open_npz, augment=AugmentConfig(), seed=0)
    four = SimpleNamespace(is_global_zero=True, world_size=4, broadcast=lambda plan: plan)
    for nodes, share in ((1, 1 / 4), (2, 1 / 2), (4, 1)):
        (tmp_path / str(nodes)).mkdir()
        plan = plan_run(network, slides, four, tmp_path / str(nodes), nodes=nodes)
        for part in (plan.train, plan.valid):
            assert part.budget_bytes == pytest.approx(0.7 * 2**32 * share, rel=1e-6)


def test_a_resumed_run_keeps_its_plan_whatever_memory_is_free(tmp_path, monkeypatch):
    slides = tiny.cohort(tmp_path)
    tiny.run(tmp_path / "peace", slides, config=tiny.config(epochs=3))

    class StopError(Exception):
        pass

    class StopAfterOne(Told):
        def epoch_done(self, row, *, is_best):
            raise StopError

    with pytest.raises(StopError):
        tiny.run(tmp_path / "killed", slides, config=tiny.config(epochs=3), progress=StopAfterOne())
    before = (tmp_path / "killed" / "plan.json").read_bytes()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**25)
    tiny.run(tmp_path / "killed", slides, config=tiny.config(epochs=3), resume=True)
    assert (tmp_path / "killed" / "plan.json").read_bytes() == before
    _assert_same_end(tmp_path / "peace", tmp_path / "killed")
