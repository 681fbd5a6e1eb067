"""The published MAR loop, rewritten without any of this library's optimisations: what its engine is compared with.

Every iteration embeds the condition anew, runs the whole decoder and its last layer over all positions, and then the
head: a hundred times the whole network, time embedding, condition and modulation included, over a doubled batch in
which both halves hold the same tokens. The weights are those of a `MARTransformer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from varaccel.engine.stopwatch import Stopwatch
from varaccel.hosts.masked.denoising import HeadSampling, step_table
from varaccel.hosts.masked.guidance import MaskedGuidance
from varaccel.hosts.masked.noise import TokenNoise
from varaccel.hosts.masked.schedule import CosineGroups
from varaccel.models.mar import MARTransformer
from varaccel.nn.gather import rows_of
from varaccel.nn.noise_schedule import DiffusionSchedule


@dataclass(frozen=True)
class Shares:
    """Seconds that a call spent.

    Attributes:
        transformer: in encoder and decoder.
        head: in the diffusion head.
    """

    transformer: float
    head: float

    @property
    def total(self) -> float:
        return self.transformer + self.head

    @property
    def head_share(self) -> float:
        """Part of the time that the head took, 0 to 1."""
        return self.head / self.total


def _steps(
    model: MARTransformer, sampling: HeadSampling, conditions: Tensor, x: Tensor, noise: Tensor, scale: float
) -> Tensor:
    """Denoise [M, C] under [2 M, D], guided, one whole pass of the head per step."""
    schedule = DiffusionSchedule.respaced(sampling.steps, model.config.noise_schedule)
    table = step_table(schedule, sampling.sampler)
    both = torch.cat([x, x])
    doubled = torch.cat([noise, noise], 1)
    for k in reversed(range(sampling.steps)):
        inverse, spread, start, noisy, high, low, _ = (float(v) for v in table[k])
        half = both[: len(x)]
        timesteps = torch.full((len(both),), int(schedule.timesteps[k]), device=x.device)
        predicted, place = model.head(torch.cat([half, half]), timesteps, conditions).chunk(2, -1)
        conditional, unconditional = predicted.chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        predicted = torch.cat([guided, guided])
        mean = start * (inverse * both - spread * predicted) + noisy * both
        share = (place + 1) / 2
        std = (0.5 * (share * high + (1 - share) * low)).exp()
        both = mean + (k > 0) * std * doubled[k] * sampling.temperature
    return both[: len(x)]


@torch.inference_mode()
def published_loop(
    model: MARTransformer,
    condition: Tensor,
    condition_mask: Tensor | None,
    noise: TokenNoise,
    *,
    guidance: MaskedGuidance,
    sampling: HeadSampling,
    iterations: int,
) -> tuple[Tensor, Shares]:
    """Draw guided images as the published code does, from given noise.

    Args:
        condition: labels [B], or text features [B, T, C] with `condition_mask` [B, T].
        noise: order and noise of every image.
        guidance: must be on.
        sampling: ddpm.

    Returns:
        tokens [B, N, C], and where the time went.
    """
    batch, count, channels = noise.start.shape
    tokens = torch.zeros_like(noise.start)
    order = CosineGroups(noise.permutation, iterations)
    noise.steps(sampling.steps)  # drawn before the watch runs, as ours are
    seconds = {"transformer": 0.0, "head": 0.0}
    for before, after in pairwise(order.borders):
        clock = Stopwatch(tokens.device)
        known, asked = order.permutation[:, before:].sort(1).values, order.permutation[:, after:before]
        slots = model.embed_condition(condition, condition_mask)
        slots = torch.cat([slots, model.null_condition().expand(batch, model.buffer, -1)])
        seen = rows_of(tokens, known).repeat(2, 1, 1)
        z = model(slots, seen, known.repeat(2, 1))  # [2 B, N, D], of all positions
        z = rows_of(z, asked.repeat(2, 1)).flatten(0, 1)
        clock.lap("transformer")
        start, path = noise.paths(asked, sampling.steps)
        assert path is not None
        scale = float(guidance.at((count - max(1, after)) / count))
        drawn = _steps(model, sampling, z, start, path, scale)
        tokens.scatter_(1, asked.unsqueeze(-1).expand(-1, -1, channels), drawn.unflatten(0, (batch, -1)))
        clock.lap("head")
        for name, value in clock.laps.items():
            seconds[name] += value
    return tokens, Shares(**seconds)


@torch.inference_mode()
def our_shares(
    model: MARTransformer,
    condition: Tensor,
    condition_mask: Tensor | None,
    noise: TokenNoise,
    *,
    guidance: MaskedGuidance,
    sampling: HeadSampling,
    iterations: int,
    options: dict[str, object] | None = None,
) -> tuple[Tensor, Shares]:
    """The same images by this library's session, with a stop of the watch between transformer and head.

    Args:
        options: of the session, such as compiled functions.
    """
    from varaccel.engine.canvas import Canvas
    from varaccel.hosts.masked.session import MaskedSession
    from varaccel.nn.condition import Condition

    batch, count, channels = noise.start.shape
    canvas = Canvas.empty(batch, count, channels=channels, device=noise.start.device)
    chosen: dict[str, object] = {"guidance": guidance, "sampling": sampling, **(options or {})}
    session = MaskedSession(model, Condition(condition, condition_mask), batch=batch, **chosen)  # type: ignore[arg-type]
    seconds = {"transformer": 0.0, "head": 0.0}
    for number, inputs in enumerate(CosineGroups(noise.permutation, iterations).step_inputs(canvas), 1):
        clock = Stopwatch(canvas.tokens.device)
        distribution = session.predict(canvas, inputs)
        clock.lap("transformer")
        canvas.write(inputs.positions, noise.sample(distribution, inputs.positions), number)
        clock.lap("head")
        for name, value in clock.laps.items():
            seconds[name] += value
    return canvas.tokens, Shares(**seconds)
