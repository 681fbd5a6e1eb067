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
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from varaccel.training.allocator import keep_freed_memory

LARGE_BATCH, LARGE_BATCH_RATE = 64, 2e-3
"""From this batch size on, the learning rate is this one instead of the config's."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).parent
    parser.add_argument("--config", type=Path, default=here / "kl_scenes.json", help="model and recipe")
    parser.add_argument("--data", type=Path, required=True, help="folder written by varaccel.scenes.cache")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--minutes", type=float, default=60.0, help="training time")
    parser.add_argument("--steps", type=int, help="stop after this many steps, if that comes first")
    parser.add_argument("--batch-size", type=int, help="instead of the config's")
    parser.add_argument(
        "--learning-rate",
        type=float,
        help=f"instead of the config's, or of {LARGE_BATCH_RATE} from a batch of {LARGE_BATCH} on",
    )
    parser.add_argument("--compile", action="store_true", help="compile the training step")
    parser.add_argument("--held-out", type=int, default=512, help="held-out scenes of the final evaluation")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-export-quality", action="store_true", help="skip the final evaluation")
    options = parser.parse_args()

    import numpy as np
    import torch
    from diffusers import AutoencoderKL

    from varaccel.errors import VaraccelError
    from varaccel.files import atomic_path
    from varaccel.scenes import HELD_OUT_SEED, render, sample_scene
    from varaccel.scenes.cache import CachedScenes
    from varaccel.tokenizers.kl import kl_config
    from varaccel.training.kl import KLRecipe, KLTrainer, evaluate
    from varaccel.training.run import Budget

    try:
        data = CachedScenes(options.data, allow_partial=True)
        config = json.loads(options.config.read_text())
        recipe = KLRecipe(**config["recipe"])
        if options.batch_size is not None:
            recipe = replace(recipe, batch_size=options.batch_size)
        if options.learning_rate is not None:
            recipe = replace(recipe, learning_rate=options.learning_rate)
        elif recipe.batch_size >= LARGE_BATCH:
            recipe = replace(recipe, learning_rate=LARGE_BATCH_RATE)
        recipe = replace(recipe, compile=options.compile or recipe.compile)
        held_out = np.stack(
            [
                render(sample_scene(HELD_OUT_SEED + i), data.size).image
                for i in range(64 if options.no_export_quality else options.held_out)
            ]
        )
        torch.manual_seed(recipe.seed)
        model = AutoencoderKL(**kl_config(**config["model"]))
        trainer = KLTrainer(
            model,
            data,
            held_out[:64],
            options.out,
            Budget(options.steps, options.minutes),
            recipe,
            device=options.device,
        )
        model = trainer.train()
        if not options.no_export_quality:
            quality = asdict(evaluate(model, held_out))
            with atomic_path(options.out / "quality.json") as temporary:
                temporary.write_text(json.dumps({"images": len(held_out), **quality}, indent=2) + "\n")
            print(json.dumps(quality))
        trainer.run.plot(["l1", "laplacian", "ssim_loss"])
    except VaraccelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
