"""Infinity's image tokenizer against recorded runs of the published code, and the layout of its files."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.scripts import ROOT
from varaccel.errors import CheckpointError, InputError
from varaccel.nn.aspect_schedules import infinity_schedule
from varaccel.nn.scale_schedule import ScaleSchedule
from varaccel.tokenizers.bitwise_vq import (
    BitwiseQuantizer,
    BitwiseVQModel,
    flip_probabilities,
    pack_bits,
    published_groups,
    unpack_bits,
    unwrapped,
)

GOLDEN = ROOT / "tests" / "golden" / "infinity"
TOKENIZERS: dict[str, Any] = json.loads((GOLDEN / "manifest.json").read_text())["tokenizers"]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}

SCHEDULE = infinity_schedule("1.0", "0.06M")
TINY = ScaleSchedule(((1, 1), (2, 3), (3, 4)))


@cache
def tensors(file: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / file)


@cache
def tokenizer(name: str) -> BitwiseVQModel:
    """The recorded tokenizer; shared by tests, so nobody may change it."""
    model = BitwiseVQModel.from_original(
        GOLDEN / TOKENIZERS[name]["weights"], patchify=2 if name == "vae_p" else 1
    )
    return model.requires_grad_(False)


def groups(name: str, tensor: str) -> list[str]:
    """The recorded aspect ratios that have a tensor."""
    found = (
        re.fullmatch(rf"(r[^.]+(?:\.\d+)?)\.{tensor}", key) for key in tensors(TOKENIZERS[name]["cases"])
    )
    return [match[1] for match in found if match]


def cases(tensor: str) -> list[tuple[str, str]]:
    return [(name, group) for name in TOKENIZERS for group in groups(name, tensor)]


def quantizer(name: str, group: str) -> BitwiseQuantizer:
    return tokenizer(name).quantizer(infinity_schedule(float(group[1:]), "0.06M"))


def recorded(name: str, group: str, kind: str) -> list[Tensor]:
    """Tensors of all scales."""
    golden = tensors(TOKENIZERS[name]["cases"])
    return [golden[f"{group}.{kind}.{scale}"] for scale in range(len(SCHEDULE))]


def token_ids(name: str, group: str, kind: str) -> Tensor:
    """Recorded bits of all scales, (B, h, w, d) in cells or (B, tokens, D), as ids [B, L]."""
    patch = tokenizer(name).config.patchify
    parts = []
    for bits in recorded(name, group, kind):
        if bits.ndim == 4:
            batch, height, width, d = bits.shape
            bits = bits.view(batch, height // patch, patch, width // patch, patch, d)
            bits = bits.permute(0, 1, 3, 5, 2, 4).reshape(batch, -1, d * patch**2)
        parts.append(pack_bits(bits))
    return torch.cat(parts, 1)


# -- parity --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
def test_sizes_of_the_tokenizer(name: str) -> None:
    config, model = TOKENIZERS[name], tokenizer(name)
    assert not model.training
    assert model.bits == config["bits"]
    assert model.downsample_factor == config["stride"]
    ours = model.config
    assert (ours.base_channels, list(ours.channel_multipliers)) == (
        config["base_channels"],
        config["ch_mult"],
    )
    assert ours.num_res_blocks == config["num_res_blocks"]
    assert sum(p.numel() for p in model.parameters()) == config["parameters"]


@pytest.mark.parametrize(("name", "group"), cases("image"))
def test_encode(name: str, group: str) -> None:
    model, golden = tokenizer(name), tensors(TOKENIZERS[name]["cases"])
    image = golden[f"{group}.image"].float()
    latents, bits = model.encode(image), quantizer(name, group)
    torch.testing.assert_close(latents, golden[f"{group}.features"], **CLOSE)
    encoding = bits.encode(latents)
    assert torch.equal(encoding.indices, token_ids(name, group, "bits"))
    assert torch.equal(encoding.fed, encoding.indices)
    torch.testing.assert_close(encoding.feature_map, golden[f"{group}.sum"], **CLOSE)
    assert model.image_size(bits.schedule) == tuple(image.shape[2:])
    assert torch.equal(model.encode_tokens(image, bits.schedule), encoding.indices)


@pytest.mark.parametrize(("name", "group"), cases("recon"))
def test_decode(name: str, group: str) -> None:
    model, golden = tokenizer(name), tensors(TOKENIZERS[name]["cases"])
    recon = golden[f"{group}.recon"]
    torch.testing.assert_close(model.decode(golden[f"{group}.sum"]).clamp(-1, 1), recon, **CLOSE)
    ids = token_ids(name, group, "bits")
    images = model.decode_tokens(ids, quantizer(name, group).schedule)
    torch.testing.assert_close(images.clamp(-1, 1), recon, **CLOSE)


@pytest.mark.parametrize(("name", "group"), cases("random_sum"))
def test_random_bits(name: str, group: str) -> None:
    golden, bits = tensors(TOKENIZERS[name]["cases"]), quantizer(name, group)
    ids = token_ids(name, group, "random_bits")
    torch.testing.assert_close(bits.feature_maps(ids)[-1], golden[f"{group}.random_sum"], **CLOSE)
    if f"{group}.random_image" in golden:
        images = tokenizer(name).decode_tokens(ids, bits.schedule)
        torch.testing.assert_close(images.clamp(-1, 1), golden[f"{group}.random_image"], **CLOSE)


@pytest.mark.parametrize(("name", "group"), cases(r"area_inputs\.0"))
def test_area_averages(name: str, group: str) -> None:
    """The tokenizer's own list: the sum so far, averaged by area to the next grid; from it follow the residuals."""
    golden, bits = tensors(TOKENIZERS[name]["cases"]), quantizer(name, group)
    maps = bits.feature_maps(token_ids(name, group, "bits"), len(SCHEDULE) - 1)
    for scale, value in enumerate(maps):
        area = golden[f"{group}.area_inputs.{scale}"]
        ours = torch.nn.functional.adaptive_avg_pool2d(value, area.shape[2:])
        torch.testing.assert_close(ours, area, **CLOSE)


@pytest.mark.parametrize("kind", ["tf", "flip"])
@pytest.mark.parametrize(("name", "group"), cases(r"tf\.labels\.0"))
def test_training_inputs(name: str, group: str, kind: str) -> None:
    """Labels and inputs, with the recorded flips of bits."""
    golden, bits = tensors(TOKENIZERS[name]["cases"]), quantizer(name, group)
    labels = token_ids(name, group, f"{kind}.labels")
    fed = token_ids(name, group, "flip.flipped_bits") if kind == "flip" else labels
    encoding = bits.encode(golden[f"{group}.features"], flips=labels ^ fed)
    assert torch.equal(encoding.indices, labels)
    assert torch.equal(encoding.fed, fed)
    assert torch.equal(labels, fed) == (kind == "tf")
    if f"{group}.{kind}.inputs" in golden:
        torch.testing.assert_close(bits.inputs(encoding.fed), golden[f"{group}.{kind}.inputs"], **CLOSE)
        without_last = encoding.fed[:, : bits.schedule.borders[-2]]
        assert torch.equal(bits.inputs(without_last), bits.inputs(encoding.fed))


def test_signs_and_code_vectors() -> None:
    """Of single vectors; exactly zero gives bit 0."""
    golden = tensors("vae_a_cases.safetensors")
    values = golden["bsq.in"]
    assert (values == 0).any()
    encoding = BitwiseQuantizer(ScaleSchedule((2,)), 16).encode(values)
    bits = unpack_bits(encoding.indices, 16).unflatten(1, (2, 2))
    assert torch.equal(bits, golden["bsq.bits"].bool())
    torch.testing.assert_close(encoding.feature_map, golden["bsq.codes_from_bits"], atol=1e-7, rtol=0)
    torch.testing.assert_close(encoding.feature_map, golden["bsq.codes"], atol=1e-6, rtol=0)


# -- published files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_published_files(tmp_path: Path, wrapped: bool, nested: bool) -> None:
    state = tensors("vae_a.safetensors")
    if not wrapped:
        plain = unwrapped(state)
        assert len(plain) == len(state) - 2
        assert "encoder.down.0.downsample.conv.weight" in plain
        assert "encoder.down.0.block.0.norm1.weight" in plain
        state = plain
    path = tmp_path / "infinity_vae.pth"
    other = {key: tensor + 1 for key, tensor in state.items()}
    torch.save({"ema": other, "vae": state, "step": 7} if nested else state, path)
    ours = BitwiseVQModel.from_original(path).state_dict()
    for key, value in tokenizer("vae_a").state_dict().items():
        assert torch.equal(ours[key], value)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("encoder.mid.block_2.conv2.conv.weight", r"lacks encoder\.mid\.1\.conv2\.weight\."),
        ("decoder.up.1.block.0.norm2.norm.bias", r"lacks decoder\.conv_blocks\.1\.res\.0\.norm2\.bias\."),
        ("encoder.conv_out.conv.weight", r"lacks encoder\.conv_out\.weight\."),
        ("encoder.conv_in.conv.weight", "holds no 'encoder.conv_in.conv.weight'"),
    ],
)
def test_missing_weights_are_named(tmp_path: Path, lost: str, message: str) -> None:
    state = {key: value for key, value in tensors("vae_a.safetensors").items() if key != lost}
    save_file(state, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=message):
        BitwiseVQModel.from_original(tmp_path / "vae.safetensors")


def test_no_decoder_in_the_file(tmp_path: Path) -> None:
    state = {k: v for k, v in tensors("vae_a.safetensors").items() if not k.startswith("decoder.")}
    save_file(state, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks decoder\.up\.0\.block\.0\.norm1\.weight"):
        BitwiseVQModel.from_original(tmp_path / "vae.safetensors")


def test_save_and_load(tmp_path: Path) -> None:
    model = tokenizer("vae_p")
    model.save_pretrained(tmp_path)
    again = BitwiseVQModel.from_pretrained(tmp_path)
    assert (again.bits, again.token_bits) == (4, 16)
    ids = token_ids("vae_p", "r1", "random_bits")
    assert torch.equal(again.decode_tokens(ids, SCHEDULE), model.decode_tokens(ids, SCHEDULE))


@pytest.mark.parametrize(
    ("multipliers", "bits", "millions"), [((1, 2, 4, 4, 4), 32, 110.1), ((1, 2, 4, 4), 14, 81.6)]
)
def test_published_size(multipliers: tuple[int, ...], bits: int, millions: float) -> None:
    with torch.device("meta"):
        model = BitwiseVQModel(channel_multipliers=multipliers, bits=bits)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    if bits == 32:
        assert len(model.state_dict()) == 270 - 2  # without the masks


# -- tokens --------------------------------------------------------------------------------------------


@given(data=st.data(), width=st.integers(1, 62))
@settings(max_examples=50, deadline=None)
def test_bits_survive_packing(data: st.DataObject, width: int) -> None:
    rows = data.draw(st.lists(st.integers(0, 2**width - 1), max_size=5))
    ids = torch.tensor([*rows, 0, 2**width - 1])
    bits = unpack_bits(ids, width)
    assert [sum(int(bit) << j for j, bit in enumerate(row)) for row in bits.tolist()] == ids.tolist()
    assert torch.equal(pack_bits(bits), ids)
    assert torch.equal(pack_bits(bits.to(torch.uint8)), ids)


@pytest.mark.parametrize("patchify", [1, 2])
def test_tokens_are_patches_of_cells(patchify: int) -> None:
    """Bit, row and column in the patch: the order of a token's channels."""
    quantizer = BitwiseQuantizer(TINY, 3, patchify)
    height, width = quantizer.feature_grid
    cells = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    tokens = quantizer.look(cells, 2)
    assert tokens.shape == (2, 12, quantizer.token_bits)
    for bit, row, column in ((0, 0, 0), (2, patchify - 1, 0), (1, 0, patchify - 1)):
        channel = (bit * patchify + row) * patchify + column
        expected = cells[:, bit, row::patchify, column::patchify].flatten(1)
        assert torch.equal(tokens[..., channel], expected)
    assert torch.equal(quantizer.spread(tokens, 2), cells)


@pytest.mark.parametrize("patchify", [1, 2])
def test_no_token_adds_nothing(patchify: int) -> None:
    quantizer = BitwiseQuantizer(TINY, 5, patchify)
    ids = torch.randint(
        quantizer.codebook_size, (2, TINY.num_tokens), generator=torch.Generator().manual_seed(1)
    )
    vectors = quantizer.lookup(ids)
    cells = vectors.unflatten(2, (5, patchify**2)).square().sum(2)
    torch.testing.assert_close(cells, torch.ones_like(cells))
    ids[:, TINY.span(1)] = -1
    assert not quantizer.lookup(ids)[:, TINY.span(1)].any()
    maps = quantizer.feature_maps(ids)
    assert torch.equal(maps[0], maps[1])
    expected = quantizer.spread(vectors[:, TINY.span(0)], 0) + quantizer.spread(vectors[:, TINY.span(2)], 2)
    assert torch.equal(maps[2], expected)


def test_one_scale_has_no_inputs() -> None:
    quantizer = BitwiseQuantizer(ScaleSchedule(((2, 3),)), 4)
    assert quantizer.inputs(torch.zeros(2, 6, dtype=torch.int64)).shape == (2, 0, 4)


def test_bits_of_62(tmp_path: Path) -> None:
    """As wide as an id can be, in a half-precision model."""
    model = BitwiseVQModel(base_channels=24, channel_multipliers=(1, 1), num_res_blocks=1, bits=62)
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    images = torch.randn(1, 3, 6, 8, generator=torch.Generator().manual_seed(2))
    ids = model.encode_tokens(images, TINY)
    quantizer = model.quantizer(TINY)
    assert ids.shape == (1, 19)
    assert torch.equal(ids, quantizer.encode(model.encode(images).float()).indices)
    assert model.decode_tokens(ids, TINY).shape == images.shape


def test_drawn_flips() -> None:
    quantizer = BitwiseQuantizer(SCHEDULE, 4, 2)
    probabilities = [0.0, 1.0, 0.5, 0.0, 0.0, 0.25, 0.1]
    flips = quantizer.draw_flips(8, probabilities, torch.Generator().manual_seed(3))
    assert torch.equal(flips, quantizer.draw_flips(8, probabilities, torch.Generator().manual_seed(3)))
    bits = unpack_bits(flips, 16).float()
    for scale, probability in enumerate(probabilities):
        part = bits[:, SCHEDULE.span(scale)]
        error = 5 * (probability * (1 - probability) / part.numel()) ** 0.5
        assert part.mean().item() == pytest.approx(probability, abs=error)
    drawn = flip_probabilities(4000, 0.3, torch.Generator().manual_seed(4))
    assert sorted(set(drawn)) == [each / 100 for each in range(31)]
    assert flip_probabilities(3, 0.0) == (0.0, 0.0, 0.0)


# -- what does not fit ---------------------------------------------------------------------------------


def test_groups_of_the_norms() -> None:
    assert [published_groups(width) for width in (24, 48, 32, 96, 128)] == [24, 24, 32, 32, 32]
    with pytest.raises(InputError, match="multiples of 32 or 24, got 40"):
        BitwiseVQModel(base_channels=40)


def test_impossible_sizes() -> None:
    with pytest.raises(InputError, match="at least one level"):
        BitwiseVQModel(channel_multipliers=())
    with pytest.raises(InputError, match="at least 1"):
        BitwiseVQModel(bits=0)
    with pytest.raises(InputError, match="patchify is 1 or 2"):
        BitwiseVQModel(patchify=3)
    with pytest.raises(InputError, match="patchify is 1 or 2"):
        BitwiseQuantizer(TINY, 4, 0)
    with pytest.raises(InputError, match=r"holds 1 to 62 bits, got 64; choose a tokenizer"):
        BitwiseQuantizer(TINY, 16, 2)
    with pytest.raises(InputError, match="got 63"):
        pack_bits(torch.zeros(1, 63))
    with pytest.raises(InputError, match="got 0"):
        unpack_bits(torch.zeros(1, dtype=torch.int64), 0)


def test_latents_and_flips_that_do_not_fit() -> None:
    quantizer = BitwiseQuantizer(TINY, 4)
    with pytest.raises(InputError, match=r"shape \[B, 4, 3, 4\], got \[1, 4, 4, 3\]"):
        quantizer.encode(torch.zeros(1, 4, 4, 3))
    with pytest.raises(InputError, match=r"flips must have shape \[1, 19\]"):
        quantizer.encode(torch.zeros(1, 4, 3, 4), flips=torch.zeros(1, 18, dtype=torch.int64))
    for wrong in ([0.1, 0.1], [0.1, 0.1, 1.5]):
        with pytest.raises(InputError, match="flips need 3 probabilities"):
            quantizer.draw_flips(1, wrong)
    with pytest.raises(InputError, match="strength of bit flips"):
        flip_probabilities(3, 1.5)


def test_images_and_tokens_that_do_not_fit() -> None:
    model = tokenizer("vae_a")
    with pytest.raises(InputError, match=r"\[B, 3, H, W\]"):
        model.encode(torch.zeros(1, 1, 8, 8))
    with pytest.raises(InputError, match="multiples of 4, got 8x6"):
        model.encode(torch.zeros(1, 3, 8, 6))
    with pytest.raises(InputError, match="this schedule is for 64x64 images, got 64x32"):
        model.encode_tokens(torch.zeros(1, 3, 64, 32), SCHEDULE)
    with pytest.raises(InputError, match=r"\[B, 16, h, w\]"):
        model.decode(torch.zeros(1, 4, 8, 8))
    ids = torch.zeros(1, 521, dtype=torch.int64)
    with pytest.raises(InputError, match="must be integers"):
        model.decode_tokens(ids.float(), SCHEDULE)
    with pytest.raises(InputError, match=r"\[B, 521\] for this schedule, got \[1, 520\]"):
        model.decode_tokens(ids[:, 1:], SCHEDULE)
    for wrong in (2**16, -2):
        with pytest.raises(InputError, match=r"token ids of 16 bits must lie in \[0, 2 \*\* 16\)"):
            model.decode_tokens(ids.index_fill(1, torch.tensor([5]), wrong), SCHEDULE)
