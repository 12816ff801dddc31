"""The contact sheet: whole, sorted, escaped, and small enough for 500 slides."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from holoslide.errors import SlideError
from holoslide.slides.cohort import Cohort, SlideRow
from holoslide.slides.facts import Mpp
from holoslide.slides.findings import Finding
from holoslide.slides.sheet import cards, render, write_sheet
from holoslide.slides.survey import Areas, Survey, draw_picture, outline_path
from tests.slides.drawn import blobs, paint

HOSTILE = "<img src=x onerror=alert(1)>\"'&{{7*7}}</script>"


def slide(name: str, *, area: float = 20.0, blurred: float = 0.0, pen: float = 0.0, seed: int = 0) -> Survey:
    tissue = blobs((200, 260), seed=seed)
    return Survey(
        name, Path(f"{name}.svs"), vendor="aperio", shape_l0=(1600, 2080), mpp=Mpp(0.2525, 0.2525, "slide"),
        objective_power=40.0, areas=Areas(area, pen, blurred), tissue_rgb=(200.0, 120.0, 170.0),
        picture=draw_picture(paint(tissue), tissue),
    )  # fmt: skip


class Tags(HTMLParser):
    """Which tags there are, that all are closed, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_what_a_hostile_name_says_is_text() -> None:
    hostile = HOSTILE.replace("/", "")  # no slide id holds a slash
    row = SlideRow(hostile, HOSTILE, HOSTILE)
    survey = slide(hostile)
    findings = [
        Finding.of_slide("error", "unreadable", hostile, HOSTILE, HOSTILE),
        Finding("warning", "no patient", HOSTILE, HOSTILE, HOSTILE),
    ]
    page = render(Cohort.from_rows([row], name=HOSTILE), findings, [survey], command=HOSTILE)
    found = Tags(page)
    assert not {"script", "img", "iframe"} & {tag for tag, _ in found.tags}
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert found.text.count("onerror=alert(1)") >= 8
    assert "{{7*7}}" in found.text
    assert "default-src 'none'" in page
    addresses = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert addresses
    assert all(address.startswith("data:image/jpeg;base64,") for address in addresses)


def test_cards_say_what_is_known_and_the_most_suspicious_is_first() -> None:
    surveys = [slide(f"s{n}", area=20 + 0.1 * n, seed=n) for n in range(9)]
    surveys += [
        slide("small", area=0.5),
        slide("soft", blurred=10.0),
        slide("inked", pen=3.0),
        slide("broken"),
    ]
    rows = [SlideRow(each.slide_id, "p", "tumour") for each in surveys] + [SlideRow("away", "q")]
    findings = [
        Finding.of_slide("error", "unreadable", "broken", "is broken", "mend it"),
        Finding("error", "same pixels twice", "s1", "two", "one", also=("s1", "s2")),
        Finding.of_slide("warning", "no label", "away", "has no label", "add it"),
        Finding.of_slide("warning", "out of focus", "soft", "33%", "scan it again"),
        Finding("warning", "label confounded", "label", "goes with the site", "balance it"),
    ]
    cohort = Cohort.from_rows(rows)
    found = cards(cohort, findings, surveys)
    assert [card.slide_id for card in found[:4]] == ["s1", "s2", "broken", "soft"]
    assert {card.slide_id for card in found[4:7]} == {"inked", "small", "away"}
    assert [card.slide_id for card in found[7:]] == ["s0", "s3", "s4", "s5", "s6", "s7", "s8"]
    by_name = {card.slide_id: card for card in found}
    assert by_name["s2"].level == "error"
    assert by_name["small"].reasons == (("note", "little tissue for this cohort"),)
    assert by_name["inked"].reasons == (("note", "3 mm² of pen left out"),)
    assert "33% of the tissue out of focus" in by_name["soft"].reasons[1][1]
    text = Tags(render(cohort, findings, surveys)).text
    assert "20.1 mm²" in text
    assert "0.2525 µm/px (slide)" in text
    assert "goes with the site" in text
    assert text.count("is broken; mend it") == 1


def test_500_slides_are_one_page_of_a_few_megabytes(tmp_path: Path) -> None:
    one = slide("s")
    surveys = [
        Survey(f"s{n:03d}", one.path, mpp=one.mpp, areas=one.areas, picture=one.picture) for n in range(500)
    ]
    cohort = Cohort.from_rows([SlideRow(each.slide_id, "p") for each in surveys])
    write_sheet(tmp_path / "sheet.html", cohort, [], surveys)
    assert (tmp_path / "sheet.html").stat().st_size < 15_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.html"]
    with pytest.raises(SlideError, match=r"cannot be written .*; give another place for the contact sheet"):
        write_sheet(tmp_path / "no" / "sheet.html", cohort, [], surveys)


def test_the_outline_goes_around_the_tissue_and_its_holes() -> None:
    mask = np.zeros((100, 200), np.bool_)
    mask[20:80, 40:160] = True
    mask[40:60, 80:120] = False
    path = outline_path(mask, (50, 100))
    assert path.count("M") == path.count("Z") == 2
    x, y = np.array([pair.split() for pair in re.findall(r"[\d.]+ [\d.]+", path)], float).T
    assert (x.min(), y.min()) == pytest.approx((20.25, 10.25), abs=0.06)
    assert (x.max(), y.max()) == pytest.approx((79.75, 39.75), abs=0.06)
