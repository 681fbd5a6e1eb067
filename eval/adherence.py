"""How often generated images show what was asked for: prompts from held-out scenes, judged by the scene detector.

    python eval/adherence.py --model mini-llamagen --count 500 --out plain.json --grid plain.png
    python eval/adherence.py --model mini-llamagen --count 500 --accelerator zipar -o window=4 --out zipar.json
    python eval/adherence.py --run runs/mar --grid mar.png                  # images of eval/sample.py
    python eval/adherence.py --renderer --count 500                         # true images: the ceiling
    python eval/adherence.py --renderer --tokenizer FOLDER --count 500      # ... that the image tokenizer leaves

Runs of the same model with and without an accelerator are to be compared with the same --count and --seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from varaccel.accelerators import make_accelerator
from varaccel.console import tolerant_console
from varaccel.engine.option_text import parse_options
from varaccel.errors import InputError, VaraccelError
from varaccel.evaluation.metrics.adherence import (
    Adherence,
    CaptionVerdict,
    draw_captions,
    held_out_prompts,
    score_adherence,
)
from varaccel.evaluation.metrics.image_sets import ImageFolder
from varaccel.evaluation.sampling.prompt_lists import SCENES
from varaccel.evaluation.sampling.run_settings import RunSettings
from varaccel.files import check_writable, write_text
from varaccel.image_files import check_image_path, write_image
from varaccel.models.detector import as_batch, load_detector
from varaccel.pipelines.pixels import to_output
from varaccel.scenes import render, sample_scene
from varaccel.scenes.cache import CachedScenes
from varaccel.training.token_ids import load_tokenizer
from varaccel.training.vq import ImageTokenizer

_LINE = 12


def render_scenes(seeds: Sequence[int], size: int) -> list[Image.Image]:
    """The true images of `seeds`."""
    return [
        Image.fromarray(render(sample_scene(seed), size).image)
        for seed in tqdm(seeds, desc="rendering", unit="image", disable=None)
    ]


def reconstruct(
    images: Sequence[Image.Image], tokenizer: ImageTokenizer, batch_size: int
) -> list[Image.Image]:
    """Images after a round trip through an image tokenizer: the best that a model on its tokens can do."""
    size = images[0].size[0]
    pixels = as_batch(images, size)
    result: list[Image.Image] = []
    with torch.inference_mode():
        for batch in tqdm(pixels.split(batch_size), desc="reconstructing", unit="batch", disable=None):
            result += to_output(tokenizer.decode_tokens(tokenizer.encode(batch).indices), "pil")
    return result


def scene_run(folder: Path) -> RunSettings:
    """The settings of a run whose prompts are held-out scenes.

    Raises:
        InputError: there is no run, or one of other prompts.
    """
    settings = RunSettings.read(folder)
    if settings is None or settings.source != SCENES:
        raise InputError(f"{folder} is no run of eval/sample.py with --prompts scenes; draw one.")
    return settings


def run_images(folder: Path, settings: RunSettings) -> list[Image.Image]:
    """The images of a finished run.

    Raises:
        InputError: some are missing.
    """
    images = ImageFolder(folder)
    if len(images) != settings.count:
        raise InputError(
            f"{folder} holds {len(images)} of {settings.count} images; go on with eval/sample.py first."
        )
    return [Image.fromarray(images[index].permute(1, 2, 0).numpy()) for index in range(len(images))]


def _remark(verdict: CaptionVerdict) -> str:
    if verdict.correct:
        return "correct" if verdict.alone else f"correct, {verdict.detected} objects"
    if not verdict.complete:
        return f"{sum(verdict.found)} of {len(verdict.found)} found"
    return "wrong relation"


def sheet(
    images: Sequence[Image.Image], adherence: Adherence, columns: int = 8, side: int = 160
) -> Image.Image:
    """Images with their captions and verdicts: a green bar under a correct image, a red one under others."""
    texts = [
        textwrap.wrap(verdict.caption, side // 6 - 1, break_long_words=False)
        for verdict in adherence.verdicts
    ]
    height = side + 6 + _LINE * (max(map(len, texts)) + 1) + 4
    rows = -(-len(images) // columns)
    result = Image.new("RGB", (min(columns, len(images)) * (side + 4), rows * height), "white")
    draw = ImageDraw.Draw(result)
    for index, (image, verdict, lines) in enumerate(zip(images, adherence.verdicts, texts, strict=True)):
        left, top = index % columns * (side + 4), index // columns * height
        result.paste(image.convert("RGB").resize((side, side)), (left, top))
        color = "#1a8f3c" if verdict.correct else "#c62828"
        draw.rectangle((left, top + side, left + side - 1, top + side + 4), fill=color)
        for place, (line, ink) in enumerate(
            [(_remark(verdict), color), *((line, "black") for line in lines)]
        ):
            draw.text((left + 2, top + side + 6 + place * _LINE), line, fill=ink, font_size=10)
    return result


def _load_pipeline(name: str, device: str | None) -> Callable[..., Any]:
    from varaccel import AutoPipeline

    pipeline = AutoPipeline.from_pretrained(name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline if device is None else pipeline.to(device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure how often generated images show what was asked for."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model", help="name or folder of a text-conditional pipeline of the captioned world"
    )
    source.add_argument(
        "--run", type=Path, help="judge the images of a run of eval/sample.py that has prompts of scenes"
    )
    source.add_argument("--renderer", action="store_true", help="score true images instead: the ceiling")
    parser.add_argument(
        "--tokenizer", type=Path, help="with --renderer: pass the images through this image tokenizer"
    )
    parser.add_argument("--count", type=int, default=500, help="number of prompts")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts per call")
    parser.add_argument(
        "--until",
        type=float,
        metavar="SECONDS",
        help="with --model: stop drawing at this time, in seconds since the epoch, and judge what there is",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of sampling")
    parser.add_argument("--guidance-scale", type=float, help="by default the model's own")
    parser.add_argument("--accelerator", help="name of an accelerator; by default plain decoding")
    parser.add_argument(
        "-o", "--option", action="append", default=[], help="accelerator option key=value; repeatable"
    )
    parser.add_argument("--device", help="device of the pipeline")
    parser.add_argument("--detector", type=Path, help="folder of the detector; by default the shipped one")
    parser.add_argument(
        "--unseen-in", type=Path, help="cache of training images: use no prompt that is a caption of it"
    )
    parser.add_argument("--out", type=Path, help="JSON file of the rates and verdicts")
    parser.add_argument("--grid", type=Path, help="image of the first --grid-count images with verdicts")
    parser.add_argument("--grid-count", type=int, default=40)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    tolerant_console()
    options = _parser().parse_args(arguments)
    try:
        if options.batch_size < 1:
            raise InputError(f"--batch-size must be 1 or more, got {options.batch_size}.")
        if options.option and not options.accelerator:
            raise InputError("--option belongs to an accelerator; name one with --accelerator.")
        if options.tokenizer and not options.renderer:
            raise InputError("--tokenizer belongs to --renderer; a model brings its own.")
        check_writable(options.out)
        if options.grid:
            check_image_path(options.grid)
        accelerator = (
            make_accelerator(options.accelerator, parse_options(options.option))
            if options.accelerator
            else None
        )
        detector = load_detector(options.detector)
        settings = None if options.run is None else scene_run(options.run)
        if settings is not None:
            options.count, options.seed, options.unseen_in = settings.count, settings.seed, None
        known = frozenset(CachedScenes(options.unseen_in).captions) if options.unseen_in else frozenset()
        prompts = held_out_prompts(options.count, known)
        captions = list(prompts.values())
        start = time.perf_counter()
        if settings is not None:
            images = run_images(options.run, settings)
        elif options.renderer:
            images = render_scenes(list(prompts), detector.config.image_size)
            if options.tokenizer:
                tokenizer = load_tokenizer(options.tokenizer).eval()
                images = reconstruct(images, tokenizer, options.batch_size)
        else:
            images = draw_captions(
                _load_pipeline(options.model, options.device),
                captions,
                batch_size=options.batch_size,
                seed=options.seed,
                guidance_scale=options.guidance_scale,
                accelerator=accelerator,
                until=options.until,
            )
            captions = captions[: len(images)]
        seconds = time.perf_counter() - start
        adherence = score_adherence(detector, images, captions)
    except VaraccelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(adherence.table())
    if options.out:
        typed = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(options).items()
            if name not in ("out", "grid", "grid_count")
        }
        report = {"settings": typed, "seconds": round(seconds, 2), **adherence.to_json(verdicts=True)}
        write_text(json.dumps(report, indent=2) + "\n", options.out)
    if options.grid:
        first = Adherence(adherence.rates, adherence.verdicts[: options.grid_count])
        write_image(sheet(images[: options.grid_count], first), options.grid)
    return 0


if __name__ == "__main__":
    sys.exit(main())
