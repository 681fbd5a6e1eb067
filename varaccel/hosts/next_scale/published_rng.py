"""The random stream of VAR's and CoDe's published samplers, for parity with seeded runs of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Never

import torch
from torch import Tensor

from varaccel.engine.distribution import Categorical
from varaccel.errors import InputError

ONE_BATCH = (
    "published_rng draws the numbers of one batch together; leave batch_size out, or make several calls."
)


@dataclass
class PublishedDraws:
    """One generator for all images of a call, spent scale by scale.

    A token is the code with the largest p / E, with exponential noise E for every code; that is what a one-sample
    `torch.multinomial` does. An image thus depends on its batch. In CoDe the published refiner seeds a generator
    of its own alike and throws away the draws of the scales that are there already, which leads to the same place
    in the stream.

    Attributes:
        generator: on the device of the model. Streams of CPU and GPU differ.
    """

    generator: torch.Generator

    def sample(self, distribution: Categorical, positions: Tensor) -> Tensor:
        """Token ids [B, P]; the stream advances by B * P * V numbers, whatever the filters, also if greedy."""
        batch, count, vocab_size = distribution.logits.shape
        noise = self._exponential(batch * count, vocab_size).view(batch, count, vocab_size)
        return (
            distribution.logits.argmax(-1) if distribution.greedy else (distribution.probs / noise).argmax(-1)
        )

    def gumbel(self, vocab_size: int) -> PublishedNoise:
        """Gumbel noise from the same stream, for smooth sampling."""
        return PublishedNoise(self, vocab_size)

    def part(self, images: Sequence[int]) -> Never:
        """Refuse to split: numbers belong to the batch.

        Raises:
            InputError: always.
        """
        raise InputError(ONE_BATCH)

    def _exponential(self, *shape: int) -> Tensor:
        device = self.generator.device
        return torch.empty(shape, dtype=torch.float32, device=device).exponential_(generator=self.generator)


@dataclass
class PublishedNoise:
    """Gumbel noise in the order in which it is asked for."""

    draws: PublishedDraws
    vocab_size: int

    def at(self, positions: Tensor) -> Tensor:
        """Noise [B, P, V] for positions [B, P]."""
        return self.draws._exponential(*positions.shape, self.vocab_size).log_().neg_()

    def part(self, images: Sequence[int]) -> Never:
        """Refuse to split: numbers belong to the batch.

        Raises:
            InputError: always.
        """
        raise InputError(ONE_BATCH)
