"""Infinity's scale schedules against the published table."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.scripts import ROOT
from varaccel.errors import InputError
from varaccel.nn.aspect_schedules import (
    SIZES,
    TEMPLATES,
    infinity_pixels,
    infinity_schedule,
    nearest_ratio,
)

PUBLISHED: dict[str, Any] = json.loads((ROOT / "tests/golden/infinity/schedules.json").read_text())


def test_ratios_stand_in_the_published_order() -> None:
    """Which decides between two that are equally near."""
    assert list(TEMPLATES) == list(PUBLISHED)
    assert all(set(sizes) == set(SIZES) for sizes in PUBLISHED.values())


@pytest.mark.parametrize("ratio", PUBLISHED)
def test_published_numbers(ratio: str) -> None:
    whole = infinity_schedule(ratio, "1M")
    for size, golden in PUBLISHED[ratio].items():
        for given in (ratio, float(ratio)):
            schedule = infinity_schedule(given, size)
            assert [list(grid) for grid in schedule.grids] == golden["scales"]
            assert schedule.num_tokens == golden["tokens"]
            assert schedule.reference == whole.last_grid
            assert list(infinity_pixels(given, size)) == golden["pixel"]
        assert nearest_ratio(*golden["pixel"]) == ratio


@pytest.mark.parametrize(
    ("height", "width", "ratio"),
    [
        (1024, 1024, "1.0"),
        (1920, 1080, "1.75"),
        (1080, 1920, "0.571"),
        (9, 1, "3.0"),
        (1, 9, "0.333"),
        (1.125, 1, "1.0"),  # as near to 1.25, which comes later
        (11.25, 5, "2.0"),  # as near to 2.5
        (0.9, 1, "1.0"),  # as near to 0.8
    ],
)
def test_nearest_ratio(height: float, width: float, ratio: str) -> None:
    assert nearest_ratio(height, width) == ratio


@pytest.mark.parametrize("ratio", [1.1, "16:9", "wide", float("nan"), 0])
def test_unknown_ratio(ratio: str | float) -> None:
    with pytest.raises(InputError, match=r"no Infinity schedule .* choose one of 1\.0, 1\.25.*nearest_ratio"):
        infinity_schedule(ratio)


@pytest.mark.parametrize("size", ["0.6M", "1m", "256"])
def test_unknown_size(size: str) -> None:
    with pytest.raises(InputError, match=r"unknown size of an Infinity image .* known: 0\.06M"):
        infinity_schedule("1.0", size)


@pytest.mark.parametrize(("height", "width"), [(0, 1), (1, -2), (float("inf"), 1), (1, float("nan"))])
def test_no_size_of_an_image(height: float, width: float) -> None:
    with pytest.raises(InputError, match="must be positive numbers"):
        nearest_ratio(height, width)
