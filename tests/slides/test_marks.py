"""What is left out of the tissue, by itself and on phantoms that have it: pen, debris, blur; and each switch."""

import dataclasses

import cv2
import numpy as np
import pytest

from holoslide.geometry import Box
from holoslide.slides._paint import INKS_RGB, Stain
from holoslide.slides.focus import out_of_focus
from holoslide.slides.phantom import PhantomConfig, draw_phantom, write_pyramid
from holoslide.slides.reader import open_slide
from holoslide.slides.region import Region, find_region
from holoslide.slides.tissue import TissueConfig, find_tissue
from tests.slides.drawn import blobs, iou, paint

PLAIN = PhantomConfig(mpp=2.0, least_um=2000, most_um=2400, pen=0.0, truth_um=8)


def found_on(tmp_path, config, *, stain=None, seed=(3, 1), **settings):
    """A phantom as a slide file, its region, and the truth on the region's grid: tissue, ink, blurred."""
    phantom = draw_phantom("focus", "benign", seed=seed, config=config, stain=stain)
    write_pyramid(tmp_path / "slide.tiff", phantom.pixels, config)
    with open_slide(tmp_path / "slide.tiff") as slide:
        region: Region = find_region(slide, TissueConfig(**settings))
    planes = [phantom.tissue, phantom.ink, phantom.blurred]
    assert all(plane.shape == region.tissue.shape for plane in planes)
    return region, *planes


@pytest.mark.parametrize("colour", sorted(INKS_RGB))
def test_pen_of_every_colour_is_left_out_unless_it_is_wanted(tmp_path, colour):
    config = dataclasses.replace(PLAIN, pen=1.0, pen_colour=colour)
    region, tissue, ink, _ = found_on(tmp_path, config)
    assert ink.sum() > 300
    assert iou(region.tissue, tissue & ~ink) >= 0.95
    assert (region.tissue & ink).sum() < 0.15 * ink.sum()
    assert (region.pen & ink).sum() > 0.85 * ink.sum()
    region, *_ = found_on(tmp_path, config, skip_pen=False)
    assert (region.tissue & ink).sum() > 0.8 * ink.sum()
    assert not region.pen.any()


def test_blood_in_the_tissue_is_no_pen():
    tissue = blobs((400, 500))
    rgb = paint(tissue)
    lake = np.zeros(tissue.shape, np.uint8)
    y, x = np.argwhere(cv2.erode(tissue.astype(np.uint8), np.ones((61, 61))) > 0)[0]
    cv2.circle(lake, (int(x), int(y)), 20, 1, -1)
    rgb[lake > 0] = (190, 50, 58)
    assert find_tissue(rgb, 8.0, TissueConfig())[lake > 0].all()


def test_debris_is_left_out_unless_it_is_wanted(tmp_path):
    config = dataclasses.replace(PLAIN, debris=1.0)
    region, tissue, *_ = found_on(tmp_path, config)
    assert iou(region.tissue, tissue) >= 0.95
    outside = (region.tissue & ~tissue).sum()
    region, *_ = found_on(tmp_path, config, skip_debris=False)
    assert (region.tissue & ~tissue).sum() > outside + 250


def test_what_is_out_of_focus_is_left_out_unless_it_is_wanted(tmp_path):
    config = dataclasses.replace(PLAIN, blurred=1.0, least_um=3000, most_um=3200)
    region, tissue, _, blurred = found_on(tmp_path, config)
    assert blurred.sum() > 3000
    assert iou(region.tissue, tissue & ~blurred) >= 0.9
    assert (region.blurred & ~blurred).sum() < 0.08 * blurred.sum()
    region, *_ = found_on(tmp_path, config, skip_blur=False)
    assert iou(region.tissue, tissue) >= 0.95
    assert not region.blurred.any()


@pytest.mark.parametrize("what", ["pale", "grey", "fatty"])
def test_hard_slides(tmp_path, what):
    usual = Stain()
    pale = Stain(haematoxylin=(0.4, 0.4, 0.2), eosin=(0.04, 0.3, 0.2))
    stain = {"pale": pale, "grey": dataclasses.replace(usual, glass=(176, 177, 179)), "fatty": usual}[what]
    config = dataclasses.replace(PLAIN, fat=60 if what == "fatty" else 0)
    region, tissue, *_ = found_on(tmp_path, config, stain=stain)
    assert iou(region.tissue, tissue) >= 0.95


def test_a_large_slide_is_looked_at_in_samples_and_bounded_memory():
    """The boxes that are read are few and small, however large the slide."""
    rng = np.random.default_rng(0)
    sharp = rng.integers(120, 220, (128, 128, 3), dtype=np.uint8)
    soft = cv2.GaussianBlur(sharp, (0, 0), 4)
    soft = np.clip((soft.astype(float) - soft.mean()) * 8 + 170, 0, 255).astype(np.uint8)
    seen: list[Box] = []

    def read(box: Box) -> np.ndarray:
        seen.append(box)
        return soft if box.left >= 20_000 else sharp

    tissue = np.ones((5000, 10_000), np.bool_)
    found = out_of_focus(read, tissue, 4.0, least=0.28)
    assert len(seen) <= 1024
    assert all(box.shape == (128, 128) for box in seen)
    assert not found[:, :4700].any()
    assert found[100:-100, 5400:9900].all()


def test_a_slide_too_coarse_to_tell_is_taken_for_sharp(tmp_path):
    config = dataclasses.replace(PLAIN, mpp=4.0, blurred=1.0)
    region, *_ = found_on(tmp_path, config, focus_mpp=1.5)
    assert not region.blurred.any()
