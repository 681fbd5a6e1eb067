"""What a call cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from varaccel.engine.accelerator import ACCELERATORS
from varaccel.engine.counts import Stage


def telling(accelerator: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that say what was done: the first one if it has a value, and those that are not the default."""
    usual: dict[str, Any] = {}
    if accelerator in ACCELERATORS:
        fields = dataclasses.fields(ACCELERATORS[accelerator])
        usual = {f.name: f.default for f in fields if f is not fields[0] or f.default is None}
    return {k: v for k, v in options.items() if k not in usual or usual[k] != v}


def call_label(accelerator: str, options: Mapping[str, Any]) -> str:
    """An accelerator with its telling options, as a call of it is written."""
    told = (f"{name}={value}" for name, value in telling(accelerator, options).items())
    return f"{accelerator}({', '.join(told)})"


@dataclass(frozen=True)
class Statistics:
    """Cost of one pipeline call.

    Attributes:
        accelerator: name of the accelerator.
        options: its options.
        lossless: whether it keeps the distribution of plain decoding.
        images: images made.
        tokens: tokens per image, without scales that were left out; where images differ, as many as every image has.
        passes: forward passes of the host model in the call, prefill included. Images that are decoded at once share
            them, so where they advance at their own pace it is the number that the slowest needed. Of a call in
            several batches all passes of all of them, and those that only read the condition of an image that takes
            the place of a finished one.
        rows: network rows per pass, at most: 2 per image while guided, or more if guidance has more branches.
        cache_bytes: size of the key-value cache.
        seconds: wall-clock time by phase: text (and the image that is painted into, to tokens), tokens (prefill and
            steps), decode (tokens to pixels).
        first_pass_seconds: the part of seconds["tokens"] until the first pass has decided its tokens: the prefill of a
            raster model, the first scale of a next-scale one, the first iteration of a masked one. 0 if the call was
            stopped before.
        image_passes: passes that each image took part in, its own prefill included; empty if all need the same.
        accepted: of each image, draft tokens that paid off per pass and chain or tree; empty without drafting.
        draft_passes: forward passes of the drafter.
        kept: of each image, share of the draft tokens that were kept, where a rule keeps or replaces each.
        stages: shares of the networks, if several took turns.
        interrupted: whether the call was stopped before its images were whole.
        device, dtype: where and in which precision the host model ran.
        batch_size: images that were decoded at once, at most; 0 for all.
    """

    accelerator: str
    options: dict[str, Any]
    lossless: bool
    images: int
    tokens: int
    passes: int
    rows: int
    cache_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)
    first_pass_seconds: float = 0.0
    image_passes: tuple[int, ...] = ()
    accepted: tuple[float, ...] = ()
    draft_passes: int = 0
    kept: tuple[float, ...] = ()
    stages: tuple[Stage, ...] = ()
    interrupted: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 0

    @property
    def label(self) -> str:
        """The accelerator with its options, such as `zipar(window=8)`."""
        return call_label(self.accelerator, self.options)

    @property
    def tokens_per_pass(self) -> float:
        """How many times fewer passes these are than with a token per pass, in batches of the same size.

        For images that are all decoded at once: tokens of an image over passes.
        """
        batches = -(-self.images // (self.batch_size or self.images))
        return self.tokens * batches / self.passes

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return asdict(self) | {
            "tokens_per_pass": self.tokens_per_pass,
            "total_seconds": self.total_seconds,
            "mean_accepted": self.mean_accepted,
        }

    @property
    def mean_accepted(self) -> float | None:
        """Mean of `accepted` over the images, None without drafting."""
        return sum(self.accepted) / len(self.accepted) if self.accepted else None

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds.items())
        drafted = "" if not self.accepted else f", {self.mean_accepted:.2f} draft tokens accepted per pass"
        if self.kept:
            drafted += f", {100 * sum(self.kept) / len(self.kept):.0f} % of the draft tokens kept"
        if self.draft_passes:
            drafted += f", {self.draft_passes} drafter passes"
        stages = "".join(f"; {stage}" for stage in self.stages)
        stopped = "; interrupted, the images are not whole" if self.interrupted else ""
        at_once = f", {self.batch_size} at once," if 0 < self.batch_size < self.images else ""
        return (
            f"{self.label}: {self.images} images of {self.tokens} tokens{at_once} in {self.passes} "
            f"passes ({self.tokens_per_pass:.2f} tokens per pass{drafted}), {self.total_seconds:.2f} s "
            f"({phases}){stages}{stopped}"
        )
