"""Verification rules: which draft tokens of a tree are accepted, and the distribution of the token after them.

A rule is a pure function of the tree, the target's distributions at its nodes and given uniform numbers. It never
sees a network. All rules that use chance share one walk from the root: at each node its children are examined in
the order of their numbers, the walk goes on below the first that is accepted and ends where none is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from varaccel.engine.options import positive_integer, settle
from varaccel.errors import InputError
from varaccel.speculation.tree import DraftTree, DrawMode


@dataclass(frozen=True, eq=False)
class VerificationResult:
    """What a rule decided about M trees of depth D over V tokens.

    Attributes:
        nodes: [M, D + 1] int64, the accepted nodes from the root downwards, root first, padded with -1.
        length: [M] int64, accepted nodes below the root.
        probs: [M, V] the distribution of the token that follows the last accepted node: the target's own at a leaf,
            what a rejection leaves of it elsewhere.
        rejected: [M] bool, whether `probs` is what a rejection left.
    """

    nodes: Tensor
    length: Tensor
    probs: Tensor
    rejected: Tensor


class Rule(Protocol):
    """Accepts or rejects the nodes of draft trees."""

    def verify(self, tree: DraftTree, target: Tensor, uniforms: Tensor) -> VerificationResult:
        """Verify M trees of T nodes over V tokens.

        Args:
            tree: the draft tokens.
            target: [M, T, V] probabilities (float32 or float64) of the token that follows each node, after
                guidance and filters.
            uniforms: [M, T] in [0, 1); number i is used when node i is examined.
        """
        ...


# --------------------------------------------------------------------------------------------------------------
# the walk


@dataclass(frozen=True, eq=False)
class Fork:
    """One node of each of M trees, with its children in the order of examination.

    Missing children repeat the first child; where there are none at all, the root.

    Attributes:
        target: [M, V] distribution of the token below the node.
        draft_probs: [M, V] distribution that the children were drawn from, None if deterministic.
        tokens: [M, C] of the children.
        uniforms: [M, C].
        real: [M, C] bool, false at missing children.
        draw_mode: how the children were chosen.
    """

    target: Tensor
    draft_probs: Tensor | None
    tokens: Tensor
    uniforms: Tensor
    real: Tensor
    draw_mode: DrawMode


# children that would be accepted [M, C] (the first counts), and the distribution that is left if there is none [M, V]
Decision = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Trial:
    """What an acceptance test says about one draft token of each of M trees.

    Attributes:
        mass: [M, 1]; the token is accepted if u q(x) <= mass with its uniform number u, q(x) = 1 if deterministic.
        residual: [M, V] the distribution that is left if it is rejected.
    """

    mass: Tensor
    residual: Tensor


# from the current distribution [M, V], what the token was drawn from [M, V] (None if deterministic) and it [M, 1]
AcceptanceTest = Callable[[Tensor, Tensor | None, Tensor], Trial]


def check_shapes(tree: DraftTree, target: Tensor, uniforms: Tensor) -> None:
    """Refuse arguments of a rule whose shapes do not fit together."""
    shape = list(tree.tokens.shape)
    if target.dim() != 3 or list(target.shape[:2]) != shape:
        raise InputError(f"target must be [M, T, V] = [{shape[0]}, {shape[1]}, V], got {list(target.shape)}.")
    if list(uniforms.shape) != shape:
        raise InputError(f"uniforms must be [M, T] = {shape}, one per node, got {list(uniforms.shape)}.")
    if tree.draft_probs is not None and tree.draft_probs.shape != target.shape:
        raise InputError(
            f"draft_probs {list(tree.draft_probs.shape)} and target {list(target.shape)} differ in shape."
        )


def walk(
    tree: DraftTree, target: Tensor, uniforms: Tensor, decide: Callable[[Fork], Decision]
) -> VerificationResult:
    """Go down from the root: below the first child that `decide` accepts, until it accepts none."""
    check_shapes(tree, target, uniforms)
    rows = torch.arange(target.shape[0], device=target.device)
    children = tree.children
    node = torch.zeros_like(rows)
    distribution = target[:, 0]
    path = [node]
    descends = None
    for _ in range(tree.max_depth):
        kids = children[rows, node]  # [M, C]
        real = kids >= 0
        kids = torch.where(real, kids, kids[:, :1]).clamp(min=0)
        fork = Fork(
            target=distribution,
            draft_probs=None if tree.draft_probs is None else tree.draft_probs[rows, node],
            tokens=tree.tokens.gather(1, kids),
            uniforms=uniforms.gather(1, kids),
            real=real,
            draw_mode=tree.draw_mode,
        )
        accepted, rest = decide(fork)
        descends, first = (accepted & real).to(torch.uint8).max(dim=1)  # [M]
        descends = descends.bool()
        # A row that has ended stays at its node and comes to the same end again, so no row needs a mask.
        node = torch.where(descends, kids.gather(1, first[:, None])[:, 0], node)
        path.append(torch.where(descends, node, -1))
        ended_distribution = rest
        distribution = target[rows, node]
        if not descends.any():
            break
    if descends is not None:
        distribution = torch.where(descends[:, None], distribution, ended_distribution)
    nodes = torch.stack(path, dim=1)
    length = (nodes > 0).sum(dim=1)
    nodes = F.pad(nodes, (0, tree.max_depth + 1 - nodes.shape[1]), value=-1)
    return VerificationResult(nodes, length, distribution, rejected=children[rows, node, 0] >= 0)


def normalised(rest: Tensor, otherwise: Tensor | float) -> Tensor:
    """`rest` [M, V] divided by its sum; where nothing is left, `otherwise`."""
    total = rest.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, rest / total, otherwise)


def without(distribution: Tensor, tokens: Tensor, taken: Tensor | None = None) -> Tensor:
    """The distribution [M, V] without the mass of `tokens` [M, J], or of those that are `taken` [M, J] only."""
    if taken is None:
        return distribution.scatter(-1, tokens, 0.0)
    return distribution.scatter(-1, tokens, distribution.gather(-1, tokens).masked_fill(taken, 0.0))


def exact_test(distribution: Tensor, draft_probs: Tensor | None, token: Tensor) -> Trial:
    """The acceptance test of speculative sampling (Leviathan et al. 2023, arXiv 2211.17192, section 2.3)."""
    rest = without(distribution, token) if draft_probs is None else (distribution - draft_probs).clamp_(min=0)
    return Trial(distribution.gather(-1, token), normalised(rest, distribution))


def examine_in_turn(fork: Fork, test: AcceptanceTest = exact_test) -> Decision:
    """Examine children in turn, each against what the rejections before it left of the distribution."""
    distribution, draft_probs = fork.target, fork.draft_probs
    accepted = []
    width = fork.tokens.shape[1]
    for child in range(width):
        token, real = fork.tokens[:, child : child + 1], fork.real[:, child : child + 1]
        bar = fork.uniforms[:, child : child + 1]
        if draft_probs is not None:
            drawn = draft_probs.gather(-1, token)
            bar = bar * drawn
            # never drawn, so nothing can be learned from it: fillers behind the last token of positive mass
            real = real & (drawn > 0)
        trial = test(distribution, draft_probs, token)
        # the second condition: a number of exactly 0 must not let an impossible token through
        accepted.append((bar <= trial.mass) & (trial.mass > 0) & real)
        distribution = torch.where(real, trial.residual, distribution)
        if draft_probs is not None and fork.draw_mode == "without_replacement" and child + 1 < width:
            draft_probs = normalised(without(draft_probs, token), 0.0)
    return torch.cat(accepted, dim=1), distribution


# --------------------------------------------------------------------------------------------------------------
# exact rules


@dataclass(frozen=True)
class Exact:
    """Speculative sampling on trees: the output follows the target's distribution, whatever the draft tokens were.

    A draft token x with target p is accepted with probability min(1, p(x) / q(x)) and p becomes max(p - q, 0),
    normalised, when it is rejected. q is all on x if x was not drawn by chance; drawn without replacement,
    it is the draft without the elder siblings, normalised; drawn independently, the draft itself. A tree with
    one child per node is ordinary speculative sampling.

    Where p = q nothing can be rejected; should rounding do so nonetheless, p stays as it was.

    Sources: Leviathan et al. 2023 (arXiv 2211.17192), section 2.3; Miao et al. 2023, "SpecInfer" (arXiv
    2305.09781), section 4.3; Jeon et al. 2024, "Recursive Speculative Decoding" (arXiv 2402.14160), section 3.
    """

    def verify(self, tree: DraftTree, target: Tensor, uniforms: Tensor) -> VerificationResult:
        return walk(tree, target, uniforms, self._decide)

    @staticmethod
    def _decide(fork: Fork) -> Decision:
        if fork.draft_probs is not None:
            return examine_in_turn(fork)
        # A deterministic draft token only takes its own mass away, so all siblings can be verified at once.
        mass = fork.target.gather(-1, fork.tokens)  # [M, C]
        left: Tensor | float = 1.0
        width = mass.shape[1]
        if width > 1:
            # a token that an elder sibling has already tried has no mass left
            same = fork.tokens[:, :, None] == fork.tokens[:, None, :]
            mass = mass.masked_fill(same.tril(-1).any(dim=-1), 0.0)
            left = 1 - (mass.cumsum(dim=-1) - mass)
        accepted = (fork.uniforms * left <= mass) & (mass > 0)
        rest = without(fork.target, fork.tokens, fork.real[:, :1])
        return accepted, normalised(rest, fork.target)


@dataclass(frozen=True)
class Greedy:
    """The longest path on which every token is the target's most likely one; of equals the first.

    Uses no chance; `probs` is all on the most likely token (the first of several) at the last accepted node.
    """

    def verify(self, tree: DraftTree, target: Tensor, uniforms: Tensor) -> VerificationResult:
        check_shapes(tree, target, uniforms)
        return match(tree, target.argmax(dim=-1), target)


def match(tree: DraftTree, drawn: Tensor, target: Tensor) -> VerificationResult:
    """Accept the draft tokens that equal what the target draws by itself.

    Exact whatever the draft tokens are, as long as they do not depend on the numbers that the target draws with.

    Args:
        drawn: [M, T], the token that the target draws after each node.
        target: [M, T, V], of which only shape and type count.
    """
    return longest_path(tree, tree.tokens == drawn.gather(1, tree.parents.clamp(min=0)), drawn, target)


def longest_path(tree: DraftTree, matches: Tensor, best: Tensor, target: Tensor) -> VerificationResult:
    """Accept the longest path on which every node `matches` [M, T]; the `best` [M, T] token of its end follows."""
    parents = tree.parents.clamp(min=0)
    nodes = torch.arange(parents.shape[1], device=parents.device)
    alive = (matches & tree.valid) | (nodes == 0)
    for _ in range(tree.max_depth):
        alive = alive & alive.gather(1, parents)
    length, node = torch.where(alive, tree.depths, -1).max(dim=1)
    token = best.gather(1, node[:, None])
    path = []
    for depth in range(tree.max_depth, -1, -1):
        here = length >= depth
        path.append(torch.where(here, node, -1))
        node = torch.where(here, parents.gather(1, node[:, None])[:, 0], node)
    probs = torch.zeros_like(target[:, 0]).scatter_(1, token, 1.0)
    return VerificationResult(
        torch.stack(path[::-1], dim=1), length, probs, torch.zeros_like(length, dtype=torch.bool)
    )


@dataclass(frozen=True)
class KSequential:
    """k-SEQ of SpecTr: exact like `Exact`, for k draft tokens per node drawn independently from one draft q.

    Each is accepted with probability min(1, p(x) / (ρ q(x))), all alike. With β = Σ min(p / ρ, q), one draft
    token is accepted with probability β, and then distributed as min(p / ρ, q) / β; so all k contribute
    min(p / ρ, q) · S to the distribution of the outcome, where S = (1 - (1 - β)^k) / β. The rest, p - min(p /
    ρ, q) · S, is drawn when all are rejected. It is nowhere negative iff ρβ >= 1 - (1 - β)^k; the left side
    grows with ρ and the right side shrinks, so the smallest such ρ, which accepts most, is found by bisection
    in [1, k]. The upper end of the last interval is taken: exact even if the bisection is not.

    Source: Sun et al. 2023, "SpecTr: Fast Speculative Decoding via Optimal Transport" (arXiv 2310.15141), k-SEQ.

    Attributes:
        iterations: halvings of the interval; they decide how many draft tokens are accepted, not whether
            the distribution is right.
    """

    iterations: int = 16

    def __post_init__(self) -> None:
        settle(self, iterations=positive_integer("iterations", self.iterations))

    def verify(self, tree: DraftTree, target: Tensor, uniforms: Tensor) -> VerificationResult:
        if tree.draw_mode != "independent":
            raise InputError(
                "k-sequential selection needs draft tokens that were drawn independently, these are"
                f" {tree.draw_mode!r}; use Exact instead."
            )
        return walk(tree, target, uniforms, self._decide)

    def _decide(self, fork: Fork) -> Decision:
        assert fork.draft_probs is not None
        target, draft_probs = fork.target, fork.draft_probs
        count = fork.real.sum(dim=-1, keepdim=True).clamp(min=1).to(target.dtype)  # [M, 1]
        scale = count
        if fork.real.shape[1] > 1:
            lower = torch.ones_like(count)
            for _ in range(self.iterations):
                middle = (lower + scale) / 2
                overlap = torch.minimum(middle * draft_probs, target).sum(dim=-1, keepdim=True)  # ρβ
                enough = overlap >= _any_of(overlap / middle, count)
                lower, scale = torch.where(enough, lower, middle), torch.where(enough, middle, scale)
        share = torch.minimum(target / scale, draft_probs)
        chance = share.sum(dim=-1, keepdim=True)
        times = _any_of(chance, count) / chance
        rest = torch.where(chance > 0, target - share * times, target).clamp_(min=0)
        mass = target.gather(-1, fork.tokens)
        bar = fork.uniforms * (scale * draft_probs.gather(-1, fork.tokens))
        distribution = torch.where(fork.real[:, :1], normalised(rest, target), target)
        return (bar <= mass) & (mass > 0), distribution


def _any_of(chance: Tensor, count: Tensor) -> Tensor:
    """1 - (1 - chance)^count without losing digits where the chance is small."""
    return -torch.expm1(count * torch.log1p(-chance.clamp(max=1)))
