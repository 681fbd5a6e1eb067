"""Images of a bench report: speed against quality, and what the accelerators draw."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from varaccel import Plain
from varaccel.accelerators import Accelerator
from varaccel.engine.statistics import telling
from varaccel.errors import InputError
from varaccel.evaluation.bench.run import BenchReport, Row
from varaccel.evaluation.extra import check_extra
from varaccel.evaluation.speed.call_speed import naming
from varaccel.files import atomic_path
from varaccel.pipelines.acceptance_map import pass_colors
from varaccel.pipelines.output import ImageOutput

# Okabe and Ito's colours, which are told apart without full colour vision
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_TRUTH = "#006644"
_MARGIN = 6
_LEFT = 190
"""Width of what stands beside a row of a sheet, in pixels."""
_LEGEND = 30
"""Height of the legend below a sheet of maps, in pixels."""
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


def _shown(report: BenchReport, batch: int | None) -> list[Row]:
    """The rows that were judged, and timed at this batch."""
    return [row for row in report.rows if row.quality is not None and batch in row.speed]


def _kinds(rows: Sequence[Row]) -> list[Kind]:
    """The kinds of quality that all of these rows have."""
    measured = all(row.quality is not None and row.quality.distance is not None for row in rows)
    return ["adherence", "distance"] if measured else ["adherence"]


def fronts(report: BenchReport, batch: int) -> dict[Kind, list[Row]]:
    """The rows that the lines of `plot` join: by kind of quality those that no other row beats in both it and speed.

    Nothing if no row was both timed at this batch and judged. Noise is not considered.
    """
    rows = _shown(report, batch)
    found: dict[Kind, list[Row]] = {}
    for kind in _kinds(rows) if rows else []:
        points = [(row.speed[batch].speedup, _value(row, kind)[0]) for row in rows]
        front = _front(points, kind == "adherence")
        found[kind] = [row for row, point in zip(rows, points, strict=True) if point in front]
    return found


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
    rows = _shown(report, batch)
    if not rows or batch is None:
        raise InputError("a plot of quality against speed needs images to be judged; ask for some.")
    kinds = _kinds(rows)
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
            [_value(row, kind) for row in rows],
            [styles[row.accelerator]["color"] for row in rows],
        )
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


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


def _value(row: Row, kind: str) -> tuple[float, float, float]:
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
        y, down, up = _value(row, kind)
        style = styles[row.accelerator]
        axes.errorbar(
            *(x, y), ([down], [up]), ([x - low], [high - x]), elinewidth=0.7, capsize=2, alpha=0.9, **style
        )
    front = _front([(row.speed[batch].speedup, _value(row, kind)[0]) for row in rows], kind == "adherence")
    axes.plot(*zip(*front, strict=True), color="#999999", linewidth=1, alpha=0.7, zorder=1)
    if report.plain in rows:
        axes.axhline(_value(report.plain, kind)[0], color="#333333", linewidth=0.8, linestyle=":", zorder=0)
    truth = report.truth and Row("true", {}, True, {}, report.truth)
    if truth and kind == "distance" and report.truth.distance is None:  # type: ignore[union-attr]
        truth = None
    values = [_value(row, kind) for row in rows]
    # a goal of distances is to be seen; that of adherence may be far off
    _scale(axes, [*values, _value(truth, kind)] if truth and kind == "distance" else values, kind)
    speeds = [row.speed[batch].speedup for row in rows]
    if max(speeds) > _LOGARITHMIC * min(speeds):
        _logarithmic(axes, "x")
    if truth:
        level, top = _value(truth, kind)[0], axes.get_ylim()[1]
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


def _front(points: Sequence[tuple[float, float]], more: bool) -> list[tuple[float, float]]:
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


# -- what they draw ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """What accelerators draw of the same prompts and seeds.

    Attributes:
        prompts: of the images, in order.
        outputs: an accelerator and its call of all `prompts`, with PIL images, a pair per accelerator.
    """

    prompts: tuple[str | int, ...]
    outputs: tuple[tuple[Accelerator, ImageOutput], ...]

    def sheet(self, side: int = 160) -> Image.Image:
        """A row of images per accelerator under their prompts.

        Args:
            side: of an image on the sheet in pixels.
        """
        return self._rows(
            [[image.convert("RGB") for image in output.images] for _, output in self.outputs], side
        )

    def maps(self, side: int = 160) -> Image.Image | None:
        """The same images in grey under which pass decided each token, from dark to bright, with a legend.

        None for models whose tokens are not one grid, next-scale ones: there is no such map.

        Args:
            side: of an image on the sheet in pixels.
        """
        if any(output.written.ndim != 3 for _, output in self.outputs):
            return None
        rows = [
            output.acceptance_maps(max(side, *output.written.shape[1:]), overlay=True, legend=False)
            for _, output in self.outputs
        ]
        sheet = self._rows(rows, side, below=_LEGEND)
        small = ImageFont.load_default(12)
        draw = ImageDraw.Draw(sheet)
        middle = sheet.height - _LEGEND // 2
        first, last = "first pass of the call", "last"
        draw.text((_LEFT, middle), first, "black", small, anchor="lm")
        left = _LEFT + round(draw.textlength(first, small)) + _MARGIN
        right = sheet.width - 2 * _MARGIN - round(draw.textlength(last, small))
        draw.text((right + _MARGIN, middle), last, "black", small, anchor="lm")
        # a sheet of one small image has no room for it
        if right > left:
            numbers = np.arange(1, right - left + 1)
            ramp = Image.fromarray(pass_colors(numbers[None], len(numbers)))
            sheet.paste(ramp.resize((len(numbers), 14), Image.Resampling.NEAREST), (left, middle - 7))
        return sheet

    def _rows(self, rows: Sequence[Sequence[Image.Image]], side: int, below: int = 0) -> Image.Image:
        """Rows of images, each beside its accelerator and what it cost, under the prompts.

        Args:
            below: height to be left free below them in pixels.
        """
        small, bold = ImageFont.load_default(12), ImageFont.load_default(15)
        wrapped = [textwrap.wrap(str(prompt), side // 7, break_long_words=True) for prompt in self.prompts]
        top = 2 * _MARGIN + 15 * max(map(len, wrapped))
        step = side + _MARGIN
        sheet = Image.new("RGB", (_LEFT + len(wrapped) * step, top + len(rows) * step + below), "white")
        draw = ImageDraw.Draw(sheet)
        for column, lines in enumerate(wrapped):
            draw.multiline_text((_LEFT + column * step, _MARGIN), "\n".join(lines), "black", small)
        for index, ((accelerator, output), images) in enumerate(zip(self.outputs, rows, strict=True)):
            height = top + index * step
            stats = output.stats
            draw.text((_MARGIN, height), accelerator.name, "black", bold)
            options = [
                line
                for k, v in telling(stats.accelerator, stats.options).items()
                for line in textwrap.wrap(f"{k}={v}", 26)
            ]
            lines = [*options, f"{stats.passes} passes", f"{stats.tokens_per_pass:.2f} tokens per pass"]
            draw.multiline_text((_MARGIN, height + 22), "\n".join(lines), "#444444", small)
            for column, image in enumerate(images):
                shown = image.resize((side, side), Image.Resampling.LANCZOS)
                sheet.paste(shown, (_LEFT + column * step, height))
        return sheet


def draw_samples(
    pipe: Any,
    accelerators: Sequence[Accelerator],
    prompts: Sequence[str | int],
    *,
    seed: int = 0,
    **call: Any,
) -> Samples:
    """What plain decoding and then each accelerator draw of `prompts`, in one call each.

    Args:
        prompts: image i has seed `seed` + i.
        call: further arguments of the pipeline call.

    Raises:
        InputError: no prompts; an accelerator that cannot be used here, by its label.
    """
    if not prompts:
        raise InputError("a sheet of samples needs at least one prompt.")
    outputs = []
    for accelerator in {Row.of(one).key: one for one in (Plain(), *accelerators)}.values():
        with naming(accelerator):
            outputs.append((accelerator, pipe(list(prompts), accelerator=accelerator, seed=seed, **call)))
    return Samples(tuple(prompts), tuple(outputs))


def sample_sheet(
    pipe: Any,
    accelerators: Sequence[Accelerator],
    prompts: Sequence[str | int],
    *,
    seed: int = 0,
    side: int = 160,
    **call: Any,
) -> Image.Image:
    """A row per accelerator, plain decoding first, and a column per prompt, of the same seeds.

    Args:
        prompts: one call per accelerator draws all of them; image i has seed `seed` + i.
        side: of an image on the sheet in pixels.
        call: further arguments of the pipeline call.

    Raises:
        InputError: no prompts; an accelerator that cannot be used here, by its label.
    """
    return draw_samples(pipe, accelerators, prompts, seed=seed, **call).sheet(side)


def acceptance_sheet(
    pipe: Any,
    accelerators: Sequence[Accelerator],
    prompt: str | int,
    *,
    seed: int = 0,
    side: int = 256,
    **call: Any,
) -> Image.Image | None:
    """How each accelerator, plain decoding first, came by its image of `prompt`; see `Samples.maps`.

    Args:
        seed: of the image.
        side: of an image on the sheet in pixels.
        call: further arguments of the pipeline call.

    Raises:
        InputError: an accelerator that cannot be used here, by its label.
    """
    return draw_samples(pipe, accelerators, [prompt], seed=seed, **call).maps(side)
