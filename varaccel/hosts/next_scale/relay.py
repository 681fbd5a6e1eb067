"""Two networks that take turns on one canvas."""

from __future__ import annotations

from collections.abc import Callable

import torch

from varaccel.engine.canvas import Canvas
from varaccel.engine.counts import Stage
from varaccel.engine.distribution import Categorical
from varaccel.engine.stopwatch import Stopwatch
from varaccel.hosts.next_scale.schedule import ScaleInputs
from varaccel.hosts.next_scale.session import ScaleSession


class Relay:
    """Two sessions, one after the other, that look like one.

    The second is opened when the first has drawn its scales and freed its cache, so their caches never exist at the
    same time. It encodes by itself what it finds on the canvas.

    Args:
        openers: make the sessions.
        names: what the stages are called.
        border: the second session starts at this scale.
        device: to wait for at the border, so that times are true.
    """

    def __init__(
        self,
        openers: tuple[Callable[[], ScaleSession], Callable[[], ScaleSession]],
        names: tuple[str, str],
        border: int,
        device: torch.device,
    ) -> None:
        self.openers, self.names, self.border = openers, names, border
        self.stages: list[Stage] = []
        self._session: ScaleSession | None = None
        self._tokens = 0  # per image, of the stage that is running
        self._clock = Stopwatch(device)

    def predict(self, canvas: Canvas, inputs: ScaleInputs) -> Categorical:
        if inputs.scale == self.border:
            self.finish()
        if self._session is None:
            self._session = self.openers[len(self.stages)]()
        self._tokens += inputs.positions.shape[-1]
        return self._session.predict(canvas, inputs)

    def finish(self) -> None:
        """End the stage that is running: free its cache and note what it cost."""
        session = self._session
        if session is None:
            return
        session.close()
        name = self.names[len(self.stages)]
        self._clock.lap(name)
        seconds = self._clock.laps[name]
        self.stages.append(Stage(name, seconds, session.reads, self._tokens, session.cache_bytes))
        self._session, self._tokens = None, 0
