"""What the tabs of the page share: models, the device and its queue, visitors, limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from varaccel.app.models import ModelShelf
from varaccel.app.turns import Allowance, Turn, Turns
from varaccel.app.visits import Visits
from varaccel.engine.options import as_number
from varaccel.errors import InputError

if TYPE_CHECKING:
    import gradio as gr

MAX_IMAGES = 4
MAX_SEED = 2**31 - 1


@dataclass
class Studio:
    """The state of a page.

    Attributes:
        shelf: the models.
        turns: of the device that they run on.
        seconds_limit: of one call.
        concurrency: calls that are under way at a time; they share the device pass by pass.
        reports: folders of reports to explore, newest first.
        visits: who runs what.
    """

    shelf: ModelShelf
    turns: Turns = field(default_factory=Turns)
    seconds_limit: float = 300.0
    concurrency: int = 1
    reports: Sequence[Path] = ()
    visits: Visits = field(default_factory=Visits)

    @contextmanager
    def hold(self, request: gr.Request | None) -> Iterator[Permit]:
        """The device for a call, which asks the permit after every pass."""
        turn = self.turns.join()
        permit = Permit(turn, self.seconds_limit)
        with self.visits.running(visitor(request), permit.stop), turn:
            yield permit


class Permit:
    """Asked after every pass of a call: others may have a turn, and the call may be stopped.

    Args:
        turn: of the call.
        seconds_limit: of the call.
    """

    def __init__(self, turn: Turn, seconds_limit: float) -> None:
        self._turn = turn
        self._allowance = Allowance(seconds_limit)
        self.stop = self._allowance.stop

    @property
    def paused(self) -> float:
        """Seconds that others had the device."""
        return self._turn.paused

    def __call__(self) -> None:
        """Go on, or raise.

        Raises:
            Stopped: the visitor stopped the call, or it took too long.
        """
        self._allowance.check()
        self._turn.offer()


def visitor(request: gr.Request | None) -> str | None:
    """Who asks: the session of the page or of the client."""
    return None if request is None else request.session_hash


def checked_count(count: float) -> int:
    """Images of a call.

    Raises:
        InputError: more than the page draws at once.
    """
    if as_number(count) is None or not (1 <= count <= MAX_IMAGES and count == int(count)):
        raise InputError(f"the page draws 1 to {MAX_IMAGES} images at once, got {count}.")
    return int(count)


def checked_seed(seed: float | None) -> int:
    """The seed of a call.

    Raises:
        InputError: there is none, or it is out of range.
    """
    if seed is None:
        raise InputError("there is no seed; give a number, so that both sides draw the same.")
    if as_number(seed) is None or not (0 <= seed <= MAX_SEED and seed == int(seed)):
        raise InputError(f"the seed must be a whole number from 0 to {MAX_SEED}, got {seed}.")
    return int(seed)


def checked_guidance(text: str) -> float | None:
    """The guidance of a call, None for the model's own, which an empty field stands for.

    Raises:
        InputError: it is no number.
    """
    try:
        return float(text) if text.strip() else None
    except ValueError as error:
        raise InputError(f"guidance must be a number, or empty for the model's own, got {text!r}.") from error
