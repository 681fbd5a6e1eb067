"""The curve of pass times: interpolation, order of measuring, and what cannot be a curve."""

from __future__ import annotations

import time

import pytest

from varaccel.engine.pass_curve import PassCurve, measure_passes
from varaccel.errors import InputError

CURVE = PassCurve({(1, 2): 1.0, (4, 2): 1.0, (8, 2): 2.0, (1, 4): 2.0, (4, 4): 3.0, (8, 4): 5.0})


@pytest.mark.parametrize(
    ("tokens", "rows", "seconds"),
    [
        (1, 2, 1.0),
        (8, 4, 5.0),
        (6, 2, 1.5),  # between tokens
        (6, 3, 2.75),  # between both
        (1, 1, 1.0),  # below: a pass reads all weights
        (16, 2, 4.0),  # beyond: the last slope
        (4, 8, 7.0),
    ],
)
def test_interpolation(tokens: int, rows: int, seconds: float) -> None:
    assert CURVE.at(tokens, rows) == pytest.approx(seconds)
    assert CURVE.call_seconds(10, tokens, rows) == pytest.approx(10 * seconds)


def test_noise_does_not_make_larger_passes_ever_quicker() -> None:
    assert PassCurve({(1, 1): 2.0, (2, 1): 1.9}).at(64, 1) == 1.9


def test_points_survive_json_and_join() -> None:
    assert PassCurve.from_list(CURVE.to_list()) == CURVE
    joined = CURVE | PassCurve({(1, 2): 0.5, (1, 6): 9.0})
    assert joined.rows == [2, 4, 6]
    assert joined.tokens(2) == [1, 4, 8]
    assert joined.at(1, 2) == 0.5


@pytest.mark.parametrize("seconds", [{}, {(0, 1): 1.0}, {(1, 0): 1.0}, {(1, 1): 0.0}])
def test_what_is_no_curve(seconds: dict[tuple[int, int], float]) -> None:
    with pytest.raises(InputError, match=r"at least one"):
        PassCurve(seconds)


def test_measuring_takes_the_best_of_rounds_in_turn() -> None:
    order: list[int] = []
    waits = {1: iter([0.05, 0.02, 0.0]), 2: iter([0.0, 0.01, 0.03])}

    def run(tokens: int) -> None:
        order.append(tokens)
        time.sleep(next(waits[tokens]))

    curve = measure_passes(lambda: [(n, lambda n=n: run(n)) for n in (1, 2)], 2, "cpu", rounds=2)  # type: ignore[misc]
    assert order == [1, 2] * 3  # one round warms up
    assert curve.seconds[1, 2] < 0.01  # the quickest of its timed rounds
    assert 0.01 <= curve.seconds[2, 2] < 0.03  # the round that warmed up does not count
