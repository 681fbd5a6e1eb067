"""What a diffusion head says about positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from varaccel.hosts.masked.denoising import Denoised, Process


@dataclass(frozen=True)
class DiffusionDistribution:
    """The distribution of P tokens of B images, given by what a head is told about them.

    It can be sampled; the density of a token is not known, only that of the steps of a denoising path.

    Attributes:
        process: the head and its steps.
        conditions: [R, P, D], R = B, or 2 B with guidance: [conditional; unconditional].
        scale: [B * P, 1] guidance scales, None without guidance.
        see: is shown what the head gives, [B * P, C].
    """

    process: Process
    conditions: Tensor
    scale: Tensor | None = None
    see: Callable[[Tensor], None] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """B and P."""
        rows, count = self.conditions.shape[:2]
        return (rows if self.scale is None else rows // 2), count

    @property
    def noisy_steps(self) -> int | None:
        """Denoising steps n, None if they add no noise."""
        return self.process.steps if self.process.sampling.noisy else None

    def sample(self, start: Tensor, noise: Tensor | None) -> Tensor:
        """Tokens [B, P, C] from noise: [B * P, C] to start from, and [n, B * P, C] of the steps."""
        return self.run(start, noise).value.unflatten(0, self.shape)

    def run(
        self,
        x: Tensor,
        noise: Tensor | None,
        *,
        first: int | None = None,
        last: int = 0,
        record: bool = False,
    ) -> Denoised:
        """Some steps of the path, see `Process.run`; [B * P, C] everywhere."""
        conditions = self.conditions.flatten(0, 1)
        denoised = self.process.run(conditions, x, noise, self.scale, first=first, last=last, record=record)
        if self.see is not None:
            self.see(denoised.value)
        return denoised
