"""The command line: `varaccel generate`, `inpaint`, `models`, `demo`, `app`, `bench` and `train`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from varaccel.cli.train import train_app
from varaccel.errors import InputError, VaraccelError

if TYPE_CHECKING:
    from PIL import Image

    from varaccel.evaluation.bench.run import BenchReport
    from varaccel.pipelines.loading import LoadablePipeline
    from varaccel.pipelines.output import ImageOutput

app = typer.Typer(
    help="Fast decoding for visual autoregressive image models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

app.add_typer(train_app, name="train")

Model = Annotated[str, typer.Option(help="Shipped or published model, folder or hub id (see `models`).")]


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """`key=value` pairs as typed on a command line; values are JSON where they parse, else strings."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"an option is written key=value, got {pair!r}.")
        try:
            options[key] = json.loads(value)
        except ValueError:  # also a number of more digits than Python reads
            options[key] = value
    return options


def check_image_path(path: Path) -> None:
    """Refuse, before any work is done, a path that no image can be written to."""
    from PIL import Image

    known = Image.registered_extensions()
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it, such as {path / 'image.png'}.")
    if known.get(path.suffix.lower()) not in Image.SAVE:
        raise InputError(f"{path} must end with the name of an image format, such as .png, .jpg or .webp.")


def given(**options: Any) -> dict[str, Any]:
    """The options that were typed; the others are the model's own."""
    return {name: value for name, value in options.items() if value is not None}


def write_sheet(images: list[Image.Image], path: Path) -> None:
    """Write one image as it is, several on one sheet."""
    from varaccel.pipelines.pixels import grid

    write_image(images[0] if len(images) == 1 else grid(images), path)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars while a model is downloaded and loaded."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    switches = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for switch in switches:
        switch.disable_progress_bar()
    try:
        yield
    finally:
        for switch in switches:
            switch.enable_progress_bar()


NumIterations = Annotated[
    int | None,
    typer.Option(min=1, help="Passes that decide the tokens (MAR).", show_default="the model's own"),
]
Device = Annotated[str, typer.Option(help="Where to run: cpu or cuda.")]
Precision = Annotated[
    str, typer.Option(help="Precision of the networks that decide tokens: float32 or bfloat16.")
]
HeadSteps = Annotated[
    int | None,
    typer.Option(min=1, help="Denoising steps of a token (MAR).", show_default="the model's own"),
]


def call_options(pipe: Any, model: str, **options: Any) -> dict[str, Any]:
    """Those options of a call that were typed.

    Raises:
        InputError: an option that models of this family do not have.
    """
    import inspect

    known = inspect.signature(type(pipe).__call__).parameters
    chosen = given(**options)
    for name in chosen:
        if name not in known:
            raise InputError(f"{model} has no --{name.replace('_', '-')} to choose; leave that option out.")
    return chosen


def check_place(device: str, dtype: str) -> None:
    """Refuse, before a model is loaded, a device or precision that it cannot run in.

    Raises:
        InputError: other than what `move` knows; there is no GPU.
    """
    import torch

    from varaccel.errors import unknown_name

    if device not in (devices := ("cpu", "cuda")):
        raise unknown_name("device", device, devices)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no GPU that torch can use; leave --device cuda out.")
    if dtype not in (precisions := ("float32", "bfloat16")):
        raise unknown_name("precision", dtype, precisions)


def move(pipe: Any, device: str, dtype: str) -> None:
    """Put all of a pipeline on a device, and the networks that decide tokens into another precision.

    Args:
        device: "cpu" or "cuda".
        dtype: "float32" or "bfloat16"; image tokenizer and text encoder stay as they are, as with published models.
    """
    import torch
    from torch import nn

    from varaccel.nn.precision import cast

    pipe.to(device)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name not in ("vae", "vq_model", "text_encoder"):
            cast(part, getattr(torch, dtype))


def load_pipeline(model: str, *, quiet: bool = False) -> LoadablePipeline:
    """A model by name; with `quiet` neither loading nor drawing shows a progress bar."""
    from varaccel.pipelines.auto import AutoPipeline

    if quiet:
        with quiet_loading():
            pipe = AutoPipeline.from_pretrained(model)
    else:
        pipe = AutoPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=quiet, leave=False)
    return pipe


def write_text(text: str, path: Path) -> None:
    """Write a text file whole or not at all."""
    from varaccel.files import atomic_path

    try:
        with atomic_path(path) as temporary:
            temporary.write_text(text)
    except OSError as error:
        raise InputError(f"nothing could be written to {path}: {error}") from error


def write_image(image: Image.Image, path: Path) -> None:
    """Write an image whole or not at all."""
    from varaccel.files import atomic_path

    try:
        with atomic_path(path) as temporary:
            image.save(temporary)
    except (OSError, ValueError) as error:
        raise InputError(f"the image could not be written to {path}: {error}") from error


def numbered(path: Path, index: int) -> Path:
    return path.with_name(f"{path.stem}-{index}{path.suffix}")


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Argument(help="What to draw; several prompts make several images.")],
    model: Model = "mini-llamagen",
    out: Annotated[Path, typer.Option(help="Where the image, or the grid of several, goes.")] = Path(
        "image.png"
    ),
    seed: Annotated[int, typer.Option(help="Image i uses seed + i.")] = 0,
    count: Annotated[int, typer.Option("-n", "--count", help="Images of each prompt.")] = 1,
    guidance_scale: Annotated[
        float | None, typer.Option(help="How strictly to follow the prompt; 1 = off.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the most likely token.", show_default="the model's own")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most likely tokens; 0 = all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep the most likely tokens up to this mass; 1 = all.")
    ] = None,
    num_iterations: NumIterations = None,
    head_steps: HeadSteps = None,
    accelerator: Annotated[str, typer.Option("-a", "--accelerator", help="See `models`.")] = "plain",
    option: Annotated[
        list[str] | None, typer.Option("-o", "--option", help="Accelerator option key=value; repeatable.")
    ] = None,
    separate: Annotated[
        bool, typer.Option("--separate", help="Also write every image by itself: NAME-0.png, ...")
    ] = False,
    passes_map: Annotated[
        bool, typer.Option("--map", help="Also write which pass wrote each token: NAME-map-0.png, ...")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what it cost as JSON, and no progress bars.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Make images from prompts."""
    from varaccel.accelerators import make_accelerator

    chosen = make_accelerator(accelerator, parse_options(option or []))
    check_image_path(out)
    pipe: Any = load_pipeline(model, quiet=quiet or as_json)
    output = pipe(
        prompt,
        seed=seed,
        num_images_per_prompt=count,
        accelerator=chosen,
        **call_options(
            pipe,
            model,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            num_iterations=num_iterations,
            head_steps=head_steps,
        ),
    )
    images = output.images
    write_sheet(images, out)
    if separate:
        for index, image in enumerate(images):
            write_image(image, numbered(out, index))
    if passes_map:
        for index, passes in enumerate(output.acceptance_maps()):
            write_image(passes, numbered(out.with_stem(f"{out.stem}-map"), index))
    if as_json:
        typer.echo(json.dumps(output.stats.to_dict() | {"out": str(out), "seed": seed}))
    else:
        typer.echo(f"{out}\n{output.stats}")


@app.command()
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
        float | None, typer.Option(help="How strictly to follow the prompt; 0 = off.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Paint a part of an image anew (next-scale models)."""
    check_image_path(out)
    opened = [_read_image(path) for path in (image, mask)]
    pipe: Any = load_pipeline(model, quiet=quiet)
    if not hasattr(pipe, "inpaint"):
        raise InputError(f"{model} cannot paint into an image; choose a next-scale model such as mini-var.")
    output = pipe.inpaint(*opened, prompt, seed=seed, num_images=count, guidance_scale=guidance_scale)
    write_sheet(output.images, out)
    typer.echo(f"{out}\n{output.stats}")


def _read_image(path: Path) -> Image.Image:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.copy()
    except OSError as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from error


@app.command()
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
    table = Table("accelerator", "options", "distribution", "what it does", title="Accelerators")
    for name, cls in ACCELERATORS.items():
        options = ", ".join(f"{f.name}={f.default!r}" for f in dataclasses.fields(cls))
        table.add_row(name, options or "-", "lossless" if cls().lossless else "approximate", cls.summary)
    console.print(table)


DEMO_PROMPTS = (
    "a large yellow cone on a wooden floor at night",
    "a green cube on a checkered floor",
    "a large purple ball at sunset",
    "a red cylinder left of a blue cube in daylight",
)


def examples(pipe: LoadablePipeline, descriptions: Sequence[str]) -> list[str]:
    """The descriptions, or as many class names for a model that draws classes."""
    names = pipe.config.get("class_names")
    if names is None:
        return list(descriptions)
    return [names[i % len(names)].split(",")[0] for i in range(len(descriptions))]


DEMO_ACCELERATORS = {
    "llamagen": ("jacobi", "lantern:k=20,delta=0.4,tree=8", "zipar:window=8"),
    "var": ("code:draft_scales=5", "code:draft_scales=4"),
    "mar": ("fewer_steps:iterations=32", "fewer_steps:iterations=32,head_steps=20,head_sampler=dpm++"),
}
"""What the demo shows beside plain decoding of a family, as typed on a command line."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("outputs"),
    model: Model = "mini-llamagen",
    prompt: Annotated[list[str] | None, typer.Option(help="Repeatable; replaces the demo's own.")] = None,
    accelerator: Annotated[
        list[str] | None,
        typer.Option(
            *("-a", "--accelerator"),
            metavar="NAME:KEY=VALUE,...",
            help="What to show beside plain decoding; repeatable.",
            show_default="; ".join(" ".join(shown) for shown in DEMO_ACCELERATORS.values()),
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image.")] = 0,
) -> None:
    """Make the same images plainly and accelerated, side by side, one at a time, and say what each cost."""
    from varaccel.accelerators.plain import Plain
    from varaccel.evaluation.bench.run import parse_grid

    typed = None if accelerator is None else parse_grid(accelerator)
    pipe: Any = load_pipeline(model)
    accelerators = [Plain(), *(parse_grid(DEMO_ACCELERATORS[pipe.family]) if typed is None else typed)]
    prompts = list(prompt or examples(pipe, DEMO_PROMPTS))
    rows = []
    for chosen in accelerators:
        pipe(prompts[0], seed=seed, accelerator=chosen)  # warm-up: the first call pays for allocations
        rows.append([pipe(p, seed=seed + i, accelerator=chosen) for i, p in enumerate(prompts)])
    labels = _costs(rows)
    sheet = out / "side-by-side.png"
    write_image(_comparison(prompts, [[o.images[0] for o in row] for row in rows], labels), sheet)
    typer.echo("\n".join([f"\nwrote {sheet}", *(f"  {label}" for label in labels)]))


def _costs(rows: Sequence[Sequence[ImageOutput]]) -> list[str]:
    """What the images of each row cost on average; speeds are ratios to the first row."""
    from statistics import fmean

    labels = []
    for row in rows:
        seconds, plain = (fmean(o.stats.seconds["tokens"] for o in r) for r in (row, rows[0]))
        stats = row[0].stats
        passes = fmean(o.stats.passes for o in row)
        distribution = "lossless" if stats.lossless else "approximate"
        labels.append(
            f"{stats.label}, {distribution}: {passes:.0f} passes, {stats.tokens / passes:.1f} tokens per pass, "
            f"{seconds:.2f} s per image, {plain / seconds:.2f}x plain"
        )
    return labels


@app.command(name="app")
def serve_app(
    model: Annotated[
        list[str] | None,
        typer.Option(help="What visitors may choose; repeatable.", show_default="the shipped models"),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Offer published models too; choosing one downloads it.")
    ] = False,
    any_model: Annotated[
        bool, typer.Option("--any-model", help="Let visitors type folders and hub ids.")
    ] = False,
    device: Device = "cpu",
    dtype: Precision = "float32",
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Calls under way at a time.", show_default="what fits into memory, up to 4"),
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds that a call may take.")] = 300.0,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1: this machine alone")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on.", show_default="the first free one from 7860")
    ] = None,
) -> None:
    """Open the demo in the browser: plain and accelerated side by side."""
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise InputError("the page needs gradio; install it with `pip install varaccel[app]`.")
    from varaccel.app.page import PageSettings, run

    run(
        PageSettings(
            tuple(model or ()), published, any_model, device, dtype, concurrency, time_limit, host, port
        )
    )


@app.command()
def bench(
    model: Model = "mini-llamagen",
    accelerator: Annotated[
        list[str] | None,
        typer.Option(
            *("-a", "--accelerator"),
            metavar="NAME:KEY=VALUE,...",
            help="What to compare with plain decoding; repeatable.",
            show_default="a grid over all accelerators",
        ),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images per timed call; repeatable.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
    images: Annotated[
        int, typer.Option(min=0, help="Images per accelerator to judge quality; 0 = none.")
    ] = 100,
    scenes: Annotated[
        int, typer.Option(min=0, help="True images to measure the distance from; 0 = no distance.")
    ] = 1000,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Guidance of every call.", show_default="the model's own")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Temperature of every call.", show_default="the model's own")
    ] = None,
    num_iterations: NumIterations = None,
    head_steps: HeadSteps = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image.")] = 0,
    device: Device = "cpu",
    dtype: Precision = "float32",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the networks; the first calls then take minutes.")
    ] = False,
    drawn_together: Annotated[
        int,
        typer.Option(min=1, help="Images per call where quality is judged; a GPU is quicker with more."),
    ] = 10,
    out: Annotated[
        Path | None, typer.Option(help="Also write everything as JSON here, from the first rows on.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what --out holds of the same settings.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Image of speed against quality (needs matplotlib).")
    ] = None,
    samples: Annotated[Path | None, typer.Option(help="Image of what each accelerator draws.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
) -> None:
    """Speed, passes and quality of accelerators, against plain decoding in the same run."""
    from rich.console import Console

    from varaccel.evaluation.bench import figures as figures
    from varaccel.evaluation.bench import run as measuring
    from varaccel.evaluation.bench.held_out import bench_held_out, held_out_examples
    from varaccel.evaluation.extra import check_extra

    if out is not None:
        check_writable(out)
    if resume and out is None:
        raise InputError("--resume continues the report of --out; name that file.")
    if plot is not None:
        check_image_path(plot)
        check_writable(plot)
        check_extra("matplotlib")
        if not images:
            raise InputError("--plot shows quality, so it needs images to be judged; raise --images.")
    if samples is not None:
        check_image_path(samples)
        check_writable(samples)
    typed = None if accelerator is None else measuring.parse_grid(accelerator)
    finished = earlier_report(out) if resume and out is not None else None
    check_place(device, dtype)
    pipe: Any = load_pipeline(model)
    call = call_options(
        pipe,
        model,
        guidance_scale=guidance_scale,
        temperature=temperature,
        num_iterations=num_iterations,
        head_steps=head_steps,
    )
    move(pipe, device, dtype)
    if compiled:
        pipe.compile()
    grid = (
        measuring.parse_grid(measuring.default_grid(pipe, smaller_model(model))) if typed is None else typed
    )
    pipe.set_progress_bar_config(disable=True)
    report = bench_held_out(
        pipe,
        grid,
        model=model,
        images=images,
        scenes=scenes,
        batches=batch or [1],
        repeats=repeats,
        seed=seed,
        compiled=compiled,
        drawn_together=drawn_together,
        finished=finished,
        on_rows=None if out is None else lambda rows: write_report(rows, out),
        **call,
    )
    if markdown:
        typer.echo(report.markdown())
    else:
        Console().print(report.table())
    if out is not None:
        write_report(report, out)
        typer.echo(f"wrote {out}")
    if plot is not None:
        figures.plot(report, plot)
        typer.echo(f"wrote {plot}")
    if samples is not None:
        shown = held_out_examples(pipe)
        write_image(figures.sample_sheet(pipe, grid, shown, seed=seed, **call), samples)
        typer.echo(f"wrote {samples}")


def smaller_model(model: str) -> str | None:
    """The shipped model that is a smaller version of `model`, if there is one."""
    from varaccel.shipped import shipped_models

    name = f"{model}-small"
    return name if name in shipped_models() else None


def check_writable(path: Path) -> None:
    """Refuse, before hours of work, a path that no file can be written to."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"nothing could be written to {path}: {error}") from error


def earlier_report(path: Path) -> BenchReport | None:
    """The report in a file, None if there is no such file yet.

    Raises:
        InputError: the file holds no report.
    """
    from varaccel.evaluation.bench.run import BenchReport

    if not path.exists():
        return None
    try:
        return BenchReport.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:  # InputError is a ValueError
        raise InputError(f"{path} cannot be continued, so leave out --resume: {error}") from error


def write_report(report: BenchReport, path: Path) -> None:
    """Write a report as JSON, whole or not at all."""
    write_text(json.dumps(report.to_dict(), indent=2, default=str) + "\n", path)


def _comparison(prompts: list[str], rows: list[list[Image.Image]], labels: list[str]) -> Image.Image:
    """A labelled row per accelerator, a column per prompt."""
    from PIL import Image, ImageDraw, ImageFont

    size = rows[0][0].width
    scale = max(1, 256 // size)
    tile, margin, text = size * scale, 8, 44
    width = margin + len(prompts) * (tile + margin)
    sheet = Image.new("RGB", (width, text + len(rows) * (tile + text)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for column, prompt in enumerate(prompts):
        draw.multiline_text((margin + column * (tile + margin), 6), _wrapped(prompt, 34), "black", font)
    for row, (images, label) in enumerate(zip(rows, labels, strict=True)):
        top = text + row * (tile + text)
        for column, image in enumerate(images):
            place = (margin + column * (tile + margin), top)
            sheet.paste(image.resize((tile, tile), Image.Resampling.LANCZOS), place)
        draw.text((margin, top + tile + 8), label, "black", font)
    return sheet


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:2])


def main() -> None:
    """Entry point: an error made by the library is one sentence on stderr and exit code 2."""
    try:
        app()
    except VaraccelError as error:
        typer.echo(f"varaccel: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
