"""The calls of pipelines that are under way, in any thread, and how one of them is stopped."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from torch import nn


@dataclass(eq=False)
class RunningCall:
    """A call that is under way.

    Attributes:
        pipeline: that was called.
        thread: the thread that waits for it.
        stopped: whether it is to end after its pass.
        waits: whether it waits for its callback, and its networks are free.
    """

    pipeline: object
    thread: int
    stopped: bool = False
    waits: bool = False

    def stop(self) -> None:
        """End the call after its pass; from any thread."""
        self.stopped = True

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The call waits for its callback as long as the block."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False


# not in the pipelines: they are copied and pickled, and locks and threads are not
_RUNNING: list[RunningCall] = []
_LOCK = threading.Lock()
_OFFLOADED = threading.RLock()


@contextmanager
def running(pipeline: object) -> Iterator[RunningCall]:
    """A call of `pipeline` in this thread, under way as long as the block."""
    call = RunningCall(pipeline, threading.get_ident())
    with _LOCK:
        _RUNNING.append(call)
    try:
        yield call
    finally:
        with _LOCK:
            _RUNNING.remove(call)


def calls_meant(pipeline: object) -> list[RunningCall]:
    """The calls that somebody who says no more than `pipeline` means.

    In a callback the one that it belongs to: the innermost call of the thread. Elsewhere all calls of the pipeline.
    """
    with _LOCK:
        calls = [call for call in _RUNNING if call.pipeline is pipeline]
    own = [call for call in calls if call.thread == threading.get_ident()]
    return own[-1:] or calls


def turn_on_device(networks: Sequence[nn.Module]) -> AbstractContextManager[object]:
    """Calls of offloaded networks follow each other: each moves the weights that the other is about to read."""
    offloaded = any(hasattr(part, "_hf_hook") for network in networks for part in network.modules())
    return _OFFLOADED if offloaded else nullcontext()
