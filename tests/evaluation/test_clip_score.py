"""CLIP score with a tiny CLIP of random weights: the arithmetic, not the meaning."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from varaccel import CheckpointError, InputError
from varaccel.evaluation.metrics.clip_score import clip_figure, load_clip
from varaccel.evaluation.metrics.image_sets import ImageFolder

PROMPTS = ["a red cube", "a cat", "cab", "bad cat"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config={
                    **layers,
                    "vocab_size": len(words),
                    "max_position_embeddings": 16,
                    **{"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1},
                },
                vision_config={**layers, "image_size": 32, "patch_size": 8},
                projection_dim=16,
            )
        )
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> ImageFolder:
    rng = np.random.default_rng(0)
    for index in range(len(PROMPTS)):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / f"{index}.png")
    return ImageFolder(tmp_path)


def test_the_score_is_the_mean_of_cosines(clip_folder: Path, images: ImageFolder) -> None:
    figure = clip_figure(load_clip(str(clip_folder)), images, PROMPTS, progress=False)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPProcessor.from_pretrained(clip_folder)
    cosines = []
    for index, prompt in enumerate(PROMPTS):
        image = Image.fromarray(images[index].permute(1, 2, 0).numpy())
        with torch.no_grad():
            out = model(**processor(text=[prompt], images=[image], return_tensors="pt", padding=True))
        cosines.append(float(torch.cosine_similarity(out.image_embeds, out.text_embeds)))
    assert figure.value == pytest.approx(max(0.0, 100 * float(np.mean(cosines))), abs=1e-3)
    assert figure.error == pytest.approx(100 * float(np.std(cosines, ddof=1)) / 2, abs=1e-3)
    assert figure.details["images"] == 4
    # again, from the beginning
    clip = load_clip(str(clip_folder))
    first = clip_figure(clip, images, PROMPTS, progress=False)
    assert clip_figure(clip, images, PROMPTS, progress=False) == first


def test_bad_input(clip_folder: Path, images: ImageFolder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="4 images need as many prompts, got 1"):
        clip_figure(load_clip(str(clip_folder)), images, ["a cat"], progress=False)
    with pytest.raises(CheckpointError, match=r"CLIP could not be loaded from .*fetch openai/clip"):
        load_clip(str(tmp_path / "none"))
