"""Networks that take turns on one canvas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varaccel.engine.canvas import Canvas
from varaccel.engine.counts import Stage
from varaccel.engine.distribution import Categorical
from varaccel.engine.stopwatch import Stopwatch
from varaccel.hosts.next_scale.schedule import ScaleInputs
from varaccel.hosts.next_scale.session import ScaleSession


@dataclass(frozen=True)
class Leg:
    """What one network does of a call.

    Attributes:
        name: what the stage is called.
        start: its first scale.
        open: makes the session.
    """

    name: str
    start: int
    open: Callable[[], ScaleSession]


class Relay:
    """Sessions, one after the other, that look like one.

    A session is opened when the one before has drawn its scales and freed its cache, so their caches never exist at the
    same time. It encodes by itself what it finds on the canvas.

    Args:
        legs: what each does, in order; the first starts at scale 0.
        device: to wait for at the borders, so that times are true.
    """

    def __init__(self, legs: Sequence[Leg], device: torch.device) -> None:
        self.legs = legs
        self.stages: list[Stage] = []
        self._session: ScaleSession | None = None
        self._tokens = 0  # per image, of the stage that is running
        self._clock = Stopwatch(device)

    def predict(self, canvas: Canvas, inputs: ScaleInputs) -> Categorical | None:
        """The distribution of a scale; None if no image has it."""
        if inputs.scale == self._border:
            self.finish()
        if self._session is None:
            self._session = self.legs[len(self.stages)].open()
        self._session.leave_out(canvas, inputs.scale)
        if not self._session.images:
            return None
        self._tokens += inputs.positions.shape[-1]
        return self._session.predict(canvas, inputs)

    @property
    def _border(self) -> int | None:
        """Where the stage that is running ends."""
        following = len(self.stages) + 1
        return self.legs[following].start if following < len(self.legs) else None

    @property
    def ended(self) -> Tensor | None:
        """The images that have no more tokens, [B] bool; None if there are none."""
        session = self._session
        if session is None or len(session.images) == session.batch:
            return None
        ended = torch.ones(session.batch, dtype=torch.bool, device=session.features.value.device)
        ended[session.images] = False
        return ended

    def finish(self) -> None:
        """End the stage that is running: free its cache and note what it cost."""
        session = self._session
        if session is None:
            return
        session.close()
        name = self.legs[len(self.stages)].name
        self._clock.lap(name)
        seconds = self._clock.laps[name]
        self.stages.append(Stage(name, seconds, session.reads, self._tokens, session.cache_bytes))
        self._session, self._tokens = None, 0
