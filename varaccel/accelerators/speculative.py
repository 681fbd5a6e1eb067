"""Exact speculative decoding with a drafter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from varaccel.engine.accelerator import Accelerator, register
from varaccel.engine.counts import SpeculationStats
from varaccel.engine.options import check_choice, check_row_window, settle
from varaccel.errors import InputError
from varaccel.hosts.causal.job import CausalJob
from varaccel.speculation.batch import Speculation
from varaccel.speculation.drafters import Tree, check_drafting, open_proposer, resolve_drafter, resolve_shape
from varaccel.speculation.loop import (
    speculate,
    verify_by,
    verify_by_matching,
    verify_by_noise,
)
from varaccel.speculation.rejection import Exact, Greedy, KSequential
from varaccel.speculation.step import Verifier
from varaccel.speculation.tree import DrawMode, DynamicTree

Verification = Literal["auto", "recursive", "k_sequential", "matching", "gumbel"]


@register
@dataclass(frozen=True)
class Speculative(Accelerator[CausalJob]):
    """A drafter proposes tokens, the model verifies all of them in one pass (Leviathan et al. 2023, arXiv 2211.17192).

    Lossless: images follow the distribution of plain decoding, whatever the drafter says; a poor drafter only costs
    time. With temperature 0 they are those of plain decoding, token for token.

    Attributes:
        drafter: "eagle" or "small": a drafter that came with the model; "layers": every other layer of the
            model itself; "auto": the first of these that there is. Or a `LayerSkip`, an `EagleHead`, or a
            smaller `LlamaGenTransformer` of the same token ids and conditions.
        tree: what is drafted per pass: the length of a chain, the name of a published tree, lists of child
            ranks ([0, 2] is the third draw below the first; draws may be left out unless draft tokens are drawn
            without replacement), a `Topology`; "dynamic", a `DynamicTree` or its options as a mapping for one that
            grows where the drafter is confident.
        verification: "recursive": draft tokens drawn without replacement, each verified against what the rejection
            of its elder siblings left (arXiv 2402.14160). "k_sequential": independent draft tokens, verified by the
            nearly optimal transport of SpecTr (arXiv 2310.15141). "matching": the drafter's likeliest
            tokens, accepted where they equal what plain decoding draws with this seed, so that images are
            token for token those of plain decoding. "gumbel": draft tokens drawn with the Gumbel noise that
            belongs to a position, accepted where the model draws the same with it, so that the image
            depends on the seed alone, not on drafter or tree (arXiv 2408.07978); it is that of
            Gumbel-coupled `Jacobi`. "auto": matching for dynamic trees, else recursive.
        adaptive: let the depth of a chain or static tree follow what was accepted lately.
        row_window: decode rows in parallel with this lag between them, as `ZipAR` does; the distribution is then
            ZipAR's, which is approximate. None for raster order.

    Raises:
        InputError: an option that cannot be used, or a combination without meaning.
    """

    name: ClassVar[str] = "speculative"
    job_type = CausalJob
    summary: ClassVar[str] = "a drafter proposes tokens, the model verifies them"

    drafter: object = "auto"
    tree: Tree = 4
    verification: Verification = "auto"
    adaptive: bool = False
    row_window: int | None = None

    def __post_init__(self) -> None:
        check_choice("verification", self.verification, get_args(Verification))
        settle(self, row_window=check_row_window(self.row_window))
        recursive = self.verification in ("auto", "recursive")
        shape = check_drafting(self.drafter, self.tree, self.adaptive, without_replacement=recursive)
        if isinstance(shape, DynamicTree) and self.verification == "k_sequential":
            raise InputError(
                "k_sequential verification needs independently drawn draft tokens, a dynamic tree takes the "
                "likeliest; give a chain or static tree, or another verification."
            )

    @property
    def continuous(self) -> bool:
        return True

    @property
    def lossless(self) -> bool:
        return self.row_window is None

    def run(self, job: CausalJob) -> SpeculationStats:
        shape = resolve_shape(self.tree)
        dynamic = isinstance(shape, DynamicTree)
        verification = self.verification
        if verification == "auto":
            verification = "matching" if dynamic else "recursive"
        draw_mode: DrawMode = "without_replacement"
        if dynamic or verification in ("matching", "gumbel"):
            draw_mode = "deterministic"
        elif verification == "k_sequential":
            draw_mode = "independent"
        drafter = resolve_drafter(self.drafter, job)

        def start(part: CausalJob) -> Speculation:
            noise = part.randomness.gumbel(part.vocab_size) if verification == "gumbel" else None
            session, lanes, proposer = open_proposer(
                part, self.row_window, drafter, shape, draw_mode, self.adaptive, noise
            )
            verify: Verifier
            if session.sampling.greedy:
                verify = verify_by(Greedy())
            elif noise is not None:
                verify = verify_by_noise(noise)
            elif verification == "matching":
                verify = verify_by_matching(part.randomness)
            else:
                verify = verify_by(KSequential() if verification == "k_sequential" else Exact())
            return Speculation(session, lanes, proposer, verify, noise)

        return speculate(job, start)
