"""Accelerators on a Janus against the model's own `generate()` in transformers: passes and time of each.

    python pipelines/train_small_janus.py --out runs/janus --minutes 15
    python eval/janus_loop.py --model runs/janus/small-janus --batch 4

All draw the same prompts with the same guidance and filter; the methods take turns, and every ratio is one of medians
from the same rounds. `generate()` decides one token per pass, and so does the published loop, which draws images of the
first prompt and has no filter. Greedy token ids of `generate()` and of lossless methods are compared as well: they must
be equal.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from varaccel.console import tolerant_console
from varaccel.evaluation.speed.loop_script import DTYPES, loop_parser, run_script, seconds_of, write_result

OWN = "generate()"
PUBLISHED = "published loop"
ACCELERATORS = [
    "plain",
    "jacobi:window=8",
    "jacobi:window=16",
    "jacobi:window=32",
    "speculative:drafter=layers,tree=4",
    "zipar:window=8",
    "zipar:window=4",
    "zipar:window=2",
]


def parse_arguments() -> argparse.Namespace:
    parser = loop_parser(__doc__, batch=4)
    parser.add_argument("--model", required=True, help="a Janus: a folder or a repository of the hub")
    parser.add_argument("-a", "--accelerator", action="append", help="name:key=value,...; repeatable")
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument(
        "--images", type=Path, help="also write the first image of every method here, side by side"
    )
    parser.add_argument(
        "--vq-model",
        type=Path,
        help="image tokenizer to decode --images with; the model's own if left out",
    )
    return parser.parse_args()


def main() -> int:
    tolerant_console()
    options = parse_arguments()
    return run_script(lambda: measure(options), options)


def measure(options: argparse.Namespace) -> None:
    """Draw with every method in turn, print the table and write what was asked for.

    Raises:
        VaraccelError: what is asked for cannot be measured or written.
    """
    import torch
    from rich.console import Console
    from tqdm import tqdm

    from varaccel import JanusPipeline
    from varaccel.accelerators.notation import parse_grid
    from varaccel.evaluation.metrics.adherence import held_out_prompts
    from varaccel.evaluation.published.janus import published_loop
    from varaccel.evaluation.speed.machine import describe_machine
    from varaccel.files import check_writable
    from varaccel.pipelines.placement import quiet_loading

    check_writable(options.images)
    names = options.accelerator or ACCELERATORS
    accelerators = {name: accelerator for name in names for accelerator in parse_grid([name])}
    with quiet_loading():
        pipe: Any = JanusPipeline.from_pretrained(options.model, dtype=options.dtype)
    pipe.to(options.device)
    pipe.set_progress_bar_config(disable=True)
    prompts = [caption.text for caption in held_out_prompts(options.batch).values()]
    inputs = pipe.processor(
        text=[pipe._templated(p) for p in prompts], generation_mode="image", padding=True, return_tensors="pt"
    ).to(options.device)

    first = torch.tensor([pipe._prompt_ids(prompts[0], None)] * options.batch, device=options.device)

    def own(greedy: bool = False) -> Any:
        sampling = {"do_sample": False} if greedy else {"do_sample": True, "top_k": options.top_k}
        return pipe.model.generate(
            **inputs, generation_mode="image", guidance_scale=options.guidance_scale, **sampling
        )

    def published(greedy: bool = False) -> Any:
        return published_loop(
            pipe.model, first, cfg=options.guidance_scale, temperature=0.0 if greedy else 1.0
        )

    theirs = {OWN: own, PUBLISHED: published}

    def ours(accelerator: Any, seed: int, greedy: bool = False) -> Any:
        return pipe(
            prompts,
            accelerator=accelerator,
            guidance_scale=options.guidance_scale,
            top_k=options.top_k,
            temperature=0 if greedy else 1.0,
            output_type="latent",
            seed=seed,
        )

    rows: dict[str, dict[str, Any]] = {
        name: {"seconds": [], "passes": []} for name in (*theirs, *accelerators)
    }
    drawn: dict[str, Any] = {}
    torch.manual_seed(0)
    for repeat in tqdm(range(options.repeats + 1), desc="measuring", disable=None):
        for name in rows:
            if name in theirs:
                seconds = seconds_of(lambda name=name: drawn.update({name: theirs[name]()}), options.device)
                passes = drawn[name].shape[1]
            else:
                out = ours(accelerators[name], seed=1000 * repeat)
                passes, seconds, drawn[name] = out.stats.passes, out.stats.seconds["tokens"], out.images
                rows[name]["lossless"] = out.stats.lossless
            if repeat:  # the first round warms up
                rows[name]["seconds"].append(seconds)
                rows[name]["passes"].append(passes)
    expected = own(greedy=True)
    rows[PUBLISHED]["equal_greedy"] = (published(greedy=True)[0] == expected[0]).float().mean().item()
    for name, accelerator in accelerators.items():
        same = ours(accelerator, 0, greedy=True).images.flatten(1) == expected
        rows[name]["equal_greedy"] = same.float().mean().item()

    result = {
        "model": options.model,
        "batch": options.batch,
        "guidance_scale": options.guidance_scale,
        "top_k": options.top_k,
        "dtype": options.dtype,
        "machine": describe_machine(pipe.transformer.device),
        "methods": rows,
    }
    Console(width=110).print(table(rows, drawn[OWN].shape[1], result))
    if options.images:
        vq_model = pipe.vq_model
        if options.vq_model:
            from varaccel import VQModel

            vq_model = VQModel.from_pretrained(options.vq_model).eval().to(options.device)
        write_images(drawn, vq_model, options.images)
    write_result(result, options)


def table(rows: dict[str, Any], tokens: int, result: dict[str, Any]) -> Any:
    from rich.table import Table

    shown = Table(title=f"{result['model']}: batch {result['batch']}, {result['dtype']}, {result['machine']}")
    for heading in (
        "method",
        "passes",
        "tokens per pass",
        "seconds",
        "× generate()",
        "× plain",
        "greedy equal",
    ):
        shown.add_column(heading, justify="left" if heading == "method" else "right")
    medians = {name: statistics.median(row["seconds"]) for name, row in rows.items()}
    for name, row in rows.items():
        passes = statistics.mean(row["passes"])
        plain = medians.get("plain")
        equal = row.get("equal_greedy")
        shown.add_row(
            name if row.get("lossless", True) else f"{name} (lossy)",
            f"{passes:.0f}",
            f"{tokens / passes:.2f}",
            f"{medians[name]:.2f}",
            f"{medians[OWN] / medians[name]:.2f}",
            "" if plain is None else f"{plain / medians[name]:.2f}",
            "" if equal is None else f"{100 * equal:.0f} %",
        )
    return shown


def write_images(drawn: dict[str, Any], vq_model: Any, path: Path) -> None:
    """The first image of every method beside each other, with its name above."""
    import torch
    from matplotlib.figure import Figure

    from varaccel.files import atomic_path

    side = round(next(iter(drawn.values()))[0].numel() ** 0.5)
    figure = Figure(figsize=(2 * len(drawn), 2.3), layout="constrained")
    for axes, (name, tokens) in zip(
        figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True
    ):
        with torch.inference_mode():
            pixels = vq_model.decode_tokens(tokens[:1].view(1, side, side))[0]
        axes.imshow(((pixels.float().clamp(-1, 1) + 1) / 2).permute(1, 2, 0).cpu().numpy())
        axes.set_title(name, fontsize=7)
        axes.axis("off")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


if __name__ == "__main__":
    sys.exit(main())
