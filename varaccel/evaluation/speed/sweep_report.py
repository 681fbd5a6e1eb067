"""What a sweep over batch sizes finds: speed by phase, eager and compiled, beside the least time possible."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from varaccel.errors import InputError
from varaccel.evaluation.call_text import broken_call, call_lines, quality_label
from varaccel.evaluation.speed.call_speed import Measurement
from varaccel.evaluation.speed.roofline import Floor

if TYPE_CHECKING:
    from rich.console import Group

_WIDTHS = {
    **{
        "accelerator": 16,
        "quality": 11,
        "batch": 8,
        "passes": 6,
        "tokens per pass": 6,
        "seconds (range)": 8,
    },
    **{"speed-up (range)": 8, "whole call": 6, "text (ms)": 5, "prefill (ms)": 7},
    **{"steps (ms)": 6, "decode (ms)": 6, "peak (MB)": 5, "floor (s)": 10, "reached": 7},
}
"""Letters of each column in a terminal."""

_PHASES = ("text", "prefill", "steps", "decode")

_TIMES = ("seconds (range)", "speed-up (range)", "whole call")
_LIMITS = ("peak (MB)", "floor (s)", "reached")

_NOTES = (
    "Seconds are of the token phase (prefill and steps), median and range of all rounds; text, prefill, steps and "
    "decode are medians. Speed-ups are ratios to plain decoding within a round, of the token phase and of the whole "
    "call; a compiled network is compared with compiled plain decoding.",
    "Floor: the longer of reading the weights of every pass at the speed of a large copy (memory) and of doing its "
    "products at the speed of large ones (arithmetic); caches, activations and launches left out. Reached: floor over "
    "median seconds.",
)


@dataclass(frozen=True)
class Entry:
    """One accelerator at one batch size, eager or compiled.

    Attributes:
        batch: images per call.
        compiled: whether the network was compiled, and that of plain decoding beside it.
        measurement: its speed.
        floor: least time of its calls, the mean over the batches of prompts that were timed; counted on the eager
            network, which does no more than the compiled one.
    """

    batch: int
    compiled: bool
    measurement: Measurement
    floor: Floor

    @property
    def reached(self) -> float:
        """The floor over the median token time: 1 could not be quicker."""
        return self.floor.seconds / self.measurement.median_seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with those that follow from the others."""
        timed = asdict(self.measurement) | {"median_seconds": self.measurement.median_seconds}
        return {
            "batch": self.batch,
            "compiled": self.compiled,
            "measurement": timed,
            "floor": self.floor.to_dict(),
            "reached": self.reached,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` made."""
        timed = {k: v for k, v in values["measurement"].items() if k != "median_seconds"}
        names = Floor.__dataclass_fields__
        floor = Floor(**{k: v for k, v in values["floor"].items() if k in names})
        return cls(values["batch"], values["compiled"], Measurement.from_dict(timed), floor)


@dataclass(frozen=True)
class CompileGain:
    """What compiling gains plain decoding; eager and compiled calls took turns.

    Attributes:
        batch: images per call.
        eager_seconds, compiled_seconds: token time of every round.
    """

    batch: int
    eager_seconds: tuple[float, ...]
    compiled_seconds: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Eager over compiled, of every round."""
        return [e / c for e, c in zip(self.eager_seconds, self.compiled_seconds, strict=True)]

    @property
    def speedup(self) -> float:
        return statistics.median(self.ratios)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with those that follow from the others."""
        return asdict(self) | {"speedup": self.speedup, "spread": (min(self.ratios), max(self.ratios))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` made."""
        return cls(values["batch"], tuple(values["eager_seconds"]), tuple(values["compiled_seconds"]))

    def __str__(self) -> str:
        low, high = min(self.ratios), max(self.ratios)
        return (
            f"Compiled plain decoding is {self.speedup:.2f}x eager plain decoding ({low:.2f} to {high:.2f}) at "
            f"batch {self.batch}, both in turn."
        )


@dataclass(frozen=True)
class SweepReport:
    """Speed and floors of one run.

    Attributes:
        model: its name.
        machine: see `describe_machine`.
        threads: of torch, on the CPU.
        dtype: number type of the host model.
        repeats: timed rounds.
        seed: of the first image.
        decoded: whether the calls made pixels too.
        call: further arguments of the pipeline call.
        entries: by batch size, eager before compiled, plain decoding first.
        gains: of compiling, by batch size; empty if nothing was compiled.
    """

    model: str
    machine: str
    threads: int
    dtype: str
    repeats: int
    seed: int
    decoded: bool
    call: dict[str, Any]
    entries: tuple[Entry, ...]
    gains: tuple[CompileGain, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        parts = {name: [one.to_dict() for one in own[name]] for name in ("entries", "gains")}
        return {**own, **parts}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` made.

        Raises:
            InputError: it is not from there.
        """
        try:
            entries = tuple(Entry.from_dict(one) for one in values["entries"])
            gains = tuple(CompileGain.from_dict(one) for one in values["gains"])
            return cls(**{**values, "entries": entries, "gains": gains})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"this is no report of a speed sweep ({type(error).__name__}: {error})."
            ) from error

    # -- shown ---------------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """What was measured, and where."""
        return f"{self.model}, {self.dtype}, {self.repeats} rounds, {self.machine}"

    @property
    def notes(self) -> list[str]:
        """What the columns mean, and what compiling gained."""
        return [*(str(gain) for gain in self.gains), *_NOTES]

    def table(self) -> Group:
        """Tables for a terminal of 80 columns: times, then phases, memory and floors."""
        from rich import box
        from rich.console import Group
        from rich.table import Column, Table

        shown = [
            ["accelerator", "quality", "batch", "passes", "tokens per pass", *_TIMES],
            ["accelerator", "batch", *self._phases, *_LIMITS],
        ]
        lines = [self._cells(entry) for entry in self.entries]
        tables = []
        for title, header in zip((self.title, "phases, memory and floor"), shown, strict=True):
            table = Table(
                *(Column(name, width=_WIDTHS[name]) for name in header),
                title=title,
                box=box.SIMPLE_HEAD,
                padding=0,
                pad_edge=False,
            )
            for cells in lines:
                table.add_row(
                    broken_call(cells["accelerator"], _WIDTHS["accelerator"]),
                    *(cells[name] for name in header[1:]),
                )
            tables.append(table)
        return Group(*tables, *self.notes)

    def markdown(self) -> str:
        """The same in one table in Markdown."""
        header = ["accelerator", "quality", "batch", "passes", "tokens per pass"]
        header += [*_TIMES[:1], *self._phases, *_TIMES[1:], *_LIMITS]
        rows = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
        for entry in self.entries:
            cells = self._cells(entry)
            rows.append([cells[name].replace("\n", " ").replace("|", "\\|") for name in header])
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return "\n\n".join([f"{self.title}:", table, *self.notes]) + "\n"

    @property
    def _phases(self) -> list[str]:
        """Columns of the phases that were timed."""
        return [f"{name} (ms)" for name in (_PHASES if self.decoded else _PHASES[:-1])]

    def _cells(self, entry: Entry) -> dict[str, str]:
        """What to show of an entry, by column."""
        one, floor = entry.measurement, entry.floor
        low, high = one.speedup_spread
        total = one.total_speedup
        return {
            "accelerator": call_lines(one.accelerator, one.options),
            "quality": quality_label(one.lossless),
            "batch": f"{entry.batch}\ncompiled" if entry.compiled else str(entry.batch),
            "passes": f"{one.passes:.4g}",
            "tokens per pass": f"{one.tokens_per_pass:.2f}",
            "seconds (range)": f"{one.median_seconds:.3g}\n({_range(one.seconds)})",
            **{f"{name} (ms)": _milliseconds(seconds) for name, seconds in one.phases.items()},
            "speed-up (range)": f"{one.speedup:.2f}x\n({low:.2f} to {high:.2f})",
            "whole call": "-" if total is None else f"{total:.2f}x",
            "peak (MB)": "-" if one.peak_bytes is None else f"{one.peak_bytes / 1e6:.0f}",
            "floor (s)": f"{floor.seconds:.3g}\n{floor.binds}",
            "reached": f"{100 * entry.reached:.2g} %",
        }


def _milliseconds(seconds: Sequence[float]) -> str:
    """The median, to three digits or whole milliseconds."""
    value = 1000 * statistics.median(seconds)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _range(values: Iterable[float]) -> str:
    kept = list(values)
    return f"{min(kept):.3g} to {max(kept):.3g}"
