"""Quality of an accelerator's images, and whether it differs from that of plain decoding by more than noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import comb, sqrt
from typing import Any, Self

from varaccel.errors import InputError
from varaccel.evaluation.metrics.adherence import Rate
from varaccel.evaluation.metrics.frechet import FrechetSpread

SIGNIFICANT = 0.05
"""A difference in adherence is noise if chance makes one as large or larger more often than this."""


@dataclass(frozen=True)
class Distance:
    """Fréchet distance from the reference, `value`, and its spread over bootstrap resamples of the images."""

    value: float
    spread: FrechetSpread


@dataclass(frozen=True)
class Quality:
    """How good the images of one accelerator are.

    Attributes:
        adherence: rate of images that show all objects and relations of their captions.
        correct: which of them do, in the order of the captions.
        distance: of all images from the reference; None without a reference.
    """

    adherence: Rate
    correct: tuple[bool, ...]
    distance: Distance | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `correct` becomes a string of 0 and 1."""
        return asdict(self) | {"correct": "".join("01"[shown] for shown in self.correct)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` made."""
        distance = values["distance"]
        return cls(
            Rate(**values["adherence"]),
            tuple(letter == "1" for letter in values["correct"]),
            distance and Distance(distance["value"], FrechetSpread(**distance["spread"])),
        )


@dataclass(frozen=True)
class Comparison:
    """Quality of one accelerator beside that of plain decoding, of the same prompts and seeds.

    Attributes:
        gained, lost: prompts that only this one, or only plain decoding, shows correctly.
        p: probability of a split at least as uneven if both are equally good: the exact two-sided sign test on
            the prompts where they differ (McNemar 1947). Not corrected for the number of accelerators.
        distance: difference of the Fréchet distances, positive if this one is further away; None without them.
        distance_noise: 2 (s² + s_plain²)^½ with the bootstrap standard deviations s: what the difference must
            exceed. On the wide side, because the same prompts make both distances move together.
    """

    gained: int
    lost: int
    p: float
    distance: float | None
    distance_noise: float | None

    @property
    def same_adherence(self) -> bool:
        """Whether noise explains the difference in adherence."""
        return self.p >= SIGNIFICANT

    @property
    def same_distance(self) -> bool | None:
        """Whether noise explains the difference in distance; None without distances."""
        if self.distance is None or self.distance_noise is None:
            return None
        return abs(self.distance) < self.distance_noise or self.distance == 0


def sign_test(gained: int, lost: int) -> float:
    """Two-sided exact binomial probability of a split of `gained` + `lost` at least as uneven, at even odds."""
    total = gained + lost
    tail = sum(comb(total, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**total)


def compare(quality: Quality, plain: Quality) -> Comparison:
    """`quality` beside `plain`.

    Raises:
        InputError: they are of different numbers of images.
    """
    if len(quality.correct) != len(plain.correct):
        raise InputError(
            f"{len(quality.correct)} images cannot be compared with {len(plain.correct)}; judge equally many."
        )
    pairs = list(zip(quality.correct, plain.correct, strict=True))
    gained, lost = pairs.count((True, False)), pairs.count((False, True))
    difference = noise = None
    if quality.distance is not None and plain.distance is not None:
        difference = quality.distance.value - plain.distance.value
        noise = 2 * sqrt(quality.distance.spread.std**2 + plain.distance.spread.std**2)
    return Comparison(gained, lost, sign_test(gained, lost), difference, noise)
