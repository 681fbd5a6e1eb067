"""What the recipes in `tokenizers/` share: their options, images to train and to measure on, and how they end."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from varaccel.files import atomic_path
from varaccel.scenes import HELD_OUT_SEED, render, sample_scene
from varaccel.scenes.cache import CachedScenes
from varaccel.training.command_line import add_until, exit_status, training_budget
from varaccel.training.run import Budget
from varaccel.training.tokenizer_trainer import TokenizerTrainer

MEASURED_IMAGES = 64
"""How many of the held-out images are measured on the way."""


def course_parser(description: str | None, config: Path, minutes: float) -> argparse.ArgumentParser:
    """A command line with the options that the recipes share.

    Args:
        config: model and recipe if nothing else is said.
        minutes: training time if nothing else is said.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    parser.add_argument("--config", type=Path, default=config, help="model and recipe")
    parser.add_argument("--data", type=Path, required=True, help="folder written by varaccel.scenes.cache")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--minutes", type=float, default=minutes, help="training time")
    add_until(parser)
    parser.add_argument("--steps", type=int, help="stop after this many steps, if that comes first")
    parser.add_argument("--held-out", type=int, default=512, help="held-out scenes of the final evaluation")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-export-quality", action="store_true", help="skip the final evaluation")
    return parser


@dataclass(frozen=True)
class Course:
    """What a recipe trains with.

    Attributes:
        config: the content of the config file.
        data: training images.
        budget: when to stop.
        out: folder of the run.
        final_images: how many held-out images the export is measured on; 0 skips it.
    """

    config: dict[str, Any]
    data: CachedScenes
    budget: Budget
    out: Path
    final_images: int

    @classmethod
    def of(cls, options: argparse.Namespace) -> Course:
        """What the options of `course_parser` ask for.

        Raises:
            InputError: there are no images, or the budget is empty.
        """
        return cls(
            json.loads(options.config.read_text(encoding="utf-8")),
            CachedScenes(options.data, allow_partial=True),
            training_budget(options),
            options.out,
            0 if options.no_export_quality else options.held_out,
        )

    @cached_property
    def held_out(self) -> NDArray[np.uint8]:
        """Images uint8 [n, H, W, 3] of scenes that are never trained on."""
        seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + (self.final_images or MEASURED_IMAGES))
        return np.stack([render(sample_scene(seed), self.data.size).image for seed in seeds])

    def finish(
        self, trainer: TokenizerTrainer[Any, Any, Any], evaluate: Callable[[Any], Mapping[str, float]]
    ) -> None:
        """Train, measure the export on all held-out images, and plot the losses."""
        model = trainer.train()
        if self.final_images:
            quality = dict(evaluate(model))
            with atomic_path(self.out / "quality.json") as temporary:
                temporary.write_text(json.dumps({"images": len(self.held_out), **quality}, indent=2) + "\n")
            print(json.dumps(quality))
        trainer.run.plot(["l1", "laplacian", "ssim_loss"])


def run_course(options: argparse.Namespace, train: Callable[[argparse.Namespace, Course], object]) -> int:
    """Train with the options of `course_parser`; the exit status."""
    return exit_status(lambda: train(options, Course.of(options)))
