"""How fast accelerators are, as ratios to our own plain decoding measured in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from varaccel.decoding.accelerator import Accelerator, Plain
from varaccel.decoding.statistics import call_label
from varaccel.errors import InputError
from varaccel.evaluation.machine import describe_machine


@dataclass(frozen=True)
class Measurement:
    """One accelerator on one model and batch.

    Attributes:
        accelerator: name.
        options: its options.
        lossless: whether it keeps the law of plain decoding.
        passes, tokens_per_pass: forward passes of the model, and tokens per picture and pass.
        seconds: token time (prefill and steps) of every repetition.
        speedup: median of the ratios plain / this, each from one repetition.
        speedup_spread: smallest and largest of these ratios.
    """

    accelerator: str
    options: dict[str, Any]
    lossless: bool
    passes: int
    tokens_per_pass: float
    seconds: tuple[float, ...]
    speedup: float
    speedup_spread: tuple[float, float]

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def label(self) -> str:
        return call_label(self.accelerator, self.options)


@dataclass(frozen=True)
class SpeedReport:
    """Measurements of one run, plain decoding first, and the machine they were made on."""

    machine: str
    batch: int
    repeats: int
    measurements: tuple[Measurement, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_speed(
    pipe: Any,
    prompts: Sequence[str | int],
    accelerators: Sequence[Accelerator],
    *,
    repeats: int = 5,
    seed: int = 0,
    **call: Any,
) -> SpeedReport:
    """Time accelerators against plain decoding of the same prompts and seeds.

    Every repetition runs plain decoding and every accelerator once, in turn, so that a machine that slows
    down meets all of them; ratios are taken within a repetition. One unmeasured round warms up.

    Args:
        pipe: a pipeline; its progress bar is left as it is.
        prompts: one batch.
        accelerators: to be compared; plain decoding is added in front.
        repeats: measured rounds, at least 1.
        call: further arguments of the pipeline call, such as guidance_scale.

    Raises:
        InputError: fewer than one repetition.
    """
    if repeats < 1:
        raise InputError(f"repeats must be at least 1, got {repeats}.")
    candidates = [Plain(), *(a for a in accelerators if not isinstance(a, Plain))]
    seconds: list[list[float]] = [[] for _ in candidates]
    stats: list[Any] = [None] * len(candidates)
    with tqdm(total=(repeats + 1) * len(candidates), desc="measuring", unit="call", leave=False) as bar:
        for repeat in range(repeats + 1):
            for index, accelerator in enumerate(candidates):
                output = pipe(list(prompts), accelerator=accelerator, seed=seed, output_type="latent", **call)
                stats[index] = output.stats
                if repeat:
                    seconds[index].append(output.stats.seconds["tokens"])
                bar.update()
    measurements = []
    for own, stat in zip(seconds, stats, strict=True):
        ratios = [plain / mine for plain, mine in zip(seconds[0], own, strict=True)]
        measurements.append(
            Measurement(
                accelerator=stat.accelerator,
                options=stat.options,
                lossless=stat.lossless,
                passes=stat.passes,
                tokens_per_pass=stat.tokens_per_pass,
                seconds=tuple(own),
                speedup=statistics.median(ratios),
                speedup_spread=(min(ratios), max(ratios)),
            )
        )
    machine = describe_machine(pipe.transformer.device)
    return SpeedReport(machine, len(prompts), repeats, tuple(measurements))
