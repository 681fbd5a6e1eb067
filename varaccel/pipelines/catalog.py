"""The models that can be asked for by name, and where they come from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import varaccel
from varaccel.errors import CheckpointError


@dataclass(frozen=True)
class PublishedModel:
    """A model whose weights its authors published as single files on the Hugging Face hub.

    Attributes:
        repository, weights, tokenizer: hub repository and the files of the transformer and image tokenizer.
        text_encoder: hub id of the text encoder, None for class-conditional models.
        grid_size: side of the token grid.
        guidance_scale, top_k: the authors' defaults for sampling.
    """

    repository: str
    weights: str
    tokenizer: str
    text_encoder: str | None
    grid_size: int
    guidance_scale: float
    top_k: int


def _class_conditional(size: str, resolution: int) -> PublishedModel:
    return PublishedModel(
        "FoundationVision/LlamaGen",
        f"c2i_{size}_{resolution}.pt",
        "vq_ds16_c2i.pt",
        None,
        resolution // 16,
        guidance_scale=4.0,
        top_k=2000,
    )


def _text_conditional(stage: int, resolution: int) -> PublishedModel:
    return PublishedModel(
        "peizesun/llamagen_t2i",
        f"t2i_XL_stage{stage}_{resolution}.pt",
        "vq_ds16_t2i.pt",
        "google/flan-t5-xl",
        resolution // 16,
        guidance_scale=7.5,
        top_k=1000,
    )


PUBLISHED: dict[str, PublishedModel] = {
    "llamagen-c2i-b-256": _class_conditional("B", 256),
    "llamagen-c2i-l-256": _class_conditional("L", 256),
    "llamagen-c2i-b-384": _class_conditional("B", 384),
    "llamagen-c2i-l-384": _class_conditional("L", 384),
    "llamagen-c2i-xl-384": _class_conditional("XL", 384),
    "llamagen-c2i-xxl-384": _class_conditional("XXL", 384),
    "llamagen-c2i-3b-384": _class_conditional("3B", 384),
    "llamagen-t2i-xl-256": _text_conditional(1, 256),
    "llamagen-t2i-xl-512": _text_conditional(2, 512),
}


def weights_folder() -> Path:
    """Where the shipped models are: inside the installed package, or beside it in a checkout."""
    package = Path(varaccel.__file__).parent
    for folder in (package / "weights", package.parent / "weights"):
        if (folder / "manifest.json").is_file():
            return folder
    raise CheckpointError(
        f"no shipped models beside {package}; reinstall varaccel or pass the path of a model folder."
    )


def shipped_models() -> dict[str, Path]:
    """Names and folders of the models that ship with the library."""
    folder = weights_folder()
    manifest = json.loads((folder / "manifest.json").read_text())
    return {name: folder / name for name in manifest["models"]}
