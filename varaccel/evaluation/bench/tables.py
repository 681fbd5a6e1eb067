"""Tables of a bench report, for a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from varaccel.evaluation.bench.comparison import Comparison
from varaccel.evaluation.bench.report import BenchReport, Row
from varaccel.evaluation.call_text import broken_call, call_lines, quality_label
from varaccel.evaluation.speed.call_speed import Measurement

if TYPE_CHECKING:
    from rich.console import Group

_NARROW = 18
"""Letters of an accelerator's options in a line where there are many columns."""


# -- speed ---------------------------------------------------------------------------------------------


def speed_header(report: BenchReport) -> list[str]:
    """Titles of the columns of `speed_cells`."""
    header = ["accelerator", "quality", "passes", "tokens per pass", "seconds", "speed-up (spread)"]
    header += [title for title, _ in _drafting(report)]
    return [*header, "cache (MB)"] if _shows_cache(report) else header


def speed_cells(report: BenchReport, batch: int) -> list[list[str]]:
    """A line per row that was measured on this batch, under `speed_header`; the first cell may have lines."""
    lines = []
    for row in report.rows:
        if batch not in row.speed:
            continue
        one = row.speed[batch]
        low, high = one.speedup_spread
        spread = "" if row is report.plain else f" ({low:.2f} to {high:.2f})"
        lines.append(
            [
                *(_call(row), quality_label(row.lossless), f"{one.passes:.4g}", f"{one.tokens_per_pass:.2f}"),
                *(f"{one.median_seconds:.3f}", f"{one.speedup:.2f}x{spread}"),
                *(_drafted(one, key) for _, key in _drafting(report)),
                *([f"{one.cache_bytes / 1e6:.3g}"] if _shows_cache(report) else []),
            ]
        )
    return lines


def _shows_cache(report: BenchReport) -> bool:
    """Whether any row hands over between networks: then memory is part of what is traded."""
    return any("stages" in one.details for row in report.rows for one in row.speed.values())


def _drafting(report: BenchReport) -> list[tuple[str, str]]:
    """Columns of what drafts cost and how many were kept: title and key, where any row has something there."""
    told = {key for row in report.rows for one in row.speed.values() for key in one.details}
    columns = (("drafter passes", "draft_passes"), ("kept", "kept"))
    return [(title, key) for title, key in columns if key in told]


# -- quality -------------------------------------------------------------------------------------------


def quality_header(report: BenchReport) -> list[str]:
    """Titles of the columns of `quality_cells`."""
    header = ["accelerator", "adherence (95 %)", "against plain"]
    return header if report.settings.reference is None else [*header, "distance (sd)", "against plain"]


def quality_cells(report: BenchReport) -> list[list[str]]:
    """A line per judged row, then one of the true images if they were judged, under `quality_header`."""
    judged = [(_call(row), row.quality, report.against_plain(row)) for row in report.rows]
    columns = len(quality_header(report))
    lines = []
    for call, quality, versus in [*judged, ("true images", report.truth, None)]:
        if quality is None:
            continue
        rate = quality.adherence
        cells = [call, f"{100 * rate.share:.0f} % ({100 * rate.low:.0f} to {100 * rate.high:.0f})"]
        cells.append("-" if versus is None else _adherence_verdict(versus))
        if quality.distance is not None:
            cells.append(f"{quality.distance.value:.3g} ({quality.distance.spread.std:.2g})")
            cells.append("-" if versus is None else _distance_verdict(versus))
        lines.append(cells + ["-"] * (columns - len(cells)))
    return lines


def quality_notes(report: BenchReport) -> list[str]:
    """What the columns of quality mean."""
    settings = report.settings
    notes = [
        f"Adherence: share of {settings.images} images that show all of their captions; +a -b: prompts "
        "that only the accelerator, or only plain decoding, shows correctly, and p of the exact sign test."
    ]
    if settings.reference is not None:
        notes.append(
            f"Distance: Fréchet distance in the feature space {settings.reference}; not FID, and comparable "
            "at the same number of images only; sd by bootstrap, noise is twice that of the difference."
        )
    return notes


# -- all of it -----------------------------------------------------------------------------------------


def bench_table(report: BenchReport) -> Group:
    """Tables for a terminal of 80 columns: speed by batch size, then quality."""
    from rich import box
    from rich.console import Group
    from rich.table import Column, Table

    settings = report.settings
    # as wide as the longest word, so that nothing is cut
    longest = max(len(line) for row in report.rows for line in _call(row).split("\n"))
    widths = {"passes": 6, "tokens per pass": 6, "seconds": 7, "accelerator": max(13, min(longest, 24))}
    timed = dict(widths)
    tight: dict[str, Any] = {}
    if _drafting(report) or _shows_cache(
        report
    ):  # more columns take their room from lines, margins and names
        timed |= {"accelerator": min(widths["accelerator"], _NARROW), "quality": 11}
        timed |= {"drafter passes": 7, "kept": 5}
        tight = {"box": box.SIMPLE_HEAD, "padding": 0, "pad_edge": False}
    parts: list[Any] = []
    for batch in report.batches:
        table = Table(
            *(Column(name, width=timed.get(name)) for name in speed_header(report)),
            title=f"{settings.model}, batch {batch}, {settings.repeats} rounds\n{settings.place}",
            **tight,
        )
        for call, *cells in speed_cells(report, batch):
            table.add_row(broken_call(call, timed["accelerator"]), *cells)
        parts.append(table)
    if lines := quality_cells(report):
        header = [Column(name, width=widths.get(name)) for name in quality_header(report)]
        table = Table(*header, title=f"quality of {settings.images} images")
        for cells in lines:
            table.add_row(*cells)
        parts += [table, *quality_notes(report)]
    return Group(*parts)


def bench_markdown(report: BenchReport) -> str:
    """The same tables in Markdown."""
    settings = report.settings
    parts = []
    for batch in report.batches:
        title = f"Batch {batch}, median of {settings.repeats} rounds, {settings.place}:"
        parts += [title, _markdown(speed_header(report), speed_cells(report, batch), left=2)]
    if lines := quality_cells(report):
        parts += [_markdown(quality_header(report), lines, left=1), *quality_notes(report)]
    return "\n\n".join(parts) + "\n"


# -- cells ---------------------------------------------------------------------------------------------


def _call(row: Row) -> str:
    return call_lines(row.accelerator, row.options)


def _drafted(measured: Measurement, key: str) -> str:
    """The mean of `draft_passes` or `kept` over all rounds (and images) of a measurement."""
    told = measured.details.get(key, [])
    if key == "kept":
        shares = [share for images in told for share in images]
        return f"{100 * fmean(shares):.0f} %" if shares else "-"
    return f"{fmean(told):.4g}" if told else "-"


def _adherence_verdict(versus: Comparison) -> str:
    word = "within noise" if versus.same_adherence else "better" if versus.gained > versus.lost else "worse"
    return f"{word} (+{versus.gained} -{versus.lost}, p {_probability(versus.p)})"


def _probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


def _distance_verdict(versus: Comparison) -> str:
    if versus.distance is None:
        return "-"
    word = "within noise" if versus.same_distance else "closer" if versus.distance < 0 else "further"
    return f"{word} ({versus.distance:+.2g}, noise {versus.distance_noise:.2g})"


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    """A table whose first `left` columns are aligned to the left, the others to the right."""

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(_one_line(cell).replace('|', chr(92) + '|') for cell in cells)} |"

    rule = "|" + "|".join("---" if index < left else "---:" for index in range(len(header))) + "|"
    return "\n".join([line(header), rule, *(line(cells) for cells in lines)])


def _one_line(cell: str) -> str:
    first, *rest = cell.split("\n")
    return f"{first} {', '.join(rest)}".strip()
