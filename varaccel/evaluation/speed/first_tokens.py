"""Calls that end after the first tokens of an image: enough to time what would take minutes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from varaccel.engine.statistics import Statistics


def first_tokens(
    pipe: Any, prompts: Sequence[str | int], tokens: int | None = None, **call: Any
) -> Statistics:
    """The statistics of a call that stops as soon as it has decided `tokens` tokens of every image.

    Looking at every pass costs it a copy of the canvas; a call of whole images is not looked at.

    Args:
        tokens: None for whole images.
        call: further arguments of the pipeline call.
    """
    if tokens is None:
        return _statistics(pipe, prompts, call)
    left = tokens

    def stop(_: Any, step: int, decided: int, shown: dict[str, Any]) -> None:
        nonlocal left
        left -= decided
        if left <= 0:
            shown["stop"]()

    return _statistics(pipe, prompts, {**call, "callback_on_step_end": stop})


def _statistics(pipe: Any, prompts: Sequence[str | int], call: dict[str, Any]) -> Statistics:
    statistics: Statistics = pipe(list(prompts), output_type="latent", **{"seed": 0, **call}).stats
    return statistics
