"""The parts that transformers over growing scales share: attention by angle, feed-forward, modulated norms.

Names of parameters are those of the published VAR checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.residual import Part, Residual, Update, add
from varaccel.nn.rotary import rotate

MAX_LOG_TEMPERATURE = math.log(100)


class Attention(nn.Module):
    """Self-attention, by angle with a learned temperature per head if `l2_norm`; keys are cached rotated."""

    q_bias: Tensor
    v_bias: Tensor

    def __init__(self, dim: int, num_heads: int, l2_norm: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.mat_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)
        self.scale_mul_1H11 = (
            nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0))) if l2_norm else None
        )

    def forward(self, x: Tensor, attention: AttentionInputs, layer: int, tail: int | None = None) -> Tensor:
        """[R, P, C] -> [R, tail or P, C]: only the last `tail` tokens ask, all are looked at."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        if tail is None:
            heads = F.linear(x, self.mat_qkv.weight, bias).unflatten(2, (3, self.num_heads, self.head_dim))
            q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # [R, H, P, D]
        else:
            size = self.q_bias.shape[0]
            asked = F.linear(x[:, -tail:], self.mat_qkv.weight[:size], bias[:size])
            seen = F.linear(x, self.mat_qkv.weight[size:], bias[size:])
            q = asked.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
            k, v = seen.unflatten(2, (2, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, scale = self._angles(q, k)
        if attention.positional is not None:
            asking = attention.positional if tail is None else attention.positional[..., -tail:, :, :]
            q, k = rotate(q, asking), rotate(k, attention.positional)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if attention.observe is not None:
            attention.observe(layer, q, k, scale)
        if attention.cache is not None:
            if attention.slots is None:
                assert attention.length is not None
                k, v = attention.cache.beside(layer, k, v, attention.length)
            else:
                k, v = attention.cache.update(layer, attention.slots, k, v, attention.length)
        mask = attention.mask
        if mask is not None and tail is not None:
            mask = mask[..., -tail:, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _angles(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
        """Queries and keys before they are rotated, and the factor of their products."""
        if self.scale_mul_1H11 is None:
            return q, k, 0.25 / math.sqrt(self.head_dim)
        # float32 as published: half-precision norms would lose the temperature's resolution
        temperature = self.scale_mul_1H11.float().clamp(max=MAX_LOG_TEMPERATURE).exp()
        return F.normalize(q.float(), dim=-1) * temperature, F.normalize(k.float(), dim=-1), 1.0


class FeedForward(nn.Module):
    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, width)
        self.fc2 = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulation_layer(dim: int, parts: int) -> nn.Sequential:
    """Condition [R, C] -> [R, parts * C]."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


def split_modulation(values: Tensor, parts: int) -> Tensor:
    """[R, parts * C] -> [parts, R, 1, C]."""
    return values.unflatten(1, (parts, 1, -1)).transpose(0, 1)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, but free where nothing changes: passes of small models are as long as their calls."""
    return x if x.dtype == dtype else x.to(dtype)


def modulated(norm: nn.LayerNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift, in the finer number type of stream and modulation."""
    if x.dtype != shift.dtype:
        x = x.to(torch.promote_types(x.dtype, shift.dtype))
    return torch.addcmul(shift, norm(x), 1 + scale)


class ModulatedBlock(nn.Module):
    """Self-attention and feed-forward, each behind a modulated norm and before a gate."""

    def __init__(self, dim: int, num_heads: int, width: int, eps: float, *, l2_norm: bool) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads, l2_norm)
        self.ffn = FeedForward(dim, width)
        self.norm = nn.LayerNorm(dim, eps, elementwise_affine=False)

    def updates(self, given: Any, layer: int, tail: int | None) -> Sequence[tuple[Part, Update]]:
        """The sub-layers in their order.

        Args:
            given: what the block is told of the condition, here the modulation [6, R, 1, C]: gates, scales and
                shifts, for attention and feed-forward each.
            layer: number of the block.
            tail: attention is asked of the last `tail` tokens only, if it is not None.
        """
        gate_attn, gate_ffn, scale_attn, scale_ffn, shift_attn, shift_ffn = given.unbind(0)

        def attend(x: Tensor, attention: AttentionInputs) -> Tensor:
            seen = _cast(modulated(self.norm, x, scale_attn, shift_attn), x.dtype)
            return _cast(self.attn(seen, attention, layer, tail) * gate_attn, x.dtype)

        def feed(x: Tensor, attention: AttentionInputs) -> Tensor:
            seen = _cast(modulated(self.norm, x, scale_ffn, shift_ffn), x.dtype)
            return _cast(self.ffn(seen) * gate_ffn, x.dtype)

        return ("attention", attend), ("ffn", feed)

    def forward(
        self,
        x: Tensor,
        given: Any,
        attention: AttentionInputs,
        layer: int,
        tail: int | None = None,
        residual: Residual = add,
    ) -> Tensor:
        """[R, P, C] -> [R, tail or P, C]; with a tail every token gets its update, whatever `residual` says."""
        (part, attend), *others = self.updates(given, layer, tail)
        if tail is None:
            x = residual(x, attend, attention, layer, part)
        else:
            x, residual = x[:, -tail:] + attend(x, attention), add
        for part, update in others:
            x = residual(x, update, attention, layer, part)
        return x


class HeadModulation(nn.Module):
    """Norm and modulation before the output layer."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.ada_lin = modulation_layer(dim, 2)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.unbind(0)
        return modulated(self.norm, x, scale, shift)
