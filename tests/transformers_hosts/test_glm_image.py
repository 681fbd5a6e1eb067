"""GLM-Image: pixels by diffusers' own decoder, sizes, loading, and calls from inside diffusers."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import varaccel
from tests import tiny_glm_image as tiny
from tests.transformers_cases import glm_image_pipeline, quiet
from varaccel import AutoPipeline, GlmImagePipeline
from varaccel.engine.randomness import Randomness, image_generators
from varaccel.errors import CheckpointError, InputError
from varaccel.nn.grid import Grid

# what is quoted is read by the decoder: texts of different length
PROMPTS = ["a red sphere", 'a blue cube left of a "cone"', 'the "red" cone']


@cache
def pipeline() -> GlmImagePipeline:
    """With a small preview grid, to be left as it is."""
    return quiet(
        GlmImagePipeline(
            tiny.glm_image(layers=2),
            tiny.processor(preview=8),
            **tiny.decoder(),
            height=64,
            width=96,
            num_inference_steps=2,
        )
    )


def published() -> GlmImagePipeline:
    """With the preview grid of the published processor, and all of it can be saved."""
    return quiet(
        GlmImagePipeline(
            tiny.glm_image(layers=1),
            tiny.processor(),
            **tiny.decoder(),
            height=64,
            num_inference_steps=1,
            width=64,
        )
    )


def decoded(pipe: GlmImagePipeline, prompt: str, tokens: Tensor, seed: int, scale: float) -> Any:
    """One image as diffusers' own pipeline decodes it."""
    positions = sum(grid.num_positions for grid in pipe._grids_of((64, 96)))
    noise = Randomness.draw(image_generators(1, seed), positions).generators()
    fine = tokens.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()[None]
    theirs: Any = pipe.to_diffusers()
    return theirs(
        prompt,
        prior_token_ids=fine,
        height=64,
        width=96,
        num_inference_steps=3,
        guidance_scale=scale,
        generator=noise,
        output_type="np",
    ).images[0]


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_pixels_are_those_of_diffusers_for_each_image_alone(scale: float) -> None:
    pipe = pipeline()
    options: dict[str, Any] = {"num_inference_steps": 3, "decoder_guidance_scale": scale, "seed": 4}
    tokens = pipe(PROMPTS, output_type="latent", seed=4).images
    images = pipe(PROMPTS, output_type="np", **options).images
    assert tokens.shape == (3, 2, 3)
    assert images.shape == (3, 64, 96, 3)
    for number, prompt in enumerate(PROMPTS):
        expected = decoded(pipe, prompt, tokens[number], 4 + number, scale)
        np.testing.assert_allclose(images[number], expected, atol=2e-5)
    assert np.abs(images[0] - images[1]).max() > 0.01


def test_images_of_a_prompt_differ_and_can_be_made_again_alone() -> None:
    pipe = pipeline()
    both = pipe(PROMPTS[1], num_images_per_prompt=2, seed=7, output_type="pt").images
    alone = pipe(PROMPTS[1], seed=8, output_type="pt").images
    torch.testing.assert_close(both[1:], alone, atol=2e-5, rtol=0)
    assert (both[0] - both[1]).abs().max() > 0.01


def test_previews_decode_what_is_there_and_change_nothing() -> None:
    pipe, shown = pipeline(), []

    def look(pipe: Any, step: int, decided: Any, now: dict[str, Any]) -> None:
        if step in (4, 7):
            shown.append(now["preview"]())

    options: dict[str, Any] = {"seed": 0, "output_type": "pt"}
    watched = pipe(PROMPTS[:2], callback_on_step_end=look, **options).images
    torch.testing.assert_close(watched, pipe(PROMPTS[:2], **options).images)
    assert len(shown) == 2
    assert shown[0].shape == watched.shape
    # after the last pass: as many steps as the call itself, fewer than a preview's most
    torch.testing.assert_close(shown[1], watched)


def test_a_preview_takes_few_steps_and_the_small_grid_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, steps, seen = pipeline(), [], []
    own = diffusers.GlmImagePipeline.__call__

    def decode(self: Any, **options: Any) -> Any:
        steps.append(options["num_inference_steps"])
        seen.append(options["prior_token_ids"])
        return own(self, **options)

    monkeypatch.setattr(diffusers.GlmImagePipeline, "__call__", decode)
    canvases = []

    def look(pipe: Any, step: int, decided: Any, now: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            canvases.append(now["canvas"].tokens)
            now["preview"]()
            now["stop"]()
        return now

    small, large = pipe._grids_of((64, 96))
    assert (small, large) == (Grid(1, 2), Grid(2, 3))
    pipe("cone", seed=0, num_inference_steps=20, callback_on_step_end=look)
    assert steps == [pipe.preview_steps, 20]
    preview, image = canvases[0][0, :2], canvases[0][0, 2:].view(2, 3)
    coarse = preview[torch.tensor([0, 0, 1])]
    expected = torch.stack([image[0], coarse])  # three of six tokens are there: the first row
    for fine in seen:
        assert torch.equal(fine.view(4, 6)[::2, ::2], expected)


@pytest.mark.parametrize(("height", "width"), [(1024, 1024), (768, 1344), (96, 512)])
def test_grids_are_those_of_the_published_processor(height: int, width: int) -> None:
    pipe = published()
    small, large = pipe._grids_of((height, width))
    assert (large.height, large.width) == (height // 32, width // 32)
    side = (height / width) ** 0.5 * 16
    assert small == Grid(int(side), int(16 * 16 / side))
    text = pipe.processor.tokenizer.decode(pipe._prompt_ids("cone", (96, 512)))
    assert "<grid> 3 16 </grid>" in text


def test_an_image_without_a_preview_is_refused() -> None:
    with pytest.raises(InputError, match="32 × 16384 pixels are too narrow"):
        published()("cone", height=32, width=512 * 32)


def test_a_ratio_is_a_size() -> None:
    pipe = pipeline()
    wide = pipe("cone", ratio="2:1", output_type="latent", seed=0)
    assert wide.images.shape == (1, 2, 3)
    assert pipe("cone", height=96, output_type="latent", seed=0).images.shape == (1, 3, 3)


# -- loading -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same pipeline in this library's layout and in that of diffusers."""
    pipe, place = published(), tmp_path_factory.mktemp("glm")
    pipe.save_pretrained(place / "ours")
    pipe.to_diffusers().save_pretrained(place / "theirs")
    return {"ours": place / "ours", "theirs": place / "theirs"}


OPTIONS: dict[str, Any] = {
    "seed": 1,
    "height": 64,
    "width": 64,
    "num_inference_steps": 1,
    "output_type": "np",
}


@pytest.mark.parametrize("layout", ["ours", "theirs"])
def test_folders_of_both_layouts_load(layout: str, folders: dict[str, Path]) -> None:
    loaded = AutoPipeline.from_pretrained(folders[layout], dtype=torch.float32)
    assert isinstance(loaded, GlmImagePipeline)
    assert (loaded.config.temperature, loaded.config.top_p) == (0.9, 0.75)
    expected = published()("a red cone", **OPTIONS).images
    np.testing.assert_allclose(quiet(loaded)("a red cone", **OPTIONS).images, expected, atol=1e-5)


@pytest.mark.parametrize("layout", ["ours", "theirs"])
def test_options_reach_the_parts(layout: str, folders: dict[str, Path]) -> None:
    loaded: Any = AutoPipeline.from_pretrained(
        folders[layout],
        dtype={"model": "bfloat16", "dit": "float16", "default": "float32"},
        attn_implementation="eager",
        temperature=0.5,
        draft_model=tiny.glm_image(layers=1),
    )
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.dit.dtype == torch.float16
    assert loaded.vae.dtype == torch.float32
    assert loaded.transformer.decoder.config._attn_implementation == "eager"
    assert loaded.config.temperature == 0.5
    assert "small" in loaded.drafters


@pytest.mark.parametrize("layout", ["ours", "theirs"])
def test_parts_of_the_model_may_lie_on_disk(layout: str, folders: dict[str, Path], tmp_path: Path) -> None:
    places = {"model": "cpu", "lm_head": "disk"}
    loaded: Any = AutoPipeline.from_pretrained(
        folders[layout], device_map=places, offload_folder=tmp_path, dtype="float32"
    )
    assert loaded.model.lm_head.weight.device.type == "meta"
    expected = published()("cone", **OPTIONS).images
    np.testing.assert_allclose(quiet(loaded)("cone", **OPTIONS).images, expected, atol=1e-5)


@pytest.mark.parametrize("layout", ["ours", "theirs"])
def test_tokens_alone_need_no_decoder(layout: str, folders: dict[str, Path]) -> None:
    without = dict.fromkeys(("text_encoder", "tokenizer", "dit", "vae", "scheduler"))
    loaded: Any = quiet(AutoPipeline.from_pretrained(folders[layout], dtype=torch.float32, **without))
    tokens = loaded("cone", **{**OPTIONS, "output_type": "latent"}).images
    assert torch.equal(tokens, published()("cone", **{**OPTIONS, "output_type": "latent"}).images)
    with pytest.raises(InputError, match="has no decoder"):
        loaded("cone", **OPTIONS)


def test_a_pipeline_of_diffusers_shares_its_components() -> None:
    theirs: Any = published().to_diffusers()
    ours = GlmImagePipeline.from_pipe(theirs, height=64, width=64)
    assert ours.model is theirs.vision_language_encoder
    assert ours.dit is theirs.transformer
    assert ours.config.height == 64


# -- generate() --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerator", ["plain", "jacobi", "speculative"])
def test_generate_draws_the_same_greedy_tokens_accelerated(accelerator: str) -> None:
    pipe = glm_image_pipeline()
    model, processor = tiny.glm_image(), pipe.processor
    inputs = processor(text=PROMPTS[::2], padding=True, return_tensors="pt", target_h=96, target_w=128)
    total = int(inputs["image_grid_thw"][:2].prod(-1).sum())
    options: dict[str, Any] = {
        **inputs,
        "do_sample": False,
        "max_new_tokens": total,
        "suppress_tokens": list(range(24, 28)),
    }
    expected = model.generate(**options)
    varaccel.accelerate(model, accelerator)
    assert torch.equal(model.generate(**options), expected)
    ended = model.generate(**{**options, "max_new_tokens": total + 1})
    assert torch.equal(ended[:, :-1], expected)
    assert ended[:, -1].tolist() == [model.config.image_end_token_id] * 2
    with pytest.raises(InputError, match=f"an image of this size has {total} tokens"):
        model.generate(**{**options, "max_new_tokens": 5})


def test_diffusers_draws_with_an_accelerator() -> None:
    theirs: Any = pipeline().to_diffusers()
    model = tiny.glm_image(layers=2)
    theirs.register_modules(vision_language_encoder=varaccel.accelerate(model, "jacobi"))
    images = theirs(
        ["cone", "a red cube"], height=64, width=64, num_inference_steps=1, output_type="np"
    ).images
    assert images.shape == (2, 64, 64, 3)


# -- rows of several grids ---------------------------------------------------------------------------------


def tokens(pipe: GlmImagePipeline, accelerator: Any) -> tuple[Tensor, Any]:
    """Tokens of both grids, [B, N], and what the call tells."""
    canvases = []

    def keep(pipe: Any, step: int, decided: Any, shown: dict[str, Any]) -> None:
        canvases.append(shown["canvas"].tokens)

    options: dict[str, Any] = {"seed": 3, "temperature": 1.5, "top_p": 1.0, "output_type": "latent"}
    out = pipe(PROMPTS, accelerator=accelerator, callback_on_step_end=keep, **options)
    return canvases[-1], out.stats


def test_rows_of_the_preview_then_rows_of_the_image() -> None:
    pipe = glm_image_pipeline(height=160, width=192)
    small, large = pipe._grids_of((160, 192))
    assert small.width <= 4 < large.width
    plain, _ = tokens(pipe, "plain")
    for mode, alone in (("masked", False), ("published", True)):
        rows, stats = tokens(pipe, varaccel.ZipAR(4, mode))  # the preview is no wider than that
        first = large.width if alone else 4
        assert stats.passes == small.num_positions + large.width + first + (large.height - 2) * 4
        same = small.num_positions + large.width
        assert torch.equal(rows[:, :same], plain[:, :same])
        assert not torch.equal(rows, plain)
        assert torch.equal(tokens(pipe, varaccel.ZipAR(99, mode))[0], plain)


def test_auto_takes_what_images_of_several_grids_can_do() -> None:
    pipe = glm_image_pipeline(height=160, width=192)
    drawn, stats = tokens(pipe, varaccel.Auto("approximate"))
    assert stats.accelerator == "zipar"
    assert torch.equal(drawn, tokens(pipe, varaccel.ZipAR(**stats.options))[0])


# -- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 100}, "height must be a multiple of 32 pixels, got 100"),
        ({"width": 0}, "width must be a multiple of 32 pixels, got 0"),
        ({"ratio": "wide"}, "ratio is width to height"),
        ({"ratio": "16:9", "height": 64}, "one or the other"),
        ({"guidance_scale": 1.5}, "use decoder_guidance_scale"),
        ({"negative_prompt": "cone"}, "leave negative_prompt out"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"decoder_guidance_scale": -1.0}, "decoder_guidance_scale"),
        ({"accelerator": varaccel.Jacobi(4, row_window=2)}, "image of 2 grids"),
        ({"prompt": 3}, "takes descriptions, not labels"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:20],
)
def test_calls_that_cannot_be_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        pipeline()(**{"prompt": "cone", "output_type": "latent", **options})
    assert "\n" not in str(raised.value)


def test_painting_into_images_is_refused() -> None:
    mask = np.ones((8, 8), dtype=bool)
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    with pytest.raises(InputError, match="cannot make tokens of an image"):
        pipeline().inpaint(image, mask, "cone")
    with pytest.raises(InputError, match="say what to paint"):
        pipeline().inpaint(image, mask)


def test_parts_that_do_not_fit_are_one_sentence() -> None:
    model, processor = tiny.glm_image(layers=1), tiny.processor()
    decoder = tiny.decoder()
    with pytest.raises(InputError, match="lacks text_encoder, vae; pass"):
        GlmImagePipeline(model, processor, **{**decoder, "text_encoder": None, "vae": None})
    with pytest.raises(InputError, match="the model draws 24 token ids and the dit reads 40"):
        GlmImagePipeline(model, processor, **{**decoder, "dit": tiny.decoder(40)["dit"]})
    with pytest.raises(InputError, match="got guidance_scale 3"):
        GlmImagePipeline(model, processor, guidance_scale=3.0)
    with pytest.raises(InputError, match="height must be a multiple of 32"):
        GlmImagePipeline(model, processor, height=1000)
    with pytest.raises(InputError, match="is a GlmImageForConditionalGeneration of transformers, got"):
        GlmImagePipeline(decoder["text_encoder"], processor)


@pytest.mark.parametrize("part", ["vision_language_encoder", "transformer", "scheduler"])
def test_a_folder_that_lacks_a_part_is_one_sentence(
    part: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["theirs"], tmp_path / "model", ignore=shutil.ignore_patterns(part))
    with pytest.raises(CheckpointError, match="cannot be loaded") as raised:
        AutoPipeline.from_pretrained(tmp_path / "model")
    assert "\n" not in str(raised.value)
