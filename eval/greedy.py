"""Whether lossless accelerators draw what plain decoding draws, token for token, when the most likely token is taken.

    python eval/greedy.py --model mini-llamagen --count 64 -a jacobi -a speculative:drafter=eagle,tree=5

A lossless accelerator must reproduce plain decoding at temperature 0. Rounding can part them where two tokens are as
likely to the last digits, since a pass over several tokens adds up in another order than a pass over one. Where
images differ, the position of each first difference is shown.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from varaccel.accelerators.notation import parse_grid
from varaccel.console import tolerant_console
from varaccel.errors import InputError, VaraccelError
from varaccel.evaluation.metrics.adherence import held_out_captions
from varaccel.evaluation.sampling.example_prompts import examples
from varaccel.files import check_writable, write_text
from varaccel.pipelines.placement import open_pipeline

LOSSLESS = (
    *("jacobi:coupling=none", "jacobi:coupling=gumbel", "jacobi:coupling=maximal"),
    *("speculative:tree=5", "speculative:tree=5,verification=k_sequential", "speculative:tree=mc_sim_7b_63"),
    *("speculative:tree=dynamic", "speculative:drafter=layers,tree=3", "lantern:k=0"),
)


def draw(pipe: Any, prompts: list[str], accelerator: Any, batch: int) -> torch.Tensor:
    """[N, H, W] tokens."""
    parts = (prompts[i : i + batch] for i in range(0, len(prompts), batch))
    call = {"temperature": 0.0, "output_type": "latent", "accelerator": accelerator}
    return torch.cat([pipe(part, **call).images for part in parts])


def main() -> int:
    tolerant_console()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mini-llamagen")
    parser.add_argument("--count", type=int, default=64, help="prompts")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("-a", "--accelerator", action="append", help="name:key=value,...; repeatable")
    parser.add_argument("--out", type=Path, help="also write the counts as JSON here")
    options = parser.parse_args()
    try:
        if options.count < 1 or options.batch_size < 1:
            raise InputError("--count and --batch-size must be at least 1.")
        check_writable(options.out)
        accelerators = parse_grid(options.accelerator or LOSSLESS)
        pipe = open_pipeline(options.model, quiet=True)
        prompts = examples(pipe, [caption.text for caption in held_out_captions(options.count)])
        plain = draw(pipe, prompts, None, options.batch_size).flatten(1)
        counts = {}
        for accelerator in tqdm(accelerators, unit="accelerator", disable=None):
            if not accelerator.lossless:
                raise InputError(
                    f"{accelerator.name} with these options is approximate, so it need not agree."
                )
            equal = draw(pipe, prompts, accelerator, options.batch_size).flatten(1) == plain
            label = f"{accelerator.name} {accelerator.options()}"
            counts[label] = int(equal.all(dim=1).sum())
            first = [int((~row).nonzero()[0]) for row in equal if not row.all()]
            tqdm.write(f"{counts[label]} of {len(prompts)} equal: {label} {first or ''}".rstrip())
        if options.out is not None:
            write_text(json.dumps({"prompts": len(prompts), "equal": counts}, indent=2) + "\n", options.out)
    except VaraccelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all(count == len(prompts) for count in counts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
