"""One prompt drawn with several settings, one after the other, and a sheet of what they drew."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from varaccel.accelerators import AnyAccelerator
from varaccel.app.race import unpaused, warm_up
from varaccel.engine.statistics import Statistics, call_label
from varaccel.evaluation.bench.report import with_plain
from varaccel.evaluation.bench.samples import Samples
from varaccel.evaluation.call_text import quality_label
from varaccel.evaluation.speed.call_speed import naming
from varaccel.pipelines.output import ImageOutput

TIMED_ONCE = (
    "Speed-ups are ratios to plain decoding in the same comparison. Every setting was warmed up and timed once, on "
    "this machine, so small differences mean nothing; `varaccel bench` repeats the measurement and judges the "
    "images."
)

_PROMPT_ON_SHEET = 200
"""Letters of a prompt on a sheet."""


@dataclass(frozen=True)
class ComparedRow:
    """What one setting drew, and how fast.

    Attributes:
        accelerator: as it was asked for.
        output: the images and their cost; its token time leaves out what the call waited for others.
        speedup: token time of plain decoding in the same comparison over that of this row.
        seed: of the first image.
    """

    accelerator: AnyAccelerator
    output: ImageOutput
    speedup: float
    seed: int

    @property
    def label(self) -> str:
        return setting_label(self.accelerator)

    @property
    def stats(self) -> Statistics:
        return self.output.stats

    @property
    def chosen(self) -> str | None:
        """What a setting that chooses by the call, such as `auto`, has chosen; None for the others."""
        return None if self.stats.accelerator == self.accelerator.name else self.stats.label


def setting_label(accelerator: AnyAccelerator) -> str:
    """An accelerator with its telling options."""
    return call_label(accelerator.name, accelerator.options())


def compare(
    pipe: Any,
    prompt: str,
    accelerators: Sequence[AnyAccelerator],
    *,
    seed: int,
    count: int,
    guidance_scale: float | None,
    allowed: Callable[[], None],
) -> Iterator[ComparedRow]:
    """Draw a prompt plainly and with every accelerator, and yield each row as it is finished.

    Every row is warmed up, then timed in one call. All draw the same seeds.

    Args:
        pipe: a pipeline with its progress bar switched off.
        accelerators: to be compared; plain decoding is added in front, repetitions are dropped.
        seed: of the first image; image i has seed `seed` + i.
        count: images per row, drawn in one call.
        guidance_scale: None for the model's own.
        allowed: called after every pass; may raise to stop the call. What it takes is not on the clock. If it has an
            attribute `paused`, that is how long it has waited in all; else all of its time counts as waiting.

    Raises:
        VaraccelError: an argument that the pipeline refuses, or no memory; names the accelerator.
    """
    call: dict[str, Any] = {
        "prompt": prompt,
        "seed": seed,
        "num_images_per_prompt": count,
        **({} if guidance_scale is None else {"guidance_scale": guidance_scale}),
    }
    plain_seconds: float | None = None
    for accelerator in with_plain(accelerators):
        with naming(accelerator):
            warm_up(pipe, accelerator, allowed, **call)
            output = _timed(pipe, accelerator, allowed, call)
        seconds = output.stats.seconds["tokens"]
        plain_seconds = seconds if plain_seconds is None else plain_seconds
        yield ComparedRow(accelerator, output, plain_seconds / seconds, seed)


def _timed(
    pipe: Any, accelerator: AnyAccelerator, allowed: Callable[[], None], call: dict[str, Any]
) -> ImageOutput:
    """One call, with a clock that stands still while others have the device."""
    own = 0.0
    waited_before = getattr(allowed, "paused", None)

    def after_pass(*_: Any) -> None:
        nonlocal own
        before = time.perf_counter()
        allowed()
        own += time.perf_counter() - before

    output: ImageOutput = pipe(accelerator=accelerator, callback_on_step_end=after_pass, **call)
    waited = own if waited_before is None else allowed.paused - waited_before  # type: ignore[attr-defined]
    return ImageOutput(output.images, unpaused(output.stats, waited), output.written)


def sheet(rows: Sequence[ComparedRow], prompt: str) -> Image.Image:
    """All rows as one labelled image, with qualities and speed-ups below."""
    count = len(rows[0].output.images)
    text = textwrap.shorten(prompt, _PROMPT_ON_SHEET, placeholder=" …")
    prompts = tuple(f"{text}, seed {rows[0].seed + index}" for index in range(count))
    images = Samples(prompts, tuple((row.accelerator, row.output) for row in rows)).sheet()
    font, height, margin = ImageFont.load_default(12), 16, 6
    lines = [
        line
        for told in (*map(_cost, rows), TIMED_ONCE.replace("`", ""))
        for line in textwrap.wrap(told, images.width // 7, subsequent_indent="   ")
    ]
    whole = Image.new("RGB", (images.width, images.height + len(lines) * height + 2 * margin), "white")
    whole.paste(images)
    draw = ImageDraw.Draw(whole)
    for index, line in enumerate(lines):
        draw.text((margin, images.height + margin + index * height), line, "black", font)
    return whole


def _cost(row: ComparedRow) -> str:
    quality, seconds = quality_label(row.stats.lossless), row.stats.seconds["tokens"]
    return f"{row.label}: {quality}, {seconds:.2f} s, {row.speedup:.2f}x plain decoding"
