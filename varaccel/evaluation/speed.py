"""How fast accelerators are, as ratios to our own plain decoding measured in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from tqdm import tqdm

from varaccel import Plain
from varaccel.decoding.accelerator import Accelerator
from varaccel.decoding.statistics import Statistics, call_label
from varaccel.errors import InputError
from varaccel.evaluation.machine import describe_machine

_COMMON = {
    *("accelerator", "options", "lossless", "images", "tokens", "passes", "rows", "cache_bytes", "seconds"),
    *("device", "dtype", "tokens_per_pass", "total_seconds"),
}
"""What the statistics of every call hold; whatever else they hold belongs to the accelerator."""


@dataclass(frozen=True)
class Measurement:
    """One accelerator on one model and batch.

    Attributes:
        accelerator: name.
        options: its options.
        lossless: whether it keeps the law of plain decoding.
        passes: forward passes of the model per call, the mean of all repetitions. All pictures of a batch share
            them, so a batch whose pictures advance at their own pace counts as many as its slowest one.
        tokens_per_pass: tokens of one picture over `passes`.
        seconds: token time (prefill and steps) of every repetition.
        speedup: median of the ratios plain / this, each from one repetition.
        speedup_spread: smallest and largest of these ratios.
        cache_bytes: most memory that keys and values took at one time, of the last repetition.
        details: what else the statistics of its calls tell, such as accepted lengths: one value per repetition.
    """

    accelerator: str
    options: dict[str, Any]
    lossless: bool
    passes: float
    tokens_per_pass: float
    seconds: tuple[float, ...]
    speedup: float
    speedup_spread: tuple[float, float]
    cache_bytes: int = 0
    details: dict[str, list[Any]] = field(default_factory=dict)

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
    batch: int | None = None,
    repeats: int = 5,
    seed: int = 0,
    on_call: Callable[[Accelerator], None] | None = None,
    **call: Any,
) -> SpeedReport:
    """Time accelerators against plain decoding of the same prompts and seeds.

    Every repetition runs plain decoding and every accelerator once, in turn, so that a machine that slows
    down meets all of them; ratios are taken within a repetition. One unmeasured round warms up. Repetitions take
    the batches of `prompts` in turn, because the passes of some accelerators depend on the picture.

    Args:
        pipe: a pipeline; its progress bar is left as it is.
        prompts: one batch, or several of `batch` prompts each; what is left over is not used.
        accelerators: to be compared; plain decoding is added in front.
        batch: prompts per call, by default all of them.
        repeats: measured rounds, at least 1.
        seed: the picture of prompt i is drawn with seed `seed` + i.
        on_call: called after every call with what it ran; replaces the progress bar.
        call: further arguments of the pipeline call, such as guidance_scale.

    Raises:
        InputError: fewer than one repetition; fewer prompts than a batch; an accelerator that cannot be used
            here, by its label.
    """
    if repeats < 1:
        raise InputError(f"repeats must be at least 1, got {repeats}.")
    batch = len(prompts) if batch is None else batch
    if not 1 <= batch <= len(prompts):
        raise InputError(f"a batch of {batch} needs as many prompts and at least one, got {len(prompts)}.")
    candidates = [Plain(), *(a for a in accelerators if not isinstance(a, Plain))]
    stats: list[list[Statistics]] = [[] for _ in candidates]
    total = (repeats + 1) * len(candidates)
    with tqdm(total=total, desc="measuring", unit="call", leave=False, disable=on_call is not None) as bar:
        for repeat in range(repeats + 1):
            start = max(0, repeat - 1) % (len(prompts) // batch) * batch
            for own, accelerator in zip(stats, candidates, strict=True):
                with naming(accelerator):
                    output = pipe(
                        list(prompts[start : start + batch]),
                        accelerator=accelerator,
                        seed=seed + start,
                        output_type="latent",
                        **call,
                    )
                if repeat:
                    own.append(output.stats)
                bar.update()
                if on_call is not None:
                    on_call(accelerator)
    measurements = tuple(_summary(own, stats[0]) for own in stats)
    return SpeedReport(describe_machine(pipe.transformer.device), batch, repeats, measurements)


@contextmanager
def naming(accelerator: Accelerator) -> Iterator[None]:
    """Say in the sentence of an InputError which of several accelerators it is about.

    What plain decoding refuses is no fault of an accelerator and stays as it is.
    """
    try:
        yield
    except InputError as error:
        if isinstance(accelerator, Plain):
            raise
        raise InputError(f"{call_label(accelerator.name, accelerator.options())}: {error}") from error


def _summary(own: Sequence[Statistics], plain: Sequence[Statistics]) -> Measurement:
    """The measurement of one accelerator from its calls and those of plain decoding beside them."""
    seconds = [stat.seconds["tokens"] for stat in own]
    ratios = [p.seconds["tokens"] / mine for p, mine in zip(plain, seconds, strict=True)]
    passes = statistics.fmean(stat.passes for stat in own)
    told = [stat.to_dict() for stat in own]
    # plain decoding and others have nothing to tell there
    special = [key for key in told[0] if key not in _COMMON and any(one.get(key) for one in told)]
    return Measurement(
        accelerator=own[0].accelerator,
        options=own[0].options,
        lossless=own[0].lossless,
        passes=passes,
        tokens_per_pass=own[0].tokens / passes,
        seconds=tuple(seconds),
        speedup=statistics.median(ratios),
        speedup_spread=(min(ratios), max(ratios)),
        cache_bytes=own[-1].cache_bytes,
        details={key: [one.get(key) for one in told] for key in special},
    )
