"""Tokens of many independent bits: how Infinity's are drawn (arXiv 2412.04431, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from varaccel.engine.options import MIN_TEMPERATURE
from varaccel.engine.randomness import GumbelNoise, Randomness
from varaccel.hosts.next_scale.published_rng import PublishedDraws
from varaccel.hosts.next_scale.sampling import ScaleFilters, at_scale
from varaccel.tokenizers.bitwise_vq import pack_bits, unpack_bits


@dataclass(frozen=True)
class BitSampling(ScaleFilters):
    """How the bits of a scale are drawn, each by itself: temperature, then top-k, then top-p, over its two values.

    Attributes:
        temperature: one number, or one per scale; 0 takes the more likely value of each bit.
        top_k: 1 takes the more likely value (draws between equal ones), all else changes nothing: a bit has two values.
        top_p: a bit whose less likely value has a probability of at most 1 - top_p takes the other; 0 and 1 are off.

    Raises:
        InputError: a value out of range or not a number.
    """

    def keep(self, logits: Tensor, scale: int) -> Tensor:
        """Logits [B, P, 2 D] of a scale, divided by the temperature."""
        temperature = at_scale(self.temperature, scale)
        return logits if temperature in (0, 1) else logits / max(temperature, MIN_TEMPERATURE)

    def distribution(self, kept: Tensor, scale: int) -> BitDistribution:
        """The distribution of tokens [B, P] from logits [B, P, 2 D] that `keep` returned."""
        logits = kept.unflatten(-1, (-1, 2))
        if at_scale(self.top_k, scale) == 1:
            logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True), -torch.inf)
        top_p = self.top_p if 0 < self.top_p < 1 else 1.0
        return BitDistribution(logits, top_p, greedy=at_scale(self.temperature, scale) == 0)


@dataclass(frozen=True)
class BitDistribution:
    """Distributions over tokens of D independent bits.

    Attributes:
        logits: [B, P, D, 2] float32 of every bit being 0 and 1.
        top_p: see `BitSampling`.
        greedy: `sample` takes the more likely value of every bit, 0 of equal ones.
    """

    logits: Tensor
    top_p: float = 1.0
    greedy: bool = False

    @property
    def probs(self) -> Tensor:
        """[B, P, D, 2]; exactly 0 at values that are dropped."""
        probs = self.logits.softmax(-1)
        if self.greedy:
            first = self.logits[..., 0] >= self.logits[..., 1]
            return torch.stack([first, ~first], -1).to(probs.dtype)
        if self.top_p == 1:
            return probs
        less = probs <= probs.flip(-1)
        # of two equal values the second stays, as the published code sorts them
        less[..., 1] &= ~less[..., 0]
        probs = probs.masked_fill(less & (probs <= 1 - self.top_p), 0.0)
        return probs / probs.sum(-1, keepdim=True)

    def sample(self, noise: Tensor) -> Tensor:
        """Token ids [B, P] from standard Gumbel noise [B, P, 2 D] (Gumbel-max, bit by bit); deterministic."""
        if self.greedy:
            return pack_bits(self.logits.argmax(-1))
        return pack_bits((self.probs.log() + noise.view_as(self.logits)).argmax(-1))

    def log_prob(self, values: Tensor) -> Tensor:
        """Log-probability of token ids [B, P], [B, P]."""
        bits = unpack_bits(values, self.logits.shape[-2]).long()
        return self.probs.log().gather(-1, bits.unsqueeze(-1)).squeeze(-1).sum(-1)


@dataclass
class BitDraws:
    """Noise for every bit of every position of every image: what is drawn depends neither on batch nor on order.

    Args:
        randomness: of the call.
        bits: D.
    """

    randomness: Randomness
    bits: int
    _noise: GumbelNoise = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._noise = self.randomness.gumbel(2 * self.bits)

    def sample(self, distribution: BitDistribution, positions: Tensor) -> Tensor:
        """Token ids [B, P] of `positions` [P] or [B, P]."""
        everywhere = positions.expand(len(self._noise.generators), -1)
        # all of it at once: the device is not asked how far the positions reach
        return distribution.sample(self._noise.at(everywhere, self._noise.positions))

    def part(self, images: Sequence[int]) -> BitDraws:
        """The draws of some images."""
        return BitDraws(self.randomness.part(images), self.bits)


@dataclass
class PublishedBitDraws(PublishedDraws):
    """The random stream of Infinity's published sampler, for parity with seeded runs of it.

    A bit is the value with the largest p / E, with exponential noise E for both values of every bit, scale by scale.
    """

    def sample(self, distribution: BitDistribution, positions: Tensor) -> Tensor:  # type: ignore[override]
        """Token ids [B, P]; the stream advances by 2 B P D numbers, also if greedy."""
        probs = distribution.probs
        return pack_bits((probs / self._exponential(*probs.shape)).argmax(-1))
