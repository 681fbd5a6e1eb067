"""Cached token pruning against recorded runs of the published code, and caches whose layers differ in length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from varaccel.hosts.next_scale.growing_cache import Budget, GrowingCache
from varaccel.hosts.next_scale.importance import ReceivedAttention, highest, squared_distances
from varaccel.hosts.next_scale.pruning import kept_count, of_tokens, resized, restored
from varaccel.hosts.next_scale.skipping import high_frequency_share
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.gather import rows_of
from varaccel.nn.kv_cache import KVCache

GOLDEN = Path(__file__).parents[2] / "golden" / "fastvar"
RULES = json.loads((GOLDEN / "rules.json").read_text())


@pytest.mark.parametrize("name", RULES)
def test_published_rule(name: str) -> None:
    case, recorded = RULES[name], load_file(GOLDEN / "rule.safetensors")
    x, grid, cached = recorded[f"{name}.x"], tuple(case["grid"]), tuple(case["cached_grid"])
    scores = squared_distances(x)
    torch.testing.assert_close(scores, recorded[f"{name}.scores"])
    kept = highest(scores, case["keep"])
    assert torch.equal(kept.int(), recorded[f"{name}.kept"])
    assert torch.equal(rows_of(x, kept), recorded[f"{name}.gathered"])
    whole = restored(recorded[f"{name}.cache"], cached, grid, recorded[f"{name}.computed"], kept)
    torch.testing.assert_close(whole, recorded[f"{name}.restored"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("share", "tokens", "kept"),
    [
        (0.6, 1024, 615),
        (0.5, 1600, 800),
        (0.5, 2304, 1152),
        (0.25, 4096, 1024),
        (0.9, 10, 9),
        (1, 9, 9),
        (1e-6, 9, 1),
    ],
)
def test_how_many_tokens_run(share: float, tokens: int, kept: int) -> None:
    assert kept_count(share, tokens) == kept


def test_equal_scores_keep_the_first() -> None:
    scores = torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0]])
    assert highest(scores, 4).tolist() == [[1, 3, 0, 2]]


def test_places_follow_their_tokens() -> None:
    kept = torch.tensor([[2, 0], [1, 2]])
    table = torch.arange(12.0).view(3, 2, 2)
    chosen = of_tokens(AttentionInputs(table), kept).positional
    assert chosen is not None
    assert torch.equal(chosen, torch.stack([table[[2, 0]], table[[1, 2]]]))
    both = torch.stack([table, -table])
    chosen = of_tokens(AttentionInputs(both), kept).positional
    assert chosen is not None
    assert torch.equal(chosen, torch.stack([table[[2, 0]], -table[[1, 2]]]))
    assert of_tokens(AttentionInputs(), kept) == AttentionInputs()


def test_cells_of_uneven_size_are_averaged() -> None:
    x = torch.arange(6.0).view(1, 6, 1)  # 2 x 3
    assert resized(x, (2, 3), (1, 2)).flatten().tolist() == [(0 + 1 + 3 + 4) / 4, (1 + 2 + 4 + 5) / 4]
    assert resized(x, (2, 3), (2, 3)) is x


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_growing_cache_sees_what_a_static_one_sees() -> None:
    static = KVCache(
        layers=2, batch=2, heads=3, slots=7, head_dim=4, dtype=torch.float32, device=torch.device("cpu")
    )
    growing = GrowingCache(2, None)
    start = 0
    for count in (1, 4, 2):
        keys, values = numbers(2, 3, count, 4, seed=count), numbers(2, 3, count, 4, seed=9 + count)
        slots = torch.arange(start, start + count)
        for layer in (0, 1):
            seen = [cache.update(layer, slots, keys, values, start + count) for cache in (static, growing)]
            assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
        start += count
    beside = [cache.beside(1, keys, values, 7) for cache in (static, growing)]
    assert all(torch.equal(a, b) for a, b in zip(*beside, strict=True))
    assert growing.nbytes == growing.peak_bytes == static.nbytes
    assert (growing.batch, growing.slots) == (2, 7)
    growing.keep_rows([1])
    assert (growing.batch, 2 * growing.nbytes) == (1, static.nbytes)
    assert growing.peak_bytes == static.nbytes
    assert torch.equal(growing.beside(0, keys[1:], values[1:], 0)[0], beside[0][0][1:])


def test_budgets_keep_the_keys_that_differ_most() -> None:
    keys = torch.zeros(2, 1, 5, 2)
    keys[0, :, 3], keys[1, :, 1] = 5.0, -5.0  # of each row another one is far from the mean
    cache = GrowingCache(2, None)
    cache.budgets = [Budget(1, 5, (1, 4))]
    for layer in (0, 1):
        seen, _ = cache.update(layer, torch.arange(5), keys, keys)
        assert seen.shape[2] == 5, "the pass itself sees all of them"
    assert [cache.length(layer) for layer in (0, 1)] == [2, 5]
    kept, _ = cache.beside(0, keys[:, :, :0], keys[:, :, :0], 0)
    assert torch.equal(kept[0], keys[0][:, [0, 3]])
    assert torch.equal(kept[1], keys[1][:, [0, 1]])
    cache.budgets, cache.scores = [Budget(0, 5, (2, 2))], {0: torch.tensor([[0.0, 1, 3, 1, 2]]).expand(2, -1)}
    cache.update(0, torch.arange(5), keys + torch.arange(5.0).view(5, 1), keys)
    kept, _ = cache.beside(0, keys[:, :, :0], keys[:, :, :0], 0)
    assert torch.equal(kept[0, 0, -2:, 0], (keys[0, 0, :, 0] + torch.arange(5.0))[[2, 4]]), "in their order"


def test_received_attention() -> None:
    queries, keys = numbers(2, 3, 4, 5), numbers(2, 3, 4, 5, seed=1)
    received = ReceivedAttention()
    received(7, queries, keys, 0.5)
    expected = (0.5 * queries @ keys.mT).softmax(-1).mean((1, 2))
    torch.testing.assert_close(received.scores[7], expected)
    torch.testing.assert_close(expected.sum(1), torch.ones(2))


def test_high_frequencies() -> None:
    """Waves of one frequency lie on one side of the border; a sum of two has the share of its energies."""
    height, width = 6, 8
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    slow = torch.cos(2 * torch.pi * x / width)
    fast = torch.cos(2 * torch.pi * 3 * y / height)  # alternates
    middle = torch.sin(2 * torch.pi * 3 * x / width)
    maps = torch.stack([slow, fast, middle, slow + fast, torch.full_like(slow, 4.0)])
    shares = high_frequency_share(maps.flatten(1).unsqueeze(-1), (height, width))
    expected = [0, 1, 1, (fast.square().sum() / (fast.square().sum() + slow.square().sum())).item(), 0]
    torch.testing.assert_close(shares, torch.tensor(expected), atol=1e-6, rtol=0)
    assert high_frequency_share(torch.ones(2, 1, 3), (1, 1)).tolist() == [0, 0]
