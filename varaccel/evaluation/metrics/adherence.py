"""Whether generated images show what their captions say, judged by the scene detector.

The measure follows GenEval (Ghosh et al. 2023, arXiv 2310.11513): detect objects, then check names, colours and
positions against the prompt. Here the world is closed, so the detector knows every word a caption can contain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from math import sqrt
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from varaccel.accelerators import AnyAccelerator
from varaccel.errors import InputError, unknown_name
from varaccel.models.detector import Detection, Observation, SceneDetector
from varaccel.scenes.grammar import Caption, Mention, caption
from varaccel.scenes.sampler import sample_scene
from varaccel.scenes.world import HELD_OUT_SEED, INVERSE_RELATION, RELATIONS

COLUMN_MARGIN = 0.05
"""Least distance of two centres, as a share of the image's width, for one to be left or right of the other.
In true scenes that state such a relation it is at least 0.15."""

DEPTH_MARGIN = 0.8
"""Least difference in depth, world units, for one object to be in front of or behind another: half of what the
world grants, and as much as objects stated to be side by side may differ by."""

_OBJECT_CYCLE = (1, 2, 1, 2, 3)
_Z95 = 1.959963984540054

_LABELS = {
    "correct": "all objects and relations",
    "one_object": "1 object",
    "one_object_alone": "1 object and no other",
    "two_objects": "2 objects",
    "two_objects_related": "2 objects in their relation",
    "three_objects": "3 objects",
    "three_objects_related": "3 objects in their relations",
    "count": "number of objects",
    "relation": "relation of found objects",
    "material": "material, when stated",
    "size": "size, when stated",
    "floor": "floor, when stated",
    "time_of_day": "time of day, when stated",
}
_NUMBERS = {1: "one_object", 2: "two_objects", 3: "three_objects"}


def wilson_interval(successes: int, total: int, z: float = _Z95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); `z` = 1.96 gives 95 %. (0, 1) if `total` is 0.

    Raises:
        InputError: `successes` is outside 0 to `total`.
    """
    if not 0 <= successes <= total:
        raise InputError(f"successes lie between 0 and total, got {successes} of {total}.")
    if total == 0:
        return 0.0, 1.0
    share = successes / total
    centre = share + z * z / (2 * total)
    reach = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def share_error(successes: int, total: int) -> float:
    """Standard error of a proportion: half of its Wilson interval of one standard deviation, so never 0."""
    low, high = wilson_interval(successes, total, z=1)
    return (high - low) / 2


@dataclass(frozen=True)
class Rate:
    """`successes` of `total`, as a share with its 95 % Wilson interval (`low`, `high`)."""

    successes: int
    total: int
    share: float
    low: float
    high: float

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> Rate | None:
        """The rate of true `outcomes`; None if there are none."""
        kept = list(outcomes)
        if not kept:
            return None
        return cls(sum(kept), len(kept), sum(kept) / len(kept), *wilson_interval(sum(kept), len(kept)))


@dataclass(frozen=True)
class CaptionVerdict:
    """How one image compares with its caption.

    Attributes:
        caption: the text.
        detected: how many objects were seen.
        found: for each mention, whether an object of its colour and shape was matched to it.
        related: for each statement, whether it holds between the matched objects; None if one is missing.
        materials, sizes: for each mention, whether the matched object is as stated; None if nothing is stated.
            A mention without a matched object counts as wrong.
        floor, time_of_day: whether they are as stated; None if nothing is stated.
    """

    caption: str
    detected: int
    found: tuple[bool, ...]
    related: tuple[bool | None, ...]
    materials: tuple[bool | None, ...]
    sizes: tuple[bool | None, ...]
    floor: bool | None
    time_of_day: bool | None

    @property
    def complete(self) -> bool:
        """Every mentioned object is there."""
        return all(self.found)

    @property
    def correct(self) -> bool:
        """Every mentioned object is there and every stated relation holds."""
        return self.complete and all(self.related)

    @property
    def alone(self) -> bool:
        """The mentioned objects are there and no others."""
        return self.complete and self.detected == len(self.found)


@dataclass(frozen=True)
class Adherence:
    """Rates of a set of images; see `score_adherence` for what each means.

    Attributes:
        rates: by name; a rate that no caption bears on is left out.
        verdicts: per image.
    """

    rates: dict[str, Rate]
    verdicts: tuple[CaptionVerdict, ...]

    def to_json(self, verdicts: bool = False) -> dict[str, Any]:
        """Plain JSON values: `images`, `rates` and, if asked for, the `verdicts`."""
        plain: dict[str, Any] = {
            "images": len(self.verdicts),
            "rates": {name: asdict(rate) for name, rate in self.rates.items()},
        }
        if verdicts:
            plain["verdicts"] = [
                {**asdict(verdict), "correct": verdict.correct, "alone": verdict.alone}
                for verdict in self.verdicts
            ]
        return plain

    def table(self) -> str:
        """One line per rate: name, share, 95 % interval, counts."""
        width = max(len(_LABELS[name]) for name in self.rates)
        return "\n".join(
            f"{_LABELS[name]:<{width}}  {100 * rate.share:5.1f} %  "
            f"[{100 * rate.low:5.1f}, {100 * rate.high:5.1f}]  {rate.successes}/{rate.total}"
            for name, rate in self.rates.items()
        )


def relation_holds(relation: str, subject: Detection, reference: Detection) -> bool:
    """Whether `subject` is seen in `relation` to `reference`.

    Left and right compare the centres of the boxes and need `COLUMN_MARGIN`; in front and behind compare
    predicted depths and need `DEPTH_MARGIN`.

    Raises:
        InputError: the relation is unknown.
    """
    if relation not in INVERSE_RELATION:
        raise unknown_name("relation", relation, RELATIONS)
    if relation in ("right of", "behind"):
        subject, reference = reference, subject
    if relation in ("left of", "right of"):
        return reference.column - subject.column >= COLUMN_MARGIN
    return reference.depth - subject.depth >= DEPTH_MARGIN


def _fits(mention: Mention, seen: Detection) -> bool:
    return mention.color == seen.color and mention.shape == seen.shape


def _assignments(
    mentions: Sequence[Mention], objects: Sequence[Detection]
) -> Iterator[tuple[Detection | None, ...]]:
    """Every one-to-one assignment of fitting objects to mentions, with None for mentions left out."""
    useful = [seen for seen in objects if any(_fits(mention, seen) for mention in mentions)]
    candidates: list[Detection | None] = [*useful, *[None] * len(mentions)]
    for chosen in permutations(candidates, len(mentions)):
        if all(seen is None or _fits(m, seen) for m, seen in zip(mentions, chosen, strict=True)):
            yield chosen


def judge(seen: Observation, stated: Caption) -> CaptionVerdict:
    """Compare what was seen with what the caption states.

    Objects are matched to mentions one to one. Of several possible matchings the best one counts: most mentions
    found, then most relations, then most materials and sizes, then highest scores.
    """
    place = {mention.index: position for position, mention in enumerate(stated.mentions)}
    best: tuple[tuple[int, int, int, float], CaptionVerdict] | None = None
    for chosen in _assignments(stated.mentions, seen.objects):
        related: list[bool | None] = []
        for statement in stated.statements:
            subject, reference = chosen[place[statement.subject]], chosen[place[statement.reference]]
            if subject is None or reference is None:
                related.append(None)
            else:
                related.append(relation_holds(statement.relation, subject, reference))
        pairs = list(zip(stated.mentions, chosen, strict=True))
        verdict = CaptionVerdict(
            caption=stated.text,
            detected=len(seen.objects),
            found=tuple(one is not None for one in chosen),
            related=tuple(related),
            materials=tuple(
                None if m.material is None else one is not None and one.material == m.material
                for m, one in pairs
            ),
            sizes=tuple(
                None if m.size is None else one is not None and one.size == m.size for m, one in pairs
            ),
            floor=None if stated.floor is None else seen.floor == stated.floor,
            time_of_day=None if stated.time_of_day is None else seen.time_of_day == stated.time_of_day,
        )
        merit = (
            sum(verdict.found),
            related.count(True),
            verdict.materials.count(True) + verdict.sizes.count(True),
            sum(one.score for one in chosen if one is not None),
        )
        if best is None or merit > best[0]:
            best = (merit, verdict)
    assert best is not None  # the empty assignment always exists
    return best[1]


def summarise(verdicts: Sequence[CaptionVerdict]) -> Adherence:
    """The rates of `verdicts`, as `score_adherence` defines them."""

    def stated(values: Iterable[bool | None]) -> list[bool]:
        return [value for value in values if value is not None]

    rates: dict[str, Rate | None] = {"correct": Rate.of(v.correct for v in verdicts)}
    for number, name in _NUMBERS.items():
        group = [v for v in verdicts if len(v.found) == number]
        rates[name] = Rate.of(v.complete for v in group)
        if number == 1:
            rates["one_object_alone"] = Rate.of(v.alone for v in group)
        else:
            rates[f"{name}_related"] = Rate.of(v.correct for v in group if v.related)
    rates["count"] = Rate.of(v.detected == len(v.found) for v in verdicts)
    rates["relation"] = Rate.of(held for v in verdicts for held in stated(v.related))
    rates["material"] = Rate.of(right for v in verdicts for right in stated(v.materials))
    rates["size"] = Rate.of(right for v in verdicts for right in stated(v.sizes))
    rates["floor"] = Rate.of(stated(v.floor for v in verdicts))
    rates["time_of_day"] = Rate.of(stated(v.time_of_day for v in verdicts))
    return Adherence({name: rate for name, rate in rates.items() if rate is not None}, tuple(verdicts))


def score_adherence(
    detector: SceneDetector, images: Tensor | Sequence[Image.Image], captions: Sequence[Caption]
) -> Adherence:
    """How well `images` show what `captions` say.

    A mention is found if an object of its colour and shape is detected; mentions and objects are matched one to
    one, by the matching that is best for the image (see `judge`). The rates, each with its 95 % Wilson interval:

    - `correct`: every mention is found and every stated relation holds (all captions).
    - `one_object`, `two_objects`, `three_objects`: every mention is found (captions of that many objects).
    - `one_object_alone`: the one object is found and nothing else is detected.
    - `two_objects_related`, `three_objects_related`: every mention is found and every stated relation holds
      between the matched objects.
    - `count`: as many objects are detected as the caption mentions.
    - `relation`: the relation holds, over statements whose two objects are found.
    - `material`, `size`: the matched object has it, over mentions that state it; a mention that is not found
      counts as wrong.
    - `floor`, `time_of_day`: as stated, over captions that state it.

    Args:
        detector: in evaluation mode.
        images: [B, 3, H, W] in [-1, 1] or PIL images, one per caption.
        captions: what each was asked to show.

    Raises:
        InputError: numbers of images and captions differ, or there are none.
    """
    if len(images) != len(captions):
        raise InputError(f"{len(images)} images need as many captions, got {len(captions)}.")
    observations = detector.observe(images)
    return summarise([judge(seen, text) for seen, text in zip(observations, captions, strict=True)])


def held_out_prompts(
    count: int, exclude: Collection[str] = (), first_seed: int = HELD_OUT_SEED
) -> dict[int, Caption]:
    """Seeds and captions of `count` held-out scenes in a fixed mix: of every five, two of one object, two of two, one
    of three.

    The prompts of a smaller `count` are the first of a larger one. Held-out means that no training image has the
    seed; a short caption may still read like one that was trained on.

    Args:
        exclude: captions to pass over, for instance all that a model was trained on.
        first_seed: where the scenes are counted from, at least `HELD_OUT_SEED`.

    Raises:
        InputError: `count` is below 1, or `first_seed` is that of a training image.
    """
    if count < 1:
        raise InputError(f"the number of captions must be 1 or more, got {count}.")
    if first_seed < HELD_OUT_SEED:
        raise InputError(f"held-out scenes have seeds from {HELD_OUT_SEED} on, got {first_seed}.")
    waiting: dict[int, list[tuple[int, Caption]]] = {number: [] for number in _NUMBERS}
    chosen: dict[int, Caption] = {}
    seed = first_seed
    while len(chosen) < count:
        wanted = waiting[_OBJECT_CYCLE[len(chosen) % len(_OBJECT_CYCLE)]]
        while not wanted:
            text = caption(sample_scene(seed), seed)
            if text.text not in exclude:
                waiting[len(text.mentions)].append((seed, text))
            seed += 1
        first, text = wanted.pop(0)
        chosen[first] = text
    return chosen


def held_out_captions(count: int, exclude: Collection[str] = ()) -> list[Caption]:
    """The captions of `held_out_prompts(count, exclude)`."""
    return list(held_out_prompts(count, exclude).values())


def draw_captions(
    pipeline: Callable[..., Any],
    captions: Sequence[Caption],
    *,
    batch_size: int,
    seed: int,
    guidance_scale: float | None = None,
    accelerator: AnyAccelerator | None = None,
    until: float | None = None,
) -> list[Image.Image]:
    """One image per caption; image i is drawn with seed `seed` + i, whatever the batch size.

    Args:
        until: begin no further batch after this time (in seconds since the epoch), so that there may be fewer images;
            the first is always drawn.

    Raises:
        InputError: the pipeline does not make one image per prompt.
    """
    images: list[Image.Image] = []
    with tqdm(total=len(captions), desc="drawing", unit="image", disable=None) as bar:
        for start in range(0, len(captions), batch_size):
            if images and until is not None and time.time() > until:
                break
            prompts = [text.text for text in captions[start : start + batch_size]]
            output = pipeline(
                prompts, guidance_scale=guidance_scale, seed=seed + start, accelerator=accelerator
            )
            if len(output.images) != len(prompts):
                raise InputError(
                    f"the pipeline returned {len(output.images)} images for {len(prompts)} prompts; "
                    "use one that makes one image per prompt."
                )
            images += output.images
            bar.update(len(prompts))
    return images
