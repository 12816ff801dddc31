"""Which tiles of a map are computed, against a look at every cell; a plan is the same wherever its search ends."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holoslide.geometry import Box
from holoslide.models.memory import plan_for
from holoslide.streaming import plan as planning
from holoslide.streaming.features import GridSpec, make_grid
from holoslide.streaming.receptive import Receptive
from holoslide.streaming.tissue import Tissue

FIELDS = st.tuples(st.sampled_from([1, 2, 6]), st.integers(-9, 0), st.integers(0, 12)).map(
    lambda f: Receptive(*f)
)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6), share=st.sampled_from([0.0, 0.02, 0.3, 1.0]), field=FIELDS,
    wanted=st.none() | FIELDS, side=st.integers(1, 40), block=st.sampled_from([1, 3, 12]),
)  # fmt: skip
def test_each_tile_holds_its_wanted_cells_and_little_else(
    seed: int, share: float, field: Receptive, wanted: Receptive | None, side: int, block: int
) -> None:
    rng = np.random.default_rng(seed)
    shape_px = tuple(int(n) for n in rng.integers(5, 90, 2))
    mask = rng.random([-(-n // 8) for n in shape_px]) < share
    tissue = Tissue(mask, 8, (shape_px[0], shape_px[1]))
    if wanted is not None:
        wanted = Receptive(field.stride, wanted.low, wanted.high)
    spec = GridSpec(max(side, block), block, wanted=wanted)
    frame = Box(0, 0, *(n // field.stride for n in shape_px))
    grid = make_grid(spec, tissue, field, frame, clip=False)

    assert list(grid.index) == sorted(grid.index)
    assert list(grid.index.values()) == list(range(len(grid.index)))
    reach = Box(-30, -30, 130, 130)
    covered = np.zeros(reach.shape, np.bool_)
    needed = tissue.seen_by(reach, field)
    assert tissue.count(field) == needed.sum()
    if wanted is not None:
        needed &= tissue.seen_by(reach, wanted)
    for tile, box in grid.boxes.items():
        assert grid.place(tile).contains(box)
        assert box.top % block == box.left % block == 0
        rows, columns = box.relative_to(reach).slices
        assert not covered[rows, columns].any(), "tiles overlap"
        assert needed[rows, columns].any(), "a tile that nobody wants"
        covered[rows, columns] = True
        inside = np.argwhere(needed[rows, columns])
        step = block * -(-8 // block)
        assert inside[:, 0].min() < step
        assert inside[:, 1].min() < step
        assert box.height - inside[:, 0].max() <= step
        assert box.width - inside[:, 1].max() <= step
    assert not (needed & ~covered).any(), "a wanted cell is in no tile"


@pytest.mark.parametrize("memory_gib", [0.3, 1.0])
def test_a_plan_is_the_same_when_all_sides_are_tried(
    monkeypatch: pytest.MonkeyPatch, memory_gib: float
) -> None:
    from tests.training.test_planning import _network, _slide

    plans = []
    for hopeless in (planning._HOPELESS, 1e9):
        monkeypatch.setattr(planning, "_HOPELESS", hopeless)
        plan = plan_for(_network(2, memory_gib=memory_gib), _slide(1500), training=True)
        assert plan is not None
        plans.append([(stage.tiling, stage.work_bytes) for stage in plan.stages])
    assert plans[0] == plans[1]
