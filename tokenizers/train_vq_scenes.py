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
import json
import sys
from dataclasses import asdict
from pathlib import Path

from varaccel.training.allocator import keep_freed_memory


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).parent
    parser.add_argument("--config", type=Path, default=here / "vq_scenes.json", help="model and recipe")
    parser.add_argument("--data", type=Path, required=True, help="folder written by varaccel.scenes.cache")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--decoder-of", type=Path, help="train only the decoder of this exported tokenizer")
    parser.add_argument("--start-from", type=Path, help="take what fits of this exported VQ tokenizer")
    parser.add_argument("--minutes", type=float, default=28.0, help="training time")
    parser.add_argument("--steps", type=int, help="stop after this many steps, if that comes first")
    parser.add_argument("--held-out", type=int, default=512, help="held-out scenes of the final evaluation")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-export-quality", action="store_true", help="skip the final evaluation")
    options = parser.parse_args()

    import numpy as np
    import torch

    from varaccel.errors import InputError, VaraccelError
    from varaccel.files import atomic_path
    from varaccel.scenes import HELD_OUT_SEED, render, sample_scene
    from varaccel.scenes.cache import CachedScenes
    from varaccel.tokenizers.multiscale_vq import MultiScaleVQModel
    from varaccel.tokenizers.vq import VQModel
    from varaccel.training.run import Budget
    from varaccel.training.vq import VQRecipe, VQTrainer, evaluate, warm_start

    try:
        data = CachedScenes(options.data, allow_partial=True)
        config = json.loads(options.config.read_text())
        recipe = VQRecipe(**config["recipe"])
        held_out = np.stack(
            [
                render(sample_scene(HELD_OUT_SEED + i), data.size).image
                for i in range(64 if options.no_export_quality else options.held_out)
            ]
        )
        torch.manual_seed(recipe.seed)
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
        trainer = VQTrainer(
            model,
            data,
            held_out[:64],
            options.out,
            Budget(options.steps, options.minutes),
            recipe,
            decoder_only=options.decoder_of is not None,
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
