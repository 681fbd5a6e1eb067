"""LANTERN: speculative decoding in which nearby tokens of the codebook may stand for each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

from torch import Tensor

from varaccel.engine.accelerator import Accelerator, register
from varaccel.engine.counts import SpeculationStats
from varaccel.engine.distribution import Categorical
from varaccel.engine.options import check_choice, check_integer, check_number, check_row_window, settle
from varaccel.errors import InputError
from varaccel.hosts.causal.job import CausalJob
from varaccel.speculation.batch import Speculation
from varaccel.speculation.drafters import Tree, check_drafting, open_proposer, resolve_drafter, resolve_shape
from varaccel.speculation.loop import speculate, verify_by
from varaccel.speculation.rejection import VerificationResult
from varaccel.speculation.relaxed import Relaxed, RelaxedGreedy, Residual
from varaccel.speculation.step import Draws, Verifier
from varaccel.speculation.tree import DraftTree, DynamicTree


@register
@dataclass(frozen=True)
class Lantern(Accelerator[CausalJob]):
    """Accept draft tokens for the sake of their codebook neighbours (Jang et al. 2024, arXiv 2410.03355).

    Approximate: before a draft token is verified, it is given the mass of its nearest neighbours, up to a bound. With
    `delta` (LANTERN) each such move changes the distribution by at most delta in total variation; with `multiplier`
    (LANTERN++, arXiv 2502.06352) it raises the token's probability to at most that multiple. The bound is
    per move, not for the image. k = 0, delta = 0 and multiplier = 1 are lossless with the residual "paper".

    Attributes:
        k: nearest tokens that may give their mass, fewer than the vocabulary has.
        delta: additive bound, 0 to 1; 0.1 if neither bound is given.
        multiplier: multiplicative bound, at least 1.
        tree: as for `Speculative`. The published settings are "dynamic" for LANTERN, a static tree of drawn
            draft tokens for LANTERN++.
        residual: what a rejected draft token leaves of the distribution: "paper", or one of the public code's three,
            "dynamic", "static" and "static_b"; see `Relaxed`.
        drafter: as for `Speculative`.
        normalise: measure distances between codebook vectors of unit length, which is what the image tokenizer decodes;
            the public code measures between the stored vectors.
        adaptive, row_window: as for `Speculative`.

    Raises:
        InputError: an option that cannot be used, or a combination without meaning.
    """

    name: ClassVar[str] = "lantern"
    job_type = CausalJob
    summary: ClassVar[str] = "a drafter proposes tokens, nearby ones in the codebook may stand for each other"

    k: int = 10
    delta: float | None = None
    multiplier: float | None = None
    tree: Tree = 4
    residual: Residual = "paper"
    drafter: object = "auto"
    normalise: bool = True
    adaptive: bool = False
    row_window: int | None = None

    def __post_init__(self) -> None:
        settle(self, k=check_integer("LANTERN's k", self.k, least=0))
        if self.delta is not None and self.multiplier is not None:
            raise InputError("give either delta (LANTERN) or multiplier (LANTERN++), not both.")
        if self.delta is not None:
            settle(self, delta=check_number("LANTERN's delta", self.delta, most=1))
        if self.multiplier is not None:
            settle(self, multiplier=check_number("LANTERN's multiplier", self.multiplier, least=1))
        check_choice("LANTERN residual", self.residual, get_args(Residual))
        settle(self, row_window=check_row_window(self.row_window))
        shape = check_drafting(self.drafter, self.tree, self.adaptive, without_replacement=True)
        if isinstance(shape, DynamicTree):
            if self.residual in ("static", "static_b"):
                raise InputError(
                    f"residual {self.residual!r} is for drawn draft tokens, a dynamic tree takes the likeliest; "
                    'use "paper" or "dynamic".'
                )
        elif self.residual == "dynamic":
            raise InputError(
                'residual "dynamic" is for the draft tokens of a dynamic tree, a static tree draws them; '
                'use "paper", "static" or "static_b".'
            )

    @property
    def continuous(self) -> bool:
        return True

    @property
    def lossless(self) -> bool:
        relaxed = self.k > 0 and self._delta != 0 and self.multiplier != 1
        return not relaxed and self.residual == "paper" and self.row_window is None

    @property
    def _delta(self) -> float | None:
        return 0.1 if self.delta is None and self.multiplier is None else self.delta

    def run(self, job: CausalJob) -> SpeculationStats:
        shape = resolve_shape(self.tree)
        if self.k >= job.vocab_size:
            raise InputError(
                f"LANTERN's k must be smaller than the vocabulary of {job.vocab_size}, got {self.k}."
            )
        if job.neighbours is None:
            raise InputError("this model has no codebook of vectors, which LANTERN needs; use Speculative.")
        table = job.neighbours(self.k, self.normalise).to(job.device)
        drafter = resolve_drafter(self.drafter, job)
        verify: Verifier
        if job.sampling.greedy:
            verify = verify_greedily(RelaxedGreedy(table, self.k, self._delta, self.multiplier))
        else:
            verify = verify_by(Relaxed(table, self.k, self._delta, self.multiplier, self.residual))

        def start(part: CausalJob) -> Speculation:
            session, lanes, proposer = open_proposer(
                part,
                self.row_window,
                drafter,
                shape,
                "deterministic" if isinstance(shape, DynamicTree) else "without_replacement",
                self.adaptive,
            )
            return Speculation(session, lanes, proposer, verify)

        return speculate(job, start)


def verify_greedily(rule: RelaxedGreedy) -> Verifier:
    """Verification by a greedy rule, which needs the full distribution although the likeliest token is taken."""

    def verify(
        tree: DraftTree, distribution: Categorical, draws: Draws, positions: Tensor
    ) -> VerificationResult:
        return rule.verify(tree, distribution.logits.softmax(-1), draws.verifying[:, : tree.tokens.shape[1]])

    return verify
