"""The published text path through the pipeline: a T5 tokenizer and encoder, with random weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from tests.tiny import GRID, transformer, vq_model
from varaccel import AutoPipeline, LlamaGenPipeline, ZipAR
from varaccel.accelerators import fitting
from varaccel.errors import CheckpointError, InputError
from varaccel.hosts.causal.job import CausalJob

PREFIX = 8
WORDS = ("a", "red", "blue", "sphere", "cube", "left", "of", "!")
PROMPTS = ["A red  sphere!", "a cube", "a blue cube left of a red sphere"]
"""Three, two and eight words: the last one is cut, because </s> takes a place of the prefix."""


@pytest.fixture(scope="module")
def pipe() -> LlamaGenPipeline:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS[:-1]] + [("!", -2.0)]
    pieces += [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = T5EncoderModel(config).eval()
    pipe = LlamaGenPipeline(transformer("t2i"), vq_model(), encoder, tokenizer, guidance_scale=2.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def token_ids(pipe: LlamaGenPipeline, prompt: str | Sequence[str], **options: object) -> torch.Tensor:
    return pipe(prompt, **{"output_type": "latent", "seed": 3, **options}).images


@pytest.mark.parametrize("name", fitting(CausalJob))
def test_draws_with_every_accelerator(pipe: LlamaGenPipeline, name: str) -> None:
    out = pipe(PROMPTS, seed=0, accelerator=name)
    assert [image.size for image in out.images] == [(2 * GRID, 2 * GRID)] * 3
    assert (out.written > 0).all()


def test_prompts_matter(pipe: LlamaGenPipeline) -> None:
    assert not torch.equal(token_ids(pipe, "a red sphere"), token_ids(pipe, "a blue cube"))


def test_prompts_are_cleaned(pipe: LlamaGenPipeline) -> None:
    expected = token_ids(pipe, "a red sphere!")
    for dirty in (
        "A red  sphere!",
        "  <b>a RED sphere!</b>\n",
        "a red sphere! (www.example.com) 800x600",
        "a%20red%2520sphere!",
    ):
        assert torch.equal(token_ids(pipe, dirty), expected), dirty
    assert not torch.equal(token_ids(pipe, "a red sphere"), expected), "an exclamation mark is no litter"


def test_features_are_left_padded(pipe: LlamaGenPipeline) -> None:
    given = pipe._condition(list(PROMPTS))
    features, mask = given.values, given.mask
    assert features.shape == (3, PREFIX, 16)
    assert mask is not None
    for row, length in enumerate((5, 3, PREFIX)):  # tokens of each prompt, </s> included
        assert mask[row].tolist() == [False] * (PREFIX - length) + [True] * length
        assert torch.count_nonzero(features[row, : PREFIX - length]) == 0
    ids = pipe.tokenizer("a cube", return_tensors="pt")["input_ids"]
    assert pipe.tokenizer.convert_ids_to_tokens(ids[0]) == ["▁a", "▁cube", "</s>"]
    with torch.no_grad():
        hidden = pipe.text_encoder(ids).last_hidden_state[0]  # [3, C], without any padding
    torch.testing.assert_close(features[1, -3:], hidden, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("accelerator", ["plain", ZipAR(2)], ids=str)
def test_images_do_not_depend_on_longer_or_shorter_neighbours(
    pipe: LlamaGenPipeline, accelerator: object
) -> None:
    together = token_ids(pipe, PROMPTS, seed=9, accelerator=accelerator)
    for index, prompt in enumerate(PROMPTS):
        alone = token_ids(pipe, prompt, seed=9 + index, accelerator=accelerator)
        assert torch.equal(alone[0], together[index])


def test_saved_and_loaded(pipe: LlamaGenPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    loaded = AutoPipeline.from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded, LlamaGenPipeline)
    assert isinstance(loaded.text_encoder, T5EncoderModel)
    assert not loaded.text_encoder.training
    images = zip(pipe(PROMPTS, seed=1).images, loaded(PROMPTS, seed=1).images, strict=True)
    assert all(a.tobytes() == b.tobytes() for a, b in images)


def test_loaded_in_half_precision(pipe: LlamaGenPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = LlamaGenPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.text_encoder.dtype == loaded.transformer.dtype == torch.bfloat16
    out = loaded(PROMPTS, seed=1)
    assert out.stats.dtype == "bfloat16"
    assert len(out.images) == 3


def test_damaged_text_encoder(pipe: LlamaGenPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    file = next((tmp_path / "text_encoder").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        AutoPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("module", ["ftfy", "bs4"])
def test_missing_extra(pipe: LlamaGenPipeline, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # what `import` finds is then an ImportError
    with pytest.raises(InputError, match=rf"needs {module}: pip install 'varaccel\[text\]'") as told:
        pipe("a red sphere", seed=0)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("prompt", ["", "  ", "http://example.com", ["a cube", ""]])
def test_prompts_without_text(pipe: LlamaGenPipeline, prompt: str | list[str]) -> None:
    with pytest.raises(InputError, match="no text"):
        pipe(prompt, seed=0)
