"""What each way of making the scales of a next-scale model cheaper saves and costs, alone and combined.

    OMP_NUM_THREADS=1 python eval/scale_plans.py --model mini-var --out outputs/scale-plans

Measures time, cache, adherence and distance of plain decoding, of every option of `ScalePlan` alone, of accelerators
that are plans, and of combinations, all with the same prompts and seeds. Writes scale-plans.json (everything, from
the first rows on), scale-plans.md (the tables) and scale-plans.png (speed against quality). An interrupted run goes on
with --resume.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from varaccel.accelerators.notation import parse_grid
from varaccel.console import tolerant_console
from varaccel.errors import InputError, VaraccelError
from varaccel.evaluation.bench.grids import plan_grid
from varaccel.evaluation.bench.held_out import bench_held_out
from varaccel.evaluation.bench.plot import plot
from varaccel.evaluation.bench.report_files import earlier_report, write_report
from varaccel.evaluation.bench.tables import bench_markdown
from varaccel.evaluation.extra import check_extra
from varaccel.files import check_writable, write_text
from varaccel.hosts.next_scale.job import ScaleJob
from varaccel.pipelines.placement import check_place, open_pipeline


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mini-var", help="a next-scale model; see `varaccel models`")
    parser.add_argument("--out", type=Path, default=Path("outputs/scale-plans"), help="folder to write to")
    parser.add_argument(
        "-a",
        "--accelerator",
        action="append",
        metavar="NAME:KEY=VALUE,...",
        help="what to compare instead; repeatable",
    )
    parser.add_argument(
        "--images", type=int, default=500, help="per accelerator, to be judged; 0 = only speed"
    )
    parser.add_argument(
        "--scenes", type=int, default=1000, help="true images to measure the distance from; 0 = no distance"
    )
    parser.add_argument(
        "--batch", type=int, action="append", help="images per timed call; repeatable (1 and 16)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--seed", type=int, default=0, help="of the first image")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds of the same settings")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    tolerant_console()
    options = parse_arguments(arguments)
    check_place(options.device, options.dtype)
    check_extra("matplotlib")
    files = {ending: options.out / f"scale-plans{ending}" for ending in (".json", ".md", ".png")}
    check_writable(files[".json"])
    pipe: Any = open_pipeline(options.model, options.device, options.dtype, quiet=True)
    if not issubclass(pipe.job_type, ScaleJob):
        raise InputError(f"{options.model} does not draw scale after scale; name a next-scale model.")
    report = bench_held_out(
        pipe,
        parse_grid(options.accelerator or plan_grid(pipe)),
        model=options.model,
        images=options.images,
        scenes=options.scenes,
        batches=tuple(options.batch or (1, 16)),
        repeats=options.repeats,
        seed=options.seed,
        finished=earlier_report(files[".json"]) if options.resume else None,
        on_rows=lambda rows: write_report(rows, files[".json"]),
    )
    write_report(report, files[".json"])
    write_text(bench_markdown(report), files[".md"])
    if options.images:
        plot(report, files[".png"])
    print(f"wrote {files['.md']}")


if __name__ == "__main__":
    try:
        main()
    except VaraccelError as error:
        print(f"scale_plans: {error}", file=sys.stderr)
        sys.exit(2)
