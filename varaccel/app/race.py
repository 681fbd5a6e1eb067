"""Two decodings of the same images, pass by pass beside each other, each with a clock of its own."""

from __future__ import annotations

import contextlib
import contextvars
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from varaccel.accelerators import AnyAccelerator
from varaccel.app.turns import Allowance, Stopped, Turns
from varaccel.engine.statistics import Statistics, call_label
from varaccel.hosts.next_scale.job import ScaleJob

WARM_UP_PASSES = 4
PREVIEW_SECONDS = 0.3
"""Time between two previews of a side, at least."""
PREVIEW_SHARE = 4
"""A preview is made only after this many times as long as the last one took, so that they cannot rule the race."""
FRAME_SECONDS = 0.15
"""Time between two frames: more would cost the decodings more than eyes can see."""

Phase = Literal["warming up", "drawing", "finished", "stopped"]


@dataclass(frozen=True)
class Side:
    """What one decoding of a race has reached.

    Attributes:
        label: the accelerator with its options.
        lossless: whether it keeps the distribution of plain decoding.
        phase: what it is doing.
        passes: forward passes of the host model.
        tokens, of: tokens per image that are decided, and that there are.
        seconds: computing time of this side; of the tokens alone once it has finished.
        images: drawn so far, empty before the first preview.
        written: [B, h, w], the pass that decided each token, 0 = empty; None for models whose tokens are not one grid.
        stats: what the call cost, when it has finished.
    """

    label: str
    lossless: bool
    phase: Phase = "warming up"
    passes: int = 0
    tokens: float = 0.0
    of: int = 0
    seconds: float = 0.0
    images: tuple[Image.Image, ...] = ()
    written: NDArray[np.int32] | None = None
    stats: Statistics | None = None

    @property
    def progress(self) -> float:
        """Share of the tokens that are decided."""
        return self.tokens / self.of if self.of else 0.0

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / self.passes if self.passes else 0.0


class Race:
    """The same call, decoded in several ways on one device at equal computing time.

    Every side has a thread, and one of them computes at a time (`Turns`). So neither disturbs the other's clock, and
    at every moment both have had as much of the machine: whoever is ahead on the screen is ahead. Previews, and what
    the page does with them, are timed for neither side.

    Args:
        pipe: the pipeline, with its progress bar switched off.
        call: arguments of it, such as prompt, seed and guidance.
        accelerators: one per side.
        turns: of the device.
        seconds_limit: of the whole race.
    """

    def __init__(
        self,
        pipe: Any,
        call: Mapping[str, Any],
        accelerators: Sequence[AnyAccelerator],
        turns: Turns,
        *,
        seconds_limit: float,
    ) -> None:
        self._pipe = pipe
        self._call = call
        self._accelerators = accelerators
        self._turns = turns
        self._allowance = Allowance(seconds_limit)
        self._error: BaseException | None = None
        self._changed = threading.Event()
        self.sides = [Side(call_label(a.name, a.options()), a.lossless) for a in accelerators]

    def stop(self) -> None:
        """End the race after the pass under way; what was drawn so far stays."""
        self._allowance.stop()

    def frames(self) -> Iterator[list[Side]]:
        """Run the race; the sides whenever something is new, and at the end.

        Raises:
            VaraccelError: an argument that the pipeline refuses, or no memory.
            Stopped: it took longer than the limit; not if somebody called `stop`.
        """
        threads: list[threading.Thread] = []
        try:
            yield list(self.sides)
            self._warm_up()
            for index in range(len(self.sides)):
                # the context tells to which visitor warnings belong
                context = contextvars.copy_context()
                threads.append(
                    threading.Thread(
                        target=context.run, args=(self._draw, index), name=f"race-{index}", daemon=True
                    )
                )
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                if self._changed.wait(timeout=FRAME_SECONDS):
                    self._changed.clear()
                    yield list(self.sides)
                    time.sleep(FRAME_SECONDS)
        except Stopped:
            pass  # while warming up
        finally:
            self.stop()
            for thread in threads:
                thread.join()
        if self._error is not None:
            raise self._error
        self.sides = [s if s.phase == "finished" else replace(s, phase="stopped") for s in self.sides]
        yield list(self.sides)
        stopped = self._allowance.stopped
        if stopped is not None and stopped.reason:
            raise stopped

    def _warm_up(self) -> None:
        """The first passes of every side, so that neither clock pays for allocations of the call's shapes."""
        for accelerator in self._accelerators:
            with self._turns.join():
                warm_up(self._pipe, accelerator, self._allowance.check, **self._call)

    def _draw(self, index: int) -> None:
        accelerator = self._accelerators[index]
        turn = self._turns.join()
        preview_cost, next_preview = 0.0, 0.0

        def after_pass(pipe: Any, step: int, tokens: int, state: Mapping[str, Any]) -> None:
            nonlocal preview_cost, next_preview
            self._allowance.check()
            now = time.perf_counter()
            if now >= next_preview:
                with turn.aside():
                    self._show(index, step + 1, turn.seconds, state)
                preview_cost = time.perf_counter() - now
                next_preview = time.perf_counter() + max(PREVIEW_SECONDS, PREVIEW_SHARE * preview_cost)
            turn.offer()

        try:
            with turn:
                output = self._pipe(accelerator=accelerator, callback_on_step_end=after_pass, **self._call)
            self._finish(index, output, turn.paused)
        except Stopped:
            pass
        except BaseException as error:
            self._error = self._error or error
            self.stop()
        finally:
            self._changed.set()

    def _show(self, index: int, passes: int, seconds: float, state: Mapping[str, Any]) -> None:
        canvas = state["canvas"]
        written = state["written"]()
        self.sides[index] = replace(
            self.sides[index],
            phase="drawing",
            passes=passes,
            tokens=float((canvas.written > 0).float().mean()) * canvas.num_positions,
            of=canvas.num_positions,
            seconds=seconds,
            images=tuple(state["preview"]()),
            written=_as_map(written),
        )
        self._changed.set()

    def _finish(self, index: int, output: Any, paused: float) -> None:
        stats = unpaused(output.stats, paused)
        self.sides[index] = Side(
            stats.label,
            stats.lossless,
            "finished",
            stats.passes,
            stats.tokens,
            stats.tokens,
            stats.seconds["tokens"],
            tuple(output.images),
            _as_map(output.written),
            stats,
        )


def unpaused(stats: Statistics, paused: float) -> Statistics:
    """The cost of a call without what it paused: all pauses lie in callbacks, so within the phase of the tokens."""
    return replace(stats, seconds={**stats.seconds, "tokens": stats.seconds["tokens"] - paused})


def warm_up(pipe: Any, accelerator: AnyAccelerator, allowed: Callable[[], None], **call: Any) -> None:
    """Draw so much of a call that the next one meets no shapes for the first time.

    Args:
        allowed: called after every pass; may raise to stop.
    """
    # every pass over a scale has shapes of its own
    passes = math.inf if issubclass(pipe.job_type, ScaleJob) else WARM_UP_PASSES

    class Warm(Exception):
        pass

    def after_pass(pipe: Any, step: int, tokens: int, state: dict[str, Any]) -> None:
        allowed()
        if step + 1 >= passes:
            raise Warm

    with contextlib.suppress(Warm):
        pipe(accelerator=accelerator, output_type="latent", callback_on_step_end=after_pass, **call)


def _as_map(written: Any) -> NDArray[np.int32] | None:
    return written.cpu().numpy().copy() if written.ndim == 3 else None
