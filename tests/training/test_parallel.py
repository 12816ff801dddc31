"""Several processes: they share slides out evenly, and two give what one gives."""

import logging
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_fabric.accelerators import CPUAccelerator
from lightning_fabric.utilities.rank_zero import rank_zero_info

from holoslide.errors import ConfigError
from holoslide.training.options import TrainConfig
from holoslide.training.parallel import idle, launch, processes, share
from tests.training import tiny, worker
from tests.training.test_resume import MEASURED

REPO = Path(__file__).resolve().parents[2]


@given(st.lists(st.integers(1, 10**9), max_size=20), st.integers(1, 5))
def test_shares_hold_every_item_once_and_are_balanced(sizes, ranks):
    shares = share(sizes, ranks)
    assert sorted(i for items in shares for i in items) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in items) for items in shares]
    least = max(sum(sizes) / ranks, max(sizes, default=0))
    assert (
        max(loads) <= 2 * least
    )  # Graham's bound of any greedy order, from what can be known without search
    biggest = shares[loads.index(max(loads))]
    if len(biggest) > 1:  # moving the smallest item elsewhere would not help
        assert max(loads) - min(sizes[i] for i in biggest) <= min(loads)


def _free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _start(work, folder):
    """Two processes from one, which imports torch once."""
    command = [sys.executable, "-m", "tests.training.worker", work, str(folder), str(_free_port())]
    return subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_gloo_processes_give_what_one_gives(tmp_path):
    tiny.cohort(tmp_path, train=7)
    process = _start("ranks", tmp_path)
    worker.rank(tmp_path, 1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    one, history = torch.load(tmp_path / "world1rank0.pt", weights_only=True)
    for rank in (0, 1):
        two, rows = torch.load(tmp_path / f"world2rank{rank}.pt", weights_only=True)
        for name, tensor in one.items():
            # Absolute, too: a bias before a softmax has no gradient but rounding's, which Adam makes larger.
            torch.testing.assert_close(two[name], tensor, rtol=1e-10, atol=1e-10)
        for row, expected in zip(rows, history, strict=True):
            for key in expected.keys() - set(MEASURED):
                assert row[key] == pytest.approx(expected[key], rel=1e-10), key


def test_a_process_whose_fellow_failed_ends_too_and_says_so(tmp_path):
    output, _ = _start("full", tmp_path).communicate(timeout=120)
    assert output.endswith("ended with [1, 1]\n"), output
    assert re.search(r"Error: .*last.ckpt: cannot be written \(.*No space left.*\); make room there", output)
    assert "Error: process 1: lost touch with the others (" in output
    assert "); one of them has ended: see what it said" in output


def test_fabric_gives_no_advice(caplog: pytest.LogCaptureFixture) -> None:
    said = logging.getLogger("lightning_fabric")
    said.setLevel(logging.INFO)  # as it is when first imported
    said.addHandler(caplog.handler)
    rank_zero_info("round your numbers")
    launch(TrainConfig(accelerator="cpu"))
    rank_zero_info("round them again")
    said.warning("this matters")
    said.removeHandler(caplog.handler)
    heard = dict.fromkeys(record.getMessage() for record in caplog.records)
    assert list(heard) == ["round your numbers", "this matters"]


def test_devices_that_are_not_there_are_a_configuration_error():
    with pytest.raises(ConfigError, match=r"train\.devices: "):
        launch(TrainConfig(accelerator="cpu" if torch.cuda.is_available() else "cuda", devices=10**6 + 1))


def test_more_processes_than_the_settings_ask_for_do_not_train_each_by_itself(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ConfigError, match=r"one process, and torchrun started 2; give --set train\.devices=2"
    ):
        launch(TrainConfig(accelerator="cpu"))


def test_no_process_looks_on_while_others_train() -> None:
    with pytest.raises(
        ConfigError, match=r"train\.accumulate: is 1, too few .* for 2 processes; give 2 or more"
    ):
        processes(TrainConfig(accelerator="cpu", devices=2, accumulate=1))
    assert processes(TrainConfig(accelerator="cpu", devices=2, accumulate=2)).world_size == 2


@pytest.mark.parametrize(("accumulate", "used"), [(1, 1), (3, 3), (4, 4), (8, 4)])
def test_of_all_devices_as_many_are_used_as_a_step_has_slides(
    monkeypatch: pytest.MonkeyPatch, accumulate: int, used: int
) -> None:
    monkeypatch.setattr(CPUAccelerator, "auto_device_count", staticmethod(lambda: 4))
    config = TrainConfig(accelerator="cpu", devices="auto", accumulate=accumulate)
    assert processes(config).world_size == used


@pytest.mark.parametrize(("devices", "accumulate", "left"), [("auto", 1, 3), (1, 1, 0), ("auto", 4, 0)])
def test_gpus_that_a_step_has_no_slide_for_are_counted_where_all_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, devices: Literal["auto", 1], accumulate: int, left: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    fabric = SimpleNamespace(device=torch.device("cuda"), world_size=1)  # as in a notebook
    assert idle(fabric, TrainConfig(devices=devices, accumulate=accumulate)) == left
