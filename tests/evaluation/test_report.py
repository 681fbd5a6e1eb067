"""The Pareto report: a page that stands alone, says what was measured, and a script that can be continued."""

from __future__ import annotations

import base64
import inspect
import io
import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.scripts import load_script
from tests.tiny import PROMPTS, new_mar_pipeline, pipeline
from varaccel import Jacobi, Plain, ZipAR
from varaccel.accelerators import ACCELERATORS, Accelerator
from varaccel.accelerators.notation import parse_grid
from varaccel.engine.accelerator import fitting
from varaccel.engine.job import Job
from varaccel.errors import InputError
from varaccel.evaluation.bench.comparison import Distance, Quality
from varaccel.evaluation.bench.fronts import fronts
from varaccel.evaluation.bench.grids import DEFAULTS
from varaccel.evaluation.bench.held_out import bench_held_out
from varaccel.evaluation.bench.report import BenchReport, Row, Settings
from varaccel.evaluation.bench.report_page import Section, best_sentences, report_page
from varaccel.evaluation.bench.samples import Samples, acceptance_sheet, draw_samples
from varaccel.evaluation.bench.tables import (
    bench_markdown,
    quality_cells,
    quality_header,
    quality_notes,
    speed_cells,
    speed_header,
)
from varaccel.evaluation.metrics.adherence import Rate
from varaccel.evaluation.metrics.frechet import FrechetSpread
from varaccel.evaluation.speed.call_speed import Measurement
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.masked.job import MaskedJob
from varaccel.pipelines.base import TokenPipeline
from varaccel.pipelines.llamagen import LlamaGenPipeline
from varaccel.pipelines.mar import MARPipeline
from varaccel.pipelines.placement import open_pipeline
from varaccel.pipelines.var import VARPipeline

# -- a page, read --------------------------------------------------------------------------------------


_VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """A page as its tags, words and images; fails where tags are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.images: list[tuple[str, Image.Image]] = []
        self.rows: list[list[str]] = []
        self.pieces: list[str] = []
        self.style = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            kind, _, data = (found["src"] or "").partition(";base64,")
            assert kind == "data:image/png"
            with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
                image.load()
                assert [found["width"], found["height"]] == [str(side) for side in image.size]
                self.images.append((found["alt"] or "", image))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.style += data
            return
        self.pieces.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += f" {data}"

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    def line(self, *starts: str) -> list[list[str]]:
        """The lines of all tables whose first cell is this, without repeated spaces."""
        lines = [[" ".join(cell.split()) for cell in row] for row in self.rows]
        return [row for row in lines if row[0] in starts]


def assert_stands_alone(page: Page) -> None:
    """Nothing is asked of a server, and nothing runs."""
    ids = {found["id"] for _, found in page.tags if "id" in found}
    for tag, found in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form")
        for name, value in found.items():
            assert not name.startswith("on"), f"{tag} runs something"
            if name in ("src", "href", "srcset", "action", "poster", "data"):
                assert value is not None
                assert value.startswith(("data:", "#")), f"{tag} asks for {value[:40]}"
                assert not value.startswith("#") or value[1:] in ids
    assert "@import" not in page.style
    assert "url(" not in page.style
    assert "prefers-color-scheme:dark" in page.style


# -- reports as they may come out ----------------------------------------------------------------------


def png(color: str = "red", size: tuple[int, int] = (9, 6)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "png")
    return file.getvalue()


def quality(correct: int, distance: float | None = None, total: int = 40, std: float = 1.0) -> Quality:
    shown = tuple(index < correct for index in range(total))
    rate = Rate.of(shown)
    assert rate is not None
    spread = FrechetSpread(0.0 if distance is None else distance + 1, std, 200)
    return Quality(rate, shown, None if distance is None else Distance(distance, spread))


def row(accelerator: Accelerator, speedups: dict[int, float], own: Quality | None, **details: Any) -> Row:
    empty = Row.of(accelerator)
    speed = {
        batch: Measurement(
            *(empty.accelerator, empty.options, empty.lossless, 16 / speedup, speedup),
            *((1 / speedup,), speedup, (speedup - 0.25, speedup + 0.25)),
            details=details,
        )
        for batch, speedup in speedups.items()
    }
    return replace(empty, speed=speed, quality=own)


SETTINGS = Settings(
    *("tiny", "3a3a3a3a", "float32", "a slow processor, 1 thread", 7, 3, "50505050", 40, "c0c0c0c0"),
    *("scenes-detector/1d of 6 true images (7e7e7e7e)", {"top_k": 5}),
)


@pytest.fixture
def report() -> BenchReport:
    return BenchReport(
        SETTINGS,
        (
            row(Plain(), {1: 1, 8: 1}, quality(36, 10)),
            row(Jacobi(8), {1: 1.5, 8: 0.5}, quality(35, 10.5), draft_passes=[3], kept=[[0.5]]),
            row(Jacobi(4), {1: 1.25, 8: 0.75}, quality(36, 10.5)),
            row(ZipAR(8), {1: 1.75, 8: 1.5}, quality(36, 11)),
            row(ZipAR(2), {1: 3.25, 8: 2.5}, quality(12, 30)),
        ),
        quality(40, 8),
    )


def section(report: BenchReport, title: str = "tiny", **changes: Any) -> Section:
    images = {"plot": png("green"), "samples": png("blue"), "maps": png("white")}
    return Section(title, report, "2031-02-03", **{**images, **changes})


# -- the page ------------------------------------------------------------------------------------------


def test_the_page_stands_alone(report: BenchReport) -> None:
    other = replace(report, settings=replace(SETTINGS, model="other"))
    page = Page(report_page([section(report), section(other, "other", maps=None)]))
    assert_stands_alone(page)
    assert [image.getpixel((0, 0)) for _, image in page.images] == [
        *[(0, 128, 0), (0, 0, 255), (255, 255, 255)],
        *[(0, 128, 0), (0, 0, 255)],
    ]
    assert all(len(alt) > 20 for alt, _ in page.images)
    assert len({found["id"] for _, found in page.tags if "id" in found}) == 2
    assert [tag for tag, _ in page.tags].count("h1") == 1


def test_every_figure_is_on_the_page(report: BenchReport) -> None:
    page = Page(report_page([section(report)]))
    for batch in report.batches:
        for call, *cells in speed_cells(report, batch):
            assert any(line[1 : len(cells) + 1] == cells for line in page.line(call.replace("\n", " ")))
    for call, *cells in quality_cells(report):
        (line,) = [line for line in page.line(call.replace("\n", " ")) if len(line) == len(cells) + 1][-1:]
        for told, shown in zip(cells, line[1:], strict=True):
            # what a verdict rests on stands in a line of its own
            assert shown == (
                told if told[0].isdigit() or told == "-" else told.replace(" (", " ").removesuffix(")")
            )
    for title in (*speed_header(report), *quality_header(report)):
        assert title in page.words
    for told in (*quality_notes(report), *best_sentences(report)):
        assert told in page.words
    for told in (
        *(
            "a slow processor, 1 thread",
            "float32",
            "2031-02-03",
            "weights 3a3a3a3a",
            "top_k=5",
            "seeds 7 to 46",
        ),
        *("prompts 50505050", "captions c0c0c0c0", "scenes-detector/1d of 6 true images (7e7e7e7e)"),
        *("within noise", "worse", "further", "true images", "50 %"),
    ):
        assert told in page.words
    badges = [found["class"] for tag, found in page.tags if (found.get("class") or "").startswith("badge ")]
    assert badges.count("badge lossless") == 1 + 2 * 3
    assert badges.count("badge approximate") == 1 + 2 * 2


def test_the_front_is_marked(report: BenchReport) -> None:
    found = fronts(report, 8)
    assert [one.label.split(",")[0] for one in found["adherence"]] == ["zipar(window=8)", "zipar(window=2)"]
    assert [one.accelerator for one in found["distance"]] == ["plain", "zipar", "zipar"]
    page = Page(report_page([section(report)]))
    assert [line[-1] for line in page.line("plain")][:2] == ["distance", "distance"]
    assert [line[-1] for line in page.line("jacobi window=8")][:2] == ["distance", "-"]
    assert [line[-1] for line in page.line("zipar window=2")][:2] == ["adherence, distance"] * 2
    marked = sum(found.get("class") == "front" for tag, found in page.tags if tag == "tr")
    assert marked == sum(
        len({one.key for rows in fronts(report, batch).values() for one in rows}) for batch in (1, 8)
    )
    assert fronts(replace(report, rows=tuple(replace(one, quality=None) for one in report.rows)), 1) == {}


def test_hostile_names_are_words(report: BenchReport) -> None:
    evil = '"><script>alert(1)</script><img src="http://x/y.png" onerror="z">&amp;'
    hostile = replace(
        *(report,),
        settings=replace(SETTINGS, model=evil, machine=evil, dtype=evil, reference=evil, call={evil: evil}),
        rows=(report.rows[0], *(replace(one, options={"window": evil}) for one in report.rows[1:2])),
    )
    hostile = replace(
        hostile, rows=(*hostile.rows, replace(report.rows[2], accelerator=evil, options={evil: evil}))
    )
    page = Page(report_page([replace(section(hostile, evil), measured=evil)], evil))
    assert_stands_alone(page)
    assert len(page.images) == 3
    assert page.words.count(evil) > 10
    assert all(evil in alt for alt, _ in page.images)


@pytest.mark.parametrize("reference", [None, "scenes"])
def test_a_page_of_speed_alone(report: BenchReport, reference: str | None) -> None:
    bare = replace(
        report,
        settings=replace(SETTINGS, images=0, reference=reference),
        rows=tuple(replace(one, quality=None) for one in report.rows),
        truth=None,
    )
    page = Page(report_page([section(bare, plot=None, maps=None)]))
    assert_stands_alone(page)
    assert "No images were judged" in page.words
    assert "Pareto front" not in [cell for line in page.rows for cell in line]
    assert len(page.images) == 1


def test_no_distances(report: BenchReport) -> None:
    rows = tuple(replace(one, quality=quality(30 + n)) for n, one in enumerate(report.rows))
    bare = replace(report, settings=replace(SETTINGS, reference=None), rows=rows, truth=None)
    page = Page(report_page([section(bare)]))
    assert "none, so no distance" in page.words
    assert "adherence (95 %)" in page.words
    assert len(page.line("plain")[-1]) == 3


def test_page_refusals(report: BenchReport) -> None:
    with pytest.raises(InputError, match="at least one model"):
        report_page([])
    with pytest.raises(InputError, match="PNG"):
        report_page([section(report, samples=b"\xff\xd8\xff")])


# -- the best setting ----------------------------------------------------------------------------------


def test_best_setting(report: BenchReport) -> None:
    assert best_sentences(report) == [
        "Batch 1: the fastest lossless setting within noise of the quality of plain decoding is "
        "jacobi(window=8) at 1.50x (1.25 to 1.75); the fastest approximate setting within noise of the quality of "
        "plain decoding is zipar(window=8) at 1.75x (1.50 to 2.00).",
        "Batch 8: no lossless setting is faster than plain decoding and within noise of its quality; the fastest "
        "approximate setting within noise of the quality of plain decoding is zipar(window=8) at 1.50x (1.25 to 1.75).",
    ]


@pytest.mark.parametrize(
    ("own", "within"),
    [
        (quality(36, 10), True),
        (quality(33, 10), True),
        (quality(40, 12.8), True),
        (quality(36, 12.9), False),
        (quality(36, 7.1), False),
        (quality(30, 10), False),
        (quality(36), True),
        (quality(12), False),
        (None, False),
    ],
    ids=lambda value: f"{value.adherence.successes}" if isinstance(value, Quality) else str(value),
)
def test_noise_decides(report: BenchReport, own: Quality | None, within: bool) -> None:
    """Adherence by the sign test (six prompts lost and none gained are too many), distance by twice its spread."""
    rows = (report.rows[0], row(ZipAR(3), {1: 4}, own))
    found = replace(report, rows=rows).best(1, lossless=False)
    assert found == (rows[1] if within else None)
    assert replace(report, rows=rows).best(1, lossless=True) is None


def test_plain_decoding_is_not_faster_than_itself(report: BenchReport) -> None:
    slow = row(Jacobi(3), {1: 0.99}, quality(36, 10))
    alone = replace(report, rows=(report.rows[0], slow))
    assert alone.best(1, lossless=True) is None
    assert alone.best(5, lossless=True) is None
    assert all("no lossless" in s and "no approximate" in s for s in best_sentences(alone))


# -- samples and maps ----------------------------------------------------------------------------------


def part(sheet: Image.Image, side: int, column: int, line: int, below: int = 0) -> Image.Image:
    """An image of a sheet, counted from its last column and line."""
    left, top = sheet.width - (column + 1) * (side + 6), sheet.height - below - (line + 1) * (side + 6)
    return sheet.crop((left, top, left + side, top + side))


@pytest.mark.parametrize("family", ["t2i", "mar-caption"])
def test_maps_are_of_the_samples(family: str) -> None:
    side = 100
    accelerators: list[Accelerator] = (
        [ZipAR(1)] if family == "t2i" else parse_grid(["fewer_steps:iterations=4"])
    )
    drawn = draw_samples(pipeline(family), accelerators, PROMPTS["t2i"][:2], seed=3)
    assert [one.name for one, _ in drawn.outputs] == ["plain", accelerators[0].name]
    sheet, maps = drawn.sheet(side), drawn.maps(side)
    assert maps is not None
    assert maps.width == sheet.width
    for line, (_, output) in enumerate(reversed(drawn.outputs)):
        expected = output.acceptance_maps(side, overlay=True, legend=False)
        for column in range(2):
            image = output.images[1 - column].resize((side, side), Image.Resampling.LANCZOS)
            assert part(sheet, side, column, line).tobytes() == image.convert("RGB").tobytes()
            shown = part(maps, side, column, line, maps.height - sheet.height)
            assert shown.tobytes() == expected[1 - column].tobytes()
    legend = np.asarray(maps.convert("HSV"))[sheet.height :]
    assert legend[..., 1].max() > 100, "there are colours"
    one = acceptance_sheet(pipeline(family), accelerators, PROMPTS["t2i"][0], seed=3, side=side)
    alone = draw_samples(pipeline(family), accelerators, PROMPTS["t2i"][:1], seed=3).maps(side)
    assert one is not None
    assert alone is not None
    assert one.tobytes() == alone.tobytes()


def test_next_scale_models_have_no_maps() -> None:
    grid = parse_grid(["code:draft_scales=2"])
    assert acceptance_sheet(pipeline("var-caption"), grid, "a red sphere") is None
    drawn = draw_samples(pipeline("var-caption"), grid, ["a red sphere"])
    assert isinstance(drawn, Samples)
    assert drawn.maps() is None
    assert drawn.sheet(20).height > 2 * 26


def test_samples_need_prompts() -> None:
    with pytest.raises(InputError, match="at least one prompt"):
        draw_samples(pipeline("t2i"), [], [])


# -- the grids of a release ----------------------------------------------------------------------------


def hosts(job_type: type[Job]) -> TokenPipeline | str:
    """A pipeline large enough for the settings of a release."""
    if job_type is CausalJob:
        return tiny.drafting_pipeline("t2i", vocab_size=64, grid=8)
    if job_type is MaskedJob:
        network = tiny.mar_transformer("caption", grid_size=8)
        own: Any = new_mar_pipeline("caption")
        pipe = MARPipeline(
            *(network, own.vae, own.text_encoder, own.tokenizer),
            draft_transformer=tiny.mar_drafter(network),
            head_steps=2,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe
    return "mini-var"


@pytest.mark.parametrize("job_type", DEFAULTS)
def test_release_grids_fit_their_models(job_type: type[Job]) -> None:
    grid = parse_grid(DEFAULTS[job_type].release)
    assert len(set(grid)) == len(grid) > 3
    assert all(issubclass(job_type, one.job_type) for one in grid)
    pipe: Any = hosts(job_type)
    if isinstance(pipe, str):
        pipe = open_pipeline(pipe, quiet=True)
    assert pipe.job_type is job_type
    for one in grid:
        assert pipe("a red sphere", seed=0, accelerator=one, output_type="latent").stats.passes > 0


def test_every_kind_of_job_has_defaults() -> None:
    assert {cls.job_type for cls in ACCELERATORS.values()} - {Job} == set(DEFAULTS)
    for job_type, defaults in DEFAULTS.items():
        assert defaults.first_choice in fitting(job_type)
        assert all(issubclass(job_type, one.job_type) for one in parse_grid(defaults.demo))


# -- the script ----------------------------------------------------------------------------------------


def script() -> ModuleType:
    return load_script("eval/pareto.py")


@pytest.fixture
def pareto() -> Callable[..., None]:
    main = script().main
    return lambda *arguments: main([str(one) for one in arguments])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name, family in (("raster.1", "t2i"), ("scales", "var-caption")):
        pipeline(family).save_pretrained(folder / name)
    return folder / "raster.1", folder / "scales"


@pytest.mark.slow
def test_script(
    pareto: Callable[..., None],
    models: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    calls: list[str] = []
    for kind in (LlamaGenPipeline, VARPipeline):

        def counted(self: Any, *given: Any, plainly: Any = kind.__call__, **options: Any) -> Any:
            calls.append(options["accelerator"].name)
            return plainly(self, *given, **options)

        # what options a call has is read from it
        counted.__signature__ = inspect.signature(kind.__call__)  # type: ignore[attr-defined]
        monkeypatch.setattr(kind, "__call__", counted)
    out = tmp_path / "new" / "report"
    arguments = (
        *("--model", models[0], "--model", models[1], "--out", out, "--images", 4, "--scenes", 6),
        *("--batch", 1, "--repeats", 1, "-a", "zipar:window=1", "-a", "code:draft_scales=2"),
    )
    pareto(*arguments)
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {out / 'index.html'}"
    names = ["index.html"]
    names += [f"raster.1{ending}" for ending in ("-maps.png", "-samples.png", ".json", ".md", ".png")]
    names += [f"scales{ending}" for ending in ("-samples.png", ".json", ".md", ".png")]
    assert sorted(path.name for path in out.iterdir()) == names
    page = Page((out / "index.html").read_text())
    assert_stands_alone(page)
    assert len(page.images) == 5
    for model, accelerator in zip(models, ("zipar", "code"), strict=True):
        report = BenchReport.from_dict(json.loads((out / f"{model.name}.json").read_text()))
        assert [one.accelerator for one in report.rows] == ["plain", accelerator]
        assert report.settings.model == str(model)
        assert "6 true images" in (report.settings.reference or "")
        assert (out / f"{model.name}.md").read_text() == bench_markdown(report)
        for call, *cells in speed_cells(report, 1):
            assert any(line[1 : len(cells) + 1] == cells for line in page.line(call.replace("\n", " ")))
    references = {json.loads(path.read_text())["settings"]["reference"] for path in out.glob("*.json")}
    assert len(references) == 1, "the same true images for all models"
    assert set(calls) == {"plain", "zipar", "code"}

    before = {path.name: path.read_bytes() for path in out.iterdir()}
    calls.clear()
    pareto(*arguments, "--resume")
    assert calls == [], "everything is there"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    pareto(*arguments, "-a", "zipar:window=2", "--resume")
    assert set(calls) == {"plain", "zipar"}
    assert len(Page((out / "index.html").read_text()).line("zipar window=2")) == 2
    with pytest.raises(InputError, match="seed 0 instead of 1"):
        pareto(*arguments, "--seed", 1, "--resume")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-a", "zippar"], "did you mean 'zipar'"),
        (["--images", "0"], "--images must be at least 1"),
        (["--drawn-together", "0"], "--drawn-together must be at least 1"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--model", "elsewhere/not there"], "same name"),
        (["--device", "cuba"], "did you mean 'cuda'"),
        (["--out", "file/in/it"], "nothing could be written"),
        (["--resume"], "cannot be continued"),
    ],
    ids=" ".join,
)
def test_script_refusals(
    pareto: Callable[..., None],
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of them before the model, which does not exist, is loaded."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "not there.json").write_text("{}")
    with pytest.raises(InputError, match=words):
        pareto("--model", "not there", "--out", "out", *arguments)


def test_nothing_fits_a_model(pareto: Callable[..., None], models: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match=r"none of the accelerators works on .*scales, a var model"):
        pareto("--model", models[0], "--model", models[1], "--out", tmp_path, "-a", "zipar:window=1")
    assert list(tmp_path.iterdir()) == [], "before the first model is measured"


def test_true_images_are_others_than_those_judged() -> None:
    with pytest.raises(InputError, match="reference_start must be at least the 4 images, got 3"):
        bench_held_out(pipeline("t2i"), [], model="tiny", images=4, scenes=6, reference_start=3)
