"""The published VAR loop, rewritten without any of this library's optimisations: what its engine is compared with.

Per scale it works out every modulation from the condition, grows keys and values by concatenation, keeps those of
the last scale, runs the output layer over both halves of a guided call, and sorts the whole vocabulary for top-p. The
weights are those of a `VARTransformer`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from varaccel.models.next_scale_blocks import MAX_LOG_TEMPERATURE
from varaccel.models.var import Block, VARTransformer
from varaccel.tokenizers.multiscale_vq import MultiScaleQuantizer


class GrownCache:
    """Keys and values of one block, concatenated scale by scale, as the published loops of these models keep them."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys = k if self.keys is None else torch.cat([self.keys, k], 2)
        self.values = v if self.values is None else torch.cat([self.values, v], 2)
        return self.keys, self.values


def _attention(block: Block, x: Tensor, past: GrownCache) -> Tensor:
    attn = block.attn
    bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    qkv = F.linear(x, attn.mat_qkv.weight, bias).view(*x.shape[:2], 3, attn.num_heads, attn.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    assert attn.scale_mul_1H11 is not None
    q = F.normalize(q, dim=-1) * attn.scale_mul_1H11.clamp_max(MAX_LOG_TEMPERATURE).exp()
    k, v = past(F.normalize(k, dim=-1), v)
    out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    return attn.proj(out.transpose(1, 2).reshape(x.shape))


def _block(model: VARTransformer, block: Block, x: Tensor, vectors: Tensor, past: GrownCache) -> Tensor:
    if model.shared_ada_lin is None:
        assert block.ada_lin is not None
        modulation = block.ada_lin(vectors).view(len(vectors), 1, 6, -1)
    else:
        modulation = model.shared_ada_lin(vectors).view(len(vectors), 1, 6, -1) + block.ada_gss
    gate_attn, gate_ffn, scale_attn, scale_ffn, shift_attn, shift_ffn = modulation.unbind(2)
    x = x + _attention(block, block.norm(x).mul(scale_attn.add(1)).add(shift_attn), past).mul(gate_attn)
    return x + block.ffn(block.norm(x).mul(scale_ffn.add(1)).add(shift_ffn)).mul(gate_ffn)


def filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [..., V] with -inf at what top-k, then top-p drop; 0 switches either off."""
    if top_k:
        border = logits.topk(min(top_k, logits.shape[-1]), largest=True, sorted=False).values.amin(
            -1, keepdim=True
        )
        logits = logits.masked_fill(logits < border, -torch.inf)
    if 0 < top_p < 1:
        ordered, index = logits.sort(dim=-1)
        dropped = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(dropped.scatter(-1, index, dropped), -torch.inf)
    return logits


@torch.inference_mode()
def published_loop(
    model: VARTransformer,
    quantizer: MultiScaleQuantizer,
    vectors: Tensor,
    *,
    cfg: float,
    top_k: int = 0,
    top_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw images as the published code does.

    Args:
        vectors: condition vectors [B, C], from `embed_condition`.
        cfg: guidance of the last scale; both halves are computed even if it is 0.
        top_k, top_p: 0 switches them off; top_k = 1 is greedy.
        generator: of all draws.

    Returns:
        token ids [B, L] and the feature map [B, D, n, n].
    """
    schedule, batch = model.schedule, len(vectors)
    both = torch.cat([vectors, model.null_condition().expand(batch, -1)])
    levels = model.positions()
    x = both.unsqueeze(1) + model.pos_start + levels[:, :1]
    feature_map = quantizer.start(batch)
    past = [GrownCache() for _ in model.blocks]
    token_ids = []
    for scale in range(len(schedule)):
        for block, cache in zip(model.blocks, past, strict=True):
            assert isinstance(block, Block)
            x = _block(model, block, x, both, cache)
        head_scale, head_shift = model.head_nm.ada_lin(both).view(2 * batch, 1, 2, -1).unbind(2)
        logits = model.head(model.head_nm.norm(x).mul(head_scale.add(1)).add(head_shift)).float()
        strength = cfg * schedule.progress(scale)
        logits = (1 + strength) * logits[:batch] - strength * logits[batch:]
        probs = filtered(logits, top_k, top_p).softmax(-1)
        drawn = torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(batch, -1)
        token_ids.append(drawn)
        feature_map = feature_map + quantizer.spread(quantizer.lookup(drawn), scale)
        if scale + 1 < len(schedule):
            seen = quantizer.look(feature_map, scale + 1)
            x = model.word_embed(seen.to(model.word_embed.weight.dtype)) + levels[:, schedule.span(scale + 1)]
            x = x.repeat(2, 1, 1)
    return torch.cat(token_ids, 1), feature_map
