"""Exported heatmaps lie where the slide's cells are, and read as other programs read them."""

import dataclasses
import json
import uuid
from pathlib import Path

import h5py
import numpy as np
import pytest
import shapely
import tifffile

from holoslide.errors import ConfigError
from holoslide.geometry import Box
from holoslide.inference.export import Exported, hot_cells, write_geojson, write_h5
from holoslide.inference.export_tiff import step_for, write_ome_tiff
from holoslide.inference.heatmap import Heatmap

ORIGIN_L0, CELL_L0, SHAPE_L0 = (1003.5, 250.0), (96.0, 100.0), (2100, 3001)


@pytest.fixture
def slide() -> Exported:
    """7 x 9 cells with a hole, whose two lesions speak for class "b"; the grid does not begin at 0."""
    rng = np.random.default_rng(0)
    evidence = rng.uniform(-0.01, 0.0, (2, 7, 9)).astype(np.float32)
    evidence[0] *= -1  # all else speaks for "a"
    evidence[1, 1:3, 1:3] = 2.0
    evidence[1, 5, 7] = 1.0
    attention = rng.random((7, 9)).astype(np.float32)
    attention[3, :] = np.nan
    evidence[:, 3, :] = np.nan
    attention /= np.nansum(attention)
    heatmap = Heatmap(attention, evidence, np.array([0.1, -0.1], np.float32), ORIGIN_L0, CELL_L0, ("a", "b"))
    return Exported("s 1", heatmap, "b", SHAPE_L0, (0.25, 0.5), Box(0, 0, *SHAPE_L0))


def read_geojson(path: Path, kind: str) -> list[dict]:
    content = json.loads(path.read_text())
    assert content["type"] == "FeatureCollection"
    return [f for f in content["features"] if f["properties"]["objectType"] == kind]


def test_geojson_has_a_detection_for_every_cell_that_votes(slide: Exported, tmp_path: Path) -> None:
    write_geojson(tmp_path / "s.geojson", slide)
    cells = read_geojson(tmp_path / "s.geojson", "detection")
    assert len(cells) == 6 * 9
    for number, (y, x) in enumerate(np.argwhere(np.isfinite(slide.heatmap.attention_HW))):
        polygon = shapely.geometry.shape(cells[number]["geometry"])
        top, left = ORIGIN_L0[0] + y * CELL_L0[0], ORIGIN_L0[1] + x * CELL_L0[1]
        assert polygon.bounds == (left, top, left + CELL_L0[1], top + CELL_L0[0])
        measured = cells[number]["properties"]["measurements"]
        assert measured["attention"] == pytest.approx(slide.heatmap.attention_HW[y, x])
        assert measured["evidence for b (logits)"] == pytest.approx(slide.heatmap.evidence_LHW[1, y, x])
        assert all(0 <= channel <= 255 for channel in cells[number]["properties"]["color"])


def test_geojson_regions_are_the_lesions(slide: Exported, tmp_path: Path) -> None:
    write_geojson(tmp_path / "s.geojson", slide, share=1.0)
    write_geojson(tmp_path / "half.geojson", slide, share=0.5)
    big, small = read_geojson(tmp_path / "s.geojson", "annotation")[:2]
    assert shapely.geometry.shape(big["geometry"]).bounds == (350.0, 1099.5, 550.0, 1291.5)
    assert shapely.geometry.shape(small["geometry"]).bounds == (950.0, 1483.5, 1050.0, 1579.5)
    assert big["properties"]["classification"]["name"] == "hot: b"
    measured = big["properties"]["measurements"]
    assert measured["area (um^2)"] == pytest.approx(200 * 192 * 0.25 * 0.5)
    assert measured["cells"] == 4
    assert len(read_geojson(tmp_path / "half.geojson", "annotation")) == 1


def test_geojson_ids_are_unique_uuids_that_do_not_change(slide: Exported, tmp_path: Path) -> None:
    write_geojson(tmp_path / "one.geojson", slide)
    write_geojson(tmp_path / "two.geojson", slide)
    assert (tmp_path / "one.geojson").read_bytes() == (tmp_path / "two.geojson").read_bytes()
    ids = [feature["id"] for feature in json.loads((tmp_path / "one.geojson").read_text())["features"]]
    assert len({uuid.UUID(each) for each in ids}) == len(ids)


def test_geojson_of_two_models_can_lie_on_one_slide(slide: Exported, tmp_path: Path) -> None:
    ids = []
    for model in ("one", "other"):
        write_geojson(tmp_path / "s.geojson", dataclasses.replace(slide, model=model))
        features = json.loads((tmp_path / "s.geojson").read_text())["features"]
        ids.append({feature["id"] for feature in features})
    assert not ids[0] & ids[1]


def test_geojson_counts_from_the_corner_that_qupath_crops_to(slide: Exported, tmp_path: Path) -> None:
    cropped = dataclasses.replace(slide, frame_l0=Box(1000, 200, *SHAPE_L0))
    write_geojson(tmp_path / "s.geojson", cropped)
    first = read_geojson(tmp_path / "s.geojson", "detection")[0]
    assert shapely.geometry.shape(first["geometry"]).bounds[:2] == (50.0, 3.5)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_share_that_cannot_be_is_refused(slide: Exported, tmp_path: Path, share: float) -> None:
    with pytest.raises(ConfigError, match="share"):
        write_geojson(tmp_path / "s.geojson", slide, share=share)


def test_no_cell_is_hot_where_nothing_speaks_for_the_prediction() -> None:
    assert not hot_cells(np.array([[-1.0, 0.0, np.nan]]), 0.5).any()


def test_h5_is_as_clam_writes_it(slide: Exported, tmp_path: Path) -> None:
    write_h5(tmp_path / "s.h5", slide)
    with h5py.File(tmp_path / "s.h5") as file:
        coords, scores = file["coords"], file["attention_scores"]
        assert (coords.shape, scores.shape) == ((54, 2), (54, 1))
        assert coords.dtype.kind == "i"
        wanted = {
            "patch_size",
            "patch_level",
            "downsample",
            "downsampled_level_dim",
            "level_dim",
            "name",
            "save_path",
        }
        assert wanted <= set(coords.attrs)
        assert tuple(coords.attrs["level_dim"]) == SHAPE_L0[::-1]
        rows, columns = np.nonzero(np.isfinite(slide.heatmap.attention_HW))
        xy = np.stack([ORIGIN_L0[1] + columns * CELL_L0[1], ORIGIN_L0[0] + rows * CELL_L0[0]], axis=1)
        assert np.abs(coords[:] - xy).max() <= 0.5
        np.testing.assert_array_equal(scores[:, 0], slide.heatmap.attention_HW[rows, columns])
        assert "1 in all" in scores.attrs["meaning"]  # CLAM's own are scores, which need not sum to 1
        logits = file["evidence"][:].sum(axis=0) + file["evidence"].attrs["bias"]
        np.testing.assert_allclose(
            logits, np.nansum(slide.heatmap.evidence_LHW, (1, 2)) + slide.heatmap.bias_L, rtol=1e-4
        )


def test_ome_tiff_lies_on_the_slide(slide: Exported, tmp_path: Path) -> None:
    """Corner on corner, and its um per pixel times its size is the slide's size."""
    path = tmp_path / "s.ome.tif"
    write_ome_tiff(path, slide)
    step = step_for(CELL_L0)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_ome
        series = tiff.series[0]
        pixels = series.asarray()
        levels = [level.shape for level in series.levels]
        image = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]
        page = tiff.pages[0]
        um_x, um_y = (
            10_000 / (n / d) for n, d in (page.tags["XResolution"].value, page.tags["YResolution"].value)
        )
    assert (series.axes, pixels.dtype, pixels.shape) == (
        "CYX",
        np.float32,
        (3, -(-2100 // step), -(-3001 // step)),
    )
    assert (image["PhysicalSizeY"], image["PhysicalSizeX"]) == (0.25 * step, 0.5 * step)
    assert (um_y, um_x) == pytest.approx((0.25 * step, 0.5 * step))
    names = [channel["Name"] for channel in image["Channel"]]
    assert names == ["attention, times the average", "evidence for a (logits)", "evidence for b (logits)"]
    assert len(levels) == 1 + (max(levels[0][1:]) > 256)
    for y, x in np.argwhere(np.isfinite(slide.heatmap.attention_HW)):
        row = (ORIGIN_L0[0] + (y + 0.5) * CELL_L0[0]) / step
        column = (ORIGIN_L0[1] + (x + 0.5) * CELL_L0[1]) / step
        assert pixels[2, int(row), int(column)] == pytest.approx(
            slide.heatmap.evidence_LHW[1, y, x], rel=1e-5
        )
    assert np.isnan(pixels[:, 0, 0]).all()


def test_ome_tiff_of_a_large_slide_is_a_pyramid_of_means(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    values = rng.random((60, 70)).astype(np.float32)
    heatmap = Heatmap(values, values[None], np.zeros(1, np.float32), (0.0, 0.0), (16.0, 16.0), ("a",))
    path, shape = tmp_path / "s.ome.tif", (6000, 7000)
    write_ome_tiff(path, Exported("s", heatmap, "a", shape, (0.5, 0.5), Box(0, 0, *shape)))
    with tifffile.TiffFile(path) as tiff:
        levels = [level.asarray() for level in tiff.series[0].levels]
    assert [level.shape[1:] for level in levels] == [(750, 875), (375, 438), (188, 219)]
    corner = levels[0][1, :120, :140].reshape(60, 2, 70, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(levels[1][1, :60, :70], corner, rtol=1e-5)
