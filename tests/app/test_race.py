"""The race: the pipeline's own images, honest clocks, what is shown on the way, and every way to end early."""

from __future__ import annotations

import base64
import io
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.scripts import ROOT
from tests.tiny import GRID, new_pipeline, pipeline
from varaccel import CoDe, FewerSteps, Jacobi, Plain, ZipAR
from varaccel.accelerators import Accelerator
from varaccel.app import race as racing
from varaccel.app.cost import quality_cost
from varaccel.app.markup import quality_badge
from varaccel.app.race import Race, Side
from varaccel.app.race_view import pass_layer, race_html, veil
from varaccel.app.snippet import DrawRequest
from varaccel.app.turns import Stopped, Turns
from varaccel.errors import InputError

CALL: dict[str, Any] = {"prompt": "a red sphere", "seed": 3, "num_images_per_prompt": 2}


@pytest.fixture(autouse=True)
def every_pass_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(racing, "PREVIEW_SECONDS", 0.0)
    monkeypatch.setattr(racing, "PREVIEW_SHARE", 0)
    monkeypatch.setattr(racing, "FRAME_SECONDS", 0.001)


def race(
    pipe: Any,
    fast: Accelerator,
    call: dict[str, Any] | None = None,
    limit: float = 60.0,
    turns: Turns | None = None,
) -> Race:
    return Race(pipe, call or CALL, [Plain(), fast], turns or Turns(), seconds_limit=limit)


@pytest.mark.parametrize(
    ("host", "prompt", "fast"),
    [
        ("t2i", "a red sphere", ZipAR(2)),
        ("c2i", "goldfish", Jacobi(4)),
        ("var-class", 1, CoDe(draft_scales=2)),
        ("mar-class", 2, FewerSteps(iterations=2)),
    ],
    ids=["zipar", "jacobi", "code", "fewer_steps"],
)
def test_both_sides_draw_what_the_pipeline_draws(host: str, prompt: str | int, fast: Accelerator) -> None:
    call = {**CALL, "prompt": prompt}
    run = race(pipeline(host), fast, call)
    frames = list(run.frames())
    assert [side.phase for side in frames[0]] == ["warming up"] * 2
    for side, accelerator in zip(frames[-1], (Plain(), fast), strict=True):
        expected = pipeline(host)(accelerator=accelerator, **call)
        assert [p.tobytes() for p in side.images] == [p.tobytes() for p in expected.images]
        assert side.stats is not None
        assert (side.phase, side.passes, side.label) == (
            "finished",
            expected.stats.passes,
            expected.stats.label,
        )
        assert side.tokens == side.of == expected.stats.tokens
        if expected.written.ndim == 3:
            assert np.array_equal(side.written, expected.written.numpy())
        else:
            assert side.written is None, "scales have no map"


def test_images_grow_before_the_end() -> None:
    seen: dict[str, list[Side]] = {}
    for sides in race(pipeline("t2i"), ZipAR(1)).frames():
        for side in sides:
            seen.setdefault(side.label, []).append(side)
    for sides in seen.values():
        assert [s.tokens for s in sides] == sorted(s.tokens for s in sides)
        partial = [s for s in sides if s.phase == "drawing"]
        assert partial
        assert len(partial[0].images) == 2
        some = partial[0].written
        assert some is not None
        assert some.shape == (2, GRID, GRID)
        assert (some > 0).sum() == 2 * partial[0].tokens


def test_seconds_leave_out_previews_and_the_other_side(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    pipe = new_pipeline("t2i")
    real = pipe.vq_model.decode_tokens

    def slow(token_ids: Any) -> Any:
        time.sleep(0.05)
        return real(token_ids)

    monkeypatch.setattr(pipe.vq_model, "decode_tokens", slow)
    *_, sides = race(pipe, ZipAR(1), turns=Turns(quantum=0.0)).frames()
    for side in sides:
        assert side.stats is not None
        assert side.seconds == side.stats.seconds["tokens"] < 0.05 * side.passes, (
            "a preview per pass is not counted"
        )
        assert side.stats.seconds["decode"] >= 0.05


def test_what_stops_a_race_leaves_what_there_is() -> None:
    before = threading.active_count()  # other tests of the process leave some
    run = race(pipeline("t2i"), ZipAR(2), turns=Turns(quantum=0.0))
    last: Sequence[Side] = []
    for number, sides in enumerate(run.frames()):
        if any(side.phase == "drawing" for side in sides):
            run.stop()
        last = sides
        assert number < 100
    assert {side.phase for side in last} <= {"stopped", "finished"}
    assert any(side.images for side in last)
    assert threading.active_count() < before + 5


def test_a_race_that_takes_too_long_says_so() -> None:
    run = race(pipeline("t2i"), ZipAR(2), limit=0.0)
    with pytest.raises(Stopped, match="time limit"):
        list(run.frames())
    assert [side.phase for side in run.sides] == ["stopped"] * 2


def test_a_visitor_who_leaves_ends_the_race() -> None:
    run = race(pipeline("t2i"), ZipAR(2))
    frames = run.frames()
    next(frames)
    next(frames)
    frames.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("race")]


@pytest.mark.parametrize("when", ["at once", "on the way"])
def test_errors_come_out_and_end_both_sides(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = new_pipeline("t2i")
    if when == "at once":
        with pytest.raises(InputError, match="no text"):
            list(race(pipe, ZipAR(2), {**CALL, "prompt": " "}).frames())
    else:

        def fail(*_: Any) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(pipe.vq_model, "decode_tokens", fail)
        with pytest.raises(ZeroDivisionError):
            list(race(pipe, ZipAR(2)).frames())
    assert not [t for t in threading.enumerate() if t.name.startswith("race")]


def test_two_races_at_once_do_not_mix() -> None:
    turns, ended = Turns(quantum=0.0), {}

    def run(seed: int) -> None:
        *_, ended[seed] = race(pipeline("t2i"), ZipAR(2), {**CALL, "seed": seed}, turns=turns).frames()

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for seed, sides in ended.items():
        expected = pipeline("t2i")(**{**CALL, "seed": seed}, accelerator=ZipAR(2)).images
        assert [p.tobytes() for p in sides[1].images] == [p.tobytes() for p in expected]
    assert len(ended) == 2


# -- as HTML -------------------------------------------------------------------------------------------


def side(**changes: Any) -> Side:
    values: dict[str, Any] = {
        "label": "plain()",
        "lossless": True,
        "phase": "finished",
        "passes": 16,
        "tokens": 16.0,
        "of": 16,
        "seconds": 2.0,
        "images": (Image.new("RGB", (8, 8), "red"),),
        "written": np.arange(1, 17, dtype=np.int32).reshape(1, 4, 4),
    }
    return Side(**{**values, **changes})


def test_the_end_of_a_race_says_what_was_gained_and_what_it_cost() -> None:
    fast = side(label="zipar(window=1)", lossless=False, passes=7, seconds=0.5)
    page = race_html([side(), fast], "a red sphere", "Approximate: it costs.")
    assert "<strong>4.00x</strong> the speed of plain decoding: 0.50 s instead of 2.00 s" in page
    assert "7 passes instead of 16" in page
    assert "Approximate: it costs." in page
    assert page.count('class="side ahead"') == 1
    assert page.count(quality_badge(True)) == page.count(quality_badge(False)) == 1


def test_a_race_under_way_says_how_far_both_are() -> None:
    fast = side(label="zipar(window=1)", phase="drawing", tokens=12.0, seconds=1.9)
    page = race_html([side(phase="drawing", tokens=4.0), fast], "a red sphere", "costs")
    assert (
        "Plain decoding has 25 % of its tokens after 2.00 s of computing, zipar(window=1) 75 % after 1.90 s."
        in page
    )
    assert "costs" not in page


def test_typed_words_are_text() -> None:
    page = race_html([side(), side(label='<b>"x"')], '"><img src=x onerror=alert(1)>')
    assert "<img src=x" not in page
    assert "<b>" not in page
    assert re.findall(r"onerror", page) == ["onerror"] * 2, "in the two alternative texts"


def test_images_in_the_page_are_the_images() -> None:
    page = race_html([side(), side()], "a")
    data = re.findall(r'class="image"[^>]*src="data:image/png;base64,([^"]+)"', page)
    with Image.open(io.BytesIO(base64.b64decode(data[0]))) as shown:
        assert shown.tobytes() == Image.new("RGB", (8, 8), "red").tobytes()


def test_layers_over_a_image() -> None:
    written = np.array([[1, 2], [0, 3]], np.int32)
    hidden = np.asarray(veil(written))
    assert (hidden[..., 3] > 0).tolist() == [[False, False], [True, False]]
    colours = np.asarray(pass_layer(written, 3))
    assert (colours[..., 3] > 0).tolist() == [[True, True], [False, True]]
    brightness = colours[..., :3].astype(int).sum(-1)
    assert brightness[0, 0] < brightness[0, 1] < brightness[1, 1]


# -- what it costs -------------------------------------------------------------------------------------


RELEASE = ROOT / "docs" / "report"


@pytest.mark.parametrize(
    ("model", "accelerator", "options", "said"),
    [
        ("mini-llamagen", "jacobi", {"window": 16}, "Lossless: "),
        ("mini-llamagen", "zipar", {"window": 4}, "adherence 25 % (16 to 37) where plain decoding has 34 %"),
        (
            "mini-llamagen",
            "zipar",
            {"window": 4},
            "distance to true images 13.3 where plain decoding has 3.5.",
        ),
        ("mini-llamagen", "zipar", {"window": 5}, "has no measurement"),
        ("mini-var", "code", {"draft_scales": 4, "refiner": "mini-var-small"}, "240 prompts"),
        ("absent", "zipar", {"window": 4}, "has no measurement"),
    ],
)
def test_cost_as_the_report_has_it(model: str, accelerator: str, options: dict[str, Any], said: str) -> None:
    drawn = DrawRequest(model, "a red sphere", accelerator, options)
    assert said in quality_cost([RELEASE], drawn)


def test_a_damaged_report_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "mini-llamagen.json").write_text("{")
    drawn = DrawRequest("mini-llamagen", "a", "zipar", {"window": 4})
    assert "no measurement" in quality_cost([tmp_path], drawn)
    assert "13.3" in quality_cost([tmp_path, RELEASE], drawn), "the next one is asked"
