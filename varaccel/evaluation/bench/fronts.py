"""Which rows of a bench report lie on the Pareto fronts of speed and quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from varaccel.engine.statistics import telling
from varaccel.evaluation.bench.report import BenchReport, Row

Kind = Literal["adherence", "distance"]


def telling_options(row: Row, rows: Sequence[Row]) -> str:
    """Those of a row's options that differ among the `rows` of its accelerator, such as `window=4`.

    What is left to the call (None), and what hardly any of them changes, is told only where it is changed.
    """
    family = [other for other in rows if other.accelerator == row.accelerator]
    unusual = telling(row.accelerator, row.options)
    told = []
    for name, value in row.options.items():
        alike = sum(other.options.get(name, value) == value for other in family)
        usual = name not in unusual and alike >= 3 / 4 * len(family)
        if alike < len(family) and value is not None and not usual:
            told.append(f"{name}={value}")
    return ", ".join(told)


def shown_rows(report: BenchReport, batch: int | None) -> list[Row]:
    """The rows that were judged, and timed at this batch."""
    return [row for row in report.rows if row.quality is not None and batch in row.speed]


def quality_kinds(rows: Sequence[Row]) -> list[Kind]:
    """The kinds of quality that all of these rows have."""
    measured = all(row.quality is not None and row.quality.distance is not None for row in rows)
    return ["adherence", "distance"] if measured else ["adherence"]


def fronts(report: BenchReport, batch: int) -> dict[Kind, list[Row]]:
    """The rows that the lines of `plot` join: by kind of quality those that no other row beats in both it and speed.

    Nothing if no row was both timed at this batch and judged. Noise is not considered.
    """
    rows = shown_rows(report, batch)
    found: dict[Kind, list[Row]] = {}
    for kind in quality_kinds(rows) if rows else []:
        points = [(row.speed[batch].speedup, quality_value(row, kind)[0]) for row in rows]
        front = pareto_front(points, kind == "adherence")
        found[kind] = [row for row, point in zip(rows, points, strict=True) if point in front]
    return found


def quality_value(row: Row, kind: str) -> tuple[float, float, float]:
    """What a panel shows of a row: value, and how far its bar reaches down and up."""
    assert row.quality is not None
    if kind == "adherence":
        rate = row.quality.adherence
        # rounding may put an end of the interval of 0 or 100 % a trifle inside
        reach = (max(0.0, rate.share - rate.low), max(0.0, rate.high - rate.share))
        return 100 * rate.share, 100 * reach[0], 100 * reach[1]
    assert row.quality.distance is not None
    std = row.quality.distance.spread.std
    return row.quality.distance.value, std, std


def pareto_front(points: Sequence[tuple[float, float]], more: bool) -> list[tuple[float, float]]:
    """The points (speed-up, quality) that no other one beats in both, in order of falling speed.

    Args:
        more: whether more quality is better.
    """
    sign = 1 if more else -1
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], sign * point[1]), reverse=True):
        if not front or sign * y > sign * front[-1][1]:
            front.append((x, y))
    return front
