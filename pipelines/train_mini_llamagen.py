"""Train `mini-llamagen` from nothing: scenes, text encoder, image tokenizer, token ids, transformer.

    python pipelines/train_mini_llamagen.py --out runs

Every stage keeps its own folder below OUT and is skipped or resumed when the command is run again. The
transformer is trained in OUT/NAME, NAME from the config; the finished pipeline is written to OUT/mini-NAME, and
`--install weights/mini-llamagen` puts it where it ships.

To train a shipped pipeline further, with its own text encoder and image tokenizer:

    python pipelines/train_mini_llamagen.py --out runs/more --from-pipeline weights/mini-llamagen \\
        --stages scenes token-ids transformer pipeline
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from varaccel.console import tolerant_console
from varaccel.training.allocator import keep_freed_memory

HERE = Path(__file__).parent
STAGES = ("scenes", "text", "tokenizer", "token-ids", "transformer", "pipeline")


def parse() -> argparse.Namespace:
    from varaccel.training.stages import recipe_parser

    parser = recipe_parser(
        __doc__, HERE / "mini_llamagen.json", STAGES, tokenizer_minutes=60.0, minutes=240.0
    )
    parser.add_argument("--text-steps", type=int, default=1100)
    parser.add_argument("--from-pipeline", type=Path, help="go on from the weights of this pipeline")
    return parser.parse_args()


def adopt(options: argparse.Namespace, config: dict[str, Any]) -> None:
    """With `--from-pipeline`, its text encoder and image tokenizer take the places of trained ones."""
    from varaccel.training.stages import adopt_image_tokenizer, adopt_text

    if options.from_pipeline:
        adopt_image_tokenizer(options.from_pipeline, tokenizer_folder(options))
        adopt_text(options.from_pipeline, options.out / "mini-text")


def tokenizer_folder(options: argparse.Namespace) -> Path:
    return options.out / "mini-vq" / "export"


def train_text(options: argparse.Namespace, config: dict[str, Any]) -> None:
    from varaccel.training.stages import run

    command = ["-m", "varaccel.training.text", "--out", options.out / "mini-text"]
    run(*command, "--steps", options.text_steps, "--device", options.device)


def train_tokenizer(options: argparse.Namespace, config: dict[str, Any]) -> None:
    from varaccel.training.stages import train_image_tokenizer

    script = HERE.parent / "tokenizers" / "train_vq_scenes.py"
    train_image_tokenizer(options, script, options.out / "mini-vq")


def encode(options: argparse.Namespace, config: dict[str, Any]) -> None:
    from varaccel.training.stages import encode_images

    folder = options.out / "token-ids"
    encode_images(options, "varaccel.training.token_ids", tokenizer_folder(options), folder)


def train_transformer(options: argparse.Namespace, config: dict[str, Any]) -> None:
    import torch

    from varaccel.models.llamagen import LlamaGenTransformer
    from varaccel.scenes.cache import CachedScenes
    from varaccel.training.command_line import training_budget
    from varaccel.training.llamagen import LlamaGenRecipe, train_llamagen
    from varaccel.training.stages import caption_condition
    from varaccel.training.token_ids import read_token_ids

    token_ids, fingerprint = read_token_ids(options.out / "token-ids")
    captions = CachedScenes(options.scenes, allow_partial=True).captions[: len(token_ids)]
    if options.from_pipeline:
        # a switch of the network without weights of its own, so a finished model can take it up and train on
        identity = config["model"].get("prefix_identity", False)
        model = LlamaGenTransformer.from_pretrained(
            options.from_pipeline / "transformer", dtype=torch.float32, prefix_identity=identity
        )
    else:
        model = LlamaGenTransformer(**config["model"])
    model.to(options.device)
    condition = caption_condition(captions, options.out / "mini-text", options.device, model.prefix_length)
    folder = options.out / config["name"]
    finished = train_llamagen(
        model,
        token_ids,
        condition,
        folder,
        budget=training_budget(options),
        validation=options.validation,
        recipe=LlamaGenRecipe(**config["recipe"]),
        compile=not options.no_compile,
        from_scratch=not options.from_pipeline,
        settings={"image_tokenizer": fingerprint},
    )
    finished.plot(["loss", "validation_loss"])
    model.save_pretrained(folder / "export")


def assemble(options: argparse.Namespace, config: dict[str, Any]) -> None:
    from varaccel import LlamaGenPipeline, LlamaGenTransformer, VQModel
    from varaccel.tokenizers.text import WordTextEncoder, WordTokenizer
    from varaccel.training.stages import write_pipeline

    text = options.out / "mini-text"
    pipe = LlamaGenPipeline(
        LlamaGenTransformer.from_pretrained(options.out / config["name"] / "export"),
        VQModel.from_pretrained(tokenizer_folder(options)),
        WordTextEncoder.from_pretrained(text / "text_encoder"),
        WordTokenizer.from_pretrained(text / "tokenizer"),
        guidance_scale=config["guidance_scale"],
        top_k=config["top_k"],
        temperature=config["temperature"],
    )
    write_pipeline(pipe, options.out / f"mini-{config['name']}", options)


def main() -> int:
    tolerant_console()
    options = parse()
    from varaccel.training.stages import render_scenes, run_stages

    actions = (render_scenes, train_text, train_tokenizer, encode, train_transformer, assemble)
    return run_stages(options, dict(zip(STAGES, actions, strict=True)), adopt)


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
