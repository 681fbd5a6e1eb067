"""Verification rules for continuous tokens: which draft tokens are accepted, and what replaces the others.

A token of such a head is the end of a chain of Gaussian steps. Draft and target run their own chains from the same
start with the same noise, and compare the Gaussians of one step (continuous speculative decoding, arXiv 2411.11925).
A rule is a pure function of these Gaussians and given numbers; it never sees a network. Densities are compared in
logs and in float64 (or the `real_type` of the device): the density of a token of 16 channels of standard deviation
0.006 is near 1e29 at its mean and leaves float32 a few deviations away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from varaccel.engine.options import check_number, positive_integer, settle
from varaccel.engine.randomness import uniform_numbers
from varaccel.engine.seeds import seeded_generator
from varaccel.errors import InputError
from varaccel.nn.devices import real_type


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Gaussians with independent channels.

    Attributes:
        mean: [..., C].
        log_std: [..., C], natural logarithm of the standard deviation, any temperature included.
    """

    mean: Tensor
    log_std: Tensor

    def log_prob(self, values: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-density of values [..., C] in nats: [...] float64, NaN where a parameter or value is.

        Args:
            values: must broadcast with the mean.
            temperature: divides the squared distances by its square, but leaves the normalisation alone, so that the
                result is a log-density only at 1. The published code compares such numbers.
        """
        real = real_type(self.mean.device)
        log_std = self.log_std.to(real)
        distance = (values.to(real) - self.mean.to(real)) * torch.exp(-log_std) / temperature
        return (-0.5 * distance.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(dim=-1)

    def sample(self, noise: Tensor) -> Tensor:
        """Values [..., C] of standard normal `noise` [..., C]; in float64 if the noise is."""
        return self.mean + self.log_std.exp() * noise

    def at(self, rows: Tensor) -> Gaussian:
        """Those of some rows, [R, 1, C], to be held against several values each [R, K, C]."""
        return Gaussian(self.mean[rows].unsqueeze(1), self.log_std[rows].unsqueeze(1))


@dataclass(frozen=True, eq=False)
class Aligned:
    """What is known about M drafted tokens of C channels.

    Attributes:
        value: [M, C] the drafted value. The rules that keep a distribution need it drawn from `draft`.
        draft, target: [M, C] the Gaussians of the step that is compared, each at the end of its own chain.
        log_sigma: [M] sum over the other noisy steps and the channels of draft log std - target log std; the
            logarithm of the paper's factor Sigma (2411.11925, section 3).

    Raises:
        InputError: shapes that do not fit together.
    """

    value: Tensor
    draft: Gaussian
    target: Gaussian
    log_sigma: Tensor

    def __post_init__(self) -> None:
        if self.value.dim() != 2:
            raise InputError(f"value must be [M, C], got {list(self.value.shape)}.")
        for name, distribution in (("draft", self.draft), ("target", self.target)):
            if distribution.mean.shape != self.value.shape or distribution.log_std.shape != self.value.shape:
                raise InputError(
                    f"mean and log_std of the {name} must be [M, C] = {list(self.value.shape)} as value is, "
                    f"got {list(distribution.mean.shape)} and {list(distribution.log_std.shape)}."
                )
        if self.log_sigma.shape != self.value.shape[:1]:
            raise InputError(
                f"log_sigma must be [M] = [{self.value.shape[0]}], got {list(self.log_sigma.shape)}."
            )


@dataclass(frozen=True, eq=False)
class Decision:
    """What a rule decided about M tokens of C channels.

    Attributes:
        accepted: [M] bool, true in padding.
        values: [M, C] in the dtype of the drafted values: those where accepted, new ones elsewhere. Finite wherever
            the target's Gaussian is; what is broken there cannot be mended here and stays visible.
        tries: [M] int64, candidates examined for the token; 0 where accepted.
        exhausted: [M] bool, whether none of the candidates was taken and the rule's last resort was.
    """

    accepted: Tensor
    values: Tensor
    tries: Tensor
    exhausted: Tensor


class ResampleNoise(Protocol):
    """The numbers that rejected tokens are drawn again from, in order."""

    def next(self, count: int) -> tuple[Tensor, Tensor]:
        """The next `count` of every token: standard normal [M, count, C] and uniform in [0, 1) [M, count]."""
        ...


class SeededResampleNoise:
    """Numbers from a CPU generator per image, for M = B * rows_per_image tokens, those of an image together.

    An image's numbers depend neither on its batch nor on the device. How many are asked for in a verification does
    depend on the batch: one image may need more of them than another. So call `restart` before each.

    Args:
        seeds: of each image, from 0 to 2**63 - 1.
        rows_per_image: tokens of an image that are verified together, padding included.
        channels: of a token.
        device: of the results.

    Raises:
        InputError: no seeds, or a size that is no positive integer.
    """

    AHEAD = 16

    def __init__(
        self,
        seeds: Sequence[int],
        rows_per_image: int,
        channels: int,
        device: torch.device | str = "cpu",
    ) -> None:
        positive_integer("rows_per_image", rows_per_image)
        positive_integer("channels", channels)
        if not seeds:
            raise InputError("seeds must name one seed per image, got none.")
        self.rows, self.channels, self.device = rows_per_image, channels, device
        self._images = [seeded_generator(seed) for seed in seeds]
        self.restart()

    def restart(self) -> None:
        """Go on to the numbers of the next verification, however many of this one's were used."""
        seeds = [int(torch.randint(2**62, (), generator=g, device=g.device)) for g in self._images]
        self._generators = [seeded_generator(seed) for seed in seeds]
        self._normals = self._uniforms = torch.empty(0, dtype=torch.float32, device=self.device)
        self._left = 0  # numbers of every token that are drawn but not used

    def next(self, count: int) -> tuple[Tensor, Tensor]:
        """Normal [M, count, C] and uniform [M, count] numbers, float64."""
        while self._left < count:
            self._refill()
        self._left -= count
        normals, self._normals = self._normals[:, :count], self._normals[:, count:]
        uniforms, self._uniforms = self._uniforms[:, :count], self._uniforms[:, count:]
        return normals, uniforms

    def _refill(self) -> None:
        """Draw ahead: rules that ask round by round would otherwise wait for the generators in each."""
        shape = (self.rows, self.AHEAD)
        normals, uniforms = [], []
        for g in self._generators:
            drawn = torch.randn(*shape, self.channels, dtype=torch.float64, generator=g, device=g.device)
            normals.append(drawn.to(real_type(self.device)).to(self.device))
            uniforms.append(uniform_numbers(shape, g, self.device))
        more = torch.cat(normals), torch.cat(uniforms)
        self._normals, self._uniforms = (
            new if self._left == 0 else torch.cat([old, new], 1)
            for old, new in zip((self._normals, self._uniforms), more, strict=True)
        )
        self._left += self.AHEAD


class ContinuousRule(Protocol):
    """Keeps drafted tokens or draws them again."""

    def verify(
        self, aligned: Aligned, uniforms: Tensor, resample_noise: ResampleNoise, active: Tensor | None = None
    ) -> Decision:
        """Verify M tokens of C channels.

        A ratio that is not a finite number counts as a rejection. Nothing is asked of `resample_noise` if no token is
        rejected.

        Args:
            aligned: the drafted values and the Gaussians of both models.
            uniforms: [M] in [0, 1), to be held against the ratio of the densities.
            resample_noise: numbers for what is rejected.
            active: [M] bool, false in padding, which counts as accepted and costs no candidates; all if None.

        Raises:
            InputError: shapes that do not fit together.
        """
        ...


# --------------------------------------------------------------------------------------------------------------
# what the rules share


def _check(aligned: Aligned, uniforms: Tensor, active: Tensor | None) -> Tensor:
    """The active rows [M] bool, after a look at the shapes."""
    shape = list(aligned.log_sigma.shape)
    if list(uniforms.shape) != shape:
        raise InputError(f"uniforms must be [M] = {shape}, one per token, got {list(uniforms.shape)}.")
    if active is None:
        return torch.ones_like(uniforms, dtype=torch.bool)
    if list(active.shape) != shape or active.dtype != torch.bool:
        raise InputError(f"active must be bool [M] = {shape}, got {active.dtype} {list(active.shape)}.")
    return active


def _draw(resample_noise: ResampleNoise, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The next numbers, float64, after a look at their shapes; `like` is [M, C]."""
    normals, uniforms = resample_noise.next(count)
    wanted = [like.shape[0], count, like.shape[1]]
    if list(normals.shape) != wanted or list(uniforms.shape) != wanted[:2]:
        raise InputError(
            f"resample_noise must be [M, count, C] = {wanted} and [M, count], "
            f"got {list(normals.shape)} and {list(uniforms.shape)}."
        )
    real = real_type(like.device)
    return normals.to(real), uniforms.to(real)


def _residual(draft: Gaussian, target: Gaussian, values: Tensor, log_factor: Tensor) -> Tensor:
    """max(0, factor p - q) / (factor p) at candidates [R, K, C] from p: [R, K] float64, 0 where no number."""
    log_ratio = draft.log_prob(values) - target.log_prob(values) - log_factor
    return (-torch.expm1(log_ratio.clamp(max=0))).nan_to_num(nan=0.0)


# Two or three candidates are usual, so the first blocks are small. The sizes must not depend on what happens, or an
# image's numbers would depend on its batch.
_FIRST_BLOCK, _LARGEST_BLOCK = 4, 32


def _resample(
    aligned: Aligned, accepted: Tensor, log_factor: Tensor, resample_noise: ResampleNoise, tries: int
) -> Decision:
    """Redraw what is not accepted from the residual, and from the target itself where that takes too long.

    Args:
        aligned: of M tokens of C channels.
        accepted: [M] bool.
        log_factor: [M] on the target's density.
        resample_noise: numbers for all M tokens.
        tries: the most candidates per token.
    """
    values = aligned.value.clone()
    used = torch.zeros_like(accepted, dtype=torch.int64)
    pending = (~accepted).nonzero()[:, 0]  # [R]
    done, block = 0, _FIRST_BLOCK
    while done < tries and len(pending):
        count = min(block, tries - done)
        normals, uniforms = _draw(resample_noise, count, aligned.value)
        draft, target = aligned.draft.at(pending), aligned.target.at(pending)
        candidates = target.sample(normals[pending])  # [R, count, C]
        success = uniforms[pending] < _residual(draft, target, candidates, log_factor[pending, None])
        found, first = success.to(torch.uint8).max(dim=1)  # [R], the first of several
        found = found.bool()
        rows = pending[found]
        values[rows] = candidates[found, first[found]].to(values.dtype)
        used[pending] = done + torch.where(found, first + 1, count)
        pending = pending[~found]
        done, block = done + count, min(2 * block, _LARGEST_BLOCK)
    exhausted = torch.zeros_like(accepted)
    if len(pending):
        normals, _ = _draw(resample_noise, 1, aligned.value)
        values[pending] = aligned.target.at(pending).sample(normals[pending])[:, 0].to(values.dtype)
        exhausted[pending] = True
    return Decision(accepted, values, used, exhausted)


class _RatioRule:
    """Compares factor p / q with a uniform number."""

    inner_temperature: float = 1.0

    def _log_factor(self, aligned: Aligned) -> Tensor:
        """[M] float64, what the target's densities are multiplied by."""
        raise NotImplementedError

    def log_ratio(self, aligned: Aligned) -> Tensor:
        """[M] float64, held against the logarithm of a uniform number."""
        target = aligned.target.log_prob(aligned.value, self.inner_temperature)
        draft = aligned.draft.log_prob(aligned.value, self.inner_temperature)
        return target - draft + self._log_factor(aligned)

    def residual(self, aligned: Aligned, values: Tensor) -> Tensor:
        """Chances [M, K] float64 to take candidates [M, K, C] drawn from the target after a rejection."""
        rows = torch.arange(len(values), device=values.device)
        factor = self._log_factor(aligned)[:, None]
        return _residual(aligned.draft.at(rows), aligned.target.at(rows), values, factor)

    def _accepted(self, aligned: Aligned, uniforms: Tensor, active: Tensor) -> Tensor:
        ratio = self.log_ratio(aligned)
        # an infinite ratio is no surprise but a draft without density at its own value: something is broken
        return ~active | (ratio.isfinite() & (ratio > uniforms.to(ratio).log()))


# --------------------------------------------------------------------------------------------------------------
# the rules


@dataclass(frozen=True)
class ReferenceRule(_RatioRule):
    """The decisions of the published code of continuous speculative decoding (2411.11925), for comparison.

    It draws from no known distribution. It multiplies the ratio by 1 / Sigma where the paper says Sigma; it
    divides squared distances by `inner_temperature`², in the acceptance only; every token takes part in every round of
    resampling, accepted ones too, until each has had a success, and later successes replace earlier ones. So a
    token depends on the others it is verified with.

    One thing is changed: a rejected token that never succeeds takes the target's mean, which is the target's own
    token in that code. There it becomes the zero vector, which is no token at all. And since nothing is
    multiplied out in float32, nothing overflows.

    Attributes:
        inner_temperature: in standard deviations; 42 is what the code calls its default.
        tries: the most rounds.

    Raises:
        InputError: an option that cannot be used.
    """

    inner_temperature: float = 42.0
    tries: int = 100

    def __post_init__(self) -> None:
        inner = check_number("inner_temperature", self.inner_temperature, above=True)
        settle(self, inner_temperature=inner, tries=positive_integer("tries", self.tries))

    def _log_factor(self, aligned: Aligned) -> Tensor:
        return -aligned.log_sigma.to(real_type(aligned.log_sigma.device))

    def verify(
        self, aligned: Aligned, uniforms: Tensor, resample_noise: ResampleNoise, active: Tensor | None = None
    ) -> Decision:
        active = _check(aligned, uniforms, active)
        accepted = self._accepted(aligned, uniforms, active)
        drawn = aligned.target.mean.to(aligned.value.dtype)
        found = torch.zeros_like(accepted)
        rounds = 0
        if not accepted.all():
            while rounds < self.tries and not (found | ~active).all():
                normals, chances = _draw(resample_noise, 1, aligned.value)
                candidates = aligned.target.sample(normals[:, 0])  # [M, C]
                success = chances[:, 0] < self.residual(aligned, candidates.unsqueeze(1))[:, 0]
                drawn = torch.where(success[:, None], candidates.to(drawn.dtype), drawn)
                found = found | success
                rounds += 1
        values = torch.where(accepted[:, None], aligned.value, drawn)
        return Decision(accepted, values, torch.where(accepted, 0, rounds), ~accepted & ~found)


@dataclass(frozen=True)
class PaperRule(_RatioRule):
    """Continuous speculative decoding as printed (2411.11925, section 3).

    A token is kept with the chance min(1, Sigma p / q), and drawn again from max(0, Sigma p - q) otherwise, where
    Sigma stands for the steps before. The paper calls the criterion approximate, and it does change the
    distribution: given the steps before, only the ratio without Sigma is right, see `ExactRule`.

    A token all of whose candidates failed is drawn from the target's Gaussian.

    Attributes:
        inner_temperature: in standard deviations: squared distances are divided by its square in the acceptance, so
            that more is accepted. 1 is as printed.
        tries: the most candidates per token.

    Raises:
        InputError: an option that cannot be used.
    """

    inner_temperature: float = 1.0
    tries: int = 100

    def __post_init__(self) -> None:
        inner = check_number("inner_temperature", self.inner_temperature, above=True)
        settle(self, inner_temperature=inner, tries=positive_integer("tries", self.tries))

    def _log_factor(self, aligned: Aligned) -> Tensor:
        return aligned.log_sigma.to(real_type(aligned.log_sigma.device))

    def verify(
        self, aligned: Aligned, uniforms: Tensor, resample_noise: ResampleNoise, active: Tensor | None = None
    ) -> Decision:
        accepted = self._accepted(aligned, uniforms, _check(aligned, uniforms, active))
        return _resample(aligned, accepted, self._log_factor(aligned), resample_noise, self.tries)


@dataclass(frozen=True)
class ExactRule(_RatioRule):
    """Keeps the target's distribution: min(1, p / q), and max(0, p - q) after a rejection (Leviathan et al. 2023).

    Given the start and the noise of the steps before, both models' next states are fixed Gaussians p and q. A value
    drawn from q and verified so is distributed as p, whatever the steps before were, hence also on average over
    them. A factor Sigma for those steps (2411.11925, section 3) would destroy that. The step must have noise: the
    last of a chain usually has none, and then no density that could be compared.

    The residual is drawn from by rejection sampling with candidates from p. A token all of whose candidates failed is
    drawn from p itself. Where a share r of the drafts is rejected, that happens to r (1 - r)^tries of all; so the
    distribution is off by at most 1 / (e tries) in total variation, 0.0004 for 1000, and by far less unless r is near
    1 / tries.

    Attributes:
        tries: the most candidates per token.

    Raises:
        InputError: an option that cannot be used.
    """

    tries: int = 1000

    def __post_init__(self) -> None:
        settle(self, tries=positive_integer("tries", self.tries))

    def _log_factor(self, aligned: Aligned) -> Tensor:
        return torch.zeros_like(aligned.log_sigma, dtype=real_type(aligned.log_sigma.device))

    def verify(
        self, aligned: Aligned, uniforms: Tensor, resample_noise: ResampleNoise, active: Tensor | None = None
    ) -> Decision:
        accepted = self._accepted(aligned, uniforms, _check(aligned, uniforms, active))
        return _resample(aligned, accepted, self._log_factor(aligned), resample_noise, self.tries)
