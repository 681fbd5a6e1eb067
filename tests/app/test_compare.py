"""The tab that compares settings: what is typed, what is drawn, what is shown, and how it ends early."""

from __future__ import annotations

import base64
import html
import io
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.tiny import GRID, PROMPTS, pipeline
from varaccel import Jacobi, Plain, ZipAR, make_accelerator
from varaccel.errors import CheckpointError, InputError

gradio = pytest.importorskip("gradio")

from varaccel.app.compare_settings import (  # noqa: E402 - needs gradio
    default_lines,
    proposed_lines,
    settings_lines,
)
from varaccel.app.compare_tab import compare_tab  # noqa: E402
from varaccel.app.compare_view import row_html  # noqa: E402
from varaccel.app.comparison import compare, sheet  # noqa: E402
from varaccel.app.models import ModelShelf  # noqa: E402
from varaccel.app.race import WARM_UP_PASSES  # noqa: E402
from varaccel.app.snippet import DrawRequest  # noqa: E402
from varaccel.app.studio import Studio  # noqa: E402
from varaccel.app.turns import Stopped  # noqa: E402
from varaccel.engine.accelerator import fitting  # noqa: E402
from varaccel.engine.job import Job  # noqa: E402
from varaccel.evaluation.bench.report import with_plain  # noqa: E402
from varaccel.hosts.causal.job import CausalJob  # noqa: E402
from varaccel.hosts.masked.job import MaskedJob  # noqa: E402
from varaccel.hosts.next_scale.job import ScaleJob  # noqa: E402

KINDS = {CausalJob: "t2i", ScaleJob: "var-caption", MaskedJob: "mar-caption"}
SETTINGS = {
    CausalJob: [ZipAR(2), Jacobi(3)],
    ScaleJob: [make_accelerator("code", {"draft_scales": 2}), make_accelerator("refiner")],
    MaskedJob: [
        make_accelerator("fewer_steps", {"iterations": 3}),
        make_accelerator("cspd", {"draft_length": 2}),
    ],
}
CALL: dict[str, Any] = {"seed": 3, "guidance_scale": 1.5}


def freely() -> None:
    """Allows everything."""


# -- settings ------------------------------------------------------------------------------------------


def test_settings_are_read_line_by_line() -> None:
    text = """
    # windows
      zipar:window=4,mode=published   # as published
    zipar

    speculative:tree=[[0], [1]],drafter=small
    plain
    """
    assert settings_lines(text, CausalJob) == [
        ZipAR(4, "published"),
        ZipAR(),
        make_accelerator("speculative", {"tree": [[0], [1]], "drafter": "small"}),
        Plain(),
    ]
    # a # within an option is none of a comment
    assert settings_lines("code:refiner=a#b", ScaleJob) == [make_accelerator("code", {"refiner": "a#b"})]


@pytest.mark.parametrize(
    ("text", "job_type", "message"),
    [
        ("plain\n\nwarp", CausalJob, "line 3: .*warp"),
        ("zipar:window=0", CausalJob, "line 1: .*window"),
        ("plain\nzipar:windw=2", CausalJob, "line 2: .*windw"),
        ("plain\nzipar", ScaleJob, "line 2: 'zipar' does not work on tiny; what does: .*code"),
        ("zipar:4", CausalJob, "line 1: .*key=value"),
        ("", CausalJob, "no setting"),
        (" \n# zipar", CausalJob, "no setting"),
        ("\n".join(f"zipar:window={n}" for n in range(1, 14)), CausalJob, "up to 12 settings, got 13"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_used(text: str, job_type: type[Job], message: str) -> None:
    with pytest.raises(InputError, match=message) as told:
        settings_lines(text, job_type, "tiny")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_proposed_fits_the_family(kind: type[Job]) -> None:
    proposed = settings_lines(default_lines(kind), kind)
    assert proposed[0] == Plain()
    assert len(proposed) > 2


def test_what_is_proposed_has_its_networks() -> None:
    shipped = ("mini-llamagen", "mini-var", "mini-var-small", "mini-mar")
    assert proposed_lines("mini-var", ScaleJob, shipped) == default_lines(ScaleJob)
    assert "refiner=" not in proposed_lines("mini-var", ScaleJob, ["mini-var"])
    assert proposed_lines("var-d30", ScaleJob, shipped) == "plain"
    assert proposed_lines("var-code-8", ScaleJob, shipped, ["refiner"]).splitlines() == [
        *("plain", *(f"code:draft_scales={n}" for n in (6, 5, 4, 3)), "refiner")
    ]
    assert "cspd" not in proposed_lines("mar-base", MaskedJob, shipped)
    assert "cspd" in proposed_lines("mar-base", MaskedJob, shipped, ["draft"])
    assert proposed_lines("llamagen-c2i-b-256", CausalJob, ()) == default_lines(CausalJob)


def test_plain_decoding_is_first_and_nothing_is_drawn_twice() -> None:
    assert with_plain([ZipAR(2), Plain(), ZipAR(window=2), ZipAR(3)]) == [Plain(), ZipAR(2), ZipAR(3)]


# -- the comparison ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_the_pipeline_draws(kind: type[Job]) -> None:
    pipe = pipeline(KINDS[kind])
    settings = SETTINGS[kind]
    rows = list(compare(pipe, "a red sphere", settings, count=2, allowed=freely, **CALL))
    assert [row.accelerator for row in rows] == [Plain(), *settings]
    for row in rows:
        expected = pipe(
            "a red sphere", seed=3, guidance_scale=1.5, num_images_per_prompt=2, accelerator=row.accelerator
        )
        assert [p.tobytes() for p in row.output.images] == [p.tobytes() for p in expected.images]
        assert (row.stats.passes, row.stats.label) == (expected.stats.passes, expected.stats.label)
        assert row.stats.lossless == expected.stats.lossless
        assert row.speedup == rows[0].stats.seconds["tokens"] / row.stats.seconds["tokens"] > 0
    assert rows[0].speedup == 1


def test_guidance_is_the_models_own_unless_it_is_given() -> None:
    pipe = pipeline("t2i")
    arguments: dict[str, Any] = {"seed": 0, "count": 1, "allowed": freely}
    own = next(compare(pipe, "a cube", [], guidance_scale=None, **arguments))
    off = next(compare(pipe, "a cube", [], guidance_scale=1.0, **arguments))
    assert own.output.images[0].tobytes() == pipe("a cube", seed=0).images[0].tobytes()
    assert own.stats.rows == 2 * off.stats.rows


class Watched:
    """A pipeline that notes of every call what drew, and whether images were asked for."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.job_type = pipe, pipe.job_type
        self.calls: list[tuple[str, str]] = []

    def __call__(self, **call: Any) -> Any:
        self.calls.append((call["accelerator"].name, call.get("output_type", "pil")))
        return self.pipe(**call)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_as_they_are_finished_and_every_call_is_warm(kind: type[Job]) -> None:
    pipe = Watched(pipeline(KINDS[kind]))
    drawing = compare(pipe, "a cube", SETTINGS[kind], count=1, allowed=freely, **CALL)
    for number, name in enumerate(["plain", *(one.name for one in SETTINGS[kind])], start=1):
        next(drawing)
        assert pipe.calls[2 * number - 2 :] == [(name, "latent"), (name, "pil")]


@pytest.mark.parametrize("kind", KINDS)
def test_permission_is_asked_after_every_pass(kind: type[Job]) -> None:
    pipe, asked = pipeline(KINDS[kind]), []
    rows = list(compare(pipe, "a cube", SETTINGS[kind], count=1, allowed=lambda: asked.append(1), **CALL))
    passes = [row.stats.passes for row in rows]
    warm = passes if kind is ScaleJob else [min(WARM_UP_PASSES, n) for n in passes]
    assert len(asked) == sum(passes) + sum(warm)


class Paused:
    """Permission that takes a while, of which it says that only a part was waiting."""

    paused = 0.0

    def __call__(self) -> None:
        time.sleep(0.01)
        self.paused += 0.004


def test_waiting_is_not_on_the_clock() -> None:
    pipe = pipeline("t2i")
    arguments: dict[str, Any] = {"count": 1, **CALL}
    quick = next(compare(pipe, "a cube", [], allowed=freely, **arguments)).stats.seconds["tokens"]
    slow = next(compare(pipe, "a cube", [], allowed=lambda: time.sleep(0.05), **arguments)).stats.seconds[
        "tokens"
    ]
    assert slow < quick + GRID**2 * 0.05 / 2
    partly = next(compare(pipe, "a cube", [], allowed=Paused(), **arguments)).stats.seconds["tokens"]
    assert partly > GRID**2 * 0.006


def test_errors_name_the_setting() -> None:
    drawing = compare(
        pipeline("t2i"), "a cube", [make_accelerator("lantern", {"k": 1000})], count=1, allowed=freely, **CALL
    )
    assert next(drawing).accelerator == Plain()
    with pytest.raises(InputError, match=r"lantern\(k=1000\)"):
        next(drawing)


@pytest.mark.parametrize("prompt", ["a red sphere", 1000 * "a very long prompt "], ids=len)
def test_the_sheet_shows_all_rows(prompt: str) -> None:
    pipe = pipeline("t2i")
    rows = list(compare(pipe, "a red sphere", [ZipAR(2)], count=3, allowed=freely, **CALL))
    one, two = sheet(rows[:1], prompt), sheet(rows, prompt)
    assert one.width == two.width
    assert one.height < two.height < 1000
    inside = {color for _, color in two.getcolors(two.width * two.height)}
    for row in rows:
        for image in row.output.images:  # enlarged, so only what is even inside survives
            assert {color for count, color in image.getcolors() if count > 20} <= inside
    narrow = sheet(list(compare(pipe, "a red sphere", [], count=1, allowed=freely, **CALL)), prompt)
    assert narrow.width < one.width


# -- the page ------------------------------------------------------------------------------------------


def load(name: str) -> Any:
    if name == "absent":
        raise CheckpointError("<b>absent</b> is not there.")
    return pipeline(name)


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio(ModelShelf(["t2i", "var-caption", "mar-caption", "c2i", "absent"], load))


@pytest.fixture(scope="module")
def page(studio: Studio) -> Iterator[Any]:
    with gradio.Blocks(analytics_enabled=False) as page:
        compare_tab(studio)
    yield page
    page.close()


def event(page: Any, name: str) -> Any:
    return next(one for one in page.fns.values() if getattr(one.fn, "__name__", "") == name)


VISIT: Any = SimpleNamespace(session_hash="a visitor")
Draw = Callable[..., Iterator[tuple[Any, Any]]]


@pytest.fixture
def draw(page: Any) -> Draw:
    def run(**change: Any) -> Iterator[tuple[Any, Any]]:
        asked: dict[str, Any] = {
            "asked_at": time.monotonic(),
            "model": "t2i",
            "prompt": "a red sphere",
            "text": "zipar:window=2\njacobi:window=3",
            "seed": 3,
            "count": 2,
            "guidance": "1.5",
            "request": VISIT,
        }
        return event(page, "draw").fn(**{**asked, **change})

    return run


def rows_of(shown: str) -> list[str]:
    body = re.search(r"<tbody>(.*)</tbody>", shown)
    return [] if body is None else re.findall(r"<tr>.*?</tr>", body[1])


def note_of(shown: str) -> str:
    found = re.search(r'<p class="note" role="status">(.*?)</p>', shown)
    return "" if found is None else html.unescape(found[1])


def drawn_in(row: str) -> list[bytes]:
    found = []
    for data in re.findall(r'src="data:image/png;base64,([^"]+)"', row):
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            found.append(image.tobytes())
    return found


def test_the_table_grows_row_by_row(draw: Draw) -> None:
    seen = []
    for shown, file in draw():
        path = file.get("value")
        with Image.open(path) if path else Image.new("RGB", (1, 1)) as sheet:
            seen.append((len(rows_of(shown)), note_of(shown), shown, sheet.size))
    assert [(rows, note) for rows, note, *_ in seen] == [
        (0, "loading t2i"),
        (0, "drawing 1 of 3: plain()"),
        (1, "drawing 2 of 3: zipar(window=2)"),
        (2, "drawing 3 of 3: jacobi(window=3)"),
        (3, ""),
    ]
    assert [size > (1, 1) for *_, size in seen] == [False] * 4 + [True]
    assert not Path(path).exists(), "the file is the page's own copy from now on"
    last = seen[-1][2]
    for row, accelerator, quality in zip(
        rows_of(last), [Plain(), ZipAR(2), Jacobi(3)], ["lossless", "approximate", "lossless"], strict=True
    ):
        expected = pipeline("t2i")(
            "a red sphere", seed=3, guidance_scale=1.5, num_images_per_prompt=2, accelerator=accelerator
        )
        assert drawn_in(row) == [image.tobytes() for image in expected.images]
        assert f'<th scope="row">{accelerator.name}' in row
        assert f'<td data-title="passes">{expected.stats.passes}</td>' in row
        assert f'<td data-title="tokens per pass">{expected.stats.tokens_per_pass:.2f}</td>' in row
        assert re.search(rf'<b>\d+\.\d\dx</b> <span class="va-quality {quality}">', row)
    assert "<b>1.00x</b>" in rows_of(last)[0]
    assert "timed once, on this machine" in last
    assert "varaccel generate &#x27;a red sphere&#x27; --model t2i --seed 3 --count 2" in last
    assert "--accelerator zipar -o window=2" in last


@pytest.mark.parametrize("kind", ["var-caption", "mar-caption", "c2i"])
def test_every_family_can_be_compared(draw: Draw, kind: str) -> None:
    job_type = pipeline(kind).job_type
    text = {
        ScaleJob: "code:draft_scales=2",
        MaskedJob: "auto:quality=approximate",
        CausalJob: "auto",
    }[job_type]
    prompt = str(PROMPTS[kind][1])
    shown, _ = list(draw(model=kind, text=text, prompt=prompt, guidance=""))[-1]
    assert len(rows_of(shown)) == 2
    assert note_of(shown) == ""
    if job_type is not ScaleJob:
        assert re.search(r"<small>chose \w+\(", rows_of(shown)[1])


def test_what_is_typed_is_text(draw: Draw) -> None:
    attack = "a cube <img src=x onerror=alert(1)> \"quoted\" & 'more'"
    text = 'jacobi:window=2\nspeculative:tree="<b>",drafter=layers'
    with pytest.raises(gradio.Error, match="&lt;b&gt;"):
        list(draw(prompt=attack, text=text))
    with pytest.warns(UserWarning, match="&lt;|never seen"):
        shown = list(draw(prompt=attack, text="jacobi:window=2"))[-1][0]
    assert "<img src=x" not in shown
    assert html.escape(attack) in shown
    kinds = set(re.findall(r"<(\w+)", shown))
    assert kinds - {"div", "p", "table", "thead", "tbody", "tr", "th", "td", "b", "span", "small", "img"} <= {
        *("details", "summary", "code")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "  "}, "no prompt"),
        ({"seed": None}, "seed"),
        ({"seed": -1}, "seed"),
        ({"count": 0}, "1 to 4"),
        ({"count": 5}, "1 to 4"),
        ({"guidance": "much"}, "guidance"),
        ({"guidance": "nan"}, "guidance_scale"),
        ({"text": ""}, "no setting"),
        ({"text": "plain\nwarp"}, "line 2"),
        ({"text": "code"}, "line 1: &#x27;code&#x27;|line 1: 'code'"),
        ({"model": "elsewhere"}, "unknown model of this page"),
        ({"model": "absent"}, "&lt;b&gt;absent"),
        ({"model": "var-caption", "text": "code:refiner=/etc"}, "unknown model of this page"),
    ],
    ids=str,
)
def test_errors_are_notices(draw: Draw, change: dict[str, Any], message: str) -> None:
    with pytest.raises(gradio.Error, match=message):
        list(draw(**change))


def test_a_setting_that_fails_leaves_the_rows_before_it(draw: Draw) -> None:
    seen = []
    with pytest.raises(gradio.Error, match=r"lantern\(k=1000\)"):
        seen.extend(draw(text="zipar\nlantern:k=1000\njacobi"))  # extend keeps what came before the error
    shown, file = seen[-1]
    assert len(rows_of(shown)) == 2
    assert note_of(shown) == "Ended after 2 of 4 settings."
    assert file["visible"]


def test_a_failure_of_another_kind_is_not_hidden(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline("t2i").vq_model, "decode_tokens", fail)
    with pytest.raises(ZeroDivisionError):
        list(draw())


def test_cancelling_between_rows_keeps_what_there_is(draw: Draw, page: Any, studio: Studio) -> None:
    drawing = draw()
    shown = ""
    while len(rows_of(shown)) < 1:
        shown, _ = next(drawing)
    event(page, "stop").fn(VISIT)
    (last, file), *more = drawing
    assert not more
    assert rows_of(last) == rows_of(shown)
    assert note_of(last) == "Stopped after 1 of 3 settings."
    assert file["visible"]
    # who asks again is not stopped any more
    assert len(rows_of(list(draw())[-1][0])) == 3


def test_cancelling_within_a_row(draw: Draw, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = 0
    hold = studio.hold

    @contextmanager
    def held(request: Any) -> Iterator[Callable[[], None]]:
        with hold(request) as allowed:

            def watched() -> None:
                nonlocal passes
                passes += 1
                if passes == GRID**2 + WARM_UP_PASSES + 6:  # within the second row
                    studio.visits.stop("a visitor")
                allowed()

            yield watched

    monkeypatch.setattr(studio, "hold", held)
    shown, _ = list(draw())[-1]
    assert len(rows_of(shown)) == 1
    assert note_of(shown) == "Stopped after 1 of 3 settings."
    assert passes == GRID**2 + WARM_UP_PASSES + 6, "not a pass more"


def test_the_time_limit_is_told(draw: Draw, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studio, "seconds_limit", 0.0)
    shown, file = list(draw())[-1]
    assert rows_of(shown) == []
    assert note_of(shown).startswith("Stopped after 0 seconds, the time limit")
    assert "value" not in file


def test_what_was_cancelled_in_the_queue_is_not_begun(draw: Draw, page: Any) -> None:
    drawing = draw()
    event(page, "stop").fn(VISIT)
    assert list(drawing) == []


def test_the_device_is_free_while_a_row_is_shown(draw: Draw, studio: Studio) -> None:
    for _ in draw():
        assert studio.turns.holder is None


def test_another_visitor_cancels_nothing_of_mine(draw: Draw, page: Any) -> None:
    drawing = draw()
    next(drawing)
    event(page, "stop").fn(SimpleNamespace(session_hash="somebody else"))
    assert len(rows_of(list(drawing)[-1][0])) == 3


@pytest.mark.parametrize(
    ("model", "text", "prompt", "expected"),
    [
        ("t2i", "zipar:window=3", "a cube", ("zipar:window=3", "a cube")),
        ("mar-caption", "zipar:window=3", "a cube", ("plain", "a cube")),
        ("c2i", "jacobi", "a cube", ("jacobi", "tench")),
        ("c2i", "jacobi", "goldfish", ("jacobi", "goldfish")),
    ],
)
def test_settings_follow_the_model(
    page: Any, model: str, text: str, prompt: str, expected: tuple[str, str]
) -> None:
    settings, kept = event(page, "propose").fn(model, text, prompt)
    assert (settings.splitlines()[0], kept) == expected
    assert settings_lines(settings, pipeline(model).job_type)


def test_no_event_is_part_of_the_api(page: Any) -> None:
    assert page.fns
    assert {one.api_visibility for one in page.fns.values()} == {"private"}


def test_large_images_are_shown_smaller() -> None:
    row = next(compare(pipeline("t2i"), "a cube", [], count=1, allowed=freely, **CALL))
    row.output.images[0] = Image.new("RGB", (512, 384), "red")
    wanted = DrawRequest("t2i", "a cube", "plain")
    assert 'width="256" height="192"' in row_html(row, wanted)


@pytest.mark.parametrize("name", fitting(CausalJob))
def test_every_accelerator_can_be_compared(name: str) -> None:
    rows = list(compare(pipeline("t2i"), "a cube", [make_accelerator(name)], count=1, allowed=freely, **CALL))
    assert len(rows) == (1 if name == "plain" else 2)
    shown = row_html(rows[-1], DrawRequest("t2i", "a cube", "plain"))
    assert f'<th scope="row">{name}' in shown
    assert math.isfinite(rows[-1].speedup)


def test_stopping_is_no_error() -> None:
    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        next(compare(pipeline("t2i"), "a cube", [], count=1, allowed=stop, **CALL))
