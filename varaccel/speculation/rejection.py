"""Which guesses of a draft tree are kept, and the distribution of the token that follows them.

A rule is a pure function of the tree, the target's distributions at its nodes and given uniform numbers. It never
sees a network. All rules that use chance share one walk from the root: at each node its children are examined in
the order of their numbers, the walk goes on below the first that is accepted and ends where none is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from varaccel.errors import InputError, unknown_name
from varaccel.speculation.tree import DraftTree, DrawMode

Residual = Literal["paper", "dynamic", "static", "static_b"]


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
        """Verifier M trees of T nodes over V tokens.

        Args:
            tree: the guesses.
            target: [M, T, V] probabilities (float32 or float64) of the token that follows each node, after
                guidance and filters.
            uniforms: [M, T] in [0, 1); number i is used when node i is examined.
        """
        ...


# --------------------------------------------------------------------------------------------------------------
# the walk


@dataclass(frozen=True, eq=False)
class _Fork:
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
_Decision = tuple[Tensor, Tensor]


def _check(tree: DraftTree, target: Tensor, uniforms: Tensor) -> None:
    shape = list(tree.tokens.shape)
    if target.dim() != 3 or list(target.shape[:2]) != shape:
        raise InputError(f"target must be [M, T, V] = [{shape[0]}, {shape[1]}, V], got {list(target.shape)}.")
    if list(uniforms.shape) != shape:
        raise InputError(f"uniforms must be [M, T] = {shape}, one per node, got {list(uniforms.shape)}.")
    if tree.draft_probs is not None and tree.draft_probs.shape != target.shape:
        raise InputError(
            f"draft {list(tree.draft_probs.shape)} and target {list(target.shape)} differ in shape."
        )


def _walk(
    tree: DraftTree, target: Tensor, uniforms: Tensor, decide: Callable[[_Fork], _Decision]
) -> VerificationResult:
    _check(tree, target, uniforms)
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
        fork = _Fork(
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


def _normalised(rest: Tensor, otherwise: Tensor | float) -> Tensor:
    """`rest` [M, V] divided by its sum; where nothing is left, `otherwise`."""
    total = rest.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, rest / total, otherwise)


def _take(distribution: Tensor, tokens: Tensor, taken: Tensor | None = None) -> Tensor:
    """The distribution [M, V] without the mass of `tokens` [M, J], or of those that are `taken` [M, J] only."""
    if taken is None:
        return distribution.scatter(-1, tokens, 0.0)
    return distribution.scatter(-1, tokens, distribution.gather(-1, tokens).masked_fill(taken, 0.0))


def _one_by_one(fork: _Fork, relaxed: Relaxed | None = None) -> _Decision:
    """Examine children in turn, each against what the rejections before it left of the distribution."""
    distribution, draft_probs = fork.target, fork.draft_probs
    accepted = []
    width = fork.tokens.shape[1]
    for child in range(width):
        token, real = fork.tokens[:, child : child + 1], fork.real[:, child : child + 1]
        mass = distribution.gather(-1, token)
        bar = fork.uniforms[:, child : child + 1]
        if draft_probs is not None:
            drawn = draft_probs.gather(-1, token)
            bar = bar * drawn
            # never drawn, so nothing can be learned from it: fillers behind the last token of positive mass
            real = real & (drawn > 0)
        if relaxed is None or relaxed.k == 0:
            rest = (
                _take(distribution, token)
                if draft_probs is None
                else (distribution - draft_probs).clamp_(min=0)
            )
            otherwise: Tensor | float = distribution
        else:
            near, within, extra = relaxed.aggregate(distribution, token)
            mass = mass + extra
            rest = relaxed.rest(distribution, draft_probs, token, near, within)
            otherwise = distribution if relaxed.residual == "paper" else 1 / distribution.shape[-1]
        # the second condition: a number of exactly 0 must not let an impossible token through
        accepted.append((bar <= mass) & (mass > 0) & real)
        distribution = torch.where(real, _normalised(rest, otherwise), distribution)
        if draft_probs is not None and fork.draw_mode == "without_replacement" and child + 1 < width:
            draft_probs = _normalised(_take(draft_probs, token), 0.0)
    return torch.cat(accepted, dim=1), distribution


# --------------------------------------------------------------------------------------------------------------
# lossless rules


@dataclass(frozen=True)
class Exact:
    """The tokens that come out are distributed as the target's own, whatever the guesses were.

    A guess x with target p is accepted with probability min(1, p(x) / q(x)) and p becomes max(p - q, 0),
    normalised, when it is rejected. q is all on x if x was not left to chance; drawn without replacement,
    it is the draft without the elder siblings, normalised; drawn independently, the draft itself. A tree with
    one child per node is ordinary speculative sampling.

    Where p = q nothing can be rejected; should rounding do so nonetheless, p stays as it was.

    Sources: Leviathan et al. 2023 (arXiv 2211.17192), section 2.3; Miao et al. 2023, "SpecInfer" (arXiv
    2305.09781), section 4.3; Jeon et al. 2024, "Recursive Speculative Decoding" (arXiv 2402.14160), section 3.
    """

    def verify(self, tree: DraftTree, target: Tensor, uniforms: Tensor) -> VerificationResult:
        return _walk(tree, target, uniforms, self._decide)

    @staticmethod
    def _decide(fork: _Fork) -> _Decision:
        if fork.draft_probs is not None:
            return _one_by_one(fork)
        # Sure guesses only take themselves away, so all siblings can be judged at once.
        mass = fork.target.gather(-1, fork.tokens)  # [M, C]
        left: Tensor | float = 1.0
        width = mass.shape[1]
        if width > 1:
            # a token that an elder sibling has already tried has no mass left
            same = fork.tokens[:, :, None] == fork.tokens[:, None, :]
            mass = mass.masked_fill(same.tril(-1).any(dim=-1), 0.0)
            left = 1 - (mass.cumsum(dim=-1) - mass)
        accepted = (fork.uniforms * left <= mass) & (mass > 0)
        rest = _take(fork.target, fork.tokens, fork.real[:, :1])
        return accepted, _normalised(rest, fork.target)


@dataclass(frozen=True)
class Greedy:
    """The longest path on which every token is the target's most likely one; of equals the first.

    Uses no chance; `probs` is all on the most likely token (the first of several) at the last accepted node.
    """

    def verify(self, tree: DraftTree, target: Tensor, uniforms: Tensor) -> VerificationResult:
        _check(tree, target, uniforms)
        return match(tree, target.argmax(dim=-1), target)


def match(tree: DraftTree, drawn: Tensor, target: Tensor) -> VerificationResult:
    """Accept the guesses that equal what the target draws by itself.

    Exact whatever the guesses are, as long as they do not depend on the numbers that the target draws with.

    Args:
        drawn: [M, T], the token that the target draws after each node.
        target: [M, T, V], of which only shape and type count.
    """
    return _longest(tree, tree.tokens == drawn.gather(1, tree.parents.clamp(min=0)), drawn, target)


def _longest(tree: DraftTree, matches: Tensor, best: Tensor, target: Tensor) -> VerificationResult:
    """Of all paths on which each node `matches` [M, T] its parent, the longest; then the `best` [M, T] token."""
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
    """As lossless as `Exact`, for k guesses per node that were drawn independently from one draft q.

    Each is accepted with probability min(1, p(x) / (ρ q(x))), all alike. With β = Σ min(p / ρ, q), one guess
    is accepted with probability β, and then distributed as min(p / ρ, q) / β; so all k contribute
    min(p / ρ, q) · S to the distribution of the outcome, where S = (1 - (1 - β)^k) / β. The rest, p - min(p /
    ρ, q) · S, is drawn when all are rejected. It is nowhere negative iff ρβ >= 1 - (1 - β)^k; the left side
    grows with ρ and the right side shrinks, so the smallest such ρ, which accepts most, is found by bisection
    in [1, k].
    The upper end of the last interval is taken: exact even if the bisection is not.

    Source: Sun et al. 2023, "SpecTr: Fast Speculative Decoding via Optimal Transport" (arXiv 2310.15141), k-SEQ.

    Attributes:
        iterations: halvings of the interval; they decide how many guesses are accepted, not whether the distribution
            is right.
    """

    iterations: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise InputError(f"iterations must be an integer >= 1, got {self.iterations!r}.")

    def verify(self, tree: DraftTree, target: Tensor, uniforms: Tensor) -> VerificationResult:
        if tree.draw_mode != "independent":
            raise InputError(
                "k-sequential selection needs guesses that were drawn independently, these are"
                f" {tree.draw_mode!r}; use Exact instead."
            )
        return _walk(tree, target, uniforms, self._decide)

    def _decide(self, fork: _Fork) -> _Decision:
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
        distribution = torch.where(fork.real[:, :1], _normalised(rest, target), target)
        return (bar <= mass) & (mass > 0), distribution


def _any_of(chance: Tensor, count: Tensor) -> Tensor:
    """1 - (1 - chance)^count without losing digits where the chance is small."""
    return -torch.expm1(count * torch.log1p(-chance.clamp(max=1)))


# --------------------------------------------------------------------------------------------------------------
# relaxed rules


@dataclass(frozen=True, eq=False)
class _Neighbourhood:
    """How far a token may stand for its neighbours: the option fields of the relaxed rules.

    Attributes:
        table: [V, >= min(k + 1, V - 1)] int, the nearest other tokens of each token, nearest first.
        k: neighbours that may be aggregated.
        delta: most mass that may be borrowed, in [0, 1] (LANTERN); or
        multiplier: at least 1; the borrowed mass may raise p(x) to `multiplier` times itself (LANTERN++).
    """

    table: Tensor
    k: int
    delta: float | None = None
    multiplier: float | None = None

    def __post_init__(self) -> None:
        if self.table.dim() != 2 or self.table.is_floating_point():
            raise InputError("table must be an integer tensor [V, neighbours]; see neighbour_table.")
        size, width = self.table.shape
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 0:
            raise InputError(f"k must be an integer >= 0, got {self.k!r}.")
        if self.k >= size:
            raise InputError(f"k must be smaller than the vocabulary of {size}, got {self.k}.")
        if width < min(self.k + 1, size - 1):
            raise InputError(
                f"the table lists {width} neighbours per token, k = {self.k} needs {min(self.k + 1, size - 1)}."
            )
        if (self.delta is None) == (self.multiplier is None):
            raise InputError(
                "give either delta (additive) or multiplier (relative), not both and not neither."
            )
        if self.delta is not None and not 0 <= self.delta <= 1:
            raise InputError(f"delta must be from 0 to 1, got {self.delta}; for a factor use multiplier.")
        if self.multiplier is not None and not 1 <= self.multiplier < float("inf"):
            raise InputError(f"multiplier must be a number >= 1, got {self.multiplier}.")

    def _borrow(self, mass: Tensor, near_mass: Tensor) -> tuple[Tensor, Tensor]:
        """Which neighbours fit the bound, and their mass.

        Args:
            mass: [..., 1] p(x).
            near_mass: [..., k] p at the neighbours, nearest first; k > 0.

        Returns:
            within [..., k] bool, a leading run; extra [..., 1], the largest sum that fits.
        """
        sums = near_mass.cumsum(dim=-1)
        if self.delta is not None:
            within = sums <= self.delta
        else:
            assert self.multiplier is not None
            within = sums <= (self.multiplier - 1) * mass
        return within, (sums * within).amax(dim=-1, keepdim=True)

    def _check_vocabulary(self, target: Tensor) -> None:
        if target.shape[-1] != self.table.shape[0]:
            raise InputError(
                f"the neighbour table is for {self.table.shape[0]} tokens, the target has {target.shape[-1]}."
            )


@dataclass(frozen=True, eq=False)
class Relaxed(_Neighbourhood):
    """LANTERN: a token may stand for its nearest neighbours in the codebook. Not lossless.

    The acceptance test of `Exact` with p(x) raised by c_J, the mass of the first J neighbours of x, J as large
    as the bound allows. Moving that mass changes the distribution by exactly c_J in total variation. p is always the
    current distribution, what elder siblings have left of it. The token after the last accepted one is drawn from an
    unrelaxed distribution.

    What a rejection leaves depends on `residual`:

    - "paper": as for `Exact`, of the distribution in which x has been given the mass of its first J neighbours: only
      these J lose theirs. Guesses drawn from q~: max(p_J - q~, 0), where p_J is p without the J neighbours
      (x itself has no part, for it was rejected because even p(x) + c_J < q~(x)). Borrowing nothing is then
      exact: delta = 0, multiplier = 1 or k = 0, also with zeros in p.
    - "dynamic", "static", "static_b": the three that the public code has, for comparison. If J >= 1, all first
      k + 1 neighbours are cleared: in p ("dynamic", for deterministic guesses; "static_b", for drawn ones) or in
      the draft that is subtracted ("static", for drawn ones). J >= 1 is already true for a neighbour of mass 0,
      so these are not exact at delta = 0. If nothing is left, the distribution becomes uniform over all tokens.

    Sources: Jang et al. 2024, "LANTERN" (arXiv 2410.03355); Park et al. 2025, "LANTERN++" (arXiv 2502.06352).

    Attributes:
        table, k, delta, multiplier: how far a token may stand for its neighbours; one of the last two.
        residual: what a rejection leaves.
    """

    residual: Residual = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.residual not in get_args(Residual):
            raise unknown_name("residual", str(self.residual), get_args(Residual))

    def verify(self, tree: DraftTree, target: Tensor, uniforms: Tensor) -> VerificationResult:
        self._check_vocabulary(target)
        if self.residual != "paper" and (self.residual == "dynamic") != (tree.draft_probs is None):
            kind = "deterministic" if self.residual == "dynamic" else "drawn"
            raise InputError(
                f"residual {self.residual!r} is for {kind} guesses, these are {tree.draw_mode!r}."
            )
        return _walk(tree, target, uniforms, lambda fork: _one_by_one(fork, self))

    def aggregate(self, distribution: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What tokens borrow from their neighbours.

        Args:
            distribution: [M, V] probabilities.
            token: [M, 1].

        Returns:
            near [M, min(k + 1, V - 1)] neighbours, nearest first; within [M, k] bool, the J that are
            aggregated; extra [M, 1], their mass c_J.
        """
        near = self.table[token[:, 0], : self.k + 1].long()
        if self.k == 0:
            return near, near[:, :0] > 0, torch.zeros_like(distribution[:, :1])
        within, extra = self._borrow(
            distribution.gather(-1, token), distribution.gather(-1, near[:, : self.k])
        )
        return near, within, extra

    def rest(
        self, distribution: Tensor, draft_probs: Tensor | None, token: Tensor, near: Tensor, within: Tensor
    ) -> Tensor:
        """[M, V] what is left of the distribution after `token` was rejected, not normalised; see `aggregate`."""
        if self.residual == "paper":
            distribution = _take(distribution, near[:, : self.k], within)
        elif self.residual == "static":
            assert draft_probs is not None
            draft_probs = _take(draft_probs, near, within[:, :1])
        else:
            distribution = _take(distribution, near, within[:, :1])
        return (
            _take(distribution, token) if draft_probs is None else (distribution - draft_probs).clamp_(min=0)
        )


@dataclass(frozen=True, eq=False)
class RelaxedGreedy(_Neighbourhood):
    """LANTERN without chance: a token passes if the mass of its neighbours makes it the most likely one.

    The neighbours keep their mass in the comparison, so several siblings may pass; the longest path is taken,
    of equals the first. The token that follows is the most likely one of the unrelaxed distribution.

    Source: Jang et al. 2024, "LANTERN" (arXiv 2410.03355), greedy decoding.
    """

    def verify(self, tree: DraftTree, target: Tensor, uniforms: Tensor) -> VerificationResult:
        _check(tree, target, uniforms)
        self._check_vocabulary(target)
        num_rows, num_nodes, size = target.shape
        parents = tree.parents.clamp(min=0)
        top, best = target.max(dim=-1)  # [M, T], the first of equals
        matches = tree.tokens == best.gather(1, parents)
        if self.k > 0:
            at_parent = parents[:, :, None] * size
            near = self.table[tree.tokens, : self.k].long()  # [M, T, k]
            flat = target.flatten(1)
            mass = flat.gather(1, (at_parent[:, :, 0] + tree.tokens))[:, :, None]
            near_mass = flat.gather(1, (at_parent + near).flatten(1)).view(num_rows, num_nodes, self.k)
            _, extra = self._borrow(mass, near_mass)
            # a token that is not the most likely one has to beat the one that is
            rival = top.gather(1, parents)
            matches = matches | ((mass + extra)[:, :, 0] > rival)
        return _longest(tree, matches, best, target)
