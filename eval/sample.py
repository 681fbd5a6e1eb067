"""Images for an evaluation: N of a model and accelerator, resumable, by one process or many.

    python eval/sample.py --model mini-mar --count 500 --out runs/mar
    python eval/sample.py --preset llamagen-xl-384 --batch-size 64 --out runs/llamagen-xl --npz
    torchrun --nproc-per-node 8 eval/sample.py --preset var-d30 -a code:draft_scales=8,refiner=var-d16 --out runs/code
    accelerate launch --multi_gpu --num_processes 2 eval/sample.py --model mini-var --count 512 --out runs/var

Run the same command again after an interruption: it goes on where it stopped. For one batch size and kind of device
the files are the same, to the bit, for any number of processes and interruptions. `eval/fid.py` measures them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from varaccel.console import tolerant_console
from varaccel.errors import VaraccelError
from varaccel.evaluation.sampling.run_arguments import add_run_arguments, start_run, tell_failure


def main() -> int:
    tolerant_console()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--npz", action="store_true", help="also write samples.npz, as ADM's evaluation reads it"
    )
    add_run_arguments(parser)
    options = parser.parse_args()
    try:
        started = start_run(options, options.out)
        summary = started.draw()
        if started.state.is_main_process:
            print(
                f"{summary.images} images in {started.run.images}: {summary.passes:.4g} passes per batch, "
                f"{summary.tokens_per_pass:.2f} tokens per pass, "
                f"{'lossless' if summary.lossless else 'approximate'}"
            )
            if options.npz:
                print(f"wrote {started.run.write_batch_file()}")
    except VaraccelError as error:
        tell_failure("sample.py", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
