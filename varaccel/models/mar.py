"""The MAR transformer (Li et al. 2024, "Autoregressive Image Generation without Vector Quantization").

A masked autoencoder over continuous image tokens (arXiv 2406.11838): the encoder reads what is known, the decoder
places it among mask tokens and gives every unknown position a vector, under which a diffusion head draws the token.
Parameter names are those of the published checkpoints. The network holds weights only: which positions are known,
caches and masks are arguments, so decoding, partial passes and training are the same calls.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from varaccel.errors import CheckpointError, InputError, unknown_name
from varaccel.models.diffusion_head import DiffusionHead
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.checkpoints import load_strict, read_published_weights
from varaccel.nn.gather import rows_of
from varaccel.nn.kv_cache import KVCache
from varaccel.nn.noise_schedule import NoiseSchedule
from varaccel.nn.precision import KeepsFloat32
from varaccel.nn.signature import Signature

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "base": {
        **{"dim": 768, "encoder_depth": 12, "decoder_depth": 12, "num_heads": 12},
        **{"head_depth": 6, "head_width": 1024},
    },
    "large": {
        **{"dim": 1024, "encoder_depth": 16, "decoder_depth": 16, "num_heads": 16},
        **{"head_depth": 8, "head_width": 1280},
    },
    "huge": {
        **{"dim": 1280, "encoder_depth": 20, "decoder_depth": 20, "num_heads": 16},
        **{"head_depth": 12, "head_width": 1536},
    },
}
"""The sizes with published weights (MAR, section 4)."""

_HEADS = {preset["dim"]: preset["num_heads"] for preset in PRESETS.values()}


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, attention: AttentionInputs, layer: int, asked: Tensor | None = None
    ) -> Tensor:
        """[R, P, C] -> same, or [R, A, C] of the inputs `asked` [R, A]; all are looked at."""
        if asked is None:
            heads = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            q, k, v = heads.unbind(0)  # [R, H, P, D]
        else:
            size = x.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(rows_of(x, asked), weight[:size], bias[:size])
            q = q.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            seen = F.linear(x, weight[size:], bias[size:])
            k, v = seen.unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if attention.cache is not None:
            assert attention.slots is not None
            k, v = attention.cache.update(layer, attention.slots, k, v, attention.length)
        mask = attention.mask
        if mask is not None and asked is not None and mask.shape[-2] > 1:
            mask = mask.gather(-2, asked[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, width)
        self.fc2 = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, width: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = FeedForward(dim, width)

    def forward(
        self, x: Tensor, attention: AttentionInputs, layer: int, asked: Tensor | None = None
    ) -> Tensor:
        mixed = self.attn(self.norm1(x), attention, layer, asked)
        x = (x if asked is None else rows_of(x, asked)) + mixed
        return x + self.mlp(self.norm2(x))


class CaptionEmbedding(nn.Module):
    """Text features to the width of the transformer."""

    def __init__(self, caption_dim: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(caption_dim, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(features)))


class _Head(nn.Module):
    """The published name space of the diffusion head."""

    def __init__(self, head: DiffusionHead) -> None:
        super().__init__()
        self.net = head


class MARTransformer(KeepsFloat32, ModelMixin, ConfigMixin):
    """MAR, conditional on classes as published, or on captions.

    An image is N = grid_size² tokens of `token_channels` numbers in raster order. In front of them stand
    `buffer_size` slots for the condition: all of them hold the embedding of the class, or slot i holds the i-th
    feature of the caption.

    Args:
        dim, encoder_depth, num_heads: of the encoder.
        decoder_depth, decoder_dim, decoder_heads: of the decoder; width and heads of the encoder if None.
        grid_size: side of the token grid.
        token_channels: C, numbers per token: latent channels times the square of the patch size.
        buffer_size: slots for the condition; for captions the number T of text features.
        num_classes: classes (condition_type "class").
        condition_type: "class" or "caption"; text features have width `caption_dim`.
        head_depth, head_width: of the diffusion head.
        noise_schedule: that the head was trained on; "cosine" for published weights.
        mlp_ratio: feed-forward width over `dim`.
        norm_eps: of all norms.

    Raises:
        InputError: sizes that do not fit each other.
    """

    _keep_in_fp32_modules = ["diffloss"]  # noqa: RUF012 - first steps multiply errors of the head by hundreds

    @register_to_config
    def __init__(
        self,
        dim: int = 768,
        encoder_depth: int = 12,
        decoder_depth: int = 12,
        num_heads: int = 12,
        decoder_dim: int | None = None,
        decoder_heads: int | None = None,
        grid_size: int = 16,
        token_channels: int = 16,
        buffer_size: int = 64,
        num_classes: int = 1000,
        condition_type: Literal["class", "caption"] = "class",
        caption_dim: int = 256,
        head_depth: int = 6,
        head_width: int = 1024,
        noise_schedule: NoiseSchedule = "cosine",
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        decoder_dim, decoder_heads = decoder_dim or dim, decoder_heads or num_heads
        sizes = (dim, encoder_depth, decoder_depth, decoder_dim, grid_size, token_channels, buffer_size)
        if min(*sizes, head_depth, head_width) < 1:
            raise InputError("every size of a MAR transformer must be at least 1.")
        if dim % num_heads or decoder_dim % decoder_heads:
            raise InputError(
                f"the widths {dim} and {decoder_dim} must be multiples of {num_heads} and {decoder_heads} heads."
            )
        if condition_type not in ("class", "caption"):
            raise unknown_name("condition_type", str(condition_type), ("class", "caption"))
        tokens = grid_size * grid_size

        def learned(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape) * 0.02)

        if condition_type == "class":
            self.class_emb = nn.Embedding(num_classes, dim)
        else:
            self.caption_emb = CaptionEmbedding(caption_dim, dim)
        self.fake_latent = learned(1, dim)
        self.z_proj = nn.Linear(token_channels, dim)
        self.z_proj_ln = nn.LayerNorm(dim, norm_eps)
        self.encoder_pos_embed_learned = learned(1, buffer_size + tokens, dim)
        self.encoder_blocks = nn.ModuleList(
            Block(dim, num_heads, round(dim * mlp_ratio), norm_eps) for _ in range(encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(dim, norm_eps)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = learned(1, 1, decoder_dim)
        self.decoder_pos_embed_learned = learned(1, buffer_size + tokens, decoder_dim)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, decoder_heads, round(decoder_dim * mlp_ratio), norm_eps)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, norm_eps)
        self.diffusion_pos_embed_learned = learned(1, tokens, decoder_dim)
        self.diffloss = _Head(DiffusionHead(token_channels, decoder_dim, head_depth, head_width))

    # -- sizes -----------------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Number N of tokens of one image."""
        return self.config.grid_size**2

    @property
    def channels(self) -> int:
        """Number C of numbers per token."""
        return self.config.token_channels

    @property
    def buffer(self) -> int:
        """Number b of slots for the condition."""
        return self.config.buffer_size

    @property
    def head(self) -> DiffusionHead:
        """The diffusion head."""
        return self.diffloss.net

    def signature(self) -> Signature:
        """What the network reads and predicts."""
        config = self.config
        return Signature(
            condition=config.condition_type,
            condition_size=config.num_classes if config.condition_type == "class" else config.caption_dim,
            token_channels=config.token_channels,
            layout=(config.grid_size,),
            noise_schedule=config.noise_schedule,
            paradigm="masked",
        )

    def new_caches(self, rows: int) -> tuple[KVCache, KVCache]:
        """Empty caches of encoder and decoder for `rows` rows: a slot per condition slot and token, one spare."""
        config = self.config
        sizes = (
            (self.encoder_blocks, config.dim, config.num_heads),
            (
                self.decoder_blocks,
                config.decoder_dim or config.dim,
                config.decoder_heads or config.num_heads,
            ),
        )
        encoder, decoder = (
            KVCache(
                layers=len(blocks),
                batch=rows,
                heads=heads,
                slots=self.buffer + self.num_tokens + 1,
                head_dim=width // heads,
                dtype=self.dtype,
                device=self.device,
            )
            for blocks, width, heads in sizes
        )
        return encoder, decoder

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the transformer; that of the head may be wider."""
        return self.z_proj.weight.dtype

    # -- the network -----------------------------------------------------------------------------------

    def embed_condition(self, condition: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the condition slots hold, [B, b, C], of labels [B], or text features [B, b, caption_dim] with `mask`.

        Unused caption slots hold what stands for no condition.
        """
        if self.config.condition_type == "class":
            return self.class_emb(condition).unsqueeze(1).expand(-1, self.buffer, -1)
        if condition.shape[1] != self.buffer:
            raise InputError(
                f"a caption must have {self.buffer} features, padding included, got {condition.shape[1]}."
            )
        slots = self.caption_emb(condition)
        return slots if mask is None else torch.where(mask.bool().unsqueeze(-1), slots, self.null_condition())

    def null_condition(self) -> Tensor:
        """What the condition slots hold if there is no condition, [1, 1, C]."""
        return self.fake_latent.unsqueeze(1)

    def embed_slots(self, slots: Tensor) -> Tensor:
        """Encoder inputs [R, b, C] of condition slots [R, b, C]."""
        return self.z_proj_ln(slots + self.encoder_pos_embed_learned[:, : self.buffer])

    def embed_tokens(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Encoder inputs [R, K, dim] of tokens [R, K, C] at `positions` [R, K]; -1 is padding."""
        places = self.encoder_pos_embed_learned[0, self.buffer :][positions.clamp(min=0)]
        return self.z_proj_ln(self.z_proj(tokens.to(self.dtype)) + places)

    def encode(self, x: Tensor, attention: AttentionInputs) -> Tensor:
        """Encoder inputs [R, P, dim] -> encoded [R, P, dim]."""
        for layer, block in enumerate(self.encoder_blocks):
            x = block(x, attention, layer)
        return self.encoder_norm(x)

    def spread(self, encoded: Tensor, positions: Tensor) -> Tensor:
        """Decoder inputs [R, b + N, C] of all slots: what is known in its place, mask tokens elsewhere.

        Args:
            encoded: [R, b + K, dim], condition slots first.
            positions: [R, K] of the tokens; -1 is padding.
        """
        rows, buffer = encoded.shape[0], self.buffer
        known = self.decoder_embed(encoded)
        total = buffer + self.num_tokens
        # a padded entry goes to a slot of its own that is cut off again
        x = self.mask_token.to(known.dtype).expand(rows, total + 1, -1).clone()
        x[:, :buffer] = known[:, :buffer]
        slots = torch.where(positions >= 0, positions + buffer, total)
        x.scatter_(1, slots.unsqueeze(-1).expand(-1, -1, x.shape[-1]), known[:, buffer:])
        return x[:, :total] + self.decoder_pos_embed_learned

    def decoder_inputs(self, encoded: Tensor | None, slots: Tensor) -> Tensor:
        """Decoder inputs [R, P, C] of some slots [R, P] only: encoded [R, P, dim], mask tokens if None."""
        places = self.decoder_pos_embed_learned[0][slots.clamp(max=self.buffer + self.num_tokens - 1)]
        return places + (self.mask_token[0] if encoded is None else self.decoder_embed(encoded))

    def decode(self, x: Tensor, attention: AttentionInputs, asked: Tensor | None = None) -> Tensor:
        """Decoder inputs [R, P, C] -> features [R, P, C], or [R, A, C] of the inputs `asked` [R, A] only."""
        last = len(self.decoder_blocks) - 1
        for layer, block in enumerate(self.decoder_blocks):
            x = block(x, attention, layer, asked if layer == last else None)
        return self.decoder_norm(x)

    def conditions(self, features: Tensor, positions: Tensor) -> Tensor:
        """Conditions of the head [R, A, C] of decoded features at `positions` [R, A]; -1 is padding."""
        return features + self.diffusion_pos_embed_learned[0][positions.clamp(min=0)]

    def forward(
        self,
        slots: Tensor,
        tokens: Tensor,
        known: Tensor,
        asked: Tensor | None = None,
        *,
        embedded: bool = False,
        padded: bool = True,
    ) -> Tensor:
        """A full pass.

        Args:
            slots: [R, b, dim], what the condition slots hold, from `embed_condition`, or from `embed_slots` if
                `embedded`.
            tokens: [R, K, C], the known tokens.
            known: [R, K] their positions; -1 is padding, at the end of a row.
            asked: [R, A] positions whose condition is wanted, -1 is padding; all if None.
            padded: whether `known` may hold padding; without it attention needs no mask, which is faster.

        Returns:
            conditions of the head, [R, A or N, C].
        """
        x = torch.cat([slots if embedded else self.embed_slots(slots), self.embed_tokens(tokens, known)], 1)
        mask = (
            F.pad(known >= 0, (self.buffer, 0), value=True)[:, None, None] if padded else None
        )  # [R, 1, 1, b + K]
        encoded = self.encode(x, AttentionInputs(mask=mask))
        x = self.spread(encoded, known)
        if asked is None:
            positions = torch.arange(self.num_tokens, device=x.device).expand(x.shape[0], -1)
            return self.conditions(self.decode(x, AttentionInputs())[:, self.buffer :], positions)
        features = self.decode(x, AttentionInputs(), asked.clamp(min=0) + self.buffer)
        return self.conditions(features, asked)

    # -- published weights -----------------------------------------------------------------------------

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Self:
        """A randomly initialised model of a published size ("base", "large", "huge")."""
        if name not in PRESETS:
            raise unknown_name("MAR size", name, PRESETS)
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_original(
        cls,
        path: str | os.PathLike[str],
        *,
        size: str | None = None,
        num_heads: int | None = None,
        decoder_heads: int | None = None,
        averaged: bool = True,
    ) -> Self:
        """Load a published checkpoint, such as `checkpoint-last.pth` of MAR-B, MAR-L or MAR-H.

        All sizes but the number of heads are read off the tensors; that follows from the width for published sizes.

        Args:
            size: refuse a file of another size than this preset.
            num_heads, decoder_heads: for other sizes.
            averaged: take `model_ema`, as the published results do, instead of `model`.

        Raises:
            CheckpointError: see `read_published_weights` and `load_strict`; another size than `size`.
            InputError: an unknown size; a width whose number of heads nobody knows.
        """
        state = read_published_weights(path, anchor_key="diffusion_pos_embed_learned", averaged=averaged)
        sizes = published_sizes(state, source=str(path))
        if size is not None:
            if size not in PRESETS:
                raise unknown_name("MAR size", size, PRESETS)
            wrong = [k for k, v in PRESETS[size].items() if k != "num_heads" and sizes[k] != v]
            if wrong:
                raise CheckpointError(
                    f"{path} holds a MAR with {wrong[0]}={sizes[wrong[0]]}, not MAR-{size}; choose the file of that "
                    "size."
                )
        for name, width, chosen in (
            ("num_heads", "dim", num_heads),
            ("decoder_heads", "decoder_dim", decoder_heads),
        ):
            heads = chosen or _HEADS.get(sizes[width])
            if heads is None:
                raise InputError(f"a MAR of width {sizes[width]} is of no published size; pass {name}.")
            sizes[name] = heads
        model = cls(**sizes)
        load_strict(model, state, source=str(path))
        return model.eval()


def published_sizes(state: Mapping[str, Tensor], *, source: str) -> dict[str, Any]:
    """Constructor arguments of a state dict in the published layout, but for the heads, which it does not tell.

    Raises:
        CheckpointError: a tensor that tells a size is missing, or the tokens are no square.
    """

    def depth(prefix: str) -> int:
        return 1 + max(int(m[1]) for k in state if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", k)))

    try:
        tokens, decoder_dim = state["diffusion_pos_embed_learned"].shape[1:]
        slots, dim = state["encoder_pos_embed_learned"].shape[1:]
        sizes = {
            "dim": dim,
            "decoder_dim": decoder_dim,
            "encoder_depth": depth("encoder_blocks"),
            "decoder_depth": depth("decoder_blocks"),
            "grid_size": math.isqrt(tokens),
            "token_channels": state["z_proj.weight"].shape[1],
            "buffer_size": slots - tokens,
            "num_classes": state["class_emb.weight"].shape[0],
            "head_depth": depth("diffloss.net.res_blocks"),
            "head_width": state["diffloss.net.input_proj.weight"].shape[0],
            "mlp_ratio": state["encoder_blocks.0.mlp.fc1.weight"].shape[0] / dim,
        }
    except (KeyError, ValueError, IndexError) as error:
        reason = f"it lacks {error.args[0]}" if isinstance(error, KeyError) else "it has no such blocks"
        raise CheckpointError(f"{source} does not fit MARTransformer: {reason}.") from error
    if sizes["grid_size"] ** 2 != tokens:
        raise CheckpointError(f"{source} has {tokens} tokens per image, which are no square grid.")
    return sizes
