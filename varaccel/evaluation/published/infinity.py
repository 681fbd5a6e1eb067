"""The published Infinity loop, rewritten without any of this library's optimisations: what its engine is compared with.

Per scale it works out keys and values of the text and the modulation of every block anew, grows keys and values by
concatenation, keeps those of the last scale, runs the output layer over both halves of a guided call, and sorts both
values of every bit. The weights are those of an `InfinityTransformer`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from varaccel.evaluation.published.var import GrownCache, filtered
from varaccel.models.infinity import InfinityBlock, InfinityTransformer
from varaccel.models.next_scale_blocks import MAX_LOG_TEMPERATURE, split_modulation
from varaccel.nn.condition import Condition
from varaccel.nn.rotary import rotate
from varaccel.tokenizers.bitwise_vq import BitwiseQuantizer, pack_bits


def _attention(block: InfinityBlock, x: Tensor, rotary: Tensor, past: GrownCache) -> Tensor:
    attn = block.attn
    bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    qkv = F.linear(x, attn.mat_qkv.weight, bias).view(*x.shape[:2], 3, attn.num_heads, attn.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    assert attn.scale_mul_1H11 is not None
    q = F.normalize(q.float(), dim=-1) * attn.scale_mul_1H11.float().clamp_max(MAX_LOG_TEMPERATURE).exp()
    q, k = rotate(q, rotary).to(v.dtype), rotate(F.normalize(k.float(), dim=-1), rotary).to(v.dtype)
    k, v = past(k, v)
    out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    return attn.proj(out.transpose(1, 2).reshape(x.shape))


def _block(
    block: InfinityBlock,
    x: Tensor,
    shared: Tensor,
    memory: Tensor,
    used: Tensor,
    rotary: Tensor,
    past: GrownCache,
) -> Tensor:
    modulation = shared + block.ada_gss.transpose(0, 2)
    gate_attn, gate_ffn, scale_attn, scale_ffn, shift_attn, shift_ffn = modulation.unbind(0)
    seen = block.norm(x).mul(scale_attn.add(1)).add(shift_attn)
    x = x + _attention(block, seen, rotary, past).mul(gate_attn)
    x = x + block.cross_attn(block.cross_norm(x), *block.cross_attn.read(memory), used)
    return x + block.ffn(block.norm(x).mul(scale_ffn.add(1)).add(shift_ffn)).mul(gate_ffn)


@torch.inference_mode()
def published_loop(
    model: InfinityTransformer,
    quantizer: BitwiseQuantizer,
    condition: Condition,
    *,
    cfg: float,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw images as the published code does.

    Args:
        condition: text features of the B images, and which of their slots are used.
        cfg: guidance of all scales; both halves are computed even if it is 1.
        temperature, top_k, top_p: of every bit; 0 switches the last two off, top_k = 1 is greedy.
        generator: of all draws.

    Returns:
        token ids [B, L] and the feature map [B, d, H_f, W_f].
    """
    schedule, batch = quantizer.schedule, condition.batch
    mask = condition.mask
    used = condition.values.new_ones(condition.values.shape[:2]).bool() if mask is None else mask.bool()
    text = torch.cat([condition.values.float(), model.without_text(used).float()])
    used = torch.cat([used, used])[:, None, None]
    norm = model.text_norm
    text = F.rms_norm(text, text.shape[-1:], norm.weight.float(), norm.eps).to(model.dtype)
    vectors, memory = model.text_pool(text, used), model.text_memory(text)
    shared = split_modulation(model.shared_ada_lin(vectors), 6)
    places = model.places(schedule)
    assert places.positional is not None
    x = vectors.unsqueeze(1) + model.pos_start + places.added[:, :1]
    feature_map = quantizer.start(batch)
    past = [GrownCache() for _ in model.blocks]
    token_ids = []
    for scale in range(len(schedule)):
        rotary = places.positional[schedule.span(scale)]
        for block, cache in zip(model.blocks, past, strict=True):
            assert isinstance(block, InfinityBlock)
            x = _block(block, x, shared, memory, used, rotary, cache)
        head = split_modulation(model.head_nm.ada_lin(vectors), 2)
        both = model.head(model.head_nm(x, head)).float()
        logits = (cfg * both[:batch] + (1 - cfg) * both[batch:]) / temperature
        probs = filtered(logits.unflatten(-1, (-1, 2)), top_k, top_p).softmax(-1)
        bits = torch.multinomial(probs.flatten(0, -2), 1, generator=generator).view(probs.shape[:-1])
        token_ids.append(pack_bits(bits))
        feature_map = feature_map + quantizer.spread(quantizer.lookup(token_ids[-1]), scale)
        if scale + 1 < len(schedule):
            seen = quantizer.look(feature_map, scale + 1)
            words = model.word_embed(seen.to(model.word_embed.weight.dtype))
            x = (words + places.added[:, schedule.span(scale + 1)]).repeat(2, 1, 1)
    return torch.cat(token_ids, 1), feature_map
