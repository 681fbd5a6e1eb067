"""The speculative loop over groups of continuous tokens: a small model drafts groups, the large one verifies them.

`speculation.loop` is made for causal networks: draft tokens stand in cache slots and trees, and the distribution
of each follows from one pass. A masked network has neither; what it says about a group changes with every
token that is shown to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from varaccel.engine.canvas import Canvas
from varaccel.engine.counts import SpeculationStats
from varaccel.engine.loop import OnStep, Step
from varaccel.hosts.masked.denoising import Denoised
from varaccel.hosts.masked.distribution import DiffusionDistribution
from varaccel.hosts.masked.noise import TokenNoise
from varaccel.hosts.masked.schedule import CosineGroups, MaskedInputs
from varaccel.hosts.masked.session import MaskedSession
from varaccel.nn.devices import real_type
from varaccel.speculation.continuous_rejection import (
    Aligned,
    ContinuousRule,
    Decision,
    Gaussian,
    SeededResampleNoise,
)
from varaccel.speculation.group_verification import GroupVerification


@dataclass(frozen=True)
class Comparison:
    """Where the denoising paths of draft and target are compared.

    Attributes:
        rule: keeps or replaces a drafted value.
        step: k; both Gaussians of this step are compared, the steps below it are the target's. 0 compares tokens.
        draft_noise: of drafted paths.
        target_noise: of the target's paths; the same as `draft_noise` for aligned ones.
    """

    rule: ContinuousRule
    step: int
    draft_noise: TokenNoise
    target_noise: TokenNoise

    def draft(self, distribution: DiffusionDistribution, positions: Tensor) -> tuple[Tensor, Denoised]:
        """Tokens [B, P, C], and their paths at the compared step."""
        start, noise = self.draft_noise.paths(positions, distribution.noisy_steps)
        path = distribution.run(start, noise, last=self.step, record=True)
        return self._finish(distribution, path.value, noise).unflatten(0, distribution.shape), path

    def verify(
        self,
        distribution: DiffusionDistribution,
        drafted: Denoised,
        positions: Tensor,
        resample_noise: SeededResampleNoise,
    ) -> tuple[Tensor, Decision]:
        """What becomes of drafted tokens at `positions` [B, P] (-1 is padding): tokens [B, P, C] and the decision.

        Args:
            distribution: the target's.
            drafted: paths of these tokens, B * P rows.
        """
        start, noise = self.target_noise.paths(positions, distribution.noisy_steps)
        path = distribution.run(start, noise, last=self.step, record=True)
        sigma = (drafted.log_std_sum - path.log_std_sum).to(real_type(path.mean.device)).sum(-1)
        decision = self.rule.verify(
            Aligned(
                drafted.value,
                Gaussian(drafted.mean, drafted.log_std),
                Gaussian(path.mean, path.log_std),
                sigma,
            ),
            self.target_noise.accepting(positions),
            resample_noise,
            (positions >= 0).flatten(),
        )
        return self._finish(distribution, decision.values, noise).unflatten(0, distribution.shape), decision

    def _finish(self, distribution: DiffusionDistribution, value: Tensor, noise: Tensor | None) -> Tensor:
        return distribution.run(value, noise, first=self.step - 1).value if self.step else value


@torch.inference_mode()
def speculate_groups(
    target: MaskedSession,
    draft: MaskedSession,
    canvas: Canvas,
    schedule: CosineGroups,
    comparison: Comparison,
    verification: GroupVerification,
    *,
    prefill: float,
    on_step: OnStep | None = None,
) -> SpeculationStats:
    """Fill the canvas: draft a block of groups one after the other, verify them all in one pass of the target.

    As in the published code of continuous speculative decoding (arXiv 2411.11925), the target decides iterations up to
    `prefill` times their number by itself.

    Args:
        target: for the iterations that it decides by itself.
        verification: which groups make a block, in sight of what the target verifies them, and what is kept.
    """
    step_inputs = schedule.step_inputs(canvas)
    stats, number = _prefill(target, canvas, step_inputs, comparison, prefill, on_step)
    verified = torch.zeros_like(stats.passes)
    steps = [number] * canvas.batch  # groups that are decided, per image
    while min(steps) < len(step_inputs):
        number += 1
        block = verification.block(step_inputs, steps)
        paths = []
        for inputs in block:
            tokens, path = comparison.draft(draft.predict(canvas, inputs), inputs.positions)
            canvas.write(inputs.positions, tokens, number)
            paths.append(path)
        width = verification.group_width
        positions = torch.cat([_padded(inputs.positions, width) for inputs in block], 1)  # [B, G * P]
        tokens, decision = comparison.verify(
            verification.predict(canvas, block, positions),
            _beside(paths, canvas.batch, width),
            positions,
            _resample_noise(comparison.target_noise, number, positions.shape[1]),
        )
        accepted = decision.accepted.view(positions.shape)
        kept = verification.keep(positions, accepted, len(block))
        canvas.write(kept.positions, tokens, number)
        if kept.taken_back is not None:
            canvas.write(kept.taken_back, torch.zeros_like(tokens), 0)
        active, valid = (positions >= 0).any(1), kept.positions >= 0
        stats.passes += active
        stats.attempts += active
        verified += valid.sum(1)
        stats.accepted += (valid & accepted).sum(1)
        steps = [min(len(step_inputs), s + n) for s, n in zip(steps, kept.groups, strict=True)]
        if on_step is not None:
            progress = sum(steps) / (canvas.batch * len(step_inputs))
            on_step(Step(number, progress, kept.positions, canvas))
    stats.draft_passes, stats.verified = draft.reads, verified
    return stats


def _prefill(
    target: MaskedSession,
    canvas: Canvas,
    step_inputs: Sequence[MaskedInputs],
    comparison: Comparison,
    share: float,
    on_step: OnStep | None,
) -> tuple[SpeculationStats, int]:
    """Let the target decide the iterations up to `share` times their number, the first always; how many these are."""
    stats = SpeculationStats.start(canvas.batch, canvas.written.device)
    count = min(len(step_inputs), int(share * len(step_inputs)) + 1)
    for number, inputs in enumerate(step_inputs[:count], start=1):
        distribution = target.predict(canvas, inputs)
        canvas.write(inputs.positions, comparison.target_noise.sample(distribution, inputs.positions), number)
        stats.passes += 1
        if on_step is not None:
            on_step(Step(number, number / len(step_inputs), inputs.positions, canvas))
    return stats, count


def _beside(paths: list[Denoised], batch: int, width: int) -> Denoised:
    """Paths of groups, each of B * P_i rows, as paths of one group; every group is filled up to `width` with zeros."""

    def joined(name: str) -> Tensor:
        parts = [getattr(p, name).unflatten(0, (batch, -1)) for p in paths]
        filled = [F.pad(part, (0, 0, 0, max(0, width - part.shape[1]))) for part in parts]
        return torch.cat(filled, 1).flatten(0, 1)

    return Denoised(joined("value"), joined("mean"), joined("log_std"), joined("log_std_sum"))


def _padded(index: Tensor, width: int) -> Tensor:
    """Positions [B, P], filled up to `width` with -1."""
    return F.pad(index, (0, max(0, width - index.shape[1])), value=-1)


def _resample_noise(noise: TokenNoise, verification: int, rows: int) -> SeededResampleNoise:
    """Numbers for tokens that are drawn again: a function of the image and of how often it was verified before.

    Args:
        rows: verified per image, padding included; must not depend on the batch.
    """
    seeds = [(seed + 1 + verification) % 2**62 for seed in noise.seeds]
    return SeededResampleNoise(seeds, rows, noise.start.shape[2], noise.start.device)
