"""`varaccel models`: what can be named on a command line."""

from __future__ import annotations

import dataclasses


def models() -> None:
    """List models and accelerators."""
    from rich.console import Console
    from rich.table import Table

    from varaccel.accelerators import ACCELERATORS
    from varaccel.pipelines.catalog import PUBLISHED
    from varaccel.shipped import shipped_models

    console = Console()
    table = Table("model", "what it is", title="Models")
    for name, folder in shipped_models().items():
        table.add_row(name, f"ships with varaccel ({folder})")
    for name, entry in PUBLISHED.items():
        table.add_row(name, f"downloaded from {entry.repository}: {entry.weights}, {entry.tokenizer}")
    console.print(table)
    table = Table("accelerator", "options", "quality", "what it does", title="Accelerators")
    for name, cls in ACCELERATORS.items():
        options = ", ".join(f"{f.name}={f.default!r}" for f in dataclasses.fields(cls))
        table.add_row(name, options or "-", "lossless" if cls().lossless else "approximate", cls.summary)
    console.print(table)
