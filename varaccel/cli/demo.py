"""`varaccel demo`: the same images, plainly and accelerated, on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from varaccel.cli.options import DemoAccelerators, FirstSeed, Model

if TYPE_CHECKING:
    from varaccel.pipelines.output import ImageOutput


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("outputs"),
    model: Model = "mini-llamagen",
    prompt: Annotated[list[str] | None, typer.Option(help="Repeatable; replaces the demo's own.")] = None,
    accelerator: DemoAccelerators = None,
    seed: FirstSeed = 0,
) -> None:
    """Make the same images plainly and accelerated, side by side, one at a time, and say what each cost."""
    from varaccel.accelerators.notation import parse_grid
    from varaccel.accelerators.plain import Plain
    from varaccel.cli.sheets import comparison_sheet
    from varaccel.evaluation.bench.grids import demo_grid, demo_prompts
    from varaccel.image_files import check_image_path, write_image
    from varaccel.pipelines.placement import open_pipeline

    sheet = out / "side-by-side.png"
    check_image_path(sheet)
    typed = None if accelerator is None else parse_grid(accelerator)
    pipe: Any = open_pipeline(model)
    accelerators = [Plain(), *(parse_grid(demo_grid(pipe)) if typed is None else typed)]
    prompts = prompt or demo_prompts(pipe)
    pipe.check_prompts(prompts)
    rows = [[pipe(p, seed=seed + i, accelerator=one) for i, p in enumerate(prompts)] for one in accelerators]
    labels = costs(rows)
    write_image(comparison_sheet(prompts, [[o.images[0] for o in row] for row in rows], labels), sheet)
    typer.echo("\n".join([f"\nwrote {sheet}", *(f"  {label}" for label in labels)]))


def costs(rows: Sequence[Sequence[ImageOutput]]) -> list[str]:
    """What the images of each row cost on average; speeds are ratios to the first row.

    The first call of a kind pays for allocations, so its seconds do not count where there are others.
    """
    labels = []
    for row in rows:
        seconds, plain = (fmean(o.stats.seconds["tokens"] for o in r[1:] or r) for r in (row, rows[0]))
        stats = row[0].stats
        passes = fmean(o.stats.passes for o in row)
        quality = "lossless" if stats.lossless else "approximate"
        labels.append(
            f"{stats.label}, {quality}: {passes:.0f} passes, {stats.tokens / passes:.1f} tokens per pass, "
            f"{seconds:.2f} s per image, {plain / seconds:.2f}x plain"
        )
    return labels
