"""Constants of the denoising process of a diffusion head: noise schedules and their respacing.

Source: Ho et al. 2020 (arXiv 2006.11239) and Nichol & Dhariwal 2021 (arXiv 2102.09672), as MAR (arXiv 2406.11838,
section 3.2) uses them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from varaccel.errors import InputError, unknown_name
from varaccel.nn.devices import HOST

NoiseSchedule = Literal["cosine", "linear"]
TRAINING_STEPS = 1000


def _cosine(count: int) -> Tensor:
    """Betas of the cosine schedule (2102.09672, section 3.2), capped at 0.999."""

    def level(share: float) -> float:
        return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

    return torch.tensor(
        [min(1 - level((i + 1) / count) / level(i / count), 0.999) for i in range(count)],
        dtype=torch.float64,
        device=HOST,
    )


def _linear(count: int) -> Tensor:
    """Betas of the linear schedule (2006.11239, section 4). Its last step forgives: it multiplies errors of the
    network by less than 2, where the cosine schedule multiplies them by hundreds, see `DiffusionSchedule`."""
    scale = 1000 / count
    return torch.linspace(scale * 1e-4, scale * 0.02, count, dtype=torch.float64, device=HOST)


_BETAS: dict[str, Callable[[int], Tensor]] = {"cosine": _cosine, "linear": _linear}


@dataclass(frozen=True, eq=False)
class DiffusionSchedule:
    """A process of n denoising steps, k = n - 1 ... 0, respaced from the 1000 that a head was trained on.

    All tables are float64, [n], on the CPU. In float32 the cumulated product of the last step of the cosine schedule,
    2.4e-9, would be off by 1e-5, and everything at that step is divided by its root.

    That first step is delicate in any case: with the cosine schedule an error of the predicted noise is multiplied
    by (alpha_bar_next / alpha_bar_last)^½, 312 for n = 100 and 3500 for n = 10.

    Attributes:
        timesteps: int64, what the network is told at step k.
        alphas_cumprod: after step k.
        betas: of step k.
        noise_scale, inverse_scale: x0 = inverse_scale x - noise_scale eps.
        mean_start, mean_noisy: posterior mean = mean_start x0 + mean_noisy x.
        log_beta, log_posterior: largest and smallest log-variance; the latter at index 0 is that of index 1.
    """

    timesteps: Tensor
    alphas_cumprod: Tensor
    betas: Tensor
    noise_scale: Tensor
    inverse_scale: Tensor
    mean_start: Tensor
    mean_noisy: Tensor
    log_beta: Tensor
    log_posterior: Tensor

    @property
    def steps(self) -> int:
        """Number n of denoising steps."""
        return len(self.timesteps)

    @classmethod
    def respaced(cls, steps: int = 100, kind: NoiseSchedule = "cosine") -> DiffusionSchedule:
        """The process of `steps` steps, at equal distances from the first to the last of the 1000.

        Raises:
            InputError: an unknown schedule, or not 1 to 1000 steps.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise InputError(f"head_steps must be an integer of at least 1, got {steps!r}.")
        if steps > TRAINING_STEPS:
            raise InputError(f"head_steps must be at most {TRAINING_STEPS}, got {steps}.")
        if kind not in _BETAS:
            raise unknown_name("noise_schedule", kind, _BETAS)
        return _respaced(steps, kind)

    @classmethod
    def trained(cls, kind: NoiseSchedule = "cosine") -> DiffusionSchedule:
        """All 1000 steps: what a head is trained on."""
        return cls.respaced(TRAINING_STEPS, kind)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # the tables outlive the call, which may run in that mode
def _respaced(steps: int, kind: str) -> DiffusionSchedule:
    full = torch.cumprod(1 - _BETAS[kind](TRAINING_STEPS), 0)
    last = TRAINING_STEPS - 1
    chosen = [0] if steps == 1 else [round(k * last / (steps - 1)) for k in range(steps)]
    timesteps = torch.tensor(chosen, dtype=torch.int64, device=HOST)
    kept = full[timesteps]
    one = torch.ones(1, dtype=torch.float64, device=HOST)
    betas = 1 - kept / torch.cat([one, kept[:-1]])
    # not `kept`: the published code takes this way, and the two differ by 1e-9 where there is almost only noise
    cumprod = torch.cumprod(1 - betas, 0)
    before = torch.cat([one, cumprod[:-1]])
    posterior = betas * (1 - before) / (1 - cumprod)
    # there is no noise before the first step, so its variance is 0 and has no logarithm
    smallest = torch.cat([posterior[1:2], posterior[1:]]) if steps > 1 else betas
    return DiffusionSchedule(
        timesteps,
        cumprod,
        betas,
        noise_scale=(1 / cumprod - 1).sqrt(),
        inverse_scale=(1 / cumprod).sqrt(),
        mean_start=betas * before.sqrt() / (1 - cumprod),
        mean_noisy=(1 - before) * (1 - betas).sqrt() / (1 - cumprod),
        log_beta=betas.log(),
        log_posterior=smallest.log(),
    )
