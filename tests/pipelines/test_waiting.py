"""Passes that do not ask the device for a number: on a GPU each question stops the host until all work is done."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pipelines.test_compiled import with_drafters
from varaccel import CoDe, FeatureCache, FewerSteps, Jacobi, Speculative, ZipAR
from varaccel.nn.number_check import NumberCheck

FEW = {"head_steps": 3}


class Questions(TorchDispatchMode):
    """Counts how often a number is taken from a tensor to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU every pass looks at its numbers at once; elsewhere at the end of the call."""
    original = NumberCheck.__init__

    def waiting(check: NumberCheck, *arguments: Any) -> None:
        original(check, *arguments)
        check._waits = True

    monkeypatch.setattr(NumberCheck, "__init__", waiting)


def questions(kind: str, fixed: bool, **options: Any) -> list[int]:
    """Numbers asked for in each pass after the first two, with the shapes of a compiled pipeline if `fixed`."""
    pipe = with_drafters(kind)
    if fixed:
        name = "forward" if kind.startswith("mar") else "transform"
        pipe._transforms = lambda network: getattr(network, name)
    seen: list[int] = []
    make_job = pipe._job

    def watched_job(run: Any, on_step: Any) -> Any:
        def after(step: Any) -> None:
            on_step(step)
            seen.append(counted.count)

        return make_job(run, after)

    pipe._job = watched_job  # and no callback, which is shown copies
    with Questions() as counted:
        pipe([0, 1], seed=0, output_type="latent", **options)
    assert len(seen) > 2
    return [after - before for before, after in pairwise(seen[1:])]


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("c2i", {}),
        ("c2i", {"guidance_interval": 3}),
        ("c2i", {"accelerator": ZipAR(2)}),
        ("var-class", {}),
        ("var-class", {"accelerator": CoDe(draft_scales=1)}),
        ("mar-class", FEW),
        ("mar-class", {"accelerator": FewerSteps(iterations=5), **FEW}),
        ("mar-class", {"accelerator": FeatureCache(), **FEW}),
    ],
    ids=str,
)
def test_a_schedule_that_is_known_ahead_asks_nothing(kind: str, options: dict[str, Any], fixed: bool) -> None:
    assert not any(questions(kind, fixed, **options))


@pytest.mark.parametrize(
    "accelerator",
    [
        Jacobi(window=4, coupling="maximal"),
        Speculative("eagle"),
        Speculative("small"),
        Speculative("layers"),
        Speculative("eagle", row_window=2),
    ],
    ids=str,
)
def test_drafting_with_fixed_shapes_asks_how_far_the_images_are(accelerator: Any) -> None:
    """Whether all are done, and for the observer's sake how much is: nothing per pass of a drafter."""
    assert max(questions("c2i", True, accelerator=accelerator)) <= 2
