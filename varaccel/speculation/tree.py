"""Draft trees: their shapes, static or dynamic, and the draft tokens in them. Index arithmetic only, no networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from varaccel.engine.options import as_integer, check_integer, positive_integer, settle
from varaccel.errors import InputError, unknown_name

DrawMode = Literal["deterministic", "without_replacement", "independent"]
NOT_CONSECUTIVE = (
    "children drawn without replacement must take draws 0, 1, 2, ... in order; list those that the tree leaves out, or "
    'draft otherwise, as Speculative does with verification="matching".'
)


@dataclass(frozen=True)
class Topology:
    """The fixed shape of a draft tree. Node 0 is the root: a token that is committed already.

    Nodes may be numbered level by level or branch by branch. Children are verified in the order of their numbers.

    Attributes:
        parents: the parent of each node; -1 for the root, elsewhere a smaller number than the node's own.
        ranks: which draw of its parent a node takes, 0 = the first; 0 for the root. Left out, siblings take
            the draws in the order of their numbers.

    Raises:
        InputError: the numbers do not describe one tree that hangs on node 0.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        parents = tuple(self.parents)
        if not parents:
            raise InputError("a tree needs at least its root, got no nodes at all.")
        if parents[0] != -1:
            raise InputError(f"node 0 is the root and must have parent -1, got {parents[0]}.")
        for node, parent in enumerate(parents[1:], start=1):
            if not 0 <= parent < len(parents):
                raise InputError(f"node {node} is an orphan: its parent {parent} is not in the tree.")
            if parent >= node:
                raise InputError(
                    f"node {node} has parent {parent}, but parents must come before their children"
                    " (this also rules out cycles)."
                )
        seen = [0] * len(parents)
        order = [0]
        for parent in parents[1:]:
            order.append(seen[parent])
            seen[parent] += 1
        ranks = tuple(self.ranks) or tuple(order)
        if len(ranks) != len(parents):
            raise InputError(f"ranks must name one draw per node, got {len(ranks)} for {len(parents)} nodes.")
        if ranks[0] != 0 or min(ranks) < 0:
            raise InputError("ranks must be 0 for the root and not negative elsewhere.")
        if len(set(zip(parents, ranks, strict=True))) != len(parents):
            raise InputError("two children of one node may not take the same draw.")
        object.__setattr__(self, "parents", parents)
        object.__setattr__(self, "ranks", ranks)

    @classmethod
    def chain(cls, length: int) -> Topology:
        """The root and `length` draft tokens, each the only child of the one before."""
        return cls(tuple(range(-1, positive_integer("the length of a chain", length))))

    @classmethod
    def from_paths(cls, paths: Sequence[Sequence[int]]) -> Topology:
        """From lists of child ranks, the form in which static trees are published: [0, 2] is the third
        draw below the first draw below the root. Nodes are numbered by length, then lexicographically.
        """
        ordered = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
        if not ordered:
            raise InputError("a tree needs at least one path, got none.")
        number: dict[tuple[int, ...], int] = {(): 0}
        parents, ranks = [-1], [0]
        for path in ordered:
            if path in number:
                raise InputError(f"path {list(path)} is empty or listed twice.")
            if path[:-1] not in number:
                raise InputError(f"path {list(path)} is an orphan: {list(path[:-1])} is not in the tree.")
            number[path] = len(parents)
            parents.append(number[path[:-1]])
            ranks.append(path[-1])
        return cls(tuple(parents), tuple(ranks))

    @property
    def num_nodes(self) -> int:
        """Nodes, the root included."""
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Steps from the root, per node."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def max_depth(self) -> int:
        return max(self.depths)

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Nodes of each depth, in increasing order."""
        levels: list[list[int]] = [[] for _ in range(self.max_depth + 1)]
        for node, depth in enumerate(self.depths):
            levels[depth].append(node)
        return tuple(map(tuple, levels))

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of each node, in increasing order."""
        children: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], start=1):
            children[parent].append(node)
        return tuple(map(tuple, children))

    @cached_property
    def internal(self) -> tuple[int, ...]:
        """Nodes with children, in increasing order: the ones a drafter has to continue."""
        return tuple(node for node, children in enumerate(self.children) if children)

    @property
    def is_chain(self) -> bool:
        return self.branching <= 1

    @cached_property
    def branching(self) -> int:
        """Most children of a node."""
        return max(map(len, self.children))

    @cached_property
    def draws(self) -> int:
        """Draws that a node must offer so that all its children find theirs."""
        return max(self.ranks) + 1 if self.num_nodes > 1 else 0

    @cached_property
    def consecutive(self) -> bool:
        """Whether the children of every node take draws 0, 1, 2, ... in the order of their numbers."""
        return self.ranks == Topology(self.parents).ranks

    @cached_property
    def by_level(self) -> Topology:
        """The same tree numbered level by level, as drafting needs it; siblings keep their order."""
        order = sorted(range(self.num_nodes), key=lambda node: self.depths[node])
        number = {node: place for place, node in enumerate(order)}
        if order == sorted(order):
            return self
        parents = tuple(number.get(self.parents[node], -1) for node in order)
        return Topology(parents, tuple(self.ranks[node] for node in order))


def _from_digits(text: str) -> Topology:
    """Paths as words of digits: "02" is the path [0, 2]."""
    return Topology.from_paths([[int(digit) for digit in word] for word in text.split()])


# Source: the public code of LANTERN (arXiv 2410.03355), whose own source is EAGLE (arXiv 2401.15077).
NAMED_TREES: dict[str, Topology] = {
    "chain": Topology.chain(5),
    # 25 draft tokens in spite of its name
    "mc_sim_7b_63": _from_digits(
        "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001"
    ),
    "naive_extend_57": _from_digits(
        "0 1 2 3 4 00 01 02 03 10 11 12 20 21 22 30 31 40"
        " 000 001 002 003 010 011 012 020 021 022 030 031 100 101 110 200"
        " 0000 0001 0002 0003 0010 0011 0012 0020 0021 0030 0100 0101 0110 0200"
        " 00000 00001 00002 00010 00011 00100 00101 00110 00200"
    ),
}


def resolve_tree(tree: str | int | Topology | Sequence[Sequence[int]]) -> Topology:
    """A topology from the name of a published one, the length of a chain, or lists of child ranks."""
    if isinstance(tree, Topology):
        return tree
    if isinstance(tree, str):
        if tree not in NAMED_TREES:
            raise unknown_name("tree", tree, NAMED_TREES)
        return NAMED_TREES[tree]
    if as_integer(tree) is not None or isinstance(tree, int):
        return Topology.chain(cast("int", tree))
    if not _is_paths(tree):
        raise InputError(
            f"a tree is a name, a chain length or a list of paths such as [[0], [1], [0, 0]], got {tree!r}."
        )
    return Topology.from_paths(tree)


def _is_paths(tree: object) -> bool:
    return isinstance(tree, Sequence) and all(
        isinstance(path, Sequence) and all(isinstance(rank, int) for rank in path) for path in tree
    )


@dataclass(frozen=True)
class _Tables:
    """A topology as tensors: [T], [T], [T, T] and [T, C]."""

    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    children: Tensor


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # the tables outlive the call, which may run in that mode
def _tables(topology: Topology, device: torch.device) -> _Tables:
    parents = torch.tensor(topology.parents, device=device)
    width = max(topology.branching, 1)
    children = [[*kids, *[-1] * (width - len(kids))] for kids in topology.children]
    return _Tables(
        parents=parents,
        depths=torch.tensor(topology.depths, device=device),
        ancestors=_ancestors(parents[None])[0],
        children=torch.tensor(children, device=device),
    )


def _doublings(count: int) -> range:
    """Rounds after which steps of length 1, 2, 4, ... have reached any of `count` ancestors."""
    return range(max(count - 1, 1).bit_length())


def _ancestors(parents: Tensor) -> Tensor:
    """[M, T] -> [M, T, T] bool, whether column is row or one of its ancestors."""
    nodes = torch.arange(parents.shape[1], device=parents.device)
    near = (parents[:, :, None] == nodes) | (nodes[:, None] == nodes)
    reach = near.float()  # whoever is reached in two strides is reached in one stride of twice the length
    for _ in _doublings(parents.shape[1]):
        reach = (reach @ reach).clamp(max=1)
    return reach > 0


@dataclass(frozen=True, eq=False)
class DraftTree:
    """Draft tokens for M sequences, in trees of T nodes.

    Attributes:
        tokens: [M, T] int64; node 0 is the root, the last committed token.
        parents: [M, T] int64, smaller than the node's own number; -1 for the root and for unused nodes.
        draw_mode: how the children of a node were chosen. "deterministic": by anything but chance, given the
            committed tokens; "without_replacement": drawn one after the other from `draft_probs`, never the same
            twice, in the order of their numbers; "independent": drawn from `draft_probs`, possibly the same twice.
        draft_probs: [M, T, V] the distribution that the children of each node were drawn from, zero rows at leaves;
            None if deterministic.
        topology: the shape, if all sequences share one that is known ahead.
    """

    tokens: Tensor
    parents: Tensor
    draw_mode: DrawMode
    draft_probs: Tensor | None = None
    topology: Topology | None = None

    def __post_init__(self) -> None:
        if self.draw_mode not in get_args(DrawMode):
            raise unknown_name("draw_mode", str(self.draw_mode), get_args(DrawMode))
        if self.tokens.dim() != 2 or self.tokens.shape != self.parents.shape:
            raise InputError(
                "tokens and parents of a draft tree must both be [M, T],"
                f" got {list(self.tokens.shape)} and {list(self.parents.shape)}."
            )
        if (self.draft_probs is None) != (self.draw_mode == "deterministic"):
            need = "takes no" if self.draw_mode == "deterministic" else "needs the"
            raise InputError(f"a tree with draw_mode {self.draw_mode!r} {need} draft distributions.")
        if self.draft_probs is not None and (
            self.draft_probs.dim() != 3 or self.draft_probs.shape[:2] != self.tokens.shape
        ):
            raise InputError(
                f"draft_probs must be [M, T, V] = [{self.tokens.shape[0]}, {self.tokens.shape[1]}, V],"
                f" got {list(self.draft_probs.shape)}."
            )

    @classmethod
    def from_topology(
        cls, topology: Topology, tokens: Tensor, *, draw_mode: DrawMode, draft_probs: Tensor | None = None
    ) -> DraftTree:
        """A tree of fixed shape; `tokens` [M, num_nodes] in the order of the topology's nodes."""
        if tokens.dim() != 2 or tokens.shape[1] != topology.num_nodes:
            raise InputError(
                f"tokens must be [M, {topology.num_nodes}], one per node, got {list(tokens.shape)}."
            )
        if draw_mode == "without_replacement" and not topology.consecutive:
            # a draw that is not in the tree changes the distribution of the later ones, so no rule would be exact
            raise InputError(NOT_CONSECUTIVE)
        parents = _tables(topology, tokens.device).parents.expand(tokens.shape)
        return cls(tokens, parents, draw_mode, draft_probs, topology)

    @property
    def _static(self) -> _Tables | None:
        return None if self.topology is None else _tables(self.topology, self.tokens.device)

    @cached_property
    def valid(self) -> Tensor:
        """[M, T] bool, the nodes in use; the root always is."""
        return (self.parents >= 0) | (torch.arange(self.parents.shape[1], device=self.parents.device) == 0)

    @cached_property
    def depths(self) -> Tensor:
        """[M, T] int64 steps from the root; -1 at unused nodes."""
        if self._static is not None:
            return self._static.depths.expand(self.tokens.shape)
        jump = self.parents
        depth = (jump >= 0).long()
        for _ in _doublings(jump.shape[1]):
            # steps known so far, plus the steps known at the node they lead to
            target = jump.clamp(min=0)
            depth = depth + torch.where(jump >= 0, depth.gather(1, target), 0)
            jump = torch.where(jump >= 0, jump.gather(1, target), -1)
        return torch.where(self.valid, depth, -1)

    @cached_property
    def ancestors(self) -> Tensor:
        """[M, T, T] bool: the nodes (columns) that each node (row) continues, itself included.

        The attention mask of a verification pass. Unused nodes see only themselves.
        """
        if self._static is not None:
            return self._static.ancestors.expand(*self.tokens.shape, -1)
        return _ancestors(self.parents)

    @cached_property
    def children(self) -> Tensor:
        """[M, T, C] int64 children of each node in increasing order, padded with -1.

        Without a topology, C is read from the device.
        """
        if self._static is not None:
            return self._static.children.expand(*self.tokens.shape, -1)
        num_rows, num_nodes = self.parents.shape
        nodes = torch.arange(num_nodes, device=self.parents.device)
        elder = (self.parents[:, :, None] == self.parents[:, None, :]) & (nodes[:, None] > nodes)
        rank = torch.where(self.parents >= 0, elder.sum(dim=-1), -1)  # [M, T]
        width = max(int(rank.max()) + 1, 1)
        # nodes without a parent are written to one slot behind all others, which is cut off again
        slot = torch.where(rank >= 0, self.parents * width + rank, num_nodes * width)
        table = torch.full((num_rows, num_nodes * width + 1), -1, device=self.parents.device)
        table.scatter_(1, slot, nodes.expand(num_rows, -1))
        return table[:, :-1].view(num_rows, num_nodes, width)

    @cached_property
    def max_depth(self) -> int:
        """Most steps from the root; without a topology, read from the device."""
        return self.topology.max_depth if self.topology is not None else int(self.depths.max())


@dataclass(frozen=True)
class Beam:
    """The K nodes of one level that a dynamic tree is continued from.

    Attributes:
        tokens: [M, K] int64.
        rows: [M, K] int64, the beam row of each node's parent in the level before; zeros at level 1.
        visible: [M, K, level * K] bool, which nodes of all beams so far (level by level, K each) each node
            continues, itself included.
        level: 1 for the children of the root.
    """

    tokens: Tensor
    rows: Tensor
    visible: Tensor
    level: int


@dataclass(frozen=True)
class DynamicTree:
    """A tree that grows where the drafter is confident (EAGLE-2).

    Each level continues its `top_k` likeliest nodes by their `top_k` likeliest tokens each; in the end the
    likeliest `total` - 1 of all nodes are kept, measured by the probability of their whole path.

    Source: Li et al. 2024, "EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees"
    (arXiv 2406.16858). Parents are carried along explicitly and impossible nodes dropped, because a search
    for parents afterwards goes wrong once several nodes have probability zero.

    Attributes:
        top_k: nodes continued per level and tokens tried per node.
        depth: passes of the drafter; the tree has up to depth + 1 levels below the root.
        total: nodes of the tree, the root included.
    """

    top_k: int = 10
    depth: int = 4
    total: int = 59

    def __post_init__(self) -> None:
        for name, least in (("top_k", 1), ("depth", 0), ("total", 2)):
            value = check_integer(f"{name} of a dynamic tree", getattr(self, name), least=least)
            settle(self, **{name: value})

    def grow(self, root: Tensor, first: Tensor, expand: Callable[[Beam], Tensor]) -> DraftTree:
        """Draft for M sequences.

        Args:
            root: [M] int64 last committed tokens.
            first: [M, V] log-probabilities of the token after the root.
            expand: log-probabilities [M, K, V] of what follows each node of a beam; called `depth` times.
        """
        if first.dim() != 2 or root.shape != first.shape[:1]:
            raise InputError(
                f"root and first must be [M] and [M, V], got {list(root.shape)}, {list(first.shape)}."
            )
        num_rows, width = root.shape[0], min(self.top_k, first.shape[1])
        rows = torch.zeros(num_rows, width, dtype=torch.int64, device=root.device)
        itself = torch.eye(width, dtype=torch.bool, device=root.device).expand(num_rows, -1, -1)
        visible = itself

        scores, tokens = _finite(first).topk(width, dim=-1)  # [M, K]
        beam_nodes = torch.arange(width, device=root.device).expand(num_rows, -1)  # numbers of candidates
        beam_scores, beam_tokens = scores, tokens
        # every node ever tried, in the order of creation: level, beam row of its parent, rank
        all_scores, all_tokens, all_parents = [scores], [tokens], [torch.full_like(tokens, -1)]
        created = width
        for level in range(1, self.depth + 1):
            distribution = expand(Beam(beam_tokens, rows, visible, level))  # [M, K, V]
            gains, tokens = _finite(distribution).topk(width, dim=-1)  # [M, K, K]
            scores = (beam_scores[:, :, None] + gains).flatten(1)  # [M, K * K]
            tokens = tokens.flatten(1)
            all_scores.append(scores)
            all_tokens.append(tokens)
            all_parents.append(beam_nodes.repeat_interleave(width, dim=1))
            if level < self.depth:
                beam_scores, best = scores.topk(width, dim=-1)
                beam_tokens = tokens.gather(1, best)
                beam_nodes = created + best
                rows = best // width
                seen = visible.gather(1, rows[:, :, None].expand(-1, -1, visible.shape[-1]))
                visible = torch.cat([seen, itself], dim=-1)
            created += width * width
        return self._keep(
            root, torch.cat(all_scores, dim=1), torch.cat(all_tokens, dim=1), torch.cat(all_parents, dim=1)
        )

    def _keep(self, root: Tensor, scores: Tensor, tokens: Tensor, parents: Tensor) -> DraftTree:
        """The likeliest candidates [M, N] as a tree, in the order of creation."""
        num_candidates = scores.shape[1]
        kept = min(self.total - 1, num_candidates)
        # Stable, so that of equal scores the older is kept: a parent always outranks its children.
        order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :kept]
        order = torch.where(scores.gather(1, order).isfinite(), order, num_candidates).sort(dim=-1).values
        used = order < num_candidates
        order = order.clamp(max=num_candidates - 1)
        # where each kept candidate ends up in the tree; one slot more for the parent of level 1, the root
        place = torch.zeros_like(tokens[:, :1]).expand(-1, num_candidates + 1).contiguous()
        slots = torch.arange(1, kept + 1, device=root.device).expand_as(order)
        place.scatter_(1, torch.where(used, order + 1, 0), torch.where(used, slots, 0))
        parent = place.gather(1, parents.gather(1, order) + 1)
        return DraftTree(
            tokens=torch.cat([root[:, None], torch.where(used, tokens.gather(1, order), 0)], dim=1),
            parents=torch.cat([torch.full_like(root[:, None], -1), torch.where(used, parent, -1)], dim=1),
            draw_mode="deterministic",
        )


def _finite(log_probs: Tensor) -> Tensor:
    """Rounding may put a log-probability above 0 and a dead beam may predict NaN; neither may win a place."""
    return log_probs.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf).clamp(max=0)
