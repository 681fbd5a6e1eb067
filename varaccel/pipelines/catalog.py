"""The models that can be asked for by name, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PublishedModel:
    """A model whose weights its authors published as single files on the Hugging Face hub.

    Attributes:
        family: the model family by which accelerators know it.
        repository, weights: hub repository and the file of the transformer, or a folder of them that ends in "/".
        tokenizer: file of the image tokenizer, in `tokenizer_repository` or else in the same one.
        settings: the authors' defaults for sampling, as settings of the pipeline.
        text_encoder: hub id of the text encoder, None for class-conditional models.
        grid_size: side of the token grid (LlamaGen, whose files do not tell it).
        refiner: file of the refiner (CoDe pairs), in the same repository.
        revision: commit of the repositories, if their newest does not have the files any more.
    """

    family: str
    repository: str
    weights: str
    tokenizer: str
    settings: Mapping[str, Any]
    text_encoder: str | None = None
    grid_size: int | None = None
    tokenizer_repository: str | None = None
    refiner: str | None = None
    revision: str | None = None


def _class_conditional(size: str, resolution: int) -> PublishedModel:
    return PublishedModel(
        "llamagen",
        "FoundationVision/LlamaGen",
        f"c2i_{size}_{resolution}.pt",
        "vq_ds16_c2i.pt",
        {"guidance_scale": 4.0, "top_k": 2000},
        grid_size=resolution // 16,
    )


def _text_conditional(stage: int, resolution: int) -> PublishedModel:
    return PublishedModel(
        "llamagen",
        "peizesun/llamagen_t2i",
        f"t2i_XL_stage{stage}_{resolution}.pt",
        "vq_ds16_t2i.pt",
        {"guidance_scale": 7.5, "top_k": 1000},
        text_encoder="google/flan-t5-xl",
        grid_size=resolution // 16,
    )


_VAR_TOKENIZER = "vae_ch160v4096z32.pth"
# the published settings for figures; the authors' demo uses guidance 4 and top-p 0.95
# 1 + the published cfg
_VAR_SETTINGS = {"guidance_scale": 2.5, "top_k": 900, "top_p": 0.96}


def _var(depth: int) -> PublishedModel:
    return PublishedModel("var", "FoundationVision/var", f"var_d{depth}.pth", _VAR_TOKENIZER, _VAR_SETTINGS)


def _code_pair(draft_scales: int) -> PublishedModel:
    """Weights specialised for one hand-over; sampled with CoDe's own settings."""
    return PublishedModel(
        "var",
        "Zigeng/VAR_CoDe",
        f"drafter_{draft_scales}.pth",
        _VAR_TOKENIZER,
        {"guidance_scale": 2.5, "top_k": 600, "top_p": 0.96},
        tokenizer_repository="FoundationVision/var",
        refiner=f"refiner_{draft_scales}.pth",
    )


def _mar(weights: str, tokenizer: str, guidance_scale: float, revision: str | None = None) -> PublishedModel:
    """MAR with the published settings for figures: one token per iteration, 100 steps of the head.

    The authors offer their files outside of the hub; the repository is a mirror in the same layout.
    """
    settings = {
        "guidance_scale": guidance_scale,
        "guidance_schedule": "linear",
        "temperature": 1.0,
        "num_iterations": None,
        "head_steps": 100,
    }
    return PublishedModel("mar", "jadechoghari/mar", weights, tokenizer, settings, revision=revision)


def _infinity(weights: str, tokenizer: str, temperature: float) -> PublishedModel:
    """Infinity with the settings of the authors' demo."""
    return PublishedModel(
        "infinity",
        "FoundationVision/Infinity",
        weights,
        tokenizer,
        {"guidance_scale": 3.0, "top_p": 0.97, "temperature": temperature},
        text_encoder="google/flan-t5-xl",
    )


# Of MAR-B the mirror's history has the published checkpoint with averaged weights, which the published results are
# of; the newest commit only has what it was averaged from.
_MAR_ORIGINAL = "773c9bdcd98740c7b876ce0d66f684a0e2468990"

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
    **{f"var-d{depth}": _var(depth) for depth in (16, 20, 24, 30, 36)},
    **{f"var-code-{n}": _code_pair(n) for n in (6, 7, 8, 9)},
    "infinity-2b": _infinity("infinity_2b_reg.pth", "infinity_vae_d32reg.pth", 0.5),
    "infinity-8b": _infinity("infinity_8b_weights/", "infinity_vae_d56_f8_14_patchify.pth", 1.0),
    "mar-base": _mar("checkpoint-last.pth", "kl16.ckpt", 2.9, _MAR_ORIGINAL),
    "mar-large": _mar("mar-large.safetensors", "kl16.safetensors", 3.0),
    "mar-huge": _mar("mar-huge.safetensors", "kl16.safetensors", 3.2),
}
