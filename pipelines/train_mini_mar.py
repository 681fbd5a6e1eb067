"""Train `mini-mar`: scenes, KL image tokenizer, latents, and the masked transformer with its diffusion head.

    python pipelines/train_mini_mar.py --out runs

Every stage keeps its own folder below OUT and is skipped or resumed when the command is run again. Text encoder
and word tokenizer are those of `weights/mini-llamagen`. The transformer is trained in OUT/NAME, NAME from the
config; the finished pipeline is written to OUT/mini-NAME, and `--install weights/mini-mar` puts it where it ships.
The small model, which drafts for the large one, is trained on the same latents:

    python pipelines/train_mini_mar.py --out runs --config pipelines/mini_mar_small.json --stages transformer pipeline
    python pipelines/train_mini_mar.py --out runs --stages pipeline --draft runs/mar-small/export
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varaccel.console import tolerant_console
from varaccel.training.allocator import keep_freed_memory

if TYPE_CHECKING:
    from varaccel.models.mar import MARTransformer

HERE = Path(__file__).parent
SHIPPED = HERE.parent / "weights" / "mini-llamagen"
STAGES = ("scenes", "tokenizer", "latents", "transformer", "pipeline")


def parse() -> argparse.Namespace:
    from varaccel.training.stages import recipe_parser

    parser = recipe_parser(__doc__, HERE / "mini_mar.json", STAGES)
    parser.add_argument("--batch-size", type=int, help="of the transformer, instead of the config's")
    parser.add_argument("--draft", type=Path, help="exported small transformer to put into the pipeline")
    return parser.parse_args()


def tokenizer_folder(options: argparse.Namespace) -> Path:
    return options.out / "mini-kl" / "export"


def load_transformer(folder: Path) -> MARTransformer:
    """An exported transformer in float32; refuses a folder without one."""
    import torch

    from varaccel.models.mar import MARTransformer
    from varaccel.training.stages import exported

    return MARTransformer.from_pretrained(exported(folder), dtype=torch.float32)


def adopt(options: argparse.Namespace, config: dict[str, Any]) -> None:
    from varaccel.training.stages import adopt_text

    adopt_text(SHIPPED, options.out / "mini-text")


def train_tokenizer(options: argparse.Namespace, config: dict[str, Any]) -> None:
    from varaccel.training.stages import train_image_tokenizer

    recipes = HERE.parent / "tokenizers"
    more = ("--config", recipes / "kl_scenes.json")
    train_image_tokenizer(options, recipes / "train_kl_scenes.py", options.out / "mini-kl", *more)


def encode(options: argparse.Namespace, config: dict[str, Any]) -> None:
    from varaccel.training.stages import encode_images

    folder = options.out / "latents"
    encode_images(options, "varaccel.training.latents", tokenizer_folder(options), folder)


def train_transformer(options: argparse.Namespace, config: dict[str, Any]) -> None:
    from varaccel.models.mar import MARTransformer
    from varaccel.scenes.cache import CachedScenes
    from varaccel.training.command_line import training_budget
    from varaccel.training.latents import read_latents
    from varaccel.training.mar import MARRecipe, train_mar
    from varaccel.training.stages import caption_condition

    latents, manifest = read_latents(options.out / "latents")
    captions = CachedScenes(options.scenes, allow_partial=True).captions[: len(latents)]
    model = MARTransformer(**config["model"]).to(options.device)
    condition = caption_condition(captions, options.out / "mini-text", options.device, model.buffer)
    recipe = dict(config["recipe"])
    if options.batch_size:
        recipe["batch_size"] = options.batch_size
    folder = options.out / config["name"]
    finished = train_mar(
        model,
        latents[: len(captions)].to(options.device),
        manifest.scaling_factor,
        condition,
        folder,
        budget=training_budget(options),
        validation=options.validation,
        recipe=MARRecipe(**recipe),
        compile=not options.no_compile,
        settings={"image_tokenizer": manifest.tokenizer},
    )
    finished.plot(["loss", "validation_loss"])
    model.save_pretrained(folder / "export")


def assemble(options: argparse.Namespace, config: dict[str, Any]) -> None:
    from diffusers import AutoencoderKL

    from varaccel.pipelines.mar import MARPipeline
    from varaccel.tokenizers.text import WordTextEncoder, WordTokenizer
    from varaccel.training.stages import write_pipeline

    text = options.out / "mini-text"
    names = ("guidance_scale", "guidance_schedule", "temperature", "num_iterations", "head_steps")
    pipe = MARPipeline(
        transformer=load_transformer(options.out / config["name"] / "export"),
        vae=AutoencoderKL.from_pretrained(tokenizer_folder(options)),
        text_encoder=WordTextEncoder.from_pretrained(text / "text_encoder"),
        tokenizer=WordTokenizer.from_pretrained(text / "tokenizer"),
        draft_transformer=load_transformer(options.draft) if options.draft else None,
        **{name: config[name] for name in names},
    )
    write_pipeline(pipe, options.out / f"mini-{config['name']}", options)


def main() -> int:
    tolerant_console()
    options = parse()
    from varaccel.training.stages import render_scenes, run_stages

    actions = (render_scenes, train_tokenizer, encode, train_transformer, assemble)
    return run_stages(options, dict(zip(STAGES, actions, strict=True)), adopt)


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
