"""Infinity's transformer against recorded runs of the published code, and the layout of its files."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from tests.scripts import ROOT
from varaccel.errors import CheckpointError, InputError
from varaccel.models.infinity import (
    PRESETS,
    BlockCondition,
    InfinityTransformer,
    TextRows,
    null_text,
    own_names,
    reference_places,
)
from varaccel.models.next_scale_blocks import modulated
from varaccel.nn.aspect_schedules import SIZES, infinity_schedule
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.condition import Condition
from varaccel.nn.residual import Update, add
from varaccel.nn.rotary import grid_rotary_table
from varaccel.nn.scale_schedule import ScaleSchedule
from varaccel.tokenizers.bitwise_vq import BitwiseQuantizer, pack_bits

GOLDEN = ROOT / "tests" / "golden" / "infinity"
MANIFEST: dict[str, Any] = json.loads((GOLDEN / "manifest.json").read_text())
TRANSFORMERS, RUNS = MANIFEST["transformers"], MANIFEST["runs"]
CLOSE_LOGITS = {"atol": 2e-3, "rtol": 1e-3}
CLOSE = {"atol": 1e-4, "rtol": 0.0}


@cache
def tensors(file: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / file)


def cases(name: str) -> dict[str, Tensor]:
    return tensors(f"inf_{name}_cases.safetensors")


@cache
def network(name: str) -> InfinityTransformer:
    """The recorded transformer; shared by tests, so nobody may change it."""
    model = InfinityTransformer.from_original(GOLDEN / TRANSFORMERS[name]["weights"])
    return model.requires_grad_(False)


def coordinates(ratio: str, scale: int) -> tuple[Tensor, Tensor]:
    recorded = tensors("rotary.safetensors")
    return recorded[f"{ratio}.{scale}.row"], recorded[f"{ratio}.{scale}.col"]


def schedule_of(run: str) -> ScaleSchedule:
    return infinity_schedule(RUNS[run]["ratio"], RUNS[run]["pn"])


def condition(rows: Tensor, lens: list[int], negative: Condition | None = None) -> Condition:
    """Packed features of several texts, padded at the left with what must not be read."""
    longest = max(lens)
    texts = [F.pad(text, (0, 0, longest - len(text), 0), value=torch.nan) for text in rows.split(lens)]
    mask = torch.arange(longest) >= longest - torch.tensor(lens).unsqueeze(1)
    return Condition(torch.stack(texts), mask.long(), negative)


def condition_of(name: str, run: str) -> Condition:
    options, golden = RUNS[f"{name}.{run}"], cases(name)
    negative = None
    if "negative_lens" in options:
        negative = condition(golden[f"{run}.negative_text"], options["negative_lens"])
    return condition(golden[f"{run}.text"], options["lens"], negative)


def recorded(kind: str) -> list[tuple[str, str]]:
    """Networks and runs with a tensor of that name."""
    runs = [tuple(run.split(".", 1)) for run in RUNS]
    return [(name, run) for name, run in runs if f"{run}.{kind}" in cases(name)]


# -- sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_sizes(name: str) -> None:
    config, model = TRANSFORMERS[name], network(name)
    assert not model.training
    assert (model.dim, model.num_heads, len(model.blocks)) == (
        config["width"],
        config["heads"],
        config["depth"],
    )
    ours = model.config
    assert (ours.text_dim, ours.text_tokens) == (config["text_channels"], config["text_maxlen"])
    assert ours.token_bits == config["bits_per_token"]
    assert sum(parameter.numel() for parameter in model.parameters()) == config["parameters"]
    signature = model.signature()
    assert (signature.vocab_size, signature.token_channels) == (2**ours.token_bits, ours.token_bits)
    assert (signature.condition, signature.condition_size) == ("caption", ours.text_dim)


COUNTS = {
    "125M": 125.2,
    "layer16": 361.6,
    "1B": 940.9,
    "layer32": 2256.7,
    "2B": 2204.6,
    "layer40": 4716,
    "layer48": 8767,
    "8B": 8375.8,
}
"""Millions of parameters of the published code's sizes."""


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_of_presets(preset: str) -> None:
    with torch.device("meta"):
        model = InfinityTransformer.from_preset(preset)
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert count == pytest.approx(COUNTS[preset], abs=0.06 if COUNTS[preset] % 1 else 0.6)


def test_new_models_are_the_same_without_text() -> None:
    model = InfinityTransformer(depth=1, dim=32, num_heads=2, token_bits=4, text_dim=16, text_tokens=5)
    assert torch.equal(model.cfg_uncond, null_text(5, 16))
    other = InfinityTransformer(depth=1, dim=32, num_heads=2, token_bits=4, text_dim=16, text_tokens=5)
    assert torch.equal(model.cfg_uncond, other.cfg_uncond)
    assert not torch.equal(model.head.weight, other.head.weight)


# -- text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "run"), recorded("cond.sos"))
def test_conditioning(name: str, run: str) -> None:
    """Texts are read padded beside each other, and give what they gave one by one."""
    golden, model = cases(name), network(name)
    given = condition_of(name, run)
    assert given.mask is not None
    rows = model.condition_rows(given, given.batch, guided=True)
    assert rows.rows == 2 * given.batch == len(golden[f"{run}.cond.sos"])
    vectors = golden[f"{run}.cond.sos"]
    torch.testing.assert_close(rows.start, vectors.unsqueeze(1) + model.pos_start, **CLOSE)
    used = torch.cat([given.mask, given.mask]).bool()
    memory = golden[f"{run}.cond.ca_kv"]
    shared = golden[f"{run}.cond.gss"].permute(2, 0, 1, 3)  # [6, R, 1, C]
    for block, told in zip(model.blocks, rows.blocks, strict=True):
        torch.testing.assert_close(told.modulation, shared + block.ada_gss.transpose(0, 2), **CLOSE)
        k, v = (memory @ block.cross_attn.mat_kv.weight.T).chunk(2, dim=1)
        torch.testing.assert_close(told.keys.transpose(1, 2)[used].flatten(1), k, **CLOSE)
        v = v + block.cross_attn.v_bias
        torch.testing.assert_close(told.values.transpose(1, 2)[used].flatten(1), v, **CLOSE)
        assert told.mask is None or torch.equal(told.mask, used[:, None, None])
    without = model.without_text(given.mask)
    texts = torch.cat([given.values[given.mask.bool()], without[given.mask.bool()]])
    torch.testing.assert_close(model.text_norm(texts), golden[f"{run}.cond.text_norm"], **CLOSE)


def assert_same_rows(ours: TextRows, theirs: TextRows) -> None:
    """Equal, whatever the padding."""
    torch.testing.assert_close(ours.start, theirs.start, **CLOSE)
    torch.testing.assert_close(ours.head, theirs.head, **CLOSE)
    for a, b in zip(ours.blocks, theirs.blocks, strict=True):
        torch.testing.assert_close(a.modulation, b.modulation, **CLOSE)
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            for row in range(ours.rows):
                x_row, y_row = _unpadded(x, a.mask, row), _unpadded(y, b.mask, row)
                torch.testing.assert_close(x_row, y_row, **CLOSE)


def _unpadded(tensor: Tensor, mask: Tensor | None, row: int) -> Tensor:
    return tensor[row] if mask is None else tensor[row][:, mask[row, 0, 0]]


def test_negative_texts_have_lengths_of_their_own() -> None:
    """Their rows are what they are as prompts."""
    model, given = network("base"), condition_of("base", "greedy_negative")
    negative = given.negatives[0]
    assert given.values.shape != negative.values.shape
    rows = model.condition_rows(given, given.batch, guided=True)
    assert_same_rows(rows.part(slice(2, 4)), model.condition_rows(negative, 2, guided=False))
    assert_same_rows(rows.part(slice(0, 2)), model.condition_rows(given, 2, guided=False))
    null = model.condition_rows(Condition(given.values, given.mask), 2, guided=True).part(slice(2, 4))
    assert not torch.allclose(null.start, rows.start[2:], atol=1e-2)


def test_a_part_of_the_rows_is_those_rows() -> None:
    model, given = network("base"), condition_of("base", "greedy_cfg3")
    every, part = model.condition_rows(given, 2, guided=True), slice(1, 3)
    assert every.part(part).rows == 2
    assert torch.equal(every.part(part).start, every.start[part])
    assert torch.equal(every.part(part).head, every.head[:, part])
    for block, kept in zip(every.blocks, every.part(part).blocks, strict=True):
        assert torch.equal(kept.modulation, block.modulation[:, part])
        assert torch.equal(kept.keys, block.keys[part])
        assert torch.equal(kept.values, block.values[part])
        assert block.mask is not None
        assert kept.mask is not None
        assert torch.equal(kept.mask, block.mask[part])


def test_padding_of_all_texts_is_not_read() -> None:
    model = network("patchify")
    text = torch.randn(2, 5, model.config.text_dim)
    mask = torch.tensor([[0, 0, 1, 1, 1]] * 2)
    rows = model.read_text(text, mask)
    assert rows.blocks[0].mask is None
    assert rows.blocks[0].keys.shape[2] == 3
    assert_same_rows(rows, model.read_text(text[:, 2:]))


def test_images_without_any_condition() -> None:
    model = network("base")
    rows = model.condition_rows(None, 3, guided=False)
    assert rows.rows == 3
    assert_same_rows(rows.part(slice(2, 3)), model.read_text(model.cfg_uncond.unsqueeze(0)))


def test_texts_that_cannot_be_read() -> None:
    model = network("base")
    size, most = model.config.text_dim, model.config.text_tokens
    text = torch.zeros(1, most + 1, size)
    assert model.condition_rows(Condition(text), 1, guided=False).rows == 1
    with pytest.raises(InputError, match=f"{most + 1} tokens .* at most {most}"):
        model.condition_rows(Condition(text), 1, guided=True)
    with pytest.raises(InputError, match="a used slot in every row"):
        model.condition_rows(Condition(text, torch.zeros(1, most + 1)), 1, guided=False)
    with pytest.raises(InputError, match="the mask of text features"):
        model.condition_rows(Condition(text, torch.ones(1, most)), 1, guided=False)
    for wrong in (torch.zeros(1, 3, size + 1), torch.tensor([1])):
        with pytest.raises(InputError, match=rf"\[rows, tokens, {size}\]"):
            model.condition_rows(Condition(wrong), 1, guided=True)
    twice = Condition(text[:, :3], negative=(Condition(text[:, :2]), Condition(text[:, :2])))
    with pytest.raises(InputError, match="one negative condition, got 2"):
        model.condition_rows(twice, 1, guided=True)


# -- places --------------------------------------------------------------------------------------------

RATIOS = sorted({key.rsplit(".", 2)[0] for key in tensors("rotary.safetensors") if key.endswith(".row")})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_coordinates(ratio: str, size: str) -> None:
    """In units of the finest of the 13 scales, however few are used."""
    schedule = infinity_schedule(ratio, size)
    rows, columns = (each.split([h * w for h, w in schedule.grids]) for each in reference_places(schedule))
    for scale, (h, w) in enumerate(schedule.grids):
        down, across = coordinates(ratio, scale)
        assert torch.equal(rows[scale].view(h, w), down.float().unsqueeze(1).expand(h, w))
        assert torch.equal(columns[scale].view(h, w), across.float().expand(h, w))


def test_rotary_tables() -> None:
    golden = tensors("rotary.safetensors")
    ratios = [key.removeprefix("table.").removesuffix(".cos") for key in golden if key.endswith(".cos")]
    assert ratios
    model = network("base")
    for ratio in ratios:
        places = model.places(infinity_schedule(ratio, "0.06M"))
        table = torch.stack([golden[f"table.{ratio}.cos"], golden[f"table.{ratio}.sin"]], dim=-1)
        assert places.positional is not None
        torch.testing.assert_close(places.positional, table, atol=1e-5, rtol=0)


def test_table_of_places_between() -> None:
    """Rows turn the first half of the pairs, columns the second."""
    table = grid_rotary_table(torch.tensor([0.5]), torch.tensor([3.0]), 8)
    angles = torch.tensor([0.5, 0.5 / 100, 3.0, 3.0 / 100])
    torch.testing.assert_close(table[0], torch.stack([angles.cos(), angles.sin()], dim=-1))


def test_schedules_that_do_not_fit() -> None:
    model = network("base")
    for grids in ((2, 4), tuple(range(1, 17))):
        with pytest.raises(InputError, match=r"scales from \(1, 1\) on, 15 of them at most"):
            model.places(ScaleSchedule(grids))


# -- passes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "run"), recorded("inputs"))
def test_teacher_forced_logits(name: str, run: str) -> None:
    """One masked pass over all scales, and over the leading ones; guided runs by two."""
    golden, model, options = cases(name), network(name), RUNS[f"{name}.{run}"]
    schedule, given = schedule_of(f"{name}.{run}"), condition_of(name, run)
    inputs, wanted = golden[f"{run}.inputs"], golden[f"{run}.logits"]
    cfg, tau = options.get("cfg", 1.0), options.get("tau", 1.0)
    for tokens in schedule.borders[1:] if cfg == 1 else schedule.borders[-1:]:
        logits = model(given.values, inputs[:, : tokens - 1], schedule, given.mask)
        if cfg != 1:
            dropped = torch.ones(given.batch, dtype=torch.bool)
            null = model(given.values, inputs[:, : tokens - 1], schedule, given.mask, dropped)
            logits = cfg * logits + (1 - cfg) * null
        torch.testing.assert_close(logits / tau, wanted[:, :tokens], **CLOSE_LOGITS)


def per_scale(value: float | list[float], schedule: ScaleSchedule) -> Tensor:
    """[1, L, 1]: one number, or one per scale, for all tokens."""
    values = value if isinstance(value, list) else [value] * len(schedule)
    return torch.tensor([values[scale] for scale in schedule.scale_of_tokens()]).view(1, -1, 1)


GREEDY = [
    (name, run)
    for name, run in (key.split(".", 1) for key in RUNS)
    if RUNS[f"{name}.{run}"].get("top_k") == 1
    and all(layer >= 0 for layer in RUNS[f"{name}.{run}"].get("cfg_insertion_layer", []))
]


@pytest.mark.parametrize(("name", "run"), GREEDY)
def test_greedy_bits(name: str, run: str) -> None:
    """Of runs with guidance on the logits: what is likelier, given the recorded scales before."""
    options, golden, model = RUNS[f"{name}.{run}"], cases(name), network(name)
    full, given = schedule_of(f"{name}.{run}"), condition_of(name, run)
    schedule = ScaleSchedule(full.grids[: options.get("trunk_scale")], full.reference)
    patchify = 2 if TRANSFORMERS[name]["spatial_patchify"] else 1
    # the map has the size of all scales, also in runs that end earlier
    quantizer = BitwiseQuantizer(full, model.config.token_bits // patchify**2, patchify)
    token_ids = pack_bits(golden[f"{run}.bits"])
    maps = quantizer.feature_maps(token_ids, len(schedule) - 1)
    inputs = torch.cat([quantizer.look(value, scale) for scale, value in enumerate(maps, start=1)], 1)
    logits = model(given.values, inputs, schedule, given.mask)
    # insertion layer 1 changes nothing in the published code
    if options.get("cfg_insertion_layer", []) == [0]:
        negative, dropped = Condition(given.values, given.mask), torch.ones(given.batch, dtype=torch.bool)
        if given.negatives:
            negative, dropped = given.negatives[0], ~dropped
        null = model(negative.values, inputs, schedule, negative.mask, dropped)
        cfg = per_scale(options["cfg"], schedule)
        logits = cfg * logits + (1 - cfg) * null
    bits = golden.get(f"{run}.sampled_bits", golden[f"{run}.bits"])
    assert torch.equal(logits[..., 1::2] > logits[..., ::2], bits.bool())


class Recorder:
    """A rule that gives every token its update and keeps the stream after each sub-layer."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, Tensor]] = []

    def __call__(
        self, x: Tensor, update: Update, attention: AttentionInputs, layer: int, part: Any
    ) -> Tensor:
        x = add(x, update, attention, layer, part)
        self.seen.append((layer, part, x))
        return x


def read(
    name: str, run: str, groups: list[list[int]], residual: Any = add, *, store_last: bool = True
) -> tuple[list[Tensor], TextRows]:
    """Logits [R, P, 2 D] of the last scale of each group; its scales are read in one pass, by cache."""
    golden, model = cases(name), network(name)
    schedule, given = schedule_of(f"{name}.{run}"), condition_of(name, run)
    guided = RUNS[f"{name}.{run}"].get("cfg", 1.0) != 1
    rows = model.condition_rows(given, given.batch, guided)
    places = model.places(schedule)
    assert places.positional is not None
    inputs = golden[f"{run}.inputs"].repeat(rows.rows // given.batch, 1, 1)
    cache = model.new_cache(rows.rows, schedule.num_tokens)
    scales = torch.tensor(schedule.scale_of_tokens())
    logits = []
    for group in groups:
        start, stop = schedule.borders[group[0]], schedule.borders[group[-1] + 1]
        x = model.embed(
            rows.start if start == 0 else None,
            inputs[:, max(start - 1, 0) : stop - 1],
            places.added[:, start:stop],
        )
        stored = store_last or group is not groups[-1]
        attention = AttentionInputs(
            places.positional[start:stop],
            mask=scales[start:stop, None] >= scales[:stop] if len(group) > 1 else None,
            cache=cache,
            slots=torch.arange(start, stop) if stored else None,
            length=stop if stored else start,
        )
        tail = stop - schedule.borders[group[-1]] if len(group) > 1 else None
        x = model.transform(x, rows.blocks, attention, tail, residual)
        logits.append(model.logits(model.head_nm(x, rows.head)))
    return logits, rows


@pytest.mark.parametrize("store_last", [True, False], ids=["stored", "beside"])
@pytest.mark.parametrize(("name", "run"), recorded("inputs"))
def test_cached_logits(name: str, run: str, store_last: bool) -> None:
    """Scale by scale, with keys and values kept."""
    options, wanted = RUNS[f"{name}.{run}"], cases(name)[f"{run}.logits"]
    scales = len(schedule_of(f"{name}.{run}"))
    steps, _ = read(name, run, [[scale] for scale in range(scales)], store_last=store_last)
    logits, cfg = torch.cat(steps, 1), options.get("cfg", 1.0)
    if cfg != 1:
        conditional, null = logits.chunk(2)
        logits = cfg * conditional + (1 - cfg) * null
    torch.testing.assert_close(logits / options.get("tau", 1.0), wanted, **CLOSE_LOGITS)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_several_scales_in_one_pass(name: str) -> None:
    """A network that takes over reads what is there under a mask, and answers for the last scale only."""
    schedule, wanted = schedule_of(f"{name}.tf"), cases(name)["tf.logits"]
    groups = [[0, 1, 2], [3], [4, 5, 6]]
    for group, logits in zip(groups, read(name, "tf", groups)[0], strict=True):
        torch.testing.assert_close(logits, wanted[:, schedule.span(group[-1])], **CLOSE_LOGITS)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_all_work_on_the_stream_goes_through_the_rule(name: str) -> None:
    rule = Recorder()
    depth = TRANSFORMERS[name]["depth"]
    read(name, "tf", [[0], [1]], rule)
    parts = [(layer, part) for layer in range(depth) for part in ("attention", "cross", "ffn")]
    assert [(layer, part) for layer, part, _ in rule.seen] == parts * 2
    logits, rows = read(name, "tf", [[0]], lambda x, *_: x)
    model = network(name)
    x = rows.start + model.lvl_embed.weight[0]
    torch.testing.assert_close(logits[0], model.logits(model.head_nm(x, rows.head)))


LAYERS = [
    (name, run, int(key.rsplit(".", 1)[1]))
    for name, run in recorded("inputs")
    for key in cases(name)
    if key.startswith(f"{run}.layer.")
]


@pytest.mark.parametrize(("name", "run", "layer"), LAYERS)
def test_output_of_a_block(name: str, run: str, layer: int) -> None:
    rule, scale = Recorder(), RUNS[f"{name}.{run}"]["layers_at"]
    read(name, run, [[each] for each in range(scale + 1)], rule)
    outputs = [x for number, part, x in rule.seen if (number, part) == (layer, "ffn")]
    torch.testing.assert_close(outputs[-1], cases(name)[f"{run}.layer.{layer}"], **CLOSE_LOGITS)


def test_tokens_that_are_no_whole_scales() -> None:
    model, golden = network("base"), cases("base")
    given, schedule = condition_of("base", "tf"), schedule_of("base.tf")
    with pytest.raises(InputError, match=r"7 tokens are no whole scales of \[1, 2, 4"):
        model(given.values, golden["tf.inputs"][:, :6], schedule, given.mask)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_bfloat16(name: str) -> None:
    """Logits stay near; modulation is kept in float32."""
    golden = cases(name)
    path = GOLDEN / TRANSFORMERS[name]["weights"]
    model = InfinityTransformer.from_original(path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    schedule, given = schedule_of(f"{name}.tf"), condition_of(name, "tf")
    rows = model.condition_rows(given, given.batch, guided=False)
    assert {rows.head.dtype, *(block.modulation.dtype for block in rows.blocks)} == {torch.float32}
    with torch.no_grad():
        logits = model(given.values, golden["tf.inputs"], schedule, given.mask)
    assert logits.dtype == torch.float32
    apart = (logits - golden["tf.logits"]).abs()
    assert apart.mean() < 0.05 * golden["tf.logits"].std()


def test_modulated_norms_are_in_the_finer_type() -> None:
    norm = torch.nn.LayerNorm(32, 1e-6, elementwise_affine=False)
    x, scale, shift = torch.randn(2, 3, 32).bfloat16(), torch.randn(2, 1, 32), torch.randn(2, 1, 32)
    wanted = norm(x.float()) * (1 + scale) + shift
    torch.testing.assert_close(modulated(norm, x, scale, shift), wanted)
    assert modulated(norm, x, scale.bfloat16(), shift.bfloat16()).dtype == torch.bfloat16


def test_gradients_reach_every_weight() -> None:
    model = InfinityTransformer(depth=1, dim=32, num_heads=2, token_bits=4, text_dim=16, text_tokens=5)
    schedule = ScaleSchedule((1, (1, 2), (2, 3)))
    text, mask = torch.randn(2, 4, 16), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    logits = model(text, torch.randn(2, 8, 4), schedule, mask, torch.tensor([True, False]))
    assert logits.shape == (2, 9, 8)
    logits.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# -- published files -----------------------------------------------------------------------------------


def published(name: str = "base") -> dict[str, Tensor]:
    return dict(tensors(TRANSFORMERS[name]["weights"]))


def assert_same_weights(ours: InfinityTransformer, theirs: InfinityTransformer) -> None:
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in ours.state_dict().items())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_names_of_a_published_file(name: str) -> None:
    """Each weight of the file is one of the model's."""
    config, state = TRANSFORMERS[name], published(name)
    chunk = config["depth"] // config["block_chunks"]
    ours = network(name).state_dict()
    names = own_names(state)
    kept = {key: tensor for key, tensor in names.items() if not key.endswith("zero_k_bias")}
    assert kept.keys() == ours.keys()
    assert all(torch.equal(tensor.float(), ours[key]) for key, tensor in kept.items())
    for i in range(config["block_chunks"]):
        for j in range(chunk):
            theirs, own = f"block_chunks.{i}.module.{j}.", f"blocks.{i * chunk + j}."
            for a, b in (
                ("ada_gss", "ada_gss"),
                ("sa.mat_qkv.weight", "attn.mat_qkv.weight"),
                ("sa.scale_mul_1H11", "attn.scale_mul_1H11"),
                ("ca.mat_q.bias", "cross_attn.mat_q.bias"),
                ("ca_norm.weight", "cross_norm.weight"),
                ("ffn.fc2.bias", "ffn.fc2.bias"),
            ):
                assert torch.equal(state[theirs + a].float(), ours[own + b])


@pytest.mark.parametrize("averaged", [False, True])
def test_training_checkpoint(averaged: bool, tmp_path: Path) -> None:
    state = published()
    other = {key: tensor + 1 for key, tensor in state.items()}
    torch.save(
        {"trainer": {"gpt_fsdp": other, "gpt_ema_fsdp": state}, "epoch": 3}
        if averaged
        else {"trainer": {"gpt_ema_fsdp": other, "gpt_fsdp": state}, "epoch": 3},
        tmp_path / "ar-ckpt.pth",
    )
    model = InfinityTransformer.from_original(tmp_path / "ar-ckpt.pth", averaged=averaged)
    assert_same_weights(model, network("base"))


def test_one_chunk_and_leftovers(tmp_path: Path) -> None:
    state = {}
    for key, tensor in published("patchify").items():
        state[re.sub(r"block_chunks\.(\d)\.module\.0\.", r"blocks.\1.", key)] = tensor
    assert "blocks.1.sa.proj.weight" in state
    state |= {
        "lvl_1L": torch.zeros(1, 5, dtype=torch.long),
        "attn_bias_for_masking": torch.zeros(1, 1, 5, 5),
        "Infinity_visible_kvlen": torch.zeros(5),
        "Infinity_invisible_qlen": torch.zeros(5),
    }
    torch.save(state, tmp_path / "inf.pth")
    model = InfinityTransformer.from_original(tmp_path / "inf.pth")
    assert_same_weights(model, network("patchify"))


def shards(folder: Path, suffix: str) -> None:
    """A published model in two files and an index."""
    state = published()
    parts = {f"part-{n}{suffix}": dict(list(state.items())[n::2]) for n in range(2)}
    for file, part in parts.items():
        (save_file if suffix == ".safetensors" else torch.save)(part, folder / file)
    weight_map = {key: file for file, part in parts.items() for key in part}
    index = "model.safetensors.index.json" if suffix == ".safetensors" else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_folder_of_several_files(suffix: str, tmp_path: Path) -> None:
    shards(tmp_path, suffix)
    assert_same_weights(InfinityTransformer.from_original(tmp_path), network("base"))
    (tmp_path / f"part-1{suffix}").unlink()
    with pytest.raises(CheckpointError, match=rf"lacks part-1\{suffix}, which its index names"):
        InfinityTransformer.from_original(tmp_path)


def test_folder_of_one_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no files of weights and no index"):
        InfinityTransformer.from_original(tmp_path)
    save_file(published(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert_same_weights(InfinityTransformer.from_original(tmp_path), network("base"))
    save_file(published("patchify"), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="2 files of weights and no index"):
        InfinityTransformer.from_original(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_folder_with_a_damaged_index(text: str, tmp_path: Path) -> None:
    shards(tmp_path, ".safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="no index of weights") as caught:
        InfinityTransformer.from_original(tmp_path)
    assert "\n" not in str(caught.value)


def test_more_or_less_text(tmp_path: Path) -> None:
    path, own = GOLDEN / TRANSFORMERS["base"]["weights"], network("base").cfg_uncond
    rows, size = own.shape
    less = InfinityTransformer.from_original(path, text_tokens=rows - 3)
    assert torch.equal(less.cfg_uncond, own[:-3])
    more = InfinityTransformer.from_original(path, text_tokens=rows + 3)
    assert more.config.text_tokens == rows + 3
    assert torch.equal(more.cfg_uncond, torch.cat([own, null_text(rows + 3, size).half().float()[rows:]]))
    more.save_pretrained(tmp_path)
    assert_same_weights(InfinityTransformer.from_pretrained(tmp_path), more)


@pytest.mark.parametrize(
    "key",
    [
        "cfg_uncond",
        "head.weight",
        "word_embed.weight",
        "lvl_embed.weight",
        "text_norm.weight",
        "shared_ada_lin.1.bias",
    ],
)
def test_file_that_lacks_a_tensor(key: str, tmp_path: Path) -> None:
    state = published()
    del state[key]
    torch.save(state, tmp_path / "inf.pth")
    with pytest.raises(CheckpointError, match=key) as caught:
        InfinityTransformer.from_original(tmp_path / "inf.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("block_chunks.1.module.0.ca_norm.bias", r"lacks blocks\.2\.cross_norm\.bias"),
        ("block_chunks.0.module.0.sa.scale_mul_1H11", r"lacks blocks\.0\.attn\.scale_mul_1H11"),
    ],
)
def test_file_that_lacks_a_tensor_of_a_block(key: str, message: str, tmp_path: Path) -> None:
    state = published()
    del state[key]
    torch.save(state, tmp_path / "inf.pth")
    with pytest.raises(CheckpointError, match=message):
        InfinityTransformer.from_original(tmp_path / "inf.pth")


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("head.weight", torch.zeros(30, 64), r"head\.weight \[30, 64\] instead of \[32, 64\]"),
        ("word_embed.weight", torch.zeros(3), "has other dimensions"),
        ("block_chunks.0.module.0.sa.scale_mul_1H11", torch.zeros(1, 5, 1, 1), "does not fit .* dim=64"),
        ("extra.weight", torch.zeros(3), r"unexpected extra\.weight"),
    ],
)
def test_file_with_a_wrong_tensor(key: str, tensor: Tensor, message: str, tmp_path: Path) -> None:
    torch.save(published() | {key: tensor}, tmp_path / "inf.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        InfinityTransformer.from_original(tmp_path / "inf.pth")
    assert "\n" not in str(caught.value)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="a multiple of 4 \\* num_heads=12"):
        InfinityTransformer(depth=1, dim=32, num_heads=3)
    with pytest.raises(InputError, match="must be at least 1, got 0, 512 and 15"):
        InfinityTransformer(depth=1, dim=32, num_heads=2, token_bits=0)
    with pytest.raises(InputError, match="heads that pool the text, 3"):
        InfinityTransformer(depth=1, dim=32, num_heads=2, text_dim=384)
    with pytest.raises(InputError, match="Infinity size"):
        InfinityTransformer.from_preset("3B")


def test_block_condition_of_some_rows_without_padding() -> None:
    told = BlockCondition(torch.zeros(6, 3, 1, 4), torch.zeros(3, 1, 2, 4), torch.zeros(3, 1, 2, 4), None)
    assert told.part(slice(0, 2)).mask is None
