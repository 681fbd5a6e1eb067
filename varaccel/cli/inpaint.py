"""`varaccel inpaint`: a part of an image drawn anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from varaccel.cli.options import Model, Quiet
from varaccel.errors import InputError


def inpaint(
    image: Annotated[Path, typer.Argument(help="Image to change.")],
    mask: Annotated[Path, typer.Argument(help="Image that is white where to paint.")],
    prompt: Annotated[
        str | None, typer.Argument(help="What to paint; whatever fits if left out.", show_default=False)
    ] = None,
    model: Model = "mini-var",
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")] = Path("outputs/inpainted.png"),
    seed: Annotated[int, typer.Option(help="Seed of the first version.")] = 0,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Versions to make.")] = 1,
    guidance_scale: Annotated[
        float | None, typer.Option(help="How strictly to follow the prompt; 1 = off.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Paint a part of an image anew (next-scale models, and those that draw token by token)."""
    from varaccel.cli.sheets import check_sheet, write_sheet
    from varaccel.image_files import check_image_path, read_image
    from varaccel.pipelines.placement import open_pipeline

    check_image_path(out)
    opened = [read_image(path) for path in (image, mask)]
    pipe: Any = open_pipeline(model, quiet=quiet)
    if not hasattr(pipe, "inpaint"):
        raise InputError(
            f"{model} cannot paint into an image; choose a model such as mini-var or mini-llamagen."
        )
    check_sheet(out, count, pipe)
    output = pipe.inpaint(*opened, prompt, seed=seed, num_images=count, guidance_scale=guidance_scale)
    write_sheet(output.images, out)
    typer.echo(f"{out}\n{output.stats}")
