"""The published LlamaGen loop, rewritten without any of this library's optimisations: what its engine is compared with.

Every call makes caches, mask and rotary table anew. Every pass attends over all slots of the image, also those that
hold nothing yet, under a mask row of that length and with attention as separate products; it copies keys and values of
all slots for heads that share none, runs the output layer over every slot of the prefix, and keeps the unconditional
rows after guidance has ended. The weights are those of a `LlamaGenTransformer`.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from varaccel.engine.options import MIN_TEMPERATURE
from varaccel.models.llamagen import Attention, Block, FeedForward, LlamaGenTransformer, RMSNorm
from varaccel.nn.rotary import rotate


class _Slots:
    """What a call keeps: keys and values of all layers, who sees whom, and the rotary table."""

    def __init__(self, model: LlamaGenTransformer, rows: int, prefix: int, mask: Tensor | None) -> None:
        device, dtype = model.device, model.tok_embeddings.weight.dtype
        count = 8 * -(-(prefix + model.num_tokens) // 8)
        shape = (rows, model.config.num_heads, count, model.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in model.layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in model.layers]
        self.mask = torch.ones(count, count, dtype=torch.bool, device=device).tril().repeat(rows, 1, 1)
        if mask is not None:
            used = mask.bool().repeat(rows // len(mask), 1)
            self.mask[:, :, :prefix] &= used.unsqueeze(1)
            self.mask |= torch.eye(count, dtype=torch.bool, device=device)
        self.rotary = model.rotary_table(prefix=prefix)


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + norm.eps)).to(x.dtype) * norm.weight


def _attention(attn: Attention, x: Tensor, layer: int, slots: _Slots, places: Tensor, mask: Tensor) -> Tensor:
    sizes = [heads * attn.head_dim for heads in (attn.num_heads, attn.num_kv_heads, attn.num_kv_heads)]
    projected = F.linear(x, attn.wqkv.weight).split(sizes, -1)
    q, k, v = (one.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for one in projected)
    rotary = slots.rotary[places]
    q, k = rotate(q, rotary), rotate(k, rotary)
    shared = attn.num_heads // attn.num_kv_heads
    keys = slots.keys[layer][:, : attn.num_kv_heads]
    values = slots.values[layer][:, : attn.num_kv_heads]
    keys[:, :, places] = k
    values[:, :, places] = v
    # also where every head has keys of its own, which makes it a copy of the whole cache
    keys, values = keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return F.linear(out.transpose(1, 2).reshape(x.shape), attn.wo.weight)


def _feed_forward(ffn: FeedForward, x: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, ffn.w1.weight)) * F.linear(x, ffn.w3.weight), ffn.w2.weight)


def _logits(model: LlamaGenTransformer, x: Tensor, slots: _Slots, places: Tensor) -> Tensor:
    """Logits [R, P, V] of a pass over inputs [R, P, D] at slots `places` [P]."""
    mask = slots.mask[: len(x), None, places]
    for layer, block in enumerate(model.layers):
        assert isinstance(block, Block)
        x = x + _attention(block.attention, _norm(block.attention_norm, x), layer, slots, places, mask)
        x = x + _feed_forward(block.feed_forward, _norm(block.ffn_norm, x))
    return F.linear(_norm(model.norm, x), model.output.weight).float()


def _drawn(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """Token ids [B, 1] from logits [B, P, V] of which the last place counts."""
    logits = logits[:, -1] / max(temperature, MIN_TEMPERATURE)
    if top_k > 0:
        border = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits[logits < border] = -torch.inf
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        dropped = ordered.softmax(-1).cumsum(-1) > top_p
        dropped[:, 1:] = dropped[:, :-1].clone()
        dropped[:, 0] = False
        logits[dropped.scatter(1, index, dropped)] = -torch.inf
    probs = logits.softmax(-1)
    if temperature == 0:
        return probs.topk(1).indices
    return torch.multinomial(probs, 1, generator=generator)


@torch.no_grad()
def published_loop(
    model: LlamaGenTransformer,
    condition: Tensor,
    condition_mask: Tensor | None = None,
    *,
    cfg: float,
    interval: int = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    tokens: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw token ids as the published code does.

    Args:
        condition: labels [B], or left-padded text features [B, T, C] with `condition_mask` [B, T].
        cfg: guidance; 1 and less is none, and the unconditional rows are not computed.
        interval: steps after the prefill whose number is above it are not guided; -1 guides all.
        temperature: 0 takes the most likely token.
        top_k, top_p: 0 and 1 switch them off.
        tokens: how many to draw, the whole image if None; caches are of the whole image's size all the same.
        generator: of all draws.

    Returns:
        token ids [B, `tokens`].
    """
    guided = cfg > 1
    if guided:
        condition = torch.cat([condition, model.unconditional(condition)])
    x = model.embed_condition(condition)
    prefix = x.shape[1]
    slots = _Slots(model, len(x), prefix, condition_mask)
    places = torch.arange(prefix, device=x.device)
    drawn: list[Tensor] = []
    for step in range(model.num_tokens if tokens is None else tokens):
        # the published code fuses attention in the prefill only
        with sdpa_kernel(SDPBackend.MATH) if step else nullcontext():
            logits = _logits(model, x, slots, places)
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = conditional
            if interval < 0 or step - 1 <= interval:
                logits = unconditional + (conditional - unconditional) * cfg
        drawn.append(_drawn(logits, temperature, top_k, top_p, generator))
        places = torch.tensor([prefix], device=x.device) if step == 0 else places + 1
        x = model.tok_embeddings(drawn[-1].repeat(2, 1) if guided else drawn[-1])
    return torch.cat(drawn, 1)
