"""Chameleon: its prompts, and the image decoder that transformers leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.tiny_chameleon import chameleon, chameleon_processor
from tests.transformers_cases import chameleon_pipeline, quiet
from varaccel import AutoPipeline
from varaccel.errors import CheckpointError, InputError
from varaccel.pipelines.chameleon import ChameleonPipeline
from varaccel.tokenizers.chameleon_vq import ChameleonImageDecoder

FAST = {"accelerator": "jacobi", "seed": 0}


def decoder(seed: int = 0, **options: Any) -> ChameleonImageDecoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {"embed_dim": 8, "latent_channels": 16, "base_channels": 32, "channel_multiplier": (1, 1, 2)}
        return ChameleonImageDecoder(**{**sizes, "num_res_blocks": 1, **options}).eval()


def published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Levels counted from the finest, as in VQGAN's code."""
    for old, new in (("up.0.", "up.x."), ("up.2.", "up.0."), ("up.x.", "up.2.")):
        state = {name.replace(f"decoder.{old}", f"decoder.{new}"): value for name, value in state.items()}
    return {f"model.vqmodel.{name}": value for name, value in state.items()}


def repository(folder: Path, state: dict[str, Tensor] | None = None) -> Path:
    chameleon().save_pretrained(folder)
    chameleon_processor().save_pretrained(folder)
    if state is not None:
        save_file(
            {**load_file(folder / "model.safetensors"), **state},
            folder / "model.safetensors",
            {"format": "pt"},
        )
    return folder


def test_a_prompt_ends_where_the_image_begins() -> None:
    pipe = chameleon_pipeline()
    tokenizer = pipe.processor.tokenizer
    names = tokenizer.convert_ids_to_tokens(pipe._prompt_ids("red cone", None))
    assert names == ["<s>", "red", "cone", "<reserved08706>", "<racm3:break>"]
    assert tokenizer.convert_ids_to_tokens(pipe._prompt_ids("", None)) == ["<s>", "<racm3:break>"]
    assert pipe.config.guidance_scale == 1.0
    assert pipe.image_size == 16


def test_without_a_decoder_there_are_tokens_only() -> None:
    pipe = chameleon_pipeline()
    assert pipe("cone", output_type="latent", **FAST).images.shape == (1, 4, 4)
    with pytest.raises(InputError, match="pass image_decoder=, a ChameleonImageDecoder"):
        pipe("cone", **FAST)
    with pytest.raises(InputError, match="ask for output_type='latent'"):
        pipe.image_tokenizer.decode_tokens(torch.zeros(1, 4, 4, dtype=torch.int64))


@pytest.mark.parametrize("names", ["published", "of Janus"])
@pytest.mark.parametrize("attention", [False, True])
def test_a_decoder_in_the_checkpoint_is_found_saved_and_loaded(
    tmp_path: Path, names: str, attention: bool
) -> None:
    original = decoder(attention=attention)
    state = dict(original.state_dict())
    stored = (
        published_names(state)
        if names == "published"
        else {f"model.vqmodel.{k}": v for k, v in state.items()}
    )
    pipe: Any = quiet(AutoPipeline.from_pretrained(repository(tmp_path / "theirs", stored)))
    assert isinstance(pipe, ChameleonPipeline)
    found = pipe.image_decoder.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    out = pipe(["cone", "cube"], output_type="pt", **FAST)
    assert out.images.shape == (2, 3, 16, 16)
    pipe.save_pretrained(tmp_path / "ours")
    assert (
        json.loads((tmp_path / "ours/model_index.json").read_text())["image_decoder"][1]
        == "ChameleonImageDecoder"
    )
    again: Any = quiet(AutoPipeline.from_pretrained(tmp_path / "ours"))
    assert torch.equal(again(["cone", "cube"], output_type="pt", **FAST).images, out.images)


@torch.no_grad()
def test_the_decoder_does_what_the_published_one_does() -> None:
    """Levels in their order: from the coarsest, each but the finest doubles the sides."""
    module, vectors = decoder(), torch.randn(1, 2, 3, 8)
    x = module.decoder.mid(module.decoder.conv_in(module.post_quant_conv(vectors.permute(0, 3, 1, 2))))
    assert module.decoder.mid.attn_1 is not None
    for level, upsampled in zip(module.decoder.up, (True, True, False), strict=True):
        for block in level.block:
            x = block(x)
        if upsampled:
            x = level.upsample.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    x = module.decoder.conv_out(nn.functional.silu(module.decoder.norm_out(x)))
    assert x.shape == (1, 3, 8, 12)
    assert torch.allclose(module(vectors), x, atol=1e-5)


@torch.no_grad()
def test_images_become_the_tokens_that_the_model_reads() -> None:
    pipe = chameleon_pipeline()
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    token_ids = pipe.image_tokenizer.encode_tokens(pixels)
    theirs = pipe.model.model.get_image_tokens(pixels)
    mapping = pipe.model.model.vocabulary_mapping
    assert [mapping.img2bpe[code] for code in token_ids.flatten().tolist()] == theirs.flatten().tolist()
    assert token_ids.shape == (2, 4, 4)


def test_a_checkpoint_without_a_decoder(tmp_path: Path) -> None:
    pipe: Any = quiet(AutoPipeline.from_pretrained(repository(tmp_path / "theirs")))
    assert pipe.image_decoder is None
    drawn = pipe("cone", output_type="latent", **FAST).images
    assert torch.equal(drawn, chameleon_pipeline()("cone", output_type="latent", **FAST).images)
    pipe.save_pretrained(tmp_path / "ours")
    again: Any = quiet(AutoPipeline.from_pretrained(tmp_path / "ours", image_decoder=decoder()))
    assert again("cone", **FAST).images[0].size == (16, 16)


def test_a_decoder_that_lacks_weights(tmp_path: Path) -> None:
    stored = published_names(dict(decoder().state_dict()))
    del stored["model.vqmodel.decoder.conv_in.bias"]
    with pytest.raises(CheckpointError, match=r"lacks decoder\.conv_in\.bias"):
        AutoPipeline.from_pretrained(repository(tmp_path / "theirs", stored))


def test_components_that_do_not_fit() -> None:
    model, processor = chameleon(), chameleon_processor()
    with pytest.raises(InputError, match="needs the processor of its model"):
        ChameleonPipeline(model, None)
    with pytest.raises(InputError, match="image_decoder is a ChameleonImageDecoder, got Linear"):
        ChameleonPipeline(model, processor, image_decoder=nn.Linear(2, 2))
    with pytest.raises(InputError, match="reads vectors of 4 numbers in 3 levels"):
        ChameleonPipeline(model, processor, image_decoder=decoder(embed_dim=4))
    with pytest.raises(InputError, match="number of token ids 20 instead of 40"):
        ChameleonPipeline(model, processor, draft_model=chameleon(codes=20))
    with pytest.raises(InputError, match="leave height and width out"):
        ChameleonPipeline(model, processor)("cone", height=32, output_type="latent")
    model.config.vocabulary_map = None
    with pytest.raises(InputError, match="names no image tokens"):
        ChameleonPipeline(model, processor)
