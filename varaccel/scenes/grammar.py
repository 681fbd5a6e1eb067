"""Captions: a small grammar with synonyms and optional parts whose every statement is true of the scene."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from varaccel.scenes.world import INVERSE_RELATION, Scene, SceneObject

MAX_WORDS = 30

SHAPE_WORDS = {
    "sphere": ("sphere", "ball"),
    "cube": ("cube", "box", "block"),
    "cylinder": ("cylinder",),
    "cone": ("cone",),
}
COLOR_WORDS = {
    "red": ("red",),
    "green": ("green",),
    "blue": ("blue",),
    "yellow": ("yellow",),
    "orange": ("orange",),
    "purple": ("purple",),
    "pink": ("pink",),
    "cyan": ("cyan",),
    "brown": ("brown",),
    "white": ("white",),
    "gray": ("gray", "grey"),
    "black": ("black",),
}
MATERIAL_WORDS = {
    "matte": ("matte",),
    "glossy": ("glossy", "shiny"),
    "metal": ("metal", "metallic"),
}
SIZE_WORDS = {"small": ("small", "tiny"), "large": ("large", "big")}
RELATION_PHRASES = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "in front of": ("in front of",),
    "behind": ("behind",),
}
FLOOR_PHRASES = {
    "white": ("on a white floor",),
    "gray": ("on a gray floor", "on a grey floor"),
    "blue": ("on a blue floor",),
    "green": ("on a green floor",),
    "checker": ("on a checkered floor", "on a checkerboard floor"),
    "wood": ("on a wooden floor", "on a wood floor"),
}
TIME_PHRASES = {
    "noon": ("at noon", "at midday", "in daylight"),
    "sunset": ("at sunset", "at dusk", "in the evening"),
    "night": ("at night", "under the stars", "in moonlight"),
}

_SIZE_SHARE = 0.55
_MATERIAL_SHARE = 0.55
_FLOOR_SHARE = 0.45
_TIME_SHARE = 0.55
_TIME_FIRST_SHARE = 0.12


def _vocabulary() -> tuple[str, ...]:
    words = {"a", "an", "and"}
    for table in (
        SHAPE_WORDS,
        COLOR_WORDS,
        MATERIAL_WORDS,
        SIZE_WORDS,
        RELATION_PHRASES,
        FLOOR_PHRASES,
        TIME_PHRASES,
    ):
        for phrases in table.values():
            for phrase in phrases:
                words.update(phrase.split())
    return tuple(sorted(words))


VOCABULARY: tuple[str, ...] = _vocabulary()
"""Every word a caption may contain, sorted."""


@dataclass(frozen=True)
class Statement:
    """A relation the caption states: object `subject` is `relation` object `reference` (scene indices)."""

    subject: int
    relation: str
    reference: int


@dataclass(frozen=True)
class Mention:
    """How the caption speaks of one object; shape and colour always, None marks what it leaves out."""

    index: int
    shape: str
    color: str
    material: str | None
    size: str | None


@dataclass(frozen=True)
class Caption:
    """A caption and what it states; `mentions` are in the order of the text."""

    text: str
    mentions: tuple[Mention, ...]
    statements: tuple[Statement, ...]
    floor: str | None
    time_of_day: str | None

    def __str__(self) -> str:
        return self.text


def _choice(generator: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(generator.integers(len(options)))]


def _noun_phrase(generator: np.random.Generator, index: int, solid: SceneObject) -> tuple[str, Mention]:
    size = solid.size if generator.random() < _SIZE_SHARE else None
    material = solid.material if generator.random() < _MATERIAL_SHARE else None
    words = [_choice(generator, SIZE_WORDS[size])] if size else []
    color = _choice(generator, COLOR_WORDS[solid.color])
    if material is None:
        words.append(color)
    else:
        word = _choice(generator, MATERIAL_WORDS[material])
        # "red metal cube" is the natural order, "metallic red cube" as well
        words += [color, word] if word == "metal" else [word, color]
    words.append(_choice(generator, SHAPE_WORDS[solid.shape]))
    article = "an" if words[0][0] in "aeiou" else "a"
    return f"{article} {' '.join(words)}", Mention(index, solid.shape, solid.color, material, size)


def caption(scene: Scene, seed: int | np.random.Generator) -> Caption:
    """A caption of `scene`; the same integer `seed` always gives the same words.

    Shape and colour of every object and the relation of several objects are always stated; size, material,
    floor and time of day only sometimes. Three objects read "A left of B and C" or "B and C right of A": the
    relation holds between A and both others. Lower case, no punctuation, at most `MAX_WORDS` words of
    `VOCABULARY`.
    """
    generator = seed if isinstance(seed, np.random.Generator) else np.random.default_rng((seed, 1))
    phrases, mentions = [], []
    for index, solid in enumerate(scene.objects):
        phrase, mention = _noun_phrase(generator, index, solid)
        phrases.append(phrase)
        mentions.append(mention)
    statements: tuple[Statement, ...] = ()
    text = phrases[0]
    if scene.relation is not None:
        others = " and ".join(phrases[1:])
        rest = range(1, len(phrases))
        if generator.random() < 0.5:
            relation = scene.relation
            text = f"{phrases[0]} {_choice(generator, RELATION_PHRASES[relation])} {others}"
            statements = tuple(Statement(0, relation, other) for other in rest)
        else:
            relation = INVERSE_RELATION[scene.relation]
            text = f"{others} {_choice(generator, RELATION_PHRASES[relation])} {phrases[0]}"
            statements = tuple(Statement(other, relation, 0) for other in rest)
            mentions = [*mentions[1:], mentions[0]]
    floor = scene.floor if generator.random() < _FLOOR_SHARE else None
    time_of_day = scene.time_of_day if generator.random() < _TIME_SHARE else None
    if floor is not None:
        text = f"{text} {_choice(generator, FLOOR_PHRASES[floor])}"
    if time_of_day is not None:
        phrase = _choice(generator, TIME_PHRASES[time_of_day])
        text = f"{phrase} {text}" if generator.random() < _TIME_FIRST_SHARE else f"{text} {phrase}"
    return Caption(text, tuple(mentions), statements, floor, time_of_day)


def describe(scene: Scene, stated: Caption | None = None) -> dict[str, Any]:
    """Ground truth of `scene` as plain JSON values, with what the caption `stated` of it if one is given.

    Keys: `objects` (index, shape, color, material, size, x, z, rotation), `relation`, `floor`, `time_of_day`;
    with a caption also `mentions`, `statements` ([subject, relation, reference]) and `mentioned_floor`,
    `mentioned_time_of_day`.
    """
    truth: dict[str, Any] = {
        "objects": [
            {
                "index": index,
                "shape": solid.shape,
                "color": solid.color,
                "material": solid.material,
                "size": solid.size,
                "x": round(solid.x, 4),
                "z": round(solid.z, 4),
                "rotation": round(solid.rotation, 4),
            }
            for index, solid in enumerate(scene.objects)
        ],
        "relation": scene.relation,
        "floor": scene.floor,
        "time_of_day": scene.time_of_day,
    }
    if stated is not None:
        truth["mentions"] = [
            {
                "index": mention.index,
                "shape": mention.shape,
                "color": mention.color,
                "material": mention.material,
                "size": mention.size,
            }
            for mention in stated.mentions
        ]
        truth["statements"] = [
            [statement.subject, statement.relation, statement.reference] for statement in stated.statements
        ]
        truth["mentioned_floor"] = stated.floor
        truth["mentioned_time_of_day"] = stated.time_of_day
    return truth
