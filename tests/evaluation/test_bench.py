"""The bench: its grid, its comparisons, resuming, and what it shows. Tiny models, so figures mean nothing here."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from tests.tiny import GRID, PROMPTS, pipeline
from varaccel import CSpD, FeatureCache, FewerSteps, InputError, Plain, ZipAR
from varaccel.accelerators import ACCELERATORS, Accelerator, register
from varaccel.accelerators.notation import parse_accelerator, parse_grid
from varaccel.evaluation.bench.comparison import Distance, Quality, compare, sign_test
from varaccel.evaluation.bench.fronts import pareto_front, telling_options
from varaccel.evaluation.bench.grids import CAUSAL_GRID, default_grid
from varaccel.evaluation.bench.judging import judge_images, reference_statistics, true_images
from varaccel.evaluation.bench.plot import plot
from varaccel.evaluation.bench.report import BenchReport, Row
from varaccel.evaluation.bench.run import run_bench
from varaccel.evaluation.bench.samples import sample_sheet
from varaccel.evaluation.bench.tables import bench_markdown, bench_table
from varaccel.evaluation.metrics.adherence import Rate, held_out_captions, held_out_prompts
from varaccel.evaluation.metrics.frechet import FeatureStatistics, FrechetSpread
from varaccel.evaluation.speed.call_speed import Measurement, measure_speed
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.masked.job import MaskedJob
from varaccel.models.detector import SceneDetector
from varaccel.training.detector import new_detector

CAPTIONS = held_out_captions(12)
TEXTS = [text.text for text in CAPTIONS]


@pytest.fixture(scope="module")
def detector() -> SceneDetector:
    return new_detector(image_size=32, widths=(8, 8, 8), depths=(1, 1, 1)).eval()


@pytest.fixture(scope="module")
def reference(detector: SceneDetector) -> FeatureStatistics:
    return reference_statistics(detector, list(held_out_prompts(20)), progress=False)


class Counting:
    """The tiny pipeline, noting what it is asked to draw."""

    def __init__(self) -> None:
        self.pipe = pipeline("t2i")
        self.calls: list[tuple[str, int, int]] = []

    def __call__(self, prompts: Sequence[str], **call: Any) -> Any:
        self.calls.append((call["accelerator"].name, len(prompts), call["seed"]))
        return self.pipe(prompts, **call)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)


def bench(pipe: Any, accelerators: Sequence[Accelerator], **options: Any) -> BenchReport:
    defaults: dict[str, Any] = {"prompts": TEXTS, "repeats": 1, "progress": False, "model": "tiny"}
    return run_bench(pipe, accelerators, **{**defaults, **options})


def through_json(report: BenchReport) -> BenchReport:
    return BenchReport.from_dict(json.loads(json.dumps(report.to_dict())))


# -- the grid ------------------------------------------------------------------------------------------


@register
@dataclass(frozen=True)
class _Wishes(Accelerator[CausalJob]):
    name: ClassVar[str] = "test-wishes"
    job_type = CausalJob
    summary: ClassVar[str] = "takes any options"

    tree: Any = None
    k: Any = None

    @property
    def lossless(self) -> bool:
        return True

    def run(self, job: CausalJob) -> int:
        raise InputError("it grants nothing.")


ACCELERATORS.pop("test-wishes")


@pytest.fixture
def wishes(monkeypatch: pytest.MonkeyPatch) -> type[_Wishes]:
    monkeypatch.setitem(ACCELERATORS, "test-wishes", _Wishes)
    return _Wishes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", Plain()),
        ("zipar", ZipAR()),
        (" zipar : window=4 , mode=published ", ZipAR(4, "published")),
        ("zipar:window=4,", ZipAR(4)),
        ("zipar:", ZipAR()),
    ],
)
def test_accelerators_as_typed(text: str, expected: Accelerator) -> None:
    assert parse_accelerator(text) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("tree=[[0], [0, 1]],k=2", _Wishes([[0], [0, 1]], 2)),
        ('tree={"a": [1, 2], "b": 3}', _Wishes({"a": [1, 2], "b": 3})),
        ('tree="a,b",k=x:y=z', _Wishes("a,b", "x:y=z")),
        ("k=0.1,tree=binary", _Wishes("binary", 0.1)),
    ],
)
def test_values_keep_their_commas(wishes: type[_Wishes], options: str, expected: _Wishes) -> None:
    assert parse_accelerator(f"test-wishes:{options}") == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("zippar:window=2", "accelerator 'zippar:window=2'.*did you mean 'zipar'"),
        ("zipar:windw=2", "'zipar:windw=2'.*did you mean 'window'"),
        ("zipar:window=0", "'zipar:window=0'.*of at least 1"),
        ("zipar:window", "'zipar:window'.*key=value"),
        ("zipar:window=1,2", "'zipar:window=1,2'.*key=value"),
        ("", "unknown accelerator"),
    ],
)
def test_accelerators_that_are_none(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_accelerator(text)


def test_default_grid() -> None:
    grid = parse_grid(CAUSAL_GRID)
    assert len(set(grid)) == len(grid)
    assert {ZipAR(2), ZipAR(4), ZipAR(8), ZipAR(12)} <= set(grid)


def test_grid_of_a_masked_model() -> None:
    """Iterations are shares of the model's tokens, of which the tiny one has 16."""
    pipe = pipeline("mar-caption")
    grid = parse_grid(default_grid(pipe))
    assert len(set(grid)) == len(grid)
    assert {FewerSteps(8), FewerSteps(4), FewerSteps(2), FewerSteps(None, 25)} <= set(grid)
    assert FewerSteps(None, 10, "dpm++") in grid
    assert {FeatureCache(2), FeatureCache(8), FeatureCache(4, True, 4, 20, "dpm++")} <= set(grid)
    assert {CSpD(mode, length) for mode in ("reference", "paper", "exact") for length in (2, 4, 8)} <= set(
        grid
    )
    assert CSpD("exact", 4, verification="sequential") in grid


def test_grid_of_a_masked_model_without_a_drafter() -> None:
    class Alone:
        job_type = MaskedJob
        transformer = pipeline("mar-class").transformer
        drafters: ClassVar[dict[str, Any]] = {}

    assert not any(text.startswith("cspd") for text in default_grid(Alone()))
    drafted = [one for one in parse_grid(default_grid(Alone(), "mini-small")) if isinstance(one, CSpD)]
    assert {one.drafter for one in drafted} == {"mini-small"}
    assert len(drafted) == 10


# -- comparisons ---------------------------------------------------------------------------------------


def test_sign_test_of_known_splits() -> None:
    assert sign_test(0, 0) == 1
    assert sign_test(3, 3) == 1
    assert sign_test(0, 5) == sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(1, 8) == pytest.approx(2 * (1 + 9) / 512)
    assert sign_test(900, 1200) < 1e-8


@given(st.integers(0, 40), st.integers(0, 40))
def test_sign_test_is_a_probability(gained: int, lost: int) -> None:
    total = gained + lost
    even = abs(gained - lost)
    expected = sum(math.comb(total, k) for k in range(total + 1) if abs(total - 2 * k) >= even) / 2**total
    assert sign_test(gained, lost) == pytest.approx(expected)


def quality(correct: str, distance: float | None = None, std: float = 1.0) -> Quality:
    shown = tuple(letter == "1" for letter in correct)
    rate = Rate.of(shown)
    assert rate is not None
    spread = FrechetSpread(0.0 if distance is None else distance + 1, std, 200)
    return Quality(rate, shown, None if distance is None else Distance(distance, spread))


def test_pairs_are_compared_not_rates() -> None:
    versus = compare(quality("1100", 5, 3), quality("0011", 15, 4))
    assert (versus.gained, versus.lost, versus.p) == (2, 2, 1.0)
    assert versus.same_adherence
    assert (versus.distance, versus.distance_noise) == (-10, 10)
    assert versus.same_distance is False
    worse = compare(quality("0" * 8 + "1"), quality("1" * 8 + "0"))
    assert (worse.gained, worse.lost) == (1, 8)
    assert not worse.same_adherence
    assert worse.same_distance is None
    same = compare(quality("10", 3, 0), quality("10", 3, 0))
    assert same.same_distance is True
    with pytest.raises(InputError, match="equally many"):
        compare(quality("10"), quality("100"))


# -- the run -------------------------------------------------------------------------------------------


def test_everything_is_measured(detector: SceneDetector, reference: FeatureStatistics) -> None:
    truth = true_images(list(held_out_prompts(12)), 32)
    seen: list[BenchReport] = []
    report = bench(
        pipeline("t2i"),
        [ZipAR(1), ZipAR(2), ZipAR(1), Plain()],
        captions=CAPTIONS,
        batches=(1, 3),
        repeats=2,
        detector=detector,
        reference=reference,
        truth=truth,
        seed=5,
        on_rows=seen.append,
        guidance_scale=1.5,
    )
    assert [row.label.split(",")[0] for row in report.rows] == [
        "plain()",
        "zipar(window=1)",
        "zipar(window=2)",
    ]
    assert report.batches == [1, 3]
    assert report.settings.call == {"guidance_scale": 1.5}
    for row, passes in zip(report.rows, (GRID**2, 2 * GRID - 1, 3 * GRID - 2), strict=True):
        for measured in row.speed.values():
            assert measured.passes == passes
            assert measured.tokens_per_pass == GRID**2 / passes
            assert len(measured.seconds) == 2
            assert measured.speedup_spread[0] <= measured.speedup <= measured.speedup_spread[1]
            assert measured.details == {}
        accelerator = ZipAR(row.options["window"]) if row.options else Plain()
        images = pipeline("t2i")(TEXTS, seed=5, guidance_scale=1.5, accelerator=accelerator).images
        assert row.quality == judge_images(detector, images, CAPTIONS, reference), "seed + i, any batch"
    assert report.plain.speed[1].speedup == 1
    assert report.truth == judge_images(detector, truth, CAPTIONS, reference)
    # saved after each batch size and each accelerator's images
    assert [sum(row.quality is not None for row in part.rows) for part in seen] == [0, 0, 1, 2, 3]
    assert [part.batches for part in seen] == [[1], [1, 3], [1, 3], [1, 3], [1, 3]]
    assert report.against_plain(report.plain) is None
    assert report.against_plain(report.rows[1]) == compare(report.rows[1].quality, report.plain.quality)  # type: ignore[arg-type]
    assert through_json(report) == report


def test_only_speed() -> None:
    report = bench(pipeline("c2i"), [ZipAR(2)], prompts=PROMPTS["c2i"])
    assert report.settings.images == 0
    assert report.settings.reference is None
    assert all(row.quality is None for row in report.rows)
    assert "adherence" not in bench_markdown(report)
    assert through_json(report) == report


def test_finished_rows_are_not_measured_again(detector: SceneDetector, reference: FeatureStatistics) -> None:
    options: dict[str, Any] = {"captions": CAPTIONS, "detector": detector, "reference": reference}
    first = Counting()
    report = bench(first, [ZipAR(1)], **options)
    assert first.calls == [
        *[("plain", 1, 0), ("zipar", 1, 0)] * 2,
        *[("plain", 10, 0), ("plain", 2, 10), ("zipar", 10, 0), ("zipar", 2, 10)],
    ]
    again = Counting()
    assert bench(again, [ZipAR(1)], finished=through_json(report), **options) == report
    assert again.calls == []
    more = Counting()
    extended = bench(more, [ZipAR(2)], finished=through_json(report), **options)
    assert more.calls == [*[("plain", 1, 0), ("zipar", 1, 0)] * 2, ("zipar", 10, 0), ("zipar", 2, 10)]
    assert [row.options.get("window") for row in extended.rows] == [None, 2, 1]
    assert extended.plain == report.plain
    assert extended.rows[2] == report.rows[1]
    batch = Counting()
    wider = bench(batch, [ZipAR(1)], finished=report, batches=(1, 4), **options)
    assert batch.calls == [("plain", 4, 0), ("zipar", 4, 0)] * 2
    assert wider.rows[1].speed[1] == report.rows[1].speed[1]
    assert wider.batches == [1, 4]


def test_interrupted_after_the_first_images(detector: SceneDetector) -> None:
    saved: list[BenchReport] = []

    def stop(report: BenchReport) -> None:
        saved.append(through_json(report))
        if report.plain.quality is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(pipeline("t2i"), [ZipAR(1)], captions=CAPTIONS, detector=detector, on_rows=stop)
    rest = Counting()
    report = bench(rest, [ZipAR(1)], captions=CAPTIONS, detector=detector, finished=saved[-1])
    assert rest.calls == [("zipar", 10, 0), ("zipar", 2, 10)]
    assert all(row.quality is not None and row.speed for row in report.rows)


def test_how_many_are_drawn_together(detector: SceneDetector) -> None:
    options: dict[str, Any] = {"captions": CAPTIONS, "detector": detector, "drawn_together": 5}
    pipe = Counting()
    report = bench(pipe, [], **options)
    assert pipe.calls[2:] == [("plain", 5, 0), ("plain", 5, 5), ("plain", 2, 10)]
    again = Counting()
    assert bench(again, [], finished=report, **{**options, "drawn_together": 1}) == report, (
        "another number will do"
    )
    assert again.calls == []
    with pytest.raises(InputError, match="drawn_together must be at least 1"):
        bench(pipe, [], **{**options, "drawn_together": 0})


@pytest.mark.slow
def test_the_whole_grid_of_a_masked_model() -> None:
    """Everything in it runs, and what drafts says so."""
    pipe = pipeline("mar-caption")
    grid = parse_grid(default_grid(pipe))
    report = bench(pipe, grid, prompts=["a red sphere"], num_iterations=16, head_steps=6)
    assert report.settings.call == {"num_iterations": 16, "head_steps": 6}
    assert [row.key for row in report.rows] == [Row.of(one).key for one in (Plain(), *grid)]
    assert report.plain.speed[1].passes == GRID**2
    for row in report.rows:
        details = row.speed[1].details
        assert ("draft_passes" in details) == (row.accelerator == "cspd")
        if row.accelerator == "cspd":
            assert details["draft_passes"][0] > 0
        if iterations := row.options.get("iterations"):
            assert row.speed[1].passes == iterations
    assert bench_markdown(BenchReport.from_dict(json.loads(json.dumps(report.to_dict())))) == bench_markdown(
        report
    )


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"compiled": True}, "compiled False instead of True"),
        ({"seed": 1}, "seed 0 instead of 1"),
        ({"repeats": 2}, "repeats 1 instead of 2"),
        ({"model": "other"}, "model 'tiny' instead of 'other'"),
        ({"prompts": TEXTS[:3]}, "prompts"),
        ({"top_k": 3}, "call"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_other_settings_are_not_continued(changed: dict[str, Any], word: str) -> None:
    report = bench(pipeline("t2i"), [])
    with pytest.raises(InputError, match=word):
        bench(pipeline("t2i"), [], finished=through_json(report), **changed)


def test_other_weights_are_not_continued() -> None:
    report = bench(pipeline("t2i"), [])
    other = bench(pipeline("c2i"), [], prompts=[0])
    assert report.settings.weights != other.settings.weights
    assert report.settings.weights == bench(pipeline("t2i"), []).settings.weights


def test_an_accelerator_that_fails_is_named(wishes: type[_Wishes], detector: SceneDetector) -> None:
    with pytest.raises(InputError, match=r"test-wishes\(k=7\): it grants nothing"):
        bench(pipeline("t2i"), [ZipAR(1), wishes(k=7)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"captions": CAPTIONS}, "detector"),
        ({"batches": ()}, "batches"),
        ({"batches": (0,)}, "batches"),
        ({"batches": (13,)}, r"prompts \(12\)"),
        ({"repeats": 0}, "repeats"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        bench(pipeline("t2i"), [], **options)


def test_one_image_has_no_distance(detector: SceneDetector, reference: FeatureStatistics) -> None:
    with pytest.raises(InputError, match="two images"):
        bench(pipeline("t2i"), [], captions=CAPTIONS[:1], detector=detector, reference=reference)
    assert bench(pipeline("t2i"), [], captions=CAPTIONS[:1], detector=detector).plain.quality is not None


@pytest.mark.parametrize(
    "values", [{}, [], {"settings": {}, "truth": None, "rows": []}, {"rows": 3}], ids=str
)
def test_what_is_no_report(values: Any) -> None:
    with pytest.raises(InputError, match="no report"):
        BenchReport.from_dict(values)


# -- speed ---------------------------------------------------------------------------------------------


def test_rounds_take_the_batches_in_turn() -> None:
    pipe = Counting()
    report = measure_speed(pipe, TEXTS[:5], [], batch=2, repeats=3, seed=7)
    assert pipe.calls == [("plain", 2, seed) for seed in (7, 7, 9, 7)]
    assert report.batch == 2
    whole = Counting()
    assert measure_speed(whole, TEXTS[:5], [], repeats=1).batch == 5
    with pytest.raises(InputError, match="batch of 6"):
        measure_speed(pipe, TEXTS[:5], [], batch=6)
    with pytest.raises(InputError, match="batch of 0"):
        measure_speed(pipe, [], [])


@dataclass(frozen=True)
class _Told:
    """Statistics of an accelerator that has more to tell and whose passes depend on the image."""

    number: int
    accelerator: str = "guessing"
    lossless: bool = True
    tokens: int = 12
    cache_bytes: int = 0

    @property
    def options(self) -> dict[str, Any]:
        return {}

    @property
    def passes(self) -> int:
        return 3 + self.number

    @property
    def seconds(self) -> dict[str, float]:
        return {"tokens": 1.0 + self.number}

    def to_dict(self) -> dict[str, Any]:
        return {"passes": self.passes, "accepted": [1.5, self.number], "draft_passes": 0, "empty": []}


def test_statistics_beyond_the_common_ones_are_kept() -> None:
    class Guessing(Counting):
        def __call__(self, prompts: Sequence[str], **call: Any) -> Any:
            output = super().__call__(prompts, **call)
            if call["accelerator"].name == "zipar":
                output.stats = _Told(sum(name == "zipar" for name, *_ in self.calls) - 1)
            return output

    plain, guessing = measure_speed(Guessing(), TEXTS, [ZipAR(1)], batch=1, repeats=2).measurements
    assert guessing.details == {"accepted": [[1.5, 1], [1.5, 2]]}
    assert guessing.passes == 4.5
    assert guessing.tokens_per_pass == pytest.approx(12 / 4.5)
    assert plain.details == {}


# -- what is shown -------------------------------------------------------------------------------------


def report_of(*rows: Row, truth: Quality | None = None) -> BenchReport:
    settings = bench(pipeline("t2i"), []).settings
    return BenchReport(replace(settings, images=9, reference="scenes-detector/0 of 20"), rows, truth)


def row(accelerator: Accelerator, speedup: float, own: Quality | None) -> Row:
    empty = Row.of(accelerator)
    spread = (speedup - 0.25, speedup + 0.25)
    measured = Measurement(
        *(empty.accelerator, empty.options, empty.lossless, 16 / speedup, speedup),
        *((1 / speedup,), speedup, spread),
    )
    return replace(empty, speed={1: measured}, quality=own)


@pytest.fixture
def shown() -> BenchReport:
    return report_of(
        row(Plain(), 1, quality("111111110", 10)),
        row(ZipAR(8), 1.5, quality("111111010", 11)),
        row(ZipAR(2), 3.25, quality("000000001", 30)),
        truth=quality("111111111", 8),
    )


def words_of(report: BenchReport, width: int = 80) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(bench_table(report))
    return captured.get()


def test_table(shown: BenchReport) -> None:
    wide = words_of(shown, 200)
    for text in (
        *("3.25x (3.00 to 3.50)", "89 % (57 to 98)", "30 (1)", "true images", "not FID"),
        *("within noise (+0 -1, p = 1)", "worse (+1 -8, p = 0.039)"),
        *("within noise (+1, noise 2.8)", "further (+20, noise 2.8)"),
    ):
        assert text in wide
    narrow = words_of(shown)
    assert max(map(len, narrow.splitlines())) <= 80
    assert "…" not in narrow
    for word in ("window=8", "approximate", "adherence", "distance", "speed-up"):
        assert word in narrow


def test_markdown(shown: BenchReport) -> None:
    text = bench_markdown(shown)
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert [len(lines) for lines in tables] == [2 + 3, 2 + 4]
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1
    assert tables[0][4] == ("| zipar window=2 | approximate | 4.923 | 3.25 | 0.308 | 3.25x (3.00 to 3.50) |")
    assert "not FID" in text


def drafting_report() -> BenchReport:
    """As of the grid of a masked model: two dozen rows, several close to each other."""
    grid = parse_grid(default_grid(pipeline("mar-caption")))
    rows = [row(Plain(), 1, quality("1" * 90 + "0" * 10, 9))]
    for index, accelerator in enumerate(grid):
        speedup = 1.1 if isinstance(accelerator, CSpD) else 1.0 + index / 2
        one = row(accelerator, speedup, quality("1" * (90 - index) + "0" * (10 + index), 9 + index % 7))
        if isinstance(accelerator, CSpD):
            told = {"draft_passes": [240, 243], "kept": [(0.5, 0.25), (0.5, 0.5)]}
            one = replace(one, speed={1: replace(one.speed[1], details=told)})
        rows.append(one)
    return report_of(*rows, truth=quality("1" * 100, 2))


def test_what_drafts_cost_is_shown() -> None:
    report = drafting_report()
    table = bench_markdown(report).split("\n\n")[1].splitlines()
    assert table[0].endswith("| speed-up (spread) | drafter passes | kept |")
    assert table[2].startswith("| plain |")
    assert table[2].endswith("| - | - |")
    assert "| cspd mode=exact, verification=sequential |" in table[-1]
    assert table[-1].endswith("| 241.5 | 44 % |")
    narrow = words_of(report)
    assert max(map(len, narrow.splitlines())) <= 80
    assert "…" not in narrow
    for word in ("sequential", "approximate", "head_sampler=dpm++", "drafter", "kept", "241.5", "44 %"):
        assert word in narrow


def test_no_columns_of_drafts_without_drafts(shown: BenchReport) -> None:
    assert "drafter passes" not in bench_markdown(shown)
    assert "kept" not in bench_markdown(shown)


def test_the_place_says_how_it_ran(shown: BenchReport) -> None:
    settings = shown.settings
    assert settings.place == settings.machine
    quick = replace(settings, dtype="bfloat16", compiled=True)
    assert quick.place == f"{settings.machine}, bfloat16, compiled"
    assert f"{quick.place}:" in bench_markdown(replace(shown, settings=quick))


def test_reports_of_before_there_was_compiling(shown: BenchReport) -> None:
    values = json.loads(json.dumps(shown.to_dict()))
    del values["settings"]["compiled"]
    assert BenchReport.from_dict(values) == shown


@pytest.mark.slow
def test_plot_of_many_rows(tmp_path: Path) -> None:
    """Close points, values that differ a lot, a legend of two dozen lines."""
    pytest.importorskip("matplotlib")
    report = drafting_report()
    plot(report, tmp_path / "near.png")
    far = replace(report, rows=(*report.rows[:-1], replace(report.rows[-1], quality=quality("0" * 100, 90))))
    plot(far, tmp_path / "far.png")
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert image.height > 600
            assert np.asarray(image).std() > 5


def test_labels_of_a_masked_model() -> None:
    rows = drafting_report().rows
    labels = [telling_options(r, rows) for r in rows]
    assert len(set(labels[1:])) == len(labels) - 1
    assert labels[1] == "iterations=8"
    assert "refresh=4, iterations=4, head_steps=20, head_sampler=dpm++" in labels
    assert "mode=reference, draft_length=4" in labels, "as good as all others are joint"
    assert labels[-1] == "mode=exact, draft_length=4, verification=sequential"


def test_front() -> None:
    points = [(1.0, 9.0), (2.0, 9.5), (2.0, 7.0), (3.0, 8.0), (4.0, 3.0), (3.5, 2.0)]
    assert pareto_front(points, more=True) == [(4.0, 3.0), (3.0, 8.0), (2.0, 9.5)]
    assert pareto_front(points, more=False) == [(4.0, 3.0), (3.5, 2.0)]


def test_plot(shown: BenchReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(shown, tmp_path / "plot.png")
    without = replace(
        shown, truth=None, rows=tuple(replace(r, quality=quality("100000000")) for r in shown.rows)
    )
    plot(without, tmp_path / "sub" / "plot.jpg")
    with Image.open(tmp_path / "plot.png") as wide, Image.open(tmp_path / "sub" / "plot.jpg") as narrow:
        assert wide.width > narrow.width
        assert np.asarray(wide).std() > 5
    with pytest.raises(InputError, match="images to be judged"):
        plot(report_of(row(Plain(), 1, None)), tmp_path / "none.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plot.png", "sub"]


def test_plot_without_matplotlib(shown: BenchReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varaccel.evaluation.extra.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install varaccel\[eval\]"):
        plot(shown, tmp_path / "plot.png")


def test_labels_say_what_differs(shown: BenchReport) -> None:
    assert [telling_options(r, shown.rows) for r in shown.rows] == ["", "window=8", "window=2"]


def test_samples(wishes: type[_Wishes]) -> None:
    side = 40
    sheet = sample_sheet(pipeline("t2i"), [ZipAR(1), Plain()], PROMPTS["t2i"][:2], seed=3, side=side)
    for index, accelerator in enumerate((Plain(), ZipAR(1))):
        images = pipeline("t2i")(PROMPTS["t2i"][:2], seed=3, accelerator=accelerator).images
        for column, image in enumerate(images):
            left = sheet.width - (2 - column) * (side + 6)
            top = sheet.height - (2 - index) * (side + 6)
            part = sheet.crop((left, top, left + side, top + side))
            assert part.tobytes() == image.resize((side, side), Image.Resampling.LANCZOS).tobytes()
    with pytest.raises(InputError, match="at least one prompt"):
        sample_sheet(pipeline("t2i"), [], [])
    with pytest.raises(InputError, match="test-wishes"):
        sample_sheet(pipeline("t2i"), [wishes()], ["a cube"])


# -- true images -------------------------------------------------------------------------------------


def test_reference_is_made_once(detector: SceneDetector) -> None:
    seeds = list(held_out_prompts(6))
    first = reference_statistics(detector, seeds, progress=False)
    assert reference_statistics(detector, seeds, progress=False) is first
    assert first.count == 6
    assert reference_statistics(detector, seeds[:5], progress=False) is not first
    with pytest.raises(InputError, match="at least two"):
        reference_statistics(detector, [], progress=False)


def test_true_images_are_closer_than_noise(detector: SceneDetector, reference: FeatureStatistics) -> None:
    seeds = list(held_out_prompts(12))
    noise = [
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)) for i in range(12)
    ]
    true, random = (
        judge_images(detector, images, CAPTIONS, reference).distance
        for images in (true_images(seeds, 32), noise)
    )
    assert true is not None
    assert random is not None
    assert true.value < random.value
    assert true.spread.std > 0
