"""Emu3: sizes, ends of line, the part of its head that draws, pixels, loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import varaccel
from tests.tiny_emu3 import emu3, emu3_processor
from tests.transformers_cases import emu3_case, emu3_pipeline, quiet
from varaccel import AutoPipeline
from varaccel.accelerators import AnyAccelerator
from varaccel.errors import CheckpointError, InputError
from varaccel.models.transformers_host.image_vocabulary import ImageVocabulary
from varaccel.pipelines.emu3 import Emu3Pipeline

FAST = {"output_type": "latent", "accelerator": "jacobi", "seed": 0}


# -- tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "accelerator", [varaccel.ZipAR(10), varaccel.ZipAR(10, mode="published"), varaccel.Jacobi(8)]
)
def test_a_grid_of_8_by_10_with_negative_prompts_of_another_length(accelerator: AnyAccelerator) -> None:
    case = emu3_case("a blue cube left of a red sphere", height=32, width=40)
    pipe, prompts = case.pipeline(), list(case.prompts[:2])
    out = pipe(
        prompts, negative_prompt=case.negative, accelerator=accelerator, output_type="latent", temperature=0,
        **case.options,
    )  # fmt: skip
    expected = case.expected(pipe, prompts, 3.0).view(2, 8, 11)
    assert expected[..., -1].eq(pipe.transformer.end_of_line).all()
    assert torch.equal(out.images, expected[..., :-1])


def test_rows_side_by_side_read_ends_of_line_ahead() -> None:
    pipe = emu3_pipeline()
    plain = pipe("cone", height=32, width=40, output_type="latent", seed=0)
    rows = pipe("cone", height=32, width=40, accelerator=varaccel.ZipAR(2), output_type="latent", seed=0)
    assert plain.stats.passes == 8 * 11
    assert rows.stats.passes <= 10 + 7 * 3
    assert rows.images.lt(pipe.transformer.end_of_line).all()


def test_a_guided_call_leads_away_from_the_published_negative_prompt() -> None:
    pipe = emu3_pipeline()
    assert pipe.default_negative_prompt is not None
    options: dict[str, Any] = {"temperature": 0, "output_type": "latent"}
    default = pipe("cone", **options).images
    assert torch.equal(default, pipe("cone", negative_prompt=pipe.default_negative_prompt, **options).images)
    assert not torch.equal(default, pipe("cone", negative_prompt="", **options).images)
    assert pipe.config.guidance_scale == 3.0
    assert pipe.config.top_k == 2048


# -- sizes -------------------------------------------------------------------------------------------------


def test_sizes_by_pixels_and_by_ratio() -> None:
    pipe = quiet(Emu3Pipeline(emu3(), emu3_processor(), height=32, width=32))
    assert pipe.image_size == 32
    assert pipe("cone", **FAST).images.shape == (1, 8, 8)
    assert pipe("cone", height=8, **FAST).images.shape == (1, 2, 8)
    rows, columns = emu3_processor().calculate_generate_size("16:9", 32 * 32, 4)
    assert pipe("cone", ratio="16:9", **FAST).images.shape == (1, rows, columns) == (1, 6, 11)


def test_the_prompt_names_rows_and_columns() -> None:
    pipe = emu3_pipeline()
    ids = pipe._prompt_ids("cone", (12, 40))
    assert pipe.processor.tokenizer.decode(ids).replace(" ", "").endswith("3*10<|imagetoken|>")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 18}, "height must be a multiple of 4 pixels, got 18"),
        ({"width": 0}, "width must be a multiple of 4 pixels, got 0"),
        ({"width": "wide"}, "width must be a multiple of 4 pixels, got 'wide'"),
        ({"ratio": "wide"}, "ratio is width to height in whole numbers, such as '16:9', got 'wide'"),
        ({"ratio": 1.5}, "ratio is width to height in whole numbers"),
        ({"ratio": "0:1"}, "ratio is width to height in whole numbers"),
        ({"ratio": "9999:1"}, "thinner than a token"),
        ({"ratio": "1:1", "height": 16}, "ratio takes the place of height and width"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
    ],
)
def test_bad_calls(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        emu3_pipeline()("cone", **options)


def test_models_of_one_size_take_no_ratio() -> None:
    pipe: Any = AutoPipeline.from_pretrained("mini-llamagen")
    with pytest.raises(InputError, match="images of one size; leave ratio out"):
        pipe("a red cone", ratio="16:9")


def test_more_tokens_than_the_model_was_made_for(caplog: pytest.LogCaptureFixture) -> None:
    emu3_pipeline()._size(64, 64)
    assert "has 272 tokens, the model was made for 256" in caplog.text


# -- components --------------------------------------------------------------------------------------------


def test_components_that_do_not_fit() -> None:
    model, processor = emu3(), emu3_processor()
    with pytest.raises(InputError, match="needs the processor of its model"):
        Emu3Pipeline(model, None)
    with pytest.raises(InputError, match="is a Emu3ForConditionalGeneration of transformers, got Linear"):
        Emu3Pipeline(nn.Linear(2, 2), processor)
    with pytest.raises(InputError, match="number of token ids 31 instead of 61"):
        Emu3Pipeline(model, processor, draft_model=emu3(codes=30))
    with pytest.raises(InputError, match="height must be a multiple of 4 pixels, got 721"):
        Emu3Pipeline(model, processor, height=721)
    renamed = {
        name.replace("visual", "heard"): number for name, number in model.config.vocabulary_map.items()
    }
    model.model.vocabulary_mapping = type(model.model.vocabulary_mapping)(renamed)
    with pytest.raises(InputError, match="names no image tokens"):
        Emu3Pipeline(model, processor)


def test_only_rows_of_image_tokens_of_a_head_are_used() -> None:
    head, features = nn.Linear(8, 50, bias=False), torch.randn(2, 3, 8)
    for ids in ([*range(20, 40), 5], [7, 3, 11, 9, 2, 40]):
        expected = F.linear(features, head.weight)[..., ids]
        vocabulary = ImageVocabulary(ids)
        with torch.inference_mode():
            assert torch.allclose(vocabulary.logits(head, features), expected, atol=1e-6)
            # changed in place, then replaced: a copy is made anew
            head.weight.mul_(2)
            assert torch.allclose(vocabulary.logits(head, features), 2 * expected, atol=1e-6)
        head.weight = nn.Parameter(head.weight.detach() * 2)
        with torch.no_grad():
            assert torch.allclose(vocabulary.logits(head, features), 4 * expected, atol=1e-6)
        head.to(torch.float64)
        with torch.no_grad():
            assert vocabulary.logits(head, features.double()).dtype == torch.float64
        head.to(torch.float32)
        vocabulary.logits(head, features).sum().backward()
        assert head.weight.grad is not None
        head.weight.grad = None
        assert vocabulary.text_ids(torch.arange(len(ids))).tolist() == ids


def test_a_head_that_is_no_plain_layer_runs_whole() -> None:
    ids, features = [4, 1, 3, 0, 2, 6], torch.randn(1, 2, 4)
    hooked = nn.Linear(4, 8, bias=False)
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    for head in (nn.Sequential(nn.Linear(4, 8)), nn.Linear(4, 8), hooked):
        with torch.no_grad():
            assert torch.equal(ImageVocabulary(ids).logits(head, features), head(features)[..., ids])


# -- pixels ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_pixels_are_those_of_the_models_own_code() -> None:
    pipe = emu3_pipeline()
    tokens = pipe(["cone", "cube"], output_type="latent", seed=0).images
    mapping = pipe.model.model.vocabulary_mapping
    rows = torch.stack([mapping.convert_img2bpe(image) for image in tokens])
    sequence = F.pad(rows.flatten(1), (0, 3))
    pixels = pipe.model.decode_image_tokens(image_tokens=sequence, height=4, width=6)
    expected = pipe.processor.postprocess(list(pixels.float()), return_tensors="PIL.Image.Image")[
        "pixel_values"
    ]
    drawn = pipe(["cone", "cube"], seed=0).images
    assert [image.size for image in drawn] == [(24, 16)] * 2
    for ours, theirs in zip(drawn, expected, strict=True):
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


@torch.no_grad()
def test_images_become_the_tokens_that_the_model_reads() -> None:
    pipe = emu3_pipeline()
    noise = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    inputs = pipe.processor.image_processor(Image.fromarray(noise), return_tensors="pt", do_resize=False)
    values, sizes = inputs["pixel_values"].flatten(0, -4), inputs["image_sizes"]
    theirs = pipe.model.model.vqmodel.encode(values, sizes).image_tokens[0]
    pixels = torch.from_numpy(noise).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.equal(pipe.image_tokenizer.encode_tokens(pixels)[0], theirs)


def test_other_colour_statistics_are_undone() -> None:
    processor: Any = emu3_processor()
    pipe = Emu3Pipeline(emu3(), processor, height=16, width=16)
    tokens = torch.randint(60, (1, 4, 4))
    same = pipe.image_tokenizer.decode_tokens(tokens)
    other = type(pipe.image_tokenizer)(pipe.model.model.vqmodel, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    shown = other.decode_tokens(tokens)
    assert torch.allclose((shown[:, 0] / 2 + 0.5 - 0.4) / 0.2, same[:, 0], atol=1e-5)
    assert torch.equal(other.encode_tokens(shown), pipe.image_tokenizer.encode_tokens(same))


# -- loading -----------------------------------------------------------------------------------------------


def test_loading_and_saving(tmp_path: Path) -> None:
    model, processor = emu3(), emu3_processor()
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="no processor that can be loaded"):
        AutoPipeline.from_pretrained(tmp_path / "theirs")
    processor.save_pretrained(tmp_path / "theirs")
    pipe: Any = quiet(AutoPipeline.from_pretrained(tmp_path / "theirs", height=16, width=24))
    assert isinstance(pipe, Emu3Pipeline)
    expected = emu3_pipeline()("cone", **FAST).images
    assert torch.equal(pipe("cone", **FAST).images, expected)
    pipe.save_pretrained(tmp_path / "ours")
    again: Any = quiet(AutoPipeline.from_pretrained(tmp_path / "ours"))
    assert again.config.width == 24
    assert torch.equal(again("cone", **FAST).images, expected)


def test_lantern_knows_neighbours_of_every_image_token() -> None:
    pipe = emu3_pipeline()
    table = pipe._neighbours(4, False)
    assert table.shape == (61, 5)
    assert table.max() < 60
    out = pipe("cone", accelerator=varaccel.Lantern(), output_type="latent", seed=0)
    assert out.images.lt(60).all()
