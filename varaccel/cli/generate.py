"""`varaccel generate`: images from prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from varaccel.cli.options import (
    AcceleratorName,
    AcceleratorOptions,
    GuidanceScale,
    HeadSteps,
    Model,
    NumIterations,
    Processes,
    Quiet,
    Temperature,
    TopK,
    TopP,
)


def generate(
    prompt: Annotated[list[str], typer.Argument(help="What to draw; several prompts make several images.")],
    model: Model = "mini-llamagen",
    out: Annotated[Path, typer.Option(help="Where the image, or the grid of several, goes.")] = Path(
        "image.png"
    ),
    seed: Annotated[int, typer.Option(help="Image i uses seed + i.")] = 0,
    count: Annotated[int, typer.Option("-n", "--count", help="Images of each prompt.")] = 1,
    batch_size: Annotated[
        int | None, typer.Option(help="Images decoded at once, which bounds memory; all by default.")
    ] = None,
    guidance_scale: GuidanceScale = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    num_iterations: NumIterations = None,
    head_steps: HeadSteps = None,
    accelerator: AcceleratorName = "plain",
    option: AcceleratorOptions = None,
    separate: Annotated[
        bool, typer.Option("--separate", help="Also write every image by itself: NAME-0.png, ...")
    ] = False,
    passes_map: Annotated[
        bool, typer.Option("--map", help="Also write which pass wrote each token: NAME-map-0.png, ...")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what it cost as JSON, and no progress bars.")
    ] = False,
    tp: Processes = None,
    quiet: Quiet = False,
) -> None:
    """Make images from prompts."""
    from varaccel.accelerators import make_accelerator
    from varaccel.cli.sheets import check_sheet
    from varaccel.engine.option_text import parse_options
    from varaccel.files import check_writable, numbered
    from varaccel.image_files import check_image_path
    from varaccel.nn.processes import is_first_process, leave_processes
    from varaccel.pipelines.call_options import call_options
    from varaccel.pipelines.placement import open_pipeline

    chosen = make_accelerator(accelerator, parse_options(option or []))
    speaks = is_first_process()
    if speaks:
        check_image_path(out)
        last = len(prompt) * count - 1
        # the longest of the names, which may be too long where that of the sheet is not
        check_writable(*(numbered(name, last) for name in further_names(out, separate, passes_map)))
    split: dict[str, Any] = {} if tp is None else {"tp_size": tp}
    pipe: Any = open_pipeline(model, quiet=quiet or as_json or not speaks, **split)
    check_sheet(out, len(prompt) * count, pipe)
    call = call_options(
        pipe,
        model,
        batch_size=batch_size,
        guidance_scale=guidance_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        num_iterations=num_iterations,
        head_steps=head_steps,
    )
    output = pipe(prompt, seed=seed, num_images_per_prompt=count, accelerator=chosen, **call)
    leave_processes()
    if not speaks:
        return
    write_output(output, out, separate=separate, passes_map=passes_map)
    if as_json:
        typer.echo(json.dumps(output.stats.to_dict() | {"out": str(out), "seed": seed}))
    else:
        typer.echo(f"{out}\n{output.stats}")


def write_output(output: Any, out: Path, *, separate: bool, passes_map: bool) -> None:
    """Write the images of a call as one sheet, and each image and map of passes by itself where asked for."""
    from varaccel.cli.sheets import write_sheet
    from varaccel.files import numbered
    from varaccel.image_files import write_image

    write_sheet(output.images, out)
    if separate:
        for index, image in enumerate(output.images):
            write_image(image, numbered(out, index))
    if passes_map:
        for index, passes in enumerate(output.acceptance_maps()):
            write_image(passes, numbered(map_name(out), index))


def map_name(out: Path) -> Path:
    """What numbers are added to, for the maps of passes."""
    return out.with_stem(f"{out.stem}-map")


def further_names(out: Path, separate: bool, passes_map: bool) -> list[Path]:
    """What numbers are added to, for all files beside the sheet."""
    return [*([out] if separate else []), *([map_name(out)] if passes_map else [])]
