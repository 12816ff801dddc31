"""Users' own masks: every format against shapely, what is refused, and a raster that follows its mask."""

import json
import pickle
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from shapely import contains_xy
from shapely.affinity import translate
from shapely.geometry import MultiPolygon, Point, Polygon, mapping, shape

from holoslide import cli
from holoslide.errors import SlideError
from holoslide.geometry import Box
from holoslide.slides import prepare as prepare_module
from holoslide.slides.outlines import Frame, find_outline, outline_sha256, read_outline
from holoslide.slides.prepare import PrepareConfig, PrepareJob, prepare_slide
from holoslide.slides.raster import Raster
from holoslide.slides.reader import Reader, open_slide
from tests.slides.drawn import blobs, iou, paint, write_slide

FRAME = Frame(shape=(150, 200), origin_l0=(80, 40), l0_per_px=(8.0, 8.0), shape_l0=(1400, 1700))
DISC = Polygon(Point(800, 700).buffer(400).exterior.coords, [Point(800, 700).buffer(150).exterior.coords])
BAR = Polygon([(1300, 200), (1500, 220), (1480, 900), (1290, 880)])


def truth(area: Polygon | MultiPolygon) -> np.ndarray:
    y, x = np.mgrid[: FRAME.shape[0], : FRAME.shape[1]]
    return contains_xy(area, 40 + (x + 0.5) * 8, 80 + (y + 0.5) * 8)


def contour(ring) -> np.ndarray:
    return np.rint(np.array(ring.coords)[:-1]).astype(np.int32)[:, None]


def collection(*geometries, **properties) -> str:
    features = [{"type": "Feature", "geometry": mapping(g), "properties": properties} for g in geometries]
    return json.dumps({"type": "FeatureCollection", "features": features})


def test_polygons_with_holes_from_every_tool(tmp_path: Path) -> None:
    both = MultiPolygon([DISC, BAR])
    (tmp_path / "qupath.geojson").write_text(collection(DISC, BAR, objectType="annotation"))
    (tmp_path / "multi.json").write_text(json.dumps(mapping(both)))
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:OGC:1.3:CRS84"}}
    trident = json.loads(collection(DISC, BAR, tissue_id=1)) | {"name": "trident", "crs": crs}
    (tmp_path / "trident.geojson").write_text(json.dumps(trident))
    clam = {
        "holes": [[contour(DISC.interiors[0])], []],
        "tissue": [contour(DISC.exterior), contour(BAR.exterior)],
    }
    (tmp_path / "clam.pkl").write_bytes(pickle.dumps(clam, protocol=4))
    whole = np.zeros((700, 850), np.uint8)
    y, x = np.mgrid[:700, :850]
    whole[contains_xy(both, (x + 0.5) * 2, (y + 0.5) * 2)] = 1  # a label image: 1 is tissue
    cv2.imwrite(str(tmp_path / "picture.png"), whole)
    for path in sorted(tmp_path.iterdir()):
        assert iou(read_outline(path, FRAME), truth(both)) > 0.98, path.name


def test_what_is_classified_to_be_ignored_is_taken_out(tmp_path: Path) -> None:
    ignored = {
        "type": "Feature",
        "geometry": mapping(BAR),
        "properties": {"classification": {"name": "Ignore*"}},
    }
    whole = Polygon([(100, 100), (1600, 100), (1600, 1200), (100, 1200)])
    path = tmp_path / "one.geojson"
    path.write_text(
        json.dumps([ignored, {"type": "Feature", "geometry": mapping(whole), "properties": None}])
    )
    assert iou(read_outline(path, FRAME), truth(whole.difference(BAR))) > 0.98


def test_qupath_counts_from_the_corner_of_the_scanned_part(tmp_path: Path) -> None:
    """MRXS and SCN say which part was scanned, and QuPath shows that alone; others count from the first pixel."""
    scanned = Box(60, 200, 1360, 1660)
    frame = replace(FRAME, scanned_l0=scanned)
    drawn = translate(DISC, -scanned.left, -scanned.top)
    for name, geometry, properties in (
        ("new", drawn, {"objectType": "annotation"}),
        ("old", drawn, {"isLocked": False, "measurements": []}),
        ("trident", DISC, {"tissue_id": 1}),
    ):
        path = tmp_path / f"{name}.geojson"
        path.write_text(collection(geometry, **properties))
        assert iou(read_outline(path, frame), truth(DISC)) > 0.98, name
    path.write_text(collection(translate(DISC, 300, 0), objectType="annotation"))
    with pytest.raises(SlideError, match=r"1460 x 1300 pixels, the scanned part.*without --no-crop"):
        read_outline(path, frame)
    assert len({outline_sha256(path, Box(0, 0, 9, 9)), outline_sha256(path, scanned)}) == 2  # made anew


def test_a_raster_lies_where_qupath_shows_its_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = write_slide(tmp_path / "one.tif", paint(np.ones((400, 500), np.bool_)), 2.0)
    square = Polygon([(80, 60), (180, 60), (180, 160), (80, 160)])
    (tmp_path / "one.geojson").write_text(collection(square, objectType="annotation"))

    def bounded(path: Path, **more: Any) -> Reader:
        reader = open_slide(path, **more)
        reader.bounds_l0 = Box(40, 200, 400, 500)
        return reader

    monkeypatch.setattr(prepare_module, "open_slide", bounded)
    job = PrepareJob("one", slide, mask=tmp_path / "one.geojson")
    (tmp_path / "out").mkdir()
    made = prepare_slide(job, tmp_path / "out", PrepareConfig(mpp=2.0))
    assert made.path is not None
    with Raster.open(made.path) as raster:
        assert raster.origin_l0 == (100, 280)


def test_transparent_is_no_tissue(tmp_path: Path) -> None:
    picture = np.full((140, 170, 4), 255, np.uint8)
    picture[:, :85, 3] = 0
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    found = read_outline(tmp_path / "a.png", FRAME)
    assert not found[:, :100].any()
    assert found[:, 101:].all()


@pytest.mark.parametrize(
    ("background", "tissue", "is_clear"),
    [
        ((0, 0, 0), (255, 255, 255), True),  # GIMP in black and white
        ((0, 0, 0), (0, 0, 1), True),
        ((255, 255, 255, 0), (255, 0, 0, 255), True),  # what is transparent is no tissue, whatever its colour
        ((255, 255, 255), (200, 0, 0), False),  # QuPath's labels on white
        ((255, 255, 255), (0, 0, 0), False),  # ImageJ's inverting table, or a painter's white on black
    ],
)
def test_a_palette_is_read_where_its_colours_and_its_numbers_agree(
    tmp_path: Path, background: tuple[int, ...], tissue: tuple[int, ...], *, is_clear: bool
) -> None:
    numbers = np.zeros((140, 170), np.uint8)
    numbers[:, 85:] = 1
    picture = Image.fromarray(numbers, "L")
    picture.putpalette([*background, *tissue], "RGBA" if len(tissue) == 4 else "RGB")
    picture.save(tmp_path / "a.png", **({"transparency": bytes([0, 255])} if len(tissue) == 4 else {}))
    if is_clear:
        found = read_outline(tmp_path / "a.png", FRAME)
        assert not found[:, :100].any()
        assert found[:, 101:].all()
        return
    with pytest.raises(
        SlideError, match=r"a.png: has a palette in which 0 is not black, .*; save it as grey, "
    ):
        read_outline(tmp_path / "a.png", FRAME)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


HUGE = (  # a PNG of 40,000 x 40,000 pixels of one bit, but for most of them
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 1, 0, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress(bytes(5001)))
    + chunk(b"IEND", b"")
)


class Evil:
    def __reduce__(self):
        return subprocess.getoutput, ("touch /tmp/holoslide-was-here",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.geojson", b"{", "is no GeoJSON of polygons"),
        ("a.geojson", collection(Point(3, 4)).encode(), "a Point has no area"),
        ("a.geojson", collection().encode(), "holds no polygon; draw the tissue"),
        ("a.json", b"[" * 100_000, "is no GeoJSON"),
        ("a.geojson", collection(BAR.buffer(900)).encode(), "on a slide of 1700 x 1400 pixels; give a mask"),
        ("a.geojson", b'{"type":"Polygon","coordinates":[[[0,0],[1,null],[2,2]]]}', "is no GeoJSON of polygons"),
        ("a.pkl", pickle.dumps(Evil()), "it names subprocess.getoutput"),
        ("a.pkl", pickle.dumps({"tissue": []}), "is no CLAM segmentation"),
        ("a.pkl", b"", "is no CLAM segmentation"),
        ("a.png", b"", "is no PNG"),
        ("a.png", HUGE, r"has more than 2\^30 pixels, too many to decode; make it smaller"),
        ("a.png", cv2.imencode(".png", np.ones((100, 200), np.uint8))[1].tobytes(), "of its proportions"),
        ("a.svg", b"", "is no mask in a known format; give .geojson"),
    ],
)  # fmt: skip
def test_what_is_no_mask_of_the_slide_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SlideError, match=message) as refused:
        read_outline(tmp_path / name, FRAME)
    assert "\n" not in str(refused.value)
    assert not Path("/tmp/holoslide-was-here").exists()


def test_masks_are_found_by_slide_id(tmp_path: Path) -> None:
    (tmp_path / "a.b.geojson").touch()
    assert find_outline(tmp_path, "a.b") == tmp_path / "a.b.geojson"
    with pytest.raises(SlideError, match=r"a: has no mask in .*; add it; or name the masks in the table"):
        find_outline(tmp_path, "a")
    (tmp_path / "a.b.png").touch()
    with pytest.raises(SlideError, match=r"a.b: has 2 masks: a.b.geojson, a.b.png; keep one"):
        find_outline(tmp_path, "a.b")


def test_a_changed_mask_makes_the_raster_anew(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "one.tif", paint(blobs((400, 500))), 2.0)
    mask = tmp_path / "one.geojson"
    mask.write_text(json.dumps(mapping(Polygon([(100, 50), (300, 50), (300, 250), (100, 250)]))))
    (tmp_path / "out").mkdir()
    config = PrepareConfig(mpp=2.0)
    job = PrepareJob("one", slide, mask=mask)
    assert prepare_slide(job, tmp_path / "out", config).status == "made"
    assert prepare_slide(job, tmp_path / "out", config).status == "reused"
    with Raster.open(tmp_path / "out" / "one.tif") as raster:
        assert (
            abs(raster.tissue_px - 200 * 200) < 200 * 4 * 8
        )  # within a cell of its border, and no tissue left out
        assert raster.origin_l0[0] in range(40, 51)
        first = raster.record.recipe.mask_sha256
    mask.write_text(json.dumps(mapping(Polygon([(100, 50), (300, 50), (300, 150), (100, 150)]))))
    assert prepare_slide(job, tmp_path / "out", config).status == "made"
    with Raster.open(tmp_path / "out" / "one.tif") as raster:
        assert raster.record.recipe.mask_sha256 not in (None, first)
        assert abs(raster.tissue_px - 200 * 100) < 200 * 4 * 8
    assert prepare_slide(PrepareJob("one", slide), tmp_path / "out", config).status == "made"


def test_the_command_line_takes_masks_by_folder_and_by_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "masks").mkdir()
    for n, name in enumerate(("one", "two")):
        write_slide(tmp_path / f"{name}.tif", paint(blobs((400, 500), seed=n), seed=n), 2.0)
    square = mapping(Polygon([(100, 50), (300, 50), (300, 250), (100, 250)]))
    (tmp_path / "masks" / "one.geojson").write_text(json.dumps(square))
    (tmp_path / "slides.csv").write_text("slide_id,path,mask\none,one.tif,masks/one.geojson\ntwo,two.tif,\n")
    (tmp_path / "plain.csv").write_text("slide_id,path\none,one.tif\ntwo,two.tif\n")

    def areas(*arguments: str) -> list[dict]:
        command = ["holoslide", "audit", "--json", "--workers", "1", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit):
            cli.main()
        return json.loads(capsys.readouterr().out)

    by_column = areas(str(tmp_path / "slides.csv"))["slides"]
    assert [each["own_mask"] for each in by_column] == [True, False]
    assert by_column[0]["tissue_mm2"] == pytest.approx(0.16, rel=0.05)
    by_folder = areas(str(tmp_path / "plain.csv"), "--masks", str(tmp_path / "masks"))
    assert [each["slide_id"] for each in by_folder["slides"]] == ["one"]
    assert [(f["kind"], f["where"]) for f in by_folder["findings"] if f["severity"] == "error"] == [
        ("no mask", "two")
    ]


@pytest.mark.data
def test_the_files_of_other_tools(data_dir: Path) -> None:
    """A QuPath feature whose holes matter, and a collection of features that another program wrote."""
    path = data_dir / "interop" / "HistoQC_holed.geojson"
    area = shape(json.loads(path.read_text())["geometry"])
    frame = Frame((300, 300), (16000, 9000), (16.0, 16.0), (40_000, 40_000))
    found = read_outline(path, frame)
    assert found.sum() * 256 == pytest.approx(area.area, rel=0.02)
    assert found.sum() * 256 < 0.95 * Polygon(area.exterior).area
    frame = Frame((150, 300), (18_740, 8_340), (1.0, 1.0), (40_000, 40_000))
    nuclei = read_outline(data_dir / "interop" / "large_image_sample.geojson", frame)
    assert cv2.connectedComponents(nuclei.astype(np.uint8))[0] > 5
