"""The VQ tokenizer against recorded outputs of the published code, its published layout and its errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.scripts import ROOT
from varaccel.errors import CheckpointError, InputError
from varaccel.tokenizers import vq as vq_module
from varaccel.tokenizers.normalization import GroupNorm
from varaccel.tokenizers.vq import VQModel

GOLDEN = ROOT / "tests" / "golden" / "llamagen"
GOLDEN_CONFIG = {
    "base_channels": 32,
    "channel_multipliers": (1, 1, 2),
    "z_channels": 32,
    "codebook_size": 64,
}
TOLERANCE = {"atol": 5e-4, "rtol": 1e-4}
TINY = {
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "z_channels": 8,
    "codebook_size": 24,
    "codebook_dim": 4,
    "norm_groups": 4,
}


@pytest.fixture(scope="module")
def golden_state() -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for part in sorted(GOLDEN.glob("vq_weights_*.safetensors")):
        state |= load_file(part)
    return state


@pytest.fixture(scope="module")
def golden_file(golden_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "vq.safetensors"
    save_file(golden_state, path)
    return path


@pytest.fixture(scope="module")
def golden_model(golden_file: Path) -> VQModel:
    return VQModel.from_original(golden_file, **GOLDEN_CONFIG)


@pytest.fixture(scope="module")
def golden_io() -> dict[str, Tensor]:
    return load_file(GOLDEN / "vq_io.safetensors")


def tiny(seed: int = 0) -> VQModel:
    torch.manual_seed(seed)
    return VQModel(**TINY).eval()


@torch.no_grad()
def test_encode_matches_published_code(golden_model: VQModel, golden_io: dict[str, Tensor]) -> None:
    encoding = golden_model.encode(golden_io["image"])
    torch.testing.assert_close(encoding.latents, golden_io["pre_quant"], **TOLERANCE)
    torch.testing.assert_close(encoding.quantized, golden_io["quant"], **TOLERANCE)
    assert torch.equal(encoding.indices, golden_io["indices"])


@torch.no_grad()
def test_decode_matches_published_code(golden_model: VQModel, golden_io: dict[str, Tensor]) -> None:
    torch.testing.assert_close(golden_model.decode(golden_io["quant"]), golden_io["recon"], **TOLERANCE)
    token_ids = golden_io["codes"]
    grid = token_ids.view(len(token_ids), 8, 8)
    torch.testing.assert_close(golden_model.lookup(grid), golden_io["code_latents"], **TOLERANCE)
    torch.testing.assert_close(golden_model.decode_tokens(token_ids), golden_io["code_image"], **TOLERANCE)
    assert torch.equal(golden_model.decode_tokens(token_ids), golden_model.decode_tokens(grid.int()))


@torch.no_grad()
def test_channels_last_model_gives_the_same_token_ids(
    golden_state: dict[str, Tensor], golden_io: dict[str, Tensor]
) -> None:
    model = VQModel(**GOLDEN_CONFIG).eval()
    model.load_state_dict({k: v for k, v in golden_state.items() if k != "quantize.codebook_used"})
    model.to(memory_format=torch.channels_last)
    image = golden_io["image"].contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.encode(image).indices, golden_io["indices"])
    torch.testing.assert_close(model.decode(golden_io["quant"]), golden_io["recon"], **TOLERANCE)


@torch.no_grad()
def test_quantising_in_chunks_changes_nothing(
    golden_model: VQModel, golden_io: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vq_module, "QUANTIZE_CHUNK", 7)
    assert torch.equal(golden_model.encode(golden_io["image"]).indices, golden_io["indices"])


def published_layout(multipliers: tuple[int, ...]) -> dict[str, list[int]]:
    """Names and shapes of the published state dicts, written down from their description."""
    shapes: dict[str, list[int]] = {}

    def layer(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = list(weight), [weight[0]]

    def res(name: str, a: int, b: int) -> None:
        layer(f"{name}.norm1", a)
        layer(f"{name}.conv1", b, a, 3, 3)
        layer(f"{name}.norm2", b)
        layer(f"{name}.conv2", b, b, 3, 3)
        if a != b:
            layer(f"{name}.nin_shortcut", b, a, 1, 1)

    def attention(name: str, c: int) -> None:
        layer(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", c, c, 1, 1)

    def mid(side: str) -> None:
        res(f"{side}.mid.0", 512, 512)
        attention(f"{side}.mid.1", 512)
        res(f"{side}.mid.2", 512, 512)

    widths = [128 * m for m in multipliers]
    last = len(widths) - 1
    layer("encoder.conv_in", 128, 3, 3, 3)
    for i, (a, b) in enumerate(zip([128, *widths[:-1]], widths, strict=True)):
        for j in range(2):
            res(f"encoder.conv_blocks.{i}.res.{j}", a if j == 0 else b, b)
            if i == last:
                attention(f"encoder.conv_blocks.{i}.attn.{j}", b)
        if i < last:
            layer(f"encoder.conv_blocks.{i}.downsample.conv", b, b, 3, 3)
    mid("encoder")
    layer("encoder.norm_out", 512)
    layer("encoder.conv_out", 256, 512, 3, 3)
    layer("decoder.conv_in", 512, 256, 3, 3)
    mid("decoder")
    widths.reverse()
    for i, (a, b) in enumerate(zip([512, *widths[:-1]], widths, strict=True)):
        for j in range(3):
            res(f"decoder.conv_blocks.{i}.res.{j}", a if j == 0 else b, b)
            if i == 0:
                attention(f"decoder.conv_blocks.{i}.attn.{j}", b)
        if i < last:
            layer(f"decoder.conv_blocks.{i}.upsample.conv", b, b, 3, 3)
    layer("decoder.norm_out", 128)
    layer("decoder.conv_out", 3, 128, 3, 3)
    layer("quant_conv", 8, 256, 1, 1)
    layer("post_quant_conv", 256, 8, 1, 1)
    shapes["quantize.embedding.weight"] = [16384, 8]
    return shapes


@pytest.mark.parametrize(
    ("name", "multipliers", "millions", "factor"),
    [("VQ-16", (1, 1, 2, 2, 4), 71.9, 16), ("VQ-8", (1, 2, 2, 4), 70.1, 8)],
)
def test_presets_have_the_published_layout(
    name: str, multipliers: tuple[int, ...], millions: float, factor: int
) -> None:
    with torch.device("meta"):
        model = VQModel.from_preset(name)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == published_layout(multipliers)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    assert model.downsample_factor == factor
    assert model.grid(256) == (256 // factor, 256 // factor)
    assert model.codebook_size == 16384


def test_from_original_takes_averaged_weights_when_asked(
    golden_state: dict[str, Tensor], tmp_path: Path
) -> None:
    raw = {k: torch.zeros_like(v) for k, v in golden_state.items()}
    torch.save({"model": raw, "ema": golden_state, "steps": 3}, tmp_path / "vq.pt")
    model = VQModel.from_original(tmp_path / "vq.pt", "VQ-16", ema=True, **GOLDEN_CONFIG)
    assert torch.equal(model.encoder.conv_in.weight, golden_state["encoder.conv_in.weight"])
    model = VQModel.from_original(tmp_path / "vq.pt", "VQ-16", **GOLDEN_CONFIG)
    assert torch.equal(model.encoder.conv_in.weight, raw["encoder.conv_in.weight"])
    torch.save({"model": golden_state}, tmp_path / "vq.pt")
    model = VQModel.from_original(tmp_path / "vq.pt", "VQ-16", **GOLDEN_CONFIG)
    assert torch.equal(model.quant_conv.bias, golden_state["quant_conv.bias"])


def test_from_original_refuses_another_layout(golden_file: Path) -> None:
    with pytest.raises(CheckpointError, match="Choose the model size"):
        VQModel.from_original(golden_file, **{**GOLDEN_CONFIG, "channel_multipliers": (1, 2, 2)})
    with pytest.raises(InputError, match="VQ-16"):
        VQModel.from_original(golden_file, "VQ-17")


@torch.no_grad()
def test_save_and_load(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    loaded = VQModel.from_pretrained(tmp_path)
    assert loaded.config.channel_multipliers == [1, 2]
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    token_ids = torch.arange(16).view(1, 16)
    assert torch.equal(model.decode_tokens(token_ids), loaded.decode_tokens(token_ids))


@torch.no_grad()
def test_half_precision_model_keeps_float32_quantisation() -> None:
    model = tiny().bfloat16()
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).bfloat16() * 2 - 1
    encoding = model.encode(images)
    sites = F.normalize(encoding.latents.float(), dim=1).permute(0, 2, 3, 1)
    table = F.normalize(model.quantize.embedding.weight.float(), dim=-1)
    assert torch.equal(encoding.indices, torch.cdist(sites.flatten(0, 2), table).argmin(-1).view(2, 4, 4))
    assert encoding.quantized.dtype == torch.bfloat16
    assert model.decode(encoding.quantized).shape == images.shape


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_codebook_rows_quantise_to_themselves(rows: int, columns: int, seed: int) -> None:
    model = tiny()
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(24, (2, rows, columns), generator=generator)
    latents = model.lookup(indices)
    torch.testing.assert_close(latents.norm(dim=1), torch.ones(2, rows, columns))
    found = model.quantize(latents.permute(0, 2, 3, 1).flatten(0, 2))
    assert torch.equal(found.view_as(indices), indices)


def test_first_index_wins_ties() -> None:
    model = tiny()
    with torch.no_grad():
        model.quantize.embedding.weight[5] = model.quantize.embedding.weight[2]
    rows = model.quantize.codebook()[[5, 2]]
    assert model.quantize(rows).tolist() == [2, 2]


def test_training_forward_passes_gradients_straight_through() -> None:
    model = tiny().train()
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    output = model(images)
    with torch.no_grad():
        encoding = model.encode(images)
        torch.testing.assert_close(output.reconstruction, model.decode(encoding.quantized))
    assert torch.equal(output.indices, encoding.indices)
    output.reconstruction.square().mean().backward()
    assert model.encoder.conv_in.weight.grad.abs().max() > 0
    assert model.quantize.embedding.weight.grad is None


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 3, 9, 8), "multiples of 2"), ((1, 4, 8, 8), r"\[B, 3, H, W\]"), ((3, 8, 8), r"\[B, 3, H, W\]")],
)
def test_encode_refuses_wrong_shapes(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny().encode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        (torch.tensor([[0, 1, 2, 24]]), r"\[0, 24\)"),
        (torch.tensor([[0, 1, 2, -1]]), r"\[0, 24\)"),
        (torch.tensor([[0, 1, 2]]), "no square grid"),
        (torch.zeros(1, 4), "integers"),
        (torch.zeros(4, dtype=torch.long), r"\[B, h, w\]"),
    ],
)
def test_decode_tokens_refuses_bad_token_ids(token_ids: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny().decode_tokens(token_ids)


def test_other_bad_input() -> None:
    model = tiny()
    with pytest.raises(InputError, match=r"\[B, 4, h, w\]"):
        model.decode(torch.zeros(1, 8, 4, 4))
    with pytest.raises(InputError, match="multiples of 2"):
        model.grid((8, 0))
    with pytest.raises(InputError, match="norm_groups"):
        VQModel(base_channels=12, norm_groups=8)
    with pytest.raises(InputError, match="at least"):
        VQModel(channel_multipliers=())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_group_norm_has_the_gradients_of_the_plain_one(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = GroupNorm(4, 16)
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
        norm.bias.normal_(generator=generator)
    x = (torch.randn(3, 16, 6, 10, generator=generator) + 1).to(dtype)
    gradient = torch.randn(3, 16, 6, 10, generator=generator).to(dtype)
    fast_x = x.clone(memory_format=torch.channels_last).requires_grad_()
    fast = norm(fast_x)
    assert "ChannelsLast" in type(fast.grad_fn).__name__
    plain_x = x.float().requires_grad_()
    plain = F.group_norm(plain_x, 4, norm.weight, norm.bias, norm.eps)
    inputs = (norm.weight, norm.bias)
    found = torch.autograd.grad(fast, (fast_x, *inputs), gradient)
    expected = torch.autograd.grad(plain, (plain_x, *inputs), gradient.float())
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip((fast, *found), (plain, *expected), strict=True):
        assert (a.float() - b).abs().max() <= bound * b.abs().max()
