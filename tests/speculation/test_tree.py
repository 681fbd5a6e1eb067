"""Shapes of draft trees and how dynamic ones grow."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.scripts import ROOT
from varaccel.errors import InputError
from varaccel.speculation.tree import NAMED_TREES, Beam, DraftTree, DynamicTree, Topology, resolve_tree

GOLDEN = ROOT / "tests" / "golden" / "lantern"
CASES = json.loads((GOLDEN / "cases.json").read_text())
STATIC = load_file(GOLDEN / "static_trees.safetensors")
PUBLISHED_DRAWS = 10  # slots that the public code reserves per node


def free(tree: DraftTree) -> DraftTree:
    """The same tree without the knowledge that its shape is fixed."""
    return DraftTree(tree.tokens, tree.parents.clone(), tree.draw_mode, tree.draft_probs)


# -- static trees ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("name", list(CASES["static_trees"]))
def test_static_trees_equal_the_recorded_ones(name: str, static: bool) -> None:
    case = CASES["static_trees"][name]
    topology = resolve_tree(case["choices"])
    assert topology.num_nodes == case["nodes"] + 1
    assert list(topology.parents) == STATIC[f"{name}.parents"].tolist()
    tree = DraftTree.from_topology(
        topology, torch.zeros(2, topology.num_nodes, dtype=torch.int64), draw_mode="deterministic"
    )
    tree = tree if static else free(tree)
    for row in range(2):
        assert torch.equal(tree.depths[row], STATIC[f"{name}.position_ids"].long())
        assert torch.equal(tree.ancestors[row], STATIC[f"{name}.mask"].bool())
    assert tree.max_depth == topology.max_depth
    assert tree.valid.all()
    # slots in the published list of draws: the root, then ten per node with children
    slots = [0] + [
        1 + PUBLISHED_DRAWS * topology.internal.index(parent) + rank
        for parent, rank in zip(topology.parents[1:], topology.ranks[1:], strict=True)
    ]
    assert slots == STATIC[f"{name}.tree_indices"].tolist()
    paths = {tuple(path) for path in STATIC[f"{name}.retrieve_indices"].tolist()}
    leaves = [node for node, children in enumerate(topology.children) if not children]
    ours = set()
    for leaf in leaves:
        nodes = tree.ancestors[0, leaf].nonzero().flatten().tolist()
        ours.add((*nodes, *[-1] * (topology.max_depth + 1 - len(nodes))))
    assert ours == paths


@pytest.mark.parametrize("name", ["mc_sim_7b_63", "naive_extend_57"])
def test_named_trees_are_the_published_lists(name: str) -> None:
    assert NAMED_TREES[name] == Topology.from_paths(CASES["static_trees"][name]["choices"])
    assert NAMED_TREES["chain"] == Topology.from_paths(CASES["static_trees"]["chain5"]["choices"])


@pytest.mark.parametrize(
    "topology", [*NAMED_TREES.values(), Topology((-1,)), Topology((-1, 0, 0, 1, 0, 2, 2))]
)
def test_derived_numbers_agree_with_each_other(topology: Topology) -> None:
    assert sum(map(len, topology.levels)) == topology.num_nodes
    assert len(topology.levels) == topology.max_depth + 1
    assert topology.branching == max(map(len, topology.children))
    assert topology.is_chain == (topology.branching <= 1)
    for node, children in enumerate(topology.children):
        assert all(topology.parents[child] == node for child in children)
        assert list(children) == sorted(children)
    for node, parent in enumerate(topology.parents[1:], start=1):
        assert topology.depths[node] == topology.depths[parent] + 1
    tree = DraftTree.from_topology(
        topology, torch.zeros(3, topology.num_nodes, dtype=torch.int64), draw_mode="deterministic"
    )
    for shape in (tree, free(tree)):
        assert torch.equal(shape.ancestors.sum(dim=-1) - 1, shape.depths)
        for node, children in enumerate(topology.children):
            assert [child for child in shape.children[1, node].tolist() if child >= 0] == list(children)


def test_chain_and_ranks() -> None:
    chain = Topology.chain(3)
    assert chain.parents == (-1, 0, 1, 2)
    assert (chain.max_depth, chain.branching, chain.draws, chain.is_chain) == (3, 1, 1, True)
    gap = Topology.from_paths([[0], [2], [2, 1]])
    assert gap.ranks == (0, 0, 2, 1)
    assert gap.draws == 3
    assert not gap.consecutive
    assert resolve_tree(3) == chain
    assert resolve_tree(chain) is chain
    assert hash(chain) == hash(Topology((-1, 0, 1, 2)))


def test_numbered_level_by_level() -> None:
    for topology in (*NAMED_TREES.values(), Topology((-1,)), Topology.from_paths([[1], [0, 0], [0]])):
        assert topology.by_level is topology
    assert Topology((-1, 0, 1, 2, 1, 0, 5)).by_level == Topology((-1, 0, 0, 1, 1, 2, 3))
    # siblings keep their order and their draws
    mixed = Topology((-1, 0, 1, 0, 1, 3), (0, 2, 0, 0, 4, 1)).by_level
    assert mixed == Topology((-1, 0, 0, 1, 1, 2), (0, 2, 0, 0, 4, 1))
    assert mixed.by_level is mixed
    # published lists that go by expected gain, not by level
    gained = Topology.from_paths([[0], [0, 0], [1], [0, 1], [2], [0, 0, 0], [1, 0]])
    assert gained.by_level is gained
    assert gained.consecutive


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Topology(()), "a tree needs at least its root"),
        (lambda: Topology((0, 0)), "node 0 is the root and must have parent -1"),
        (lambda: Topology((-1, 0, -1)), "node 2 is an orphan: its parent -1 is not in the tree."),
        (lambda: Topology((-1, 0, 7)), "node 2 is an orphan"),
        (lambda: Topology((-1, 2, 1)), "node 1 has parent 2, but parents must come before their children"),
        (lambda: Topology((-1, 1)), "cycles"),
        (lambda: Topology((-1, 0, 0), (0, 1, 1)), "may not take the same draw"),
        (lambda: Topology((-1, 0, 0), (0, 1)), "ranks must name one draw per node, got 2 for 3 nodes."),
        (lambda: Topology.chain(0), "the length of a chain must be an integer of at least 1, got 0."),
        (lambda: Topology.from_paths([]), "a tree needs at least one path"),
        (lambda: Topology.from_paths([[0], [1, 0]]), "path [1, 0] is an orphan: [1] is not in the tree."),
        (lambda: Topology.from_paths([[0], [0]]), "path [0] is empty or listed twice."),
        (lambda: Topology.from_paths([[]]), "path [] is empty or listed twice."),
        (lambda: Topology.from_paths([[-1]]), "ranks must be 0 for the root and not negative elsewhere."),
        (lambda: resolve_tree("mc_sim_7b"), "unknown tree 'mc_sim_7b'; did you mean 'mc_sim_7b_63'?"),
        (lambda: resolve_tree(-2), "the length of a chain must be an integer of at least 1, got -2."),
        (lambda: resolve_tree([1, 2]), "a tree is a name, a chain length or a list of paths"),  # type: ignore[list-item]
        (lambda: DynamicTree(top_k=0), "top_k of a dynamic tree must be an integer of at least 1, got 0."),
        (lambda: DynamicTree(depth=-1), "depth of a dynamic tree"),
        (lambda: DynamicTree(total=1), "total of a dynamic tree must be an integer of at least 2, got 1."),
    ],
)
def test_bad_shapes_are_explained(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        build()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draw_mode": "sampled"}, "unknown draw_mode 'sampled'"),
        ({"draw_mode": "independent"}, "needs the draft distributions"),
        ({"draft_probs": torch.zeros(2, 3, 4)}, "takes no draft distributions"),
        (
            {"draw_mode": "independent", "draft_probs": torch.zeros(2, 4, 4)},
            "draft_probs must be [M, T, V] = [2, 3, V]",
        ),
        ({"tokens": torch.zeros(2, 4, dtype=torch.int64)}, "tokens must be [M, 3], one per node"),
        (
            {"topology": Topology.from_paths([[0], [2]]), "draw_mode": "without_replacement"},
            "children drawn without replacement must take draws 0, 1, 2, ... in order",
        ),
    ],
)
def test_bad_trees_are_explained(change: dict[str, Any], message: str) -> None:
    options = {
        "topology": Topology.chain(2),
        "tokens": torch.zeros(2, 3, dtype=torch.int64),
        "draw_mode": "deterministic",
    } | change
    with pytest.raises(InputError, match=re.escape(message)):
        DraftTree.from_topology(**options)


def test_unused_nodes_belong_to_nobody() -> None:
    parents = torch.tensor([[-1, 0, 1, 1, -1, -1], [-1, 0, 0, 2, 3, 4]])
    tree = DraftTree(torch.zeros_like(parents), parents, "deterministic")
    assert tree.valid.tolist() == [[True] * 4 + [False] * 2, [True] * 6]
    assert tree.depths.tolist() == [[0, 1, 2, 2, -1, -1], [0, 1, 1, 2, 3, 4]]
    assert tree.max_depth == 4
    assert tree.ancestors[0, 4].tolist() == [False] * 4 + [True, False]
    assert tree.ancestors[0, 3].tolist() == [True, True, False, True, False, False]
    assert tree.children[0].tolist() == [[1, -1], [2, 3], [-1, -1], [-1, -1], [-1, -1], [-1, -1]]
    assert tree.children[1].tolist() == [[1, 2], [-1, -1], [3, -1], [4, -1], [5, -1], [-1, -1]]


# -- dynamic trees ---------------------------------------------------------------------------------------------


def recorded_runs() -> list[tuple[int, int]]:
    return [(head, run) for head, entry in enumerate(CASES["heads"]) for run in range(len(entry["runs"]))]


@pytest.mark.parametrize(("head", "run"), recorded_runs())
def test_dynamic_trees_equal_the_recorded_ones(head: int, run: int) -> None:
    config = CASES["heads"][head]["config"]
    data = load_file(GOLDEN / f"head_{head}.safetensors")
    calls = [f"run{run}.call{call}" for call in range(2)]
    grower = DynamicTree(top_k=config["top_k"], depth=config["depth"], total=config["total_tokens"])
    levels = torch.stack([data[f"{call}.logp_levels"] for call in calls])  # [2, D, K, V]
    tree = grower.grow(
        torch.stack([data[f"{call}.draft_tokens"][0].long() for call in calls]),
        torch.stack([data[f"{call}.logp0"] for call in calls]),
        lambda beam: levels[:, beam.level - 1],
    )
    assert tree.draw_mode == "deterministic"
    for row, call in enumerate(calls):
        assert torch.equal(tree.tokens[row], data[f"{call}.draft_tokens"].long())
        assert torch.equal(tree.parents[row], data[f"{call}.parents"].long())
        assert torch.equal(tree.depths[row], data[f"{call}.position_ids"].long())
        assert torch.equal(tree.ancestors[row], data[f"{call}.tree_mask"].bool())


class PathModel:
    """Log-probabilities that depend on the whole path below the root, different for every row."""

    def __init__(self, size: int, rows: int, keep: int | None = None) -> None:
        self.size, self.rows, self.keep = size, rows, keep
        self.history: list[Tensor] = []
        self.cached: dict[tuple[int, ...], Tensor] = {}

    def distribution(self, row: int, path: tuple[int, ...]) -> Tensor:
        key = (row, *path)
        if key not in self.cached:
            seed = hash(key) % 2**31
            logits = 3 * torch.randn(self.size, generator=torch.Generator().manual_seed(seed))
            if self.keep is not None:
                logits[logits < logits.topk(self.keep).values[-1]] = -torch.inf
            self.cached[key] = logits.log_softmax(dim=-1)
        return self.cached[key]

    def first(self) -> Tensor:
        return torch.stack([self.distribution(row, ()) for row in range(self.rows)])

    def expand(self, beam: Beam) -> Tensor:
        self.history.append(beam.tokens)
        seen = torch.cat(self.history, dim=1)  # [M, level * K]
        assert beam.visible.shape == (*beam.tokens.shape, seen.shape[1])
        assert beam.rows.shape == beam.tokens.shape
        assert (beam.visible.sum(dim=-1) == beam.level).all()
        return torch.stack(
            [
                torch.stack(
                    [
                        self.distribution(row, tuple(seen[row, visible].tolist()))
                        for visible in beam.visible[row]
                    ]
                )
                for row in range(self.rows)
            ]
        )


def plain_growth(model: PathModel, row: int, top_k: int, depth: int, total: int) -> list[tuple[int, ...]]:
    """Paths of the kept nodes, by a plain search over paths."""

    def best(distribution: Tensor) -> list[tuple[int, float]]:
        values, tokens = distribution.topk(top_k)
        return list(zip(tokens.tolist(), values.tolist(), strict=True))

    beam = [((token,), score) for token, score in best(model.distribution(row, ()))]
    created = list(beam)
    for _ in range(depth):
        level = [
            ((*path, token), score + gain)
            for path, score in beam
            for token, gain in best(model.distribution(row, path))
        ]
        created += level
        beam = sorted(level, key=lambda item: -item[1])[:top_k]
    kept = sorted(created, key=lambda item: -item[1])[: total - 1]
    kept = [item for item in kept if item[1] > -torch.inf]
    return [path for path, _ in created if path in {path for path, _ in kept}]


def paths_of(tree: DraftTree, row: int) -> list[tuple[int, ...]]:
    """Tokens below the root on the way to each node in use, and that every parent precedes its child."""
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, tree.tokens.shape[1]):
        parent = int(tree.parents[row, node])
        assert parent < node
        if parent >= 0:
            assert tree.valid[row, parent]
            paths.append((*paths[parent], int(tree.tokens[row, node])))
    return paths[1:]


@pytest.mark.parametrize("keep", [None, 3, 1])
@pytest.mark.parametrize(
    ("top_k", "depth", "total"), [(4, 3, 13), (6, 3, 30), (3, 0, 4), (1, 4, 6), (3, 2, 99)]
)
def test_dynamic_trees_equal_a_plain_search(top_k: int, depth: int, total: int, keep: int | None) -> None:
    model = PathModel(size=9, rows=3, keep=keep)
    root = torch.tensor([7, 8, 0])
    tree = DynamicTree(top_k, depth, total).grow(root, model.first(), model.expand)
    assert tree.tokens.shape[1] == min(total, 1 + top_k + depth * top_k**2)
    assert torch.equal(tree.tokens[:, 0], root)
    assert torch.equal(tree.ancestors.sum(dim=-1) - 1, tree.depths.clamp(min=0))
    for row in range(3):
        assert paths_of(tree, row) == plain_growth(model, row, top_k, depth, total)
        used = tree.valid[row].tolist()
        assert all(left >= right for left, right in pairwise(used)), "unused nodes come last"


def test_certain_tokens_keep_their_parents() -> None:
    """A child of probability 1 has its parent's score; the parent is kept first."""
    size = 6
    sure = torch.full((2, size), -torch.inf)
    sure[:, 3] = 0.0
    tree = DynamicTree(top_k=2, depth=3, total=4).grow(
        torch.zeros(2, dtype=torch.int64), sure, lambda beam: sure[:, None].expand(-1, 2, -1)
    )
    assert tree.parents.tolist() == [[-1, 0, 1, 2]] * 2
    assert tree.tokens.tolist() == [[0, 3, 3, 3]] * 2


def test_dead_beams_may_predict_nonsense() -> None:
    first = torch.full((1, 5), -torch.inf)
    first[0, 2] = 0.0
    tree = DynamicTree(top_k=3, depth=2, total=8).grow(
        torch.zeros(1, dtype=torch.int64), first, lambda beam: torch.full((1, 3, 5), torch.nan)
    )
    assert tree.valid.sum() == 2
    assert tree.tokens[0, :2].tolist() == [0, 2]


def test_a_small_vocabulary_narrows_the_beam() -> None:
    first = torch.tensor([[0.5, 0.3, 0.2]]).log()
    tree = DynamicTree(top_k=10, depth=1, total=59).grow(
        torch.zeros(1, dtype=torch.int64), first, lambda beam: first[:, None].expand(-1, 3, -1)
    )
    assert tree.tokens.shape == (1, 13)
    assert tree.valid.all()


def test_dynamic_growth_checks_its_shapes() -> None:
    with pytest.raises(InputError, match=re.escape("root and first must be [M] and [M, V]")):
        DynamicTree().grow(torch.zeros(2, dtype=torch.int64), torch.zeros(3, 5), lambda beam: torch.zeros(0))
