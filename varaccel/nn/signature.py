"""What a network reads and predicts, so that another can be asked whether it may take its place."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Literal

Paradigm = Literal["causal", "next-scale", "masked"]


@dataclass(frozen=True)
class Signature:
    """The facts that two networks of one call must share: tokens, layout of an image, and conditions.

    A network drafts for another, or takes over from it, if both have the same signature; sizes and kinds of
    networks do not matter.

    Attributes:
        condition: kind of the condition, such as "class" or "caption".
        condition_size: number of classes, or width of text features.
        vocab_size: number of token ids that are predicted; None for continuous tokens.
        token_channels: numbers per token: of continuous tokens, or of codebook vectors that the network reads.
        layout: sides of the grids or scales of an image; None if the call decides them.
        condition_slots: positions that the condition takes; None if the call decides them.
        noise_schedule: training noise of a diffusion head; None without one.
        paradigm: how an image is decided: token by token, scale by scale, or in groups of any positions.
    """

    condition: str
    condition_size: int | None = None
    vocab_size: int | None = None
    token_channels: int | None = None
    layout: tuple[int, ...] | None = None
    condition_slots: int | None = None
    noise_schedule: str | None = None
    paradigm: Paradigm = "causal"

    def __post_init__(self) -> None:
        if self.layout is not None:  # a list after a configuration was read from a file
            object.__setattr__(self, "layout", tuple(self.layout))

    def differences(self, other: Signature) -> list[str]:
        """Where `other` differs, in words, such as "number of token ids 8 instead of 16"."""
        own, others = astuple(self), astuple(other)
        return [
            f"{word} {theirs} instead of {ours}"
            for word, ours, theirs in zip(_WORDS, own, others, strict=True)
            if ours != theirs
        ]


_WORDS = (
    "kind of condition",
    "number of classes or width of text features",
    "number of token ids",
    "numbers per token",
    "sides of grids or scales",
    "number of condition slots",
    "noise schedule",
    "paradigm",
)
"""The fields of a signature in words."""
