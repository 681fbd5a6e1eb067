"""Our plain VAR decoding against a rewrite of the published loop without our optimisations: time of both.

    python eval/var_loop.py                       # mini-var, shipped weights
    python eval/var_loop.py --size d16 --dtype bfloat16

Sizes have random weights: time does not depend on them. Both draw with the same guidance and filters, take turns, and
the ratio is that of the medians. What differs: modulation once per call instead of once per scale, a static cache
without the last scale, the output layer over half of the rows, and sorting only what top-k leaves for top-p.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from varaccel.console import tolerant_console
from varaccel.evaluation.speed.loop_script import (
    DTYPES,
    in_turns,
    loop_parser,
    median_ratio,
    run_script,
    seconds_of,
)


def parse_arguments() -> argparse.Namespace:
    parser = loop_parser(__doc__)
    parser.add_argument("--model", default="mini-var", help="pipeline with weights")
    parser.add_argument("--size", help="a published size with random weights instead, such as d16")
    parser.add_argument("--cfg", type=float, default=1.5, help="guidance as the published code counts it")
    parser.add_argument("--top-k", type=int, default=900)
    parser.add_argument("--top-p", type=float, default=0.96)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    return parser.parse_args()


def load(options: argparse.Namespace) -> tuple[Any, list[str | int]]:
    """The pipeline and its prompts."""
    import torch

    from varaccel import AutoPipeline, MultiScaleVQModel, VARPipeline, VARTransformer
    from varaccel.evaluation.sampling.example_prompts import examples

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
        prompts = list(examples(pipe, ["a red sphere"] * options.batch))
    pipe.to(options.device, getattr(torch, options.dtype))
    pipe.vq_model.float()
    pipe.set_progress_bar_config(disable=True)
    return pipe, prompts


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures: seconds of both loops in every round."""
    import torch

    from varaccel.evaluation.published.var import published_loop
    from varaccel.evaluation.speed.machine import describe_machine

    pipe, prompts = load(options)
    top_k = min(options.top_k, pipe.vq_model.codebook_size)
    filters = {"top_k": top_k, "top_p": options.top_p}
    with torch.inference_mode():
        given = pipe._condition(prompts)
        vectors = pipe.transformer.embed_condition(given.values, given.mask)

    def ours() -> float:
        call = {"guidance_scale": 1 + options.cfg, "output_type": "latent", **filters}
        return pipe(prompts, seed=0, **call).stats.seconds["tokens"]

    def theirs() -> float:
        quantizer = pipe.vq_model.quantize
        return seconds_of(
            lambda: published_loop(pipe.transformer, quantizer, vectors, cfg=options.cfg, **filters),
            options.device,
        )

    seconds = in_turns({"ours": ours, "published loop": theirs}, options.repeats)
    return {
        "model": options.size or options.model,
        "batch": options.batch,
        "dtype": options.dtype,
        "machine": describe_machine(pipe.transformer.device),
        "seconds": seconds,
        "ratio": median_ratio(seconds["published loop"], seconds["ours"]),
    }


def main() -> int:
    tolerant_console()
    options = parse_arguments()
    return run_script(lambda: measure(options), options)


if __name__ == "__main__":
    sys.exit(main())
