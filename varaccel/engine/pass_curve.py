"""How long a pass takes by the tokens and rows that it reads: what every speculative method lives on."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from varaccel.errors import InputError
from varaccel.nn.devices import Device, wait_for

Pass = tuple[int, Callable[[], object]]
"""Tokens that a pass reads per row, and what runs it once."""


@dataclass(frozen=True)
class PassCurve:
    """Seconds of a pass over n tokens of each of R rows, at the points that were measured.

    Attributes:
        seconds: by (tokens per row, rows), both at least 1.

    Raises:
        InputError: no points, or numbers that are not above 0.
    """

    seconds: Mapping[tuple[int, int], float]

    def __post_init__(self) -> None:
        if not self.seconds:
            raise InputError("a curve of pass times needs at least one measured point.")
        for (tokens, rows), value in self.seconds.items():
            if tokens < 1 or rows < 1 or not value > 0:
                raise InputError(
                    f"a pass reads at least one token of one row in some time, got {tokens} tokens of {rows} rows in "
                    f"{value} s."
                )

    @property
    def rows(self) -> list[int]:
        """Row counts that were measured, in order."""
        return sorted({rows for _, rows in self.seconds})

    def tokens(self, rows: int) -> list[int]:
        """Tokens per row that were measured at this number of rows, in order."""
        return sorted(tokens for tokens, of in self.seconds if of == rows)

    def at(self, tokens: float, rows: float) -> float:
        """Seconds of a pass, linear between points: along the tokens first, then along the rows.

        Beyond the largest point the last slope goes on, below the smallest its value stays, since a pass reads all
        weights however little it does.
        """
        lines = [
            (count, _linear([(t, self.seconds[t, count]) for t in self.tokens(count)], tokens))
            for count in self.rows
        ]
        return _linear(lines, rows)

    def call_seconds(self, passes: float, tokens: float, rows: float) -> float:
        """Seconds of a call of so many passes that read `tokens` tokens of `rows` rows each."""
        return passes * self.at(tokens, rows)

    def __or__(self, other: PassCurve) -> PassCurve:
        """The points of both; where both have one, that of the other."""
        return PassCurve({**self.seconds, **other.seconds})

    def to_list(self) -> list[dict[str, Any]]:
        """Points as plain values, for JSON."""
        return [
            {"tokens": tokens, "rows": rows, "seconds": value}
            for (tokens, rows), value in sorted(self.seconds.items())
        ]

    @classmethod
    def from_list(cls, points: Iterable[Mapping[str, Any]]) -> Self:
        """What `to_list` made."""
        return cls({(point["tokens"], point["rows"]): point["seconds"] for point in points})


def _linear(points: list[tuple[int, float]], place: float) -> float:
    """The value at `place` of lines through sorted points."""
    if len(points) == 1 or place <= points[0][0]:
        return points[0][1]
    end = min(bisect_right([x for x, _ in points], place), len(points) - 1)
    (x0, y0), (x1, y1) = points[end - 1], points[end]
    if place > x1:  # beyond the last point; noise must not let larger passes come out ever quicker
        return y1 + max(0.0, (y1 - y0) / (x1 - x0)) * (place - x1)
    return y0 + (y1 - y0) * (place - x0) / (x1 - x0)


def measure_passes(
    passes: Callable[[], Iterable[Pass]],
    rows: int,
    device: Device,
    *,
    rounds: int = 3,
    warmups: int = 1,
) -> PassCurve:
    """Time passes in turns.

    Args:
        passes: the passes of one round in their order; it is called for every round.
        rows: that each of them reads.
        rounds: timed; the best of each pass counts, because what else runs can only make it slower.
        warmups: rounds before them. A compiled pass needs two, a CUDA graph is recorded in the second.
    """
    best: dict[tuple[int, int], float] = {}
    for number in range(-warmups, rounds):
        for tokens, run in passes():
            wait_for(device)
            start = time.perf_counter()
            run()
            wait_for(device)
            taken = time.perf_counter() - start
            if number >= 0:
                best[tokens, rows] = min(taken, best.get((tokens, rows), taken))
    return PassCurve(best)
