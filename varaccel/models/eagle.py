"""The one-layer EAGLE drafter that LANTERN trains for LlamaGen.

EAGLE (Li et al. 2024, arXiv 2401.15077) drafts the target's next *feature*, the hidden state after its final
norm, from the feature before it and the token that was drawn from that; LANTERN (arXiv 2410.03355) gives it
LlamaGen's two-dimensional positions. Logits of a draft token are the target's own output head on the drafted
feature, so the drafter has none. Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

import os
from typing import Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from varaccel.errors import CheckpointError, InputError
from varaccel.models.llamagen import LlamaGenTransformer, RMSNorm, feed_forward_width
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.checkpoints import load_strict, read_published_weights
from varaccel.nn.kv_cache import KVCache
from varaccel.nn.rotary import rotary_table, rotate


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
    """Predicts the next feature of a `LlamaGenTransformer` from pairs (feature, token drawn from it).

    Pair t joins the target's feature of slot t with the token in slot t + 1, and its output stands for the
    feature of slot t + 1. A target with T condition slots thus has T - 1 pairs of the prefix, whose token is
    0 because a condition slot holds none; then pair T - 1 + n holds image token n and sits at its grid cell.
    The prefix pairs are never masked, padded captions included, as published.

    The token embedding is the drafter's own and frozen: in published drafters it is not the target's input
    embedding, so it must not be tied to it.

    Args:
        vocab_size, dim, grid_size: those of the target.
        ffn_dim, num_heads: of the drafter's layer; `dim / num_heads` must be a multiple of 4.
        prefix_length: condition slots T of the target.
        rope_base, prefix_identity, norm_eps: see `LlamaGenTransformer`; the published drafter keeps Llama's own eps.
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
        grid_size: int = 16,
        prefix_length: int = 120,
        rope_base: float = 10000.0,
        prefix_identity: bool = False,
        norm_eps: float = 1e-6,
        fc_bias: bool = True,
    ) -> None:
        super().__init__()
        if dim % num_heads or (dim // num_heads) % 4:
            raise InputError(f"dim={dim} over num_heads={num_heads} must give a head width divisible by 4.")
        if prefix_length < 1:
            raise InputError(f"prefix_length must be at least 1, got {prefix_length}.")
        self.embed_tokens = nn.Embedding(vocab_size, dim)
        self.embed_tokens.requires_grad_(False)
        self.fc = nn.Linear(2 * dim, dim, bias=fc_bias)
        self.layers = nn.ModuleList([EagleLayer(dim, num_heads, ffn_dim, norm_eps)])

    # -- sizes -----------------------------------------------------------------------------------------

    @property
    def prefix_pairs(self) -> int:
        """Number of pairs before the one that holds the first image token."""
        return self.config.prefix_length - 1

    @property
    def num_tokens(self) -> int:
        """Number of image tokens of one image."""
        return self.config.grid_size**2

    @property
    def head_dim(self) -> int:
        return self.config.dim // self.config.num_heads

    def rotary_table(self, device: torch.device | None = None) -> Tensor:
        """[prefix_pairs + num_tokens, head_dim / 2, 2]; row `prefix_pairs` + n is the cell of image token n."""
        return rotary_table(
            self.config.grid_size,
            self.head_dim,
            self.prefix_pairs,
            base=self.config.rope_base,
            device=device or self.device,
            prefix_identity=self.config.prefix_identity,
        )

    def new_cache(self, batch: int, spare: int = 0) -> KVCache:
        """An empty cache for `batch` rows, the prefix and one image, and `spare` slots beyond."""
        return KVCache(
            layers=1,
            batch=batch,
            heads=self.config.num_heads,
            slots=self.prefix_pairs + self.num_tokens + spare,
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
            tokens: [B, P] int64; the first `prefix_pairs` are 0, then image tokens in raster order.
            features: [B, P, dim], the target's features of slots 0 to P - 1.

        Returns:
            [B, P, dim]; entry t stands for the target's feature of slot t + 1.
        """
        rotary = self.rotary_table(features.device)[: tokens.shape[1]]
        return self.transform(self.fuse(tokens, features), AttentionInputs(rotary, causal=True))

    # -- its target ------------------------------------------------------------------------------------

    def check_fits(self, target: object) -> None:
        """Make sure that this drafter was made for models of the target's sizes.

        Raises:
            InputError: no `LlamaGenTransformer`, or one of another codebook, width, grid or prefix.
        """
        if not isinstance(target, LlamaGenTransformer):
            raise InputError(
                f"an EagleHead drafts for a LlamaGenTransformer, not for a {type(target).__name__}."
            )
        ours, theirs = self.config, target.config
        facts = {
            "token ids": (ours.vocab_size, theirs.vocab_size),
            "feature channels": (ours.dim, theirs.dim),
            "tokens per row": (ours.grid_size, theirs.grid_size),
            "condition slots": (ours.prefix_length, target.prefix_length),
        }
        if wrong := [f"{a} instead of {b} {name}" for name, (a, b) in facts.items() if a != b]:
            raise InputError(f"the drafter was made for another model: it has {', '.join(wrong)}.")

    @classmethod
    def for_target(cls, target: LlamaGenTransformer, ffn_dim: int | None = None) -> Self:
        """A new drafter to be trained for `target`, with a frozen copy of its token embedding.

        Args:
            ffn_dim: width of the feed-forward layer; that of the target's layers if None.
        """
        config = target.config
        head = cls(
            vocab_size=config.vocab_size,
            dim=config.dim,
            ffn_dim=ffn_dim or feed_forward_width(config.dim, config.ffn_multiple_of),
            num_heads=config.num_heads,
            grid_size=config.grid_size,
            prefix_length=target.prefix_length,
            rope_base=config.rope_base,
            prefix_identity=config.prefix_identity,
        )
        with torch.no_grad():
            embedding = target.tok_embeddings.weight.float()
            head.embed_tokens.weight.copy_(embedding)
            # Embeddings are often much smaller than features; a new `fc` should hear both equally well.
            scale = target.norm.weight.float().square().mean().sqrt() / embedding.square().mean().sqrt()
            head.fc.weight[:, : config.dim] *= scale.cpu()
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
