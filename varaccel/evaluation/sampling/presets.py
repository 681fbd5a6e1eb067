"""The protocols of published tables: what to draw, how, and what figure the authors report.

The figures are those of the authors' own tables. Ours will differ by the draw of 50,000 images (a few hundredths
of FID), by torch-fidelity's Inception in the place of TensorFlow's, and by arithmetic (`notes` say where the authors'
differs from ours).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from varaccel.errors import unknown_name
from varaccel.pipelines.pixels import Rounding

IMAGENET_256 = "imagenet-256"
"""A reference that the user brings: ADM's statistics of ImageNet at 256 × 256 (`metrics.ADM_REFERENCE`)."""


@dataclass(frozen=True)
class Preset:
    """A protocol.

    Attributes:
        model: name of the model.
        call: arguments of the pipeline call.
        published: the figures that the authors report, by metric; empty if none is known.
        source: where they report them.
        accelerator: as typed on a command line.
        prompts: see `prompt_lists.list_prompts`.
        count: images.
        image_size, rounding: see `RunSettings`.
        dtype: precision of the networks that decide tokens.
        reference: `imagenet-256`, or one that `load_reference` knows.
        space: feature space.
        notes: what differs from the authors' own run.
    """

    model: str
    call: Mapping[str, Any]
    published: Mapping[str, float]
    source: str
    accelerator: str = "plain"
    prompts: str = "classes"
    count: int = 50_000
    image_size: int | None = None
    rounding: Rounding = "nearest"
    dtype: str = "float32"
    reference: str = IMAGENET_256
    space: str = "inception"
    notes: tuple[str, ...] = field(default=())


def _llamagen(size: str, guidance_scale: float, fid: float) -> Preset:
    return Preset(
        f"llamagen-c2i-{size}-384",
        {"guidance_scale": guidance_scale, "top_k": 0, "top_p": 1.0, "temperature": 1.0},
        {"fid": fid},
        "LlamaGen (arXiv 2406.06525), table of the authors' repository",
        prompts="classes:random",
        image_size=256,
        dtype="bfloat16",
    )


def _zipar(size: str, window: int) -> Preset:
    return Preset(
        f"llamagen-c2i-{size}-384",
        {"guidance_scale": 2.0, "top_k": 0, "top_p": 1.0, "temperature": 1.0},
        {},
        "ZipAR (arXiv 2412.04062): settings of the authors' sampler; their repository tells no figures",
        accelerator=f"zipar:window={window},mode=published",
        prompts="classes:random",
        image_size=256,
        dtype="bfloat16",
        notes=("draw the plain protocol with --guidance-scale 2 too, and compare the two",),
    )


def _var(depth: int, fid: float) -> Preset:
    return Preset(
        f"var-d{depth}",
        {"guidance_scale": 2.5, "top_k": 900, "top_p": 0.96},
        {"fid": fid},
        "VAR (arXiv 2404.02905), table of the authors' repository",
        rounding="down",
        notes=("the authors run in float16 autocast and draw 50 images of a class one after the other",),
    )


def _code(draft_scales: int, fid: float, inception_score: float) -> Preset:
    return Preset(
        f"var-code-{draft_scales}",
        {"guidance_scale": 2.5, "top_k": 600, "top_p": 0.96, "temperature": [1.1] * 7 + [1.0] * 3},
        {"fid": fid, "is": inception_score},
        "CoDe (arXiv 2411.17787), table of the authors' repository",
        accelerator=f"code:draft_scales={draft_scales}",
        rounding="down",
        notes=("the authors use seeds 0 to 49 anew for every class; here every image has its own",),
    )


def _mar(size: str, guidance_scale: float, temperature: float, fid: float, inception_score: float) -> Preset:
    return Preset(
        f"mar-{size}",
        {
            "guidance_scale": guidance_scale,
            "guidance_schedule": "linear",
            "num_iterations": 256,
            "head_steps": 100,
            "temperature": temperature,
        },
        {"fid": fid, "is": inception_score},
        "MAR (arXiv 2406.11838), tables of paper and repository",
        notes=()
        if size == "base"
        else ("the mirror's file very likely holds weights that are not averaged",),
    )


def _shipped(model: str, count: int, **call: Any) -> Preset:
    return Preset(
        model,
        call,
        {},
        "a small shipped model: figures of the scenes' own feature space",
        prompts="scenes",
        count=count,
        reference="scenes:1000",
        space="scenes",
    )


PRESETS: dict[str, Preset] = {
    "llamagen-b-384": _llamagen("b", 2.0, 6.09),
    "llamagen-l-384": _llamagen("l", 2.0, 3.07),
    "llamagen-xl-384": _llamagen("xl", 1.75, 2.62),
    "llamagen-xxl-384": _llamagen("xxl", 1.75, 2.34),
    "llamagen-3b-384": _llamagen("3b", 1.65, 2.18),
    **{
        f"zipar-{size}-384-w{window}": _zipar(size, window)
        for size in ("l", "xl", "xxl")
        for window in (8, 12, 16)
    },
    "var-d16": _var(16, 3.55),
    "var-d20": _var(20, 2.95),
    "var-d24": _var(24, 2.33),
    "var-d30": _var(30, 1.97),
    "code-6": _code(6, 2.27, 297),
    "code-7": _code(7, 2.11, 303),
    "code-8": _code(8, 1.98, 302),
    "code-9": _code(9, 1.94, 296),
    "mar-base": _mar("base", 2.9, 1.0, 2.31, 281.7),
    "mar-large": _mar("large", 3.0, 1.0, 1.78, 296.0),
    "mar-huge": _mar("huge", 3.2, 1.0, 1.55, 303.7),
    "mar-large-unguided": _mar("large", 1.0, 0.95, 2.60, 221.4),
    "mar-huge-unguided": _mar("huge", 1.0, 0.95, 2.35, 227.8),
    "mini-llamagen": _shipped("mini-llamagen", 500),
    "mini-var": _shipped("mini-var", 500),
    "mini-mar": _shipped("mini-mar", 500, num_iterations=64),
}


def get_preset(name: str) -> Preset:
    """A protocol by name.

    Raises:
        InputError: there is none of this name.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]
