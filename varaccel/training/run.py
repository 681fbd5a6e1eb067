"""A training run: its folder, budget, learning-rate schedule, checkpoint, resume and loss curve.

Every trainer of the library is a loop around these pieces, so that all of them stop on a step count or on a
time budget, survive being killed at any moment, and leave the same log behind.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from varaccel.errors import CheckpointError, InputError
from varaccel.files import atomic_path


def model_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers config without the library's own entries, which start with "_" and differ from process to process."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


class Stateful(Protocol):
    """Anything with the state_dict / load_state_dict pair: modules, optimisers, averages."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


@dataclass(frozen=True)
class Budget:
    """When a run ends: after `steps` optimiser steps or `minutes` of training or at a time, whichever comes first.

    Attributes:
        until: seconds since the epoch, as of `time.time`. For runs that share a limited time with other work: what
            comes before them, imports and compilation included, shortens them.
    """

    steps: int | None = None
    minutes: float | None = None
    until: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None and self.until is None:
            raise InputError("a training budget needs steps, minutes or a time when it ends.")

    def progress(self, step: int, seconds: float) -> float:
        """The share of the budget already spent, 0 at the start and >= 1 when the run is over."""
        by_steps = step / self.steps if self.steps else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(by_steps, by_time, self._by_clock(seconds))

    def _by_clock(self, seconds: float) -> float:
        if self.until is None:
            return 0.0
        left = max(0.0, self.until - time.time())
        # of what it trained and will have trained by then, so that a resumed run goes on from where it was
        return seconds / (seconds + left) if left else 1.0


@dataclass(frozen=True)
class Schedule:
    """Warm-up, constant, then decay to `floor` over the last `decay` share of the budget (WSD).

    Unlike a cosine it does not need to know the length in advance: a run that gets a larger budget is
    resumed from its constant part without a jump.
    """

    peak: float
    warmup_steps: int = 200
    decay: float = 0.3
    floor: float = 0.02

    def __call__(self, step: int, progress: float) -> float:
        rate = self.peak * min(1.0, (step + 1) / max(1, self.warmup_steps))
        if progress > 1 - self.decay:
            left = max(0.0, (1 - progress) / self.decay)
            rate *= self.floor + (1 - self.floor) * left
        return rate


class ExponentialAverage:
    """Exponential moving average of a module's floating-point parameters, kept in float32.

    The decay grows with the step count, min(decay, (1 + n) / (10 + n)), so that a short run is not
    dominated by its random start.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.updates = 0
        self.average = {
            name: p.detach().float().clone() for name, p in module.named_parameters() if p.is_floating_point()
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = dict(module.named_parameters())
        averages = list(self.average.values())
        torch._foreach_lerp_(averages, [parameters[n].detach().float() for n in self.average], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        parameters = dict(module.named_parameters())
        for name, value in self.average.items():
            parameters[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = state["updates"]
        for name, value in state["average"].items():
            self.average[name].copy_(value)


def history(folder: Path) -> list[dict[str, float]]:
    """The logged rows of a run; rows that a killed run wrote beyond its last checkpoint are superseded."""
    path = folder / "log.jsonl"
    rows: dict[int, dict[str, float]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows = {s: r for s, r in rows.items() if s < row["step"]}
            rows[row["step"]] = row
    return list(rows.values())


class TrainingRun:
    """One run in one folder: `checkpoint.pt`, `log.jsonl` and `loss.png`.

    Args:
        folder: where the run lives; a run found there is resumed.
        budget: when to stop.
        settings: plain values that must not change between resumes (the model config, the recipe).
        state: everything to be saved and restored, by name.
        save_every_minutes: wall-clock distance of checkpoints.

    Raises:
        CheckpointError: the folder holds a run with other settings or an unreadable checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        budget: Budget,
        settings: Mapping[str, Any],
        state: Mapping[str, Stateful],
        save_every_minutes: float = 2.0,
    ) -> None:
        self.folder = Path(folder)
        self.budget = budget
        self.settings = json.loads(json.dumps(settings))
        self.state = dict(state)
        self.step = 0
        self.seconds = 0.0
        self._save_every = 60 * save_every_minutes
        self._resume()
        self._clock = self._last_save = time.monotonic()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def progress(self) -> float:
        return self.budget.progress(self.step, self.seconds)

    def steps(self) -> Iterator[int]:
        """Yield step numbers until the budget is spent; saves on the way, at the end and on Ctrl-C."""
        self._clock = self._last_save = time.monotonic()
        try:
            while self.progress < 1:
                yield self.step
                self.step += 1
                now = time.monotonic()
                self.seconds += now - self._clock
                self._clock = now
                if now - self._last_save > self._save_every:
                    self.save()
        finally:
            self.save()

    def save(self) -> None:
        payload = {
            "settings": self.settings,
            "step": self.step,
            "seconds": self.seconds,
            "state": {name: item.state_dict() for name, item in self.state.items()},
        }
        with atomic_path(self.checkpoint) as temporary:
            torch.save(payload, temporary)
        self._last_save = time.monotonic()

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            return
        try:
            payload = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{self.checkpoint} cannot be read ({type(error).__name__}); remove it to start afresh."
            ) from error
        if payload["settings"] != self.settings:
            changed = sorted(
                k
                for k in {*payload["settings"], *self.settings}
                if payload["settings"].get(k) != self.settings.get(k)
            )
            raise CheckpointError(
                f"{self.folder} holds a run with other settings ({', '.join(changed)}); "
                "choose another folder or the same settings."
            )
        for name, item in self.state.items():
            item.load_state_dict(payload["state"][name])
        self.step, self.seconds = payload["step"], payload["seconds"]

    def log(self, **scalars: float | Tensor) -> None:
        """Append one line to `log.jsonl`: step, training seconds and the given scalars."""
        row = {"step": self.step, "seconds": round(self.seconds, 1)}
        row |= {k: round(float(v), 6) for k, v in scalars.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def history(self) -> list[dict[str, float]]:
        """See `history`."""
        return history(self.folder)

    def plot(self, keys: list[str], path: Path | None = None) -> Path:
        """Draw the logged `keys` over the step count; needs the `train` extra (matplotlib)."""
        from matplotlib.figure import Figure

        rows = self.history()
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for key in keys:
            points = [(r["step"], r[key]) for r in rows if key in r and math.isfinite(r[key])]
            if points:
                axes.plot(*zip(*points, strict=True), label=key)
        axes.set_xlabel("optimiser step")
        axes.grid(alpha=0.3)
        axes.legend()
        target = path or self.folder / "loss.png"
        with atomic_path(target) as temporary:
            figure.savefig(temporary, dpi=110)
        return target
