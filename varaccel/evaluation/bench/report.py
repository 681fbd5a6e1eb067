"""What a bench finds: a row per accelerator, and the settings under which all rows were measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from varaccel.accelerators import AnyAccelerator
from varaccel.accelerators.plain import Plain
from varaccel.engine.statistics import call_label
from varaccel.errors import InputError
from varaccel.evaluation.bench.comparison import Comparison, Quality, compare
from varaccel.evaluation.speed.call_speed import Measurement


@dataclass(frozen=True)
class Row:
    """Everything about one accelerator.

    Attributes:
        accelerator, options, lossless: see `Measurement`.
        speed: by batch size.
        quality: None if no images were judged (yet).
    """

    accelerator: str
    options: dict[str, Any]
    lossless: bool
    speed: dict[int, Measurement] = field(default_factory=dict)
    quality: Quality | None = None

    @property
    def label(self) -> str:
        return call_label(self.accelerator, self.options)

    @property
    def key(self) -> str:
        """The same for the same accelerator, also after a way through JSON."""
        return json.dumps([self.accelerator, self.options], sort_keys=True, default=str)

    @classmethod
    def of(cls, accelerator: AnyAccelerator) -> Self:
        """An empty row."""
        return cls(accelerator.name, accelerator.options(), accelerator.lossless)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `speed` becomes a list."""
        speed = []
        for batch, measured in sorted(self.speed.items()):
            own = asdict(measured) | {"median_seconds": measured.median_seconds}
            speed.append({"batch": batch} | {k: v for k, v in own.items() if k not in _ROW_FIELDS})
        return {
            "accelerator": self.accelerator,
            "options": self.options,
            "lossless": self.lossless,
            "speed": speed,
            "quality": self.quality and self.quality.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` made."""
        own = {name: values[name] for name in _ROW_FIELDS}
        speed = {}
        for one in values["speed"]:
            kept = {k: v for k, v in one.items() if k not in ("batch", "median_seconds")}
            speed[int(one["batch"])] = Measurement.from_dict({**own, **kept})
        quality = values["quality"]
        return cls(**own, speed=speed, quality=quality and Quality.from_dict(quality))


_ROW_FIELDS = ("accelerator", "options", "lossless")


def with_plain(accelerators: Sequence[AnyAccelerator]) -> list[AnyAccelerator]:
    """Plain decoding, then the others, each once."""
    both: list[AnyAccelerator] = [Plain(), *accelerators]
    return list({Row.of(one).key: one for one in both}.values())


@dataclass(frozen=True)
class Settings:
    """What must be equal for rows to stand in one report.

    Attributes:
        model: its name.
        weights: digest of the pipeline's weights.
        dtype, machine: precision and place of the measurement.
        seed: of the first image.
        repeats: timed rounds.
        prompts: digest of the prompts that speed was measured on.
        images: judged per accelerator.
        captions: digest of what they were asked to show.
        reference: space, number and digest of the true images; None without distances.
        call: further arguments of the pipeline call.
        compiled: whether the networks were compiled.
    """

    model: str
    weights: str
    dtype: str
    machine: str
    seed: int
    repeats: int
    prompts: str
    images: int
    captions: str
    reference: str | None
    call: dict[str, Any]
    compiled: bool = False

    @property
    def place(self) -> str:
        """The machine, and how the model ran there unless it ran in float32 as it is."""
        how = [*([] if self.dtype == "float32" else [self.dtype]), *(["compiled"] if self.compiled else [])]
        return ", ".join([self.machine, *how])


@dataclass(frozen=True)
class BenchReport:
    """Rows of one run, plain decoding first.

    Attributes:
        settings: what was measured, and where.
        rows: one per accelerator.
        truth: quality of the true images of the captions: what adherence and distance of as many images can
            reach with this detector; None if they were not judged.
    """

    settings: Settings
    rows: tuple[Row, ...]
    truth: Quality | None = None

    @property
    def batches(self) -> list[int]:
        """The batch sizes that any row was measured on."""
        return sorted({batch for row in self.rows for batch in row.speed})

    @property
    def plain(self) -> Row:
        return self.rows[0]

    def against_plain(self, row: Row) -> Comparison | None:
        """`row` beside plain decoding; None for that itself, or if either was not judged."""
        if row is self.plain or row.quality is None or self.plain.quality is None:
            return None
        return compare(row.quality, self.plain.quality)

    def best(self, batch: int, *, lossless: bool) -> Row | None:
        """The fastest row of its kind at this batch that is faster than plain decoding and as good up to noise.

        A row that was not judged against plain decoding is never the best; neither is one whose adherence or
        distance differs by more than noise, for better or worse.

        Args:
            lossless: among the lossless ones, or else among the approximate ones.
        """
        good = []
        for row in self.rows:
            versus = self.against_plain(row)
            if row.lossless is not lossless or batch not in row.speed or versus is None:
                continue
            if row.speed[batch].speedup > 1 and versus.same_adherence and versus.same_distance is not False:
                good.append(row)
        return max(good, key=lambda row: row.speed[batch].speedup, default=None)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON. `against_plain` repeats what follows from the rest."""
        rows = []
        for row in self.rows:
            versus = self.against_plain(row)
            rows.append(row.to_dict() | {"against_plain": versus and asdict(versus)})
        return {"settings": asdict(self.settings), "truth": self.truth and self.truth.to_dict(), "rows": rows}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` made.

        Raises:
            InputError: it is not from there.
        """
        try:
            truth = values["truth"]
            return cls(
                Settings(**values["settings"]),
                tuple(Row.from_dict(row) for row in values["rows"]),
                truth and Quality.from_dict(truth),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"this is no report of `varaccel bench` that can be continued ({type(error).__name__}: {error})."
            ) from error
