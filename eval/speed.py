"""Speed of accelerators by batch size and phase, eager and compiled, beside the least time that the device allows.

    python eval/speed.py --model mini-llamagen -a zipar:window=4 -a jacobi --batch 1 --batch 8
    python eval/speed.py --model mini-var --batch 1 --batch 16 --compile both --device cuda --dtype bfloat16

Every speed-up is a ratio to plain decoding in the same rounds. Without -a these are compared: jacobi and
zipar:window=4 (causal models); CoDe that hands over after half and after 80 % of the scales (next-scale models, if
there is a refiner); half of the iterations, feature_cache:refresh=4 and, if there is a drafter, cspd:mode=reference
(masked models). Numbers on what
the device can do are measured at the start, so nothing else should run beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from varaccel.console import tolerant_console


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mini-llamagen")
    parser.add_argument("-a", "--accelerator", action="append", help="name:key=value,...; repeatable")
    parser.add_argument("--batch", type=int, action="append", help="images per call; repeatable")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--compile", default="off", choices=["off", "on", "both"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--guidance-scale", type=float, help="the model's own if left out")
    parser.add_argument("--num-iterations", type=int, help="passes that decide the tokens (MAR)")
    parser.add_argument("--head-steps", type=int, help="denoising steps of a token (MAR)")
    parser.add_argument("--tokens-only", action="store_true", help="leave out the decoding to pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the first image")
    parser.add_argument(
        "--out", type=Path, help="also write everything as JSON here, from the first batch on"
    )
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    return parser.parse_args()


def main() -> int:
    tolerant_console()
    options = parse_arguments()

    from varaccel.errors import VaraccelError

    try:
        measure(options)
    except VaraccelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(options: argparse.Namespace) -> None:
    """Run the sweep, save it and print it.

    Raises:
        VaraccelError: what is asked for cannot be measured or written.
    """
    from rich.console import Console

    from varaccel.accelerators.notation import parse_grid
    from varaccel.errors import InputError
    from varaccel.evaluation.bench.grids import speed_grid
    from varaccel.evaluation.metrics.adherence import held_out_prompts
    from varaccel.evaluation.sampling.example_prompts import examples
    from varaccel.evaluation.speed.speed_sweep import sweep
    from varaccel.evaluation.speed.sweep_report import SweepReport
    from varaccel.files import check_writable, write_text
    from varaccel.pipelines.call_options import call_options
    from varaccel.pipelines.placement import open_pipeline, quiet_loading
    from varaccel.shipped import smaller_model

    def save(report: SweepReport) -> None:
        if options.out:
            write_text(json.dumps(report.to_dict(), indent=2, default=str) + "\n", options.out)

    batches = options.batch or [1]
    if min(batches) < 1 or options.repeats < 1:
        raise InputError("--batch and --repeats must be at least 1.")
    check_writable(options.out)
    typed = None if options.accelerator is None else parse_grid(options.accelerator)
    pipe: Any = open_pipeline(options.model, options.device, options.dtype, quiet=True)
    call = call_options(
        pipe,
        options.model,
        guidance_scale=options.guidance_scale,
        num_iterations=options.num_iterations,
        head_steps=options.head_steps,
    )
    pipe.check_images(max(batches))
    captions = held_out_prompts(max(batches) * options.repeats).values()
    with quiet_loading():  # networks that accelerators name are loaded on the way
        report = sweep(
            pipe,
            parse_grid(speed_grid(pipe, smaller_model(options.model))) if typed is None else typed,
            examples(pipe, [caption.text for caption in captions]),
            batches,
            options.repeats,
            compiled={"off": (False,), "on": (True,), "both": (False, True)}[options.compile],
            seed=options.seed,
            decode=not options.tokens_only,
            model=options.model,
            on_entries=save,
            **call,
        )
    if options.markdown:
        print(report.markdown(), end="")
    else:
        Console().print(report.table())
    save(report)


if __name__ == "__main__":
    sys.exit(main())
