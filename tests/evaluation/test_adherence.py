"""Adherence: the verdict on an image follows from what was detected and what the caption states."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests import tiny
from tests.scripts import load_script
from varaccel.errors import InputError
from varaccel.evaluation.metrics.adherence import (
    held_out_captions,
    held_out_prompts,
    judge,
    relation_holds,
    score_adherence,
    summarise,
    wilson_interval,
)
from varaccel.models.detector import Detection, Observation
from varaccel.scenes import HELD_OUT_SEED, Caption, Statement, caption, sample_scene
from varaccel.scenes.grammar import Mention
from varaccel.scenes.sampler import holds
from varaccel.scenes.world import COLORS, SHAPES
from varaccel.training.detector import new_detector


def _object(color: str, shape: str, column: float = 0.5, depth: float = 0.0, **other: object) -> Detection:
    values = {"material": "matte", "size": "large", "score": 0.9, **other}
    return Detection(shape, color, box=(column - 0.1, 0.4, column + 0.1, 0.6), depth=depth, **values)


def _seen(*objects: Detection, floor: str = "wood", time_of_day: str = "noon") -> Observation:
    return Observation(objects, floor, time_of_day)


def _caption(*kinds: tuple[str, str], relation: str | None = None, **other: str) -> Caption:
    mentions = tuple(Mention(index, shape, color, None, None) for index, (color, shape) in enumerate(kinds))
    statements = tuple(Statement(0, relation, index) for index in range(1, len(kinds)) if relation)
    return Caption("as drawn", mentions, statements, other.get("floor"), other.get("time_of_day"))


RED_CUBE, BLUE_BALL, GREEN_CONE = ("red", "cube"), ("blue", "sphere"), ("green", "cone")


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        # Wilson score intervals as published in Newcombe 1998, Statistics in Medicine 17, table I
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_known_values(successes: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-5)


@settings(deadline=None)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_contains_the_share_and_mirrors(counts: tuple[int, int]) -> None:
    successes, total = counts
    low, high = wilson_interval(successes, total)
    assert 0 <= low <= successes / total + 1e-12
    assert successes / total - 1e-12 <= high <= 1
    assert wilson_interval(total - successes, total) == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_wilson_interval_of_nothing_and_of_nonsense() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(InputError):
        wilson_interval(3, 2)


def test_one_object_needs_its_colour_and_shape() -> None:
    asked = _caption(RED_CUBE)
    assert judge(_seen(_object("red", "cube")), asked).correct
    for color, shape in (("red", "sphere"), ("orange", "cube")):
        assert not judge(_seen(_object(color, shape)), asked).correct
    assert not judge(_seen(), asked).correct


def test_an_extra_object_spoils_only_alone_and_count() -> None:
    rates = summarise(
        [judge(_seen(_object("red", "cube"), _object("blue", "cone")), _caption(RED_CUBE))]
    ).rates
    assert rates["one_object"].successes == 1
    assert rates["correct"].successes == 1
    assert rates["one_object_alone"].successes == 0
    assert rates["count"].successes == 0


def test_swapped_colours_are_two_misses() -> None:
    asked = _caption(RED_CUBE, BLUE_BALL, relation="left of")
    right = _seen(_object("red", "cube", 0.2), _object("blue", "sphere", 0.8))
    swapped = _seen(_object("blue", "cube", 0.2), _object("red", "sphere", 0.8))
    assert judge(right, asked).correct
    verdict = judge(swapped, asked)
    assert verdict.found == (False, False)
    assert verdict.related == (None,)


def test_wrong_relation_keeps_the_pair() -> None:
    asked = _caption(RED_CUBE, BLUE_BALL, relation="left of")
    verdict = judge(_seen(_object("red", "cube", 0.8), _object("blue", "sphere", 0.2)), asked)
    assert verdict.complete
    assert verdict.related == (False,)
    rates = summarise([verdict]).rates
    assert (rates["two_objects"].successes, rates["two_objects_related"].successes) == (1, 0)
    assert (rates["relation"].successes, rates["relation"].total) == (0, 1)


def test_one_missing_object_is_half_a_pair() -> None:
    verdict = judge(_seen(_object("red", "cube", 0.2)), _caption(RED_CUBE, BLUE_BALL, relation="left of"))
    assert verdict.found == (True, False)
    assert "relation" not in summarise([verdict]).rates


def test_one_detection_serves_one_mention() -> None:
    twice = _caption(RED_CUBE, RED_CUBE)
    assert sum(judge(_seen(_object("red", "cube")), twice).found) == 1
    assert judge(_seen(_object("red", "cube", 0.2), _object("red", "cube", 0.8)), twice).complete


def test_duplicates_are_matched_so_that_the_relation_holds() -> None:
    asked = _caption(RED_CUBE, BLUE_BALL, relation="left of")
    seen = _seen(
        _object("red", "cube", 0.9, score=0.99),
        _object("blue", "sphere", 0.5),
        _object("red", "cube", 0.1, score=0.5),
    )
    assert judge(seen, asked).correct


@pytest.mark.parametrize(
    ("columns", "held"), [((0.1, 0.5, 0.9), (True, True)), ((0.5, 0.1, 0.9), (False, True))]
)
def test_three_objects_need_both_relations(columns: tuple[float, ...], held: tuple[bool, ...]) -> None:
    asked = _caption(RED_CUBE, BLUE_BALL, GREEN_CONE, relation="left of")
    seen = _seen(
        *(_object(*kind, x) for kind, x in zip((RED_CUBE, BLUE_BALL, GREEN_CONE), columns, strict=True))
    )
    verdict = judge(seen, asked)
    assert verdict.related == held
    rates = summarise([verdict]).rates
    assert rates["three_objects"].successes == 1
    assert rates["three_objects_related"].successes == int(all(held))


def test_statements_point_at_scene_indices_not_at_text_order() -> None:
    # "a blue ball right of a red cube": object 1 is mentioned first
    mentions = (Mention(1, "sphere", "blue", None, None), Mention(0, "cube", "red", None, None))
    asked = Caption("a blue ball right of a red cube", mentions, (Statement(1, "right of", 0),), None, None)
    assert judge(_seen(_object("red", "cube", 0.2), _object("blue", "sphere", 0.8)), asked).correct
    assert not judge(_seen(_object("red", "cube", 0.8), _object("blue", "sphere", 0.2)), asked).correct


@pytest.mark.parametrize(
    ("relation", "subject", "reference"),
    [
        ("left of", {"column": 0.2}, {"column": 0.8}),
        ("right of", {"column": 0.8}, {"column": 0.2}),
        ("in front of", {"depth": -1.0}, {"depth": 2.0}),
        ("behind", {"depth": 2.0}, {"depth": -1.0}),
    ],
)
def test_relations_are_directed(
    relation: str, subject: dict[str, float], reference: dict[str, float]
) -> None:
    one, other = _object("red", "cube", **subject), _object("blue", "cone", **reference)
    assert relation_holds(relation, one, other)
    assert not relation_holds(relation, other, one)
    assert not relation_holds(relation, one, one)


def test_unknown_relation_is_refused() -> None:
    with pytest.raises(InputError, match="left of"):
        relation_holds("left off", _object("red", "cube"), _object("blue", "cone"))


def test_material_and_size_count_only_when_stated() -> None:
    stated = Mention(0, "cube", "red", "metal", "small")
    asked = Caption("a small red metal cube", (stated,), (), None, None)
    verdict = judge(_seen(_object("red", "cube", material="metal", size="large")), asked)
    assert (verdict.materials, verdict.sizes, verdict.correct) == ((True,), (False,), True)
    missing = judge(_seen(_object("blue", "cube", material="metal", size="small")), asked)
    assert (missing.materials, missing.sizes) == ((False,), (False,))
    silent = judge(_seen(_object("red", "cube")), _caption(RED_CUBE))
    assert (silent.materials, silent.sizes) == ((None,), (None,))
    assert "material" not in summarise([silent]).rates


def test_of_equal_matches_the_one_with_the_stated_material_counts() -> None:
    asked = Caption("a red metal cube", (Mention(0, "cube", "red", "metal", None),), (), None, None)
    seen = _seen(_object("red", "cube", score=0.9), _object("red", "cube", material="metal", score=0.6))
    assert judge(seen, asked).materials == (True,)


def test_floor_and_time_of_day() -> None:
    asked = _caption(RED_CUBE, floor="wood", time_of_day="night")
    verdict = judge(_seen(_object("red", "cube")), asked)
    assert (verdict.floor, verdict.time_of_day) == (True, False)
    assert judge(_seen(_object("red", "cube")), _caption(RED_CUBE)).floor is None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3000))
def test_a_perfect_detector_finds_every_true_caption_correct(seed: int) -> None:
    """The thresholds of relations are met by every scene whose caption states them."""
    scene = sample_scene(seed)
    objects = []
    for solid in scene.objects:
        # a weak perspective of the world's camera is enough to order columns
        column = 0.5 + solid.x * 0.13 / (1 + 0.12 * solid.z)
        objects.append(
            _object(solid.color, solid.shape, column, solid.z, material=solid.material, size=solid.size)
        )
    stated = caption(scene, seed)
    verdict = judge(_seen(*objects, floor=scene.floor, time_of_day=scene.time_of_day), stated)
    assert verdict.correct
    assert verdict.alone
    for statement in stated.statements:
        assert holds(statement.relation, scene.objects[statement.subject], scene.objects[statement.reference])
    recolored = [replace(one, color=COLORS[COLORS.index(one.color) - 1]) for one in objects]
    reshaped = [replace(one, shape=SHAPES[SHAPES.index(one.shape) - 1]) for one in objects]
    if len(objects) == 1:
        assert not judge(_seen(*recolored), stated).correct
        assert not judge(_seen(*reshaped), stated).correct


def test_rates_add_up_and_survive_json() -> None:
    good = judge(_seen(_object("red", "cube")), _caption(RED_CUBE, floor="wood"))
    bad = judge(_seen(), _caption(RED_CUBE, floor="blue"))
    pair = judge(_seen(_object("red", "cube")), _caption(RED_CUBE, BLUE_BALL, relation="behind"))
    adherence = summarise([good, bad, pair])
    assert (adherence.rates["correct"].successes, adherence.rates["correct"].total) == (1, 3)
    assert (adherence.rates["one_object"].successes, adherence.rates["one_object"].total) == (1, 2)
    assert (adherence.rates["two_objects"].successes, adherence.rates["two_objects"].total) == (0, 1)
    assert adherence.rates["floor"].share == 0.5
    plain = json.loads(json.dumps(adherence.to_json(verdicts=True)))
    assert plain["images"] == 3
    assert plain["rates"]["one_object"]["low"] == pytest.approx(wilson_interval(1, 2)[0])
    assert [verdict["correct"] for verdict in plain["verdicts"]] == [True, False, False]
    table = adherence.table()
    assert len(table.splitlines()) == len(adherence.rates)
    assert "1/3" in table.splitlines()[0]


def test_numbers_of_images_and_captions_must_agree() -> None:
    detector = new_detector(image_size=32, widths=(8, 8, 8), depths=(1, 1, 1)).eval()
    with pytest.raises(InputError, match="2 images"):
        score_adherence(detector, torch.zeros(2, 3, 32, 32), [_caption(RED_CUBE)])


def test_held_out_captions_are_a_fixed_mix_of_unseen_seeds() -> None:
    prompts = held_out_prompts(10)
    assert all(seed >= HELD_OUT_SEED for seed in prompts)
    assert len(prompts) == 10
    assert [len(text.mentions) for text in prompts.values()] == [1, 2, 1, 2, 3] * 2
    assert held_out_captions(6) == list(prompts.values())[:6]
    assert all(text == caption(sample_scene(seed), seed) for seed, text in prompts.items())


def test_excluded_captions_are_passed_over() -> None:
    plain = [text.text for text in held_out_captions(5)]
    chosen = [text.text for text in held_out_captions(5, exclude={plain[0], plain[3]})]
    assert plain[0] not in chosen
    assert plain[3] not in chosen
    with pytest.raises(InputError):
        held_out_captions(0)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("eval/adherence.py")


class _Painter:
    """Stands in for a pipeline: every prompt becomes a flat image of its own grey; keeps what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], int, object]] = []
        self.painted = 0

    def __call__(
        self, prompts: Sequence[str], *, guidance_scale: float | None, seed: int, accelerator: object
    ) -> SimpleNamespace:
        self.calls.append((list(prompts), seed, accelerator))
        images = [Image.new("RGB", (64, 64), (self.painted + i,) * 3) for i in range(len(prompts))]
        self.painted += len(prompts)
        return SimpleNamespace(images=images)


@pytest.fixture
def tiny_detector(tmp_path: Path) -> Path:
    folder = tmp_path / "detector"
    new_detector(image_size=32, widths=(8, 8, 8), depths=(1, 1, 1)).save_pretrained(folder)
    return folder


def test_script_judges_what_a_pipeline_paints(
    script: ModuleType,
    tiny_detector: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    painter = _Painter()
    monkeypatch.setattr(script, "_load_pipeline", lambda name, device: painter)
    report, sheet = tmp_path / "report.json", tmp_path / "sheet.png"
    arguments = ["--model", "painter", "--count", "5", "--batch-size", "2", "--seed", "100"]
    arguments += ["--detector", str(tiny_detector), "--out", str(report), "--grid", str(sheet)]
    assert script.main([*arguments, "--accelerator", "zipar", "-o", "window=3"]) == 0
    captions = [text.text for text in held_out_captions(5)]
    assert [call[0] for call in painter.calls] == [captions[:2], captions[2:4], captions[4:]]
    assert [call[1] for call in painter.calls] == [100, 102, 104]
    assert all(call[2].window == 3 for call in painter.calls)  # type: ignore[attr-defined]
    written = json.loads(report.read_text())
    assert written["images"] == 5
    assert [verdict["caption"] for verdict in written["verdicts"]] == captions
    assert written["settings"]["accelerator"] == "zipar"
    assert written["rates"]["correct"] == pytest.approx(
        {"successes": 0, "total": 5, "share": 0.0, "low": 0.0, "high": wilson_interval(0, 5)[1]}
    )
    assert "0/5" in capsys.readouterr().out
    pixels = np.asarray(Image.open(sheet).convert("RGB"))
    assert pixels.shape[1] == 5 * 164
    assert [int(pixels[80, 164 * i + 80, 0]) for i in range(5)] == [0, 1, 2, 3, 4]


def test_script_scores_true_images(script: ModuleType, tiny_detector: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = ["--renderer", "--count", "3", "--detector", str(tiny_detector), "--out", str(report)]
    assert script.main(arguments) == 0
    assert json.loads(report.read_text())["images"] == 3


def test_script_reconstructs_before_judging(script: ModuleType) -> None:
    images = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (0, 100, 200)]
    tokenizer = tiny.vq_model()
    result = script.reconstruct(images, tokenizer, batch_size=2)
    assert [image.size for image in result] == [(16, 16)] * 3
    (again,) = script.reconstruct(images[2:], tokenizer, batch_size=2)
    np.testing.assert_allclose(np.asarray(again).astype(int), np.asarray(result[2]).astype(int), atol=1)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--batch-size", "0"],
        ["-o", "window=3"],
        ["--accelerator", "zippar"],
        ["--count", "0"],
        ["--detector", "nowhere"],
    ],
)
def test_script_explains_mistakes(
    script: ModuleType, tiny_detector: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--renderer", "--detector", str(tiny_detector), *wrong]) == 2
    assert capsys.readouterr().err.startswith("error: ")
