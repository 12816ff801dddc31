"""The step on a GPU: what it gives is what a CPU gives, wherever the feature maps lie."""

import copy
import tempfile
from dataclasses import replace

import pytest
import torch

from holoslide.models.memory import plan_for
from holoslide.models.options import StreamConfig
from holoslide.models.streamed import StreamedClassifier
from holoslide.streaming.storage import Storage, StorageConfig
from holoslide.training.local import LocalStep, StepResult
from tests.streaming.oracle import relative_error
from tests.training.test_local import make_model, make_slide

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SLIDE = make_slide(410, 330, 32, 0.4, seed=1)


def run(network: StreamedClassifier) -> StepResult:
    network.model.zero_grad()
    return LocalStep(network)(SLIDE, 1, generator=torch.Generator().manual_seed(3))


def grads(network: StreamedClassifier) -> list[torch.Tensor]:
    return [p.grad.cpu() for p in network.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("modules", [1, 3])
@pytest.mark.parametrize("store", ["device", "host", "file"])
def test_a_gpu_gives_what_a_cpu_gives(modules: int, store: str) -> None:
    model = make_model("resnet18", modules, seed=2, truncate="layer3", side=8)
    config = StreamConfig(tile_cells=16, batch=2, keep=1, segment_units=2)
    there = StreamedClassifier(copy.deepcopy(model).cuda(), config)
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"device": (2**31, 0), "host": (0, 2**31), "file": (0, 0)}
        device_bytes, host_bytes = sizes[store]
        there.storage = Storage(StorageConfig(device_bytes, host_bytes, folder), torch.device("cuda"))
        for chain in (there.stem, *there.parts):
            chain.storage = there.storage
        found = run(there)
    here = StreamedClassifier(model, config)
    expected = run(here)
    assert relative_error(found.logits_KL.cpu(), expected.logits_KL) < 1e-10
    for ours, theirs in zip(found.classification + found.reconstruction,
                            expected.classification + expected.reconstruction, strict=True):  # fmt: skip
        assert ours == pytest.approx(theirs, rel=1e-10)
    assert len(grads(there)) == len(grads(here)) > 20
    largest = max(float(grad.abs().max()) for grad in grads(here))
    for on_gpu, on_cpu in zip(grads(there), grads(here), strict=True):  # some are zero but for rounding
        assert relative_error(on_gpu, on_cpu) < 1e-10 or float(on_gpu.abs().max()) < 1e-14 * largest


def test_a_step_stays_within_its_plan() -> None:
    """bf16, float32 weights; the plan's peak is at least what tensors took, and they took most of it or little."""
    model = make_model("resnet18", 3, seed=2, truncate="layer3", side=8).float().cuda()
    network = StreamedClassifier(model, StreamConfig(memory_gib=1.0), mixed=torch.bfloat16)
    slide = make_slide(3000, 2800, 32, 0.9, seed=4)
    plan = plan_for(network, slide, training=True)
    assert plan is not None
    network.follow(plan)
    torch.cuda.reset_peak_memory_stats()
    result = LocalStep(network)(slide, 1, generator=torch.Generator().manual_seed(3))
    assert all(map(torch.isfinite, torch.tensor(result.classification)))
    assert torch.cuda.max_memory_allocated() <= 1.15 * plan.peak_bytes


def test_bf16_is_near_float32() -> None:
    model = make_model("resnet18", 3, seed=2, truncate="layer3", side=8).float().cuda()
    plain = StreamConfig(tile_cells=64)
    exact = run(StreamedClassifier(model, plain))
    rounded = run(StreamedClassifier(model, replace(plain, batch=2), mixed=torch.bfloat16))
    for ours, theirs in zip(rounded.classification, exact.classification, strict=True):
        assert ours == pytest.approx(theirs, rel=0.1)
