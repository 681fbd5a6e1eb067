"""Train `mini-llamagen` from nothing: scenes, text encoder, image tokenizer, token ids, transformer.

    python pipelines/train_mini_llamagen.py --out runs

Every stage keeps its own folder below OUT and is skipped or resumed when the command is run again. The
finished pipeline is written to OUT/mini-llamagen; `--install weights/mini-llamagen` puts it where it ships.

To train a shipped pipeline further, with its own text encoder and image tokenizer:

    python pipelines/train_mini_llamagen.py --out runs/more --from-pipeline weights/mini-llamagen \\
        --stages scenes token-ids transformer pipeline
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from varaccel.training.allocator import keep_freed_memory

HERE = Path(__file__).parent
STAGES = ("scenes", "text", "tokenizer", "token-ids", "transformer", "pipeline")


def parse() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of all stages")
    parser.add_argument("--config", type=Path, default=HERE / "mini_llamagen.json")
    parser.add_argument("--images", type=int, default=60_000, help="training images")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="rendering processes")
    parser.add_argument("--text-steps", type=int, default=1100)
    parser.add_argument("--tokenizer-minutes", type=float, default=60.0)
    parser.add_argument("--minutes", type=float, default=240.0, help="training time of the transformer")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--from-pipeline", type=Path, help="go on from the weights of this pipeline")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-compile", action="store_true", help="train the transformer uncompiled")
    parser.add_argument("--install", type=Path, help="also write the pipeline here, in half precision")
    return parser.parse_args()


def train_transformer(options: argparse.Namespace, config: dict[str, Any]) -> None:
    import torch

    from varaccel.models.llamagen import LlamaGenTransformer
    from varaccel.scenes.cache import CachedScenes
    from varaccel.training.llamagen import LlamaGenRecipe, train_llamagen
    from varaccel.training.run import Budget
    from varaccel.training.stages import caption_condition
    from varaccel.training.token_ids import read_token_ids

    token_ids, fingerprint = read_token_ids(options.out / "token-ids")
    captions = CachedScenes(options.out / "scenes", allow_partial=True).captions[: len(token_ids)]
    if options.from_pipeline:
        model = LlamaGenTransformer.from_pretrained(
            options.from_pipeline / "transformer", dtype=torch.float32
        )
    else:
        model = LlamaGenTransformer(**config["model"])
    model.to(options.device)
    condition = caption_condition(captions, options.out / "mini-text", options.device, model.prefix_length)
    finished = train_llamagen(
        model,
        token_ids,
        condition,
        options.out / "llamagen",
        budget=Budget(minutes=options.minutes),
        recipe=LlamaGenRecipe(**config["recipe"]),
        compile=not options.no_compile,
        from_scratch=not options.from_pipeline,
        settings={"image_tokenizer": fingerprint},
    )
    finished.plot(["loss", "validation_loss"])
    model.save_pretrained(options.out / "llamagen" / "export")


def assemble(options: argparse.Namespace, config: dict[str, Any]) -> None:
    import torch

    from varaccel import LlamaGenPipeline, LlamaGenTransformer, VQModel
    from varaccel.tokenizers.text import WordTextEncoder, WordTokenizer

    text = options.out / "mini-text"
    pipe = LlamaGenPipeline(
        LlamaGenTransformer.from_pretrained(options.out / "llamagen" / "export"),
        VQModel.from_pretrained(options.out / "mini-vq" / "export"),
        WordTextEncoder.from_pretrained(text / "text_encoder"),
        WordTokenizer.from_pretrained(text / "tokenizer"),
        guidance_scale=config["guidance_scale"],
        top_k=config["top_k"],
        temperature=config["temperature"],
    )
    pipe.save_pretrained(options.out / "mini-llamagen")
    if options.install:
        pipe.to(torch.float16).save_pretrained(options.install)


def main() -> int:
    options = parse()
    config = json.loads(options.config.read_text())
    out = options.out
    from varaccel.errors import VaraccelError
    from varaccel.training.stages import adopt_image_tokenizer, adopt_text, run

    try:
        if options.from_pipeline:
            adopt_image_tokenizer(options.from_pipeline, out / "mini-vq" / "export")
            adopt_text(options.from_pipeline, out / "mini-text")
        if "scenes" in options.stages:
            command = ["-m", "varaccel.scenes.cache", "--out", out / "scenes"]
            run(*command, "--count", options.images, "--workers", options.workers)
        if "text" in options.stages:
            run("-m", "varaccel.training.text", "--out", out / "mini-text", "--steps", options.text_steps)
        if "tokenizer" in options.stages:
            command = [HERE.parent / "tokenizers" / "train_vq_scenes.py", "--data", out / "scenes"]
            run(*command, "--out", out / "mini-vq", "--minutes", options.tokenizer_minutes)
        if "token-ids" in options.stages:
            command = ["-m", "varaccel.training.token_ids", "--tokenizer", out / "mini-vq" / "export"]
            run(*command, "--scenes", out / "scenes", "--out", out / "token-ids")
        if "transformer" in options.stages:
            train_transformer(options, config)
        if "pipeline" in options.stages:
            assemble(options, config)
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    except VaraccelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
