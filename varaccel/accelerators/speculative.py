"""Exact speculative decoding with a drafter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from torch import nn

from varaccel.engine.accelerator import Accelerator, register
from varaccel.engine.job import Job
from varaccel.engine.options import check_choice, check_row_window
from varaccel.engine.randomness import GumbelNoise
from varaccel.engine.statistics import SpeculationStats
from varaccel.errors import InputError, unknown_name
from varaccel.hosts.causal.lanes import Lanes
from varaccel.hosts.causal.session import CausalSession
from varaccel.speculation.eagle_drafter import EagleReader
from varaccel.speculation.loop import (
    Proposer,
    Verifier,
    speculate,
    verify_by,
    verify_by_matching,
    verify_by_noise,
)
from varaccel.speculation.network_drafter import LayerSubset, NetworkReader, check_same_codes
from varaccel.speculation.proposers import BranchReader, DynamicProposer, StaticProposer
from varaccel.speculation.rejection import Exact, Greedy, KSequential
from varaccel.speculation.tree import DrawMode, DynamicTree, Topology, resolve_tree

Verification = Literal["auto", "recursive", "k_sequential", "matching", "gumbel"]
Shape = Topology | DynamicTree
DRAFTERS = ("auto", "eagle", "small", "layers")


@dataclass(frozen=True)
class LayerSkip:
    """Draft with some layers of the target itself (Zhang et al. 2023, "Draft & Verify", arXiv 2309.08168).

    Attributes:
        layers: numbers of the layers that are run; None for every other one, first and last included.
    """

    layers: tuple[int, ...] | None = None

    def network(self, target: Any) -> LayerSubset:
        """The drafter as a network on the target's weights.

        Raises:
            InputError: the target cannot run some of its layers only.
        """
        depth = target.config.get("num_layers")
        if depth is None:
            raise InputError(
                f"a {type(target).__name__} cannot draft with some of its own layers; name another drafter, or use "
                "Jacobi, which needs none."
            )
        chosen = self.layers
        if chosen is None:
            chosen = tuple(sorted({*range(0, depth, 2), depth - 1}))
        return LayerSubset(target, tuple(chosen))


def resolve_shape(tree: Any) -> Shape:
    """What a `tree` option means: "dynamic" or the options of a `DynamicTree`, or see `resolve_tree`."""
    if isinstance(tree, DynamicTree):
        return tree
    if isinstance(tree, Mapping):
        known = [f.name for f in fields(DynamicTree)]
        for option in tree:
            if option not in known:
                raise unknown_name("option of a dynamic tree", str(option), known)
        return DynamicTree(**tree)
    if tree == "dynamic":
        return DynamicTree()
    return resolve_tree(tree)


def resolve_drafter(drafter: object, job: Job) -> nn.Module | LayerSubset:
    """The network that drafts for a call.

    Args:
        drafter: "eagle" or "small" for those that came with the model, "layers" or a `LayerSkip` for the model
            itself, "auto" for the first of these that there is, or a network.

    Raises:
        InputError: the model came without it, or it does not fit the model.
    """
    from varaccel.models.eagle import EagleHead
    from varaccel.models.llamagen import LlamaGenTransformer

    if drafter == "auto":
        drafter = next((name for name in ("eagle", "small") if name in job.drafters), "layers")
    if drafter == "layers":
        drafter = LayerSkip()
    if isinstance(drafter, LayerSkip):
        return drafter.network(job.network)
    if isinstance(drafter, str):
        if drafter not in job.drafters:
            raise InputError(
                f'this model came without a drafter called {drafter!r}; use drafter="layers" or Jacobi, which '
                "need none, or train one with `varaccel train drafter`."
            )
        return job.drafters[drafter]
    if isinstance(drafter, EagleHead):
        drafter.check_fits(job.network)
        return drafter
    if isinstance(drafter, LlamaGenTransformer):
        check_same_codes(drafter, job.network)
        return drafter
    raise InputError(
        f"drafter must be one of {', '.join(DRAFTERS)}, a LayerSkip, an EagleHead or a LlamaGenTransformer, "
        f"got {type(drafter).__name__}."
    )


@register
@dataclass(frozen=True)
class Speculative(Accelerator):
    """A drafter guesses tokens, the model judges all of them in one pass (Leviathan et al. 2023, arXiv 2211.17192).

    Exact: images follow the distribution of plain decoding, whatever the drafter says; a poor drafter only costs
    time. With temperature 0 they are those of plain decoding, token for token.

    Attributes:
        drafter: "eagle" or "small": a drafter that came with the model; "layers": every other layer of the
            model itself; "auto": the first of these that there is. Or a `LayerSkip`, an `EagleHead`, or a
            smaller `LlamaGenTransformer` of the same codes and conditions.
        tree: what is guessed per pass: the length of a chain, the name of a published tree, lists of child
            ranks, a `Topology`; "dynamic", a `DynamicTree` or its options as a mapping for one that grows where
            the drafter is sure.
        verification: "recursive": guesses drawn without replacement, each judged against what the rejection
            of its elder siblings left (arXiv 2402.14160). "k_sequential": independent guesses, judged by the
            nearly optimal transport of SpecTr (arXiv 2310.15141). "matching": the drafter's likeliest
            tokens, accepted where they equal what plain decoding draws with this seed, so that images are
            token for token those of plain decoding. "gumbel": guesses drawn with the Gumbel noise that
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
    hosts: ClassVar[tuple[str, ...]] = ("llamagen",)
    summary: ClassVar[str] = "a drafter guesses, the model judges"

    drafter: Any = "auto"
    tree: int | str | Topology | DynamicTree | Sequence[Sequence[int]] = 4
    verification: Verification = "auto"
    adaptive: bool = False
    row_window: int | None = None

    def __post_init__(self) -> None:
        check_choice("verification", self.verification, get_args(Verification))
        check_row_window(self.row_window)
        shape = check_drafting(self.drafter, self.tree, self.adaptive)
        if isinstance(shape, DynamicTree) and self.verification == "k_sequential":
            raise InputError(
                "k_sequential verification needs independently drawn guesses, a dynamic tree takes the "
                "likeliest; give a chain or static tree, or another verification."
            )

    @property
    def lossless(self) -> bool:
        return self.row_window is None

    def run(self, job: Job) -> SpeculationStats:
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
        noise = job.randomness.gumbel(job.codes) if verification == "gumbel" else None
        session, lanes, proposer = open_proposer(
            job, self.row_window, resolve_drafter(self.drafter, job), shape, draw_mode, self.adaptive, noise
        )
        verify: Verifier
        if session.sampling.greedy:
            verify = verify_by(Greedy())
        elif noise is not None:
            verify = verify_by_noise(noise)
        elif verification == "matching":
            verify = verify_by_matching(job.randomness)
        else:
            verify = verify_by(KSequential() if verification == "k_sequential" else Exact())
        return speculate(session, job.canvas, lanes, proposer, verify, job.randomness, job.on_step)


def check_drafting(drafter: object, tree: Any, adaptive: bool) -> Shape:
    """The shape of what is guessed; refuses at construction what no model can be drafted for with."""
    if isinstance(drafter, str):
        check_choice("drafter", drafter, DRAFTERS)
    shape = resolve_shape(tree)
    if isinstance(shape, DynamicTree):
        if adaptive:
            raise InputError("a dynamic tree adapts by itself; leave adaptive off.")
    elif shape.num_nodes < 2:
        raise InputError("a tree needs at least one guess below its root.")
    return shape


def open_proposer(
    job: Job,
    row_window: int | None,
    drafter: nn.Module | LayerSubset,
    shape: Shape,
    draw_mode: DrawMode,
    adaptive: bool = False,
    noise: GumbelNoise | None = None,
) -> tuple[CausalSession, Lanes, Proposer]:
    """The target's session, the lanes, and a proposer of trees of this shape from this drafter."""
    from varaccel.models.eagle import EagleHead

    lanes = job.lanes(row_window)
    most = lanes.most_open(job.canvas.num_positions)
    if isinstance(shape, DynamicTree):
        depth, entries = shape.depth + 1, shape.depth * shape.top_k
        nodes = DynamicProposer.most_nodes(shape)
    else:
        depth, entries, nodes = shape.max_depth, len(shape.internal) - 1, shape.num_nodes
    session = job.open_session(draft_slots=most * (nodes - 1))
    reader: BranchReader
    if isinstance(drafter, EagleHead):
        reader = EagleReader(drafter, session, job.canvas, entries, most)
    else:
        own = job.open_session(network=drafter, draft_slots=most * entries)
        reader = NetworkReader(own, job.canvas, depth, entries)
    if isinstance(shape, DynamicTree):
        return session, lanes, DynamicProposer(reader, shape)
    proposer = StaticProposer(
        reader,
        shape,
        draw_mode,
        job.canvas.num_positions // lanes.width,
        lane_width=lanes.width,
        batch=job.canvas.batch,
        device=job.canvas.written.device,
        adaptive=adaptive,
        fixed=session.static_shapes,
        noise=noise,
    )
    return session, lanes, proposer
