"""The one-layer EAGLE drafter, for any causal network.

EAGLE (Li et al. 2024, arXiv 2401.15077) drafts the target's next *feature*, the hidden state after its final
norm, from the feature before it and the token that was drawn from that. Logits of a draft token are the target's own
output head on the drafted feature, so the drafter has none. For LlamaGen, LANTERN (arXiv 2410.03355) gives it the
target's two-dimensional positions. Parameter names are those of its published checkpoints.
"""

from __future__ import annotations

import os
from typing import Literal, Protocol, Self, get_args, runtime_checkable

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from varaccel.errors import CheckpointError, InputError, unknown_name
from varaccel.models.llamagen import LlamaGenTransformer, RMSNorm, feed_forward_width
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.checkpoints import load_strict, read_published_weights
from varaccel.nn.kv_cache import KVCache
from varaccel.nn.rotary import line_rotary_table, rotary_table, rotate
from varaccel.nn.signature import Signature

Positions = Literal["grid", "line"]
"""How a drafter tells places: by row and column of a square grid, as LlamaGen does, or along the line of slots."""

HEAD_WIDTH = 64
"""Channels of an attention head, at least, where the target does not give the number of heads."""


@runtime_checkable
class Target(Protocol):
    """What an `EagleHead` asks of the network that it drafts for; every causal network has it."""

    @property
    def device(self) -> torch.device: ...

    def signature(self) -> Signature: ...

    def embed_tokens(self, tokens: Tensor, positions: Tensor) -> Tensor: ...

    def transform(self, x: Tensor, attention: AttentionInputs) -> Tensor: ...

    def logits(self, features: Tensor) -> Tensor: ...


class EagleAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, attention: AttentionInputs) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, P, D]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        assert attention.positional is not None
        q, k = rotate(q, attention.positional), rotate(k, attention.positional)
        if attention.cache is not None:
            assert attention.slots is not None
            k, v = attention.cache.update(0, attention.slots, k, v, attention.length)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention.mask, is_causal=attention.causal)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class EagleFeedForward(nn.Module):
    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, width, bias=False)
        self.up_proj = nn.Linear(dim, width, bias=False)
        self.down_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class EagleLayer(nn.Module):
    """A Llama layer without the norm before attention; nothing is normalised after it either."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, eps: float) -> None:
        super().__init__()
        self.self_attn = EagleAttention(dim, num_heads)
        self.mlp = EagleFeedForward(dim, ffn_dim)
        self.post_attention_layernorm = RMSNorm(dim, eps)

    def forward(self, x: Tensor, attention: AttentionInputs) -> Tensor:
        x = x + self.self_attn(x, attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class EagleHead(ModelMixin, ConfigMixin):
    """Predicts the next feature of a causal network from pairs (feature, token drawn from it).

    Pair t joins the target's feature of slot t with the token in slot t + 1, and its output stands for the
    feature of slot t + 1. A call with T condition slots thus has T - 1 pairs of the prefix, whose token is
    0 because a condition slot holds none of the image's; then pair T - 1 + n holds image token n and sits at its place.

    With `positions` "line" the places are counted along the slots, so that T and the grids are the call's and may
    differ from call to call; pairs of padded condition slots are masked. With "grid", as published for LlamaGen, both
    belong to the drafter, and the prefix pairs are never masked, padded captions included.

    The token embedding is the drafter's own and frozen: in published drafters it is not the target's input
    embedding, so it must not be tied to it.

    Args:
        vocab_size, dim: those of the target, whose features have `dim` channels.
        ffn_dim, num_heads: of the drafter's layer; `dim / num_heads` must be a multiple of 4, of 2 with "line".
        positions: see above.
        grid_size, prefix_length: with "grid", side of the target's grid and its condition slots T; None with "line".
        rope_base: of the rotary embedding.
        prefix_identity: see `LlamaGenTransformer`; without meaning for "line".
        norm_eps: Llama's own, as published.
        fc_bias: whether the layer that joins embedding and feature has a bias.

    Raises:
        InputError: sizes that do not fit each other.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 16384,
        dim: int = 1280,
        ffn_dim: int = 3584,
        num_heads: int = 20,
        grid_size: int | None = 16,
        prefix_length: int | None = 120,
        rope_base: float = 10000.0,
        prefix_identity: bool = False,
        norm_eps: float = 1e-6,
        fc_bias: bool = True,
        positions: Positions = "grid",
    ) -> None:
        super().__init__()
        if positions not in get_args(Positions):
            raise unknown_name("kind of positions", str(positions), get_args(Positions))
        multiple = 4 if positions == "grid" else 2
        if dim % num_heads or (dim // num_heads) % multiple:
            raise InputError(
                f"dim={dim} over num_heads={num_heads} must give a head width divisible by {multiple}."
            )
        if positions == "line":
            self.register_to_config(grid_size=None, prefix_length=None)
        elif grid_size is None or prefix_length is None or prefix_length < 1:
            raise InputError(
                "positions on a grid need a grid_size and a prefix_length of at least 1, got "
                f"grid_size={grid_size} and prefix_length={prefix_length}."
            )
        self.embed_tokens = nn.Embedding(vocab_size, dim)
        self.embed_tokens.requires_grad_(False)
        self.fc = nn.Linear(2 * dim, dim, bias=fc_bias)
        self.layers = nn.ModuleList([EagleLayer(dim, num_heads, ffn_dim, norm_eps)])

    # -- sizes -----------------------------------------------------------------------------------------

    @property
    def masks_padding(self) -> bool:
        """Whether pairs of padded condition slots are masked."""
        return bool(self.config.positions == "line")

    @property
    def head_dim(self) -> int:
        return self.config.dim // self.config.num_heads

    def rotary_table(self, length: int, device: torch.device | None = None) -> Tensor:
        """[length, head_dim / 2, 2], the places of the leading pairs of a call; see `rotate`.

        Raises:
            InputError: more pairs than the prefix and the grid have, where these are fixed.
        """
        device, config = device or self.device, self.config
        if config.positions == "line":
            # places count padding, too: rotary attention sees their differences only
            return line_rotary_table(length, self.head_dim, base=config.rope_base, device=device)
        table = rotary_table(
            config.grid_size,
            self.head_dim,
            config.prefix_length - 1,
            base=config.rope_base,
            device=device,
            prefix_identity=config.prefix_identity,
        )
        if length > len(table):
            raise InputError(
                f"the drafter knows {len(table)} places, those of {config.prefix_length - 1} prefix pairs and a grid "
                f"of {config.grid_size} x {config.grid_size} tokens, but the image has {length}."
            )
        return table[:length]

    def new_cache(self, rows: int, slots: int) -> KVCache:
        """An empty cache of `rows` rows and `slots` slots."""
        return KVCache(
            layers=1,
            batch=rows,
            heads=self.config.num_heads,
            slots=slots,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    # -- the network -----------------------------------------------------------------------------------

    def fuse(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Pairs as inputs of the layer: tokens [B, P] int64, features [B, P, dim] -> [B, P, dim]."""
        return self.fc(torch.cat([self.embed_tokens(tokens).to(features.dtype), features], dim=-1))

    def transform(self, x: Tensor, attention: AttentionInputs) -> Tensor:
        """Fused pairs [B, P, dim] -> predicted next features [B, P, dim]."""
        for layer in self.layers:
            x = layer(x, attention)
        return x

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Causal pass over the leading pairs of an image, without a cache.

        Args:
            tokens: [B, P] int64; 0 in the pairs of the prefix, then image tokens in raster order.
            features: [B, P, dim], the target's features of slots 0 to P - 1.

        Returns:
            [B, P, dim]; entry t stands for the target's feature of slot t + 1.
        """
        rotary = self.rotary_table(tokens.shape[1], features.device)
        return self.transform(self.fuse(tokens, features), AttentionInputs(rotary, causal=True))

    # -- its target ------------------------------------------------------------------------------------

    def check_fits(self, target: object) -> None:
        """Make sure that this drafter was made for models of the target's sizes.

        Raises:
            InputError: no causal network, or one of another codebook, another width or, where the drafter has them
                fixed, another grid or prefix.
        """
        network = _checked_target(target)
        signature, config = network.signature(), self.config
        facts: dict[str, tuple[object, object]] = {
            "token ids": (config.vocab_size, signature.vocab_size),
            "feature channels": (config.dim, _feature_width(network)),
        }
        if config.positions == "grid":
            sides = {*(signature.layout or ())}
            facts["tokens per row"] = (config.grid_size, sides.pop() if len(sides) == 1 else signature.layout)
            # a class is told by a slot of its own, which signatures do not count
            slots = signature.condition_slots or getattr(target, "prefix_length", config.prefix_length)
            facts["condition slots"] = (config.prefix_length, slots)
        if wrong := [f"{a} instead of {b} {name}" for name, (a, b) in facts.items() if a != b]:
            raise InputError(f"the drafter was made for another model: it has {', '.join(wrong)}.")

    @classmethod
    def for_target(
        cls,
        target: Target,
        ffn_dim: int | None = None,
        num_heads: int | None = None,
        *,
        features: Tensor | None = None,
    ) -> Self:
        """A new drafter to be trained for `target`, with a frozen copy of its token embedding.

        For a `LlamaGenTransformer` it has the target's positions and sizes, for any other network positions along the
        line of slots.

        Args:
            ffn_dim: width of the feed-forward layer; about 8/3 of the target's width if None.
            num_heads: heads of the layer; if None those of a `LlamaGenTransformer`, or heads of 64 channels or more.
            features: [..., dim] some features of the target, for their scale; if None it is that of the weight of
                `target.norm`, or 1 where the target has none.

        Raises:
            InputError: no causal network of token ids.
        """
        _checked_target(target)
        vocab_size = target.signature().vocab_size
        assert vocab_size is not None
        with torch.no_grad():
            # at position 0, for networks that add something of the place
            tokens = torch.arange(vocab_size, device=target.device).unsqueeze(0)
            embedding = target.embed_tokens(tokens, torch.zeros_like(tokens))[0].float().cpu()
        dim = embedding.shape[1]
        if isinstance(target, LlamaGenTransformer):
            config = target.config
            head = cls(
                vocab_size=vocab_size,
                dim=dim,
                ffn_dim=ffn_dim or feed_forward_width(dim, config.ffn_multiple_of),
                num_heads=num_heads or config.num_heads,
                grid_size=config.grid_size,
                prefix_length=target.prefix_length,
                rope_base=config.rope_base,
                prefix_identity=config.prefix_identity,
            )
        else:
            head = cls(
                vocab_size=vocab_size,
                dim=dim,
                ffn_dim=ffn_dim or feed_forward_width(dim, min(dim, 256)),
                num_heads=num_heads or _heads(dim),
                positions="line",
            )
        # Embeddings are often much smaller than features; a new `fc` should hear both equally well.
        with torch.no_grad():
            head.embed_tokens.weight.copy_(embedding)
            scale = _rms(_feature_scale(target) if features is None else features)
            head.fc.weight[:, :dim] *= scale / _rms(embedding)
        return head.to(target.device)

    @classmethod
    def from_original(cls, path: str | os.PathLike[str], *, target: LlamaGenTransformer) -> Self:
        """Load a published drafter (`model.safetensors` or `pytorch_model.bin` of its authors).

        Widths and the presence of a bias are read off the tensors; grid, prefix and head count are not in
        them and are those of the target, as published.

        Raises:
            CheckpointError: see `read_published_weights` and `load_strict`; or a drafter of another target.
        """
        state = read_published_weights(path, anchor_key="fc.weight")
        try:
            vocab_size, dim = state["embed_tokens.weight"].shape
            ffn_dim = state["layers.0.mlp.gate_proj.weight"].shape[0]
        except KeyError as error:
            raise CheckpointError(f"{path} does not fit EagleHead: it lacks {error.args[0]}.") from error
        wanted = (target.config.vocab_size, target.config.dim)
        if (vocab_size, dim) != wanted:
            raise CheckpointError(
                f"{path} drafts for a model of {vocab_size} tokens and width {dim}, but the target has "
                f"{wanted[0]} tokens and width {wanted[1]}."
            )
        head = cls(
            vocab_size=vocab_size,
            dim=dim,
            ffn_dim=ffn_dim,
            num_heads=target.config.num_heads,
            grid_size=target.config.grid_size,
            prefix_length=target.prefix_length,
            rope_base=target.config.rope_base,
            fc_bias="fc.bias" in state,
        )
        load_strict(head, state, source=str(path))
        return head.eval()


def _checked_target(target: object) -> Target:
    """`target` as a causal network of token ids.

    Raises:
        InputError: it is none.
    """
    if isinstance(target, Target):
        signature = target.signature()
        if signature.paradigm == "causal" and signature.vocab_size is not None:
            return target
    raise InputError(
        "an EagleHead drafts for a causal network with features (embed_tokens, transform and logits), not for a "
        f"{type(target).__name__}."
    )


def _feature_width(target: Target) -> int:
    """Channels of the target's features, which are those of its inputs."""
    one = torch.zeros(1, 1, dtype=torch.int64, device=target.device)
    with torch.no_grad():
        return target.embed_tokens(one, one).shape[-1]


def _heads(dim: int) -> int:
    """The largest number of heads of at least `HEAD_WIDTH` channels that divides the width into even parts."""
    counts = range(max(1, dim // HEAD_WIDTH), 0, -1)
    return next((n for n in counts if dim % n == 0 and (dim // n) % 2 == 0), 1)


def _feature_scale(target: Target) -> Tensor:
    """A tensor of the scale of the target's features, as far as its weights tell: its final norm makes it."""
    weight = getattr(getattr(target, "norm", None), "weight", None)
    return torch.ones(1) if weight is None else weight


def _rms(x: Tensor) -> Tensor:
    return x.detach().float().square().mean().sqrt().cpu()
