"""Drafters of a call: from what a user says to a proposer at work."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from varaccel.engine.job import network_of
from varaccel.engine.network import Network, check_substitute
from varaccel.engine.options import check_choice
from varaccel.engine.randomness import GumbelNoise
from varaccel.errors import InputError, unknown_name
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.causal.lanes import Lanes
from varaccel.hosts.causal.network import CausalNetwork, LayeredNetwork
from varaccel.hosts.causal.session import CausalSession
from varaccel.models.eagle import EagleHead
from varaccel.speculation.eagle_drafter import EagleReader
from varaccel.speculation.network_drafter import LayerSubset, NetworkReader
from varaccel.speculation.proposers import BranchReader, DynamicProposer, StaticProposer
from varaccel.speculation.step import Proposer
from varaccel.speculation.tree import NOT_CONSECUTIVE, DrawMode, DynamicTree, Topology, resolve_tree

Tree = int | str | Topology | DynamicTree | Mapping[str, int] | Sequence[Sequence[int]]
"""What a `tree` option may be, see `resolve_shape`."""

Shape = Topology | DynamicTree
DRAFTERS = ("auto", "eagle", "small", "layers")


@dataclass(frozen=True)
class LayerSkip:
    """Draft with some layers of the target itself (Zhang et al. 2023, "Draft & Verify", arXiv 2309.08168).

    Attributes:
        layers: numbers of the layers that are run; None for every other one, first and last included.
    """

    layers: tuple[int, ...] | None = None

    def network(self, target: CausalNetwork) -> LayerSubset:
        """The drafter as a network on the target's weights.

        Raises:
            InputError: the target cannot run some of its layers only.
        """
        takes_layers = "layers" in inspect.signature(target.transform).parameters
        if not (isinstance(target, LayeredNetwork) and takes_layers):
            raise InputError(
                f"a {type(target).__name__} cannot draft with some of its own layers; name another drafter, or use "
                "Jacobi, which needs none."
            )
        chosen = self.layers
        if chosen is None:
            chosen = tuple(sorted({*range(0, target.num_layers, 2), target.num_layers - 1}))
        return LayerSubset(target, tuple(chosen))


def resolve_shape(tree: Tree) -> Shape:
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


def resolve_drafter(drafter: object, job: CausalJob) -> CausalNetwork | EagleHead:
    """The network that drafts for a call.

    Args:
        drafter: "eagle" or "small" for those that came with the model, "layers" or a `LayerSkip` for the model
            itself, "auto" for the first of these that there is, or a network (or a pipeline that has one).

    Raises:
        InputError: the model came without it, or it does not fit the model.
    """
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
        drafter = job.drafters[drafter]
    network = network_of(drafter)
    if isinstance(
        network, EagleHead
    ):  # reads the model's features, so it is no network of the model's signature
        network.check_fits(job.network)
        return network
    if not isinstance(network, Network):
        raise InputError(
            f"drafter must be one of {', '.join(DRAFTERS)}, a LayerSkip, an EagleHead or a network of the model's "
            f"signature, got {type(drafter).__name__}."
        )
    return check_substitute(network, job.network, "drafter")


def check_drafting(drafter: object, tree: Tree, adaptive: bool, without_replacement: bool) -> Shape:
    """The shape of the draft tree; refuses, when an accelerator is made, what fits no model.

    Args:
        without_replacement: whether the children of a static tree are drawn so.
    """
    if isinstance(drafter, str):
        check_choice("drafter", drafter, DRAFTERS)
    shape = resolve_shape(tree)
    if isinstance(shape, DynamicTree):
        if adaptive:
            raise InputError("a dynamic tree adapts by itself; leave adaptive off.")
    elif shape.num_nodes < 2:
        raise InputError("a tree needs at least one draft token below its root.")
    elif without_replacement and not shape.consecutive:
        raise InputError(NOT_CONSECUTIVE)
    return shape


def open_proposer(
    job: CausalJob,
    row_window: int | None,
    drafter: CausalNetwork | EagleHead,
    shape: Shape,
    draw_mode: DrawMode,
    adaptive: bool = False,
    noise: GumbelNoise | None = None,
) -> tuple[CausalSession, Lanes, Proposer]:
    """The target's session, the lanes, and a proposer of trees of this shape from this drafter."""
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
        reader = EagleReader(drafter, session, job.canvas, entries, most, transform=job.transforms(drafter))
        session.number_checks.append(reader.number_check)
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
