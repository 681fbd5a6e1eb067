"""Model folders that borrow components from a model beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import PROMPTS, pipeline, text_encoder
from varaccel import AutoPipeline, LlamaGenPipeline
from varaccel.errors import CheckpointError
from varaccel.pipelines.loading import borrowed_components
from varaccel.shipped import shipped_models, weights_folder
from varaccel.tokenizers.text import WordTokenizer

BORROWED = ("text_encoder", "tokenizer")


def lend(folder: Path, components: tuple[str, ...] = BORROWED) -> Path:
    """A complete model `lender` in the folder, and a `borrower` that lacks some of its components."""
    pipeline("t2i").save_pretrained(folder / "lender")
    shutil.copytree(folder / "lender", folder / "borrower")
    for name in components:
        shutil.rmtree(folder / "borrower" / name)
    note(folder / "borrower", {name: f"../lender/{name}" for name in components})
    return folder / "borrower"


def note(folder: Path, entries: Any) -> None:
    (folder / "borrowed.json").write_text(json.dumps(entries))


def latents(pipe: LlamaGenPipeline, **options: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPTS["t2i"], seed=3, output_type="latent", **options).images


@pytest.mark.parametrize("loader", [LlamaGenPipeline, AutoPipeline])
def test_loads_what_it_borrows(tmp_path: Path, loader: Any) -> None:
    pipe = loader.from_pretrained(lend(tmp_path))
    assert isinstance(pipe.tokenizer, WordTokenizer)
    assert not pipe.text_encoder.training
    assert torch.equal(latents(pipe), latents(pipeline("t2i")))


def test_a_folder_of_nothing_but_an_index(tmp_path: Path) -> None:
    components = ("transformer", "vq_model", *BORROWED)
    folder = lend(tmp_path, components)
    assert {p.name for p in folder.iterdir()} == {"model_index.json", "borrowed.json"}
    assert set(borrowed_components(folder)) == set(components)
    assert torch.equal(latents(AutoPipeline.from_pretrained(folder)), latents(pipeline("t2i")))


def test_such_a_folder_can_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lend(tmp_path, ("transformer", "vq_model", *BORROWED))
    (tmp_path / "manifest.json").write_text(json.dumps({"models": {"lender": {}, "borrower": {}}}))
    monkeypatch.setattr("varaccel.shipped.weights_folder", lambda: tmp_path)
    assert shipped_models()["borrower"] == tmp_path / "borrower"
    assert torch.equal(latents(AutoPipeline.from_pretrained("borrower")), latents(pipeline("t2i")))


@pytest.mark.parametrize("option", ["dtype", "torch_dtype"])
@pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning")
def test_number_type_reaches_borrowed_components(tmp_path: Path, option: str) -> None:
    pipe = AutoPipeline.from_pretrained(lend(tmp_path), **{option: torch.bfloat16})
    assert pipe.text_encoder.dtype == pipe.transformer.dtype == torch.bfloat16


def test_number_type_by_component(tmp_path: Path) -> None:
    folder = lend(tmp_path)
    pipe = AutoPipeline.from_pretrained(folder, dtype={"text_encoder": torch.bfloat16})
    assert pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.transformer.dtype == torch.float32
    pipe = AutoPipeline.from_pretrained(folder, dtype={"default": torch.bfloat16})
    assert pipe.text_encoder.dtype == torch.bfloat16


def test_what_is_passed_need_not_be_borrowed(tmp_path: Path) -> None:
    own = text_encoder(pipeline("t2i").tokenizer, seed=5)
    pipe = AutoPipeline.from_pretrained(lend(tmp_path), text_encoder=own)
    assert pipe.text_encoder is own


def test_saving_writes_a_full_folder(tmp_path: Path) -> None:
    folder = lend(tmp_path)
    pipe = AutoPipeline.from_pretrained(folder)
    for target in (tmp_path / "far" / "copy", folder):  # a new folder, and the borrower itself
        pipe.save_pretrained(target)
        assert not (target / "borrowed.json").exists()
    shutil.rmtree(tmp_path / "lender")
    for target in (tmp_path / "far" / "copy", folder):
        assert torch.equal(latents(AutoPipeline.from_pretrained(target)), latents(pipeline("t2i")))


def test_a_missing_lender(tmp_path: Path) -> None:
    folder = lend(tmp_path)
    shutil.rmtree(tmp_path / "lender" / "text_encoder")
    with pytest.raises(CheckpointError, match=r"borrows text_encoder from .* put that model beside it"):
        AutoPipeline.from_pretrained(folder)


@pytest.mark.parametrize("path", ["../../outside/text_encoder", "/etc", "..", "../lender/../../outside"])
def test_borrows_from_neighbours_only(tmp_path: Path, path: str) -> None:
    (tmp_path / "outside" / "text_encoder").mkdir(parents=True)
    folder = lend(tmp_path / "models")
    note(folder, {"text_encoder": path})
    with pytest.raises(CheckpointError, match="outside of"):
        AutoPipeline.from_pretrained(folder)


@pytest.mark.parametrize("linked", ["component", "lender", "borrower", "all"])
def test_what_lies_behind_a_link_is_borrowed(tmp_path: Path, linked: str) -> None:
    """Links are made by the user of the machine, so they may lead anywhere: models on several disks."""
    folder = lend(tmp_path / "models")
    places = {"component": "lender/text_encoder", "lender": "lender", "borrower": "borrower"}
    for number, place in enumerate([places[linked]] if linked != "all" else places.values()):
        shutil.move(tmp_path / "models" / place, tmp_path / f"disk{number}" / "there")
        (tmp_path / "models" / place).symlink_to(tmp_path / f"disk{number}" / "there")
    assert torch.equal(latents(AutoPipeline.from_pretrained(folder)), latents(pipeline("t2i")))


def test_a_link_to_the_borrower_from_elsewhere(tmp_path: Path) -> None:
    """The lender lies beside the model, not beside the link."""
    folder = lend(tmp_path / "models")
    (tmp_path / "here").symlink_to(folder)
    assert torch.equal(latents(AutoPipeline.from_pretrained(tmp_path / "here")), latents(pipeline("t2i")))


@pytest.mark.parametrize("content", ["{", "[]", '{"tokenizer": 3}'])
def test_a_damaged_note(tmp_path: Path, content: str) -> None:
    folder = lend(tmp_path)
    (folder / "borrowed.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"borrowed\.json"):
        AutoPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "names no class"),
        ([None, None], "names no class"),
        (["os", "system"], "only classes of varaccel"),
        (["varaccelerated.models", "Model"], "only classes of varaccel"),
        (["varaccel.tokenizers.text", "NoSuchEncoder"], "does not have"),
        (["varaccel.no_such_module", "Encoder"], "does not have"),
        (["varaccel.tokenizers.text", "encode_prompts"], "nothing that can be loaded"),
    ],
    ids=str,
)
def test_only_classes_of_known_libraries_are_borrowed(tmp_path: Path, entry: Any, message: str) -> None:
    folder = lend(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = entry
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        AutoPipeline.from_pretrained(folder)


def test_a_damaged_component_is_told(tmp_path: Path) -> None:
    folder = lend(tmp_path)
    (tmp_path / "lender" / "text_encoder" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        AutoPipeline.from_pretrained(folder)


def test_what_ships_finds_what_it_borrows() -> None:
    for folder in (weights_folder() / name for name in shipped_models()):
        borrowed_components(folder)
