"""The sizes that are measured with random weights, and what is measured of each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Family = Literal["llamagen", "var", "infinity", "mar", "janus", "glm_image"]
Kind = Literal["curve", "compiled", "loop", "accelerators"]

KINDS: Mapping[Kind, str] = {
    "curve": "time per pass by tokens and images, eager",
    "compiled": "the same after compile()",
    "loop": "plain decoding against the published loop, in turns",
    "accelerators": "accelerators whose time does not depend on the weights, against plain decoding",
}


@dataclass(frozen=True)
class Size:
    """A published size.

    Attributes:
        name: as it is asked for and shown.
        preset: its name in the family.
        changes: to the preset, such as the grid.
        refiner: preset of the second network of a CoDe pair.
        accelerators: to be timed directly, as on the command line.
        call: arguments of its pipeline calls, published defaults where they matter for time.
        kinds: what is measured.
    """

    name: str
    family: Family
    preset: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    refiner: str | None = None
    accelerators: tuple[str, ...] = ()
    call: Mapping[str, Any] = field(default_factory=dict)
    kinds: tuple[Kind, ...] = tuple(KINDS)


@dataclass(frozen=True)
class Suite:
    """Sizes and how thoroughly they are measured.

    Attributes:
        dtype: of the weights.
        images: per call, of the pass curves.
        tokens: per pass and image of the pass curves.
        rounds: timed ones.
        loop_tokens: at most so many tokens of an image are drawn to compare loops; None for all.
        mar: iterations and head steps of masked models in calls.
    """

    name: str
    sizes: tuple[Size, ...]
    dtype: str
    images: tuple[int, ...]
    rounds: int
    loop_tokens: int | None
    mar: Mapping[str, int]
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)


def _llamagen(preset: str, pixels: int) -> Size:
    grid = pixels // 16
    return Size(
        f"LlamaGen-{preset}-{pixels}",
        "llamagen",
        preset,
        {"grid_size": grid},
        accelerators=tuple(f"zipar:window={grid // part}" for part in (2, 4, 8)),
        call={"guidance_scale": 4.0, "top_k": 2000},
    )


_VAR_CALL = {"guidance_scale": 2.5, "top_k": 900, "top_p": 0.96}


def _var(preset: str) -> Size:
    return Size(f"VAR-{preset}", "var", preset, call=_VAR_CALL, kinds=("curve", "compiled", "loop"))


def _code(preset: str, refiner: str) -> Size:
    accelerators = tuple(f"code:draft_scales={count}" for count in (9, 8, 7, 6))
    return Size(
        f"CoDe-{preset}+{refiner}",
        "var",
        preset,
        refiner=refiner,
        accelerators=accelerators,
        call=_VAR_CALL,
        kinds=("accelerators",),
    )


def _infinity(preset: str, size: str, depth: int | None = None) -> Size:
    """Square images of a size of `SIZES`; a smaller depth where the whole network is too much to wait for."""
    shown = "" if depth is None else f"-depth{depth}"
    return Size(
        f"Infinity-{preset}{shown}-{size}",
        "infinity",
        preset,
        {"size": size, **({} if depth is None else {"depth": depth})},
        call={"guidance_scale": 3.0, "top_p": 0.97, "temperature": 0.5},
        kinds=("curve", "compiled", "loop"),
    )


def _mar(name: str, preset: str) -> Size:
    return Size(
        f"MAR-{name}",
        "mar",
        preset,
        accelerators=("fewer_steps:iterations=4", "feature_cache:refresh=4"),
        call={"guidance_scale": 3.0},
    )


def _janus(preset: str) -> Size:
    return Size(
        f"Janus-{preset}",
        "janus",
        preset,
        accelerators=("zipar:window=12", "zipar:window=6"),
        call={"guidance_scale": 5.0},
    )


GPU = Suite(
    "gpu",
    (
        *(
            _llamagen(preset, pixels)
            for preset in ("B", "L", "XL", "XXL", "3B")
            for pixels in (256, 384, 512)
        ),
        *map(_var, ("d16", "d20", "d24", "d30", "d36")),
        _code("d30", "d16"),
        _code("d24", "d16"),
        *(_infinity("2B", size) for size in ("0.06M", "0.25M", "1M")),
        *(_mar(name, preset) for name, preset in (("B", "base"), ("L", "large"), ("H", "huge"))),
        _janus("Pro-1B"),
        _janus("Pro-7B"),
        Size("GLM-Image", "glm_image", "9B", kinds=("curve", "compiled")),
    ),
    dtype="bfloat16",
    images=(1, 4, 16),
    rounds=5,
    loop_tokens=128,
    mar={"num_iterations": 64, "head_steps": 100},
)

CPU = Suite(
    "cpu",
    (_llamagen("B", 256), _var("d16"), _infinity("2B", "0.06M", depth=4), _mar("B", "base")),
    dtype="float32",
    images=(1, 4),
    rounds=2,
    loop_tokens=64,
    mar={"num_iterations": 8, "head_steps": 10},
)

SUITES = {suite.name: suite for suite in (CPU, GPU)}

_TINY: Mapping[Family, Mapping[str, Any]] = {
    "llamagen": {"dim": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "grid_size": 6},
    "var": {"depth": 2, "dim": 32, "num_heads": 4, "vocab_size": 64, "scales": (1, 2, 3)},
    "infinity": {"depth": 2, "dim": 32, "num_heads": 4, "token_bits": 4, "text_dim": 16, "size": "0.06M"},
    "mar": {
        **{"dim": 32, "encoder_depth": 1, "decoder_depth": 2, "num_heads": 4, "grid_size": 4},
        **{"head_depth": 1, "head_width": 32},
    },
    "janus": {
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "heads": 4},
        **{"vocab_size": 64, "codes": 64, "grid": 4},
    },
    "glm_image": {
        **{"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64},
        **{"vocab_size": 256, "vision_vocab_size": 160, "side": 4, "pad_token_id": 0, "eos_token_id": 1},
    },
}


def dry_run(suite: Suite) -> Suite:
    """One size of each kind with tiny networks: whether a suite runs from end to end, not how fast anything is."""
    kinds = {(size.family, size.refiner is not None): size for size in reversed(suite.sizes)}
    tiny = tuple(
        replace(
            size,
            changes=_TINY[size.family],
            # scales and windows of tiny images
            accelerators=tuple(re.sub(r"=(\d+)$", "=2", one) for one in size.accelerators[:1]),
            call={**size.call, "top_k": 10} if "top_k" in size.call else size.call,
        )
        for size in kinds.values()
    )
    return replace(
        suite,
        sizes=tiny,
        dtype="float32",
        images=(1,),
        tokens=(1, 2),
        rounds=1,
        loop_tokens=3,
        mar={"num_iterations": 3, "head_steps": 2},
    )
