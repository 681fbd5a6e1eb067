"""Train the KL tokenizer of scenes: 128x128 images to 16x16 latents of 4 numbers.

    python -m varaccel.scenes.cache --out runs/scenes --count 60000
    python tokenizers/train_kl_scenes.py --data runs/scenes --out runs/mini-kl --minutes 60

Run it again to resume. The averaged model ends up in `OUT/export`, ready for `AutoencoderKL.from_pretrained`, with the
scaling factor of its latents in the config. On a GPU, minutes do:

    python tokenizers/train_kl_scenes.py --data runs/scenes --out runs/mini-kl --minutes 4 --device cuda \\
        --batch-size 128 --compile

Large batches take a larger learning rate, unless one is given.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from varaccel.console import tolerant_console
from varaccel.training.allocator import keep_freed_memory

if TYPE_CHECKING:
    from varaccel.training.kl import KLRecipe
    from varaccel.training.tokenizer_course import Course

LARGE_BATCH, LARGE_BATCH_RATE = 64, 2e-3
"""From this batch size on, the learning rate is this one instead of the config's."""


def parse() -> argparse.Namespace:
    from varaccel.training.tokenizer_course import course_parser

    parser = course_parser(__doc__, Path(__file__).parent / "kl_scenes.json", minutes=60.0)
    parser.add_argument("--batch-size", type=int, help="instead of the config's")
    parser.add_argument(
        "--learning-rate",
        type=float,
        help=f"instead of the config's, or of {LARGE_BATCH_RATE} from a batch of {LARGE_BATCH} on",
    )
    parser.add_argument("--compile", action="store_true", help="compile the training step")
    return parser.parse_args()


def changed(recipe: KLRecipe, options: argparse.Namespace) -> KLRecipe:
    """The config's recipe with what the command line says."""
    if options.batch_size is not None:
        recipe = replace(recipe, batch_size=options.batch_size)
    if options.learning_rate is not None:
        recipe = replace(recipe, learning_rate=options.learning_rate)
    elif recipe.batch_size >= LARGE_BATCH:
        recipe = replace(recipe, learning_rate=LARGE_BATCH_RATE)
    return replace(recipe, compile=options.compile or recipe.compile)


def train(options: argparse.Namespace, course: Course) -> None:
    import torch
    from diffusers import AutoencoderKL

    from varaccel.tokenizers.kl import kl_config
    from varaccel.training.kl import KLRecipe, KLTrainer, evaluate
    from varaccel.training.tokenizer_course import MEASURED_IMAGES

    recipe = changed(KLRecipe(**course.config["recipe"]), options)
    torch.manual_seed(recipe.seed)
    model = AutoencoderKL(**kl_config(**course.config["model"]))
    trainer = KLTrainer(
        model,
        course.data,
        course.held_out[:MEASURED_IMAGES],
        options.out,
        course.budget,
        recipe,
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
