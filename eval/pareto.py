"""The Pareto report: accelerators of one or several models against plain decoding, as one web page with its images.

    python eval/pareto.py --model mini-llamagen --model mini-var --model mini-mar --out outputs/report
    python eval/pareto.py --model mini-llamagen -a zipar:window=4 -a zipar:window=2 --images 200 --out outputs/zipar

Writes index.html, which needs no other file, and of every model NAME.json (everything, from the first rows on),
NAME.md (the tables), NAME.png (speed against quality), NAME-samples.png and, where tokens are one grid, NAME-maps.png.
An interrupted run goes on with --resume. Without -a, batch sizes and numbers of images the three shipped models take
less than half an hour on one core of a CPU (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from varaccel.accelerators import AnyAccelerator
from varaccel.accelerators.notation import parse_grid
from varaccel.console import tolerant_console
from varaccel.errors import InputError, VaraccelError
from varaccel.evaluation.bench.grids import DEFAULTS, default_grid, defaults_of
from varaccel.evaluation.bench.held_out import bench_held_out, held_out_examples
from varaccel.evaluation.bench.plot import plot
from varaccel.evaluation.bench.report import BenchReport
from varaccel.evaluation.bench.report_files import earlier_report, write_report
from varaccel.evaluation.bench.report_page import Section, report_page
from varaccel.evaluation.bench.samples import draw_samples
from varaccel.evaluation.bench.tables import bench_markdown
from varaccel.evaluation.extra import check_extra
from varaccel.files import check_writable, write_text
from varaccel.hosts.next_scale.job import ScaleJob
from varaccel.image_files import write_image
from varaccel.pipelines.placement import check_place, open_pipeline
from varaccel.shipped import smaller_model

GRIDS = ("release", "default")


@dataclass(frozen=True)
class Plan:
    """What is measured of one model, and where it goes.

    Attributes:
        model: its name.
        grid: accelerators to be compared.
        images: to be judged per accelerator.
        batches: images per timed call.
        stem: path of its files without their endings.
        maps: whether its tokens are one grid, so that there are maps of passes.
    """

    model: str
    grid: tuple[AnyAccelerator, ...]
    images: int
    batches: tuple[int, ...]
    stem: Path
    maps: bool

    @property
    def json(self) -> Path:
        return self.file(".json")

    def file(self, ending: str) -> Path:
        # a model's name may hold a dot, so no suffix is replaced
        return self.stem.with_name(self.stem.name + ending)


def make_plan(model: str, options: argparse.Namespace) -> Plan:
    """What to measure of `model`, found out before any work is done.

    Raises:
        InputError: a model that cannot be loaded, or that nothing of the grid fits.
    """
    typed = parse_grid(options.accelerator or [])
    pipe: Any = open_pipeline(model, quiet=True)
    defaults = defaults_of(pipe.job_type)
    if typed:
        grid = [one for one in typed if issubclass(pipe.job_type, one.job_type)]
        if not grid:
            raise InputError(
                f"none of the accelerators works on {model}, a {pipe.family} model; add one with -a."
            )
    elif options.grid == "default":
        grid = parse_grid(default_grid(pipe, smaller_model(model)))
    else:
        grid = parse_grid(defaults.release)
    images = defaults.images if options.images is None else options.images
    if pipe.config.get("class_names") is not None:
        raise InputError(f"{model} draws classes, so no prompt can be judged; leave it out.")
    batches = tuple(options.batch or defaults.batches)
    maps = not issubclass(pipe.job_type, ScaleJob)
    name = Path(model).name
    return Plan(model, tuple(grid), images, batches, options.out / name, maps)


def measure(plan: Plan, options: argparse.Namespace) -> Section:
    """Run the bench of one model, write its files, and return its section of the page.

    All models of a run are measured against the same true images, which are rendered once.
    """
    print(f"{plan.model}: {len(plan.grid)} accelerators, {plan.images} images of each", flush=True)
    pipe: Any = open_pipeline(plan.model, options.device, options.dtype, quiet=True)
    report = bench_held_out(
        pipe,
        plan.grid,
        model=plan.model,
        images=plan.images,
        scenes=options.scenes,
        batches=plan.batches,
        repeats=options.repeats,
        reference_start=options.images or max(defaults.images for defaults in DEFAULTS.values()),
        seed=options.seed,
        drawn_together=options.drawn_together,
        finished=earlier_report(plan.json) if options.resume else None,
        on_rows=lambda rows: write_report(rows, plan.json),
    )
    write_text(bench_markdown(report), plan.file(".md"))
    plot(report, plan.file(".png"))
    samples, maps = plan.file("-samples.png"), plan.file("-maps.png")
    wanted = [samples, maps] if plan.maps else [samples]
    # images of before rows were added lack them
    if not all(path.is_file() and path.stat().st_mtime >= plan.json.stat().st_mtime for path in wanted):
        _draw(pipe, plan, options.seed, samples, maps)
    return _section(plan, report, samples, maps)


def _draw(pipe: Any, plan: Plan, seed: int, samples: Path, maps: Path) -> None:
    drawn = draw_samples(pipe, plan.grid, held_out_examples(pipe), seed=seed)
    write_image(drawn.sheet(), samples)
    over = drawn.maps()
    if over is not None:
        write_image(over, maps)


def _section(plan: Plan, report: BenchReport, samples: Path, maps: Path) -> Section:
    # the report is written when rows are added and not touched by a run that finds all of them
    measured = datetime.fromtimestamp(plan.json.stat().st_mtime).strftime("%Y-%m-%d")
    return Section(
        title=plan.stem.name,
        report=report,
        measured=measured,
        plot=plan.file(".png").read_bytes(),
        samples=samples.read_bytes(),
        maps=maps.read_bytes() if plan.maps else None,
    )


def check_options(options: argparse.Namespace) -> None:
    """Refuse, before anything is loaded, what would fail after hours.

    Raises:
        InputError: what is asked for cannot be measured or written.
    """
    names = [Path(model).name for model in options.model]
    if len(set(names)) < len(names):
        raise InputError(
            "two of the models have the same name, so their files would be the same; rename one."
        )
    for name, least in (("images", 1), ("scenes", 0), ("repeats", 1), ("drawn_together", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {value}.")
    if options.batch and min(options.batch) < 1:
        raise InputError(f"--batch must be at least 1, got {min(options.batch)}.")
    check_place(options.device, options.dtype)
    check_extra("matplotlib")
    check_writable(options.out / "index.html")
    if options.resume:
        for name in names:
            earlier_report(options.out / f"{name}.json")
    parse_grid(options.accelerator or [])


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", required=True, help="repeatable; see `varaccel models`")
    parser.add_argument("--out", type=Path, default=Path("outputs/report"), help="folder to write to")
    parser.add_argument(
        "-a",
        "--accelerator",
        action="append",
        metavar="NAME:KEY=VALUE,...",
        help="what to compare, on every model that it works on; repeatable",
    )
    parser.add_argument(
        "--grid", choices=GRIDS, default="release", help="what to compare without -a: few settings, or many"
    )
    sizes = "; ".join(
        f"{defaults.label} {defaults.images}, batch {' and '.join(map(str, defaults.batches))}"
        for defaults in DEFAULTS.values()
    )
    parser.add_argument(
        "--images", type=int, help=f"per accelerator, to be judged (by kind of model: {sizes})"
    )
    parser.add_argument(
        "--scenes", type=int, default=1000, help="true images to measure the distance from; 0 = no distance"
    )
    parser.add_argument("--batch", type=int, action="append", help="images per timed call; repeatable")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds")
    parser.add_argument("--seed", type=int, default=0, help="of the first image")
    parser.add_argument("--drawn-together", type=int, default=10, help="images per call that are judged")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds of the same settings")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    tolerant_console()
    options = parse_arguments(arguments)
    check_options(options)
    plans = [make_plan(model, options) for model in options.model]
    sections = [measure(plan, options) for plan in plans]
    page = options.out / "index.html"
    write_text(report_page(sections), page)
    print(f"wrote {page}")


if __name__ == "__main__":
    try:
        main()
    except VaraccelError as error:
        print(f"pareto: {error}", file=sys.stderr)
        sys.exit(2)
