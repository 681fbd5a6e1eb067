"""The VAR transformer (Tian et al. 2024, "Visual Autoregressive Modeling", arXiv 2404.02905).

A decoder over the token maps of growing scales: all tokens of a scale are predicted at once from the scales before.
Parameter names are those of the published checkpoints. The network holds weights only: caches, masks and what
depends on the condition alone are arguments, so decoding, a prefix pass and training are the same call.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from diffusers import ModelMixin  # noqa: F401 - diffusers looks here for the class that loads
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from varaccel.errors import CheckpointError, InputError, unknown_name
from varaccel.models.next_scale import NextScaleTransformer, Places
from varaccel.models.next_scale_blocks import (
    HeadModulation,
    ModulatedBlock,
    modulation_layer,
    split_modulation,
)
from varaccel.nn.checkpoints import load_strict, read_published_weights
from varaccel.nn.condition import Condition
from varaccel.nn.scale_schedule import SCALES_256, SCALES_512, ScaleSchedule
from varaccel.nn.signature import Signature

PRESETS: dict[str, dict[str, Any]] = {
    "d16": {"depth": 16},
    "d20": {"depth": 20},
    "d24": {"depth": 24},
    "d30": {"depth": 30},
    "d36": {"depth": 36, "scales": SCALES_512, "shared_adaln": True},
}
"""The sizes with published weights (VAR, table 1): width 64 and one head per layer of depth."""

LEFTOVERS = (r"lvl_1L", r"attn_bias_for_masking", r"blocks\.\d+\.attn\.zero_k_bias")
"""Buffers in published files that follow from the sizes."""


@dataclass(frozen=True)
class Modulation:
    """What the condition does to the network, worked out once per call: a third of the published weights.

    Attributes:
        blocks: of every block [6, R, 1, C]: gates, scales and shifts, for attention and feed-forward each.
        head: [2, R, 1, C], scale and shift before the output layer.
        start: [R, 1, C], what the first token holds.
    """

    blocks: tuple[Tensor, ...]
    head: Tensor
    start: Tensor

    @property
    def rows(self) -> int:
        return self.start.shape[0]

    def expand(self, rows: int) -> Modulation:
        """The modulation of one row for `rows` rows, without copying."""
        return Modulation(
            tuple(b.expand(-1, rows, -1, -1) for b in self.blocks),
            self.head.expand(-1, rows, -1, -1),
            self.start.expand(rows, -1, -1),
        )

    def part(self, rows: slice | Tensor) -> Modulation:
        """The modulation of some rows."""
        return Modulation(tuple(b[:, rows] for b in self.blocks), self.head[:, rows], self.start[rows])

    def beside(self, other: Modulation) -> Modulation:
        """The rows of this one, then those of the other."""
        return Modulation(
            tuple(torch.cat(pair, 1) for pair in zip(self.blocks, other.blocks, strict=True)),
            torch.cat([self.head, other.head], 1),
            torch.cat([self.start, other.start]),
        )


class Block(ModulatedBlock):
    def __init__(
        self, dim: int, num_heads: int, width: int, eps: float, *, l2_norm: bool, shared_adaln: bool
    ) -> None:
        super().__init__(dim, num_heads, width, eps, l2_norm=l2_norm)
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, dim) / dim**0.5) if shared_adaln else None
        self.ada_lin = None if shared_adaln else modulation_layer(dim, 6)


class CaptionEmbedding(nn.Module):
    """The mean of a caption's features to a condition vector; `null` stands for no caption."""

    def __init__(self, caption_dim: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(caption_dim, dim)
        self.fc2 = nn.Linear(dim, dim)
        self.null = nn.Parameter(torch.randn(1, dim) * 0.02)

    def forward(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, caption_dim] and [B, T], nonzero where a slot is used -> [B, C]."""
        if mask is None:
            mean = features.mean(1)
        else:
            used = mask.to(features.dtype).unsqueeze(-1)
            mean = (features * used).sum(1) / used.sum(1).clamp(min=1)
        return self.fc2(F.gelu(self.fc1(mean), approximate="tanh"))


class VARTransformer(NextScaleTransformer):
    """VAR, conditional on classes as published, or on captions.

    Args:
        depth: number of blocks.
        dim, num_heads: width and heads; 64 and 1 per block if None, the published rule.
        vocab_size, codebook_dim: number and width of the image tokenizer's codebook entries.
        scales: sides of the token maps, coarse to fine.
        num_classes: classes without the unconditional one (condition_type "class").
        condition_type: "class", or "caption": the mean of text features of width `caption_dim`, which is where
            the word-level encoder of the shipped models keeps what a caption says.
        caption_dim: width of the text features.
        shared_adaln: one modulation layer for all blocks, and a constant per block (the 512-pixel model).
        l2_norm: attention by angle with a learned temperature per head (all published weights).
        mlp_ratio: feed-forward width over `dim`.
        norm_eps: of all norms.

    Raises:
        InputError: sizes that do not fit each other.
    """

    @register_to_config
    def __init__(
        self,
        depth: int = 16,
        dim: int | None = None,
        num_heads: int | None = None,
        vocab_size: int = 4096,
        codebook_dim: int = 32,
        scales: Sequence[int] = SCALES_256,
        num_classes: int = 1000,
        condition_type: Literal["class", "caption"] = "class",
        caption_dim: int = 256,
        shared_adaln: bool = False,
        l2_norm: bool = True,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        dim, num_heads = dim or 64 * depth, num_heads or depth
        if depth < 1 or dim % num_heads:
            raise InputError(
                f"VAR needs a depth of at least 1 and dim={dim} to be a multiple of num_heads={num_heads}."
            )
        if condition_type not in ("class", "caption"):
            raise unknown_name("VAR condition_type", str(condition_type), ["class", "caption"])
        self.schedule = ScaleSchedule(tuple(scales))
        self.dim, self.num_heads = dim, num_heads
        if condition_type == "class":
            self.class_emb = nn.Embedding(num_classes + 1, dim)
        else:
            self.caption_emb = CaptionEmbedding(caption_dim, dim)
        self.word_embed = nn.Linear(codebook_dim, dim)
        self.pos_start = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_1LC = nn.Parameter(torch.randn(1, self.schedule.num_tokens, dim) * 0.02)
        self.lvl_embed = nn.Embedding(len(self.schedule), dim)
        self.shared_ada_lin = modulation_layer(dim, 6) if shared_adaln else None
        self.blocks = nn.ModuleList(
            Block(
                dim, num_heads, round(dim * mlp_ratio), norm_eps, l2_norm=l2_norm, shared_adaln=shared_adaln
            )
            for _ in range(depth)
        )
        self.head_nm = HeadModulation(dim, norm_eps)
        self.head = nn.Linear(dim, vocab_size)

    # -- sizes -----------------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Number L of tokens of one image, over all scales."""
        return self.schedule.num_tokens

    def signature(self) -> Signature:
        """What the network reads and predicts."""
        config = self.config
        return Signature(
            condition=config.condition_type,
            condition_size=config.num_classes if config.condition_type == "class" else config.caption_dim,
            vocab_size=config.vocab_size,
            token_channels=config.codebook_dim,
            layout=self.schedule.sides,
            paradigm="next-scale",
        )

    def scale_of_tokens(self) -> Tensor:
        """[L] int64, the scale that each token belongs to."""
        return torch.tensor(self.schedule.scale_of_tokens(), device=self.device)

    # -- the network -----------------------------------------------------------------------------------

    def embed_condition(self, condition: Tensor, mask: Tensor | None = None) -> Tensor:
        """Labels [B], or text features [B, T, caption_dim] with a mask [B, T] -> condition vectors [B, C]."""
        if self.config.condition_type == "class":
            return self.class_emb(condition)
        return self.caption_emb(condition, mask)

    def null_condition(self) -> Tensor:
        """The condition vector that means "none", [1, C]."""
        if self.config.condition_type == "class":
            return self.class_emb.weight[-1:]
        return self.caption_emb.null

    def modulate(self, vectors: Tensor) -> Modulation:
        """Everything that follows from condition vectors [R, C] alone."""
        shared = None if self.shared_ada_lin is None else split_modulation(self.shared_ada_lin(vectors), 6)
        blocks = []
        for block in self.blocks:
            assert isinstance(block, Block)
            if shared is None:
                assert block.ada_lin is not None
                blocks.append(split_modulation(block.ada_lin(vectors), 6))
            else:
                assert block.ada_gss is not None
                blocks.append(shared + block.ada_gss.transpose(0, 2))
        return Modulation(
            tuple(blocks),
            split_modulation(self.head_nm.ada_lin(vectors), 2),
            vectors.unsqueeze(1) + self.pos_start,
        )

    def condition_rows(self, condition: Condition | None, batch: int, guided: bool) -> Modulation:
        """What B images are conditioned on, and below them, if guided, as many rows without a condition.

        Args:
            condition: of the B images; None for none.
        """
        null = self.modulate(self.null_condition()).expand(batch)
        if condition is None:
            return null
        rows = self.modulate(self.embed_condition(condition.values, condition.mask))
        return rows.beside(null) if guided else rows

    def positions(self) -> Tensor:
        """Level and position embeddings of all tokens, [1, L, C]."""
        return self.lvl_embed(self.scale_of_tokens()) + self.pos_1LC

    def places(self, schedule: ScaleSchedule) -> Places:
        """What the network is told of the places of all tokens."""
        return Places(self.positions())

    def forward(
        self,
        condition: Tensor,
        inputs: Tensor,
        condition_mask: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """Teacher-forced pass over the leading scales, without a cache.

        Args:
            condition: labels [B], or text features [B, T, caption_dim]; with `condition_mask` [B, T].
            inputs: [B, P - 1, D], what the tokens of scales 1, 2, ... see, from `MultiScaleQuantizer.inputs`;
                whole scales.
            dropped: [B] bool, rows whose condition is replaced by none. Nothing is dropped at random here,
                unlike in the published code.

        Returns:
            [B, P, V] float32.
        """
        vectors = self.embed_condition(condition, condition_mask)
        if dropped is not None:
            vectors = torch.where(dropped.unsqueeze(1), self.null_condition().to(vectors.dtype), vectors)
        given, places = self.modulate(vectors), self.places(self.schedule)
        return self._teacher_forced(given.start, given.blocks, given.head, inputs, self.schedule, places)

    # -- published weights -----------------------------------------------------------------------------

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Self:
        """A randomly initialised model of a published size ("d16", "d20", "d24", "d30", "d36")."""
        if name not in PRESETS:
            raise unknown_name("VAR size", name, PRESETS)
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_original(
        cls, path: str | os.PathLike[str], *, depth: int | None = None, num_heads: int | None = None
    ) -> Self:
        """Load a published checkpoint: `var_d16.pth` to `var_d36.pth`, CoDe's `drafter_N.pth`, `refiner_N.pth`.

        All sizes are read off the tensors.

        Args:
            depth: refuse a file of another depth.
            num_heads: for files without l2-normalised attention, which do not tell it; one per block if None.

        Raises:
            CheckpointError: see `read_published_weights` and `load_strict`; or another depth.
        """
        state = read_published_weights(path, anchor_key="pos_1LC")
        sizes = published_sizes(state, source=str(path))
        if depth is not None and sizes["depth"] != depth:
            raise CheckpointError(
                f"{path} holds a VAR of depth {sizes['depth']}, not {depth}; choose the file of that depth."
            )
        if not sizes["l2_norm"] and num_heads is not None:
            sizes["num_heads"] = num_heads
        model = cls(**sizes)
        load_strict(model, state, source=str(path), drop=LEFTOVERS)
        return model.eval()


def published_sizes(state: dict[str, Tensor], *, source: str) -> dict[str, Any]:
    """Constructor arguments of a state dict in the published layout.

    Raises:
        CheckpointError: a tensor that tells a size is missing, or token counts that are no squares.
    """
    try:
        dim = state["pos_start"].shape[-1]
        counts = _tokens_per_scale(state)
        sides = [math.isqrt(c) for c in counts]
        depth = 1 + max(int(m[1]) for k in state if (m := re.match(r"blocks\.(\d+)\.", k)))
        temperature = state.get("blocks.0.attn.scale_mul_1H11")
        sizes = {
            "depth": depth,
            "dim": dim,
            "num_heads": depth if temperature is None else temperature.shape[1],
            "vocab_size": state["head.weight"].shape[0],
            "codebook_dim": state["word_embed.weight"].shape[1],
            "scales": sides,
            "num_classes": state["class_emb.weight"].shape[0] - 1,
            "shared_adaln": "blocks.0.ada_gss" in state,
            "l2_norm": temperature is not None,
            "mlp_ratio": state["blocks.0.ffn.fc1.weight"].shape[0] / dim,
        }
    except (KeyError, ValueError, IndexError) as error:
        reason = (
            f"it lacks {error.args[0]}" if isinstance(error, KeyError) else "it has no such blocks and head"
        )
        raise CheckpointError(f"{source} does not fit VARTransformer: {reason}.") from error
    if any(side * side != count for side, count in zip(sides, counts, strict=True)):
        raise CheckpointError(f"{source} has token maps that are not square: {counts} tokens per scale.")
    return sizes


def _tokens_per_scale(state: dict[str, Tensor]) -> list[int]:
    """From the level of every token; files without that buffer are of a known schedule."""
    if "lvl_1L" in state:
        return torch.bincount(state["lvl_1L"].flatten()).tolist()
    tokens = state["pos_1LC"].shape[1]
    for scales in (SCALES_256, SCALES_512):
        if ScaleSchedule(scales).num_tokens == tokens:
            return [p * p for p in scales]
    raise KeyError("lvl_1L")
