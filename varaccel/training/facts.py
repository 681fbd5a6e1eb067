"""What a caption states, as classification targets, and captions in looser words than the grammar's.

The text encoder is taught to answer questions about a caption (`varaccel.training.text`). The answers come
with the grammar; the looser forms (words left out, unknown words, parts moved) keep the encoder useful for
prompts that people type, with the answers adjusted to what such a form still says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from varaccel.scenes import Caption, Scene, SceneObject, caption
from varaccel.scenes.grammar import (
    COLOR_WORDS,
    FLOOR_PHRASES,
    MATERIAL_WORDS,
    RELATION_PHRASES,
    SHAPE_WORDS,
    SIZE_WORDS,
    TIME_PHRASES,
)
from varaccel.scenes.world import COLORS, FLOORS, MATERIALS, MAX_OBJECTS, RELATIONS, SHAPES, SIZES, TIMES

_ABSENT, _UNSTATED = "absent", "unstated"
_ATTRIBUTES = {"shape": SHAPES, "color": COLORS, "material": MATERIALS, "size": SIZES}
_SPELLINGS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "shape": SHAPE_WORDS,
    "color": COLOR_WORDS,
    "material": MATERIAL_WORDS,
    "size": SIZE_WORDS,
}
_ATTRIBUTE_OF_WORD = {
    word: name for name, table in _SPELLINGS.items() for words in table.values() for word in words
}
_PLACES = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "in front of": ("front", "back"),
    "behind": ("back", "front"),
}
_PLACE_NAMES = ("left", "right", "front", "back")
# one side of the relation is a single object, so the other has at most this many
_PLACE_SLOTS = tuple(f"{place} {i}" for place in _PLACE_NAMES for i in range(MAX_OBJECTS - 1))
_MENTION_SLOTS = tuple(f"mention {i}" for i in range(MAX_OBJECTS))

CAPTION_FACTS: dict[str, tuple[str, ...]] = {
    "objects": tuple(str(n) for n in range(1, MAX_OBJECTS + 1)),
    "relation": (_UNSTATED, *RELATIONS),
    "floor": (_UNSTATED, *FLOORS),
    "time of day": (_UNSTATED, *TIMES),
    **{
        f"{slot} {name}": (_ABSENT, _UNSTATED, *values)
        for slot in (*_MENTION_SLOTS, *_PLACE_SLOTS)
        for name, values in _ATTRIBUTES.items()
    },
}
"""Questions to a whole caption with their possible answers. Every object is asked for twice: in the order of
mention, and at the place that the relation gives it."""

WORD_FACTS: dict[str, tuple[str, ...]] = {
    **{name: (_UNSTATED, *values) for name, values in _ATTRIBUTES.items()},
    "place": (_UNSTATED, *_PLACE_NAMES),
    "order": tuple(str(n) for n in range(MAX_OBJECTS)),
}
"""Questions to each word of a noun phrase, about the object that it speaks of."""

NO_ANSWER = -100
"""Target of words that speak of no object; the index that `torch.nn.functional.cross_entropy` ignores."""


@dataclass(frozen=True)
class Word:
    """A word of a caption.

    Args:
        text: the word; None stands for one outside the vocabulary.
        states: what the word alone states (an attribute, "relation", "floor" or "time of day"), if anything.
        mention: index of the object that it speaks of in the order of mention, -1 for none.
    """

    text: str | None
    states: str | None = None
    mention: int = -1


@dataclass(frozen=True)
class StatedCaption:
    """A caption as words, with what they state.

    Args:
        words: the caption.
        mentions: per object, in the order of the text, the stated attributes by name.
        relation: the first `subjects` mentions stand in this relation to the others; None if unstated.
        subjects: number of mentions before the relation.
        floor: the stated floor.
        time_of_day: the stated time.
    """

    words: tuple[Word, ...]
    mentions: tuple[dict[str, str], ...]
    relation: str | None
    subjects: int
    floor: str | None
    time_of_day: str | None

    @property
    def places(self) -> list[str | None]:
        """Where the relation puts each mentioned object: left, right, front, back or, without one, None."""
        own, other = _PLACES[self.relation] if self.relation else (None, None)
        return [own if i < self.subjects else other for i in range(len(self.mentions))]

    def caption_targets(self) -> list[int]:
        """Class indices in the order of `CAPTION_FACTS`."""
        answers = dict.fromkeys(CAPTION_FACTS, _ABSENT) | {
            "objects": str(len(self.mentions)),
            "relation": self.relation or _UNSTATED,
            "floor": self.floor or _UNSTATED,
            "time of day": self.time_of_day or _UNSTATED,
        }
        filled = dict.fromkeys(_PLACE_NAMES, 0)
        for i, (mention, place) in enumerate(zip(self.mentions, self.places, strict=True)):
            slots = [_MENTION_SLOTS[i]]
            if place is not None:
                slots.append(f"{place} {filled[place]}")
                filled[place] += 1
            for slot in slots:
                answers |= {f"{slot} {name}": mention.get(name, _UNSTATED) for name in _ATTRIBUTES}
        return [classes.index(answers[fact]) for fact, classes in CAPTION_FACTS.items()]

    def word_targets(self) -> list[list[int]]:
        """Class indices per word, each in the order of `WORD_FACTS`; `NO_ANSWER` where there is no object."""
        rows = []
        for i, (mention, place) in enumerate(zip(self.mentions, self.places, strict=True)):
            answers = {name: mention.get(name, _UNSTATED) for name in _ATTRIBUTES}
            answers |= {"place": place or _UNSTATED, "order": str(i)}
            rows.append([classes.index(answers[fact]) for fact, classes in WORD_FACTS.items()])
        silent = [NO_ANSWER] * len(WORD_FACTS)
        return [rows[word.mention] if word.mention >= 0 else silent for word in self.words]


@dataclass(frozen=True)
class CaptionParts:
    """A caption taken apart: noun phrases around a relation, then the floor and the time of day."""

    noun_phrases: tuple[tuple[Word, ...], ...]
    relation: tuple[Word, ...]
    subjects: int
    floor: tuple[Word, ...]
    time: tuple[Word, ...]
    truth: Caption
    joint: tuple[Word, ...] = (Word("and"),)
    time_first: bool = False
    floor_first: bool = False

    def assemble(self) -> StatedCaption:
        """Put the parts together; what no word states any more is unstated."""
        body: list[Word] = []
        for i, phrase in enumerate(self.noun_phrases):
            between = self.relation if i == self.subjects else self.joint
            body += [*(between if i else ()), *phrase]
        before = [*(self.time if self.time_first else ()), *(self.floor if self.floor_first else ())]
        after = [*(() if self.floor_first else self.floor), *(() if self.time_first else self.time)]
        words = (*before, *body, *after)

        said = {(word.mention, word.states) for word in words if word.states and word.text}
        mentions = tuple(
            {name: getattr(mention, name) for name in _ATTRIBUTES if (i, name) in said}
            for i, mention in enumerate(self.truth.mentions)
        )
        statements = self.truth.statements
        return StatedCaption(
            words,
            mentions,
            statements[0].relation if statements and (-1, "relation") in said else None,
            self.subjects,
            self.truth.floor if (-1, "floor") in said else None,
            self.truth.time_of_day if (-1, "time of day") in said else None,
        )


def _cut(text: str, phrases: Sequence[str]) -> tuple[str, str, str]:
    """Split `text` at the longest of `phrases` that it holds as whole words."""
    for phrase in sorted(phrases, key=len, reverse=True):
        before, found, after = f" {text} ".partition(f" {phrase} ")
        if found:
            return before.strip(), phrase, after.strip()
    raise ValueError(f"{text!r} holds none of {phrases}.")


def _phrase(text: str, states: str, key_word: int) -> tuple[Word, ...]:
    words = text.split()
    key = key_word % len(words) if words else 0
    return tuple(Word(word, states if i == key else None) for i, word in enumerate(words))


def take_apart(stated: Caption) -> CaptionParts:
    """The parts of a caption of the grammar."""
    text = stated.text
    time = floor = relation = ""
    time_first = False
    if stated.time_of_day is not None:
        before, time, after = _cut(text, TIME_PHRASES[stated.time_of_day])
        time_first, text = not before, before or after
    if stated.floor is not None:
        text, floor, _ = _cut(text, FLOOR_PHRASES[stated.floor])
    subject_text, reference_text = text, ""
    if stated.statements:
        subject_text, relation, reference_text = _cut(text, RELATION_PHRASES[stated.statements[0].relation])
    subjects, references = (side.split(" and ") if side else [] for side in (subject_text, reference_text))
    noun_phrases = tuple(
        tuple(Word(word, _ATTRIBUTE_OF_WORD.get(word), i) for word in phrase.split())
        for i, phrase in enumerate([*subjects, *references])
    )
    # "to the left of", "in front of": the word before "of" is the one that tells; "behind" stands alone
    return CaptionParts(
        noun_phrases,
        _phrase(relation, "relation", -2 if relation.endswith(" of") else 0),
        len(subjects),
        _phrase(floor, "floor", -2),
        _phrase(time, "time of day", -1),
        stated,
        time_first=time_first,
    )


@dataclass(frozen=True)
class Looseness:
    """How often a caption departs from the grammar; every rate is a probability.

    Args:
        untouched: the caption stays as it is.
        articles: all articles are left out.
        omitted: an adjective is left out.
        unknown: a word is replaced by an unknown one.
        inserted: an unknown word is put before a word.
        opening: the caption opens like "a photo of", with an unknown noun.
        unjoined: "and" gives way to an unknown word or, as after a comma, to nothing.
        unrelated: the relation gives way to "and" or what stands for it.
        floor_first: the floor comes before the objects.
    """

    untouched: float = 0.5
    articles: float = 0.15
    omitted: float = 0.1
    unknown: float = 0.03
    inserted: float = 0.02
    opening: float = 0.08
    unjoined: float = 0.3
    unrelated: float = 0.15
    floor_first: float = 0.15


_ENUMERATIONS: tuple[tuple[Word, ...], ...] = ((Word(None),), ())


def loosen(parts: CaptionParts, generator: np.random.Generator, rates: Looseness) -> StatedCaption:
    """The caption in looser words, with the answers that these words still give."""
    if generator.random() < rates.untouched:
        return parts.assemble()
    no_articles = generator.random() < rates.articles

    def kept(word: Word) -> bool:
        if word.text in ("a", "an"):
            return not no_articles
        return word.states in (None, "shape") or generator.random() >= rates.omitted

    joint = parts.joint
    if generator.random() < rates.unjoined:
        joint = _ENUMERATIONS[int(generator.integers(len(_ENUMERATIONS)))]
    relation = parts.relation
    if relation and generator.random() < rates.unrelated:
        relation = joint
    loose = replace(
        parts,
        noun_phrases=tuple(tuple(filter(kept, phrase)) for phrase in parts.noun_phrases),
        joint=joint,
        relation=_blurred(relation, generator, rates),
        floor=_blurred(parts.floor, generator, rates),
        time=_blurred(parts.time, generator, rates),
        floor_first=generator.random() < rates.floor_first,
    )
    loose = replace(
        loose, noun_phrases=tuple(_blurred(phrase, generator, rates) for phrase in loose.noun_phrases)
    )
    stated = loose.assemble()
    if generator.random() < rates.opening:
        stated = replace(stated, words=(Word("a"), Word(None), Word("of"), *stated.words))
    return stated


def _blurred(words: tuple[Word, ...], generator: np.random.Generator, rates: Looseness) -> tuple[Word, ...]:
    """Replace words by unknown ones and put unknown ones between them."""
    chances = generator.random((len(words), 2)).tolist()
    result = []
    for word, (unknown, inserted) in zip(words, chances, strict=True):
        if inserted < rates.inserted:
            result.append(Word(None))
        result.append(replace(word, text=None) if unknown < rates.unknown else word)
    return tuple(result)


def sample_caption(generator: np.random.Generator) -> Caption:
    """A caption of a random scene that is never drawn: attributes are uniform, positions left out.

    Two and three objects are more frequent than in `sample_scene`, because they are what is hard to read.
    """

    def pick(options: Sequence[str]) -> str:
        return options[int(generator.integers(len(options)))]

    count = 1 + int(generator.choice(MAX_OBJECTS, p=(0.2, 0.4, 0.4)))
    objects = tuple(
        SceneObject(pick(SHAPES), pick(COLORS), pick(MATERIALS), pick(SIZES), x=0.0, z=0.0)
        for _ in range(count)
    )
    scene = Scene(objects, pick(RELATIONS) if count > 1 else None, pick(FLOORS), pick(TIMES))
    return caption(scene, generator)
