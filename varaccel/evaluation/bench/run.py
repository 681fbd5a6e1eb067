"""Every accelerator of a grid on one model: passes, speed and quality against plain decoding.

Speed is measured per batch size as `measure_speed` does it. Quality is measured once per accelerator, on images of
the same prompts and seeds: prompt adherence, and the Fréchet distance from true images in the features of the scene
detector, which is no FID (see `varaccel.evaluation.metrics.frechet`). A report says of every difference to plain
decoding whether the noise of sampling explains it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from PIL import Image
from tqdm import tqdm

from varaccel.accelerators import AnyAccelerator
from varaccel.errors import InputError
from varaccel.evaluation.bench.comparison import Quality
from varaccel.evaluation.bench.judging import judge_images
from varaccel.evaluation.bench.report import BenchReport, Row, Settings, with_plain
from varaccel.evaluation.digests import text_digest, weights_digest
from varaccel.evaluation.metrics.frechet import FeatureStatistics
from varaccel.evaluation.speed.call_speed import beside_plain, measure_speed, naming
from varaccel.evaluation.speed.machine import describe_machine
from varaccel.models.detector import SceneDetector
from varaccel.scenes.grammar import Caption


def run_bench(
    pipe: Any,
    accelerators: Sequence[AnyAccelerator],
    *,
    prompts: Sequence[str | int],
    captions: Sequence[Caption] = (),
    batches: Sequence[int] = (1,),
    repeats: int = 5,
    detector: SceneDetector | None = None,
    reference: FeatureStatistics | None = None,
    truth: Sequence[Image.Image] | None = None,
    seed: int = 0,
    model: str = "",
    compiled: bool = False,
    drawn_together: int = 10,
    finished: BenchReport | None = None,
    on_rows: Callable[[BenchReport], None] | None = None,
    progress: bool = True,
    **call: Any,
) -> BenchReport:
    """Measure accelerators against plain decoding: speed by batch size, then quality.

    All accelerators of a batch size are timed in turn; a ratio is taken within a round, so it stays fair if rows are
    added later (`finished`), when plain decoding is timed again beside them.

    Args:
        pipe: a pipeline; its own progress bar is left as it is.
        accelerators: to be compared; plain decoding is added in front, repetitions are dropped.
        prompts: for speed, at least the largest batch; up to `repeats` batches of them are used.
        captions: for quality, one image of each per accelerator; image i has seed `seed` + i. None: only speed.
        batches: images per timed call.
        repeats: timed rounds.
        detector: judges the images of `captions`.
        reference: statistics of true images to measure the distance from; none: no distances.
        truth: true images of `captions`, to be judged like the others.
        model: name for the report.
        compiled: whether `pipe.compile()` was called, for the report.
        drawn_together: images per call where quality is judged; a GPU is quicker with more. Which numbers an image
            is drawn with does not depend on it.
        finished: an earlier report of the same settings; what it holds is not measured again.
        on_rows: called with the report so far whenever rows have been added, to save it.
        progress: show a bar over the whole.
        call: further arguments of the pipeline call, such as guidance_scale.

    Raises:
        InputError: captions without a detector; `finished` is of other settings; an accelerator that cannot be used
            here, by its label.
    """
    if captions and detector is None:
        raise InputError("images are judged by a detector; pass one, or no captions.")
    if reference is not None and len(captions) == 1:
        raise InputError("a distance needs at least two images; judge more, or pass no reference.")
    if not batches or min(batches) < 1 or max(batches) > len(prompts):
        raise InputError(
            f"batches are 1 to as many images as there are prompts ({len(prompts)}), got {list(batches)}."
        )
    if drawn_together < 1:
        raise InputError(f"drawn_together must be at least 1, got {drawn_together}.")
    settings = _settings(pipe, prompts, captions, reference, model, seed, repeats, compiled, call)
    run = _BenchRun(pipe, accelerators, settings, finished, on_rows)
    untimed = run.untimed(batches)
    total = run.images_to_draw(untimed, captions)
    with tqdm(total=total, unit="image", disable=not progress or None, leave=False) as bar:
        for batch, todo in untimed.items():
            bar.set_description(f"speed, batch {batch}")
            run.measure(prompts, todo, batch, lambda _, batch=batch: bar.update(batch))  # type: ignore[misc]
        if captions and detector is not None:
            run.judge(detector, captions, reference, truth, drawn_together, bar)
    return run.report()


class _BenchRun:
    """The rows of a bench as they are filled.

    Args:
        accelerators: to be compared; plain decoding is added in front, repetitions are dropped.
        finished: an earlier report whose rows are kept.
        on_rows: called with the report so far whenever rows have been added.

    Raises:
        InputError: `finished` is of other settings.
    """

    def __init__(
        self,
        pipe: Any,
        accelerators: Sequence[AnyAccelerator],
        settings: Settings,
        finished: BenchReport | None,
        on_rows: Callable[[BenchReport], None] | None,
    ) -> None:
        self.pipe, self.settings, self.on_rows = pipe, settings, on_rows
        self.candidates = {Row.of(one).key: one for one in with_plain(accelerators)}
        self.rows = {key: Row.of(one) for key, one in self.candidates.items()}
        self.truth: Quality | None = None
        if finished is not None:
            _check_settings(finished.settings, settings)
            self.rows |= {row.key: row for row in finished.rows}
            self.truth = finished.truth

    def report(self) -> BenchReport:
        """What was found so far."""
        return BenchReport(self.settings, tuple(self.rows.values()), self.truth)

    def untimed(self, batches: Sequence[int]) -> dict[int, list[AnyAccelerator]]:
        """The accelerators that were not timed yet, by batch size; sizes without any are left out."""
        missing = {
            batch: [one for key, one in self.candidates.items() if batch not in self.rows[key].speed]
            for batch in dict.fromkeys(batches)
        }
        return {batch: todo for batch, todo in missing.items() if todo}

    def unjudged(self) -> list[tuple[str, AnyAccelerator]]:
        """The accelerators whose images were not judged yet, with the keys of their rows."""
        return [(key, one) for key, one in self.candidates.items() if self.rows[key].quality is None]

    def images_to_draw(self, untimed: Mapping[int, list[AnyAccelerator]], captions: Sequence[Caption]) -> int:
        """Images that are still drawn, warm-up rounds and those of plain decoding beside others included."""
        timed = sum(
            batch * (self.settings.repeats + 1) * len(with_plain(todo)) for batch, todo in untimed.items()
        )
        return timed + len(captions) * len(self.unjudged())

    def measure(
        self,
        prompts: Sequence[str | int],
        todo: Sequence[AnyAccelerator],
        batch: int,
        on_call: Callable[[AnyAccelerator], Any],
    ) -> None:
        """Time accelerators beside plain decoding; what was timed already stays as it is."""
        settings = self.settings
        measured = measure_speed(
            self.pipe,
            prompts,
            todo,
            batch=batch,
            repeats=settings.repeats,
            seed=settings.seed,
            on_call=on_call,
            **settings.call,
        )
        for accelerator, one in zip(beside_plain(todo), measured.measurements, strict=True):
            row = self.rows[key := Row.of(accelerator).key]
            if batch not in row.speed:
                # what was asked for names the row, whatever a call made of it
                kept = replace(one, options=row.options, lossless=row.lossless)
                self.rows[key] = replace(row, speed={**row.speed, batch: kept})
        self._added()

    def judge(
        self,
        detector: SceneDetector,
        captions: Sequence[Caption],
        reference: FeatureStatistics | None,
        truth: Sequence[Image.Image] | None,
        drawn_together: int,
        bar: Any,
    ) -> None:
        """Draw and judge the images of every accelerator that was not judged yet, and the true images."""
        if truth is not None and self.truth is None:
            self.truth = judge_images(detector, truth, captions, reference)
        for key, accelerator in self.unjudged():
            bar.set_description(f"images, {accelerator.name}")
            images = self._draw(captions, accelerator, drawn_together, bar.update)
            quality = judge_images(detector, images, captions, reference)
            self.rows[key] = replace(self.rows[key], quality=quality)
            self._added()

    def _draw(
        self,
        captions: Sequence[Caption],
        accelerator: AnyAccelerator,
        together: int,
        on_images: Callable[[int], Any],
    ) -> list[Image.Image]:
        """One image per caption; image i has the seed of the settings + i, whatever is drawn together."""
        images: list[Image.Image] = []
        for start in range(0, len(captions), together):
            texts = [text.text for text in captions[start : start + together]]
            with naming(accelerator):
                seed = self.settings.seed + start
                output = self.pipe(texts, accelerator=accelerator, seed=seed, **self.settings.call)
            images += output.images
            on_images(len(texts))
        return images

    def _added(self) -> None:
        if self.on_rows is not None:
            self.on_rows(self.report())


def _settings(
    pipe: Any,
    prompts: Sequence[str | int],
    captions: Sequence[Caption],
    reference: FeatureStatistics | None,
    model: str,
    seed: int,
    repeats: int,
    compiled: bool,
    call: dict[str, Any],
) -> Settings:
    return Settings(
        model=model,
        weights=weights_digest(pipe),
        dtype=str(pipe.transformer.dtype).removeprefix("torch."),
        machine=describe_machine(pipe.transformer.device),
        seed=seed,
        repeats=repeats,
        prompts=text_digest([str(prompt) for prompt in prompts]),
        images=len(captions),
        captions=text_digest([text.text for text in captions]),
        reference=None if reference is None or not captions else _describe(reference),
        call=call,
        compiled=compiled,
    )


def _check_settings(earlier: Settings, now: Settings) -> None:
    before, wanted = (json.loads(json.dumps(asdict(one), default=str)) for one in (earlier, now))
    other = [name for name in wanted if before[name] != wanted[name]]
    if other:
        named = ", ".join(f"{name} {before[name]!r} instead of {wanted[name]!r}" for name in other)
        raise InputError(f"the earlier report is of other settings, so it cannot be continued: {named}.")


def _describe(reference: FeatureStatistics) -> str:
    digest = hashlib.sha256(reference.mean.numpy().tobytes()).hexdigest()[:8]
    return f"{reference.space} of {reference.count} true images ({digest})"
