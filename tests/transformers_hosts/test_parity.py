"""Hosts of transformers draw what the models' own code draws, one token per pass or several."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import varaccel
from tests.transformers_cases import CASES
from varaccel.accelerators import AnyAccelerator

EXACT: dict[str, AnyAccelerator] = {
    "plain": varaccel.Plain(),
    "jacobi": varaccel.Jacobi(4),
    "jacobi, no coupling": varaccel.Jacobi(4, coupling="none"),
    "jacobi, maximal coupling": varaccel.Jacobi(4, coupling="maximal"),
    "layers": varaccel.Speculative("layers", 3),
    "layers, dynamic tree": varaccel.Speculative("layers", "dynamic"),
    "smaller model": varaccel.Speculative("small", 3),
    "EAGLE head": varaccel.Speculative("eagle", 3),
    "auto": varaccel.Auto(),
}
"""Greedy tokens of lossless methods are those of plain decoding."""

BATCHES = (1, 3)

GUIDED = [
    (name, scaled) for name, case in CASES.items() for scaled in (True, False) if scaled <= bool(case.scale)
]


@cache
def expected(host: str, batch: int, scale: float) -> Tensor:
    case = CASES[host]
    return case.expected(case.pipeline(), list(case.prompts[:batch]), scale)


@cache
def eagle_head(host: str) -> varaccel.EagleHead:
    """A drafter of the host's sizes, untrained: what it drafts is rarely right, and must never show."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return varaccel.EagleHead.for_target(CASES[host].pipeline().transformer).eval()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(("host", "guided"), GUIDED)
@pytest.mark.parametrize("batch", BATCHES)
def test_greedy_tokens_are_those_of_the_models_own_code(
    host: str, guided: bool, batch: int, name: str
) -> None:
    case = CASES[host]
    pipe = case.pipeline()
    if EXACT[name] == EXACT["smaller model"] and "small" not in pipe.drafters:
        pytest.skip("no smaller model of this kind")
    accelerator = EXACT[name]
    if name == "EAGLE head":  # the pipelines come without one
        accelerator = replace(accelerator, drafter=eagle_head(host))
    prompts = list(case.prompts[:batch])
    scale = (case.scale or 1.0) if guided else 1.0
    drawn: list[Tensor] = []

    def keep(pipe: object, step: int, decided: object, shown: dict[str, Any]) -> dict[str, Any]:
        drawn.append(shown["canvas"].tokens)
        return {}

    pipe(
        prompts,
        **case.options,
        negative_prompt=case.negative if guided else None,
        guidance_scale=scale,
        temperature=0,
        accelerator=accelerator,
        output_type="latent",
        seed=0,
        callback_on_step_end=keep,
    )
    assert torch.equal(drawn[-1], expected(host, batch, scale))


def test_the_page_has_the_table_of_these_cases() -> None:
    """Another one is written by `python -m tests.transformers_hosts.parity_table`."""
    from tests.transformers_hosts.parity_table import PAGE, with_table

    text = PAGE.read_text(encoding="utf-8")
    assert text == with_table(text)
