"""Defaults by paradigm: what is compared, how much of it is measured, and what the app proposes.

Accelerators are written as on a command line, see `varaccel.accelerators.notation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from varaccel.engine.job import Job
from varaccel.evaluation.sampling.example_prompts import examples
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.masked.job import MaskedJob
from varaccel.hosts.next_scale.job import ScaleJob

_ONE_OBJECT = (
    "a large yellow cone at sunset",
    "a green cube on a checkered floor",
    "a red sphere on a green floor",
)
_RELATED = ("a red cylinder left of a blue cube", "a big shiny cyan cone to the left of a small orange cone")
_QUICK_HEAD = "head_steps=20,head_sampler=dpm++"


@dataclass(frozen=True)
class Defaults:
    """What is done with the models of a paradigm if nothing is asked for.

    Attributes:
        label: what the paradigm is called.
        release: what the report of a release compares with plain decoding of the shipped model: few enough for half an
            hour on a CPU core.
        demo: what `varaccel demo` shows beside plain decoding.
        demo_prompts: what it asks for: of the kind that the shipped model of the paradigm follows mostly
            (`eval/adherence.py`), so that a wrong image says something about the accelerator.
        first_choice: accelerator that the app proposes, None for the first that fits.
        images: judged per accelerator in the report of a release; models differ a hundredfold in speed.
        batches: images per timed call in that report.
    """

    label: str = "other"
    release: tuple[str, ...] = ()
    demo: tuple[str, ...] = ()
    demo_prompts: tuple[str, ...] = _ONE_OBJECT
    first_choice: str | None = None
    images: int = 24
    batches: tuple[int, ...] = (1,)


DEFAULTS: Mapping[type[Job], Defaults] = {
    CausalJob: Defaults(
        label="causal",
        release=(
            "jacobi:window=16",
            "speculative:drafter=auto,tree=3",
            "lantern:k=50,delta=0.4,tree=8",
            *(f"zipar:window={n}" for n in (8, 4, 2)),
        ),
        demo=("jacobi", "lantern:k=20,delta=0.4,tree=8", "zipar:window=8"),
        first_choice="zipar",
        images=64,
        batches=(1, 8),
    ),
    ScaleJob: Defaults(
        label="next-scale",
        release=(
            *(f"code:draft_scales={n},refiner=mini-var-small" for n in (6, 5, 4, 3)),
            "refiner:refiner=mini-var-small",
        ),
        demo=("code:draft_scales=5", "code:draft_scales=4"),
        first_choice="code",
        images=240,
        batches=(1, 16),
    ),
    MaskedJob: Defaults(
        label="masked",
        release=(
            "fewer_steps:iterations=32",
            f"fewer_steps:iterations=32,{_QUICK_HEAD}",
            "feature_cache:refresh=4",
            "cspd:mode=exact",
        ),
        demo=("fewer_steps:iterations=32", f"fewer_steps:iterations=32,{_QUICK_HEAD}"),
        demo_prompts=_RELATED,
        first_choice="fewer_steps",
        images=24,
        batches=(1,),
    ),
}

APP_OPTIONS: Mapping[tuple[str, str], Any] = {
    ("zipar", "window"): 4,
    ("code", "draft_scales"): 4,
    ("code", "refiner"): "mini-var-small",
    ("fewer_steps", "iterations"): 32,
    ("fewer_steps", "head_steps"): 20,
    ("fewer_steps", "head_sampler"): "dpm++",
}
"""Accelerator and option where the app starts from another value than the default: settings of the release's report
that show something."""


def defaults_of(job_type: type[Job]) -> Defaults:
    """The defaults of a kind of job; empty ones if it has none."""
    return next((found for kind, found in DEFAULTS.items() if issubclass(job_type, kind)), Defaults())


# -- grids of `varaccel bench` -------------------------------------------------------------------------

CAUSAL_GRID = (
    "auto",
    "jacobi:window=8",
    "jacobi:window=16",
    "speculative:drafter=auto,tree=3",
    "speculative:drafter=auto,tree=5",
    "lantern:k=10,delta=0.2,tree=5",
    "lantern:k=10,multiplier=5,tree=5",
    "zipar:window=2",
    "zipar:window=4",
    "zipar:window=8",
    "zipar:window=12",
    "jacobi:window=8,row_window=8",
    "lantern:k=10,delta=0.2,tree=5,row_window=8",
)
"""What `varaccel bench` compares with plain decoding of a causal model."""


def default_grid(pipe: Any, drafter: str | None = None) -> tuple[str, ...]:
    """What `varaccel bench` compares on this pipeline if nothing is asked for.

    For next-scale models that is CoDe at every hand-over; for masked ones their accelerators alone and together, and
    fewer steps, which all of them have to beat.

    Args:
        drafter: a model to draft for a masked one that came without; without any, nothing that drafts is compared.
    """
    if issubclass(pipe.job_type, MaskedJob):
        return _masked_grid(pipe, drafter)
    if issubclass(pipe.job_type, ScaleJob):
        scales = len(pipe.schedule)
        return (*(f"code:draft_scales={n}" for n in range(scales - 1, 0, -1)), "refiner")
    return CAUSAL_GRID


def plan_grid(pipe: Any) -> tuple[str, ...]:
    """What `eval/scale_plans.py` compares: every option of a plan of scales alone, its named kinds, and combinations.

    Args:
        pipe: of a next-scale model; of one with few scales, options that need more are left out.
    """
    scales = len(pipe.schedule)
    late = [
        *(f"scale_plan:guided_scales={-n}" for n in (1, 2, 3, 4)),
        'scale_plan:keep={"-1": 0.5}',
        'scale_plan:keep={"-2": 0.6, "-1": 0.5}',
        'scale_plan:keep={"-2": 0.6, "-1": 0.5},criterion=attention',
        'scale_plan:cache={"-3": 0.5, "-2": 0.5}',
        "scale_plan:stop=-1",
        "scale_plan:together=2",
        "fast_var",
        "skip_var",
    ]
    together = [
        'scale_plan:guided_scales=-3,keep={"-2": 0.6, "-1": 0.5}',
        "scale_plan:guided_scales=-3,together=2",
        'scale_plan:guided_scales=-3,keep={"-1": 0.5},cache={"-3": 0.5, "-2": 0.5}',
    ]
    return (*late, *together) if scales > 4 else tuple(late[4:5])


def _masked_grid(pipe: Any, drafter: str | None) -> tuple[str, ...]:
    """The grid of a masked model; iterations are shares of its tokens, so that it suits every size."""
    tokens = pipe.transformer.num_tokens
    half, quarter, eighth = (max(1, tokens // n) for n in (2, 4, 8))
    quick = "head_sampler=dpm++,head_steps=20"
    grid = (
        *(f"fewer_steps:iterations={n}" for n in (half, quarter, eighth)),
        *(f"fewer_steps:head_steps={n}" for n in (50, 25)),
        *(f"fewer_steps:head_sampler=dpm++,head_steps={n}" for n in (20, 10)),
        *(f"fewer_steps:iterations={n},{quick}" for n in (quarter, eighth)),
        *(f"feature_cache:refresh={n}" for n in (2, 4, 8)),
        f"feature_cache:refresh=4,iterations={quarter}",
        f"feature_cache:refresh=4,{quick}",
        *(f"feature_cache:refresh={n},iterations={quarter},{quick}" for n in (2, 4)),
    )
    if "draft" not in pipe.drafters and drafter is None:
        return grid
    named = "" if "draft" in pipe.drafters else f",drafter={drafter}"
    lengths = [n for n in (2, 4, 8) if n <= tokens]
    return (
        *grid,
        *(
            f"cspd:mode={mode},draft_length={n}{named}"
            for mode in ("reference", "paper", "exact")
            for n in lengths
        ),
        f"cspd:mode=exact,draft_length={min(4, lengths[-1])},verification=sequential{named}",
    )


# -- smaller grids -------------------------------------------------------------------------------------


def demo_grid(pipe: Any) -> tuple[str, ...]:
    """What `varaccel demo` shows beside plain decoding of this pipeline."""
    return defaults_of(pipe.job_type).demo


def demo_prompts(pipe: Any) -> list[str]:
    """What `varaccel demo` asks this pipeline for."""
    return examples(pipe, defaults_of(pipe.job_type).demo_prompts)


def speed_grid(pipe: Any, smaller: str | None = None) -> tuple[str, ...]:
    """What `eval/speed.py` compares on this pipeline if nothing is asked for.

    Args:
        smaller: name of a smaller version of the model, which refines for a next-scale one that came without a
            refiner.
    """
    if issubclass(pipe.job_type, ScaleJob):
        own = "refiner" in pipe.drafters
        if not own and smaller is None:
            return ()
        half = max(1, len(pipe.schedule) // 2)
        refiner = "" if own else f",refiner={smaller}"
        return tuple(f"code{at}{refiner}" for at in (f":draft_scales={half}", ":"))
    if issubclass(pipe.job_type, MaskedJob):
        half = max(1, pipe.transformer.num_tokens // 2)
        drafting = ("cspd:mode=reference",) if "draft" in pipe.drafters else ()
        return (f"fewer_steps:iterations={half}", "feature_cache:refresh=4", *drafting)
    return ("jacobi", "zipar:window=4")
