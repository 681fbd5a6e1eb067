"""The Infinity transformer (Han et al. 2024, "Infinity: Scaling Bitwise AutoRegressive Modeling", arXiv 2412.04431).

Images from text, scale after scale as in VAR. But a token is D bits that are predicted independently, grids may be of
any ratio, places are told by rotation, and the text is read by cross-attention. The network holds weights only.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

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
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.checkpoints import load_strict, read_published_weights
from varaccel.nn.condition import Condition
from varaccel.nn.devices import HOST
from varaccel.nn.residual import Part, Update
from varaccel.nn.rotary import grid_rotary_table
from varaccel.nn.scale_schedule import ScaleSchedule
from varaccel.nn.signature import Signature

PRESETS: dict[str, dict[str, Any]] = {
    "125M": {"depth": 12, "dim": 768, "num_heads": 8},
    "layer16": {"depth": 16, "dim": 1152, "num_heads": 12},
    "1B": {"depth": 24, "dim": 1536, "num_heads": 16},
    "layer32": {"depth": 32, "dim": 2080, "num_heads": 20},
    "2B": {"depth": 32, "dim": 2048, "num_heads": 16},
    "layer40": {"depth": 40, "dim": 2688, "num_heads": 24},
    "layer48": {"depth": 48, "dim": 3360, "num_heads": 28},
    "8B": {"depth": 40, "dim": 3584, "num_heads": 28, "token_bits": 56},
}
"""The sizes of the published code; weights are published of 2B and 8B."""

LEFTOVERS = (
    r"lvl_1L",
    r"attn_bias_for_masking",
    r"Infinity_visible_kvlen",
    r"Infinity_invisible_qlen",
    r".*\.zero_k_bias",
)
"""Buffers in published files that follow from the sizes."""

_PUBLISHED = (
    (r"text_proj_for_sos\.ca\.", "text_pool."),
    (r"text_proj_for_ca\.", "text_memory."),
    (r"(blocks\.\d+)\.sa\.", r"\1.attn."),
    (r"(blocks\.\d+)\.ca\.", r"\1.cross_attn."),
    (r"(blocks\.\d+)\.ca_norm\.", r"\1.cross_norm."),
)
"""How names of published parameters begin, without chunks, and what they are called here."""

_CHUNKED = re.compile(r"block_chunks\.(\d+)\.(?:module\.)?(\d+)\.")


class BlockCondition(NamedTuple):
    """What one block is told of the condition.

    Attributes:
        modulation: [6, R, 1, C], see `ModulatedBlock.updates`; at least float32.
        keys, values: [R, H, m, c] of the text, for cross-attention.
        mask: [R, 1, 1, m] bool, False at padding; None if there is none.
    """

    modulation: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None

    def part(self, rows: slice) -> BlockCondition:
        """Of some rows."""
        mask = None if self.mask is None else self.mask[rows]
        return BlockCondition(self.modulation[:, rows], self.keys[rows], self.values[rows], mask)


@dataclass(frozen=True)
class TextRows:
    """What follows from the texts of a call alone, worked out once for all scales.

    Attributes:
        blocks: what every block is told.
        head: [2, R, 1, C], scale and shift before the output layer.
        start: [R, 1, C], what the first token holds.
    """

    blocks: tuple[BlockCondition, ...]
    head: Tensor
    start: Tensor

    @property
    def rows(self) -> int:
        return self.start.shape[0]

    def part(self, rows: slice) -> TextRows:
        """Of some rows."""
        return TextRows(tuple(b.part(rows) for b in self.blocks), self.head[:, rows], self.start[rows])


class TextPooling(nn.Module):
    """Text features to one vector: attention with a single learned query."""

    v_bias: Tensor

    def __init__(self, text_dim: int, dim: int, num_heads: int) -> None:
        super().__init__()
        self.mat_q = nn.Parameter(torch.randn(1, num_heads, dim // num_heads) * 0.02)
        self.mat_kv = nn.Linear(text_dim, 2 * dim, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, text: Tensor, mask: Tensor | None) -> Tensor:
        """[R, T, text_dim] and [R, 1, 1, T] bool -> [R, C]."""
        q = self.mat_q.unsqueeze(2).expand(len(text), -1, -1, -1)  # [R, P, 1, C / P]
        k, v = _keys_and_values(self.mat_kv, self.v_bias, text, q.shape[1])
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(1))


class CrossAttention(nn.Module):
    """Attention of image tokens to the text, by plain products of queries and keys."""

    v_bias: Tensor

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.mat_q = nn.Linear(dim, dim)
        self.mat_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def read(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [R, H, m, c] of a text [R, m, C]; the same for all scales."""
        return _keys_and_values(self.mat_kv, self.v_bias, memory, self.num_heads)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """[R, P, C] -> [R, P, C]."""
        q = self.mat_q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))


def _keys_and_values(layer: nn.Linear, v_bias: Tensor, text: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """[R, m, ...] -> keys and values [R, H, m, c], values with a bias."""
    k, v = layer(text).chunk(2, dim=-1)
    k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (k, v + v_bias))
    return k, v


class InfinityBlock(ModulatedBlock):
    """Self-attention, cross-attention to the text, feed-forward; cross-attention has neither modulation nor gate."""

    def __init__(self, dim: int, num_heads: int, width: int, eps: float) -> None:
        super().__init__(dim, num_heads, width, eps, l2_norm=True)
        self.cross_norm = nn.LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, dim) / dim**0.5)

    def told(self, shared: Tensor, memory: Tensor, mask: Tensor | None) -> BlockCondition:
        """What this block is told: of the modulation [6, R, 1, C] of all blocks, and the text [R, m, C]."""
        keys, values = self.cross_attn.read(memory)
        return BlockCondition(shared + self.ada_gss.float().transpose(0, 2), keys, values, mask)

    def updates(self, given: BlockCondition, layer: int, tail: int | None) -> Sequence[tuple[Part, Update]]:
        attend, feed = super().updates(given.modulation, layer, tail)

        def look(x: Tensor, attention: AttentionInputs) -> Tensor:
            return self.cross_attn(self.cross_norm(x), given.keys, given.values, given.mask)

        return attend, ("cross", look), feed


class InfinityTransformer(NextScaleTransformer):
    """Infinity, conditional on the features of a text encoder.

    A token of D bits goes in as D numbers and comes out as 2 D logits: 2 j and 2 j + 1 are those of bit j being 0, 1.
    Schedules are arguments: one network makes images of all sizes and ratios.

    Args:
        depth: number of blocks.
        dim, num_heads: width and heads.
        token_bits: bits D of a token.
        text_dim: width of the text features.
        text_tokens: rows of the features that stand for no text, so the most tokens of a text that guidance can have.
        pool_heads: heads that pool the text; one for each 128 of `text_dim` (64 in models wider than 4096) if None.
        max_scales: scales that there are embeddings of.
        ffn_dim: feed-forward width; 4 * dim to the nearest multiple of 256 if None.
        norm_eps: of all norms.

    Raises:
        InputError: sizes that do not fit each other.
    """

    @register_to_config
    def __init__(
        self,
        depth: int = 32,
        dim: int = 2048,
        num_heads: int = 16,
        token_bits: int = 32,
        text_dim: int = 2048,
        text_tokens: int = 512,
        pool_heads: int | None = None,
        max_scales: int = 15,
        ffn_dim: int | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if depth < 1 or num_heads < 1 or dim % (4 * num_heads):
            raise InputError(
                f"Infinity needs a depth of at least 1 and dim={dim} to be a multiple of 4 * num_heads="
                f"{4 * num_heads}, since places turn pairs of channels by row and by column."
            )
        if token_bits < 1 or text_tokens < 1 or max_scales < 1:
            raise InputError(
                f"token_bits, text_tokens and max_scales must be at least 1, got {token_bits}, {text_tokens} and "
                f"{max_scales}."
            )
        pool_heads = pool_heads or max(1, text_dim // (128 if dim <= 4096 else 64))
        if dim % pool_heads:
            raise InputError(
                f"dim={dim} must be a multiple of the number of heads that pool the text, {pool_heads}; "
                "set pool_heads to one of its divisors."
            )
        self.dim, self.num_heads = dim, num_heads
        self.cfg_uncond = nn.Parameter(null_text(text_tokens, text_dim).to(torch.get_default_device()))
        self.text_norm = nn.RMSNorm(text_dim, norm_eps)
        self.text_pool = TextPooling(text_dim, dim, pool_heads)
        self.text_memory = nn.Sequential(
            nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.pos_start = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.lvl_embed = nn.Embedding(max_scales, dim)
        nn.init.normal_(self.lvl_embed.weight, std=0.02)
        self.word_embed = nn.Linear(token_bits, dim)
        self.shared_ada_lin = modulation_layer(dim, 6)
        width = ffn_dim or max(1, round(4 * dim / 256)) * 256
        self.blocks = nn.ModuleList(InfinityBlock(dim, num_heads, width, norm_eps) for _ in range(depth))
        self.head_nm = HeadModulation(dim, norm_eps)
        self.head = nn.Linear(dim, 2 * token_bits)

    def signature(self) -> Signature:
        """What the network reads and predicts."""
        config = self.config
        return Signature(
            condition="caption",
            condition_size=config.text_dim,
            vocab_size=2**config.token_bits,
            token_channels=config.token_bits,
            paradigm="next-scale",
        )

    # -- text ------------------------------------------------------------------------------------------

    def read_text(self, text: Tensor, mask: Tensor | None = None) -> TextRows:
        """Everything that follows from texts alone.

        Args:
            text: [R, T, text_dim] features.
            mask: [R, T], nonzero where a slot is used; None if all are.

        Raises:
            InputError: features of another width, or a text without any.
        """
        text, used = self._checked(text, mask)
        needed = used.any(0)  # the longest text tells how much padding there is
        text, used = text[:, needed], used[:, needed]
        padding = None if bool(used.all()) else used[:, None, None]
        # float32 as published, since features of some encoders are large; padding may hold anything
        text = F.rms_norm(
            text.masked_fill(~used.unsqueeze(-1), 0),
            text.shape[-1:],
            self.text_norm.weight.float(),
            self.text_norm.eps,
        ).to(self.cfg_uncond.dtype)
        vectors, memory = self.text_pool(text, padding), self.text_memory(text)
        shared = split_modulation(self.shared_ada_lin(vectors), 6).float()
        blocks = []
        for block in self.blocks:
            assert isinstance(block, InfinityBlock)
            blocks.append(block.told(shared, memory, padding))
        head = split_modulation(self.head_nm.ada_lin(vectors), 2).float()
        return TextRows(tuple(blocks), head, vectors.unsqueeze(1) + self.pos_start)

    def _checked(self, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features in float32, and which slots are used [B, T] bool."""
        size = self.config.text_dim
        if text.dim() != 3 or text.shape[-1] != size:
            raise InputError(
                f"text features must be [rows, tokens, {size}] for this model, got {list(text.shape)}; "
                "use the text encoder that it was trained with."
            )
        shape = text.shape[:2]
        used = text.new_ones(shape, dtype=torch.bool) if mask is None else mask.bool()
        if used.shape != shape or not bool(used.any(1).all()):
            raise InputError(
                f"the mask of text features must be {list(shape)} with a used slot in every row, got "
                f"{list(used.shape)} and {used.sum(-1).tolist()} used; an empty text still has its end of text."
            )
        return text.float(), used

    def without_text(self, mask: Tensor) -> Tensor:
        """Features [B, T, text_dim] that stand for no text, as many as each text of the mask [B, T] has.

        Raises:
            InputError: a text is longer than there are such features.
        """
        used = mask.bool()
        most = self.config.text_tokens
        longest = int(used.sum(1).amax())
        if longest > most:
            raise InputError(
                f"a text has {longest} tokens but this model is guided by texts of at most {most}; shorten it."
            )
        index = (used.cumsum(1) - 1).clamp(min=0)
        return self.cfg_uncond[index]

    def condition_rows(self, condition: Condition | None, batch: int, guided: bool) -> TextRows:
        """What B images are conditioned on, and below them, if guided, as many rows without a text.

        Rows without a text read as many null features as the text of their image has; a negative condition replaces
        them. Images without any condition read all null features.

        Args:
            condition: text features of the B images; None for none.

        Raises:
            InputError: features that do not fit, or more than one negative condition.
        """
        if condition is None:
            return self.read_text(self.cfg_uncond.unsqueeze(0).expand(batch, -1, -1))
        negatives = condition.negatives
        if len(negatives) > 1:
            raise InputError(f"Infinity reads one negative condition, got {len(negatives)}.")
        texts = [self._checked(condition.values, condition.mask)]
        if guided:
            if negatives:
                texts.append(self._checked(negatives[0].values, negatives[0].mask))
            else:
                texts.append((self.without_text(texts[0][1]).float(), texts[0][1]))
        longest = max(used.shape[1] for _, used in texts)
        values = [F.pad(text, (0, 0, longest - text.shape[1], 0)) for text, _ in texts]
        masks = [F.pad(used, (longest - used.shape[1], 0)) for _, used in texts]
        return self.read_text(torch.cat(values), torch.cat(masks))

    # -- image -----------------------------------------------------------------------------------------

    def places(self, schedule: ScaleSchedule) -> Places:
        """What the network is told of the places of all tokens.

        Raises:
            InputError: more scales than there are embeddings of, or a first scale of several tokens.
        """
        most = self.config.max_scales
        if len(schedule) > most or schedule.grids[0] != (1, 1):
            raise InputError(
                f"Infinity needs scales from (1, 1) on, {most} of them at most, got {schedule.maps}."
            )
        scales = torch.tensor(schedule.scale_of_tokens(), device=self.device)
        rows, columns = reference_places(schedule)
        table = grid_rotary_table(rows, columns, self.dim // self.num_heads)
        return Places(self.lvl_embed(scales).unsqueeze(0), table.to(self.device))

    def forward(
        self,
        condition: Tensor,
        inputs: Tensor,
        schedule: ScaleSchedule,
        condition_mask: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """Teacher-forced pass over the leading scales, without a cache.

        Args:
            condition: text features [B, T, text_dim]; with `condition_mask` [B, T].
            inputs: [B, P - 1, D], what the tokens of scales 1, 2, ... see of those before, whole scales.
            schedule: of the images.
            dropped: [B] bool, rows whose text is replaced by none. Nothing is dropped at random here, unlike in
                the published code.

        Returns:
            [B, P, 2 D] float32.

        Raises:
            InputError: inputs of no whole scales, or a condition or schedule that does not fit.
        """
        text, used = self._checked(condition, condition_mask)
        if dropped is not None:
            text = torch.where(dropped[:, None, None], self.without_text(used).float(), text)
        given, places = self.read_text(text, used), self.places(schedule)
        return self._teacher_forced(given.start, given.blocks, given.head, inputs, schedule, places)

    # -- published weights -----------------------------------------------------------------------------

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Self:
        """A randomly initialised model of a size of the published code, see `PRESETS`."""
        if name not in PRESETS:
            raise unknown_name("Infinity size", name, PRESETS)
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_original(
        cls,
        path: str | os.PathLike[str],
        *,
        text_tokens: int | None = None,
        averaged: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load a published checkpoint: `infinity_2b_reg.pth`, the folder `infinity_8b_weights`, or one of training.

        All sizes are read off the tensors.

        Args:
            path: the file, or the folder of an index and its files.
            text_tokens: cut the features that stand for no text to so many rows, or fill them up with those of a new
                model; as many as there are if None.
            averaged: which weights to take from a training checkpoint that holds trained ones and their average.
            dtype: number type of the model.

        Raises:
            CheckpointError: see `read_published_weights` and `load_strict`.
        """
        state = own_names(read_published_weights(path, anchor_key="cfg_uncond", averaged=averaged))
        sizes = published_sizes(state, source=str(path))
        if text_tokens is not None:
            null = state["cfg_uncond"][:text_tokens]
            more = null_text(text_tokens, sizes["text_dim"])[len(null) :]
            state["cfg_uncond"] = torch.cat([null, more.to(null)])
            sizes["text_tokens"] = text_tokens
        try:
            with torch.device("meta"):  # random numbers for billions of weights would take minutes
                model = cls(**sizes)
        except InputError as error:
            raise CheckpointError(f"{path} does not fit InfinityTransformer: {error}") from error
        for name in state:  # copies, since what is read from a file may still lie in it
            state[name] = state[name].to(dtype, copy=True)
        load_strict(model, state, source=str(path), drop=LEFTOVERS, assign=True)
        return model.eval()


def null_text(tokens: int, size: int) -> Tensor:
    """Features [tokens, size] that stand for no text in a new model, always the same."""
    rows = torch.empty(tokens, size, device=HOST)
    nn.init.trunc_normal_(rows, std=1.2, generator=torch.Generator(HOST).manual_seed(0))
    return rows / math.sqrt(size)


def reference_places(schedule: ScaleSchedule) -> tuple[Tensor, Tensor]:
    """Rows and columns [L] float32 of all tokens, in units of the reference grid of the schedule.

    Token (y, x) of h x w ones is at (y R / h, x Q / w) of R x Q, rounded half to even (the published "mode 2").
    """
    height, width = schedule.reference or schedule.last_grid
    rows, columns = [], []
    for h, w in schedule.grids:
        down = (torch.arange(h, dtype=torch.float32, device=HOST) * (height / h)).round()
        across = (torch.arange(w, dtype=torch.float32, device=HOST) * (width / w)).round()
        rows.append(down.repeat_interleave(w))
        columns.append(across.repeat(h))
    return torch.cat(rows), torch.cat(columns)


def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in the published layout under this module's names."""
    places = [(int(m[1]), int(m[2])) for key in state if (m := _CHUNKED.match(key))]
    chunk_size = 1 + max((place for _, place in places), default=0)  # all chunks have as many blocks

    def number(found: re.Match[str]) -> str:
        return f"blocks.{int(found[1]) * chunk_size + int(found[2])}."

    renamed = {}
    for key, tensor in state.items():
        name = _CHUNKED.sub(number, key, count=1)
        for pattern, own in _PUBLISHED:
            name = re.sub(f"^{pattern}", own, name)
        renamed[name] = tensor
    return renamed


def published_sizes(state: Mapping[str, Tensor], *, source: str) -> dict[str, Any]:
    """Constructor arguments of a state dict of this module.

    Raises:
        CheckpointError: a tensor that tells a size is missing or has other dimensions.
    """
    try:
        dim, token_bits = state["word_embed.weight"].shape
        text_tokens, text_dim = state["cfg_uncond"].shape
        ffn_dim, _ = state["blocks.0.ffn.fc1.weight"].shape
        _, num_heads, _, _ = state["blocks.0.attn.scale_mul_1H11"].shape
        _, pool_heads, _ = state["text_pool.mat_q"].shape
        max_scales, _ = state["lvl_embed.weight"].shape
    except KeyError as error:
        raise CheckpointError(
            f"{source} does not fit InfinityTransformer: it lacks {error.args[0]}."
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{source} does not fit InfinityTransformer: a tensor that tells its sizes has other dimensions."
        ) from error
    return {
        "depth": 1 + max(int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))),
        "dim": dim,
        "num_heads": num_heads,
        "token_bits": token_bits,
        "text_dim": text_dim,
        "text_tokens": text_tokens,
        "pool_heads": pool_heads,
        "max_scales": max_scales,
        "ffn_dim": ffn_dim,
    }
