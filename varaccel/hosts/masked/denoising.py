"""The step loop of a diffusion head, over all tokens of a pass at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from varaccel.engine.options import check_choice, check_flag, check_integer, check_number, settle
from varaccel.errors import InputError
from varaccel.nn.devices import is_host
from varaccel.nn.noise_schedule import TRAINING_STEPS, DiffusionSchedule, NoiseSchedule

if TYPE_CHECKING:  # models import decoding
    from varaccel.models.diffusion_head import DiffusionHead

Sampler = Literal["ddpm", "ddim", "dpm++"]

HOST_MODULATION_BYTES, DEVICE_MODULATION_BYTES = 32 << 20, 1 << 30
"""How much memory the modulations of the steps that are worked out together may take."""


@dataclass(frozen=True)
class HeadSampling:
    """How tokens are drawn from a diffusion head.

    Attributes:
        steps: n, denoising steps.
        temperature: factor on the standard deviation of every step's noise, not on the noise that a token starts
            from (MAR, section 3.2).
        sampler: "ddpm" as published; "ddim" (arXiv 2010.02502, eta = 0) and "dpm++" (DPM-Solver++ 2M, arXiv
            2211.01095) add no noise and follow the distribution of the head only in the limit of many steps.
        final_noise: also add the noise of the last step, which published samplers leave out. Only then does a token
            have a density given the step before.

    Raises:
        InputError: steps below 1 or above 1000, temperature not a positive number, an unknown sampler, or options of
            noise for a sampler that adds none.
    """

    steps: int = 100
    temperature: float = 1.0
    sampler: Sampler = "ddpm"
    final_noise: bool = False

    def __post_init__(self) -> None:
        temperature = check_number("temperature of a diffusion head", self.temperature, above=True)
        steps = check_integer("head_steps", self.steps, most=TRAINING_STEPS)
        settle(
            self,
            steps=steps,
            temperature=temperature,
            final_noise=check_flag("final_noise", self.final_noise),
        )
        check_choice("head_sampler", self.sampler, get_args(Sampler))
        if not self.noisy and (self.final_noise or self.temperature != 1):
            raise InputError(
                f"head_sampler {self.sampler!r} adds no noise, so temperature must be 1 and final_noise off; "
                "choose ddpm."
            )

    @property
    def noisy(self) -> bool:
        """Whether steps add noise."""
        return self.sampler == "ddpm"


def step_table(schedule: DiffusionSchedule, sampler: Sampler) -> Tensor:
    """What the steps of a sampler compute, [n, 7] float64.

    With x0 = a x - b eps, the next token is c x0 + d x + e x0_before, plus noise whose log-variance lies between f and
    g: columns a, b, c, d, f, g, e. x0_before is that of the step before.
    """
    cumprod = schedule.alphas_cumprod
    before = torch.cat([torch.ones_like(cumprod[:1]), cumprod[:-1]])  # after the step: towards k = 0
    start, noisy, earlier = schedule.mean_start, schedule.mean_noisy, torch.zeros_like(cumprod)
    if sampler != "ddpm":
        noisy = ((1 - before) / (1 - cumprod)).sqrt()
        start = before.sqrt() - noisy * cumprod.sqrt()
    if sampler == "dpm++" and schedule.steps > 2:
        half_snr = (cumprod.log() - (1 - cumprod).log()) / 2  # rises towards k = 0
        gaps = half_snr[:-1] - half_snr[1:]  # entry k: from step k + 1 to step k
        # extrapolate x0 from the two last ones; neither in the first step nor in the last, which goes to no noise
        share = gaps[:-1] / gaps[1:] / 2  # of step k = 1 ... n - 2
        weight = torch.zeros_like(cumprod)
        weight[1:-1] = share
        start, earlier = start * (1 + weight), -start * weight
    columns = (schedule.inverse_scale, schedule.noise_scale, start, noisy, schedule.log_beta)
    return torch.stack([*columns, schedule.log_posterior, earlier], 1)


def denoising_step(
    head: DiffusionHead,
    x: Tensor,
    modulations: list[Tensor],
    row: Tensor,
    scale: Tensor | None,
    before: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of M tokens.

    Args:
        x: [M, C] float32.
        modulations: of this step, R = M rows, or 2 M with guidance: [conditional; unconditional].
        row: [7] of the step table, float32.
        scale: [M, 1] guidance scale, None without guidance.
        before: [M, C], x0 of the step before, None where it does not count.

    Returns:
        mean and log-variance of the next token, and x0, [M, C] float32. The variance is that of the conditional rows,
        as published.
    """
    noise, place = head.step(x, modulations)
    if scale is not None:
        conditional, unconditional = noise.chunk(2)
        noise = unconditional + scale * (conditional - unconditional)
        place = place[: x.shape[0]]
    start = row[0] * x - row[1] * noise
    mean = row[2] * start + row[3] * x
    if before is not None:
        mean = mean + row[6] * before
    share = (place + 1) / 2
    return mean, share * row[4] + (1 - share) * row[5], start


Step = Callable[..., tuple[Tensor, Tensor, Tensor]]
Loop = Callable[["Process", Tensor, Tensor, "Tensor | None", "Tensor | None", int, int, bool], "Denoised"]
"""The arguments of `Process.run_eagerly`, its process first."""


@dataclass(frozen=True)
class Denoised:
    """Where M tokens are after some steps, each [M, C] float32.

    Attributes:
        value: after the last of the steps.
        mean, log_std: of the distribution that the last step drew from; log_std includes the temperature.
        log_std_sum: sum of the log standard deviations of the steps k >= 1 that were run, without the temperature.
            Zero unless it was asked for.
    """

    value: Tensor
    mean: Tensor
    log_std: Tensor
    log_std_sum: Tensor


@dataclass(frozen=True)
class Process:
    """A head and its denoising process, ready for a call: what depends on neither token nor condition.

    Attributes:
        head: the network.
        sampling: how to draw.
        times: [n, 1, width], embedded time steps.
        table: [n, 7] float32, see `step_table`.
        step: `denoising_step`, or a compiled version of it.
        loop: replaces `run_eagerly`, such as a `GraphedLoop`.
    """

    head: DiffusionHead
    sampling: HeadSampling
    times: Tensor
    table: Tensor
    step: Step = denoising_step
    loop: Loop | None = None

    @classmethod
    def of(
        cls,
        head: DiffusionHead,
        kind: NoiseSchedule,
        sampling: HeadSampling,
        step: Step = denoising_step,
        loop: Loop | None = None,
    ) -> Process:
        """The process of a head that was trained on the schedule `kind`, on the head's device."""
        device = head.input_proj.weight.device
        timesteps, table = _tables(sampling.steps, kind, sampling.sampler, device)
        return cls(head, sampling, head.time_embed(timesteps).unsqueeze(1), table, step, loop)

    @property
    def steps(self) -> int:
        return self.sampling.steps

    def run(
        self,
        conditions: Tensor,
        x: Tensor,
        noise: Tensor | None,
        scale: Tensor | None = None,
        *,
        first: int | None = None,
        last: int = 0,
        record: bool = False,
    ) -> Denoised:
        """Run the steps k = first ... last on M tokens, in the `loop` of the process if it has one.

        Nothing waits for the device, and nothing is drawn.

        Args:
            conditions: [R, D], R = M, or 2 M with guidance: [conditional; unconditional].
            x: [M, C] before step `first`; pure noise before step n - 1.
            noise: [n, M, C] standard normal, entry k is added in step k; None for samplers without noise.
            scale: [M, 1] guidance scale, None without guidance.
            first: n - 1 if None.
            last: at least 0.
            record: keep `log_std_sum`.
        """
        path = (self.steps - 1 if first is None else first, last, record)
        if self.loop is not None:
            return self.loop(self, conditions, x, noise, scale, *path)
        return self.run_eagerly(conditions, x, noise, scale, *path)

    def run_eagerly(
        self,
        conditions: Tensor,
        x: Tensor,
        noise: Tensor | None,
        scale: Tensor | None,
        first: int,
        last: int,
        record: bool,
    ) -> Denoised:
        """`run`, step by step: what every other loop must equal."""
        embedded = self.head.cond_embed(conditions.to(self.head.cond_embed.weight.dtype))
        x = x.float()
        total = torch.zeros_like(x)
        mean, log_variance = x, total
        start: Tensor | None = None
        keep = self.sampling.sampler == "dpm++"
        together = self._together(embedded)
        for top in range(first, last - 1, -together):
            bottom = max(last, top - together + 1)
            modulations = self.head.modulations(self.times[bottom : top + 1], embedded)
            for k in range(top, bottom - 1, -1):
                here = [part[k - bottom] for part in modulations]
                mean, log_variance, start = self.step(
                    self.head, x, here, self.table[k], scale, start if keep else None
                )
                if record and k:
                    total = total + log_variance / 2
                x = mean
                if noise is not None and (k or self.sampling.final_noise):
                    x = torch.addcmul(
                        mean, (log_variance / 2).exp(), noise[k], value=self.sampling.temperature
                    )
        log_std = log_variance / 2 + math.log(self.sampling.temperature)
        return Denoised(x, mean, log_std, total)

    def _together(self, embedded: Tensor) -> int:
        """How many steps share one matrix product for what follows from the condition."""
        outputs = (3 * self.head.depth + 2) * self.head.width
        size = embedded.shape[0] * outputs * embedded.element_size()
        limit = HOST_MODULATION_BYTES if is_host(embedded.device) else DEVICE_MODULATION_BYTES
        return max(1, min(self.steps, limit // max(1, size)))


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # the tables outlive the call, which may run in that mode
def _tables(steps: int, kind: NoiseSchedule, sampler: Sampler, device: torch.device) -> tuple[Tensor, Tensor]:
    schedule = DiffusionSchedule.respaced(steps, kind)
    return schedule.timesteps.to(device), step_table(schedule, sampler).float().to(device)
