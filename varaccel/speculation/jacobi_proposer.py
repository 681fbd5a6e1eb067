"""The model's own last answers as draft tokens: the window of speculative Jacobi decoding."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from varaccel.engine.distribution import Categorical
from varaccel.engine.randomness import GumbelNoise
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.causal.lanes import Fronts, Lanes
from varaccel.nn.grid import positions_above
from varaccel.speculation.loop import draw_by_noise
from varaccel.speculation.rejection import VerificationResult, match
from varaccel.speculation.step import Draws, StepResult
from varaccel.speculation.tree import DraftTree, Topology

Coupling = Literal["none", "gumbel", "maximal"]
Fill = Literal["left", "above", "random"]


class JacobiProposer:
    """The window of draft tokens of every lane and, for each, the distribution that it was drawn from.

    In the window of a lane, entry i stands for the i-th position that the lane decides next.
    """

    passes = 0

    def __init__(
        self,
        job: CausalJob,
        lanes: Lanes,
        window: int,
        coupling: Coupling,
        fill: Fill,
        noise: GumbelNoise | None,
    ) -> None:
        self.canvas, self.lanes = job.canvas, lanes
        self.coupling, self.fill, self.noise, self.vocab_size = coupling, fill, noise, job.vocab_size
        self.nodes = window
        # for the answers, for the tests of the draft tokens that are kept, and for random fills
        self.draws = 2 * window + (window - 1 if fill == "random" else 0)
        self.topology = Topology.chain(window - 1) if window > 1 else Topology((-1,))
        batch, count = job.canvas.batch, job.canvas.num_positions // lanes.width
        device = job.canvas.written.device
        self._above = positions_above(job.grids, device)
        # -1: no draft token yet
        self._drafts = torch.full((batch, count, window - 1), -1, device=device)
        self._distributions = (
            torch.zeros(batch, count, window - 1, job.vocab_size, dtype=torch.float32, device=device)
            if noise is None
            else None
        )
        self._answers: Tensor | None = None

    def propose(self, roots: Tensor, fronts: Fronts, draws: Draws) -> DraftTree:
        if self.nodes == 1:
            return DraftTree.from_topology(self.topology, roots.view(-1, 1), draw_mode="deterministic")
        lane = self._lane(fronts)
        drafts = self._drafts.gather(1, lane.unsqueeze(-1).expand(-1, -1, self.nodes - 1))
        fresh = drafts < 0
        fill = self._fill(roots, fronts, draws, drafts)
        drafts = torch.where(fresh, fill, drafts)
        tokens = torch.cat([roots.unsqueeze(-1), drafts], dim=-1).flatten(0, 1)
        if self._distributions is None:
            return DraftTree.from_topology(self.topology, tokens, draw_mode="deterministic")
        index = lane[..., None, None].expand(-1, -1, *self._distributions.shape[2:])
        distributions = self._distributions.gather(1, index)
        # a fresh draft token is certain: its distribution is all on itself
        certain = torch.zeros_like(distributions).scatter_(-1, drafts.unsqueeze(-1), 1.0)
        distributions = torch.where(fresh.unsqueeze(-1), certain, distributions)
        distributions = torch.cat([distributions, torch.zeros_like(distributions[:, :, :1])], dim=2).flatten(
            0, 1
        )  # [M, T, V]
        return DraftTree.from_topology(
            self.topology, tokens, draw_mode="without_replacement", draft_probs=distributions
        )

    def verify_by_noise(
        self, tree: DraftTree, distribution: Categorical, draws: Draws, positions: Tensor
    ) -> VerificationResult:
        """Accept the draft tokens that the noise of their position draws from the new distribution."""
        assert self.noise is not None
        self._answers = draw_by_noise(distribution, self.noise, positions)
        return match(tree, self._answers, distribution.logits)

    def observe(self, outcome: StepResult, draws: Draws) -> None:
        if self.nodes == 1:
            return
        answers = self._answers if self._distributions is None else self._answer(outcome, draws)
        assert answers is not None
        fronts, width = outcome.fronts, self.nodes
        batch, open_ = fronts.start.shape
        # the window moves on by what was committed; positions that enter it have no draft token yet
        source = torch.arange(width - 1, device=answers.device) + outcome.committed.unsqueeze(1)  # [M, L - 1]
        inside = source < width
        source = source.clamp(max=width - 1)
        drafts = torch.where(inside, answers.gather(1, source), -1).view(batch, open_, -1)
        lane = self._lane(fronts)
        # filling must not overwrite a lane: it goes to a lane of its own that is cut off again
        lanes = self._drafts.shape[1]
        target = torch.where(fronts.open, lane, lanes)
        self._drafts = _put(self._drafts, target, drafts)
        if self._distributions is not None:
            probs = outcome.distribution.probs
            distributions = probs.gather(1, source.unsqueeze(-1).expand(-1, -1, probs.shape[-1]))
            self._distributions = _put(
                self._distributions, target, distributions.view(batch, open_, *distributions.shape[1:])
            )

    def put_rows(self, rows: Tensor, other: JacobiProposer) -> None:
        self._drafts[rows] = other._drafts
        if self._distributions is not None and other._distributions is not None:
            self._distributions[rows] = other._distributions

    def keep_rows(self, rows: Tensor) -> None:
        self._drafts = self._drafts[rows]
        self._distributions = None if self._distributions is None else self._distributions[rows]

    def _lane(self, fronts: Fronts) -> Tensor:
        return fronts.start.clamp(min=0) // self.lanes.width

    def _fill(self, roots: Tensor, fronts: Fronts, draws: Draws, drafts: Tensor) -> Tensor:
        """[B, A, L - 1] draft tokens for positions that have none."""
        width = drafts.shape[-1]
        if self.fill == "random":
            numbers = draws.drafting[:, 2 * self.nodes :].view(drafts.shape)
            return (numbers * self.vocab_size).long()
        index = torch.arange(width, device=drafts.device)
        # the nearest position to the left that has a draft token, else the root
        known = torch.where(drafts >= 0, index, -1).cummax(dim=-1).values
        left = torch.where(known >= 0, drafts.gather(2, known.clamp(min=0)), roots.unsqueeze(-1))
        if self.fill == "left":
            return left
        positions = (fronts.start.unsqueeze(-1) + index).clamp(0, self.canvas.num_positions - 1)
        above = self._above[positions]  # [B, A, L - 1], -1 in the first row of a grid
        index = above.clamp(min=0).flatten(1)
        decided = (self.canvas.written.gather(1, index) > 0).view(above.shape) & (above >= 0)
        return torch.where(decided, self.canvas.tokens.gather(1, index).view(above.shape), left)

    def _answer(self, outcome: StepResult, draws: Draws) -> Tensor:
        """[M, L] a draw from each of the new distributions, coupled to the draft token that stood there."""
        numbers = draws.drafting[:, : self.nodes]
        if self.coupling == "none":
            return outcome.distribution.sample(numbers)
        # the last row has no draft token of its own to keep
        distribution, width = outcome.distribution, self.nodes - 1
        tree = outcome.tree
        assert tree.draft_probs is not None
        draft_token = tree.tokens[:, 1:]
        old = Categorical(tree.draft_probs[:, :width].log())
        new = Categorical(distribution.logits[:, :width], distribution.greedy)
        kept = (
            draws.drafting[:, self.nodes : self.nodes + width]
            < (new.log_prob(draft_token) - old.log_prob(draft_token)).exp()
        )
        drawn = torch.where(kept, draft_token, new.residual(old).sample(numbers[:, :width]))
        last = Categorical(distribution.logits[:, width:], distribution.greedy).sample(numbers[:, width:])
        return torch.cat([drawn, last], dim=1)


def _put(state: Tensor, lane: Tensor, values: Tensor) -> Tensor:
    """`state` [B, H, ...] with `values` [B, A, ...] at lanes [B, A]; lane H is nowhere."""
    extended = torch.cat([state, state[:, :1]], dim=1)
    index = lane.view(*lane.shape, *[1] * (values.dim() - 2)).expand_as(values)
    return extended.scatter_(1, index, values)[:, :-1]
