"""What the parts of a speculative loop tell each other in a pass: random numbers, draft tokens, what became of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor

from varaccel.engine.distribution import Categorical
from varaccel.hosts.causal.lanes import Fronts
from varaccel.speculation.rejection import VerificationResult
from varaccel.speculation.tree import DraftTree


@dataclass(frozen=True)
class Draws:
    """The uniform numbers of one pass, float64 in [0, 1).

    Attributes:
        verifying: [M, T] for the rule, one per node.
        extra: [M, 1] for the token after the accepted ones.
        drafting: [M, D] for the drafter, as many as it asked for.
    """

    verifying: Tensor
    extra: Tensor
    drafting: Tensor


@dataclass(frozen=True)
class StepResult:
    """What became of the draft tokens of one pass. M = B * A sequences: the open lanes of all images.

    Attributes:
        fronts: where the lanes stood before the pass.
        tree: the draft tokens.
        distribution: [M, T, V] the target distribution after each node.
        features: [R, M / B, T, dim] target features at the nodes, R = 2 B while guided, or more.
        path: [M, D + 1] nodes that were accepted, root first, -1 padded.
        committed: [M] tokens that were decided: accepted ones, then one drawn by the rule.
        tokens: [M, D + 1] these tokens; entries from `committed` on carry no meaning.
        positions: [M, D + 1] their positions, -1 from `committed` on.
    """

    fronts: Fronts
    tree: DraftTree
    distribution: Categorical
    features: Tensor
    path: Tensor
    committed: Tensor
    tokens: Tensor
    positions: Tensor


class Verifier(Protocol):
    """Accepts or rejects draft tokens, given the target's distributions."""

    def __call__(
        self, tree: DraftTree, distribution: Categorical, draws: Draws, positions: Tensor
    ) -> VerificationResult:
        """Verify M trees.

        Args:
            distribution: [M, T, V] the target distribution after each node.
            positions: [M, T] that each distribution is of; any position of the image where a node stands outside its
                lane or predicts what is beyond it.
        """
        ...


class Proposer(Protocol):
    """A drafter at work on one call.

    Attributes:
        nodes: nodes of a tree at most, the root included.
        draws: uniform numbers that it needs per lane and pass.
        passes: forward passes of its own networks so far.
    """

    nodes: int
    draws: int

    @property
    def passes(self) -> int: ...

    def propose(self, roots: Tensor, fronts: Fronts, draws: Draws) -> DraftTree:
        """Draft what follows `roots` [B, A], the tokens before the lanes' next positions."""
        ...

    def observe(self, outcome: StepResult, draws: Draws) -> None:
        """Learn what became of the draft tokens."""
        ...

    def put_rows(self, rows: Tensor, other: Self) -> None:
        """What it knows of images `rows` [n] becomes what `other` knows of its own, in order, which has drafted
        nothing. Canvas, target session and noise are seen to elsewhere."""
        ...

    def keep_rows(self, rows: Tensor) -> None:
        """Only images `rows` [n], which must ascend, stay."""
        ...
