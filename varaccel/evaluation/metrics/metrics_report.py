"""Figures of one or several sets of images, beside each other and beside what was published."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from varaccel.accelerators.notation import parse_accelerator
from varaccel.evaluation.metrics.feature_spaces import STANDARD_SPACE
from varaccel.evaluation.metrics.figures import Difference, Figure, difference
from varaccel.evaluation.metrics.set_metrics import SetReport
from varaccel.evaluation.sampling.presets import Preset

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class MetricsReport:
    """Sets of images measured alike; the first one is the baseline of the others.

    Attributes:
        sets: what was measured.
        space: label of the feature space.
        reference: see `Reference.describe`; None if nothing was compared.
        preset: the protocol, if one was followed.
        versions: of the software.
    """

    sets: tuple[SetReport, ...]
    space: str
    reference: dict[str, Any] | None = None
    preset: Preset | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def against_baseline(self, report: SetReport, figure: Figure) -> Difference | None:
        """A figure beside that of the first set; None for that one itself."""
        baseline = self.sets[0].figure(figure.metric)
        if report is self.sets[0] or baseline is None:
            return None
        return difference(figure, baseline)

    def against_published(self, figure: Figure) -> tuple[float, Difference] | None:
        """The published figure and ours beside it; None if none is known, or if ours is of other features."""
        if self.preset is None or figure.metric not in self.preset.published or self.space != STANDARD_SPACE:
            return None
        value = self.preset.published[figure.metric]
        published = Figure(figure.metric, figure.title, value, 0.0, figure.better)
        return value, difference(figure, published)

    @property
    def departures(self) -> list[str]:
        """In what the images of the first set were not drawn as the protocol says."""
        run = self.sets[0].run
        if self.preset is None or run is None:
            return []
        accelerator = parse_accelerator(self.preset.accelerator)
        protocol = {
            **{
                name: getattr(self.preset, name)
                for name in ("model", "count", "image_size", "rounding", "dtype")
            },
            "source": self.preset.prompts,
            "accelerator": accelerator.name,
            "options": accelerator.options(),
        }
        wanted = {**{name: (run[name], value) for name, value in protocol.items()}}
        wanted |= {name: (run["call"].get(name), value) for name, value in self.preset.call.items()}
        # what came through a file has lists where there were tuples
        return [
            f"{name} {found!r} instead of {value!r}"
            for name, (found, value) in wanted.items()
            if json.dumps(found, default=str) != json.dumps(value, default=str)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; comparisons follow from the rest and are repeated for readers."""
        sets = []
        for report in self.sets:
            values = report.to_dict()
            for shown, figure in zip(values["figures"], report.figures, strict=True):
                beside = self.against_baseline(report, figure)
                published = self.against_published(figure)
                shown["against_first"] = beside and asdict(beside) | {"within_noise": beside.within_noise}
                shown["published"] = published and published[0]
            sets.append(values)
        return {
            "space": self.space,
            "reference": self.reference,
            "preset": self.preset and asdict(self.preset),
            "departures": self.departures,
            "versions": self.versions,
            "sets": sets,
        }

    def table(self) -> Group:
        """For a terminal: a table per set, what is compared with what, and what a reader has to know."""
        from rich.console import Group
        from rich.table import Table

        parts: list[Any] = []
        for report in self.sets:
            columns = ["figure", "measured ± standard error"]
            if self.preset is not None and self.preset.published:
                columns += ["published", "difference"]
            if report is not self.sets[0]:
                columns.append(f"against {self.sets[0].images}")
            table = Table(*columns, title=f"{report.images}: {report.count} images")
            for figure in report.figures:
                table.add_row(*self._cells(report, figure))
            parts.append(table)
        parts += [*self._sources(), *dict.fromkeys(note for report in self.sets for note in report.notes)]
        return Group(*parts)

    def _cells(self, report: SetReport, figure: Figure) -> list[str]:
        cells = [figure.title, str(figure)]
        if self.preset is not None and self.preset.published:
            published = self.against_published(figure)
            cells += ["-", "-"] if published is None else [f"{published[0]:g}", str(published[1])]
        if report is not self.sets[0]:
            beside = self.against_baseline(report, figure)
            cells.append("-" if beside is None else str(beside))
        return cells

    def _sources(self) -> Sequence[str]:
        lines = [f"Features: {self.space}."]
        if self.reference is not None:
            lines.append(
                f"Reference: {self.reference['name']}, {self.reference['images']} images, fingerprint "
                f"{self.reference['fingerprint']}."
            )
        if self.preset is not None:
            lines.append(f"Protocol: {'; '.join([self.preset.source, *self.preset.notes])}.")
        if self.departures:
            lines.append(f"Departs from the protocol: {'; '.join(self.departures)}.")
        return lines
