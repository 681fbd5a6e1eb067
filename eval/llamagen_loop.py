"""Our plain LlamaGen decoding against a rewrite of the published loop without our optimisations: time of both.

    python eval/llamagen_loop.py                  # mini-llamagen, shipped weights
    python eval/llamagen_loop.py --size B --tokens 64

Sizes have random weights: time does not depend on them. Both draw with the same guidance and filters, take turns, and
the ratio is that of the medians. What differs: attention over the slots in use instead of all, without a mask where all
are seen and without copies of keys and values; on a CPU weights that are packed for few rows; draws without float64
copies; what a call needs before its first pass. With --tokens both stop after so many, which leaves out the part of an
image in which our passes have most slots to look at. The floor is the time to read what a pass reads of the weights, as
often as there are passes.
"""

from __future__ import annotations

import argparse
import statistics
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
    parser.add_argument("--model", default="mini-llamagen", help="pipeline with weights")
    parser.add_argument("--size", help="a published size with random weights instead: B, L, XL, XXL or 3B")
    parser.add_argument("--grid", type=int, default=16, help="tokens per side of a --size: 16, 24 or 32")
    parser.add_argument("--tokens", type=int, help="of an image to draw; all if left out")
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--top-k", type=int, default=2000)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--quantize", choices=["float16"], help="smaller weights on a CPU, for both loops")
    return parser.parse_args()


def load(options: argparse.Namespace) -> tuple[Any, list[str | int]]:
    """The pipeline and its prompts."""
    import torch

    from varaccel import AutoPipeline, LlamaGenPipeline, LlamaGenTransformer, VQModel
    from varaccel.evaluation.sampling.example_prompts import examples

    torch.manual_seed(0)
    prompts: list[str | int]
    if options.size:
        transformer = LlamaGenTransformer.from_preset(options.size, grid_size=options.grid).eval()
        # the tokenizer's convolutions are not measured, so a small one will do
        vq = VQModel(base_channels=32, channel_multipliers=(1, 1, 1, 1, 1), num_res_blocks=1).eval()
        pipe: Any = LlamaGenPipeline(transformer, vq)
        prompts = [i % 1000 for i in range(options.batch)]
    else:
        pipe = AutoPipeline.from_pretrained(options.model)
        prompts = list(examples(pipe, ["a red sphere"] * options.batch))
    pipe.to(options.device, getattr(torch, options.dtype))
    if options.quantize:
        pipe.quantize(options.quantize)
    pipe.set_progress_bar_config(disable=True)
    return pipe, prompts


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures: seconds of both loops in every round."""
    import torch

    from varaccel.errors import InputError
    from varaccel.evaluation.published.llamagen import published_loop
    from varaccel.evaluation.speed.first_tokens import first_tokens
    from varaccel.evaluation.speed.machine import describe_machine
    from varaccel.evaluation.speed.roofline import Work, WorkCounter, floor_of

    pipe, prompts = load(options)
    model = pipe.transformer
    tokens = model.num_tokens if options.tokens is None else options.tokens
    if not 1 <= tokens <= model.num_tokens:
        raise InputError(f"--tokens must be 1 to {model.num_tokens}, got {tokens}.")
    filters = {"top_k": options.top_k, "top_p": options.top_p}
    with torch.inference_mode():
        given = pipe._condition(prompts)

    call = {"guidance_scale": options.guidance_scale, **filters}

    def ours() -> float:
        return first_tokens(pipe, prompts, options.tokens, **call).seconds["tokens"]

    def theirs() -> float:
        same = {"cfg": options.guidance_scale, "tokens": tokens, **filters}
        return seconds_of(lambda: published_loop(model, given.values, given.mask, **same), options.device)

    def work(count: int) -> Work:
        with WorkCounter() as counter:
            first_tokens(pipe, prompts, count, **call)
        return counter.work

    few, more = work(2), work(3)  # apart by one pass
    one = Work(more.weight_bytes - few.weight_bytes, more.operations - few.operations, more.network_bytes)
    floor = floor_of(one, model.device, model.dtype).seconds * tokens

    seconds = in_turns({"ours": ours, "published loop": theirs}, options.repeats)
    return {
        "model": options.size or options.model,
        "batch": options.batch,
        "tokens": tokens,
        "dtype": options.dtype,
        "quantize": options.quantize,
        "machine": describe_machine(model.device),
        "seconds": seconds,
        "ratio": median_ratio(seconds["published loop"], seconds["ours"]),
        "floor": floor,
        "share of the floor": floor / statistics.median(seconds["ours"]),
    }


def main() -> int:
    tolerant_console()
    options = parse_arguments()
    return run_script(lambda: measure(options), options)


if __name__ == "__main__":
    sys.exit(main())
