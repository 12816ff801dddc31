"""The streamed step against the paper's step in plain PyTorch, written here from the method alone."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from holoslide.geometry import Box
from holoslide.models.classifier import LocalClassifier
from holoslide.models.heads import Head
from holoslide.models.options import (
    BackboneConfig,
    HeadConfig,
    InputConfig,
    ModelConfig,
    Norm,
    Pooling,
    ReconstructionConfig,
    StreamConfig,
)
from holoslide.models.readout import CellNorm, CellReadout
from holoslide.models.reconstruction import draw_patches
from holoslide.models.streamed import StreamedClassifier
from holoslide.training.local import LocalStep, StepResult
from tests.streaming.oracle import randomise, relative_error

TOLERANCE = 1e-10
pytestmark = pytest.mark.timeout(900)  # many networks are built; on two busy cores that takes a while
GLASS = 240
ZEROS = {"border": "zeros", "pool": "all"}  # the paper's own


@dataclass
class Slide:
    """Pixels in memory: glass outside the mask, and outside the raster."""

    pixels: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    mask_cell_px: int

    def __post_init__(self) -> None:
        self.shape_px = (self.pixels.shape[0], self.pixels.shape[1])
        self.glass = np.full(3, GLASS, np.uint8)

    def read(self, box_px: Box) -> NDArray[np.uint8]:
        out = np.full((*box_px.shape, 3), GLASS, np.uint8)
        part = box_px.intersect(Box(0, 0, *self.shape_px))
        if part.area:
            out[part.relative_to(box_px).slices] = self.pixels[part.slices]
        return out


def make_slide(height: int, width: int, cell: int, share: float, seed: int) -> Slide:
    rng = np.random.default_rng(seed)
    mask = rng.random((-(-height // cell), -(-width // cell))) < share
    mask[rng.integers(mask.shape[0]), rng.integers(mask.shape[1])] = True
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    tissue = np.kron(mask, np.ones((cell, cell), bool))[:height, :width]
    pixels[~tissue] = GLASS
    return Slide(pixels, mask, cell)


def make_model(
    backbone: str, modules: int, *, seed: int, truncate: str | None = None, kernel: int | None = None,
    side: int | None = None, patch_share: float = 0.25, barrier_every: int = 1, stem_stride: int | None = 3,
    pooling: Pooling = "gated", norm: Norm = "slide", **around: str,
) -> LocalClassifier:  # fmt: skip
    config = ModelConfig(
        backbone=BackboneConfig(name=backbone, weights="none", stem_stride=stem_stride, truncate=truncate),
        modules=modules,
        barrier_every=barrier_every,
        heads=HeadConfig(kernel=kernel, pooling=pooling, norm=norm),
        reconstruction=ReconstructionConfig(patches=3, side=side, share=patch_share),
        **around,
    )
    generator = torch.Generator().manual_seed(seed)
    inputs = InputConfig(mean=(0.6, 0.5, 0.7), std=(0.2, 0.3, 0.25), glass=(GLASS,) * 3)
    model = LocalClassifier.from_config(config, classes=["a", "b", "c"], inputs=inputs, generator=generator)
    randomise(model, generator)
    return model


def plain_readout(head: Head, z_NC: Tensor, generator: torch.Generator | None) -> Tensor:
    """Method part 1: norm, ReLU, gated attention, two linear layers; one group per channel over the cells.

    With "cohort" there is a scale and a shift instead of the norm; with "auto" every cell goes through the two
    layers, and each class has a softmax of its own.
    """
    readout, norm = head.readout, head.readout.norm
    if isinstance(norm, CellNorm):
        centred = z_NC - z_NC.mean(0)
        z_NC = centred / (centred.square().mean(0) + norm.eps).sqrt()
    z_NC = F.relu(z_NC * norm.weight + norm.bias)
    kept_N = torch.ones(len(z_NC), dtype=z_NC.dtype)
    if generator is not None:  # dropout 0.2 on the weights
        kept_N = (torch.rand(len(z_NC), generator=generator) >= readout.rate) / (1 - readout.rate)
    if isinstance(readout, CellReadout):
        each_NL = readout.output(F.relu(readout.hidden(z_NC)))
        return (torch.softmax(2 * each_NL, 0) * kept_N[:, None] * each_NL).sum(0)
    pool = readout.attention
    scores = pool.score(torch.tanh(pool.value(z_NC)) * torch.sigmoid(pool.gate(z_NC)))
    weights_N = torch.softmax(scores.flatten(), 0) * kept_N
    return readout.output(F.relu(readout.hidden(weights_N @ z_NC)))


def plain_step(
    model: LocalClassifier, slide: Slide, label: int, generator: torch.Generator, *, glass_margin: int | None
) -> tuple[list[float], list[float], Tensor]:
    """Local training of the whole map at once; `glass_margin` None is the paper's: zeros around it, all vote."""
    margin = glass_margin or 0
    height, width = slide.shape_px
    unit = glass_margin or 1
    box = Box(-margin, -margin, height + margin + -height % unit, width + margin + -width % unit)
    image = torch.from_numpy(slide.read(box)).double() / 255
    x = model.stem((((image - model.mean) / model.std).permute(2, 0, 1))[None]).detach()
    stride, losses, rebuilt, logits = (slide.read(box).shape[0] and model_stem_stride(model)), [], [], []
    total = torch.zeros((), dtype=torch.double)
    for k, (part, head) in enumerate(zip(model.parts, model.heads, strict=True)):
        y = part(x)
        step = model.strides[k]
        stride *= step
        kernel = head.stem.stride[0]
        short = [max(0, kernel - n) for n in y.shape[2:]]
        z_HWC = head.stem(F.pad(y, (0, short[1], 0, short[0])))[0].permute(1, 2, 0)
        if glass_margin is None:
            z_NC = z_HWC.flatten(0, 1)
        else:
            z_NC = z_HWC[footprints(slide, z_HWC.shape[:2], stride * kernel, margin)]
        out = plain_readout(head, z_NC, generator)
        loss = F.cross_entropy(out[None], torch.tensor([label]))
        losses.append(float(loss.detach()))
        logits.append(out.detach())
        if k < len(model.decoders):
            frame = (x.shape[2] // step, x.shape[3] // step)
            if glass_margin is not None:
                frame = tuple(-(-n // (stride // step)) // step for n in slide.shape_px)
            boxes = draw_patches(
                slide.mask, model.config.reconstruction, mask_cell_px=slide.mask_cell_px, cell_px=stride,
                map_cells=frame, side=model.decoders[k].side, generator=generator,
            )  # fmt: skip
            at = margin // stride
            patches = torch.cat(
                [y[:, :, b.top + at : b.bottom + at, b.left + at : b.right + at] for b in boxes]
            )
            fine = [b.shifted(at, at).times(step) for b in boxes]
            target = torch.cat([x[:, :, b.top : b.bottom, b.left : b.right] for b in fine])
            l1 = (model.decoders[k](patches, scale=step) - target.detach()).abs().mean()
            rebuilt.append(float(l1.detach()))
            loss = loss + l1
        else:
            rebuilt.append(0.0)
        total, x = total + loss, y
        if (k + 1) % model.config.barrier_every == 0 or k + 1 == len(model.parts):
            total.backward()
            total, x = torch.zeros_like(total), y.detach()
    return losses, rebuilt, torch.stack(logits)


def model_stem_stride(model: LocalClassifier) -> int:
    return 240 // int(model.stem(torch.zeros(1, 3, 240, 240, dtype=torch.float64)).shape[2])


def footprints(slide: Slide, shape: torch.Size, side_px: int, margin: int) -> Tensor:
    """Head cells whose own square of pixels holds tissue, one by one."""
    tissue = np.kron(slide.mask, np.ones((slide.mask_cell_px,) * 2, bool))
    votes = torch.zeros(shape, dtype=torch.bool)
    for i in range(shape[0]):
        for j in range(shape[1]):
            top, left = i * side_px - margin, j * side_px - margin
            votes[i, j] = bool(
                tissue[max(0, top) : max(0, top + side_px), max(0, left) : max(0, left + side_px)].any()
            )
    return votes


def compare(
    model: LocalClassifier, slide: Slide, config: StreamConfig, *, glass_margin: int | None, seed: int
) -> StepResult:
    oracle = copy.deepcopy(model)
    losses, rebuilt, logits = plain_step(
        oracle, slide, 1, torch.Generator().manual_seed(seed), glass_margin=glass_margin
    )
    step = LocalStep(StreamedClassifier(model, config))
    result = step(slide, 1, generator=torch.Generator().manual_seed(seed))
    assert relative_error(result.logits_KL, logits) < TOLERANCE
    assert result.classification == pytest.approx(losses, rel=TOLERANCE)
    assert result.reconstruction == pytest.approx(rebuilt, rel=TOLERANCE)
    largest = max(float(p.grad.abs().max()) for p in oracle.parameters() if p.grad is not None)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), oracle.named_parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, name
        else:
            assert ours.grad is not None, name
            # A bias before a norm has no gradient but rounding: small ones are held against the largest.
            scale = max(float(theirs.grad.abs().max()), 1e-2 * largest)
            assert float((ours.grad - theirs.grad).abs().max()) < TOLERANCE * scale, name
    return result


@pytest.mark.parametrize("modules", [1, 2, 4, 8])
def test_the_papers_step_on_resnet34(modules: int) -> None:
    """Zeros around the raster, every cell pooled: the paper's own setting, at its K, on a ragged raster."""
    model = make_model("resnet34", modules, seed=modules, side=16, **ZEROS)
    slide = make_slide(211, 187, 8, 0.6, seed=modules)
    compare(model, slide, StreamConfig(tile_cells=18), glass_margin=None, seed=5)


@dataclass(frozen=True, slots=True)
class Backbone:
    """A network up to a layer; `glass_px` of glass, whole head cells, are further than one of its cells sees."""

    name: str
    truncate: str
    stem_stride: int | None
    glass_px: int


RESNET = Backbone("resnet18", "layer3", 3, 192)
DENSENET = Backbone("densenet121", "features.denseblock2", None, 144)
CONVNEXT = Backbone("convnext_tiny", "features.3", None, 144)


@dataclass(frozen=True, slots=True)
class Case:
    """A network, a slide and a way of streaming it; `patch_share` 100 lets patches reach past the tissue."""

    backbone: Backbone
    head: dict[str, str]
    modules: int
    barrier_every: int
    patch_share: float
    height: int
    width: int
    tissue: float
    tile_cells: int
    batch: int
    keep: int
    segment_units: int
    seed: int

    def model(self, **around: str) -> LocalClassifier:
        return make_model(
            self.backbone.name, self.modules, seed=self.seed, truncate=self.backbone.truncate, kernel=2, side=16,
            patch_share=self.patch_share, barrier_every=self.barrier_every,
            stem_stride=self.backbone.stem_stride, **self.head, **around,
        )  # fmt: skip

    def slide(self) -> Slide:
        return make_slide(self.height, self.width, 8, self.tissue, self.seed)

    def stream(self) -> StreamConfig:
        return StreamConfig(
            tile_cells=self.tile_cells,
            batch=self.batch,
            keep=self.keep,
            segment_units=self.segment_units,
        )


cases = st.builds(
    Case,
    backbone=st.sampled_from([RESNET, DENSENET, CONVNEXT]),
    head=st.fixed_dictionaries(
        {"pooling": st.sampled_from(["auto", "gated"]), "norm": st.sampled_from(["slide", "cohort"])}
    ),
    modules=st.integers(1, 4),
    barrier_every=st.integers(1, 4),
    patch_share=st.sampled_from([0.25, 100.0]),
    height=st.integers(60, 130),
    width=st.integers(60, 130),
    tissue=st.sampled_from([0.02, 0.2, 1.0]),
    tile_cells=st.integers(5, 40),
    batch=st.integers(1, 3),
    keep=st.integers(0, 3),
    segment_units=st.integers(0, 3),
    seed=st.integers(0, 10**6),
)
light = settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))


@light
@given(cases)
def test_any_network_with_a_border_of_zeros(case: Case) -> None:
    compare(case.model(**ZEROS), case.slide(), case.stream(), glass_margin=None, seed=case.seed)


@light
@given(cases)
def test_any_network_on_endless_glass(case: Case) -> None:
    compare(case.model(), case.slide(), case.stream(), glass_margin=case.backbone.glass_px, seed=case.seed)


@pytest.mark.parametrize("barrier_every", [2, 3])
@pytest.mark.parametrize("around", [{}, ZEROS])
def test_fewer_barriers(barrier_every: int, around: dict[str, str]) -> None:
    """Gradients cross from module to module, and each module's own loss adds to them."""
    model = make_model(
        "resnet18", 3, seed=1, truncate="layer3", kernel=2, side=7, barrier_every=barrier_every, **around
    )
    slide = make_slide(110, 140, 8, 0.1, seed=2)
    config = StreamConfig(tile_cells=6, keep=2)
    compare(model, slide, config, glass_margin=None if around else 192, seed=3)


@pytest.mark.parametrize("tile", [5, 100])
def test_patches_reach_past_all_that_sees_tissue(tile: int) -> None:
    """Their cells of bare glass are one vector, whose gradient counts as well."""
    model = make_model(
        "resnet18", 3, seed=1, truncate="layer2", kernel=2, side=24, patch_share=1e6, stem_stride=None
    )
    slide = make_slide(240, 240, 8, 0.0, seed=0)
    compare(model, slide, StreamConfig(tile_cells=tile), glass_margin=192, seed=3)


def test_a_block_may_name_its_layers_in_any_order() -> None:
    """The first that is named takes other channels than the first that runs."""
    model = make_model("resnet18", 2, seed=1, truncate="layer2", kernel=2, side=7)
    for block in (m for m in model.parts.modules() if isinstance(m, BasicBlock)):
        for name in ("conv1", "bn1"):
            block._modules[name] = block._modules.pop(name)  # to the end
    assert next(m for m in model.parts[1][0].modules() if isinstance(m, nn.Conv2d)).in_channels == 128
    compare(model, make_slide(60, 70, 8, 0.3, seed=2), StreamConfig(tile_cells=8), glass_margin=96, seed=3)


@pytest.mark.parametrize("modules", [1, 3])
@pytest.mark.parametrize("around", [{}, ZEROS])
def test_heads_alone_get_what_they_get_beside_the_backbone(modules: int, around: dict[str, str]) -> None:
    model = make_model("resnet18", modules, seed=1, truncate="layer3", kernel=2, side=7, **around)
    slide = make_slide(110, 140, 8, 0.4, seed=2)

    def grads(*, backbone: bool) -> dict[str, Tensor | None]:
        model.zero_grad()
        step = LocalStep(StreamedClassifier(model, StreamConfig(tile_cells=6)))
        step(slide, 1, generator=torch.Generator().manual_seed(3), heads_alone=not backbone)
        return {name: p.grad for name, p in model.named_parameters()}

    alone, beside = grads(backbone=False), grads(backbone=True)
    for name, grad in beside.items():
        if name.startswith("parts."):
            assert alone[name] is None, name
        elif grad is not None:
            torch.testing.assert_close(alone[name], grad, rtol=1e-10, atol=1e-13, msg=name)
