"""The tab that shows reports: which there are, what is plotted, and what a damaged one looks like."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from tests.scripts import ROOT
from varaccel import shipped
from varaccel.evaluation.bench.fronts import fronts
from varaccel.evaluation.bench.report import BenchReport
from varaccel.evaluation.bench.report_page import best_sentences
from varaccel.evaluation.bench.tables import quality_cells, quality_notes, speed_cells
from varaccel.version import __version__

gradio = pytest.importorskip("gradio")

from varaccel.app import trade_off  # noqa: E402 - needs gradio
from varaccel.app.explore_tab import explore_tab  # noqa: E402
from varaccel.app.report_view import CSS, images_html, measured_html  # noqa: E402
from varaccel.app.reports import Found, found_reports, report_folders  # noqa: E402

RELEASE = ROOT / "docs" / "report"
MODELS = ("mini-llamagen", "mini-mar", "mini-var")
REPORTS = [
    (model, batch)
    for model in MODELS
    for batch in BenchReport.from_dict(json.loads((RELEASE / f"{model}.json").read_text())).batches
]


def found(path: Path) -> Found:
    return Found(path, path.stem, None)


def report_of(model: str) -> BenchReport:
    return BenchReport.from_dict(json.loads((RELEASE / f"{model}.json").read_text()))


def write(path: Path, report: BenchReport) -> Found:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report.to_dict()))
    return found(path)


# -- what there is -------------------------------------------------------------------------------------


def test_the_report_of_the_release_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert report_folders() == [RELEASE]
    reports = found_reports(report_folders())
    assert [one.title for one in reports] == list(MODELS)
    assert {one.measured for one in reports} == {f"for varaccel {__version__}"}


def test_my_own_report_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "outputs" / "report"
    own.mkdir(parents=True)
    assert report_folders() == [RELEASE], "an empty folder holds no report"
    settings = dataclasses.replace(report_of("mini-var").settings, seed=9)
    write(own / "mini-var.json", dataclasses.replace(report_of("mini-var"), settings=settings))
    os.utime(own / "mini-var.json", (1.7e9, 1.7e9))
    assert report_folders() == [own, RELEASE]
    reports = found_reports(report_folders())
    assert [one.title for one in reports] == [
        f"mini-var ({Path('outputs') / 'report'})",
        *("mini-llamagen", "mini-mar", "mini-var (this release)"),
    ]
    assert reports[0].measured is not None
    assert reports[0].measured.startswith("2023-11-")


def test_the_same_report_is_listed_once(tmp_path: Path) -> None:
    (tmp_path / "mini-var.json").write_bytes((RELEASE / "mini-var.json").read_bytes())
    assert [one.path for one in found_reports([tmp_path, RELEASE])] == [
        tmp_path / "mini-var.json",
        *(RELEASE / f"{model}.json" for model in ("mini-llamagen", "mini-mar")),
    ]


@pytest.mark.parametrize("place", ["varaccel/report", "docs/report", "elsewhere"])
def test_the_wheel_and_a_clone_have_it_in_other_places(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "varaccel" / "shipped.py"))
    write(tmp_path / place / "m.json", report_of("mini-var"))
    assert shipped.release_report_folder() == (None if place == "elsewhere" else tmp_path / place)


# -- what is shown -------------------------------------------------------------------------------------


def cells(shown: str) -> list[str]:
    """The texts of a page's table cells; lines of a cell are joined."""
    rows = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", shown)
    return [html.unescape(" ".join(re.sub(r"<[^>]+>", " ", row).split())) for row in rows]


@pytest.mark.parametrize(("model", "batch"), REPORTS)
def test_everything_of_a_report_is_on_the_page(model: str, batch: int) -> None:
    report = report_of(model)
    shown = measured_html(Found(RELEASE / f"{model}.json", model, "on a day"), batch)
    for sentence in (*best_sentences(report), *quality_notes(report), report.settings.machine, "on a day"):
        assert html.escape(sentence) in shown
    told = cells(shown)
    for line in (*speed_cells(report, batch), *quality_cells(report)):
        for cell in line:
            words = cell.replace(" (", " ").removesuffix(")").replace("\n", " ")
            assert words in told
    other = next((one for one in report.batches if one != batch), None)
    assert f"Batch {batch}, median of 3 rounds" in shown
    assert other is None or f"Batch {other}, median" not in shown


def panels(shown: str) -> list[ElementTree.Element]:
    page = ElementTree.fromstring(shown)
    return [one for one in page.iter("svg") if one.get("class") == "plot"]


def centre(point: ElementTree.Element) -> tuple[float, float]:
    reach = next(one for one in point.iter("circle") if one.get("class") == "reach")
    return float(reach.attrib["cx"]), float(reach.attrib["cy"])


@pytest.mark.parametrize(("model", "batch"), REPORTS)
def test_plots_show_speed_against_quality(model: str, batch: int) -> None:
    report = report_of(model)
    shown = measured_html(found(RELEASE / f"{model}.json"), batch)
    plots = panels(shown)
    assert len(plots) == 2
    left, top, right, bottom = trade_off._FRAME
    for plot, (kind, front) in zip(plots, fronts(report, batch).items(), strict=True):
        points = [one for one in plot.iter("g") if "point" in one.attrib["class"].split()]
        assert len(points) == len(report.rows)
        places = [centre(point) for point in points]
        assert all(left <= x <= right and top <= y <= bottom for x, y in places)
        speeds = [row.speed[batch].speedup for row in report.rows]
        values = [
            row.quality.adherence.share if kind == "adherence" else row.quality.distance.value  # type: ignore[union-attr]
            for row in report.rows
        ]
        assert sorted(range(len(speeds)), key=speeds.__getitem__) == sorted(
            range(len(places)), key=lambda i: places[i][0]
        )
        # larger values are further up, where y is smaller
        order = sorted(zip(values, (y for _, y in places), strict=True))
        steps = [b[1] - a[1] for a, b in pairwise(order)]
        assert all(step <= 0 for step in steps)
        assert min(steps) < 0
        line = next(one for one in plot.iter("polyline"))
        assert len(line.attrib["points"].split()) == len(front)
        bars = [one for one in plot.iter("path") if "bar" in one.attrib["class"].split()]
        assert len(bars) == len(points)
        for point, row in zip(points, report.rows, strict=True):
            style = "plain" if row.accelerator == "plain" else "lossless" if row.lossless else "approximate"
            assert style in point.attrib["class"].split()
            assert f"{row.speed[batch].speedup:.2f}x" in point.attrib["aria-label"]
            inside = [float(text.attrib["x"]) for text in point.iter("text")]
            assert all(left - 20 < x < right + 20 for x in inside)
    assert shown.count("<li ") == len(report.rows)


def test_qualities_differ_in_shape_and_colour() -> None:
    shapes = {
        quality: re.sub(r"[\d.,\s-]", "", trade_off._shape(quality, 9, 9))
        for quality in ("lossless", "approximate")
    }
    assert shapes["lossless"] != shapes["approximate"]
    assert trade_off._shape("plain", 9, 9) != trade_off._shape("approximate", 9, 9)
    for scope in (".va-explore", ".dark .va-explore"):
        found = rf"\n{re.escape(scope)}[^{{]*{{--va-lossless:(#\w+);--va-approximate:(#\w+)"
        colours = re.search(found, CSS)
        assert colours is not None
        assert colours[1] != colours[2]


def test_numbers_do_not_cover_each_other() -> None:
    for model, batch in REPORTS:
        for plot in panels(measured_html(found(RELEASE / f"{model}.json"), batch)):
            places = [
                (float(text.attrib["x"]), float(text.attrib["y"]))
                for group in plot.iter("g")
                for text in group.iter("text")
            ]
            for index, (x, y) in enumerate(places):
                for a, b in places[index + 1 :]:
                    assert abs(x - a) >= 8 or abs(y - b) >= 10


def quality(report: BenchReport, **changes: Any) -> BenchReport:
    """A report whose rows have another quality."""
    rows = tuple(
        dataclasses.replace(row, quality=row.quality and dataclasses.replace(row.quality, **changes))
        for row in report.rows
    )
    return dataclasses.replace(report, rows=rows, truth=None)


def distances(report: BenchReport, std: float) -> BenchReport:
    """A report whose distances differ tenfold and have large bars."""
    rows = []
    for number, row in enumerate(report.rows):
        distance: Any = row.quality.distance  # type: ignore[union-attr]
        spread = dataclasses.replace(distance.spread, std=std)
        changed: Any = dataclasses.replace(distance, value=2.0 + 6 * number, spread=spread)
        judged: Any = row.quality
        rows.append(dataclasses.replace(row, quality=dataclasses.replace(judged, distance=changed)))
    return dataclasses.replace(report, rows=tuple(rows))


CHANGES: dict[str, Callable[[BenchReport], BenchReport]] = {
    "plain decoding alone": lambda r: dataclasses.replace(r, rows=r.rows[:1]),
    "no true images": lambda r: dataclasses.replace(r, truth=None),
    "no distances": lambda r: quality(r, distance=None),
    "all distances alike": lambda r: quality(
        r,
        distance=dataclasses.replace(
            r.rows[0].quality.distance,  # type: ignore[union-attr, type-var]
            value=0.5,
            spread=dataclasses.replace(r.rows[0].quality.distance.spread, std=2.0),  # type: ignore[union-attr]
        ),
    ),
    "a logarithmic axis, bars below zero": lambda r: distances(r, 3.0),
    "nothing right": lambda r: quality(
        r,
        adherence=dataclasses.replace(
            r.rows[0].quality.adherence,  # type: ignore[union-attr, type-var]
            **{"successes": 0, "share": 0.0, "low": 0.0, "high": 0.0},
        ),
    ),
    "half of it is not timed": lambda r: dataclasses.replace(
        r, rows=(*r.rows[:2], *(dataclasses.replace(row, speed={}) for row in r.rows[2:]))
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("model", MODELS)
def test_unusual_reports_are_shown(model: str, change: str, tmp_path: Path) -> None:
    report = CHANGES[change](report_of(model))
    shown = measured_html(write(tmp_path / "m.json", report))
    batch = report.batches[0]
    judged = [row for row in report.rows if row.quality is not None and batch in row.speed]
    plots = panels(shown)
    assert len(plots) == (1 if change == "no distances" else 2)
    for plot in plots:
        assert len([one for one in plot.iter("g") if "point" in one.attrib["class"].split()]) == len(judged)
        assert "nan" not in ElementTree.tostring(plot, encoding="unicode")


@pytest.mark.parametrize("missing", ["quality", "speed"])
def test_a_report_of_one_half_is_shown_without_a_plot(missing: str, tmp_path: Path) -> None:
    report = report_of("mini-llamagen")
    empty: Any = None if missing == "quality" else {}
    rows = tuple(dataclasses.replace(row, **{missing: empty}) for row in report.rows)
    shown = measured_html(write(tmp_path / "m.json", dataclasses.replace(report, rows=rows, truth=None)))
    assert panels(shown) == []
    assert ("<h3>Speed</h3>" in shown) == (missing == "quality")
    assert ("<h3>Quality</h3>" in shown) == (missing == "speed")


def test_a_batch_that_was_not_measured_is_the_smallest(tmp_path: Path) -> None:
    one = found(RELEASE / "mini-var.json")
    assert measured_html(one, 77) == measured_html(one) == measured_html(one, 1)
    assert measured_html(one, 16) != measured_html(one, 1)


def test_what_a_report_says_is_text(tmp_path: Path) -> None:
    report = report_of("mini-llamagen")
    attack = "<img src=x onerror=alert(1)>"
    settings = dataclasses.replace(report.settings, machine=attack, model=attack, reference=attack)
    rows = [dataclasses.replace(row, accelerator=attack, options={attack: attack}) for row in report.rows[1:]]
    changed = dataclasses.replace(report, settings=settings, rows=(report.rows[0], *rows))
    shown = measured_html(write(tmp_path / "m.json", changed))
    assert "<img" not in shown
    assert html.escape(attack) in shown
    ElementTree.fromstring(shown)


# -- damage --------------------------------------------------------------------------------------------


def damaged(**changes: Any) -> bytes:
    return json.dumps({**report_of("mini-var").to_dict(), **changes}).encode()


def speeds(value: Any) -> list[Any]:
    rows = report_of("mini-var").to_dict()["rows"]
    rows[1]["speed"][0]["speedup"] = value
    return rows


DAMAGE = {
    "no JSON": b"{",
    "no text": b"\xff\xfe\x00",
    "empty": b"",
    "no report": b"[]",
    "another object": b'{"rows": []}',
    "no rows": damaged(rows=[]),
    "rows of something": damaged(rows=[1, 2]),
    "words for numbers": damaged(rows=speeds("fast")),
    "no number": damaged(rows=speeds(None)),
    "not finite": damaged(rows=speeds(float("nan"))),
    "settings of something": damaged(settings=3),
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_report_is_a_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_bytes(content)
    shown = measured_html(found(tmp_path / "m.json"), 1)
    page = ElementTree.fromstring(shown)
    assert [one.tag for one in page.iter()] == ["div", "p"]
    assert "m.json" in "".join(page.itertext())
    (tmp_path / "m.json").unlink()
    assert "m.json" in measured_html(found(tmp_path / "m.json"))


def test_the_page_with_a_damaged_report_is_built(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "mini-var.json").write_bytes((RELEASE / "mini-var.json").read_bytes())
    with gradio.Blocks(analytics_enabled=False) as page:
        explore_tab([tmp_path])
    shown = [block.value for block in page.blocks.values() if isinstance(block, gradio.HTML)]
    assert "broken.json" in shown[0]
    batch, measured, _ = event(page, "show_model")("mini-var")
    assert [value for _, value in batch["choices"]] == [1, 16]
    assert len(panels(measured)) == 2


def test_no_report_is_a_sentence(tmp_path: Path) -> None:
    with gradio.Blocks(analytics_enabled=False) as page:
        explore_tab([tmp_path, tmp_path / "absent"])
    words = [block.value for block in page.blocks.values() if isinstance(block, gradio.Markdown)]
    assert "make bench" in words[0]
    assert not page.fns


# -- images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_images_beside_the_report_are_shown(model: str) -> None:
    shown = images_html(found(RELEASE / f"{model}.json"))
    sheets = [RELEASE / f"{model}-{name}.png" for name in ("samples", "maps")]
    there = [path for path in sheets if path.exists()]
    data = re.findall(r'width="(\d+)" height="(\d+)" src="data:image/webp;base64,([^"]+)"', shown)
    assert len(data) == len(there) >= 1
    for path, (width, height, text) in zip(there, data, strict=True):
        with Image.open(path) as sheet, Image.open(io.BytesIO(base64.b64decode(text))) as image:
            assert sheet.size == image.size == (int(width), int(height))
            close = [
                abs(a - b)
                for a, b in zip(
                    sheet.convert("L").resize((16, 16)).tobytes(),
                    image.convert("L").resize((16, 16)).tobytes(),
                    strict=True,
                )
            ]
            assert max(close) < 12
    assert len(shown) < 700_000, "it goes through the page"


def test_images_that_are_damaged_or_missing(tmp_path: Path) -> None:
    one = write(tmp_path / "a.b.json", report_of("mini-var"))
    assert "<img" not in images_html(one)
    (tmp_path / "a.b-samples.png").write_bytes((RELEASE / "mini-var-samples.png").read_bytes()[:5000])
    (tmp_path / "a.b-maps.png").write_text("no image")
    shown = images_html(one)
    for name in ("a.b-samples.png", "a.b-maps.png"):
        assert f"{name} cannot be read as an image." in shown


# -- the page ------------------------------------------------------------------------------------------


def event(page: Any, name: str) -> Any:
    return next(one.fn for one in page.fns.values() if getattr(one.fn, "__name__", "") == name)


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with gradio.Blocks(analytics_enabled=False) as page:
        explore_tab([RELEASE])
    yield page
    page.close()


def test_two_visitors_do_not_meet(page: Any) -> None:
    show_model, show_batch = event(page, "show_model"), event(page, "show_batch")
    first = [show_model("mini-var"), show_batch("mini-var", 16)]
    show_model("mini-mar")
    show_batch("mini-llamagen", 8)
    assert [show_model("mini-var"), show_batch("mini-var", 16)] == first
    assert first[0][1] == measured_html(found_reports([RELEASE])[2])


def test_choosing_costs_no_place_in_the_queue(page: Any) -> None:
    assert len(page.fns) == 2
    for one in page.fns.values():
        assert one.api_visibility == "private"
        assert one.queue is False


def test_what_is_measured_while_the_page_is_open_is_seen(tmp_path: Path) -> None:
    write(tmp_path / "m.json", report_of("mini-var"))
    with gradio.Blocks(analytics_enabled=False) as page:
        explore_tab([tmp_path])
    before = event(page, "show_batch")("m", 1)
    settings = dataclasses.replace(report_of("mini-var").settings, machine="another machine")
    write(tmp_path / "m.json", dataclasses.replace(report_of("mini-var"), settings=settings))
    assert "another machine" not in before
    assert "another machine" in event(page, "show_batch")("m", 1)


def test_selectors_have_no_comma_within_brackets() -> None:
    selectors = re.findall(r"([^{}]+){", CSS)
    assert not [one for one in selectors if re.search(r"\([^)]*,", one) and not one.strip().startswith("@")]


def test_nothing_is_asked_of_other_hosts() -> None:
    found_release = found_reports([RELEASE])
    for shown in (*map(measured_html, found_release), *map(images_html, found_release), CSS):
        assert "http" not in re.sub(r"base64,[^\"]+", "", shown)
        assert "url(" not in shown
