"""Figures of sets of images with their sampling noise, and differences between two of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import hypot
from typing import Any, Literal


@dataclass(frozen=True)
class Figure:
    """One figure of a set of images.

    Attributes:
        metric: one of fid, sfid, is, kid, precision, recall, clip, adherence.
        title: what it is called in a report; says so if it is no Inception figure.
        value: the figure.
        error: its standard error over the draw of the images; None if it was not estimated.
        better: whether "lower" or "higher" is better.
        details: how it was made, such as the numbers of splits and subsets.
    """

    metric: str
    title: str
    value: float
    error: float | None
    better: Literal["lower", "higher"]
    details: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        noise = "" if self.error is None else f" ± {self.error:.2g}"
        return f"{self.value:.4g}{noise}"


@dataclass(frozen=True)
class Difference:
    """A figure beside that of a baseline.

    Attributes:
        value: figure minus baseline.
        noise: twice the standard error of the difference, as if both were of independent images; None if either
            has no standard error. Images of the same prompts and seeds move together, so it is on the wide side.
        better: whether the figure is the better one.
    """

    value: float
    noise: float | None
    better: bool

    @property
    def within_noise(self) -> bool | None:
        return None if self.noise is None else abs(self.value) <= self.noise

    def __str__(self) -> str:
        if self.noise is None:
            return f"{self.value:+.2g}"
        word = "within noise" if self.within_noise else "better" if self.better else "worse"
        return f"{word} ({self.value:+.2g}, noise {self.noise:.2g})"


def difference(figure: Figure, baseline: Figure) -> Difference:
    """`figure` beside `baseline`, a figure of the same metric."""
    value = figure.value - baseline.value
    noise = None
    if figure.error is not None and baseline.error is not None:
        noise = 2 * hypot(figure.error, baseline.error)
    return Difference(value, noise, value < 0 if figure.better == "lower" else value > 0)
