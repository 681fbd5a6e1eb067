"""The LlamaGen transformer (Sun et al. 2024, "Autoregressive Model Beats Diffusion", arXiv 2406.06525).

A Llama-style decoder over a condition prefix followed by image tokens in raster order. Parameter names are
those of the published checkpoints. The network holds weights only: caches, masks and positions are arguments,
so prefill, decoding, verification and training are the same call.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from varaccel.errors import CheckpointError, InputError, unknown_name
from varaccel.nn.attention_inputs import AttentionInputs, prefix_mask
from varaccel.nn.checkpoints import load_strict, read_published_weights
from varaccel.nn.grid import Grid
from varaccel.nn.kv_cache import KVCache
from varaccel.nn.prefix import PrefixConditioned
from varaccel.nn.rotary import rotary_table, rotate
from varaccel.nn.signature import Signature

PRESETS: dict[str, dict[str, int]] = {
    "B": {"dim": 768, "num_layers": 12, "num_heads": 12},
    "L": {"dim": 1024, "num_layers": 24, "num_heads": 16},
    "XL": {"dim": 1280, "num_layers": 36, "num_heads": 20},
    "XXL": {"dim": 1536, "num_layers": 48, "num_heads": 24},
    "3B": {"dim": 3200, "num_layers": 24, "num_heads": 32},
}
"""The sizes with published weights (LlamaGen, table 1)."""

LEFTOVERS = (r"freqs_cis", r"layers\.\d+\.attention\.kv_cache\..*")
"""Keys that published files may carry although they are no weights."""


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32; cast back *before* the weight, as the published code does.

    In float32 that is torch's own, whose one call costs less than eight.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        self.wqkv = nn.Linear(dim, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, attention: AttentionInputs, layer: int) -> Tensor:
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H + 2 Hkv, P, D]
        turned, v = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        assert attention.positional is not None
        q, k = rotate(turned, attention.positional).split([self.num_heads, self.num_kv_heads], dim=1)
        if attention.cache is not None:
            assert attention.slots is not None
            k, v = attention.cache.update(layer, attention.slots, k, v, attention.length)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attention.mask,
            is_causal=attention.causal,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )  # [B, H, P, D]
        out = self.wo(out.transpose(1, 2).flatten(2))
        return self.dropout(out) if self.training else out


class FeedForward(nn.Module):
    def __init__(self, dim: int, width: int, dropout: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, width, bias=False)
        self.w3 = nn.Linear(dim, width, bias=False)
        self.w2 = nn.Linear(width, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return self.dropout(out) if self.training else out


class Block(nn.Module):
    def __init__(self, attention: Attention, feed_forward: FeedForward, dim: int, eps: float) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward
        self.attention_norm = RMSNorm(dim, eps)
        self.ffn_norm = RMSNorm(dim, eps)

    def forward(self, x: Tensor, attention: AttentionInputs, layer: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), attention, layer)
        return x + self.feed_forward(self.ffn_norm(x))


class ClassEmbedding(nn.Module):
    """Class labels to a prefix of one slot; the last row of the table means "no class"."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels).unsqueeze(1)  # [B, 1, dim]


class CaptionProjection(nn.Module):
    def __init__(self, caption_dim: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(caption_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))


class CaptionEmbedding(nn.Module):
    """Left-padded text features to prefix slots. `uncond_embedding` lives in the text features' space."""

    uncond_embedding: Tensor

    def __init__(self, caption_dim: int, length: int, dim: int) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(caption_dim, dim)
        start = torch.randn(length, caption_dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("uncond_embedding", start / caption_dim**0.5)

    def forward(self, features: Tensor) -> Tensor:
        return self.cap_proj(features)  # [B, T, dim]


def feed_forward_width(dim: int, multiple_of: int) -> int:
    """8/3 of the width, rounded up to a multiple: the SwiGLU width of Llama."""
    return multiple_of * math.ceil(int(8 * dim / 3) / multiple_of)


class LlamaGenTransformer(ModelMixin, ConfigMixin, PrefixConditioned):
    """LlamaGen, class-conditional (`c2i`) or text-conditional (`t2i`).

    Args:
        model_type: "c2i": the prefix is one class slot; "t2i": it is `prefix_length` caption slots.
        dim, num_layers, num_heads, num_kv_heads: width, depth and heads; `dim / num_heads` must be a
            multiple of 4 (the two-dimensional rotary embedding splits it into four).
        vocab_size: size of the image tokenizer's codebook.
        grid_size: side of the square grid of image tokens. It is not in the weights: one set of weights
            serves every grid.
        num_classes: classes of a c2i model, without the unconditional one.
        prefix_length, caption_dim: caption slots and text-feature width of a t2i model.
        ffn_multiple_of: the feed-forward width is rounded up to a multiple of this.
        prefix_identity: condition slots keep their queries and keys, so that image tokens can choose among the
            words of a caption; off in published weights, whose rotary table turns those of condition slots to zero.
        dropout: on token embeddings, attention and feed-forward outputs, in training only.

    Raises:
        InputError: sizes that do not fit each other.
    """

    @register_to_config
    def __init__(
        self,
        model_type: Literal["c2i", "t2i"] = "c2i",
        dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        num_kv_heads: int | None = None,
        vocab_size: int = 16384,
        grid_size: int = 16,
        num_classes: int = 1000,
        prefix_length: int = 120,
        caption_dim: int = 2048,
        ffn_multiple_of: int = 256,
        rope_base: float = 10000.0,
        prefix_identity: bool = False,
        norm_eps: float = 1e-5,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if model_type not in ("c2i", "t2i"):
            raise unknown_name("LlamaGen model_type", str(model_type), ["c2i", "t2i"])
        if dim % num_heads or (dim // num_heads) % 4:
            raise InputError(f"dim={dim} over num_heads={num_heads} must give a head width divisible by 4.")
        if num_heads % (num_kv_heads or num_heads):
            raise InputError(f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}.")
        self.cls_embedding: ClassEmbedding | CaptionEmbedding = (
            ClassEmbedding(num_classes, dim)
            if model_type == "c2i"
            else CaptionEmbedding(caption_dim, prefix_length, dim)
        )
        self.tok_embeddings = nn.Embedding(vocab_size, dim)
        self.token_dropout = nn.Dropout(dropout)
        width = feed_forward_width(dim, ffn_multiple_of)
        self.layers = nn.ModuleList(
            Block(
                Attention(dim, num_heads, num_kv_heads or num_heads, dropout),
                FeedForward(dim, width, dropout),
                dim,
                norm_eps,
            )
            for _ in range(num_layers)
        )
        self.norm = RMSNorm(dim, norm_eps)
        self.output = nn.Linear(dim, vocab_size, bias=False)

    # -- sizes -----------------------------------------------------------------------------------------

    @property
    def prefix_length(self) -> int:
        """Number of condition slots before the first image token."""
        return 1 if self.config.model_type == "c2i" else self.config.prefix_length

    @property
    def num_tokens(self) -> int:
        """Number of image tokens of one image."""
        return self.config.grid_size**2

    @property
    def head_dim(self) -> int:
        return self.config.dim // self.config.num_heads

    def rotary_table(self, device: torch.device | None = None, prefix: int | None = None) -> Tensor:
        """[prefix + num_tokens, head_dim / 2, 2], `prefix_length` slots if None; no weight, so made on demand."""
        return rotary_table(
            self.config.grid_size,
            self.head_dim,
            self.prefix_length if prefix is None else prefix,
            base=self.config.rope_base,
            device=device or self.device,
            prefix_identity=self.config.prefix_identity,
        )

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    def signature(self) -> Signature:
        """What the network reads and predicts; `condition_slots` is told of captions only."""
        config, caption = self.config, self.config.model_type == "t2i"
        return Signature(
            condition="caption" if caption else "class",
            condition_size=config.caption_dim if caption else config.num_classes,
            condition_slots=self.prefix_length if caption else None,
            vocab_size=config.vocab_size,
            layout=(config.grid_size,),
        )

    def new_cache(self, rows: int, slots: int, layers: Sequence[int] | None = None) -> KVCache:
        """An empty cache for the layers with these numbers, all if None."""
        return KVCache(
            layers=self.config.num_layers if layers is None else len(layers),
            batch=rows,
            heads=self.config.num_kv_heads or self.config.num_heads,
            slots=slots,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    # -- the network -----------------------------------------------------------------------------------

    def embed_condition(self, values: Tensor) -> Tensor:
        """Prefix inputs: class labels [B] or text features [B, T, caption_dim] -> [B, T, dim]."""
        return self.cls_embedding(values)

    def embed_tokens(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Image tokens [B, P] -> [B, P, dim]; their places are told by the rotary table alone."""
        return self.tok_embeddings(tokens)

    def unconditional(self, values: Tensor) -> Tensor:
        """The condition that means "none", in the shape of `values`."""
        if isinstance(self.cls_embedding, CaptionEmbedding):
            return self.cls_embedding.uncond_embedding.expand_as(values).to(values.dtype)
        return super().unconditional(values)

    def positional(self, prefix: int, grids: Sequence[Grid], mask: Tensor | None = None) -> Tensor:
        """The rotary table [1, prefix + grid_size ** 2, head_dim / 2, 2]."""
        return self.rotary_table(prefix=prefix).unsqueeze(0)

    def transform(self, x: Tensor, attention: AttentionInputs, layers: Sequence[int] | None = None) -> Tensor:
        """Run the blocks and the final norm on embedded inputs [B, P, dim] -> features [B, P, dim].

        Args:
            layers: numbers of the blocks to run, all if None; the i-th of them uses layer i of the cache.
        """
        x = self.token_dropout(x)
        for index, number in enumerate(range(len(self.layers)) if layers is None else layers):
            x = self.layers[number](x, attention, index)
        return self.norm(x)

    def logits(self, features: Tensor) -> Tensor:
        """Features after the final norm [B, P, dim] -> float32 logits [B, P, vocab_size]."""
        return self.output(features).float()

    def forward(self, condition: Tensor, tokens: Tensor, condition_mask: Tensor | None = None) -> Tensor:
        """Teacher-forced pass over prefix and tokens, without a cache.

        Args:
            condition: class labels [B] int64, or left-padded text features [B, T, caption_dim].
            tokens: [B, P] int64, the first P image tokens in raster order.
            condition_mask: [B, T], 1 where a caption slot is used; None if all are.

        Returns:
            [B, T + P, vocab_size] float32; entry T - 1 + n is the prediction of image token n.
        """
        x = torch.cat([self.embed_condition(condition), self.embed_tokens(tokens)], dim=1)
        length = x.shape[1]
        rotary = self.rotary_table(x.device)[:length]
        if condition_mask is None:
            attention = AttentionInputs(rotary, causal=True)
        else:
            attention = AttentionInputs(rotary, mask=prefix_mask(condition_mask, length))
        return self.logits(self.transform(x, attention))

    # -- published weights -----------------------------------------------------------------------------

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Self:
        """A randomly initialised model of a published size ("B", "L", "XL", "XXL", "3B")."""
        if name not in PRESETS:
            raise unknown_name("LlamaGen size", name, PRESETS)
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_original(
        cls, path: str | os.PathLike[str], *, grid_size: int | None = None, num_heads: int | None = None
    ) -> Self:
        """Load a published checkpoint (`c2i_XL_384.pt`, `t2i_XL_stage1_256.pt`, ...).

        Sizes are read off the tensors. Two facts are not in them: the head count, which follows from the
        published sizes, and the grid, which follows from the resolution in the file name.

        Args:
            grid_size: side of the token grid, if the file name does not end in `_256`, `_384` or `_512`.
            num_heads: head count, if width and depth are not those of a published size.

        Raises:
            CheckpointError: see `read_published_weights` and `load_strict`; or a fact above is missing.
        """
        state = read_published_weights(path, anchor_key="tok_embeddings.weight")
        model = cls(**_config_of(state, Path(path), grid_size, num_heads))
        load_strict(model, state, source=str(path), drop=LEFTOVERS)
        return model.eval()


def _config_of(
    state: dict[str, Tensor], file: Path, grid_size: int | None, num_heads: int | None
) -> dict[str, Any]:
    try:
        vocab_size, dim = state["tok_embeddings.weight"].shape
        width = state["layers.0.feed_forward.w1.weight"].shape[0]
        fused = state["layers.0.attention.wqkv.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(
            f"{file} does not fit LlamaGenTransformer: it lacks {error.args[0]}."
        ) from error
    num_layers = 1 + max(int(m[1]) for k in state if (m := re.match(r"layers\.(\d+)\.", k)))
    published = next((p for p in PRESETS.values() if (p["dim"], p["num_layers"]) == (dim, num_layers)), None)
    heads = num_heads or (published["num_heads"] if published else None)
    if heads is None:
        raise CheckpointError(
            f"{file} has width {dim} and {num_layers} layers, which is no published size; pass num_heads."
        )
    if grid_size is None:
        resolution = re.search(r"_(256|384|512)\b", file.stem)
        if resolution is None:
            raise CheckpointError(
                f"the name {file.name} does not tell the resolution; pass grid_size (16 for 256, 24 for 384)."
            )
        grid_size = int(resolution[1]) // 16
    config: dict[str, Any] = {
        "dim": dim,
        "num_layers": num_layers,
        "num_heads": heads,
        "num_kv_heads": (fused // (dim // heads) - heads) // 2,
        "vocab_size": vocab_size,
        "grid_size": grid_size,
        # any multiple gives back the width if it is the width itself; named sizes keep the usual 256
        "ffn_multiple_of": 256 if feed_forward_width(dim, 256) == width else width,
    }
    if "cls_embedding.uncond_embedding" in state:
        length, caption_dim = state["cls_embedding.uncond_embedding"].shape
        return config | {"model_type": "t2i", "prefix_length": length, "caption_dim": caption_dim}
    if "cls_embedding.embedding_table.weight" not in state:
        raise CheckpointError(
            f"{file} does not fit LlamaGenTransformer: it lacks both cls_embedding.embedding_table.weight "
            "and cls_embedding.uncond_embedding."
        )
    classes = state["cls_embedding.embedding_table.weight"].shape[0] - 1
    return config | {"model_type": "c2i", "num_classes": classes}
