"""ImageGPT: pixels as tokens, no prompt, and a model that stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ImageGPTImageProcessor

from tests.tiny_imagegpt import imagegpt, imagegpt_processor
from tests.transformers_cases import imagegpt_pipeline, quiet
from varaccel import AutoPipeline
from varaccel.errors import InputError
from varaccel.pipelines.imagegpt import ImageGPTPipeline

FAST: dict[str, Any] = {"accelerator": "jacobi", "seed": 0}


def test_images_are_the_colours_of_their_tokens() -> None:
    pipe = imagegpt_pipeline()
    assert (pipe.image_size, pipe.config.top_k, pipe.config.guidance_scale) == (6, 40, 1.0)
    tokens = pipe("", num_images_per_prompt=2, output_type="latent", **FAST).images
    pixels = pipe("", num_images_per_prompt=2, output_type="raw", **FAST).images
    assert torch.equal(pixels, torch.as_tensor(imagegpt_processor().clusters)[tokens].permute(0, 3, 1, 2))
    assert not torch.equal(tokens[0], tokens[1])
    assert torch.equal(pipe(None, output_type="latent", **FAST).images, tokens[:1])
    assert torch.equal(pipe.image_tokenizer.encode_tokens(pixels), tokens)


def test_the_nearest_colours_are_those_of_the_image_processor() -> None:
    pixels = torch.rand(2, 3, 6, 6) * 2 - 1
    as_they_are = {"do_resize": False, "do_rescale": False, "do_normalize": False}
    theirs = imagegpt_processor()(pixels, **as_they_are, return_tensors="pt")["input_ids"]
    ours = imagegpt_pipeline().image_tokenizer.encode_tokens(pixels)
    assert torch.equal(ours.flatten(1), torch.as_tensor(theirs))


def test_the_model_stays_as_it_is() -> None:
    model = imagegpt()
    inside = [(name, id(part), sorted(vars(part))) for name, part in model.named_modules()]
    triangle = model.transformer.h[0].attn.bias.clone()
    quiet(ImageGPTPipeline(model, imagegpt_processor()))("", **FAST)
    assert [(name, id(part), sorted(vars(part))) for name, part in model.named_modules()] == inside
    assert torch.equal(model.transformer.h[0].attn.bias, triangle)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "a cone"}, "ImageGPT reads no prompt, got 'a cone'; pass ''"),
        ({"prompt": 3}, "takes descriptions, not labels"),
        ({"prompt": "", "guidance_scale": 2.0}, "leave guidance_scale and negative_prompt out"),
        ({"prompt": "", "negative_prompt": ""}, "leave guidance_scale and negative_prompt out"),
        ({"prompt": "", "width": 12}, "leave height and width out"),
    ],
)
def test_bad_calls(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        imagegpt_pipeline()(**options)


def test_components_that_do_not_fit() -> None:
    model = imagegpt()
    with pytest.raises(InputError, match="has no colour clusters"):
        ImageGPTPipeline(model, ImageGPTImageProcessor())
    with pytest.raises(InputError, match="table of red, green and blue"):
        ImageGPTPipeline(model, ImageGPTImageProcessor(clusters=torch.zeros(20, 4)))
    with pytest.raises(InputError, match="predicts 20 token ids but the image tokenizer has 12"):
        ImageGPTPipeline(model, imagegpt_processor(colors=12))
    with pytest.raises(InputError, match="number of token ids 12 instead of 20"):
        ImageGPTPipeline(model, imagegpt_processor(), draft_model=imagegpt(colors=12))


def test_loading_and_saving(tmp_path: Path) -> None:
    imagegpt().save_pretrained(tmp_path / "theirs")
    imagegpt_processor().save_pretrained(tmp_path / "theirs")
    pipe: Any = quiet(AutoPipeline.from_pretrained(tmp_path / "theirs"))
    assert isinstance(pipe, ImageGPTPipeline)
    expected = imagegpt_pipeline()("", output_type="pt", **FAST).images
    assert torch.equal(pipe("", output_type="pt", **FAST).images, expected)
    pipe.save_pretrained(tmp_path / "ours")
    again: Any = quiet(AutoPipeline.from_pretrained(tmp_path / "ours"))
    assert torch.equal(again("", output_type="pt", **FAST).images, expected)


def test_the_lower_half_is_painted_anew() -> None:
    pipe = imagegpt_pipeline()
    image = pipe("", seed=1).images[0]
    mask = torch.zeros(6, 6)
    mask[3:] = 1
    out = pipe.inpaint(image, mask, num_images=2, seed=0, output_type="latent")
    kept = pipe("", seed=1, output_type="latent").images[0, :3]
    assert torch.equal(out.images[:, :3], kept.expand(2, -1, -1))
    assert not torch.equal(out.images[0, 3:], out.images[1, 3:])
