"""Convolutional blocks of the VQ tokenizers: residual, attention, resampling, encoder and decoder.

Source: Esser et al., "Taming Transformers for High-Resolution Image Synthesis" (VQGAN), with the layout of
Sun et al., "Autoregressive Model Beats Diffusion" (LlamaGen), section 2.1. Attribute names follow the
published checkpoints, so that their state dicts load without renaming.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from varaccel.tokenizers.normalization import GroupNorm

NORM_EPS = 1e-6


Groups = int | Callable[[int], int]
"""How many groups a GroupNorm has: the same number in all, or one that follows from the channels."""


def group_norm(channels: int, groups: Groups) -> GroupNorm:
    return GroupNorm(groups(channels) if callable(groups) else groups, channels, eps=NORM_EPS)


class ResidualBlock(nn.Module):
    """Two rounds of GroupNorm, SiLU and 3x3 convolution beside a skip: [B, in, H, W] -> [B, out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, groups: Groups, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all sites of a feature map, residual: [B, C, H, W] -> same."""

    def __init__(self, channels: int, groups: Groups) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # [B, 1, H*W, C]
        q, k, v = (proj(h).flatten(2).transpose(1, 2).unsqueeze(1) for proj in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(mixed.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve height and width by a stride-2 convolution, padded on the right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by nearest-neighbour repetition and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution of the encoder or decoder: residual blocks, each followed by attention if there is one.

    The resampling layer to the next level, if any, is `downsample` or `upsample`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocks: int,
        groups: Groups,
        dropout: float,
        *,
        attention: bool,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(
            ResidualBlock(in_channels if i == 0 else out_channels, out_channels, groups, dropout)
            for i in range(blocks)
        )
        self.attn = nn.ModuleList(AttentionBlock(out_channels, groups) for _ in range(blocks * attention))
        self.downsample = Downsample(out_channels) if downsample else None
        self.upsample = Upsample(out_channels) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x)
        return x


def middle(channels: int, groups: Groups, dropout: float, attention: bool) -> nn.ModuleList:
    blocks: list[nn.Module] = [ResidualBlock(channels, channels, groups, dropout) for _ in range(2)]
    if attention:
        blocks.insert(1, AttentionBlock(channels, groups))
    return nn.ModuleList(blocks)


class Encoder(nn.Module):
    """Images [B, in_channels, H, W] -> features [B, z_channels, H/f, W/f], f = 2 ** (levels - 1).

    Attention follows every residual block of the lowest resolution, unless there is to be none.
    """

    def __init__(
        self,
        in_channels: int,
        base_channels: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        groups: Groups,
        dropout: float,
        *,
        attention: bool = True,
    ) -> None:
        super().__init__()
        widths = [base_channels * m for m in channel_multipliers]
        self.conv_in = nn.Conv2d(in_channels, base_channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        width = base_channels
        for out in widths:
            last = len(self.conv_blocks) == len(widths) - 1
            self.conv_blocks.append(
                Level(
                    width,
                    out,
                    num_res_blocks,
                    groups,
                    dropout,
                    attention=attention and last,
                    downsample=not last,
                )
            )
            width = out
        self.mid = middle(width, groups, dropout, attention)
        self.norm_out = group_norm(width, groups)
        self.conv_out = nn.Conv2d(width, z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for level in self.conv_blocks:
            h = level(h)
        for block in self.mid:
            h = block(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Features [B, z_channels, h, w] -> images [B, out_channels, h*f, w*f], f = 2 ** (levels - 1).

    Mirrors the encoder with one more residual block per level; `conv_blocks[0]` is the lowest resolution.
    """

    def __init__(
        self,
        out_channels: int,
        base_channels: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        groups: Groups,
        dropout: float,
        *,
        attention: bool = True,
    ) -> None:
        super().__init__()
        widths = [base_channels * m for m in reversed(channel_multipliers)]
        width = widths[0]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = middle(width, groups, dropout, attention)
        self.conv_blocks = nn.ModuleList()
        for out in widths:
            index = len(self.conv_blocks)
            self.conv_blocks.append(
                Level(
                    width,
                    out,
                    num_res_blocks + 1,
                    groups,
                    dropout,
                    attention=attention and index == 0,
                    upsample=index < len(widths) - 1,
                )
            )
            width = out
        self.norm_out = group_norm(width, groups)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        """The weight that adaptive loss balancing measures gradients at."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        for block in self.mid:
            h = block(h)
        for level in self.conv_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))
