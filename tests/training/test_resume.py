"""A run that is killed and resumed ends as one that was not, to the bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from holoslide.errors import CheckpointError
from holoslide.models.options import StreamConfig
from holoslide.training.progress import Silent
from tests.training import tiny

REPO = Path(__file__).resolve().parents[2]
MEASURED = ("seconds", "peak_rss_bytes", "peak_device_bytes")


def _assert_same(a, b, where=""):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in MEASURED:
                _assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            _assert_same(x, y, f"{where}.{i}")
    else:
        assert a == b, where


def _assert_same_end(one, other):
    states = [torch.load(folder / "last.ckpt", weights_only=True) for folder in (one, other)]
    _assert_same(*states)
    for path in (one / "best").iterdir():
        assert path.read_bytes() == (other / "best" / path.name).read_bytes()
    assert len((one / "history.csv").read_text().splitlines()) == 4
    assert len((other / "history.csv").read_text().splitlines()) == 4
    assert not list(other.glob("**/.*.tmp"))


def test_killed_at_any_moment_and_resumed_ends_bit_for_bit_the_same(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.worker", "kills", str(tmp_path)],
        cwd=REPO, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    killed = json.loads(done.stdout)
    assert killed["kills"] >= 3
    assert killed["renamings"] >= 4  # before and after the first and the second of a life, at least
    for name in ("renaming", *(f"random{i}" for i in range(killed["runs"]))):
        _assert_same_end(tmp_path / "peace", tmp_path / name)


def test_resume_refuses_another_configuration_stream_or_cohort(tmp_path):
    slides = tiny.cohort(tmp_path)
    tiny.run(tmp_path / "run", slides, config=tiny.config(epochs=1))
    other = (slides[0][:4], slides[1])
    frozen = tiny.model()
    frozen.parts[0].requires_grad_(requires_grad=False)
    for changes, message in (
        ({"config": tiny.config(epochs=2)}, "train.epochs was 1, now it is 2"),
        ({"config": tiny.config(epochs=1, precision="bf16")}, "train.precision was 32, now it is bf16"),
        ({"trained": tiny.model(border="zeros")}, "model.border was glass, now it is zeros"),
        ({"trained": tiny.model(modules=1)}, "model.modules was 2, now it is 1"),
        ({"trained": frozen}, "frozen.0 was nothing, now it is parts.0.layer1_0.conv1.weight"),
    ):
        with pytest.raises(CheckpointError, match=f"belongs to another run: {message}"):
            tiny.run(tmp_path / "run", slides, **({"config": tiny.config(epochs=1)} | changes), resume=True)
    with pytest.raises(
        CheckpointError, match=r"slides.train.4 was slide4 of patient4, class 0, now it is nothing"
    ):
        tiny.run(tmp_path / "run", other, config=tiny.config(epochs=1), resume=True)


def test_two_runs_at_a_time_do_not_share_a_folder(tmp_path):
    """The second is refused before it writes anything, and the first goes on."""
    slides, refused = tiny.cohort(tmp_path), []

    class Second(Silent):
        def slide_done(self, slide):
            if not refused:
                before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
                with pytest.raises(CheckpointError, match="run: is trained into by another process; wait"):
                    tiny.run(tmp_path / "run", slides, config=tiny.config(seed=1), resume=True)
                refused.append({path: path.read_bytes() for path in before} == before)

    tiny.run(tmp_path / "run", slides, config=tiny.config(epochs=1), progress=Second())
    assert refused == [True]
    assert tiny.run(tmp_path / "run", slides, config=tiny.config(epochs=1), resume=True).best_epoch == 1


def test_resume_may_change_what_changes_nothing(tmp_path):
    slides = tiny.cohort(tmp_path)
    first = tiny.run(tmp_path / "run", slides, config=tiny.config(epochs=1))
    again = tiny.run(
        tmp_path / "run", slides, resume=True,
        config=tiny.config(epochs=1, log_every=5, checkpoint_minutes=1), stream=StreamConfig(tile_cells=50),
    )  # fmt: skip
    assert again.history == first.history


class _Stop(Silent):
    """Stops a run at its n-th slide of an epoch."""

    def __init__(self, epoch, done):
        self.at = epoch, done

    def slide_done(self, slide):
        if (slide.epoch, slide.done) == self.at:
            raise KeyboardInterrupt


def _logged(folder, name):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_the_log_of_a_run_that_was_stopped_is_that_of_one_that_was_not(tmp_path):
    """Each stop is in another epoch than the last checkpoint, or in the same."""
    slides, config = tiny.cohort(tmp_path), tiny.config(epochs=3)
    tiny.run(tmp_path / "peace", slides, config=config)
    for at in ((2, 3), (3, 1)):
        with pytest.raises(KeyboardInterrupt):
            tiny.run(tmp_path / "run", slides, config=config, resume=True, progress=_Stop(*at))
    tiny.run(tmp_path / "run", slides, config=config, resume=True)
    for name, steps in (("step/classification_2", range(1, 10)), ("valid/loss_2", (3, 6, 9))):
        assert _logged(tmp_path / "run", name) == _logged(tmp_path / "peace", name)
        assert [step for step, _ in _logged(tmp_path / "run", name)] == list(steps)
