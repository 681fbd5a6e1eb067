"""How many images rounding changes when they are drawn in another batch size.

    python eval/rounding.py --model mini-llamagen --count 512 --batch-sizes 16 32
    python eval/rounding.py --preset var-d30 --count 512 --batch-sizes 8 64 --device cuda

The random numbers of an image do not depend on its batch; matrix products of other shapes round differently.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from varaccel.console import tolerant_console
from varaccel.errors import VaraccelError
from varaccel.evaluation.sampling.run_arguments import add_run_arguments, start_run


def main() -> int:
    tolerant_console()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-sizes", type=int, nargs=2, default=(16, 32), metavar="B")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON here")
    add_run_arguments(parser)
    options = parser.parse_args()
    try:
        from varaccel.evaluation.metrics.rounding import compare_batch_sizes
        from varaccel.evaluation.speed.machine import describe_machine
        from varaccel.files import check_writable, write_text

        check_writable(options.out)
        started = start_run(options, Path())
        settings = started.run.settings
        report = compare_batch_sizes(
            started.pipe,
            started.run.prompts,
            tuple(options.batch_sizes),
            accelerator=started.accelerator,
            seed=settings.seed,
            **settings.call,
        )
        machine = describe_machine(started.pipe.transformer.device)
        print(f"{settings.model}, {settings.accelerator}, {settings.dtype}, {machine}\n{report}")
        if options.out is not None:
            told = {"settings": asdict(settings), "machine": machine, "rounding": asdict(report)}
            write_text(json.dumps(told, indent=2, default=str) + "\n", options.out)
    except VaraccelError as error:
        print(f"rounding.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
