"""The images that are decoded at once, and those that wait for a place among them: continuous batching."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from varaccel.engine.counts import SpeculationStats
from varaccel.engine.loop import Step
from varaccel.engine.randomness import GumbelNoise
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.causal.lanes import Lanes
from varaccel.hosts.causal.session import CausalSession
from varaccel.speculation.step import Proposer, StepResult, Verifier


@dataclass
class Speculation:
    """What drafts and verifies some images. Rows that images have in it can be given to others.

    Attributes:
        session: of the target.
        lanes: that every image is decoded in.
        proposer: the drafter at work.
        verify: accepts draft tokens.
        noise: that proposer or verifier draw with; None if they do not.
    """

    session: CausalSession
    lanes: Lanes
    proposer: Proposer
    verify: Verifier
    noise: GumbelNoise | None = None

    def put_rows(self, rows: Tensor, other: Speculation) -> None:
        """Rows `rows` [n] become those of `other`, in order, which has read its condition and drafted nothing."""
        self.session.put_rows(rows, other.session)
        self.proposer.put_rows(rows, other.proposer)
        if self.noise is not None and other.noise is not None:
            self.noise.put_rows(rows, other.noise)

    def keep_rows(self, rows: Tensor) -> None:
        """Only rows `rows` [n], which must ascend, stay."""
        self.session.keep_rows(rows)
        self.proposer.keep_rows(rows)
        if self.noise is not None:
            self.noise.keep_rows(rows)


Start = Callable[[CausalJob], Speculation]
"""Opens sessions for the images of a job."""


class Batch:
    """The rows of a batch, the image that each decodes, and the images that wait.

    An image that takes the place of a finished one starts as all do: sessions of its own read its condition and decide
    its first token in a pass of their own; then what they know is moved into its row. So nothing of the
    image before can stay: a row is written as a whole. When nobody waits, rows of finished images are
    dropped, unless shapes must stay.

    Args:
        job: of all images; `job.batch_size` of them are decoded at once.
        start: what decodes some of them.

    Attributes:
        work: what decodes the images of the batch.
        canvas: of the images of the batch; what is decided goes to the job's canvas after every pass.
        stream: their numbers of every pass.
        steps: [n, 1] int32, the pass that each row is in, counted from the first of its image.
        stats: of all images of the job.
    """

    def __init__(self, job: CausalJob, start: Start) -> None:
        self.job, self._start = job, start
        total, device = job.canvas.batch, job.device
        self._size = job.at_once
        # rows that are prefilled beside the batch at once, so that memory for their caches stays small
        self._most = max(1, self._size // 4)
        self._waiting = deque(range(self._size, total))
        self._images = list(range(self._size))
        self._index = torch.tensor(self._images, device=device)
        self._began = [0] * self._size  # after how many passes of the call each row's image began
        self._passes = 0
        self._left = 0  # finished images that have no row any more
        part = job.part(self._images)
        self.canvas, self._randomness, self.work = part.canvas, part.randomness, start(part)
        job.sessions.extend(part.sessions)
        most = self.work.lanes.most_open(self.canvas.num_positions)
        self._width = most * (self.work.proposer.nodes + 1 + self.work.proposer.draws)
        self.stream = self._randomness.stream(self._width)
        self.steps = torch.ones(self._size, 1, dtype=torch.int32, device=device)
        self.stats = SpeculationStats.start(total, device)
        self._decide_first(part, self.work)
        self.stats.passes[self._index] += 1
        self._tell(torch.zeros_like(self._index).unsqueeze(1))

    def advance(self) -> bool:
        """Begin another pass, with waiting images in the place of finished ones; False if all are finished."""
        finished = self._finished()
        while self._waiting and finished and len(finished) >= min(self._worthwhile(), len(self._waiting)):
            self._admit(finished[: min(self._most, len(self._waiting))])
            finished = self._finished()
        if len(finished) == len(self._images):
            self.stats.draft_passes = self.work.proposer.passes
            return False
        if finished and not self._waiting and not self.work.session.static_shapes:
            self._drop(finished)
        self.steps = self.steps + 1
        return True

    def write(self, outcome: StepResult) -> None:
        """Write what a pass decided, and count it."""
        positions = outcome.positions.view(self.canvas.batch, -1)
        self.canvas.write(positions, outcome.tokens.view(self.canvas.batch, -1), self.steps)
        lanes = outcome.fronts.open.sum(1)
        written = (positions >= 0).sum(1)
        self.stats.passes.index_add_(0, self._index, (lanes > 0).long())
        self.stats.attempts.index_add_(0, self._index, lanes)
        self.stats.accepted.index_add_(0, self._index, written - lanes)
        self._tell(positions)

    def _finished(self) -> list[int]:
        return [row for row, count in enumerate(self._counts) if count == self.canvas.num_positions]

    def _worthwhile(self) -> int:
        """How many rows must be free before they are filled.

        With P passes per image and W rows a row becomes free every P / W passes. To wait for k of them leaves rows
        idle for k (k - 1) P / 2 W row passes, k prefills at once cost about a pass of the batch: per image the
        sum is least at k = W sqrt(2 / P).
        """
        passes = max(self._passes - self._began[row] for row in self._finished())
        return max(1, min(self._most, int(self._size * math.sqrt(2 / max(1, passes)))))

    def _admit(self, rows: list[int]) -> None:
        """Begin the next images in these rows."""
        images = [self._waiting.popleft() for _ in rows]
        part = self.job.part(images)
        work = self._start(part)
        self._decide_first(part, work)
        index = torch.tensor(rows, device=self.job.device)
        self.canvas.put_rows(index, part.canvas)
        self._randomness.put_rows(index, part.randomness)
        self.stream.put_rows(index, part.randomness.stream(self._width))
        self.work.put_rows(index, work)
        self.steps[index] = 1
        for row, image in zip(rows, images, strict=True):
            self._images[row], self._began[row] = image, self._passes
        self._left += len(rows)
        self._index = torch.tensor(self._images, device=self.job.device)
        self.stats.passes[self._index[index]] += 1
        positions = torch.full_like(self._index, -1).index_fill(0, index, 0)
        self._tell(positions.unsqueeze(1))

    def _drop(self, rows: list[int]) -> None:
        """Go on without these rows."""
        kept = [row for row in range(len(self._images)) if row not in rows]
        index = torch.tensor(kept, device=self.job.device)
        for part in (self.canvas, self._randomness, self.stream, self.work):
            part.keep_rows(index)
        self.steps, self._index = self.steps[index], self._index[index]
        self._images, self._began = [self._images[r] for r in kept], [self._began[r] for r in kept]
        self._left += len(rows)

    @staticmethod
    def _decide_first(part: CausalJob, work: Speculation) -> None:
        """Read the condition and decide position 0, as plain decoding does."""
        first = torch.zeros(1, dtype=torch.int64, device=part.device)
        distribution = work.session.first_distribution()
        part.canvas.write(first, distribution.sample(part.randomness.at(first)), 1)

    def _tell(self, positions: Tensor) -> None:
        """Take note of a pass that decided `positions` [n, P], and tell the observer."""
        self._passes += 1
        canvas = self.job.canvas
        if self.canvas is not canvas:
            canvas.tokens[self._index], canvas.written[self._index] = self.canvas.tokens, self.canvas.written
        # the one time that the device is waited for
        self._counts: list[int] = (self.canvas.written > 0).sum(1).tolist()
        if self.job.on_step is not None:
            decided = self._left * canvas.num_positions + sum(self._counts)
            of_all = positions.new_full((canvas.batch, positions.shape[1]), -1)
            of_all[self._index] = positions
            self.job.on_step(Step(self._passes, decided / canvas.written.numel(), of_all, canvas))
