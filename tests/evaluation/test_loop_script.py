"""What the scripts that compare loops share."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tiny import pipeline
from varaccel.accelerators.zipar import ZipAR
from varaccel.evaluation.speed.first_tokens import first_tokens
from varaccel.evaluation.speed.loop_script import in_turns, median_ratio


def test_runs_take_turns_after_a_round_that_warms_up() -> None:
    called: list[str] = []

    def run(name: str) -> int:
        called.append(name)
        return len(called)

    taken = in_turns({"a": lambda: run("a"), "b": lambda: run("b")}, 2)
    assert called == ["a", "b"] * 3
    assert taken == {"a": [3, 5], "b": [4, 6]}


def test_a_disturbed_round_does_not_move_the_ratio() -> None:
    assert median_ratio([6.0, 2.0, 4.0], [1.0, 50.0, 2.0]) == 2


@pytest.mark.parametrize("accelerator", [None, ZipAR(2)])
def test_first_tokens(accelerator: Any) -> None:
    pipe = pipeline("c2i")
    whole = first_tokens(pipe, [0, 1], accelerator=accelerator)
    assert (whole.tokens, whole.interrupted) == (16, False)
    part = first_tokens(pipe, [0, 1], 6, accelerator=accelerator)
    assert part.interrupted
    assert part.passes < whole.passes
    assert 6 <= part.tokens < 16
