"""The bench on held-out scenes: prompts to time, captions to judge, and true images to measure the distance from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from varaccel.accelerators import AnyAccelerator
from varaccel.errors import InputError
from varaccel.evaluation.bench.judging import reference_statistics, true_images
from varaccel.evaluation.bench.report import BenchReport
from varaccel.evaluation.bench.run import run_bench
from varaccel.evaluation.metrics.adherence import held_out_captions, held_out_prompts
from varaccel.evaluation.sampling.example_prompts import examples
from varaccel.models.detector import load_detector


def bench_held_out(
    pipe: Any,
    accelerators: Sequence[AnyAccelerator],
    *,
    model: str,
    images: int = 100,
    scenes: int = 1000,
    batches: Sequence[int] = (1,),
    repeats: int = 5,
    reference_start: int | None = None,
    **options: Any,
) -> BenchReport:
    """`run_bench` on held-out scenes, judged by the scene detector that ships with varaccel.

    Args:
        model: name for the report.
        images: per accelerator, to be judged, of the first held-out captions; 0 = only speed.
        scenes: true images to measure the distance from; 0 = no distance, as of less than two `images`.
        batches: images per timed call.
        repeats: timed rounds.
        reference_start: which held-out scene is the first of the true ones, at least `images`; by default the first
            that is not judged. Models that share it share what is computed of them.
        options: further arguments of `run_bench`, and of the pipeline call.

    Raises:
        InputError: images to be judged of a model that draws classes; what `run_bench` refuses.
    """
    if images and pipe.config.get("class_names") is not None:
        raise InputError(f"{model} draws classes, so no prompt can be judged; add --images 0.")
    start = images if reference_start is None else reference_start
    if start < images:
        # what every accelerator draws would be close to scenes of its own captions
        raise InputError(f"reference_start must be at least the {images} images, got {start}.")
    scenes = scenes if images > 1 else 0
    timed = max(batches, default=0) * repeats
    held_out = held_out_prompts(max(images, start + scenes if scenes else 0, timed, 1))
    seeds, captions = list(held_out), list(held_out.values())
    # on the CPU whatever draws the images, so that figures of all devices are of the same features
    detector = load_detector() if images else None
    reference = truth = None
    if detector is not None:
        truth = true_images(seeds[:images], detector.config.image_size)
        if scenes:
            reference = reference_statistics(detector, seeds[start : start + scenes])
    return run_bench(
        pipe,
        accelerators,
        prompts=examples(pipe, [text.text for text in captions[:timed]]),
        captions=captions[:images],
        batches=batches,
        repeats=repeats,
        detector=detector,
        reference=reference,
        truth=truth,
        model=model,
        **options,
    )


def held_out_examples(pipe: Any, count: int = 4) -> list[str]:
    """The first `count` held-out captions, or as many class names for a model that draws classes."""
    return examples(pipe, [text.text for text in held_out_captions(count)])
