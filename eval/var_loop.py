"""Our plain VAR decoding against a rewrite of the published loop without our optimisations: time of both.

    python eval/var_loop.py                       # mini-var, shipped weights
    python eval/var_loop.py --size d16 --dtype bfloat16

Sizes have random weights: time does not depend on them. Both draw with the same guidance and filters, take turns, and
the ratio is that of the medians. What differs: modulation once per call instead of once per scale, a static cache
without the last scale, the output layer over half of the rows, and sorting only what top-k leaves for top-p.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from varaccel.console import tolerant_console
from varaccel.nn.devices import wait_for


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mini-var", help="pipeline with weights")
    parser.add_argument("--size", help="a published size with random weights instead, such as d16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cfg", type=float, default=1.5, help="guidance as the published code counts it")
    parser.add_argument("--top-k", type=int, default=900)
    parser.add_argument("--top-p", type=float, default=0.96)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON here")
    return parser.parse_args()


def load(options: argparse.Namespace) -> tuple[Any, list[str | int]]:
    """The pipeline and its prompts."""
    import torch

    from varaccel import AutoPipeline, MultiScaleVQModel, VARPipeline, VARTransformer

    torch.manual_seed(0)
    prompts: list[str | int]
    if options.size:
        transformer = VARTransformer.from_preset(options.size).eval()
        # the tokenizer's convolutions are not measured, so its smallest size will do
        vq = MultiScaleVQModel(base_channels=32, scales=transformer.schedule.sides).eval()
        pipe: Any = VARPipeline(transformer, vq)
        prompts = [i % 1000 for i in range(options.batch)]
    else:
        pipe = AutoPipeline.from_pretrained(options.model)
        prompts = ["a red sphere"] * options.batch
    pipe.to(options.device, getattr(torch, options.dtype))
    pipe.vq_model.float()
    pipe.set_progress_bar_config(disable=True)
    return pipe, prompts


def main() -> int:
    tolerant_console()
    options = parse_arguments()

    import torch
    from tqdm import tqdm

    from varaccel.errors import VaraccelError
    from varaccel.evaluation.published.var import published_loop
    from varaccel.evaluation.speed.machine import describe_machine
    from varaccel.files import check_writable, write_text

    try:
        check_writable(options.out)
        pipe, prompts = load(options)
        top_k = min(options.top_k, pipe.vq_model.codebook_size)
        with torch.inference_mode():
            given = pipe._condition(prompts)
            vectors = pipe.transformer.embed_condition(given.values, given.mask)

        def ours() -> float:
            return pipe(
                prompts,
                seed=0,
                guidance_scale=1 + options.cfg,
                top_k=top_k,
                top_p=options.top_p,
                output_type="latent",
            ).stats.seconds["tokens"]

        def theirs() -> float:
            start = time.perf_counter()
            published_loop(
                pipe.transformer,
                pipe.vq_model.quantize,
                vectors,
                cfg=options.cfg,
                top_k=top_k,
                top_p=options.top_p,
            )
            wait_for(options.device)
            return time.perf_counter() - start

        seconds: dict[str, list[float]] = {"ours": [], "published loop": []}
        for repeat in tqdm(range(options.repeats + 1), desc="measuring", disable=None):
            for name, run in (("ours", ours), ("published loop", theirs)):
                taken = run()
                if repeat:  # the first round warms up
                    seconds[name].append(taken)
    except VaraccelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "model": options.size or options.model,
        "batch": options.batch,
        "dtype": options.dtype,
        "machine": describe_machine(pipe.transformer.device),
        "seconds": seconds,
        "ratio": medians["published loop"] / medians["ours"],
    }
    print(json.dumps(result, indent=2))
    if options.out:
        write_text(json.dumps(result, indent=2) + "\n", options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
