"""Train a tokenizer of scenes: 128x128 images to 16x16 tokens, or to the token maps of seven scales.

    python -m varaccel.scenes.cache --out runs/scenes --count 60000
    python tokenizers/train_vq_scenes.py --data runs/scenes --out runs/mini-vq --minutes 28

Run it again to resume. The averaged model ends up in `OUT/export`, ready for `VQModel.from_pretrained`.

A finished tokenizer can get a better decoder for the tokens it already has:

    python tokenizers/train_vq_scenes.py --data runs/scenes --out runs/mini-vq-decoder --minutes 20 \\
        --decoder-of runs/mini-vq/export --config tokenizers/vq_scenes_decoder.json

The multi-scale tokenizer of `mini-var` starts from the outer levels of a finished single-scale one:

    python tokenizers/train_vq_scenes.py --data runs/scenes --out runs/mini-msvq --minutes 40 \\
        --config tokenizers/msvq_scenes.json --start-from weights/mini-llamagen/vq_model
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varaccel.console import tolerant_console
from varaccel.training.allocator import keep_freed_memory

if TYPE_CHECKING:
    from varaccel.training.tokenizer_course import Course
    from varaccel.training.vq import ImageTokenizer


def parse() -> argparse.Namespace:
    from varaccel.training.tokenizer_course import course_parser

    parser = course_parser(__doc__, Path(__file__).parent / "vq_scenes.json", minutes=28.0)
    parser.add_argument("--decoder-of", type=Path, help="train only the decoder of this exported tokenizer")
    parser.add_argument("--start-from", type=Path, help="take what fits of this exported VQ tokenizer")
    return parser.parse_args()


def start(options: argparse.Namespace, config: dict[str, Any]) -> ImageTokenizer:
    """The model that is trained: a new one, or one that goes on from an exported one."""
    import torch

    from varaccel.errors import InputError
    from varaccel.tokenizers.multiscale_vq import MultiScaleVQModel
    from varaccel.tokenizers.vq import VQModel
    from varaccel.training.vq import warm_start

    for folder in filter(None, (options.decoder_of, options.start_from)):
        if not (folder / "config.json").is_file():
            raise InputError(f"there is no tokenizer in {folder}; train one first.")
    if options.decoder_of:
        model = VQModel.from_pretrained(options.decoder_of)
    else:
        kind = MultiScaleVQModel if "scales" in config["model"] else VQModel
        model = kind(**config["model"])
    if options.start_from:
        source = VQModel.from_pretrained(options.start_from, dtype=torch.float32)
        print(f"starting from {len(warm_start(model, source))} tensors of {options.start_from}")
    return model


def train(options: argparse.Namespace, course: Course) -> None:
    import torch

    from varaccel.training.tokenizer_course import MEASURED_IMAGES
    from varaccel.training.vq import VQRecipe, VQTrainer, evaluate

    recipe = VQRecipe(**course.config["recipe"])
    torch.manual_seed(recipe.seed)
    trainer = VQTrainer(
        start(options, course.config),
        course.data,
        course.held_out[:MEASURED_IMAGES],
        options.out,
        course.budget,
        recipe,
        decoder_only=options.decoder_of is not None,
        device=options.device,
    )
    course.finish(trainer, lambda model: asdict(evaluate(model, course.held_out)))


def main() -> int:
    tolerant_console()
    options = parse()
    from varaccel.training.tokenizer_course import run_course

    return run_course(options, train)


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
