"""The step loop of a diffusion head, over all tokens of a pass at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


def step_coefficients(table: Tensor) -> Tensor:
    """The step table with what follows from a step's output multiplied out, [n, 7] float64 of [n, 7] float64.

    With noise eps and place p of the variance, the next token is A x + B eps + e x0_before with x0 = a x - b eps, and
    its log standard deviation is F p + G: columns A, B, F, G, e, a, b.
    """
    inverse, scale, start, noisy, largest, smallest, earlier = table.unbind(1)
    deviation = ((largest - smallest) / 4, (largest + smallest) / 4)
    return torch.stack([start * inverse + noisy, -start * scale, *deviation, earlier, inverse, scale], 1)


Coefficients = Sequence[float] | Tensor
"""One row of `step_coefficients`, as numbers or as a tensor [7]."""


def denoising_step(
    head: DiffusionHead,
    x: Tensor,
    modulations: Sequence[Tensor],
    row: Coefficients,
    scale: Tensor | None,
    before: Tensor | None,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One step of M tokens.

    Args:
        x: [M, C] float32.
        modulations: of this step, R = M rows, or 2 M with guidance: [conditional; unconditional].
        row: of this step.
        scale: [M, 2 C] guidance scale of the noise, and 1 for the places of the variance, which are those of the
            conditional rows, as published. None without guidance.
        before: [M, C], x0 of the step before, None where it does not count.
        keep: also work out x0.

    Returns:
        mean of the next token, place of its variance, and x0 or None, [M, C] float32.
    """
    output = head.step(x, modulations)
    if scale is not None:
        conditional, unconditional = output.chunk(2)
        output = torch.lerp(unconditional, conditional, scale)
    noise, place = output.chunk(2, -1)
    mean = row[0] * x + row[1] * noise
    if before is not None:
        mean = mean + row[4] * before
    return mean, place, row[5] * x - row[6] * noise if keep else None


Step = Callable[..., tuple[Tensor, Tensor, Tensor | None]]
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
        table: n rows of `step_coefficients`, numbers or float32 tensors as `step` takes them.
        step: `denoising_step`, or a compiled version of it.
        loop: replaces `run_eagerly`, such as a `GraphedLoop`.
    """

    head: DiffusionHead
    sampling: HeadSampling
    times: Tensor
    table: Sequence[Coefficients]
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
        timesteps, numbers = _tables(sampling.steps, kind, sampling.sampler, device)
        # a compiled step would be compiled anew for every number
        table: Sequence[Coefficients] = numbers
        if step is not denoising_step:
            rows = torch.tensor(numbers, dtype=torch.float32).to(device)
            table = rows.unbind()
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
        mean, place = x, total
        start: Tensor | None = None
        keep = self.sampling.sampler == "dpm++"
        temperature = self.sampling.temperature
        if scale is not None:
            scale = torch.cat([scale.expand_as(x), torch.ones_like(x)], 1)
        together = self._together(embedded)
        for top in range(first, last - 1, -together):
            bottom = max(last, top - together + 1)
            modulations = self.head.modulations(self.times[bottom : top + 1], embedded)
            parts = list(zip(*(part.unbind() for part in modulations), strict=True))
            for k in range(top, bottom - 1, -1):
                row = self.table[k]
                mean, place, start = self.step(
                    self.head, x, parts[k - bottom], row, scale, start if keep else None, keep
                )
                x = mean
                if record and k:
                    total = total + (place * row[2] + row[3])
                if noise is not None and (k or self.sampling.final_noise):
                    deviation = (place * row[2] + row[3]).exp()
                    x = torch.addcmul(mean, deviation, noise[k], value=temperature)
        log_std = place * self.table[last][2] + (self.table[last][3] + math.log(temperature))
        return Denoised(x, mean, log_std, total)

    def _together(self, embedded: Tensor) -> int:
        """How many steps share one matrix product for what follows from the condition."""
        outputs = (3 * self.head.depth + 2) * self.head.width
        size = embedded.shape[0] * outputs * embedded.element_size()
        limit = HOST_MODULATION_BYTES if is_host(embedded.device) else DEVICE_MODULATION_BYTES
        return max(1, min(self.steps, limit // max(1, size)))


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # the time steps outlive the call, which may run in that mode
def _tables(
    steps: int, kind: NoiseSchedule, sampler: Sampler, device: torch.device
) -> tuple[Tensor, list[list[float]]]:
    schedule = DiffusionSchedule.respaced(steps, kind)
    return schedule.timesteps.to(device), step_coefficients(step_table(schedule, sampler)).tolist()
