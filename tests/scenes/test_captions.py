"""Sampled scenes and their captions: determinism, layout, and that whatever is said is true."""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache

import numpy as np
import pytest

from varaccel.errors import InputError
from varaccel.scenes import (
    HELD_OUT_SEED,
    VOCABULARY,
    Caption,
    Rendering,
    Scene,
    SceneObject,
    caption,
    describe,
    render,
    sample_scene,
)
from varaccel.scenes import grammar as rules
from varaccel.scenes.sampler import MIN_VISIBLE, holds
from varaccel.scenes.world import COLORS, FLOORS, MATERIALS, RELATIONS, SHAPES, SIZES, TIMES

SEEDS = range(600)


@lru_cache(maxsize=1)
def scenes() -> tuple[Scene, ...]:
    return tuple(sample_scene(seed) for seed in SEEDS)


@lru_cache(maxsize=1)
def renderings() -> tuple[Rendering, ...]:
    return tuple(render(scene, 64) for scene in scenes())


def _attention_inputs(words: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {phrase: name for name, phrases in words.items() for phrase in phrases}


def parse(text: str) -> dict[str, object]:
    """Read a caption back by the words alone, knowing nothing of how it was made."""
    parsed: dict[str, object] = {"floor": None, "time": None, "relation": None}
    for key, table in (("time", rules.TIME_PHRASES), ("floor", rules.FLOOR_PHRASES)):
        for phrase, name in _attention_inputs(table).items():
            if text.startswith(phrase + " "):
                text, parsed[key] = text.removeprefix(phrase + " "), name
            elif text.endswith(" " + phrase):
                text, parsed[key] = text.removesuffix(" " + phrase), name
    sides = [text]
    for phrase in sorted(_attention_inputs(rules.RELATION_PHRASES), key=len, reverse=True):
        if f" {phrase} " in text:
            sides = text.split(f" {phrase} ")
            parsed["relation"] = _attention_inputs(rules.RELATION_PHRASES)[phrase]
            break
    colors, shapes = _attention_inputs(rules.COLOR_WORDS), _attention_inputs(rules.SHAPE_WORDS)
    materials, sizes = _attention_inputs(rules.MATERIAL_WORDS), _attention_inputs(rules.SIZE_WORDS)
    parsed["sides"] = []
    for side in sides:
        group = []
        for phrase in side.split(" and "):
            article, *words = phrase.split()
            assert article == ("an" if words[0][0] in "aeiou" else "a"), text
            found: dict[str, str | None] = {"size": None, "material": None}
            for word in words:
                for kind, table in (
                    ("color", colors),
                    ("shape", shapes),
                    ("material", materials),
                    ("size", sizes),
                ):
                    if word in table:
                        assert found.get(kind) is None, text
                        found[kind] = table[word]
                        break
                else:
                    raise AssertionError(f"{word!r} in {text!r} is no attribute")
            assert words[-1] in shapes
            group.append(found)
        parsed["sides"].append(group)  # type: ignore[attr-defined]
    return parsed


def test_a_seed_always_gives_the_same_scene_and_caption() -> None:
    for seed in (0, 17, 59_999, HELD_OUT_SEED, HELD_OUT_SEED + 4):
        assert sample_scene(seed) == sample_scene(seed)
        assert caption(sample_scene(seed), seed) == caption(sample_scene(seed), seed)
    assert len(set(scenes())) == len(SEEDS)


def test_object_counts_follow_the_stated_shares() -> None:
    counts = Counter(len(scene.objects) for scene in scenes())
    for count, share in ((1, 0.40), (2, 0.45), (3, 0.15)):
        # five standard deviations
        assert abs(counts[count] / len(SEEDS) - share) < 5 * (share * (1 - share) / len(SEEDS)) ** 0.5


def test_every_attribute_value_occurs() -> None:
    seen: dict[str, set[str]] = {}
    for scene in scenes():
        seen.setdefault("floor", set()).add(scene.floor)
        seen.setdefault("time", set()).add(scene.time_of_day)
        if scene.relation:
            seen.setdefault("relation", set()).add(scene.relation)
        for solid in scene.objects:
            for name in ("shape", "color", "material", "size"):
                seen.setdefault(name, set()).add(getattr(solid, name))
    assert seen == {
        "floor": set(FLOORS),
        "time": set(TIMES),
        "relation": set(RELATIONS),
        "shape": set(SHAPES),
        "color": set(COLORS),
        "material": set(MATERIALS),
        "size": set(SIZES),
    }


def test_every_object_shows_enough_of_itself() -> None:
    for scene, rendering in zip(scenes(), renderings(), strict=True):
        assert len(rendering.visible_fraction) == len(scene.objects)
        assert min(rendering.visible_fraction) >= MIN_VISIBLE


def test_objects_lie_inside_the_image_and_do_not_touch() -> None:
    for scene, rendering in zip(scenes(), renderings(), strict=True):
        ids = rendering.object_ids
        border = np.concatenate([ids[0], ids[-1], ids[:, 0], ids[:, -1]])
        assert (border == -1).all()
        for index, first in enumerate(scene.objects):
            for second in scene.objects[index + 1 :]:
                gap = np.hypot(first.x - second.x, first.z - second.z)
                assert gap > first.footprint + second.footprint


def test_no_two_objects_share_shape_and_color() -> None:
    for scene in scenes():
        kinds = [(solid.shape, solid.color) for solid in scene.objects]
        assert len(set(kinds)) == len(kinds)


def test_stated_relations_are_true_of_the_pixels() -> None:
    checked: Counter[str] = Counter()
    for seed, scene, rendering in zip(SEEDS, scenes(), renderings(), strict=True):
        for statement in caption(scene, seed).statements:
            subject, reference = rendering.boxes[statement.subject], rendering.boxes[statement.reference]
            if statement.relation == "left of":
                assert subject[2] <= reference[0]
            elif statement.relation == "right of":
                assert subject[0] >= reference[2]
            elif statement.relation == "in front of":
                assert subject[3] > reference[3]
            else:
                assert subject[3] < reference[3]
            checked[statement.relation] += 1
    assert min(checked[relation] for relation in RELATIONS) > 50


def test_one_of_each_pair_of_opposite_relations_holds() -> None:
    left = SceneObject("sphere", "red", "matte", "large", -1.5, 0.0)
    right = SceneObject("cube", "blue", "matte", "large", 1.5, 0.1)
    assert holds("left of", left, right)
    assert holds("right of", right, left)
    for relation, subject, reference in (
        ("right of", left, right),
        ("left of", right, left),
        ("in front of", left, right),
        ("behind", left, right),
    ):
        assert not holds(relation, subject, reference)
    with pytest.raises(InputError, match="unknown relation"):
        holds("above", left, right)


def test_captions_read_back_to_what_they_state_and_all_of_it_is_true() -> None:
    for seed, scene in zip(SEEDS, scenes(), strict=True):
        stated = caption(scene, seed)
        parsed = parse(stated.text)
        assert parsed["floor"] == stated.floor
        assert parsed["time"] == stated.time_of_day
        assert stated.floor in (None, scene.floor)
        assert stated.time_of_day in (None, scene.time_of_day)
        groups: list[list[dict[str, str | None]]] = parsed["sides"]  # type: ignore[assignment]
        nouns = [noun for group in groups for noun in group]
        assert len(nouns) == len(stated.mentions) == len(scene.objects)
        for noun, mention in zip(nouns, stated.mentions, strict=True):
            solid = scene.objects[mention.index]
            assert (noun["shape"], noun["color"]) == (solid.shape, solid.color)
            assert (noun["material"], noun["size"]) == (mention.material, mention.size)
            assert noun["material"] in (None, solid.material)
            assert noun["size"] in (None, solid.size)
        if len(nouns) == 1:
            assert parsed["relation"] is None
            assert stated.statements == ()
            continue
        order = [mention.index for mention in stated.mentions]
        subjects, references = order[: len(groups[0])], order[len(groups[0]) :]
        said = {(a, parsed["relation"], b) for a in subjects for b in references}
        assert said == {(s.subject, s.relation, s.reference) for s in stated.statements}
        for subject, relation, reference in said:
            assert holds(str(relation), scene.objects[subject], scene.objects[reference])


def test_optional_parts_are_sometimes_said_and_sometimes_not() -> None:
    captions = [caption(scene, seed) for seed, scene in zip(SEEDS, scenes(), strict=True)]
    mentions = [mention for stated in captions for mention in stated.mentions]
    for values in (
        [stated.floor for stated in captions],
        [stated.time_of_day for stated in captions],
        [mention.size for mention in mentions],
        [mention.material for mention in mentions],
    ):
        share = sum(value is not None for value in values) / len(values)
        assert 0.3 < share < 0.7
    assert any(len(stated.text.split()) == 3 for stated in captions)


def _longest(table: dict[str, tuple[str, ...]]) -> int:
    return max(len(phrase.split()) for phrases in table.values() for phrase in phrases)


def test_no_caption_exceeds_the_promised_length() -> None:
    noun = 1 + sum(
        _longest(table)
        for table in (rules.SIZE_WORDS, rules.MATERIAL_WORDS, rules.COLOR_WORDS, rules.SHAPE_WORDS)
    )
    bound = (
        3 * noun
        + 1
        + sum(_longest(table) for table in (rules.RELATION_PHRASES, rules.FLOOR_PHRASES, rules.TIME_PHRASES))
    )
    assert bound <= rules.MAX_WORDS
    crowded = next(scene for scene in scenes() if len(scene.objects) == 3)
    lengths = [len(caption(crowded, seed).text.split()) for seed in range(3000)]
    assert 20 < max(lengths) <= bound


def test_captions_use_the_vocabulary_and_all_of_it() -> None:
    used: set[str] = set()
    for repeat in range(5):
        for seed, scene in zip(SEEDS, scenes(), strict=True):
            text = caption(scene, 10_000 * repeat + seed).text
            assert text == text.lower()
            used.update(text.split(" "))
    assert used == set(VOCABULARY)
    assert len(VOCABULARY) == len(set(VOCABULARY))
    assert 50 <= len(VOCABULARY) <= 70


def test_ground_truth_is_plain_json_and_names_everything() -> None:
    scene = next(scene for scene in scenes() if len(scene.objects) == 2)
    stated = caption(scene, 5)
    truth = json.loads(json.dumps(describe(scene, stated)))
    assert [entry["color"] for entry in truth["objects"]] == [solid.color for solid in scene.objects]
    assert truth["relation"] == scene.relation
    assert truth["mentioned_floor"] == stated.floor
    assert truth["statements"] == [[s.subject, s.relation, s.reference] for s in stated.statements]
    assert "mentions" not in describe(scene)


def test_a_generator_may_be_passed_instead_of_a_seed() -> None:
    scene = sample_scene(1)
    first = caption(scene, np.random.default_rng(9))
    assert isinstance(first, Caption)
    assert str(first) == first.text == caption(scene, np.random.default_rng(9)).text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": "pyramid"}, "unknown shape"),
        ({"color": "rde"}, "did you mean 'red'"),
        ({"material": "glass"}, "unknown material"),
        ({"size": "huge"}, "unknown size"),
    ],
)
def test_unknown_attributes_are_refused(change: dict[str, str], message: str) -> None:
    settings = {"shape": "cube", "color": "red", "material": "matte", "size": "large", **change}
    with pytest.raises(InputError, match=message):
        SceneObject(x=0.0, z=0.0, **settings)


def test_impossible_scenes_are_refused() -> None:
    solid = SceneObject("cube", "red", "matte", "large", 0.0, 0.0)
    with pytest.raises(InputError, match="1 to 3 objects"):
        Scene((), None, "gray", "noon")
    with pytest.raises(InputError, match="relation"):
        Scene((solid,), "left of", "gray", "noon")
    with pytest.raises(InputError, match="relation"):
        Scene((solid, solid), None, "gray", "noon")
    with pytest.raises(InputError, match="unknown floor"):
        Scene((solid,), None, "lava", "noon")
    with pytest.raises(InputError, match="seed"):
        sample_scene(-1)
