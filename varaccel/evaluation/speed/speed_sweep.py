"""Speed over batch sizes, eager and compiled, beside the least time that the device allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from tqdm import tqdm

from varaccel.accelerators import AnyAccelerator
from varaccel.errors import InputError
from varaccel.evaluation.speed.call_speed import beside_plain, measure_speed, naming
from varaccel.evaluation.speed.machine import describe_machine
from varaccel.evaluation.speed.roofline import Floor, Work, count_work, floor_of, mean_work
from varaccel.evaluation.speed.sweep_report import CompileGain, Entry, SweepReport
from varaccel.nn.devices import is_gpu

_GRAPH_WARMUPS = 3
"""Calls of a compiled network on a GPU until it replays its CUDA graphs: compile, record, replay."""


def sweep(
    pipe: Any,
    accelerators: Sequence[AnyAccelerator],
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
    if pipe.is_compiled:
        raise InputError("the pipeline is compiled already; pass it as it was loaded.")
    started = SweepReport(
        model=model,
        machine=describe_machine(pipe.transformer.device),
        threads=torch.get_num_threads(),
        dtype=str(pipe.transformer.dtype).removeprefix("torch."),
        repeats=repeats,
        seed=seed,
        decoded=decode,
        call=call,
        entries=(),
    )
    run = _Sweep(pipe, accelerators, prompts, sorted(set(compiled)), started)
    sizes = list(dict.fromkeys(batches))
    with tqdm(total=run.calls(sizes), unit="call", disable=not progress or None, leave=False) as bar:
        for batch in sizes:
            run.add(batch, bar)
            if on_entries is not None:
                on_entries(run.report())
    return run.report()


class _Sweep:
    """The entries of a sweep as they are measured.

    Args:
        modes: whether the network is compiled, once or twice.
        started: the report before anything is measured.
    """

    def __init__(
        self,
        pipe: Any,
        accelerators: Sequence[AnyAccelerator],
        prompts: Sequence[str | int],
        modes: Sequence[bool],
        started: SweepReport,
    ) -> None:
        self.pipe, self.prompts, self.modes, self.started = pipe, prompts, modes, started
        self.candidates = beside_plain(accelerators)
        self.device = pipe.transformer.device
        on_gpu = is_gpu(self.device)
        self.warmups = {mode: _GRAPH_WARMUPS if mode and on_gpu else 1 for mode in (False, True)}
        self.entries: list[Entry] = []
        self.gains: list[CompileGain] = []

    def report(self) -> SweepReport:
        """What was measured so far."""
        return replace(self.started, entries=tuple(self.entries), gains=tuple(self.gains))

    def calls(self, sizes: Sequence[int]) -> int:
        """All calls: one of each accelerator and batch of prompts to count, the rounds, the turns of plain decoding."""
        repeats, candidates = self.started.repeats, len(self.candidates)
        counted = sum(candidates * len(self._starts(batch)) for batch in sizes)
        timed = sum(candidates * (repeats + self.warmups[mode]) for mode, _ in product(self.modes, sizes))
        turns = 2 * (True in self.modes) * (repeats + self.warmups[True]) * len(sizes)
        return counted + timed + turns

    def add(self, batch: int, bar: Any) -> None:
        """Measure one batch size."""
        bar.set_description(f"counting, batch {batch}")
        floors = [self._floor(accelerator, batch, bar) for accelerator in self.candidates]
        for mode in self.modes:
            bar.set_description(f"{'compiled' if mode else 'eager'}, batch {batch}")
            with _compiled(self.pipe, mode):
                measured = measure_speed(
                    self.pipe,
                    self.prompts,
                    self.candidates,
                    batch=batch,
                    repeats=self.started.repeats,
                    seed=self.started.seed,
                    decode=self.started.decoded,
                    warmups=self.warmups[mode],
                    on_call=lambda _: bar.update(),
                    **self.started.call,
                )
            timed = zip(measured.measurements, floors, strict=True)
            self.entries += [Entry(batch, mode, one, floor) for one, floor in timed]
        if True in self.modes:
            bar.set_description(f"eager and compiled, batch {batch}")
            self.gains.append(self._gain(batch, bar))

    def _starts(self, batch: int) -> range:
        """Where the batches of prompts begin that the rounds use."""
        return range(0, min(self.started.repeats, len(self.prompts) // batch) * batch, batch)

    def _floor(self, accelerator: AnyAccelerator, batch: int, bar: Any) -> Floor:
        """The least time of an accelerator's calls, the mean over the batches of prompts."""
        works: list[Work] = []
        for start in self._starts(batch):
            part, seed = self.prompts[start : start + batch], self.started.seed + start
            with naming(accelerator):
                works.append(count_work(self.pipe, part, accelerator, seed=seed, **self.started.call))
            bar.update()
        return floor_of(mean_work(works), self.device, self.pipe.transformer.dtype)

    def _gain(self, batch: int, bar: Any) -> CompileGain:
        """Let eager and compiled plain decoding take turns."""
        seconds: dict[bool, list[float]] = {False: [], True: []}
        prompts = list(self.prompts[:batch])
        for repeat in range(-self.warmups[True], self.started.repeats):
            for on, kept in seconds.items():
                with _compiled(self.pipe, on):
                    output = self.pipe(
                        prompts, seed=self.started.seed, output_type="latent", **self.started.call
                    )
                bar.update()
                if repeat >= 0:
                    kept.append(output.stats.seconds["tokens"])
        return CompileGain(batch, tuple(seconds[False]), tuple(seconds[True]))


@contextmanager
def _compiled(pipe: Any, on: bool) -> Iterator[None]:
    """Run a block with the compiled networks; with the eager ones if not `on`. What was compiled is kept.

    Raises:
        InputError: there is no compiler.
    """
    if not on:
        yield
        return
    pipe.compile()
    if not pipe.is_compiled:
        raise InputError("this pipeline cannot be compiled here; sweep it eagerly.")
    try:
        yield
    finally:
        pipe.uncompile()
