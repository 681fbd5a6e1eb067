"""Several calls on one device, one pass at a time: the fair race, and honest clocks while visitors share a machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

QUANTUM = 0.02
"""Seconds that a call keeps the device before another may have it: long against the hand-over, short to the eye."""


class Stopped(Exception):
    """A call was stopped on the way.

    Attributes:
        reason: a sentence for the visitor, empty if the visitor wanted it.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


class Allowance:
    """How long a call may go on: until somebody stops it, or it has taken too long.

    Args:
        seconds: from now on.

    Attributes:
        stopped: why the call has to end, None while it may go on.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self.stopped: Stopped | None = None

    def stop(self) -> None:
        """Let the call end after the pass under way."""
        self.stopped = self.stopped or Stopped()

    def check(self) -> None:
        """Go on, or raise.

        Raises:
            Stopped: the call has to end.
        """
        if self.stopped is None and time.monotonic() > self._deadline:
            self.stopped = Stopped(out_of_time(self._seconds))
        if self.stopped is not None:
            raise self.stopped


def out_of_time(seconds: float) -> str:
    """Why a call was stopped that took too long."""
    return f"stopped after {seconds:.0f} seconds, the time limit of a call on this page."


class Turns:
    """Gives a device to one call at a time, always to the one that has had least of it.

    Every call computes in a thread of its own and offers its turn after each pass. Calls that join together advance
    at equal computing time, which is what makes a race of two decodings fair on one machine. What a call waits for the
    others is not on its clock.

    Args:
        synchronize: waits until the device has finished what it was given.
        quantum: seconds that a call keeps the device before it hands it on.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None, quantum: float = QUANTUM) -> None:
        self.synchronize = synchronize
        self.quantum = quantum
        self.condition = threading.Condition()
        self.waiting: list[Turn] = []
        self.holder: Turn | None = None
        self._now = 0.0

    def join(self) -> Turn:
        """A place among the calls, to be entered when the call begins to compute."""
        return Turn(self)

    def take(self, turn: Turn) -> None:
        """Wait until it is this call's turn. Needs `condition`."""
        # who comes or comes back starts level with the others; waiting elsewhere earns no credit
        turn.place = max(turn.place, self._now)
        self.waiting.append(turn)
        self.condition.wait_for(lambda: self.holder is None and self._next() is turn)
        self.waiting.remove(turn)
        self.holder = turn
        self._now = turn.place

    def give(self) -> None:
        """Free the device. Needs `condition`."""
        self.holder = None
        self.condition.notify_all()

    def _next(self) -> Turn:
        return min(self.waiting, key=lambda turn: turn.place)


class Turn:
    """The place of one call among several; entered while the call computes.

    Attributes:
        seconds: time that this call has computed, waits and `aside` blocks left out; brought up to date by `offer`,
            `aside` and at the end.
        paused: time within the turn that was not the call's own: waits and `aside` blocks.
        place: computing time that decides whose turn it is, `aside` blocks included.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.place = 0.0
        self.seconds = 0.0
        self.paused = 0.0
        self._since = 0.0

    def __enter__(self) -> Self:
        with self._turns.condition:
            self._turns.take(self)
        self._since = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._count()
        with self._turns.condition:
            self._turns.give()

    def offer(self) -> None:
        """Hand the device on if the turn is over and another call has had less; comes back when it is free again."""
        if time.perf_counter() - self._since < self._turns.quantum:
            return
        before = self._count()
        with self._turns.condition:  # at once, so that nobody who has had more slips in between
            self._turns.give()
            self._turns.take(self)
        self._since = time.perf_counter()
        self.paused += self._since - before

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keep the device for something that is not on the call's clock, such as a preview."""
        before = self._count()
        try:
            yield
        finally:
            self._turns.synchronize()
            self._since = time.perf_counter()
            self.paused += self._since - before
            self.place += self._since - before

    def _count(self) -> float:
        """Bring the clock up to date; the time now."""
        self._turns.synchronize()
        now = time.perf_counter()
        self.seconds += now - self._since
        self.place += now - self._since
        self._since = now
        return now
