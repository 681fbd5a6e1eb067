"""Proposers: how the distributions of a drafter become trees of draft tokens, whatever network it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, Self

import torch
from torch import Tensor

from varaccel.engine.distribution import Categorical
from varaccel.engine.randomness import GumbelNoise
from varaccel.hosts.causal.lanes import Fronts
from varaccel.nn.devices import HOST
from varaccel.speculation.step import Draws, StepResult
from varaccel.speculation.tree import Beam, DraftTree, DrawMode, DynamicTree, Topology


@dataclass(frozen=True)
class Branch:
    """Draft tokens that a drafter is to continue, n per lane.

    Attributes:
        tokens: [B, A, n] token ids.
        parents: [B, A, n] draft slot of the token that each continues, -1 for the root.
        depth: steps from the root, the same for all.
        first: draft slot of the first of them; the others follow.
        visible: [B, A, n, S] bool, which draft slots of its lane each sees; S slots from the first on.
    """

    tokens: Tensor
    parents: Tensor
    depth: int
    first: int
    visible: Tensor


class BranchReader(Protocol):
    """A drafter's network at work on one call. M = B * A sequences.

    Attributes:
        passes: forward passes so far.
    """

    @property
    def passes(self) -> int: ...

    def begin(self, roots: Tensor, fronts: Fronts) -> Categorical:
        """Catch up with the canvas; the distribution [M, 1, V] of what follows the roots [B, A]."""
        ...

    def extend(self, branch: Branch) -> Categorical:
        """The distributions [M, n, V] of what follows draft tokens."""
        ...

    def observe(self, outcome: StepResult) -> None:
        """Learn what became of the draft tokens."""
        ...

    def put_rows(self, rows: Tensor, other: Self) -> None:
        """See `Proposer`."""
        ...

    def keep_rows(self, rows: Tensor) -> None:
        """See `Proposer`."""
        ...


@lru_cache(maxsize=64)
def cut(topology: Topology, depth: int) -> Topology:
    """The tree down to `depth` steps below its root; nodes must be numbered level by level."""
    count = sum(d <= depth for d in topology.depths)
    return Topology(topology.parents[:count], topology.ranks[:count])


def draw_children(
    distribution: Categorical, numbers: Tensor, draw_mode: DrawMode, ranks: Sequence[int] | None = None
) -> Tensor:
    """Tokens that continue a node: [M, n, R] from distributions [M, n, V].

    Args:
        numbers: [M, n, R] uniform numbers; not used for deterministic children.
        ranks: which of the likeliest tokens deterministic children are, 0 for the likeliest; the first R if None.
    """
    count = numbers.shape[-1]
    if draw_mode == "deterministic":
        ranks = range(count) if ranks is None else ranks
        # with fewer tokens than children the last one is drafted again, which changes nothing
        likeliest = min(max(ranks) + 1, distribution.logits.shape[-1])
        return distribution.logits.topk(likeliest, dim=-1).indices[
            ..., [min(i, likeliest - 1) for i in ranks]
        ]
    left = distribution.probs
    tokens: list[Tensor] = []
    for child in range(count):
        if child and draw_mode == "without_replacement":
            left = left.scatter(-1, tokens[-1].unsqueeze(-1), 0.0)
            # what was exhausted is filled up with any token; rules do not look at children of mass zero
            left = torch.where(left.sum(-1, keepdim=True) > 0, left, 1.0)
        tokens.append(Categorical(left.log()).sample(numbers[..., child]))
    return torch.stack(tokens, dim=-1)


class StaticProposer:
    """Trees of one shape, cut to the depth that has paid off so far if `adaptive`.

    With `adaptive`, a lane whose draft tokens were all accepted is drafted two levels deeper next time, otherwise
    one level less deep (the schedule of assisted generation in transformers). Each lane of each image has a
    depth of its own, so images do not depend on their batch.

    With `noise`, children are the likeliest after the noise of their position is added: draws, but the same as
    the target's wherever the distributions are the same. They are "deterministic" for the rule, which draws alike.
    """

    def __init__(
        self,
        reader: BranchReader,
        topology: Topology,
        draw_mode: DrawMode,
        lanes: int,
        *,
        lane_width: int,
        batch: int,
        device: torch.device,
        adaptive: bool = False,
        fixed: bool = False,
        noise: GumbelNoise | None = None,
    ) -> None:
        self.noise = noise
        topology = topology.by_level  # readers take the nodes of a level from draft slots beside each other
        self.reader, self.topology, self.draw_mode = reader, topology, draw_mode
        self.nodes = self.draws = topology.num_nodes
        self.lane_width, self.adaptive, self.fixed = lane_width, adaptive, fixed
        self._depths = torch.full((batch, lanes), min(3, topology.max_depth), device=device)

    @property
    def passes(self) -> int:
        return self.reader.passes

    def propose(self, roots: Tensor, fronts: Fronts, draws: Draws) -> DraftTree:
        topology, reach = self.topology, None
        if self.adaptive:
            reach = self._depths.gather(1, self._lane(fronts))  # [B, A]
            if not self.fixed:
                topology = cut(topology, int(torch.where(fronts.open, reach, 0).max()))
        batch, open_ = roots.shape
        distribution = self.reader.begin(roots, fronts)
        greedy = distribution.greedy
        draw_mode: DrawMode = "deterministic" if greedy else self.draw_mode
        nodes = topology.num_nodes
        tokens = torch.zeros(batch * open_, nodes, dtype=torch.int64, device=roots.device)
        tokens[:, 0] = roots.flatten()
        drawn_from = None
        if draw_mode != "deterministic":
            shape = (batch * open_, nodes, distribution.logits.shape[-1])
            drawn_from = torch.zeros(shape, dtype=torch.float32, device=roots.device)
        for level in _levels(topology, roots.device):
            if level.depth:
                distribution = self.reader.extend(level.branch(tokens, batch, open_))
            if drawn_from is not None:
                drawn_from[:, level.nodes] = distribution.probs
            numbers = draws.drafting[:, level.children]
            if self.noise is not None:  # the noise that the target draws with at the children's position
                place = (fronts.start.clamp(min=0) + level.depth).unsqueeze(-1)
                noise = self.noise.at(place.expand(-1, -1, len(level.nodes)).flatten(1)).view(
                    distribution.logits.shape
                )
                distribution = Categorical(distribution.perturbed(noise), greedy)
            children = draw_children(distribution, numbers, draw_mode, level.ranks)  # [M, n, R]
            tokens[:, level.children[level.real]] = children[:, level.real]
        tree = DraftTree.from_topology(topology, tokens, draw_mode=draw_mode, draft_probs=drawn_from)
        if reach is None:
            return tree
        deep = tree.depths > reach.view(-1, 1)
        return DraftTree(tokens, torch.where(deep, -1, tree.parents), draw_mode, drawn_from)

    def observe(self, outcome: StepResult, draws: Draws) -> None:
        self.reader.observe(outcome)
        if not self.adaptive:
            return
        fronts = outcome.fronts
        lane = self._lane(fronts)
        depth = self._depths.gather(1, lane)
        accepted = (outcome.committed - 1).view(depth.shape)
        longer = (depth + 2).clamp(max=self.topology.max_depth)
        changed = torch.where(accepted >= depth, longer, (depth - 1).clamp(min=1))
        self._depths.scatter_(1, lane, torch.where(fronts.open, changed, depth))

    def put_rows(self, rows: Tensor, other: StaticProposer) -> None:
        self.reader.put_rows(rows, other.reader)
        self._depths[rows] = other._depths

    def keep_rows(self, rows: Tensor) -> None:
        self.reader.keep_rows(rows)
        self._depths = self._depths[rows]

    def _lane(self, fronts: Fronts) -> Tensor:
        return fronts.start.clamp(min=0) // self.lane_width


@dataclass(frozen=True, eq=False)
class _Level:
    """The nodes of one depth that have children, as the reader and the draws need them.

    Attributes:
        depth: steps from the root.
        nodes: [n] node numbers.
        first: draft slot of the first of them; the others follow.
        parents: [n] draft slot of the parent of each, -1 for the root.
        sees: [n, S] bool, the draft slots that each continues, itself included.
        ranks: the R draws that children of these nodes take.
        children: [n, R] the child that takes each of them; 0 where none does.
        real: [n, R] bool, where one does.
    """

    depth: int
    nodes: Tensor
    first: int
    parents: Tensor
    sees: Tensor
    ranks: tuple[int, ...]
    children: Tensor
    real: Tensor

    def branch(self, tokens: Tensor, batch: int, lanes: int) -> Branch:
        """These nodes of `tokens` [M, T], to be continued."""
        return Branch(
            tokens[:, self.nodes].view(batch, lanes, -1),
            self.parents.expand(batch, lanes, -1),
            self.depth,
            self.first,
            self.sees.expand(batch, lanes, -1, -1),
        )


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # the tables outlive the call, which may run in that mode
def _levels(topology: Topology, device: torch.device) -> tuple[_Level, ...]:
    # draft slots of the tokens that are continued, in the order in which they are read; the root has none
    entries = {node: entry for entry, node in enumerate(topology.internal[1:])}
    levels = []
    for depth, level in enumerate(topology.levels):
        nodes = [node for node in level if topology.children[node]]
        if not nodes:
            break
        sees = torch.zeros(len(nodes), len(entries), dtype=torch.bool, device=HOST)
        for row, node in enumerate(nodes):
            while node:
                sees[row, entries[node]] = True
                node = topology.parents[node]
        ranks = sorted({topology.ranks[child] for node in nodes for child in topology.children[node]})
        # a draw that no child takes is made with the number of the root, which no other node uses
        children = torch.zeros(len(nodes), len(ranks), dtype=torch.int64)
        for row, node in enumerate(nodes):
            for child in topology.children[node]:
                children[row, ranks.index(topology.ranks[child])] = child
        levels.append(
            _Level(
                depth,
                torch.tensor(nodes, device=device),
                entries.get(nodes[0], -1),
                torch.tensor([entries.get(topology.parents[n], -1) for n in nodes], device=device),
                sees.to(device),
                tuple(ranks),
                children.to(device),
                (children > 0).to(device),
            )
        )
    return tuple(levels)


class DynamicProposer:
    """Trees that grow where the drafter is confident (EAGLE-2, arXiv 2406.16858)."""

    draws = 0

    def __init__(self, reader: BranchReader, shape: DynamicTree) -> None:
        self.reader, self.shape = reader, shape
        self.nodes = self.most_nodes(shape)

    @staticmethod
    def most_nodes(shape: DynamicTree) -> int:
        """Nodes of a tree at most, the root included."""
        return min(shape.total, 1 + shape.top_k + shape.depth * shape.top_k**2)

    @property
    def passes(self) -> int:
        return self.reader.passes

    def propose(self, roots: Tensor, fronts: Fronts, draws: Draws) -> DraftTree:
        batch, lanes = roots.shape
        size = self.shape.depth * self.shape.top_k

        def expand(beam: Beam) -> Tensor:
            width = beam.tokens.shape[1]
            visible = beam.visible.new_zeros(*beam.tokens.shape, size)
            visible[..., : beam.visible.shape[-1]] = beam.visible
            first = (beam.level - 1) * width
            parents = (
                beam.rows + (beam.level - 2) * width if beam.level > 1 else torch.full_like(beam.rows, -1)
            )
            branch = Branch(
                beam.tokens.view(batch, lanes, width),
                parents.view(batch, lanes, width),
                beam.level,
                first,
                visible.view(batch, lanes, width, size),
            )
            distribution = self.reader.extend(branch).logits.log_softmax(-1)
            # what cannot be decided in this pass would only take nodes away from what can
            within = (beam.level < fronts.limit).view(-1, 1, 1)
            return torch.where(within, distribution, -torch.inf)

        first = self.reader.begin(roots, fronts).logits.log_softmax(-1)
        return self.shape.grow(roots.flatten(), first.squeeze(1), expand)

    def observe(self, outcome: StepResult, draws: Draws) -> None:
        self.reader.observe(outcome)

    def put_rows(self, rows: Tensor, other: DynamicProposer) -> None:
        self.reader.put_rows(rows, other.reader)

    def keep_rows(self, rows: Tensor) -> None:
        self.reader.keep_rows(rows)
