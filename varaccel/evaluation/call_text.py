"""Accelerators with their telling options as cells of tables show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from varaccel.engine.statistics import telling


def call_lines(accelerator: str, options: Mapping[str, Any]) -> str:
    """An accelerator and its telling options, one a line."""
    return "\n".join([accelerator, *(f"{k}={v}" for k, v in telling(accelerator, options).items())])


def broken_call(call: str, width: int) -> str:
    """A call whose options go on in a new line if they are wider."""
    return "\n".join(
        line if len(line) <= width else line.replace("=", "=\n  ", 1) for line in call.split("\n")
    )


def quality_label(lossless: bool) -> str:
    """What tables, commands and pages call an accelerator that keeps the distribution of plain decoding or does not."""
    return "lossless" if lossless else "approximate"
