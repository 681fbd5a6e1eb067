"""Views of transformers models: they share weights, change nothing, and follow what happens to the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import disk_offload
from torch.nn import functional as F

from tests import tiny_transformers as tiny
from varaccel.errors import InputError
from varaccel.models.transformers_host import decoder_view
from varaccel.models.transformers_host.grouped_attention import GROUPED, grouped_attention
from varaccel.models.transformers_host.janus import JanusHost
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.condition import Condition
from varaccel.nn.grid import Grid


def prefix(host: JanusHost) -> Any:
    return host.encode_condition(Condition(torch.tensor([[1, 7, 8, 3]])), (Grid(4, 4),), guided=False)


def features(host: JanusHost, layers: list[int] | None = None) -> torch.Tensor:
    encoded = prefix(host)
    attention = AttentionInputs(encoded.positional[:, :4], causal=True)
    with torch.inference_mode():
        return host.transform(encoded.embeddings, attention, layers)


@pytest.mark.parametrize(("heads", "kv_heads", "queries"), [(8, 2, 5), (6, 1, 1), (4, 4, 3)])
def test_grouped_attention_is_that_of_repeated_keys(heads: int, kv_heads: int, queries: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, queries, 8, generator=generator)
    key, value = torch.randn(2, 2, kv_heads, 11, 8, generator=generator)
    mask = torch.rand(2, 1, queries, 11, generator=generator) > 0.3
    keys, values = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
    expected = F.scaled_dot_product_attention(query, keys, values, mask, scale=0.3).transpose(1, 2)
    found, _ = grouped_attention(None, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_the_model_keeps_its_own_attention_function() -> None:
    model = tiny.janus(kv_heads=1)
    host = JanusHost(model)
    before = features(host)
    decoder = model.model.language_model
    view: Any = host._view(tuple(range(host.num_layers)))
    assert view is not decoder
    assert view.layers[0].self_attn.config._attn_implementation == GROUPED
    assert view.layers[0].self_attn.q_proj is decoder.layers[0].self_attn.q_proj
    assert decoder.layers[0].self_attn.config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == "sdpa"
    whole = decoder(inputs_embeds=prefix(host).embeddings, use_cache=False).last_hidden_state
    torch.testing.assert_close(before, whole, atol=1e-5, rtol=0)


def test_heads_that_share_nothing_need_no_view() -> None:
    host = JanusHost(tiny.janus(kv_heads=4))
    features(host)
    assert host._view(tuple(range(host.num_layers))) is host.decoder


def test_some_layers_are_the_decoder_without_the_others() -> None:
    model = tiny.janus()
    host = JanusHost(model)
    some = features(host, [0, 2])
    del model.model.language_model.layers[1]
    torch.testing.assert_close(some, features(host), atol=1e-5, rtol=0)


def test_exchanged_modules_are_seen() -> None:
    model = tiny.janus(kv_heads=1)
    host = JanusHost(model)
    before = features(host)
    model.model.language_model.layers[1].mlp = (
        tiny.janus(kv_heads=1, seed=1).model.language_model.layers[1].mlp
    )
    after = features(host)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, features(JanusHost(model)), atol=0, rtol=0)


@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_offloaded_weights_are_read_where_they_are_needed(tmp_path: Any, layers: list[int] | None) -> None:
    model = tiny.janus(kv_heads=1)
    host = JanusHost(model)
    expected = features(host, layers)
    disk_offload(model, tmp_path, execution_device="cpu")
    assert next(model.parameters()).device.type == "meta"
    assert host.device == torch.device("cpu")
    torch.testing.assert_close(features(host, layers), expected, atol=1e-5, rtol=0)


def test_an_attention_implementation_without_masks_is_refused() -> None:
    model = tiny.janus()
    model.config.text_config._attn_implementation = "flex_attention"
    with pytest.raises(InputError, match=r"flex_attention.*attn_implementation='sdpa'"):
        JanusHost(model)


def test_views_share_what_is_not_theirs() -> None:
    decoder = tiny.janus().model.language_model
    view: Any = decoder_view.with_layers(decoder, "layers", [decoder.layers[1]])
    assert len(view.layers) == 1
    assert len(decoder.layers) == 3
    assert view.norm is decoder.norm
