"""What a training is refused: settings out of range, slides that it cannot be of, a folder that holds another."""

import math
from contextlib import contextmanager

import pytest
import torch

from holoslide.errors import CheckpointError, CohortError, ConfigError, ModelError, SlideError
from tests.training import tiny


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "train.epochs: is 0; give 1 or more"),
        ({"lr": 0}, "train.lr: is 0; give a number above 0"),
        ({"lr": math.nan}, "train.lr: is nan"),
        ({"heads_first": -1}, "train.heads_first: is -1; give 0 or more, and less than"),
        ({"backbone_lr_ratio": -1}, "train.backbone_lr_ratio: is -1"),
        ({"weight_decay": -1}, "train.weight_decay: is -1"),
        ({"accumulate": 0}, "train.accumulate: is 0"),
        ({"seed": -1}, "train.seed: is -1"),
        ({"precision": "16"}, "train.precision: is 16; choose auto, 32, bf16"),
        ({"schedule": "linear"}, "train.schedule: is linear"),
        ({"monitor": "f1"}, "train.monitor: is f1; choose auroc, loss"),
        ({"class_weights": "some"}, "train.class_weights: is some"),
        ({"devices": 0}, "train.devices: is 0"),
        ({"patience": -1}, "train.patience: is -1"),
        ({"average": 1}, "train.average: is 1; give 0 or more, and less than 1"),
        ({"warmup_epochs": 99}, "train.warmup_epochs: is 99"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny.config(**changes)


def test_refuses_to_write_over_another_run(tmp_path, slides):
    tiny.run(tmp_path, slides, config=tiny.config(epochs=1))
    before = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(CheckpointError, match="holds a run already; resume it"):
        tiny.run(tmp_path, slides, config=tiny.config(epochs=1))
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_refuses_a_model_that_could_not_be_loaded_again(tmp_path, slides):
    """Before it trains, and not at the end of the first epoch."""
    model = tiny.model()
    model.parts[0].append(torch.nn.ReLU())
    with pytest.raises(ModelError, match="is not what the model's settings make"):
        tiny.run(tmp_path / "run", slides, trained=model)
    assert not (tmp_path / "run").exists()


def test_refuses_slides_that_cannot_be_trained_on(tmp_path, slides):
    train, valid = slides
    one_class = [sample for sample in valid if sample.target == 0]
    never_seen = [sample for sample in train if sample.target == 0]
    for cohort, message in (
        (
            (never_seen, valid),
            "train: holds no slide of class green; mend what was left out, or leave the class",
        ),
        ((train, []), "valid: holds no slide"),
        (([], valid), "train: holds no slide"),
        ((train, [train[0], *valid]), "patient0: is a patient of both train and valid"),
        ((train, one_class), "valid: holds one class, so it has no AUROC; set train.monitor to loss"),
    ):
        with pytest.raises(CohortError, match=message):
            tiny.run(tmp_path, cohort)
    result = tiny.run(tmp_path, (train, one_class), config=tiny.config(epochs=1, monitor="loss"))
    assert math.isnan(result.history[0]["valid/auroc_2"])


def test_refuses_a_slide_without_tissue(tmp_path, slides):
    @contextmanager
    def open_pixels(path):
        with tiny.open_npz(path) as pixels:
            if path == slides[0][1].raster:
                pixels.mask[:] = False
            yield pixels

    with pytest.raises(SlideError, match="slide1: has no tissue"):
        tiny.run(tmp_path, slides, open_pixels=open_pixels)
