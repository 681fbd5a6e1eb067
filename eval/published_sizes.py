"""Speed at published sizes with random weights: passes, plain decoding against published loops, accelerators.

    python eval/published_sizes.py --suite cpu
    python eval/published_sizes.py --suite gpu --device cuda --out runs/sizes-h200
    python eval/published_sizes.py --suite gpu --dry-run          # tiny networks on a CPU: does all of it run
    python eval/published_sizes.py --suite gpu --device cuda --only LlamaGen-B-256 --only VAR-d16.loop

Nothing is downloaded: time does not depend on the weights. A piece is one size and one thing that is measured of it
(curve, compiled, loop, accelerators), a file in the folder of --out; a finished piece with the same settings on the
same machine is not measured again, so a run that was stopped goes on where it was. A piece that fails, such as a size
that is too large for the device, is named at the end and does not stop the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from varaccel.console import tolerant_console
from varaccel.errors import InputError, VaraccelError

BENCH = Path(__file__).parent.parent / "docs" / "bench.json"
"""Where tokens per pass of the accelerators were recorded."""


def parse_arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--suite", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", action="append", help="a size, or SIZE.KIND for one piece; repeatable")
    parser.add_argument("--list", action="store_true", help="name the pieces and stop")
    parser.add_argument("--dry-run", action="store_true", help="tiny networks, one size of each kind")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/published-sizes"), help="folder of the results"
    )
    return parser.parse_args()


def main() -> int:
    tolerant_console()
    options = parse_arguments()
    try:
        return run(options)
    except VaraccelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Measure what is left to measure and write the report of all; 1 if a piece failed."""
    from tqdm import tqdm

    from varaccel.evaluation.speed.size_catalog import SUITES, dry_run
    from varaccel.evaluation.speed.size_pieces import pieces
    from varaccel.evaluation.speed.size_report import markdown, with_computed, write_figure
    from varaccel.files import check_writable, write_text

    suite = SUITES[options.suite]
    if options.dry_run:
        suite = dry_run(suite)
    every = list(pieces(suite, options.device, {"backend": "eager"} if options.dry_run else {}))
    wanted = options.only or [piece.name for piece in every]
    unknown = [name for name in wanted if not any(name in (one.size.name, one.name) for one in every)]
    if unknown:
        raise InputError(f"no size or piece {unknown[0]!r} in suite {suite.name}; --list names them.")
    every = [piece for piece in every if piece.name in wanted or piece.size.name in wanted]
    if options.list:
        print("\n".join(piece.name for piece in every))
        return 0
    folder = options.out / "pieces"
    check_writable(folder / "piece.json", options.out / "sizes.json")
    found, failed = [], {}
    for piece in tqdm(every, unit="piece", disable=None):
        result = piece.finished(folder)
        if result is None:
            try:
                result = piece.measure(folder)
            except (RuntimeError, VaraccelError) as error:  # too large for the device, no compiler
                failed[piece.name] = str(error).strip().splitlines()[0]
                continue
        found.append(result)
    whole = with_computed(found, BENCH)
    write_text(json.dumps({"pieces": whole, "failed": failed}, indent=2) + "\n", options.out / "sizes.json")
    machine = found[0]["settings"]["machine"] if found else options.device
    table = markdown(whole, f"Published sizes, suite {suite.name}, {machine}")
    write_text(table, options.out / "sizes.md")
    write_figure(whole, options.out / "sizes.png")
    print(table)
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
