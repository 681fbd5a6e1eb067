"""LANTERN's relaxed verification rules: a draft token may be accepted for the mass of its neighbours in the codebook.

Not lossless. Both rules share the walk and the shapes of the exact ones, and differ in the acceptance test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from varaccel.engine.options import check_integer, check_number, settle
from varaccel.errors import InputError, unknown_name
from varaccel.speculation.rejection import (
    AcceptanceTest,
    Trial,
    VerificationResult,
    check_shapes,
    exact_test,
    examine_in_turn,
    longest_path,
    normalised,
    walk,
    without,
)
from varaccel.speculation.tree import DraftTree

Residual = Literal["paper", "dynamic", "static", "static_b"]


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
        settle(self, k=check_integer("k", self.k, least=0))
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
        if self.delta is not None:
            settle(self, delta=check_number("delta", self.delta, most=1, off="for a factor use multiplier"))
        if self.multiplier is not None:
            settle(self, multiplier=check_number("multiplier", self.multiplier, least=1))

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
    """LANTERN: a draft token may stand for its nearest neighbours in the codebook. Not exact.

    The acceptance test of `Exact` with p(x) raised by c_J, the mass of the first J neighbours of x, J as large
    as the bound allows. Moving that mass changes the distribution by exactly c_J in total variation. p is always the
    current distribution, what elder siblings have left of it. The token after the last accepted one is drawn from an
    unrelaxed distribution.

    What a rejection leaves depends on `residual`:

    - "paper": as for `Exact`, of the distribution in which x has been given the mass of its first J neighbours: only
      these J lose theirs. For draft tokens drawn from q~: max(p_J - q~, 0), where p_J is p without the J neighbours
      (x itself has no part, for it was rejected because even p(x) + c_J < q~(x)). Borrowing nothing is then
      exact: delta = 0, multiplier = 1 or k = 0, also with zeros in p.
    - "dynamic", "static", "static_b": the three that the public code has, for comparison. If J >= 1, all first
      k + 1 neighbours are cleared: in p ("dynamic", for deterministic draft tokens; "static_b", for drawn ones) or in
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
                f"residual {self.residual!r} is for {kind} draft tokens, these are {tree.draw_mode!r}."
            )
        # an empty neighbourhood borrows nothing, whatever the residual
        test: AcceptanceTest = exact_test if self.k == 0 else self._test
        return walk(tree, target, uniforms, lambda fork: examine_in_turn(fork, test))

    def _test(self, distribution: Tensor, draft_probs: Tensor | None, token: Tensor) -> Trial:
        near, within, extra = self.aggregate(distribution, token)
        rest = self.rest(distribution, draft_probs, token, near, within)
        otherwise: Tensor | float = distribution if self.residual == "paper" else 1 / distribution.shape[-1]
        return Trial(distribution.gather(-1, token) + extra, normalised(rest, otherwise))

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
            distribution = without(distribution, near[:, : self.k], within)
        elif self.residual == "static":
            assert draft_probs is not None
            draft_probs = without(draft_probs, near, within[:, :1])
        else:
            distribution = without(distribution, near, within[:, :1])
        return (
            without(distribution, token)
            if draft_probs is None
            else (distribution - draft_probs).clamp_(min=0)
        )


@dataclass(frozen=True, eq=False)
class RelaxedGreedy(_Neighbourhood):
    """LANTERN without chance: a token passes if the mass of its neighbours makes it the most likely one.

    The neighbours keep their mass in the comparison, so several siblings may pass; the longest path is taken,
    of equals the first. The token that follows is the most likely one of the unrelaxed distribution.

    Source: Jang et al. 2024, "LANTERN" (arXiv 2410.03355), greedy decoding.
    """

    def verify(self, tree: DraftTree, target: Tensor, uniforms: Tensor) -> VerificationResult:
        check_shapes(tree, target, uniforms)
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
        return longest_path(tree, matches, best, target)
