"""Speed over batch sizes, eager and compiled, beside the least time that the device allows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Self

import torch
from tqdm import tqdm

from varaccel.accelerators import Accelerator
from varaccel.accelerators.plain import Plain
from varaccel.errors import InputError
from varaccel.evaluation.bench.run import broken_call, call_lines
from varaccel.evaluation.speed.call_speed import Measurement, measure_speed, naming
from varaccel.evaluation.speed.machine import describe_machine
from varaccel.evaluation.speed.roofline import Floor, Work, count_work, floor_of, is_compiled, mean_work

if TYPE_CHECKING:
    from rich.console import Group

_GRAPH_WARMUPS = 3
"""Calls of a compiled network on a GPU until it replays its CUDA graphs: compile, record, replay."""

_WIDTHS = {
    **{
        "accelerator": 16,
        "distribution": 11,
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
            ["accelerator", "distribution", "batch", "passes", "tokens per pass", *_TIMES],
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
        header = ["accelerator", "distribution", "batch", "passes", "tokens per pass"]
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
            "distribution": "lossless" if one.lossless else "approximate",
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


# -- the run -------------------------------------------------------------------------------------------


def sweep(
    pipe: Any,
    accelerators: Sequence[Accelerator],
    prompts: Sequence[str | int],
    batches: Sequence[int] = (1,),
    repeats: int = 5,
    *,
    compiled: Sequence[bool] = (False,),
    seed: int = 0,
    decode: bool = True,
    model: str = "",
    progress: bool = True,
    on_entries: Callable[[SweepReport], None] | None = None,
    **call: Any,
) -> SweepReport:
    """Time accelerators against plain decoding at every batch size, and count what their calls must at least take.

    At each batch size all accelerators take turns with plain decoding, see `measure_speed`: once with the eager
    network and once with the compiled one, as `compiled` says. Compiled accelerators are compared with compiled plain
    decoding. What compiling gains is measured apart, on rounds in which eager and compiled plain decoding take turns.

    Args:
        pipe: a pipeline that is not compiled; it is not afterwards either.
        accelerators: to be compared; plain decoding is added in front.
        prompts: at least the largest batch; up to `repeats` batches of them are used.
        batches: images per call.
        repeats: timed rounds, at least 1.
        compiled: (False,) for eager, (True,) for compiled, (False, True) for both.
        seed: the image of prompt i is drawn with seed `seed` + i.
        decode: also make pixels, so that whole calls can be compared.
        model: name for the report.
        progress: show a bar over everything.
        on_entries: called with the report so far whenever entries have been added, to save it.
        call: further arguments of the pipeline call, such as guidance_scale.

    Raises:
        InputError: batches or repeats that cannot be; a pipeline that is compiled; an accelerator that cannot be used
            here, by its label.
    """
    if not batches or min(batches) < 1 or max(batches) > len(prompts):
        raise InputError(
            f"batches are 1 to as many images as there are prompts ({len(prompts)}), got {list(batches)}."
        )
    if repeats < 1:
        raise InputError(f"repeats must be at least 1, got {repeats}.")
    if not compiled:
        raise InputError("compiled must name at least one of False and True.")
    if is_compiled(pipe):
        raise InputError("the pipeline is compiled already; pass it as it was loaded.")
    device, dtype = pipe.transformer.device, pipe.transformer.dtype
    candidates = [Plain(), *(one for one in accelerators if not isinstance(one, Plain))]
    modes, sizes = sorted(set(compiled)), list(dict.fromkeys(batches))
    warmups = {mode: _GRAPH_WARMUPS if mode and device.type == "cuda" else 1 for mode in modes}
    switch = _Switch(pipe) if True in modes else None
    entries: list[Entry] = []
    gains: list[CompileGain] = []

    def report() -> SweepReport:
        return SweepReport(
            model=model,
            machine=describe_machine(device),
            threads=torch.get_num_threads(),
            dtype=str(dtype).removeprefix("torch."),
            repeats=repeats,
            seed=seed,
            decoded=decode,
            call=call,
            entries=tuple(entries),
            gains=tuple(gains),
        )

    # one call of each accelerator and batch of prompts to count, the rounds, and the turns of plain decoding
    total = sum(len(candidates) * min(repeats, len(prompts) // batch) for batch in sizes)
    total += sum(len(candidates) * (repeats + warmups[mode]) for mode, _ in product(modes, sizes))
    total += 0 if switch is None else 2 * (repeats + warmups[True]) * len(sizes)
    with tqdm(total=total, unit="call", disable=not progress, leave=False) as bar:
        for batch in sizes:
            bar.set_description(f"counting, batch {batch}")
            floors = []
            for accelerator in candidates:
                works: list[Work] = []
                for turn in range(min(repeats, len(prompts) // batch)):
                    part = prompts[turn * batch : (turn + 1) * batch]
                    with naming(accelerator):
                        works.append(count_work(pipe, part, accelerator, seed=seed + turn * batch, **call))
                    bar.update()
                floors.append(floor_of(mean_work(works), device, dtype))
            for mode in modes:
                bar.set_description(f"{'compiled' if mode else 'eager'}, batch {batch}")
                with _compiled(switch if mode else None):
                    measured = measure_speed(
                        pipe,
                        prompts,
                        candidates,
                        batch=batch,
                        repeats=repeats,
                        seed=seed,
                        decode=decode,
                        warmups=warmups[mode],
                        on_call=lambda _: bar.update(),
                        **call,
                    )
                timed = zip(measured.measurements, floors, strict=True)
                entries += [Entry(batch, mode, one, floor) for one, floor in timed]
            if switch is not None:
                bar.set_description(f"eager and compiled, batch {batch}")

                def plain(batch: int = batch) -> float:
                    output = pipe(list(prompts[:batch]), seed=seed, output_type="latent", **call)
                    bar.update()
                    return output.stats.seconds["tokens"]

                gains.append(_gain(plain, switch, batch, repeats, warmups[True]))
            if on_entries is not None:
                on_entries(report())
    return report()


class _Switch:
    """Compiles a pipeline and keeps what that changed, so that it can be switched off and on again.

    Raises:
        InputError: it changed no attribute of the pipeline.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        before = dict(vars(pipe))
        pipe.compile()
        self.on = {name: value for name, value in vars(pipe).items() if before.get(name) is not value}
        if not self.on:
            raise InputError(
                "this pipeline's compile() sets nothing that could be switched off; sweep it eagerly."
            )
        self.off = {name: before[name] for name in self.on}
        self.set(False)

    def set(self, on: bool) -> None:
        vars(self.pipe).update(self.on if on else self.off)


@contextmanager
def _compiled(switch: _Switch | None) -> Iterator[None]:
    """Run a block with the compiled network; with the eager one without a switch."""
    if switch is None:
        yield
        return
    switch.set(True)
    try:
        yield
    finally:
        switch.set(False)


def _gain(plain: Callable[[], float], switch: _Switch, batch: int, repeats: int, warmups: int) -> CompileGain:
    """Let eager and compiled plain decoding take turns."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(-warmups, repeats):
        for on, kept in seconds.items():
            with _compiled(switch if on else None):
                taken = plain()
            if repeat >= 0:
                kept.append(taken)
    return CompileGain(batch, tuple(seconds[False]), tuple(seconds[True]))
