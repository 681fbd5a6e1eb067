"""The LlamaGen network beyond its published form: condition slots that keep their queries and keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from varaccel.models.eagle import EagleHead
from varaccel.models.llamagen import LlamaGenTransformer
from varaccel.nn.rotary import rotary_table, rotate

SLOTS = 4


def model(**settings: bool) -> LlamaGenTransformer:
    torch.manual_seed(0)
    sizes = {"dim": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 16, "grid_size": 2}
    text = {"model_type": "t2i", "prefix_length": SLOTS, "caption_dim": 8, "ffn_multiple_of": 8}
    return LlamaGenTransformer(**sizes, **text, dropout=0.0, **settings).eval()


def image_logits(network: LlamaGenTransformer, caption: Tensor) -> Tensor:
    tokens = torch.tensor([[3, 5, 7]])
    with torch.no_grad():
        return network(caption, tokens)[:, SLOTS:]


@pytest.mark.parametrize("identity", [False, True])
def test_image_tokens_tell_words_apart_only_with_the_identity(identity: bool) -> None:
    """Published slots have no key, so that every image token scores 0 against every word and reads their mean."""
    network = model(prefix_identity=identity)
    attention, table = network.layers[0].attention, network.rotary_table()
    inputs = torch.randn(1, SLOTS + 4, 32, generator=torch.Generator().manual_seed(1))
    q, k, _ = attention.wqkv(inputs).unflatten(-1, (6, 16)).transpose(1, 2).split(2, dim=1)
    q, k = rotate(q, table), rotate(k, table)
    scores = q[:, :, SLOTS:] @ k[:, :, :SLOTS].mT  # [1, H, image tokens, slots]
    assert bool(scores.any()) == identity


def test_without_a_place_the_order_of_words_says_nothing() -> None:
    network = model(prefix_identity=True)
    words = torch.randn(1, SLOTS, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(image_logits(network, words), image_logits(network, words.roll(1, 1)), atol=1e-5)


def test_the_table_leaves_the_grid_alone() -> None:
    published, kept = (rotary_table(3, 8, SLOTS, prefix_identity=identity) for identity in (False, True))
    assert torch.equal(published[SLOTS:], kept[SLOTS:])
    assert not published[:SLOTS].any()
    slots = torch.randn(1, 2, SLOTS, 8)
    assert torch.equal(rotate(slots, kept[:SLOTS]), slots)


def test_published_behaviour_is_the_default_and_a_drafter_follows_its_target() -> None:
    assert not LlamaGenTransformer.from_preset("B", num_layers=1, dim=48).config.prefix_identity
    for identity in (False, True):
        head = EagleHead.for_target(model(prefix_identity=identity))
        assert head.config.prefix_identity == identity
        assert bool(head.rotary_table(head.config.prefix_length - 1).any()) == identity
