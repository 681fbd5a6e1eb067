"""Train `mini-var`: scenes, multi-scale image tokenizer, token ids, transformer, and a refiner for CoDe.

    python pipelines/train_mini_var.py --out runs

Every stage keeps its own folder below OUT and is skipped or resumed when the command is run again. Text encoder
and word tokenizer are those of `weights/mini-llamagen`. The transformer is trained in OUT/NAME, NAME from the
config; the finished pipeline is written to OUT/mini-var, and `--install weights/mini-var` puts it where it ships.

A small refiner, taught by the large transformer on the scales after the first four (CoDe, arXiv 2411.17787):

    python pipelines/train_mini_var.py --out runs --config pipelines/mini_var_small.json --stages refiner \\
        --teacher runs/var/export --draft-scales 4
    python pipelines/train_mini_var.py --out runs --stages pipeline --refiner runs/var-small-refiner/export

It starts from the exported small transformer where there is one, else from new weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varaccel.console import tolerant_console
from varaccel.training.allocator import keep_freed_memory

if TYPE_CHECKING:
    from varaccel.models.var import VARTransformer
    from varaccel.training.run import TrainingRun

HERE = Path(__file__).parent
SHIPPED = HERE.parent / "weights" / "mini-llamagen"
STAGES = ("scenes", "tokenizer", "token-ids", "transformer", "refiner", "pipeline")


def parse() -> argparse.Namespace:
    from varaccel.training.stages import recipe_parser

    usual = [stage for stage in STAGES if stage != "refiner"]
    parser = recipe_parser(__doc__, HERE / "mini_var.json", STAGES, usual)
    parser.add_argument("--teacher", type=Path, help="exported transformer that teaches the refiner")
    parser.add_argument("--draft-scales", type=int, default=4, help="scales that the refiner leaves to it")
    parser.add_argument("--refiner", type=Path, help="exported refiner to put into the pipeline")
    return parser.parse_args()


def train(
    options: argparse.Namespace,
    config: dict[str, Any],
    model: VARTransformer,
    folder: Path,
    *,
    teacher: VARTransformer | None = None,
    from_scratch: bool = True,
) -> TrainingRun:
    """Train a transformer in `folder`, as a refiner if it has a teacher, and export it."""
    from varaccel.errors import InputError
    from varaccel.scenes.cache import CachedScenes
    from varaccel.tokenizers.multiscale_vq import MultiScaleVQModel
    from varaccel.training.command_line import training_budget
    from varaccel.training.shards import fingerprint
    from varaccel.training.stages import caption_condition
    from varaccel.training.token_ids import read_token_ids
    from varaccel.training.var import VARRecipe, train_refiner, train_var

    token_ids, made_by = read_token_ids(options.out / "msvq-token-ids")
    captions = CachedScenes(options.scenes, allow_partial=True).captions[: len(token_ids)]
    vq = MultiScaleVQModel.from_pretrained(tokenizer_folder(options))
    if fingerprint(vq) != made_by:
        raise InputError(
            f"the token ids in {options.out / 'msvq-token-ids'} were made by another image tokenizer; "
            "encode them again."
        )
    model.to(options.device)
    condition = caption_condition(captions, options.out / "mini-text", options.device)
    data = (vq.quantize, token_ids[: len(captions)], condition, folder)
    common: dict[str, Any] = {
        "budget": training_budget(options),
        "validation": options.validation,
        "recipe": VARRecipe(**config["recipe"]),
        "compile": not options.no_compile,
        "from_scratch": from_scratch,
        "settings": {"image_tokenizer": made_by},
    }
    if teacher is None:
        finished = train_var(model, *data, **common)
    else:
        finished = train_refiner(model, teacher, *data, draft_scales=options.draft_scales, **common)
    finished.plot(["loss", "validation_loss"])
    model.save_pretrained(folder / "export")
    return finished


def tokenizer_folder(options: argparse.Namespace) -> Path:
    return options.out / "mini-msvq" / "export"


def load_transformer(folder: Path) -> VARTransformer:
    """An exported transformer in float32; refuses a folder without one."""
    import torch

    from varaccel.models.var import VARTransformer
    from varaccel.training.stages import exported

    return VARTransformer.from_pretrained(exported(folder), dtype=torch.float32)


def adopt(options: argparse.Namespace, config: dict[str, Any]) -> None:
    from varaccel.training.stages import adopt_text

    adopt_text(SHIPPED, options.out / "mini-text")


def train_tokenizer(options: argparse.Namespace, config: dict[str, Any]) -> None:
    from varaccel.training.stages import train_image_tokenizer

    recipes = HERE.parent / "tokenizers"
    more = ("--config", recipes / "msvq_scenes.json", "--start-from", SHIPPED / "vq_model")
    train_image_tokenizer(options, recipes / "train_vq_scenes.py", options.out / "mini-msvq", *more)


def encode(options: argparse.Namespace, config: dict[str, Any]) -> None:
    from varaccel.training.stages import encode_images

    folder = options.out / "msvq-token-ids"
    encode_images(options, "varaccel.training.token_ids", tokenizer_folder(options), folder)


def train_transformer(options: argparse.Namespace, config: dict[str, Any]) -> None:
    from varaccel.models.var import VARTransformer

    train(options, config, VARTransformer(**config["model"]), options.out / config["name"])


def train_refiner(options: argparse.Namespace, config: dict[str, Any]) -> None:
    from varaccel.errors import InputError
    from varaccel.models.var import VARTransformer

    if options.teacher is None:
        raise InputError("a refiner needs a teacher: pass --teacher with the export of a larger transformer.")
    teacher = load_transformer(options.teacher)
    start = options.out / config["name"] / "export"
    there = start.is_dir()
    student = load_transformer(start) if there else VARTransformer(**config["model"])
    folder = options.out / f"{config['name']}-refiner"
    train(options, config, student, folder, teacher=teacher, from_scratch=not there)


def assemble(options: argparse.Namespace, config: dict[str, Any]) -> None:
    from varaccel.pipelines.var import VARPipeline
    from varaccel.tokenizers.multiscale_vq import MultiScaleVQModel
    from varaccel.tokenizers.text import WordTextEncoder, WordTokenizer
    from varaccel.training.stages import write_pipeline

    text = options.out / "mini-text"
    pipe = VARPipeline(
        transformer=load_transformer(options.out / config["name"] / "export"),
        vq_model=MultiScaleVQModel.from_pretrained(tokenizer_folder(options)),
        text_encoder=WordTextEncoder.from_pretrained(text / "text_encoder"),
        tokenizer=WordTokenizer.from_pretrained(text / "tokenizer"),
        refiner=load_transformer(options.refiner) if options.refiner else None,
        guidance_scale=config["guidance_scale"],
        top_k=config["top_k"],
        top_p=config["top_p"],
        temperature=config["temperature"],
    )
    write_pipeline(pipe, options.out / f"mini-{config['name']}", options)


def main() -> int:
    tolerant_console()
    options = parse()
    from varaccel.training.stages import render_scenes, run_stages

    actions = (render_scenes, train_tokenizer, encode, train_transformer, train_refiner, assemble)
    return run_stages(options, dict(zip(STAGES, actions, strict=True)), adopt)


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
