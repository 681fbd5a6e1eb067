"""Speed against quality of a bench report as an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import hypot
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from varaccel.accelerators.plain import Plain
from varaccel.errors import InputError
from varaccel.evaluation.bench.fronts import (
    pareto_front,
    quality_kinds,
    quality_value,
    shown_rows,
    telling_options,
)
from varaccel.evaluation.bench.report import BenchReport, Row
from varaccel.evaluation.extra import check_extra
from varaccel.files import atomic_path
from varaccel.image_files import write_image

# Okabe and Ito's colours, which are told apart without full colour vision
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_TRUTH = "#006644"
_LABEL_PLACES = tuple(
    (reach * x, reach * y)
    for reach in (10, 17, 25, 34, 45, 58)
    for x, y in ((0.8, 0.8), (0.8, -0.8), (-0.8, 0.8), (-0.8, -0.8), (0, 1), (0, -1), (1, 0), (-1, 0))
)
"""Offsets of a number from its point, in points, in order of preference."""

_NEAR = 20
"""A number further away from its point than this, in points, is tied to it by a line."""

_LOGARITHMIC = 3
"""The axis of speed is logarithmic if its largest value is more than so many times its smallest; that of distances if
twice as many times."""


def plot(report: BenchReport, path: str | Path, batch: int | None = None) -> None:
    """Speed-up against adherence and, where measured, Fréchet distance, with error bars; written whole or not at all.

    Bars: smallest and largest ratio of a round, 95 % interval of adherence, one standard deviation of the distance.
    A line joins the rows that no other one beats in both. Axes are logarithmic where values differ a lot.

    Args:
        batch: whose speed; by default the smallest measured.

    Raises:
        InputError: matplotlib is missing, or no row was both timed and judged.
    """
    check_extra("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    batch = report.batches[0] if batch is None and report.batches else batch
    rows = shown_rows(report, batch)
    if not rows or batch is None:
        raise InputError("a plot of quality against speed needs images to be judged; ask for some.")
    kinds = quality_kinds(rows)
    styles = _styles(rows)
    labels = [
        f"{number}  {row.accelerator} {telling_options(row, rows)}".rstrip()
        for number, row in enumerate(rows, start=1)
    ]
    # as wide and high as the legend beside the panels needs
    size = (5 * len(kinds) + 0.6 + 0.062 * max(map(len, labels)), max(5, 1 + 0.17 * len(rows)))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    figure.suptitle(
        f"{report.settings.model}, batch {batch}, {report.settings.images} images\n{report.settings.place}",
        fontsize=9,
    )
    for axes, kind in zip(panels, kinds, strict=True):
        _panel(axes, report, rows, batch, kind, styles)
    keys = [
        Line2D(
            *([], []),
            linestyle="",
            **styles[row.accelerator],
            label=label,
        )
        for label, row in zip(labels, rows, strict=True)
    ]
    figure.legend(handles=keys, loc="outside right upper", fontsize=8, frameon=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # only a drawn figure knows where its points are
    for axes, kind in zip(panels, kinds, strict=True):
        _number(
            canvas.get_renderer(),
            axes,
            [row.speed[batch].speedup for row in rows],
            [quality_value(row, kind) for row in rows],
            [styles[row.accelerator]["color"] for row in rows],
        )
    path = Path(path)
    if path.suffix.lower().removeprefix(".") in canvas.get_supported_filetypes():
        with atomic_path(path) as temporary:
            figure.savefig(temporary)
    else:  # Pillow knows formats that matplotlib does not
        write_image(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Marker and colour of each accelerator: filled if it is lossless."""
    styles: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.accelerator == Plain.name:
            styles[row.accelerator] = {"marker": "*", "color": "#333333", "markersize": 11}
        elif row.accelerator not in styles:
            place = len([name for name in styles if name != Plain.name])
            color = _COLORS[place % len(_COLORS)]
            styles[row.accelerator] = {
                "marker": _MARKERS[place % len(_MARKERS)],
                "color": color,
                "markerfacecolor": color if row.lossless else "white",
                "markersize": 6,
            }
    return styles


def _panel(
    axes: Any,
    report: BenchReport,
    rows: Sequence[Row],
    batch: int,
    kind: str,
    styles: Mapping[str, Mapping[str, Any]],
) -> None:
    """One kind of quality against speed, with plain decoding and true images as lines."""
    for row in rows:
        x, (low, high) = row.speed[batch].speedup, row.speed[batch].speedup_spread
        y, down, up = quality_value(row, kind)
        style = styles[row.accelerator]
        axes.errorbar(
            *(x, y), ([down], [up]), ([x - low], [high - x]), elinewidth=0.7, capsize=2, alpha=0.9, **style
        )
    front = pareto_front(
        [(row.speed[batch].speedup, quality_value(row, kind)[0]) for row in rows], kind == "adherence"
    )
    axes.plot(*zip(*front, strict=True), color="#999999", linewidth=1, alpha=0.7, zorder=1)
    if report.plain in rows:
        axes.axhline(
            quality_value(report.plain, kind)[0], color="#333333", linewidth=0.8, linestyle=":", zorder=0
        )
    truth = report.truth and Row("true", {}, True, {}, report.truth)
    if truth and kind == "distance" and report.truth.distance is None:  # type: ignore[union-attr]
        truth = None
    values = [quality_value(row, kind) for row in rows]
    # a goal of distances is to be seen; that of adherence may be far off
    _scale(axes, [*values, quality_value(truth, kind)] if truth and kind == "distance" else values, kind)
    speeds = [row.speed[batch].speedup for row in rows]
    if max(speeds) > _LOGARITHMIC * min(speeds):
        _logarithmic(axes, "x")
    if truth:
        level, top = quality_value(truth, kind)[0], axes.get_ylim()[1]
        inside = level < top
        if inside:
            axes.axhline(level, color=_TRUTH, linewidth=0.8, linestyle="--", zorder=0)
        axes.annotate(
            f"true images: {level:.3g}{'' if inside else ' (above)'}",
            (1, level if inside else top),
            xycoords=axes.get_yaxis_transform(),
            xytext=(-4, 3 if inside else -12),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=_TRUTH,
        )
    axes.set_xlabel("speed-up over plain decoding (filled: lossless)")
    if kind == "adherence":
        axes.set_ylabel("prompt adherence, % (higher is better)")
    else:
        space = (report.settings.reference or "").split("/")[0]
        axes.set_ylabel(f"Fréchet distance, {space} features (lower is better)")
    axes.grid(alpha=0.25)
    axes.margins(x=0.1)


def _scale(axes: Any, values: Sequence[tuple[float, float, float]], kind: str) -> None:
    """Limits of the axis of quality: from 0, unless that would press all points together at the top.

    Args:
        values: of `_value`.
    """
    lows, highs = ([y - down for y, down, _ in values], [y + up for y, _, up in values])
    low, high = min(lows), max(highs)
    heights = [y for y, *_ in values]
    if kind == "distance" and min(heights) > 0 and max(heights) > 2 * _LOGARITHMIC * min(heights):
        _logarithmic(axes, "y")
        axes.set_ylim(0.8 * max(low, min(heights) / 2), 1.2 * high)
    elif low < high / 3:
        axes.set_ylim(0, 1.1 * high or 1)
    else:
        margin = 0.1 * (high - low) or 1
        axes.set_ylim(low - margin, high + margin)


def _logarithmic(axes: Any, name: str) -> None:
    """Make the axis `name` logarithmic, with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _number(
    renderer: Any,
    axes: Any,
    speeds: Sequence[float],
    values: Sequence[tuple[float, float, float]],
    colors: Sequence[str],
) -> None:
    """Put its number beside every point, where it hides least of the other points, numbers and bars.

    Args:
        values: of `_value`.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    at = axes.transData.transform
    frame = axes.get_window_extent(renderer)
    points = [(x, y) for x, (y, _, _) in zip(speeds, values, strict=True)]
    centres = [at(point) for point in points]
    bars = [
        Bbox([at((x, max(y - down, axes.get_ylim()[0]))), at((x, y + up))])
        for x, (y, down, up) in zip(speeds, values, strict=True)
    ]
    taken: list[Any] = []
    for number, (point, color) in enumerate(zip(points, colors, strict=True), start=1):
        notes = [
            axes.annotate(
                *(str(number), point),
                xytext=place,
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=8,
                color=color,
                path_effects=[withStroke(linewidth=2, foreground="white")],
                zorder=5,
            )
            for place in _LABEL_PLACES
        ]
        costs = []
        for rank, note in enumerate(notes):
            box = note.get_window_extent(renderer)
            around = box.expanded(1.5, 1.3)
            hits = sum(box.overlaps(other) for other in taken) + sum(
                around.contains(*centre) for centre in centres
            )
            crossed = sum(box.overlaps(bar) for bar in bars)
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            costs.append((2 * hits + crossed + 4 * outside, rank))
        best = notes[min(costs)[1]]
        taken.append(best.get_window_extent(renderer))
        for note in notes:
            if note is not best:
                note.remove()
        if hypot(*best.xyann) > _NEAR:
            axes.annotate(
                *("", point),
                xytext=best.xyann,
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 5, "shrinkB": 3},
            )
