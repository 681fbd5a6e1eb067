"""Bench reports as JSON files."""

from __future__ import annotations

import json
from pathlib import Path

from varaccel.errors import InputError
from varaccel.evaluation.bench.report import BenchReport
from varaccel.files import write_text


def earlier_report(path: Path) -> BenchReport | None:
    """The report in a file, None if there is no such file yet.

    Raises:
        InputError: the file holds no report.
    """
    if not path.exists():
        return None
    try:
        return BenchReport.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # InputError is a ValueError
        raise InputError(f"{path} cannot be continued, so leave out --resume: {error}") from error


def write_report(report: BenchReport, path: Path) -> None:
    """Write a report as JSON, whole or not at all."""
    write_text(json.dumps(report.to_dict(), indent=2, default=str) + "\n", path)
