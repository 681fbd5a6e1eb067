"""Recorded inputs and outputs of the published code, and models built from them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from varaccel.models.llamagen import LlamaGenTransformer
from varaccel.nn.checkpoints import load_strict

LLAMAGEN = Path(__file__).parent / "golden" / "llamagen"


@cache
def llamagen_cases() -> dict[str, Any]:
    return json.loads((LLAMAGEN / "cases.json").read_text())["cases"]


def llamagen_tensors(name: str) -> dict[str, Tensor]:
    return load_file(LLAMAGEN / f"{name}.safetensors")


@cache
def llamagen_model(model_type: str) -> LlamaGenTransformer:
    """The recorded tiny model of a type; shared by tests, so nobody may change it."""
    config = llamagen_cases()[f"{model_type}_logits"]["config"]
    condition = (
        {"num_classes": config["num_classes"]}
        if model_type == "c2i"
        else {"prefix_length": config["cls_token_num"], "caption_dim": config["caption_dim"]}
    )
    model = LlamaGenTransformer(
        model_type=config["model_type"],
        dim=config["dim"],
        num_layers=config["n_layer"],
        num_heads=config["n_head"],
        vocab_size=config["vocab_size"],
        grid_size=int(config["block_size"] ** 0.5),
        ffn_multiple_of=config["multiple_of"],
        **condition,
    )
    load_strict(model, llamagen_tensors(f"{model_type}_weights"), source="golden weights")
    return model.eval().requires_grad_(False)


def llamagen_condition(model_type: str) -> tuple[Tensor, Tensor | None]:
    """Condition and mask of the greedy runs."""
    tensors = llamagen_tensors("c2i_greedy_raster" if model_type == "c2i" else "t2i_greedy")
    if model_type == "c2i":
        return tensors["class_ids"], None
    return tensors["caption_emb"], tensors["caption_mask"]
