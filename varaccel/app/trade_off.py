"""Speed against quality of a report as a drawing in the page, without a plotting library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log, log10

from varaccel.accelerators.plain import Plain
from varaccel.evaluation.bench.fronts import Kind, fronts, telling_options
from varaccel.evaluation.bench.report import BenchReport, Row
from varaccel.evaluation.call_text import quality_label

_PANEL = (360, 280)
"""Width and height of a plot in its own units, which are pixels on a phone."""
_FRAME = (40, 12, 350, 232)
"""Left, top, right and bottom of what lies within its axes."""

_LOGARITHMIC = {"speed": 3, "adherence": float("inf"), "distance": 6}
"""An axis is logarithmic if its largest value is more than so many times its smallest."""

_PLACES = tuple(
    (reach * x, reach * y)
    for reach in (11, 18, 26, 36, 48)
    for x, y in ((1, -1), (1, 1), (-1, -1), (-1, 1), (0, -1), (0, 1), (1.2, 0), (-1.2, 0))
)
"""Offsets of a number from its point, in order of preference."""


# -- the points of the plot ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mark:
    """A row of the report in a plot.

    Attributes:
        number: by which plots and list name it.
        speed, value: middle, lower and upper end.
    """

    number: int
    row: Row
    speed: tuple[float, float, float]
    value: tuple[float, float, float]

    @property
    def style(self) -> str:
        return _style(self.row)


def _style(row: Row) -> str:
    """What marker and colour say of a row: "plain", "lossless" or "approximate"."""
    return "plain" if row.accelerator == Plain.name else quality_label(row.lossless)


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high` on a line of a plot from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Where a value lies; at the nearer end if it is off the axis."""
        scale = log if self.logarithmic else float
        inside = min(max(value, self.low), self.high)
        share = (scale(inside) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the axis."""
        if self.logarithmic:
            decades = range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
            values = [mantissa * 10**decade for decade in decades for mantissa in (1, 1.5, 2, 3, 5, 7)]
            return [value for value in values if self.low <= value <= self.high]
        rough = (self.high - self.low) / 4
        power = 10 ** floor(log10(rough))
        step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough)
        return [step * n for n in range(ceil(self.low / step), floor(self.high / step) + 1)]


def trade_off(report: BenchReport, batch: int) -> list[str]:
    """Speed-up against every kind of quality that was measured, and a list of what the numbers in it mean."""
    found = fronts(report, batch)
    rows = [row for row in report.rows if row.quality is not None and batch in row.speed]
    if not found:
        return ["<p>No images were judged, so there is no quality to plot speed against.</p>"]
    panels = "".join(_panel(report, rows, batch, kind, front) for kind, front in found.items())
    entries = "".join(_entry(report, rows, number, batch, found) for number, _ in enumerate(rows, start=1))
    key = "".join(
        f"<span>{_symbol(style)} {words}</span>"
        for style, words in (
            ("plain", "plain decoding"),
            ("lossless", "lossless"),
            ("approximate", "approximate"),
        )
    )
    return [
        f"<h3>Speed against quality, batch {batch}</h3>",
        f'<p class="key">{key}<span>{_line()} on the Pareto front: nothing is better in both</span></p>',
        f'<div class="trade">{panels}<ol>{entries}</ol></div>',
    ]


def _quality_of(row: Row, kind: Kind) -> tuple[float, float, float]:
    """Middle, lower and upper end of what a plot shows of a row."""
    assert row.quality is not None
    if kind == "adherence":
        rate = row.quality.adherence
        return 100 * rate.share, 100 * rate.low, 100 * rate.high
    assert row.quality.distance is not None
    value, std = row.quality.distance.value, row.quality.distance.spread.std
    return value, value - std, value + std


def _panel(report: BenchReport, rows: Sequence[Row], batch: int, kind: Kind, front: Sequence[Row]) -> str:
    marks = [
        _Mark(
            number, row, (row.speed[batch].speedup, *row.speed[batch].speedup_spread), _quality_of(row, kind)
        )
        for number, row in enumerate(rows, start=1)
    ]
    truth = None
    if report.truth is not None and (kind == "adherence" or report.truth.distance is not None):
        truth = _quality_of(Row("true images", {}, True, {}, report.truth), kind)[0]
    left, top, right, bottom = _FRAME
    x = _axis([mark.speed for mark in marks], "speed", left, right)
    # a goal of distances is to be seen; that of adherence may be far off
    goal = [(truth, truth, truth)] if truth is not None and kind == "distance" else []
    y = _axis([*(mark.value for mark in marks), *goal], kind, bottom, top)
    parts = [*_grid(x, y), *_truth(truth, y), _front_line(marks, front, x, y)]
    parts += [_bars(mark, x, y) for mark in marks]
    places = _placed(marks, x, y)
    parts += [_point(mark, x, y, place, kind) for mark, place in zip(marks, places, strict=True)]
    width, height = _PANEL
    space = (report.settings.reference or "").split("/")[0]
    title = (
        "prompt adherence, % (higher is better)"
        if kind == "adherence"
        else f"Fréchet distance, {space} features (lower is better)"
    )
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg class="plot" viewBox="0 0 {width} {height}" '
        f'role="group" aria-label="{escape(title)} against speed-up; the figures are in the tables below">'
        f"{''.join(parts)}</svg></figure>"
    )


def _axis(values: Sequence[tuple[float, float, float]], name: str, start: float, end: float) -> _Axis:
    """The axis that shows `values` with their bars."""
    middles = [middle for middle, *_ in values]
    low, high = min(low for _, low, _ in values), max(high for *_, high in values)
    if min(middles) > 0 and max(middles) > _LOGARITHMIC[name] * min(middles):
        # a bar may reach down to zero, where there is no logarithm
        return _Axis(0.9 * max(low, min(middles) / 2), 1.1 * high, start, end, logarithmic=True)
    margin = 0.08 * (high - low) or 1
    floor_ = 0.0 if low < high / 3 else max(0.0, low - margin)
    return _Axis(floor_, high + margin, start, end)


def _grid(x: _Axis, y: _Axis) -> Iterator[str]:
    left, top, right, bottom = _FRAME
    for value in x.ticks():
        at = x.at(value)
        yield f'<path class="grid" d="M{at:.1f} {top}V{bottom}"/>'
        yield f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{value:g}x</text>'
    for value in y.ticks():
        at = y.at(value)
        yield f'<path class="grid" d="M{left} {at:.1f}H{right}"/>'
        yield f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>'
    middle = (left + right) / 2
    yield f'<text x="{middle}" y="{_PANEL[1] - 8}" text-anchor="middle">speed-up over plain decoding</text>'


def _truth(level: float | None, y: _Axis) -> Iterator[str]:
    """What true images reach."""
    if level is None:
        return
    left, top, right, _ = _FRAME
    inside = y.low <= level <= y.high
    at = y.at(level) if inside else top
    if inside:
        yield f'<path class="truth" d="M{left} {at:.1f}H{right}"/>'
    above = "" if inside else " (above)"
    shift = -4 if inside and at > top + 14 else 12
    yield (
        f'<text class="truth" x="{right - 4}" y="{at + shift:.1f}" text-anchor="end">true images: '
        f"{level:.3g}{above}</text>"
    )


def _front_line(marks: Sequence[_Mark], front: Sequence[Row], x: _Axis, y: _Axis) -> str:
    joined = sorted((mark for mark in marks if mark.row in front), key=lambda mark: mark.speed[0])
    points = " ".join(f"{x.at(mark.speed[0]):.1f},{y.at(mark.value[0]):.1f}" for mark in joined)
    return f'<polyline class="front" points="{points}"/>'


def _bars(mark: _Mark, x: _Axis, y: _Axis) -> str:
    """Error bars of a point, behind all points."""
    (speed, slow, fast), (value, low, high) = mark.speed, mark.value
    along, across = x.at(speed), y.at(value)
    return (
        f'<path class="bar {mark.style} n{mark.number}" d="M{x.at(slow):.1f} {across:.1f}H{x.at(fast):.1f}'
        f'M{along:.1f} {y.at(low):.1f}V{y.at(high):.1f}"/>'
    )


def _point(mark: _Mark, x: _Axis, y: _Axis, place: tuple[float, float], kind: Kind) -> str:
    """A point with its number, which can be pointed at and reached by keyboard."""
    along, across = x.at(mark.speed[0]), y.at(mark.value[0])
    unit = " %" if kind == "adherence" else ""
    words = escape(f"{mark.row.label}: {mark.speed[0]:.2f}x, {kind} {mark.value[0]:.3g}{unit}")
    left, top = along + place[0], across + place[1]
    far = abs(place[0]) + abs(place[1]) > 40
    tie = f'<path class="tie" d="M{along:.1f} {across:.1f}L{left:.1f} {top:.1f}"/>' if far else ""
    return (
        f'<g class="point {mark.style} n{mark.number}" tabindex="0" role="img" aria-label="{words}">'
        f"<title>{words}</title>{tie}"
        f'<circle class="reach" cx="{along:.1f}" cy="{across:.1f}" r="10"/>'
        f"{_shape(mark.style, along, across)}"
        f'<text x="{left:.1f}" y="{top + 4:.1f}" text-anchor="middle">{mark.number}</text></g>'
    )


def _shape(style: str, x: float, y: float) -> str:
    """The marker of a row: styles differ in shape as well as in colour."""
    if style == "lossless":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
    corners = ((0, -6.5), (6.5, 0), (0, 6.5), (-6.5, 0))
    if style == "plain":
        corners = ((-5, -5), (5, -5), (5, 5), (-5, 5))
    return f'<polygon points="{" ".join(f"{x + right:.1f},{y + down:.1f}" for right, down in corners)}"/>'


def _symbol(style: str) -> str:
    return (
        '<svg class="symbol" viewBox="0 0 16 16" aria-hidden="true">'
        f'<g class="point {style}">{_shape(style, 8, 8)}</g></svg>'
    )


def _line() -> str:
    return '<svg class="symbol" viewBox="0 0 16 16" aria-hidden="true"><path class="front" d="M0 12L16 4"/></svg>'


def _placed(marks: Sequence[_Mark], x: _Axis, y: _Axis) -> list[tuple[float, float]]:
    """Where the number of every point stands, as an offset: where it hides least of points, bars and other numbers."""
    left, top, right, bottom = _FRAME
    points = [(x.at(mark.speed[0]), y.at(mark.value[0])) for mark in marks]
    taken: list[tuple[float, float]] = []
    chosen: list[tuple[float, float]] = []
    for along, across in points:
        costs = []
        for rank, (over, down) in enumerate(_PLACES):
            centre = (along + over, across + down)
            outside = not (left + 6 < centre[0] < right - 4 and top + 6 < centre[1] < bottom - 6)
            hits = sum(abs(centre[0] - a) < 15 and abs(centre[1] - b) < 13 for a, b in taken)
            hits += sum(abs(centre[0] - a) < 12 and abs(centre[1] - b) < 11 for a, b in points)
            crossed = sum(
                (abs(centre[0] - a) < 8 and y.at(mark.value[2]) - 6 < centre[1] < y.at(mark.value[1]) + 6)
                or (abs(centre[1] - b) < 7 and x.at(mark.speed[1]) - 8 < centre[0] < x.at(mark.speed[2]) + 8)
                for mark, (a, b) in zip(marks, points, strict=True)
            )
            costs.append((4 * outside + 2 * hits + crossed, rank))
        best = _PLACES[min(costs)[1]]
        taken.append((along + best[0], across + best[1]))
        chosen.append(best)
    return chosen


def _entry(
    report: BenchReport, rows: Sequence[Row], number: int, batch: int, found: Mapping[Kind, Sequence[Row]]
) -> str:
    """What stands under a number of the plots, with its figures."""
    row = rows[number - 1]
    one = row.speed[batch]
    low, high = one.speedup_spread
    figures = [f"{one.speedup:.2f}x" + ("" if row is report.plain else f" ({low:.2f} to {high:.2f})")]
    value, least, most = _quality_of(row, "adherence")
    figures.append(f"{value:.0f} % ({least:.0f} to {most:.0f})")
    if "distance" in found:
        value, least, _ = _quality_of(row, "distance")
        figures.append(f"distance {value:.3g} ({value - least:.2g})")
    best = [name for name, front in found.items() if row in front]
    if best:
        figures.append(f"on the front of {' and '.join(best)}")
    return (
        f'<li class="n{number}" tabindex="0">{_symbol(_style(row))}'
        f"<span><b>{number} {escape(row.accelerator)}</b> "
        f"{escape(telling_options(row, rows))}<small>{escape('; '.join(figures))}</small></span></li>"
    )
