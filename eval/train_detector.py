"""Train and validate the scene detector, which judges whether generated images show what was asked for.

    python -m varaccel.scenes.cache --out runs/scenes --count 60000
    python eval/train_detector.py --data runs/scenes --out runs/detector --minutes 10

Run it again to resume, or with more minutes to continue. The detector is exported with half-precision weights and
validated, from the exported file, on scenes that no training image may use.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from varaccel.console import tolerant_console
from varaccel.errors import VaraccelError
from varaccel.files import atomic_path, check_writable_folder
from varaccel.models.detector import load_detector
from varaccel.scenes import HELD_OUT_SEED
from varaccel.scenes.cache import CachedScenes
from varaccel.scenes.dataset import make_sample, to_tensor
from varaccel.training.detector import degrade, new_detector, train_detector, validate_detector
from varaccel.training.run import Budget


def blur(images: Tensor, factor: int = 2) -> Tensor:
    """Shrink by `factor` and enlarge again."""
    small = F.interpolate(images, scale_factor=1 / factor, mode="area")
    return F.interpolate(small, images.shape[-2:], mode="bilinear")


def validate(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """Metrics of the detector in `folder` on held-out images as rendered, blurred and degraded as in training."""
    detector = load_detector(folder)
    size = detector.config.image_size
    samples = [
        make_sample(HELD_OUT_SEED + index, size)
        for index in tqdm(
            range(count), desc="rendering held-out scenes", unit="image", leave=False, disable=None
        )
    ]
    pixels = np.stack([sample.rendering.image for sample in samples])
    images = torch.stack([to_tensor(image) for image in pixels])
    variants = {
        "rendered": images,
        "blurred": blur(images),
        "degraded": degrade(pixels, np.random.default_rng(0)),
    }
    return {name: validate_detector(detector, samples, variant) for name, variant in variants.items()}


def table(metrics: dict[str, dict[str, float]]) -> str:
    """Metrics as a Markdown table, one column per kind of image."""
    lines = [f"| | {' | '.join(metrics)} |", f"|---|{'---:|' * len(metrics)}"]
    for name in next(iter(metrics.values())):
        cells = (
            f"{values[name]:.3f}" if name == "depth_error" else f"{100 * values[name]:.1f} %"
            for values in metrics.values()
        )
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    tolerant_console()
    parser = argparse.ArgumentParser(description="Train and validate the scene detector.")
    parser.add_argument("--data", type=Path, required=True, help="cache of training images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; a run there is resumed")
    parser.add_argument("--minutes", type=float, default=10.0, help="training time")
    parser.add_argument("--steps", type=int, help="optimiser steps, if that comes first")
    parser.add_argument("--export", type=Path, help="folder of the detector; by default OUT/detector")
    parser.add_argument("--held-out", type=int, default=2000, help="images to validate on")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args(arguments)
    export = options.export or options.out / "detector"
    torch.set_num_threads(options.threads)
    try:
        check_writable_folder(options.out)
        check_writable_folder(export)
        scenes = CachedScenes(options.data)
        model = new_detector(image_size=scenes.size)
        run = train_detector(model, scenes, options.out, budget=Budget(options.steps, options.minutes))
        export.mkdir(parents=True, exist_ok=True)
        model.half().save_pretrained(export)
        metrics = validate(export, options.held_out)
    except VaraccelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = {"steps": run.step, "seconds": round(run.seconds, 1), "held_out": options.held_out, **metrics}
    with atomic_path(options.out / "validation.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{run.step} steps in {run.seconds / 60:.1f} min; {options.held_out} held-out images:\n")
    print(table(metrics))
    return 0


if __name__ == "__main__":
    sys.exit(main())
