"""The diffusion head of MAR: a small residual network that denoises one token under a condition.

Source: Li et al. 2024, "Autoregressive Image Generation without Vector Quantization" (arXiv 2406.11838), section 3.2.
Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCIES = 256
"""Width of the sinusoidal embedding of a time step."""


def time_frequencies(timesteps: Tensor) -> Tensor:
    """Sinusoidal embedding [T, 256] float32 of time steps [T]: cosines, then sines."""
    half = FREQUENCIES // 2
    # multiplied before it is divided, as published: angles reach 1000, where the order shows
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float().unsqueeze(1) * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], 1)


class TimeEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        """[T] -> [T, width]."""
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        return self.mlp(time_frequencies(timesteps).to(first.weight.dtype))


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, shift: Tensor, factor: Tensor, gate: Tensor) -> Tensor:
        """[R, width] -> same; `shift`, `factor` = 1 + scale and `gate`, [R, width], modulate it."""
        return torch.addcmul(x, gate, self.mlp(torch.addcmul(shift, self.in_ln(x), factor)))


class FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
        """[R, width] -> [R, outputs]; `shift` and `factor` = 1 + scale, [R, width], modulate it."""
        return self.linear(torch.addcmul(shift, F.layer_norm(x, (self.width,), eps=1e-6), factor))


class DiffusionHead(nn.Module):
    """Predicts the noise in a token and where its variance stands.

    What a step needs of the condition does not depend on the token that is denoised, so that it can be worked out
    for all steps at once (`modulations`): that is more than half of the network.

    Args:
        channels: C, numbers per token.
        condition_dim: width of the conditions.
        depth, width: number and width of the residual blocks.
    """

    def __init__(self, channels: int, condition_dim: int, depth: int, width: int) -> None:
        super().__init__()
        self.channels, self.depth, self.width = channels, depth, width
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(condition_dim, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)

    def modulations(self, times: Tensor, conditions: Tensor) -> list[Tensor]:
        """Everything in the steps that follows from time and condition alone.

        Args:
            times: [T, 1, width] or anything that adds to `conditions`, from `time_embed`.
            conditions: [R, width], from `cond_embed`.

        Returns:
            [T, R, width] each: shift, 1 + scale and gate of every block, shift and 1 + scale of the final layer.
        """
        hidden = F.silu(times + conditions)
        blocks = cast(Iterable[ResidualBlock], self.res_blocks)
        layers = [block.adaLN_modulation[1] for block in blocks]
        result: list[Tensor] = []
        for layer in (*layers, self.final_layer.adaLN_modulation[1]):
            output = layer(hidden)
            output.narrow(-1, self.width, self.width).add_(1)  # once for all steps
            result += output.split(self.width, -1)
        return result

    def step(self, x: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """The predicted noise and the place of the variance of noisy tokens, side by side, [R, 2 C] float32.

        Args:
            x: [M, C]; R is a multiple of M, rows beyond M are those of the same tokens under further conditions.
            modulations: [R, width] each, of one time step.
        """
        rows = modulations[-1].shape[0] // x.shape[0]
        hidden = self.input_proj(x.to(self.input_proj.weight.dtype))
        if rows > 1:
            hidden = torch.cat([hidden] * rows)  # in a third of the time of `repeat`
        parts = iter(modulations)
        for block in self.res_blocks:
            hidden = block(hidden, next(parts), next(parts), next(parts))
        return self.final_layer(hidden, next(parts), next(parts)).float()

    def forward(self, x: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        """[R, C] noisy tokens at [R] time steps of the 1000, under [R, condition_dim] -> [R, 2 C] float32."""
        return self.step(x, self.modulations(self.time_embed(timesteps), self.cond_embed(conditions)))
