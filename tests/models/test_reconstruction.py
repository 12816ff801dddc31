"""RFR: patches lie in the tissue and in the map, whatever its size; the decoder against plain layers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from holoslide.errors import ConfigError, SlideError
from holoslide.geometry import Box
from holoslide.models.options import ReconstructionConfig
from holoslide.models.reconstruction import Decoder, draw_patches


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    map_cells=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    side=st.integers(1, 40),
    cell_px=st.sampled_from([4, 6, 12, 48]),
    mask_cell_px=st.sampled_from([1, 7, 16, 64]),
    share=st.sampled_from([None, 0.1, 0.5]),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_patches_lie_in_the_map_and_hold_their_tissue(
    map_cells: tuple[int, int], side: int, cell_px: int, mask_cell_px: int, share: float | None, seed: int
) -> None:
    shape = tuple(-(-n * cell_px // mask_cell_px) for n in map_cells)
    mask = np.random.default_rng(seed).random(shape) < 0.1
    mask[0, 0] = True
    config = ReconstructionConfig(patches=5, share=share)
    boxes = draw_patches(
        mask,
        config,
        mask_cell_px=mask_cell_px,
        cell_px=cell_px,
        map_cells=map_cells,
        side=side,
        generator=seeded(seed),
    )
    assert len(boxes) == 5
    if share is not None:  # a patch has one cell at least
        tissue_cells = mask.sum() * (mask_cell_px / cell_px) ** 2
        side = min(side, max(1, int((share * tissue_cells / 5) ** 0.5)))
    for box in boxes:
        assert box.shape == (min(side, map_cells[0]), min(side, map_cells[1]))
        assert Box(0, 0, *map_cells).contains(box)
        # Its pixels, and those of one more cell at the map's ragged end, touch tissue.
        px = box.times(cell_px)
        rows, columns = (
            slice(a // mask_cell_px, -(-(b + cell_px) // mask_cell_px))
            for a, b in ((px.top, px.bottom), (px.left, px.right))
        )
        assert mask[rows, columns].any()


def test_patches_are_centred_on_tissue_uniformly() -> None:
    mask = np.zeros((20, 20), np.bool_)
    mask[10, 5:15] = True
    config = ReconstructionConfig(patches=4000, share=None)
    boxes = draw_patches(
        mask, config, mask_cell_px=32, cell_px=8, map_cells=(80, 80), side=6, generator=seeded()
    )
    centres = np.array([(box.top + 3, box.left + 3) for box in boxes])
    assert centres[:, 0].min() == 40  # mask row 10 is cells 40 to 43
    assert centres[:, 0].max() == 43
    assert np.unique(centres[:, 1]).tolist() == list(range(20, 60))
    counts = np.bincount(centres[:, 1])[20:]
    assert counts.min() > 60  # 100 expected


def test_patches_come_from_their_generator_alone() -> None:
    options = {
        "mask_cell_px": 8,
        "cell_px": 8,
        "map_cells": (30, 30),
        "side": 4,
        "config": ReconstructionConfig(),
    }
    mask = np.ones((30, 30), np.bool_)
    state = torch.get_rng_state()
    first = draw_patches(mask, **options, generator=seeded(1))
    assert first == draw_patches(mask, **options, generator=seeded(1))
    assert first != draw_patches(mask, **options, generator=seeded(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_no_tissue_is_an_error() -> None:
    with pytest.raises(SlideError, match="the tissue mask is empty"):
        draw_patches(
            np.zeros((3, 3), np.bool_),
            ReconstructionConfig(),
            mask_cell_px=8,
            cell_px=8,
            map_cells=(3, 3),
            side=2,
            generator=seeded(),
        )


@pytest.mark.parametrize("scale", [1, 2, 6])
def test_the_decoder_is_the_methods(scale: int) -> None:
    decoder = Decoder(8, 4, side=5).double()
    patches = torch.rand(3, 8, 5, 4, dtype=torch.float64)
    first, norm, _, second = decoder.layers
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    with torch.no_grad():
        fine = F.interpolate(patches, size=(5 * scale, 4 * scale), mode="bilinear", align_corners=True)
        hidden = F.conv2d(fine, first.weight, padding=1)
        mean = hidden.mean(dim=(0, 2, 3), keepdim=True)
        variance = hidden.var(dim=(0, 2, 3), keepdim=True, correction=0)
        hidden = (hidden - mean) / (variance + norm.eps).sqrt()
        hidden = F.relu(hidden * norm.weight[:, None, None] + norm.bias[:, None, None])
        expected = F.conv2d(hidden, second.weight, second.bias, padding=1)
        torch.testing.assert_close(decoder(patches, scale=scale), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(decoder.eval()(patches, scale=scale), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [1, 2])
def test_patch_by_patch_gives_the_gradients_of_all_at_once(scale: int) -> None:
    decoder = Decoder(6, 4, side=5).double()
    patches = torch.rand(3, 6, 5, 4, dtype=torch.float64)
    target = torch.rand(3, 4, 5 * scale, 4 * scale, dtype=torch.float64)
    leaf = patches.clone().requires_grad_()
    loss = decoder.loss(leaf, target, scale=scale)
    (0.3 * loss).backward()
    expected = [leaf.grad, *(p.grad.clone() for p in decoder.parameters())]
    decoder.zero_grad()
    total, grads = decoder.pull_back(patches, target, scale=scale, weight=0.3)
    assert total == pytest.approx(float(loss.detach()), rel=1e-12)
    for got, wanted in zip([grads, *(p.grad for p in decoder.parameters())], expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14)
    assert not patches.requires_grad


def test_a_map_of_one_cell_is_reconstructed_too() -> None:
    boxes = draw_patches(
        np.ones((1, 1), np.bool_),
        ReconstructionConfig(patches=2),
        mask_cell_px=64,
        cell_px=48,
        map_cells=(1, 1),
        side=32,
        generator=seeded(),
    )
    assert boxes == [Box(0, 0, 1, 1)] * 2
    rebuilt = Decoder(8, 4, side=32)(torch.rand(2, 8, 1, 1), scale=1)
    assert rebuilt.shape == (2, 4, 1, 1)
    assert rebuilt.isfinite().all()


def test_options_are_checked_when_made() -> None:
    with pytest.raises(ConfigError, match=r"model.reconstruction.patches: is 1; give 2 or more"):
        ReconstructionConfig(patches=1)
    with pytest.raises(ConfigError, match=r"model.reconstruction.share: is 0; give more than 0, or null"):
        ReconstructionConfig(share=0)
