"""The reports that the page shows: where they are, and reading them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from varaccel.errors import InputError
from varaccel.evaluation.bench.report import BenchReport
from varaccel.shipped import release_report_folder
from varaccel.version import __version__


def report_folders() -> list[Path]:
    """Folders with a report, the newest first: that of `make bench` in the working folder, that of this release."""
    own, release = Path.cwd() / "outputs" / "report", release_report_folder()
    return [*([own] if any(own.glob("*.json")) else []), *([] if release is None else [release])]


@dataclass(frozen=True)
class Found:
    """The report of a model in a folder.

    Attributes:
        path: its JSON; images are beside it.
        title: what the page calls it.
        measured: when, in words; None if unknown.
    """

    path: Path
    title: str
    measured: str | None

    def beside(self, ending: str) -> Path:
        # a model's name may hold a dot, so no suffix is replaced
        return self.path.with_name(self.path.name.removesuffix(".json") + ending)


def found_reports(folders: Sequence[Path]) -> list[Found]:
    """The reports of `folders`, of the first one first; the same file is listed once.

    A title says where its report is from only if there are several of that model.
    """
    release = release_report_folder()
    found: list[tuple[Path, bool]] = []
    seen: set[bytes] = set()
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            content = _bytes(path)
            if content not in seen:
                found.append((path, folder == release))
                seen |= {content} if content else set()
    stems = [path.stem for path, _ in found]
    return [
        Found(
            path,
            path.stem if stems.count(path.stem) == 1 else f"{path.stem} ({_place(path.parent, released)})",
            f"for varaccel {__version__}" if released else _date(path),
        )
        for path, released in found
    ]


def _place(folder: Path, released: bool) -> str:
    """Where a report is from, in words."""
    if released:
        return "this release"
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def _date(path: Path) -> str | None:
    """The day of a file; a report is written when rows are added."""
    try:
        return datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d")
    except OSError:
        return None


def _bytes(path: Path) -> bytes:
    """The content of a file, nothing if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def read_report(found: Found) -> BenchReport:
    """The report in a file.

    Raises:
        InputError: it is gone or damaged.
    """
    try:
        text = found.path.read_text(encoding="utf-8")
        report = BenchReport.from_dict(json.loads(text, parse_constant=_refuse))
    except (OSError, ValueError, RecursionError) as error:  # InputError is a ValueError
        raise InputError(f"{found.path.name} holds no report that can be read: {error}") from error
    if not report.rows:
        raise InputError(f"{found.path.name} holds a report without rows; measure anew with `make bench`.")
    return report


def _refuse(number: str) -> None:
    raise InputError(f"{number} is no measurement")
