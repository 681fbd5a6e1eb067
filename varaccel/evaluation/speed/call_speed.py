"""How fast accelerators are, as ratios to our own plain decoding measured in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from tqdm import tqdm

from varaccel.accelerators import AnyAccelerator
from varaccel.accelerators.plain import Plain
from varaccel.engine.statistics import Statistics, call_label
from varaccel.errors import InputError
from varaccel.evaluation.speed.machine import describe_machine
from varaccel.evaluation.speed.peak_memory import PeakMemory

_COMMON = {
    *("accelerator", "options", "lossless", "images", "tokens", "passes", "rows", "cache_bytes", "seconds"),
    *("device", "dtype", "tokens_per_pass", "total_seconds", "first_pass_seconds", "batch_size"),
}
"""What the statistics of every call hold; whatever else they hold belongs to the accelerator."""


@dataclass(frozen=True)
class Measurement:
    """One accelerator on one model and batch.

    Attributes:
        accelerator: name.
        options: its options.
        lossless: whether it keeps the distribution of plain decoding.
        passes: forward passes of the model per call, the mean of all repetitions. All images of a batch share
            them, so a batch whose images advance at their own pace counts as many as its slowest one.
        tokens_per_pass: tokens of one image over `passes`.
        seconds: token time (prefill and steps) of every repetition.
        speedup: median of the ratios plain / this, each from one repetition.
        speedup_spread: smallest and largest of these ratios.
        cache_bytes: most memory that keys and values took at one time, of the last repetition.
        details: what else the statistics of its calls tell, such as accepted lengths: one value per repetition.
        phases: seconds of every repetition by phase: "text", "prefill" (the first pass, see `Statistics`), "steps" (the
            rest of the token time) and, if the calls decoded to pixels, "decode". Empty in reports of old.
        peak_bytes: most memory at one time during any of its calls, see `PeakMemory`; None if unknown.
        total_speedup: median of the ratios plain / this of whole calls, text encoder and pixels included; None if the
            calls did not decode to pixels.
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
    phases: dict[str, tuple[float, ...]] = field(default_factory=dict)
    peak_bytes: int | None = None
    total_speedup: float | None = None

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def label(self) -> str:
        return call_label(self.accelerator, self.options)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `asdict` made, also after a way through JSON; later fields may be missing."""
        phases = {name: tuple(seconds) for name, seconds in values.get("phases", {}).items()}
        pairs = {name: tuple(values[name]) for name in ("seconds", "speedup_spread")}
        return cls(**{**values, **pairs, "phases": phases})


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
    accelerators: Sequence[AnyAccelerator],
    *,
    batch: int | None = None,
    repeats: int = 5,
    seed: int = 0,
    decode: bool = False,
    warmups: int = 1,
    on_call: Callable[[AnyAccelerator], None] | None = None,
    **call: Any,
) -> SpeedReport:
    """Time accelerators against plain decoding of the same prompts and seeds.

    Every repetition runs plain decoding and every accelerator once, in turn, so that a machine that slows
    down meets all of them; ratios are taken within a repetition. Unmeasured rounds warm up. Repetitions take the
    batches of `prompts` in turn, because the passes of some accelerators depend on the image.

    Args:
        pipe: a pipeline; its progress bar is left as it is.
        prompts: one batch, or several of `batch` prompts each; what is left over is not used.
        accelerators: to be compared; plain decoding is added in front.
        batch: prompts per call, by default all of them.
        repeats: measured rounds, at least 1.
        seed: the image of prompt i is drawn with seed `seed` + i.
        decode: also make pixels of the tokens, so that whole calls can be compared.
        warmups: unmeasured rounds, at least 1; a CUDA graph is recorded in the second call and replayed from the third.
        on_call: called after every call with what it ran; replaces the progress bar.
        call: further arguments of the pipeline call, such as guidance_scale.

    Raises:
        InputError: fewer than one repetition or warm-up round; fewer prompts than a batch; an accelerator that cannot
            be used here, by its label.
    """
    if repeats < 1:
        raise InputError(f"repeats must be at least 1, got {repeats}.")
    if warmups < 1:
        raise InputError(f"warmups must be at least 1, got {warmups}.")
    batch = len(prompts) if batch is None else batch
    if not 1 <= batch <= len(prompts):
        raise InputError(f"a batch of {batch} needs as many prompts and at least one, got {len(prompts)}.")
    candidates = beside_plain(accelerators)
    stats: list[list[Statistics]] = [[] for _ in candidates]
    peaks: list[list[int | None]] = [[] for _ in candidates]
    device = pipe.transformer.device
    total = (repeats + warmups) * len(candidates)
    with tqdm(
        total=total, desc="measuring", unit="call", leave=False, disable=on_call is not None or None
    ) as bar:
        for repeat in range(-warmups, repeats):
            start = max(0, repeat) % (len(prompts) // batch) * batch
            for own, peak, accelerator in zip(stats, peaks, candidates, strict=True):
                with naming(accelerator), PeakMemory(device) as memory:
                    output = pipe(
                        list(prompts[start : start + batch]),
                        accelerator=accelerator,
                        seed=seed + start,
                        output_type="pt" if decode else "latent",
                        **call,
                    )
                if repeat >= 0:
                    own.append(output.stats)
                    peak.append(memory.bytes)
                bar.update()
                if on_call is not None:
                    on_call(accelerator)
    measurements = tuple(
        _summary(own, stats[0], peak, decode) for own, peak in zip(stats, peaks, strict=True)
    )
    return SpeedReport(describe_machine(device), batch, repeats, measurements)


def beside_plain(accelerators: Sequence[AnyAccelerator]) -> list[AnyAccelerator]:
    """Plain decoding, then the others."""
    return [Plain(), *(one for one in accelerators if not isinstance(one, Plain))]


@contextmanager
def naming(accelerator: AnyAccelerator) -> Iterator[None]:
    """Say in the sentence of an InputError which of several accelerators it is about.

    What plain decoding refuses is no fault of an accelerator and stays as it is.
    """
    try:
        yield
    except InputError as error:
        if isinstance(accelerator, Plain):
            raise
        raise InputError(f"{call_label(accelerator.name, accelerator.options())}: {error}") from error


def _summary(
    own: Sequence[Statistics], plain: Sequence[Statistics], peaks: Sequence[int | None], decoded: bool
) -> Measurement:
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
        phases=_phases(seconds, own, told, decoded),
        peak_bytes=max((peak for peak in peaks if peak is not None), default=None),
        total_speedup=_total_speedup(own, plain) if decoded else None,
    )


def _phases(
    tokens: Sequence[float], own: Sequence[Statistics], told: Sequence[dict[str, Any]], decoded: bool
) -> dict[str, tuple[float, ...]]:
    """Seconds of every call by phase; `told` are the calls' statistics as plain values."""
    prefill = [one.get("first_pass_seconds", 0.0) for one in told]
    phases = {
        "text": tuple(stat.seconds.get("text", 0.0) for stat in own),
        "prefill": tuple(prefill),
        "steps": tuple(whole - first for whole, first in zip(tokens, prefill, strict=True)),
    }
    return phases | ({"decode": tuple(stat.seconds["decode"] for stat in own)} if decoded else {})


def _total_speedup(own: Sequence[Statistics], plain: Sequence[Statistics]) -> float:
    return statistics.median(p.total_seconds / mine.total_seconds for p, mine in zip(plain, own, strict=True))
