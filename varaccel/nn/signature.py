"""What a network reads and predicts, so that another can be asked whether it may take its place."""

from __future__ import annotations

from dataclasses import dataclass, fields


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
    """

    condition: str
    condition_size: int | None = None
    vocab_size: int | None = None
    token_channels: int | None = None
    layout: tuple[int, ...] | None = None
    condition_slots: int | None = None
    noise_schedule: str | None = None

    def differences(self, other: Signature) -> list[str]:
        """Where `other` differs, as "vocab_size is 8 instead of 16"."""
        return [
            f"{item.name} is {getattr(other, item.name)} instead of {getattr(self, item.name)}"
            for item in fields(self)
            if getattr(self, item.name) != getattr(other, item.name)
        ]
