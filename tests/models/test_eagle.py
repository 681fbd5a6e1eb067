"""The EAGLE drafter against recorded runs of the published code, and what it refuses."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.scripts import ROOT
from tests.tiny import GRID, eagle_head, transformer, var_transformer
from tests.toys import HOSTS, WIDTH, host
from varaccel.errors import CheckpointError, InputError
from varaccel.hosts.causal.guidance import Guidance
from varaccel.models.eagle import EagleHead
from varaccel.models.llamagen import LlamaGenTransformer
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.checkpoints import load_strict

LANTERN = ROOT / "tests" / "golden" / "lantern"
CLOSE = {"atol": 1e-4, "rtol": 0}
GRIDS = {"t2i": 16, "t2i2": 32}
PREFIX = 120


@cache
def case(index: int) -> dict[str, Any]:
    return json.loads((LANTERN / "cases.json").read_text())["heads"][index]


@cache
def golden(index: int) -> dict[str, Tensor]:
    return load_file(LANTERN / f"head_{index}.safetensors")


def weights(index: int) -> dict[str, Tensor]:
    return {k.removeprefix("weights."): v for k, v in golden(index).items() if k.startswith("weights.")}


@cache
def recorded(index: int) -> EagleHead:
    """The recorded drafter; shared by tests, so nobody may change it."""
    config = case(index)["config"]
    head = EagleHead(
        vocab_size=config["vocab"],
        dim=config["hidden"],
        ffn_dim=config["inter"],
        num_heads=config["heads"],
        grid_size=GRIDS[config["input_type"]],
        prefix_length=PREFIX,
    )
    load_strict(head, weights(index), source="golden weights")
    return head.eval().requires_grad_(False)


def logits(index: int, features: Tensor) -> Tensor:
    return features @ golden(index)["lm_head.weight"].T


def read_cached(head: EagleHead, tokens: Tensor, features: Tensor, extra: int) -> tuple[Tensor, Any]:
    """Features after a pass over all pairs but the last `extra` and one over these, and the cache."""
    kv = head.new_cache(tokens.shape[0], tokens.shape[1] + 16)
    table, length = head.rotary_table(tokens.shape[1]), tokens.shape[1]
    parts = []
    for span in (range(length - extra), range(length - extra, length)):
        slots = torch.tensor(span)
        attention = AttentionInputs(
            table[slots],
            mask=slots[:, None] >= torch.arange(span.stop),
            cache=kv,
            slots=slots,
            length=span.stop,
        )
        parts.append(head.transform(head.fuse(tokens[:, slots], features[:, slots]), attention))
    return torch.cat(parts, dim=1), kv


@pytest.mark.parametrize("index", [0, 1])
def test_causal_pass(index: int) -> None:
    data = golden(index)
    out = recorded(index)(data["fwd.input_ids"].long(), data["fwd.hidden_in"])
    torch.testing.assert_close(out, data["fwd.hidden_out"], **CLOSE)
    torch.testing.assert_close(logits(index, out), data["fwd.logits"], **CLOSE)


@pytest.mark.parametrize("index", [0, 1])
def test_cached_pass_and_tree_queries(index: int) -> None:
    """The last pairs from the cache, then several candidates for one position that see only themselves."""
    data, head = golden(index), recorded(index)
    extra = case(index)["config"]["extra"]
    tokens, features = data["fwd.input_ids"].long(), data["fwd.hidden_in"]
    out, kv = read_cached(head, tokens, features, extra)
    torch.testing.assert_close(out[:, -extra:], data["inc.hidden_out_tail"], **CLOSE)
    length, queries = tokens.shape[1], data["tree.input_ids"].shape[1]
    attention = AttentionInputs(
        head.rotary_table(length + 1)[length].expand(queries, -1, -1),
        mask=torch.cat([torch.ones(queries, length), data["tree.mask"][0, 0]], dim=1).bool(),
        cache=kv,
        slots=torch.arange(length, length + queries),
        length=length + queries,
    )
    out = head.transform(head.fuse(data["tree.input_ids"].long(), data["tree.hidden_in"]), attention)
    torch.testing.assert_close(out, data["tree.hidden_out"], **CLOSE)


@pytest.mark.parametrize(
    ("index", "run"),
    [(i, r) for i in (0, 1) for r, options in enumerate(case(i)["runs"]) if options["processor"]],
)
def test_guided_distribution_of_the_first_guess(index: int, run: int) -> None:
    """Rows conditional and unconditional, combined and processed as recorded, over two calls in a row."""
    data, head, options = golden(index), recorded(index), case(index)["runs"][run]
    features = torch.cat([data[f"run{run}.call{c}.hidden_in"] for c in (0, 1)], dim=1)
    tokens = data[f"run{run}.call1.input_ids"][:, 1:].long().expand(2, -1)
    out = logits(index, head(tokens, features))
    first = data[f"run{run}.call0.hidden_in"].shape[1] - 1
    for call, pair in enumerate((first, tokens.shape[1] - 1)):
        conditional, unconditional = out[:, pair]
        if options["cfg"] > 1:
            raw = Guidance(options["cfg"]).combine(conditional, unconditional)
        else:
            raw = conditional
        distribution = raw / options["processor"]["temperature"]
        if k := options["processor"]["top_k"]:
            distribution = distribution.masked_fill(
                distribution < distribution.topk(k).values[-1], -torch.inf
            )
        torch.testing.assert_close(
            distribution.softmax(-1), data[f"run{run}.call{call}.logp0"].exp(), atol=1e-5, rtol=0
        )


def test_guided_rows_of_static_drafting() -> None:
    for index, name in ((0, "static0"), (0, "static1"), (1, "static0")):
        data = golden(index)
        tokens = data[f"{name}.input_ids"][:, 1:].long().expand(2, -1)
        out = logits(index, recorded(index)(tokens, data[f"{name}.hidden_in"]))
        torch.testing.assert_close(out[:, -1], data[f"{name}.head_logits"][:, 0], **CLOSE)


def test_sizes() -> None:
    head = recorded(0)
    assert head.rotary_table(119 + 256).shape == (119 + 256, head.head_dim // 2, 2)
    assert not head.rotary_table(119).any(), "prefix pairs turn to nothing"
    assert not head.masks_padding
    assert head.new_cache(2, 380).keys.shape == (1, 2, 4, 380, 8)
    with pytest.raises(InputError, match="knows 375 places"):
        head.rotary_table(119 + 257)
    with pytest.raises(InputError, match="divisible by 4"):
        EagleHead(vocab_size=8, dim=12, ffn_dim=8, num_heads=2)


@pytest.mark.parametrize("model_type", ["c2i", "t2i"])
def test_for_target(model_type: str, tmp_path: Path) -> None:
    target = transformer(model_type)
    head = EagleHead.for_target(target)
    head.check_fits(target)
    assert (head.config.positions, head.config.grid_size) == ("grid", GRID)
    assert head.config.prefix_length == (1 if model_type == "c2i" else 8)
    assert torch.equal(head.embed_tokens.weight, target.tok_embeddings.weight)
    assert head.embed_tokens.weight.data_ptr() != target.tok_embeddings.weight.data_ptr()
    assert not head.embed_tokens.weight.requires_grad
    assert EagleHead.for_target(target, ffn_dim=20).layers[0].mlp.up_proj.out_features == 20
    head.save_pretrained(tmp_path)
    again = EagleHead.from_pretrained(tmp_path)
    assert not again.embed_tokens.weight.requires_grad
    for name, value in head.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


@pytest.mark.parametrize("name", HOSTS)
def test_for_any_causal_network(name: str, tmp_path: Path) -> None:
    """Positions along the line, so that prefix and grid are the call's; the embedding is the network's own."""
    target = host(name)
    head = EagleHead.for_target(target)
    head.check_fits(target)
    config = head.config
    assert (config.vocab_size, config.dim) == (target.config.vocab_size, WIDTH)
    assert (config.positions, config.grid_size, config.prefix_length) == ("line", None, None)
    tokens = torch.arange(config.vocab_size)[None]
    assert torch.equal(head.embed_tokens.weight, target.embed_tokens(tokens, torch.zeros_like(tokens))[0])
    assert not head.embed_tokens.weight.requires_grad
    head.save_pretrained(tmp_path)
    again = EagleHead.from_pretrained(tmp_path)
    assert (again.config.positions, again.config.grid_size, again.config.prefix_length) == (
        "line",
        None,
        None,
    )
    for key, value in head.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


def test_places_along_the_line() -> None:
    """What a pair sees depends on distances only: the same pairs further back give the same features."""
    head = eagle_head(host("prompted"))
    generator = torch.Generator().manual_seed(0)
    tokens, features = (
        torch.randint(3, (1, 6), generator=generator),
        torch.randn(1, 6, WIDTH, generator=generator),
    )
    x, table = head.fuse(tokens, features), head.rotary_table(20)
    expected = head(tokens, features)
    shifted = head.transform(x, AttentionInputs(table[9:15], causal=True))
    torch.testing.assert_close(shifted, expected, atol=1e-5, rtol=1e-4)
    scrambled = head.transform(x, AttentionInputs(table[[0, 2, 1, 4, 3, 5]], causal=True))
    assert not torch.allclose(scrambled, expected, atol=1e-3), "distances do matter"


def test_scale_of_features() -> None:
    """A new head hears embeddings as loudly as features: those given, or as a norm without weight leaves them."""

    def weight(features: Tensor | None) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return EagleHead.for_target(host("prompted"), features=features).fc.weight

    plain, given = weight(None), weight(torch.full((2, 3, WIDTH), -5.0))
    torch.testing.assert_close(given[:, :WIDTH], 5 * plain[:, :WIDTH])
    assert torch.equal(given[:, WIDTH:], plain[:, WIDTH:])


def published_target(**changes: object) -> LlamaGenTransformer:
    config = case(0)["config"]
    sizes: dict[str, object] = {
        "dim": config["hidden"],
        "num_heads": config["heads"],
        "vocab_size": config["vocab"],
        "grid_size": 16,
        "prefix_length": PREFIX,
    }
    return transformer("t2i", **{**sizes, **changes})


def test_published_file(tmp_path: Path) -> None:
    """The file's own embedding is kept: in published drafters it is not the target's."""
    target = published_target()
    save_file(weights(0), tmp_path / "model.safetensors")
    torch.save(weights(0), tmp_path / "pytorch_model.bin")
    for name in ("model.safetensors", "pytorch_model.bin"):
        head = EagleHead.from_original(tmp_path / name, target=target)
        assert torch.equal(head.embed_tokens.weight, weights(0)["embed_tokens.weight"])
        data = golden(0)
        out = head(data["fwd.input_ids"].long(), data["fwd.hidden_in"])
        torch.testing.assert_close(out, data["fwd.hidden_out"], **CLOSE)


def test_published_file_without_bias(tmp_path: Path) -> None:
    state = {k: v for k, v in weights(0).items() if k != "fc.bias"}
    save_file(state, tmp_path / "model.safetensors")
    head = EagleHead.from_original(tmp_path / "model.safetensors", target=published_target())
    assert head.fc.bias is None


def test_published_file_must_fit(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"

    def message(state: dict[str, Tensor], target: LlamaGenTransformer) -> str:
        save_file(state, file)
        with pytest.raises(CheckpointError) as error:
            EagleHead.from_original(file, target=target)
        return str(error.value)

    state, target = weights(0), published_target()
    lacking = {k: v for k, v in state.items() if "q_proj" not in k}
    assert "lacks layers.0.self_attn.q_proj.weight" in message(lacking, target)
    without_embedding = {k: v for k, v in state.items() if k != "embed_tokens.weight"}
    assert "lacks embed_tokens.weight" in message(without_embedding, target)
    extra = {**state, "layers.0.input_layernorm.weight": torch.ones(32)}
    assert "unexpected layers.0.input_layernorm.weight" in message(extra, target)
    assert "48 tokens and width 32, but the target has 24" in message(state, published_target(vocab_size=24))
    assert "target has 48 tokens and width 64" in message(state, published_target(dim=64))
    assert "another kind of model" in message({"weight": torch.ones(1)}, target)


def test_other_targets_are_refused() -> None:
    head = EagleHead.for_target(transformer("t2i"))
    with pytest.raises(InputError, match="24 instead of 30 token ids"):
        head.check_fits(transformer("t2i", vocab_size=30))
    with pytest.raises(InputError, match="32 instead of 64 feature channels"):
        head.check_fits(transformer("t2i", dim=64))
    with pytest.raises(InputError, match="4 instead of 5 tokens per row"):
        head.check_fits(transformer("t2i", grid_size=5))
    with pytest.raises(InputError, match="8 instead of 1 condition slots"):
        head.check_fits(transformer("c2i"))
    with pytest.raises(InputError, match="not for a VARTransformer"):
        head.check_fits(var_transformer("class"))
    with pytest.raises(InputError, match="not for a int"):
        head.check_fits(7)
    line = eagle_head(host("prompted"))
    with pytest.raises(InputError, match="3 instead of 4 token ids"):
        line.check_fits(host("lined"))
    with pytest.raises(InputError, match="kind of positions"):
        EagleHead(positions="circle")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="need a grid_size"):
        EagleHead(grid_size=None)
