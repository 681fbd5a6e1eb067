"""Our plain MAR decoding against a rewrite of the published loop without our optimisations: time of both networks.

    python eval/mar_loop.py --iterations 64           # mini-mar, shipped weights
    python eval/mar_loop.py --size base --iterations 64 --device cuda --compile

Sizes have random weights: time does not depend on them. Both draw the same images from the same noise and take turns.
What differs: what follows from the condition once per call, the last decoder layer for the wanted positions alone, what
the head derives from time and condition worked out for all steps in a few matrix products, tokens of guided halves
projected once; on a GPU one CUDA graph for all steps; with --compile one compiled step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

from varaccel.console import tolerant_console
from varaccel.evaluation.speed.loop_script import in_turns, loop_parser, run_script
from varaccel.nn.devices import is_gpu


def parse_arguments() -> argparse.Namespace:
    parser = loop_parser(__doc__, repeats=3)
    parser.add_argument("--model", default="mini-mar", help="pipeline with weights")
    parser.add_argument("--size", help="a published size with random weights instead: base, large or huge")
    parser.add_argument("--iterations", type=int, default=64)
    parser.add_argument("--head-steps", type=int, default=100)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--compile", action="store_true", help="also measure ours compiled")
    return parser.parse_args()


def new_runs(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What takes turns, by name: each decodes once and returns the shares of time."""
    import torch

    from varaccel import AutoPipeline, MARTransformer
    from varaccel.engine.randomness import image_generators
    from varaccel.evaluation.published.mar import our_shares, published_loop
    from varaccel.evaluation.sampling.example_prompts import examples
    from varaccel.hosts.masked.cuda_graph import GraphedLoop
    from varaccel.hosts.masked.denoising import HeadSampling, denoising_step
    from varaccel.hosts.masked.guidance import MaskedGuidance
    from varaccel.hosts.masked.noise import TokenNoise

    torch.manual_seed(0)
    mask = None
    device = torch.device(options.device)
    if options.size:
        model = MARTransformer.from_preset(options.size).eval().to(device)
        condition = torch.arange(options.batch, device=device) % 1000
    else:
        pipe: Any = AutoPipeline.from_pretrained(options.model).to(device)
        model = pipe.transformer
        with torch.inference_mode():
            given = pipe._condition(examples(pipe, ["a red sphere"] * options.batch))
        condition, mask = given.values, given.mask
    noise = TokenNoise.draw(image_generators(options.batch, 0), model.num_tokens, model.channels, device)
    common: dict[str, Any] = {
        "guidance": MaskedGuidance(options.guidance_scale),
        "sampling": HeadSampling(options.head_steps),
        "iterations": options.iterations,
    }

    def ours(**how: Any) -> Callable[[], Any]:
        return lambda: our_shares(model, condition, mask, noise, **common, **how)[1]

    runs = {
        "published loop": lambda: published_loop(model, condition, mask, noise, **common)[1],
        "ours": ours(),
    }
    on_gpu = is_gpu(device)
    if on_gpu:
        runs["ours, one graph"] = ours(options={"loop": GraphedLoop()})
    if options.compile:
        compiled = {
            "transform": torch.compile(model.forward, dynamic=True),
            "step": torch.compile(denoising_step, dynamic=not on_gpu),
            "loop": GraphedLoop() if on_gpu else None,
        }
        runs["ours, compiled"] = ours(options=compiled)
    return runs


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures: seconds of every loop by network, and ratios to the published one."""
    import torch

    from varaccel.evaluation.speed.machine import describe_machine

    taken = in_turns(new_runs(options), options.repeats)
    rows = {}
    for name, several in taken.items():
        total = statistics.median(s.total for s in several)
        rows[name] = {
            "seconds": total,
            "transformer": statistics.median(s.transformer for s in several),
            "head": statistics.median(s.head for s in several),
            "head_share": statistics.median(s.head_share for s in several),
            "ratio": statistics.median(s.total for s in taken["published loop"]) / total,
        }
    return {
        "model": options.size or options.model,
        **{name: getattr(options, name) for name in ("batch", "iterations", "head_steps", "repeats")},
        "machine": describe_machine(torch.device(options.device)),
        "rows": rows,
    }


def main() -> int:
    tolerant_console()
    options = parse_arguments()
    return run_script(lambda: measure(options), options)


if __name__ == "__main__":
    sys.exit(main())
