"""Train a small Janus of transformers on scenes, to measure accelerators on a model whose images mean something.

    python pipelines/train_small_janus.py --out runs/janus --minutes 15
    python eval/janus_loop.py --model runs/janus/small-janus

Its token ids are those of the image tokenizer of `mini-llamagen`, which is read from `--from-pipeline`; its own image
tokenizer stays random, so that look at its images through the other one (`eval/janus_loop.py --images FILE` does).
Every stage keeps its own folder below OUT and is skipped or resumed when the command is run again. The result is a
folder in transformers' layout, OUT/small-janus.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from varaccel.console import tolerant_console

HERE = Path(__file__).parent
STAGES = ("scenes", "token-ids", "transformer")
SPECIAL = {"boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image>"}


def parse() -> argparse.Namespace:
    from varaccel.training.stages import recipe_parser

    parser = recipe_parser(__doc__, HERE / "small_janus.json", STAGES, minutes=15.0)
    parser.set_defaults(images=6000, validation=256)
    parser.add_argument("--from-pipeline", type=Path, default=HERE.parent / "weights" / "mini-llamagen")
    return parser.parse_args()


def encode(options: argparse.Namespace, config: dict[str, Any]) -> None:
    from varaccel.training.stages import encode_images

    tokenizer = options.from_pipeline / "vq_model"
    encode_images(options, "varaccel.training.token_ids", tokenizer, options.out / "token-ids")


def new_processor(captions: list[str]) -> Any:
    """A processor of Janus with the words of the captions."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import JanusImageProcessor, JanusProcessor, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", *SPECIAL.values(), "<unk>"]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(captions, trainers.WordLevelTrainer(special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=SPECIAL,
    )
    return JanusProcessor(JanusImageProcessor(), words)


def new_model(config: dict[str, Any], processor: Any) -> Any:
    """A Janus of the config's sizes; what draws no images is as small as it can be."""
    from transformers import (
        GenerationConfig,
        JanusConfig,
        JanusForConditionalGeneration,
        JanusVisionConfig,
        JanusVQVAEConfig,
        LlamaConfig,
    )

    width, side = config["text"]["hidden_size"], config["grid_size"]
    ids = processor.tokenizer.convert_tokens_to_ids
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = LlamaConfig(vocab_size=len(processor.tokenizer), **config["text"], **ends)
    vision = JanusVisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=side * 16,
        patch_size=16,
        projection_dim=width,
        num_image_tokens=side * side,
        depth=1,
    )
    vq = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=config["token_ids"],
        latent_channels=32,
        base_channels=32,
        channel_multiplier=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        projection_dim=width,
        image_token_embed_dim=width,
        num_hidden_layers=2,
    )
    model = JanusForConditionalGeneration(
        JanusConfig(
            text_config=text, vision_config=vision, vq_config=vq, image_token_id=ids(SPECIAL["image_token"])
        )
    )
    model.generation_config = GenerationConfig(
        guidance_scale=config["guidance_scale"],
        generation_kwargs={"boi_token_id": ids(SPECIAL["boi_token"])},
        **ends,
    )
    parts = model.model
    model.requires_grad_(False)
    for part in (
        parts.language_model,
        parts.generation_embeddings,
        parts.generation_aligner,
        parts.generation_head,
    ):
        part.requires_grad_(True)
    return model


def train(options: argparse.Namespace, config: dict[str, Any]) -> None:
    import torch

    from varaccel.files import atomic_path
    from varaccel.nn.condition import Condition
    from varaccel.nn.grid import Grid
    from varaccel.pipelines.janus import JanusPipeline
    from varaccel.scenes.cache import CachedScenes
    from varaccel.training.causal import train_causal
    from varaccel.training.command_line import training_budget
    from varaccel.training.token_ids import read_token_ids
    from varaccel.training.tokens import TokenRecipe

    token_ids, fingerprint = read_token_ids(options.out / "token-ids")
    token_ids = token_ids[: options.images]
    captions = CachedScenes(options.scenes, allow_partial=True).captions[: len(token_ids)]
    torch.manual_seed(0)
    processor = new_processor([str(caption) for caption in captions])
    model = new_model(config, processor).to(options.device)
    pipe = JanusPipeline(model, processor)

    def condition(indices: Any) -> Condition:
        return pipe._condition([str(captions[index]) for index in indices.tolist()])

    finished = train_causal(
        model,
        pipe.transformer,
        token_ids,
        condition,
        (Grid(config["grid_size"], config["grid_size"]),),
        options.out / "training",
        budget=training_budget(options),
        recipe=TokenRecipe(**config["recipe"]),
        is_matrix=lambda name, p: "language_model.layers." in name and p.dim() == 2,
        settings={"model": config, "image_tokenizer": fingerprint},
        validation=options.validation,
    )
    finished.plot(["loss", "ema_validation_loss"])
    with atomic_path(options.out / config["name"]) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


def main() -> int:
    tolerant_console()
    options = parse()
    from varaccel.training.stages import render_scenes, run_stages

    return run_stages(options, dict(zip(STAGES, (render_scenes, encode, train), strict=True)))


if __name__ == "__main__":
    sys.exit(main())
