"""Learning rates: the paper's steps, a cosine, a warm-up."""

import math

import pytest

from holoslide.errors import ConfigError
from holoslide.training.schedule import Schedule


def test_paper_divides_by_ten_at_epochs_25_35_45():
    schedule = Schedule(epochs=55)
    factors = [schedule.factor(epoch * 7, steps_per_epoch=7) for epoch in range(55)]
    assert factors == pytest.approx([1] * 25 + [0.1] * 10 + [0.01] * 10 + [0.001] * 10)


def test_milestones_are_fractions_below_one_and_epochs_from_one():
    schedule = Schedule(epochs=10, milestones=(0.5, 8), gamma=0.5)
    factors = [schedule.factor(epoch, steps_per_epoch=1) for epoch in range(10)]
    assert factors == [1] * 5 + [0.5] * 3 + [0.25] * 2


def test_a_fraction_that_comes_after_an_epoch_is_refused_or_the_two_change_places():
    """0.5 is the smaller number, and half of 8 epochs is after epoch 2."""
    message = r"train.milestones: is \[0.5, 2\], in epochs 4, 2; give rising fractions of the run, or epochs"
    with pytest.raises(ConfigError, match=message):
        Schedule(epochs=8, milestones=(0.5, 2))
    schedule = Schedule(epochs=8, milestones=(2, 0.5), gamma=0.5)
    factors = [schedule.factor(epoch, steps_per_epoch=1) for epoch in range(8)]
    assert factors == [1] * 2 + [0.5] * 2 + [0.25] * 4


@pytest.mark.parametrize(("share", "epochs"), [(0.56, 25), (0.28, 25), (0.07, 100), (0.0, 4)])
def test_heads_alone_take_no_step_more_for_rounding(share, epochs):
    """0.56 of 25 epochs is 14 in decimals, and 14.000000000000002 in binary."""
    schedule, steps = Schedule(epochs=epochs, heads_first=share), 28
    factors = [schedule.backbone_factor(step, steps_per_epoch=steps) for step in range(epochs * steps)]
    assert factors.count(0) == round(share * epochs) * steps


def test_cosine_starts_at_one_is_half_way_in_the_middle_and_ends_near_zero():
    schedule = Schedule(epochs=10, shape="cosine")
    factors = [schedule.factor(step, steps_per_epoch=4) for step in range(40)]
    assert factors[0] == 1
    assert factors[20] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.01
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize("shape", ["step", "cosine"])
def test_warm_up_rises_step_by_step_to_the_full_rate(shape):
    schedule = Schedule(epochs=10, shape=shape, warmup_epochs=2)
    factors = [schedule.factor(step, steps_per_epoch=4) for step in range(9)]
    assert factors == pytest.approx([i / 8 for i in range(1, 9)] + [1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": "linear"}, "train.schedule: is linear; choose step or cosine"),
        ({"milestones": (0.5, 0.25)}, "train.milestones: is"),
        ({"milestones": (0, 0.25)}, "train.milestones: is"),
        ({"milestones": (math.nan,)}, "train.milestones: is"),
        ({"gamma": 0}, "train.gamma: is 0"),
        ({"warmup_epochs": 6}, "train.warmup_epochs: is 6; give 0 to 5"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(**({"epochs": 5} | changes))
