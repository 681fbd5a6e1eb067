"""What an accelerator costs in quality, as the last report measured it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from varaccel.app.reports import Found, read_report
from varaccel.app.snippet import DrawRequest
from varaccel.errors import InputError
from varaccel.evaluation.bench.comparison import Quality
from varaccel.evaluation.bench.report import BenchReport, Row


def quality_cost(folders: Sequence[Path], drawn: DrawRequest) -> str:
    """A sentence for the visitor.

    Args:
        folders: reports, newest first; the first that has the model is asked.
    """
    accelerator = drawn.accelerator_object()
    if accelerator.lossless:
        return "Lossless: the images follow the distribution of plain decoding."
    report = _report(folders, drawn.model)
    asked = Row.of(accelerator)
    row = None if report is None else next((row for row in report.rows if row.key == asked.key), None)
    if report is None or row is None or row.quality is None or report.plain.quality is None:
        return (
            "Approximate: the images follow another distribution than plain decoding. The last report has no "
            "measurement of what this setting costs; `varaccel bench` makes one."
        )
    versus = report.against_plain(row)
    assert versus is not None  # both were judged
    told = f"adherence {_percent(row.quality)} where plain decoding has {_percent(report.plain.quality)}"
    told += ", within noise" if versus.same_adherence else ""
    if row.quality.distance is not None and report.plain.quality.distance is not None:
        told += (
            f"; distance to true images {row.quality.distance.value:.1f} where plain decoding has "
            f"{report.plain.quality.distance.value:.1f}"
        )
        told += ", within noise" if versus.same_distance else ""
    prompts = report.settings.images
    return f"Approximate: another distribution than plain decoding's. Measured on {prompts} prompts: {told}."


def _percent(quality: Quality) -> str:
    rate = quality.adherence
    return f"{100 * rate.share:.0f} % ({100 * rate.low:.0f} to {100 * rate.high:.0f})"


def _report(folders: Sequence[Path], model: str) -> BenchReport | None:
    """The first report of a model that can be read."""
    for folder in folders:
        with suppress(InputError):
            return read_report(Found(folder / f"{model}.json", model, None))
    return None
