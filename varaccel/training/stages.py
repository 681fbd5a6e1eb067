"""What the recipes in `pipelines/` share: a stage is a command, and frozen parts come from a finished pipeline."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from varaccel.errors import InputError
from varaccel.files import atomic_path
from varaccel.tokenizers.multiscale_vq import MultiScaleVQModel
from varaccel.tokenizers.text import WordTextEncoder, WordTokenizer
from varaccel.tokenizers.vq import VQModel
from varaccel.training import conditions, shards
from varaccel.training.command_line import add_until, exit_status
from varaccel.training.tokens import Condition


def run(*command: object) -> None:
    """A stage with a command line of its own, under this Python.

    Raises:
        subprocess.CalledProcessError: it failed; its failure is ours.
    """
    subprocess.run([sys.executable, *map(str, command)], check=True)


def recipe_parser(
    description: str | None,
    config: Path,
    stages: Sequence[str],
    usual: Sequence[str] | None = None,
    *,
    tokenizer_minutes: float = 40.0,
    minutes: float = 120.0,
) -> argparse.ArgumentParser:
    """A command line with the options that recipes of text-to-image models share.

    Args:
        config: of the model that is trained if nothing else is said.
        stages: that can be asked for.
        usual: those that run by default; all if None.
        tokenizer_minutes, minutes: training times if nothing else is said.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of all stages")
    parser.add_argument("--config", type=Path, default=config)
    parser.add_argument("--scenes", type=Path, help="folder of the images, OUT/scenes by default")
    parser.add_argument("--images", type=int, default=60_000, help="training images")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="rendering processes")
    parser.add_argument("--tokenizer-minutes", type=float, default=tokenizer_minutes)
    parser.add_argument("--minutes", type=float, default=minutes, help="training time of the transformer")
    add_until(parser)
    parser.add_argument(
        "--validation", type=int, default=512, help="images that no transformer is trained on"
    )
    shown = "all by default" if usual is None else f"{', '.join(usual)} by default"
    parser.add_argument("--stages", nargs="+", choices=stages, default=list(usual or stages), help=shown)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-compile", action="store_true", help="train uncompiled")
    parser.add_argument(
        "--borrow",
        nargs="+",
        metavar="COMPONENT=PATH",
        help="components of --install that a sibling folder has, such as text_encoder=../mini-llamagen/text_encoder",
    )
    parser.add_argument("--install", type=Path, help="also write the pipeline here, in half precision")
    return parser


Stage = Callable[[argparse.Namespace, dict[str, Any]], object]
"""What a stage does with the options and the config."""


def run_stages(options: argparse.Namespace, stages: Mapping[str, Stage], prepare: Stage | None = None) -> int:
    """Run the stages that the options of `recipe_parser` ask for, in this order; the exit status.

    Args:
        prepare: what comes first, whichever stages are asked for.
    """
    options.scenes = options.scenes or options.out / "scenes"
    config = json.loads(options.config.read_text(encoding="utf-8"))

    def work() -> None:
        if prepare is not None:
            prepare(options, config)
        for name, stage in stages.items():
            if name in options.stages:
                stage(options, config)

    return exit_status(work)


def render_scenes(options: argparse.Namespace, config: dict[str, Any]) -> None:
    """The stage that renders the images, with the options of `recipe_parser`."""
    command = ["-m", "varaccel.scenes.cache", "--out", options.scenes]
    run(*command, "--count", options.images, "--workers", options.workers)


def train_image_tokenizer(options: argparse.Namespace, script: Path, out: Path, *more: object) -> None:
    """The stage that trains an image tokenizer, by a recipe of `tokenizers/` and with more options of that."""
    command = [script, "--data", options.scenes, "--out", out, *more]
    run(*command, "--minutes", options.tokenizer_minutes, "--device", options.device)


def encode_images(options: argparse.Namespace, module: str, tokenizer: Path, out: Path) -> None:
    """The stage that encodes the images, with the command line of `module`."""
    command = ["-m", module, "--tokenizer", tokenizer, "--scenes", options.scenes, "--out", out]
    run(*command, "--device", options.device)


def exported(folder: Path) -> Path:
    """The folder of an exported transformer.

    Raises:
        InputError: there is none.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"there is no transformer in {folder}; train one first.")
    return folder


def write_pipeline(pipe: Any, folder: Path, options: argparse.Namespace) -> None:
    """Save a finished pipeline in `folder`, and where `--install` says, in half precision and with its `--borrow`."""
    pipe.save_pretrained(folder)
    if options.install:
        pipe.to(torch.float16).save_pretrained(options.install)
        if options.borrow:
            borrow(options.install, dict(pair.split("=", 1) for pair in options.borrow))


def adopt_text(pipeline: Path, target: Path) -> None:
    """Copy the word-level tokenizer and text encoder of a pipeline to `target`, in float32."""
    if not (target / "text_encoder").exists():
        encoder = WordTextEncoder.from_pretrained(pipeline / "text_encoder", dtype=torch.float32)
        encoder.save_pretrained(target / "text_encoder")
    if not (target / "tokenizer").exists():  # another run may be reading it
        WordTokenizer.from_pretrained(pipeline / "tokenizer").save_pretrained(target / "tokenizer")


def adopt_image_tokenizer(pipeline: Path, target: Path) -> None:
    """Copy the image tokenizer of a pipeline to `target`, in float32.

    Raises:
        InputError: it has none of a known kind.
    """
    if target.exists():
        return
    kinds = {kind.__name__: kind for kind in (VQModel, MultiScaleVQModel, AutoencoderKL)}
    for folder in (pipeline / "vq_model", pipeline / "vae"):
        if folder.is_dir() and (kind := kinds.get(shards.tokenizer_class(folder))):
            kind.from_pretrained(folder, dtype=torch.float32).save_pretrained(target)
            return
    raise InputError(f"{pipeline} has no image tokenizer of its own.")


def borrow(folder: Path, components: Mapping[str, str]) -> None:
    """Replace components of a saved pipeline by references to equal ones of sibling folders, see `borrowed.json`.

    Args:
        folder: of the pipeline.
        components: names, and paths relative to `folder`, such as "../mini-llamagen/text_encoder".

    Raises:
        InputError: there is nothing at a path, or something else than what would be replaced.
    """
    for name, path in components.items():
        for file in (folder / name).glob("*"):
            if not (other := folder / path / file.name).is_file() or (
                file.suffix == ".safetensors" and _digest(other) != _digest(file)
            ):
                raise InputError(
                    f"{folder / path} does not hold the {name} of {folder}; nothing is borrowed."
                )
    known = folder / "borrowed.json"
    earlier = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
    with atomic_path(known) as temporary:
        temporary.write_text(json.dumps({**earlier, **components}, indent=2) + "\n")
    for name in components:
        shutil.rmtree(folder / name, ignore_errors=True)


def _digest(weights: Path) -> str:
    """Of the tensors, whatever order or metadata they were saved with."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(weights).items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def caption_condition(
    captions: Sequence[str], text_folder: Path, device: str, prefix_length: int | None = None
) -> Condition:
    """Sample indices -> frozen text features [B, T, C] and mask [B, T], as the pipeline will make them.

    Args:
        captions: of all images.
        text_folder: holds `tokenizer` and `text_encoder`.
        device: where the encoder runs, and of the result.
        prefix_length: caption slots T; as many as the encoder has if None.
    """
    tokenizer = WordTokenizer.from_pretrained(text_folder / "tokenizer")
    encoder = WordTextEncoder.from_pretrained(text_folder / "text_encoder").to(device)
    length = encoder.config.max_length if prefix_length is None else prefix_length
    return conditions.caption_condition(captions, tokenizer, encoder, length, device)
