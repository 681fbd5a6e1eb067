"""What runs for which visitor, so that it can be stopped."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Visits:
    """Calls by visitor. A visitor is known by the session of the page; calls without one cannot be stopped here."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stops: defaultdict[str, list[Callable[[], None]]] = defaultdict(list)
        self._stopped_at: dict[str, float] = {}

    @contextmanager
    def running(self, visitor: str | None, stop: Callable[[], None]) -> Iterator[None]:
        """While the block runs, `stop` is what stops it."""
        key = visitor or ""
        with self._lock:
            self._stops[key].append(stop)
        try:
            yield
        finally:
            with self._lock:
                self._stops[key].remove(stop)
                if not self._stops[key]:
                    del self._stops[key]

    def stop(self, visitor: str | None) -> None:
        """Stop what runs for a visitor, and what was asked for before now and still waits."""
        if not visitor:
            return
        with self._lock:
            self._stopped_at[visitor] = time.monotonic()
            stops = list(self._stops.get(visitor, ()))
        for stop in stops:
            stop()

    def was_stopped(self, visitor: str | None, asked: float) -> bool:
        """Whether the visitor stopped what was asked for at this `time.monotonic()`."""
        return bool(visitor) and self._stopped_at.get(str(visitor), -1.0) >= asked

    def leave(self, visitor: str | None) -> None:
        """Stop everything of a visitor who has gone, and forget about the visit."""
        self.stop(visitor)
        with self._lock:
            self._stopped_at.pop(visitor or "", None)
