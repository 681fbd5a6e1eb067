"""The KL image tokenizer against recorded runs of the published code, and reading published weights."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.scripts import ROOT
from varaccel.errors import CheckpointError, InputError
from varaccel.tokenizers.kl import KL16, MAR_SCALING_FACTOR, load_kl, patchify, unpatchify

GOLDEN = ROOT / "tests" / "golden" / "mar"
VAE: dict[str, Any] = json.loads((GOLDEN / "manifest.json").read_text())["config"]["vae"]
TOLERANCE = 1e-5


@cache
def tensors(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def published() -> dict[str, Tensor]:
    """The recorded weights under their published names, in float32."""
    halves = {**tensors("vae_encoder_weights_f16"), **tensors("vae_decoder_weights_f16")}
    return {name: value.float() for name, value in halves.items()}


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> AutoencoderKL:
    path = tmp_path_factory.mktemp("published") / "kl16.ckpt"
    torch.save({"model": published()}, path)
    return load_kl(path, sample_size=VAE["resolution"]).requires_grad_(False)


def close(ours: Tensor, golden: Tensor) -> None:
    assert ours.shape == golden.shape
    assert float((ours.double() - golden.double()).abs().max() / golden.double().abs().max()) < TOLERANCE


def test_encoder(vae: AutoencoderKL) -> None:
    golden = tensors("vae")
    posterior = vae.encode(golden["image"]).latent_dist
    close(posterior.parameters, golden["moments"])
    close(posterior.mean, golden["mean"])
    close(posterior.logvar, golden["logvar"])
    close(posterior.std, golden["std"])
    close(posterior.mean + posterior.std * golden["eps"], golden["sample"])


def test_decoder(vae: AutoencoderKL) -> None:
    golden = tensors("vae")
    close(vae.decode(golden["latent"]).sample, golden["decoded"])


def test_sizes_are_read_off_the_tensors(vae: AutoencoderKL) -> None:
    config = vae.config
    assert tuple(config.block_out_channels) == tuple(VAE["ch"] * m for m in VAE["ch_mult"])
    assert config.latent_channels == VAE["z"]
    assert config.layers_per_block == VAE["num_res_blocks"]
    assert tuple(config.down_block_types) == (*["DownEncoderBlock2D"] * 2, "AttnDownEncoderBlock2D")
    assert set(config.up_block_types) == {"UpDecoderBlock2D"}
    assert config.scaling_factor == MAR_SCALING_FACTOR
    assert config.sample_size == VAE["resolution"]
    assert not vae.training
    assert vae.dtype == torch.float32


def test_published_size() -> None:
    with torch.device("meta"):
        model = AutoencoderKL(**KL16)
    assert sum(p.numel() for p in model.parameters()) == 66_456_019
    assert len(model.state_dict()) == 312
    assert model.config.scaling_factor == 0.2325
    assert list(model.config.down_block_types).index("AttnDownEncoderBlock2D") == 4


def test_bare_weights_and_other_files(vae: AutoencoderKL, tmp_path: Path) -> None:
    state = published()
    save_file(state, tmp_path / "bare.safetensors")
    bare = load_kl(tmp_path / "bare.safetensors", scaling_factor=0.5)
    assert bare.config.scaling_factor == 0.5
    for name, value in vae.state_dict().items():
        assert torch.equal(bare.state_dict()[name], value), name

    missing = {k: v for k, v in state.items() if k != "decoder.mid.attn_1.q.weight"}
    save_file(missing, tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks decoder\.mid_block\.attentions\.0\.to_q\.weight"):
        load_kl(tmp_path / "missing.safetensors")
    save_file({"quant_conv.weight": state["quant_conv.weight"]}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"choose kl16\.ckpt"):
        load_kl(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="another kind of model"):
        load_kl(GOLDEN / "mar_draft_weights.safetensors")
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="truncated"):
        load_kl(tmp_path / "cut.ckpt")
    with pytest.raises(CheckpointError, match="no weights file"):
        load_kl(tmp_path / "nothing.ckpt")


def test_tokens() -> None:
    golden = tensors("encoder_decoder")
    assert torch.equal(patchify(golden["latent"], 1), golden["tokens"])
    assert torch.equal(unpatchify(golden["tokens"], 1, golden["latent"].shape[2]), golden["unpatchified"])


@pytest.mark.parametrize("patch", [1, 2])
def test_patches(patch: int) -> None:
    latents, tokens = (tensors("encoder_decoder")[f"patchify{patch}.{end}"] for end in ("in", "out"))
    assert torch.equal(patchify(latents, patch), tokens)
    assert torch.equal(unpatchify(tokens, patch, latents.shape[2]), latents)


def test_bad_patches() -> None:
    with pytest.raises(InputError, match="patches of side 3"):
        patchify(torch.zeros(1, 4, 4, 6), 3)
    with pytest.raises(InputError, match="cannot be cut"):
        patchify(torch.zeros(4, 4, 6), 2)
    for tokens, patch, height in (((1, 6, 4), 1, 4), ((1, 6, 6), 2, 4), ((1, 6, 4), 2, 3), ((6, 4), 1, 2)):
        with pytest.raises(InputError, match=f"height {height}"):
            unpatchify(torch.zeros(tokens), patch, height)
