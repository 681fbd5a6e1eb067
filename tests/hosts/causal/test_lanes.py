"""Lanes against a slow replay of ZipAR's schedule that keeps a history of its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varaccel.engine.canvas import Canvas
from varaccel.hosts.causal.lanes import Fronts, Lanes
from varaccel.hosts.causal.schedule import StaggeredRows

SIZES = [(1, 1, 1), (1, 5, 2), (2, 4, 4), (3, 4, 1), (4, 4, 2), (4, 3, 3), (5, 7, 3), (3, 2, 8)]
"""Height, width and window."""


@dataclass(frozen=True)
class Front:
    """What is open in one lane, in terms of rows and columns."""

    row: int
    column: int
    allowed: int
    """columns from `column` on that may be decided in this pass"""
    source: int
    """canvas position of the token that is read before `column`"""


@dataclass
class Replay:
    """One image under ZipAR's rule: a token waits for the one `window` columns ahead in the row above, or its end.

    Knows nothing of canvases: it is told how many tokens each open row decides, and remembers the rest.
    """

    height: int
    width: int
    window: int
    done: list[int] = field(default_factory=list)
    stand_ins: set[int] = field(default_factory=set)
    """rows that began before the row above was finished"""
    finished: int | None = None
    """the row that was finished in the last pass"""

    def __post_init__(self) -> None:
        self.done = [1] + [0] * (self.height - 1)  # position 0 is decided from the condition
        self.finished = 0 if self.width == 1 else None

    def may_decide(self, row: int, column: int) -> bool:
        if row == 0 or self.done[row - 1] == self.width:
            return True
        return self.window < self.width and self.done[row - 1] >= column + self.window

    def fronts(self) -> list[Front]:
        """The open rows, from the top."""
        found = []
        for row, column in enumerate(self.done):
            allowed = sum(self.may_decide(row, c) for c in range(column, self.width))
            if allowed:
                found.append(Front(row, column, allowed, self.source(row, column)))
        return found

    def source(self, row: int, column: int) -> int:
        first = row * self.width
        if column or self.done[row - 1] == self.width:
            return first + column - 1
        # the row above goes on to the right: the newest token of the row over it is the nearest to what it will end in
        over = max(row - 2, 0)
        return over * self.width + self.done[over] - 1

    def refresh(self) -> int:
        """The end of a row that arrived in the last pass although the next row had begun without it, or -1."""
        if self.finished is None or self.finished + 1 not in self.stand_ins:
            return -1
        return (self.finished + 1) * self.width - 1

    def decide(self, amounts: dict[int, int]) -> None:
        """Decide so many tokens of each row, all at once."""
        for row in amounts:
            if self.done[row] == 0 and row and self.done[row - 1] < self.width:
                self.stand_ins.add(row)
        self.finished = None
        for row, amount in amounts.items():
            self.done[row] += amount
            if self.done[row] == self.width:
                assert self.finished is None, "no two rows are finished in one pass"
                self.finished = row

    @property
    def complete(self) -> bool:
        return min(self.done) == self.width


def check(fronts: Fronts, replays: list[Replay], columns: int) -> None:
    """All entries of all images; what is closed is filled up."""
    assert fronts.open.shape == (len(replays), columns)
    for image, replay in enumerate(replays):
        expected = replay.fronts()
        fill = [-1] * (columns - len(expected))
        zeros = [0] * len(fill)
        assert fronts.open[image].tolist() == [True] * len(expected) + [False] * len(fill)
        assert fronts.start[image].tolist() == [f.row * replay.width + f.column for f in expected] + fill
        assert fronts.limit[image].tolist() == [f.allowed for f in expected] + zeros
        assert fronts.end[image].tolist() == [replay.width - f.column for f in expected] + zeros
        assert fronts.source[image].tolist() == [f.source for f in expected] + fill


def start(height: int, width: int, window: int, batch: int) -> tuple[Lanes, Canvas, list[Replay]]:
    canvas = Canvas.empty(batch, height * width)
    canvas.write(torch.tensor([0]), torch.zeros(batch, 1, dtype=torch.int64), 1)
    lanes = Lanes.rows(width, height * width, window)
    return lanes, canvas, [Replay(height, width, window) for _ in range(batch)]


def advance(
    canvas: Canvas, fronts: Fronts, replays: list[Replay], step: int, amount: Callable[[Front], int]
) -> None:
    """Decide `amount` tokens at each front, on the canvas and in the replays."""
    positions = torch.full((canvas.batch, canvas.num_positions), -1)
    for image, replay in enumerate(replays):
        decided: dict[int, int] = {}
        for front in replay.fronts():
            decided[front.row] = amount(front)
            assert 1 <= decided[front.row] <= front.allowed
            for column in range(front.column, front.column + decided[front.row]):
                position = front.row * replay.width + column
                positions[image, position] = position
        replay.decide(decided)
    canvas.write(positions, torch.zeros_like(positions), step)


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 6),
    width=st.integers(1, 7),
    window=st.integers(1, 8),
    fixed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_fronts_of_images_that_go_at_their_own_pace(
    height: int, width: int, window: int, fixed: bool, seed: int
) -> None:
    """From any state that can be reached, whatever is accepted."""
    choose = random.Random(seed)
    lanes, canvas, replays = start(height, width, window, batch=3)
    if window >= width:  # one lane of the whole image
        replays = [Replay(1, height * width, height * width) for _ in range(3)]
    most = lanes.most_open(canvas.num_positions)
    step = 1
    while not canvas.is_full:
        step += 1
        assert step <= height * width, "every pass decides something"
        fronts = lanes.fronts(canvas, step, fixed=fixed)
        widest = max(1, *(len(replay.fronts()) for replay in replays))
        check(fronts, replays, most if fixed else widest)
        if replays[0].height == 1:
            assert fronts.refresh is None, "nothing comes late in a single lane"
        else:
            assert fronts.refresh is not None
            assert fronts.refresh.tolist() == [replay.refresh() for replay in replays]
        for image, source in enumerate(fronts.source):
            assert (canvas.written[image, source[source >= 0]] > 0).all(), "only what is decided can be read"
        # mostly one token, sometimes all that is allowed
        advance(
            canvas,
            fronts,
            replays,
            step,
            lambda f: choose.choice((1, 1, f.allowed, choose.randint(1, f.allowed))),
        )
    assert all(replay.complete for replay in replays)


@pytest.mark.parametrize(("height", "width", "window"), SIZES)
def test_one_token_per_lane_and_pass_is_the_schedule_of_zipar(height: int, width: int, window: int) -> None:
    lanes, canvas, _ = start(height, width, window, batch=1)
    first, *groups = StaggeredRows(width, window).groups(height * width)
    assert first.positions == (0,)
    for step, group in enumerate(groups, start=2):
        fronts = lanes.fronts(canvas, step)
        open_ = fronts.open[0]
        assert tuple(fronts.start[0, open_].tolist()) == group.positions
        assert tuple(fronts.source[0, open_].tolist()) == group.sources
        late = [] if fronts.refresh is None else fronts.refresh[fronts.refresh >= 0].tolist()
        assert tuple(late) == group.refresh
        canvas.write(fronts.start[:, open_], torch.zeros_like(fronts.start[:, open_]), step)
    assert canvas.is_full
    assert int(canvas.written.max()) == width + (height - 1) * min(window, width)


@pytest.mark.parametrize(
    ("height", "width", "window"),
    [s for s in product((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)) if s[2] < s[1]],
)
def test_most_open_is_reached_and_never_exceeded(height: int, width: int, window: int) -> None:
    """All states that any acceptance can lead to."""
    seen = {(1,) + (0,) * (height - 1)}
    todo = list(seen)
    widest = 0
    while todo:
        replay = Replay(height, width, window)
        replay.done = list(todo.pop())
        fronts = replay.fronts()
        widest = max(widest, len(fronts))
        for amounts in product(*(range(1, f.allowed + 1) for f in fronts)):
            done = list(replay.done)
            for front, amount in zip(fronts, amounts, strict=True):
                done[front.row] += amount
            if tuple(done) not in seen:
                seen.add(tuple(done))
                todo.append(tuple(done))
    assert widest == Lanes.rows(width, height * width, window).most_open(height * width)


def test_a_window_as_wide_as_the_grid_is_one_lane() -> None:
    for window in (4, 5, 100):
        lanes = Lanes.rows(4, 12, window)
        assert lanes == Lanes.raster(12) == Lanes(12, 12)
        assert lanes.most_open(12) == 1
    assert Lanes.rows(4, 12, 3) == Lanes(4, 3)


def test_a_stand_in_and_the_token_that_replaces_it() -> None:
    """Two rows of three, one behind the other by one column, worked by hand."""
    lanes, canvas, _ = start(2, 3, 1, batch=1)
    # position 0 is there: column 1 of row 0, and column 0 of row 1 from a stand-in, the newest token of row 0
    fronts = lanes.fronts(canvas, 2)
    assert fronts.start.tolist() == [[1, 3]]
    assert fronts.limit.tolist() == [[2, 1]]
    assert fronts.end.tolist() == [[2, 3]]
    assert fronts.source.tolist() == [[0, 0]]
    assert fronts.refresh is not None
    assert fronts.refresh.tolist() == [-1]
    # both tokens of row 0 are decided at once: its end, position 2, comes late for row 1
    canvas.write(torch.tensor([[1, 2, 3]]), torch.zeros(1, 3, dtype=torch.int64), 2)
    fronts = lanes.fronts(canvas, 3)
    assert fronts.open.tolist() == [[True]]
    assert fronts.start.tolist() == [[4]]
    assert fronts.limit.tolist() == fronts.end.tolist() == [[2]]
    assert fronts.source.tolist() == [[3]]
    assert fronts.refresh is not None
    assert fronts.refresh.tolist() == [2]
    canvas.write(torch.tensor([[4]]), torch.zeros(1, 1, dtype=torch.int64), 3)
    fronts = lanes.fronts(canvas, 4, fixed=True)
    assert fronts.start.tolist() == [[5, -1]]
    assert fronts.refresh is not None
    assert fronts.refresh.tolist() == [-1], "late only once"


def test_a_given_end_of_line_needs_no_stand_in() -> None:
    """A row of a grid with ends of line reads the end of the row above as soon as it may begin; other rows stand in."""
    height, pitch = 3, 4
    lanes = Lanes.rows(pitch, height * pitch, 2)
    plain = Canvas.empty(1, height * pitch)
    lined = Canvas.given(plain.tokens.clone(), torch.arange(height * pitch)[None] % pitch == pitch - 1)
    for canvas in (plain, lined):
        canvas.write(torch.tensor([0, 1, 2]), torch.zeros(1, 3, dtype=torch.int64), 1)
    stand_in, end = lanes.fronts(plain, 2), lanes.fronts(lined, 2)
    assert torch.equal(stand_in.start, end.start)
    row = int((end.start[0] == pitch).nonzero())
    assert stand_in.source[0, row] != pitch - 1, "the newest token above"
    assert end.source[0, row] == pitch - 1, "the end of line itself"
