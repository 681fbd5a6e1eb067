"""Speculation over groups of continuous tokens: a small model decides some groups, the large one judges them.

The loop of `speculation` is made for causal networks: guesses stand in slots and trees, and the distribution
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
from varaccel.speculation.continuous_rejection import (
    Aligned,
    ContinuousRule,
    Decision,
    Gaussian,
    SeededResampleNoise,
)


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
        sigma = (drafted.log_std_sum - path.log_std_sum).double().sum(-1)
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
def speculate_jointly(
    target: MaskedSession,
    draft: MaskedSession,
    canvas: Canvas,
    order: CosineGroups,
    comparison: Comparison,
    *,
    draft_length: int,
    prefill: float,
    on_step: OnStep | None = None,
) -> SpeculationStats:
    """Fill the canvas; all drafted groups of a block are judged in one pass that sees none of them.

    What is decided is decided for good, so that the number of passes does not depend on what is accepted. The target's
    distribution of a block is that of deciding all its groups at once: plain decoding with fewer iterations.

    Source: the published code of continuous speculative decoding (arXiv 2411.11925): the target decides iterations up
    to `prefill` times their number, blocks end at multiples of `draft_length`, and guidance of a block is that of its
    last iteration.
    """
    step_inputs = order.step_inputs(canvas)
    stats, number = _prefill(target, canvas, step_inputs, comparison, prefill, on_step)
    verified = torch.zeros_like(stats.passes)
    block: list[MaskedInputs] = []
    paths: list[Denoised] = []
    for step in range(number, len(step_inputs)):
        inputs = step_inputs[step]
        tokens, path = comparison.draft(draft.predict(canvas, inputs), inputs.positions)
        canvas.write(inputs.positions, tokens, number + 1)
        block.append(inputs)
        paths.append(path)
        if step % draft_length and step < len(step_inputs) - 1:
            continue
        number += 1
        decided = MaskedInputs(
            torch.cat([f.positions for f in block], 1), block[0].known, inputs.remaining, block[0].number
        )
        tokens, decision = comparison.verify(
            target.predict(canvas, decided),
            _beside(paths, canvas.batch),
            decided.positions,
            _resample_noise(comparison.target_noise, number, decided.positions.shape[1]),
        )
        canvas.write(decided.positions, tokens, number)
        stats.passes += 1
        stats.attempts += 1
        verified += decided.positions.shape[1]
        stats.accepted += decision.accepted.view(canvas.batch, -1).sum(1)
        block, paths = [], []
        if on_step is not None:
            on_step(Step(number, (step + 1) / len(step_inputs), decided.positions, canvas))
    stats.draft_passes, stats.verified = draft.reads, verified
    return stats


@torch.inference_mode()
def speculate_in_turn(
    target: MaskedSession,
    verifier: MaskedSession,
    draft: MaskedSession,
    canvas: Canvas,
    order: CosineGroups,
    comparison: Comparison,
    *,
    draft_length: int,
    prefill: float,
    on_step: OnStep | None = None,
) -> SpeculationStats:
    """Fill the canvas; every drafted group is judged in sight of those before it, up to the first rejection.

    A block of `draft_length` groups costs one pass over as many canvases per image: attention looks both ways, so
    nothing of one serves another. Groups after one with a rejected token are drafted again. Images advance at their
    own pace. The device is asked once per block how far they are.

    The distribution is the target's if a kept token is what later groups of its block were drafted and judged
    in sight of: if tokens themselves are compared (`Comparison.step` 0) by a rule that keeps the target's distribution.

    Args:
        target: for the iterations that it decides itself.
        verifier: a session of the same network with `draft_length` canvases per image.
    """
    step_inputs = order.step_inputs(canvas)
    batch, device = canvas.batch, canvas.written.device
    stats, number = _prefill(target, canvas, step_inputs, comparison, prefill, on_step)
    verified = torch.zeros_like(stats.passes)
    steps = [number] * batch
    while min(steps) < len(step_inputs):
        number += 1
        block = [order.ragged([s + i for s in steps], device) for i in range(draft_length)]
        paths = []
        for inputs in block:
            tokens, path = comparison.draft(draft.predict(canvas, inputs), inputs.positions)
            canvas.write(inputs.positions, tokens, number)
            paths.append(path)
        positions = _stack([f.positions for f in block], order.widest)  # [B, G, P]
        distribution = _verify(verifier, canvas, block, positions)
        flat = positions.flatten(1)
        resample_noise = _resample_noise(comparison.target_noise, number, flat.shape[1])
        tokens, decision = comparison.verify(
            distribution, _beside(paths, batch, positions.shape[2]), flat, resample_noise
        )
        accepted = decision.accepted.view(positions.shape)
        broken = (~accepted).any(2).to(torch.int64)  # [B, G]
        # all groups before the first that broke, and that one
        before = broken.cumsum(1) - broken
        kept = (before == 0).unsqueeze(2) & (positions >= 0)
        canvas.write(torch.where(kept, positions, -1).flatten(1), tokens, number)
        # what was drafted after them is taken back
        canvas.write(torch.where(kept, -1, positions).flatten(1), torch.zeros_like(tokens), 0)
        stats.passes += (positions >= 0).any(2).any(1)
        stats.attempts += (positions >= 0).any(2).any(1)
        verified += kept.sum((1, 2))
        stats.accepted += (kept & accepted).sum((1, 2))
        advanced = (before == 0).sum(1).tolist()
        steps = [min(len(step_inputs), s + n) for s, n in zip(steps, advanced, strict=True)]
        if on_step is not None:
            progress = sum(steps) / (batch * len(step_inputs))
            on_step(Step(number, progress, torch.where(kept, positions, -1).flatten(1), canvas))
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


def _beside(paths: list[Denoised], batch: int, width: int = 0) -> Denoised:
    """Paths of groups, each of B * P_i rows, as paths of one group; every group is filled up to `width` with zeros."""

    def joined(name: str) -> Tensor:
        parts = [getattr(p, name).unflatten(0, (batch, -1)) for p in paths]
        filled = [F.pad(part, (0, 0, 0, max(0, width - part.shape[1]))) for part in parts]
        return torch.cat(filled, 1).flatten(0, 1)

    return Denoised(joined("value"), joined("mean"), joined("log_std"), joined("log_std_sum"))


def _stack(indices: list[Tensor], width: int) -> Tensor:
    """Lists of positions [B, P_i] as [B, G, width], padded with -1."""
    return torch.stack([F.pad(index, (0, width - index.shape[1]), value=-1) for index in indices], 1)


def _verify(
    verifier: MaskedSession, canvas: Canvas, block: list[MaskedInputs], positions: Tensor
) -> DiffusionDistribution:
    """The target's distribution of all groups, [B, G * P], each in sight of what was known when it was drafted."""
    groups = len(block)
    known = _stack([f.known for f in block], max(f.known.shape[1] for f in block))  # [B, G, K]
    remaining = torch.stack([torch.as_tensor(f.remaining, device=known.device) for f in block], 1)  # [B, G]
    many = Canvas(canvas.tokens.repeat_interleave(groups, 0), canvas.written.repeat_interleave(groups, 0))
    inputs = MaskedInputs(
        positions.flatten(0, 1), known.flatten(0, 1), remaining.flatten(), block[0].number, padded=True
    )
    distribution = verifier.predict(many, inputs)
    conditions = distribution.conditions.unflatten(0, (-1, groups)).flatten(1, 2)  # [R, G * P, D]
    return DiffusionDistribution(distribution.process, conditions, distribution.scale)


def _resample_noise(noise: TokenNoise, verification: int, rows: int) -> SeededResampleNoise:
    """Numbers for tokens that are drawn again: a function of the image and of how often it was judged before.

    Args:
        rows: judged per image, padding included; must not depend on the batch.
    """
    seeds = [(seed + 1 + verification) % 2**62 for seed in noise.seeds]
    return SeededResampleNoise(seeds, rows, noise.start.shape[2], noise.start.device)
