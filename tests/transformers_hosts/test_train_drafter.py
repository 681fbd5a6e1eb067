"""An EAGLE head for a model of transformers by the command line: images, their token ids, the head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import varaccel
from tests import tiny_transformers as tiny
from varaccel.__main__ import command_line
from varaccel.errors import CheckpointError
from varaccel.scenes.cache import write_cache
from varaccel.training import token_ids
from varaccel.training.shards import fingerprint


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A saved model, rendered scenes, and their token ids."""
    model, scenes, ids = (tmp_path / name for name in ("janus", "scenes", "ids"))
    tiny.janus().save_pretrained(model)
    tiny.janus_processor().save_pretrained(model)
    write_cache(scenes, 0, count=12, size=64, workers=1, progress=False)
    arguments = ["--tokenizer", str(model), "--scenes", str(scenes), "--out", str(ids)]
    assert token_ids.main(arguments) == 0
    return model, scenes, ids


def test_a_head_is_trained_and_drafts(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, scenes, ids = folders
    stored, made_by = token_ids.read_token_ids(ids)
    pipe: Any = varaccel.AutoPipeline.from_pretrained(model)
    assert stored.shape == (12, 16)
    assert made_by == fingerprint(pipe.vq_model)

    out = tmp_path / "eagle"
    options = ["--target", str(model), "--token-ids", str(ids), "--scenes", str(scenes), "--out", str(out)]
    options += ["--steps", "2", "--batch-size", "4", "--validation", "4"]
    ran = CliRunner().invoke(command_line, ["train", "drafter", *options])
    assert ran.exit_code == 0, ran.output
    head = varaccel.EagleHead.from_pretrained(out / "export")
    pipe = varaccel.AutoPipeline.from_pretrained(model, eagle_head=head)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"temperature": 0, "output_type": "latent"}
    drafted = pipe("a red sphere", accelerator=varaccel.Speculative("eagle", 3), **call)
    assert (drafted.images == pipe("a red sphere", **call).images).all()


def test_a_model_without_image_tokens_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="'llama', which draws no images"):
        token_ids.load_tokenizer(tmp_path)
