"""Acceptance rules: equal to the recorded ones, and exact as distributions where they claim to be."""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.scripts import ROOT
from varaccel.errors import InputError
from varaccel.speculation.rejection import (
    Decision,
    Exact,
    Fork,
    Greedy,
    KSequential,
    Rule,
    VerificationResult,
    examine_in_turn,
    walk,
)
from varaccel.speculation.relaxed import Relaxed, RelaxedGreedy, Residual
from varaccel.speculation.tree import NAMED_TREES, DraftTree, DynamicTree, Topology
from varaccel.tokenizers.neighbours import neighbour_table

GOLDEN = ROOT / "tests" / "golden" / "lantern"
CASES = json.loads((GOLDEN / "cases.json").read_text())
ACCEPTANCE: list[dict[str, Any]] = CASES["acceptance"]
ALMOST_ONE = 1 - 2.0**-53

# -- recorded decisions ----------------------------------------------------------------------------------------


@cache
def acceptance_data() -> dict[str, Tensor]:
    return load_file(GOLDEN / "acceptance.safetensors")


def rule_of(case: dict[str, Any]) -> Rule:
    kind = case["rule"]
    if kind == "greedy_exact":
        return Greedy()
    if kind.endswith("exact"):
        return Exact()
    table = neighbour_table(acceptance_data()[f"codebook_{case['V']}"], case["V"] - 1)
    bound = {"delta": case["delta"]} if case["delta"] <= 1 else {"multiplier": case["delta"]}
    if kind == "greedy_lantern":
        return RelaxedGreedy(table, case["k"], **bound)
    residual: dict[str, Residual] = {
        "topk_lantern": "dynamic",
        "sampled_lantern": "static",
        "sampled_lantern_b": "static_b",
    }
    return Relaxed(table, case["k"], **bound, residual=residual[kind])


def tensor_of(case: dict[str, Any], name: str) -> Tensor | None:
    return acceptance_data().get(f"c{case['id']:04d}.{name}")


def target_of(case: dict[str, Any]) -> Tensor:
    stored = tensor_of(case, "target_probs")
    logits = tensor_of(case, "target_logits")
    assert logits is not None
    return logits.softmax(dim=-1) if stored is None else stored


def examined(parents: list[int], accepted: list[int]) -> list[int]:
    """Nodes in the order in which a walk that accepts `accepted` looks at them."""
    nodes = []
    for depth, node in enumerate(accepted):
        following = accepted[depth + 1] if depth + 1 < len(accepted) else None
        for child in (n for n, parent in enumerate(parents) if parent == node):
            nodes.append(child)
            if child == following:
                break
    return nodes


def uniforms_of(case: dict[str, Any], width: int) -> Tensor:
    """The recorded numbers, which are used up in the order of examination, by node."""
    parents = tensor_of(case, "parents")
    recorded = tensor_of(case, "uniforms")
    assert parents is not None
    uniforms = torch.full((width,), 0.5, dtype=torch.float64)
    if case["uniforms_used"]:
        assert recorded is not None
        nodes = examined(parents.tolist(), case["accepted_nodes"])
        assert len(nodes) == case["uniforms_used"]
        uniforms[nodes] = recorded[: len(nodes)]
    return uniforms


def stack(cases: list[dict[str, Any]], static: bool) -> tuple[DraftTree, Tensor, Tensor]:
    """Trees of any shapes as one batch, padded with unused nodes; or of one shape."""
    width = max(len(target_of(case)) for case in cases)
    sampled = cases[0]["rule"].startswith("sampled")

    def padded(values: Tensor | None, fill: float) -> Tensor:
        assert values is not None
        rest = values.new_full((width - len(values), *values.shape[1:]), fill)
        return torch.cat([values, rest])

    tokens = torch.stack([padded(tensor_of(case, "tokens"), 0) for case in cases]).long()
    parents = torch.stack([padded(tensor_of(case, "parents"), -1) for case in cases]).long()
    target = torch.stack([padded(target_of(case), 1 / case["V"]) for case in cases])
    draft_probs = (
        torch.stack([padded(tensor_of(case, "draft_probs"), 0) for case in cases]) if sampled else None
    )
    draw_mode = "without_replacement" if sampled else "deterministic"
    uniforms = torch.stack([uniforms_of(case, width) for case in cases])
    if static:
        topology = Topology(tuple(parents[0].tolist()))
        tree = DraftTree.from_topology(topology, tokens, draw_mode=draw_mode, draft_probs=draft_probs)
    else:
        tree = DraftTree(tokens, parents, draw_mode, draft_probs)
    return tree, target, uniforms


def check_recorded(case: dict[str, Any], tree: DraftTree, result: VerificationResult, row: int) -> None:
    nodes = [node for node in result.nodes[row].tolist() if node >= 0]
    assert nodes == case["accepted_nodes"], case
    assert result.nodes.shape[1] == tree.max_depth + 1
    assert result.length[row] == case["accept_len"]
    assert bool(result.rejected[row]) == case["residual"]
    assert result.probs[row].argmax() == case["next_argmax"]
    if case["rule"].startswith("greedy"):
        assert result.probs[row].max() == result.probs[row].sum() == 1
        return
    recorded = tensor_of(case, "next_probs")
    torch.testing.assert_close(result.probs[row], recorded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ACCEPTANCE, ids=lambda case: f"{case['id']}-{case['rule']}-{case['shape']}")
def test_decides_like_the_public_code(case: dict[str, Any]) -> None:
    tree, target, uniforms = stack([case], static=True)
    check_recorded(case, tree, rule_of(case).verify(tree, target, uniforms), 0)


def batches(*keys: str) -> list[list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for case in ACCEPTANCE:
        parents = tuple(tensor_of(case, "parents").tolist())  # type: ignore[union-attr]
        groups[tuple(parents if key == "parents" else case[key] for key in keys)].append(case)
    return [group for group in groups.values() if len(group) > 1]


@pytest.mark.parametrize("static", [True, False])
def test_rows_of_a_batch_are_independent(static: bool) -> None:
    """Cases of one rule in one call: of equal shape, or of all shapes with unused nodes."""
    shape = ("parents",) if static else ()
    groups = batches("rule", "V", "k", "delta", *shape)
    assert sum(map(len, groups)) > (80 if static else 240)
    for group in groups:
        tree, target, uniforms = stack(group, static)
        result = rule_of(group[0]).verify(tree, target, uniforms)
        for row, case in enumerate(group):
            check_recorded(case, tree, result, row)


@cache
def jacobi_data() -> dict[str, Tensor]:
    return load_file(GOLDEN / "sjd.safetensors")


@pytest.mark.parametrize("case", CASES["sjd"], ids=lambda case: str(case["id"]))
@pytest.mark.parametrize("draw_mode", ["without_replacement", "independent"])
def test_exact_verifies_jacobi_drafts_like_the_public_code(case: dict[str, Any], draw_mode: Any) -> None:
    """Slot 0 is committed, target row i verifies slot i + 1, and the draft of slot i + 1 belongs to node i."""
    data = {name: jacobi_data()[f"s{case['id']:04d}.{name}"] for name in ("draft_tokens", "draft_probs")}
    target = jacobi_data()[f"s{case['id']:04d}.target_logits"].softmax(dim=-1)
    drafts = torch.cat([data["draft_probs"][:, 1:], torch.zeros_like(target[:, :1])], dim=1)
    tree = DraftTree.from_topology(
        Topology.chain(case["L"] - 1), data["draft_tokens"].long(), draw_mode=draw_mode, draft_probs=drafts
    )
    result = Exact().verify(tree, target, jacobi_data()[f"s{case['id']:04d}.uniforms"])
    assert (result.length + 1).tolist() == case["advance_per_sample"]
    residual = jacobi_data()[f"s{case['id']:04d}.residual"]
    for row in range(case["B"]):
        if result.rejected[row]:
            torch.testing.assert_close(result.probs[row], residual[row], rtol=0, atol=1e-5)
        else:
            assert residual[row].sum() == 0
            assert torch.equal(result.probs[row], target[row, -1])


# -- exactness: the distribution of the tokens that come out, integrated without sampling
# ---------------------------------


class Problem:
    """A target and a draft over V tokens for two steps; the second depends on the first token.

    All in float64, so that deviations of a rule stand out from rounding.
    """

    def __init__(self, size: int, seed: int, kind: str = "full") -> None:
        generator = torch.Generator().manual_seed(seed)

        def distributions(shift: int) -> Tensor:
            logits = 1.5 * torch.randn(1 + size, size, generator=generator, dtype=torch.float64)
            if kind == "zeros":
                keep = max(size // 2 + 1, 3)
                chosen = torch.rand(1 + size, size, generator=generator).argsort(dim=-1)[:, keep:]
                logits = logits.scatter(1, chosen, -torch.inf)
            if kind == "disjoint":
                logits[:, shift::2] = -torch.inf
            return logits.softmax(dim=-1)  # row 0: first token; row 1 + x: the token after x

        self.size = size
        self.target = distributions(0)
        self.draft_probs = self.target if kind == "equal" else distributions(1)

    def joint(self) -> Tensor:
        return self.target[0][:, None] * self.target[1:]  # [V, V]


def assignments(problem: Problem, topology: Topology, draw_mode: str) -> tuple[Tensor, Tensor]:
    """All ways in which a drafter may fill the tree: tokens [N, T] (root 0) and their probabilities [N]."""
    partial: list[tuple[list[int], float]] = [([0], 1.0)]
    for node, parent in enumerate(topology.parents[1:], start=1):
        elders = [child for child in topology.children[parent] if child < node]
        longer = []
        for tokens, weight in partial:
            distribution = problem.draft_probs[0 if parent == 0 else 1 + tokens[parent]].clone()
            if draw_mode == "deterministic":
                # the likeliest of the draft in turn, as a dynamic tree would
                token = int(distribution.argsort(descending=True)[len(elders)])
                longer.append(([*tokens, token], weight))
                continue
            if draw_mode == "without_replacement":
                distribution[[tokens[elder] for elder in elders]] = 0
            total = float(distribution.sum())
            if total <= 0:  # nothing left to draw: a drafter has to fill the place with something
                longer.append(([*tokens, 0], weight))
                continue
            longer += [
                ([*tokens, token], weight * float(distribution[token]) / total)
                for token in range(problem.size)
                if distribution[token] > 0
            ]
        partial = longer
    return torch.tensor([tokens for tokens, _ in partial]), torch.tensor(
        [weight for _, weight in partial], dtype=torch.float64
    )


def distribution_of_outcome(rule: Rule, problem: Problem, topology: Topology, draw_mode: Any) -> Tensor:
    """[V, V] the joint distribution of the first two tokens, by integrating over drafts and uniform numbers.

    The chance that a node is accepted once it is examined is found as the largest uniform number that
    accepts it, by bisection: nothing is assumed about the rule except that smaller numbers accept more.
    """
    tokens, weights = assignments(problem, topology, draw_mode)  # [N, T]
    size, count, num_nodes = problem.size, len(tokens), topology.num_nodes
    before = torch.where(torch.tensor(topology.depths) == 0, 0, 1 + tokens)  # row of the tables, by node
    before = torch.where(torch.tensor(topology.depths) > 1, 0, before)
    target = problem.target[before]  # [N, T, V]; what follows two tokens is of no interest
    internal = torch.tensor([bool(children) for children in topology.children])
    draft_probs = None if draw_mode == "deterministic" else problem.draft_probs[before] * internal[:, None]

    # one row per way to fill the tree and per node to bring the walk to
    def repeated(values: Tensor) -> Tensor:
        return values.repeat_interleave(num_nodes, dim=0)

    tree = DraftTree.from_topology(
        topology,
        repeated(tokens),
        draw_mode=draw_mode,
        draft_probs=None if draft_probs is None else repeated(draft_probs),
    )
    rows_target = repeated(target)
    focus = torch.arange(num_nodes).repeat(count)  # [N * T]
    ancestors = tree.ancestors[0]  # [T, T]
    arrive = torch.where(ancestors, 0.0, ALMOST_ONE)[focus].double()  # accept ancestors, reject all else

    low, high = torch.zeros(2, len(focus), dtype=torch.float64)
    high = high + 1
    for _ in range(40):
        middle = (low + high) / 2
        trial = arrive.scatter(1, focus[:, None], middle[:, None])
        hit = (rule.verify(tree, rows_target, trial).nodes == focus[:, None]).any(dim=1)
        low, high = torch.where(hit, middle, low), torch.where(hit, high, middle)
    chance = torch.where(low > 0, high, 0.0).view(count, num_nodes)

    end = rule.verify(tree, rows_target, arrive)  # the walk ends at the focus
    ended_there = (end.nodes == focus[:, None]).any(dim=1) & (end.length == tree.depths[0, focus])
    distributions = end.probs.view(count, num_nodes, size)
    joint = torch.zeros(size, size, dtype=torch.float64)
    for node in range(num_nodes):
        weight = weights.clone()
        for passed in ancestors[node].nonzero().flatten().tolist():
            if passed:
                weight = weight * chance[:, passed]
                for sibling in topology.children[topology.parents[passed]]:
                    if sibling < passed:
                        weight = weight * (1 - chance[:, sibling])
        for child in topology.children[node]:
            weight = weight * (1 - chance[:, child])
        assert float((weight * ~ended_there.view(count, num_nodes)[:, node]).abs().sum()) < 1e-9
        following = weight[:, None] * distributions[:, node]  # [N, V]
        if node == 0:
            joint += following.sum(dim=0)[:, None] * problem.target[1:]
        elif topology.depths[node] == 1:
            joint.index_add_(0, tokens[:, node], following)
        else:
            _, one, two, *_ = ancestors[node].nonzero().flatten().tolist()
            first, second = tokens[:, one], tokens[:, two]
            joint.view(-1).index_add_(0, first * size + second, weight)
    return joint


def distance(rule: Rule, problem: Problem, topology: Topology, draw_mode: Any) -> float:
    """Total variation between the distribution of the outcome and the target's."""
    distribution = distribution_of_outcome(rule, problem, topology, draw_mode)
    assert float(distribution.sum()) == pytest.approx(1, abs=1e-8)
    assert bool((distribution >= 0).all())
    return float((distribution - problem.joint()).abs().sum()) / 2


SHAPES = {
    "one draft token": Topology.chain(1),
    "three draft tokens": Topology((-1, 0, 0, 0)),
    "chain": Topology.chain(2),
    "two levels": Topology((-1, 0, 0, 1, 1, 2)),
    "three levels": Topology((-1, 0, 0, 1, 3)),
}
KINDS = ("full", "zeros", "equal", "disjoint")


def sizes(shape: str) -> int:
    return 6 if SHAPES[shape].max_depth == 1 else 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("draw_mode", ["deterministic", "without_replacement", "independent"])
def test_exact_is_exact(draw_mode: str, shape: str, kind: str) -> None:
    problem = Problem(sizes(shape), seed=1, kind=kind)
    assert distance(Exact(), problem, SHAPES[shape], draw_mode) < 1e-8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("iterations", [1, 16])
def test_k_sequential_is_exact(iterations: int, shape: str, kind: str) -> None:
    problem = Problem(sizes(shape), seed=2, kind=kind)
    assert distance(KSequential(iterations), problem, SHAPES[shape], "independent") < 1e-8


def line_table(size: int) -> Tensor:
    """Neighbours of tokens that lie on a bent line."""
    points = torch.arange(size)[:, None] ** 1.2
    return neighbour_table(points, size - 1)


@pytest.mark.parametrize("kind", ["full", "zeros", "disjoint"])
@pytest.mark.parametrize("shape", ["three draft tokens", "two levels"])
@pytest.mark.parametrize("draw_mode", ["deterministic", "without_replacement"])
@pytest.mark.parametrize(
    "options", [{"delta": 0.0, "k": 3}, {"multiplier": 1.0, "k": 3}, {"delta": 0.5, "k": 0}]
)
def test_borrowing_nothing_is_exact(options: dict[str, Any], draw_mode: str, shape: str, kind: str) -> None:
    problem = Problem(sizes(shape), seed=3, kind=kind)
    rule = Relaxed(line_table(problem.size), **options)
    assert distance(rule, problem, SHAPES[shape], draw_mode) < 1e-8


@pytest.mark.parametrize(
    ("draw_mode", "residual"),
    [("deterministic", "dynamic"), ("without_replacement", "static"), ("without_replacement", "static_b")],
)
def test_published_residuals_are_exact_only_without_neighbours(draw_mode: str, residual: Residual) -> None:
    problem, table = Problem(6, seed=3, kind="zeros"), line_table(6)
    shape = SHAPES["three draft tokens"]
    assert distance(Relaxed(table, 0, delta=0.3, residual=residual), problem, shape, draw_mode) < 1e-8
    assert distance(Relaxed(table, 3, delta=0.0, residual=residual), problem, shape, draw_mode) > 1e-2
    # zeros of elder siblings are enough
    full = Problem(6, seed=3, kind="full")
    if draw_mode == "deterministic":
        assert distance(Relaxed(table, 3, delta=0.0, residual=residual), full, shape, draw_mode) > 1e-3


@pytest.mark.parametrize("draw_mode", ["deterministic", "without_replacement"])
def test_relaxation_moves_the_distribution_by_at_most_delta_per_draft_token(draw_mode: str) -> None:
    problem, table = Problem(6, seed=5), line_table(6)
    far = [
        distance(Relaxed(table, 5, delta=d), problem, SHAPES["one draft token"], draw_mode)
        for d in (0.0, 0.1, 0.3)
    ]
    assert far[0] < 1e-8
    assert 1e-3 < far[1] <= 0.1 + 1e-8
    assert 1e-3 < far[2] <= 0.3 + 1e-8


class Broken:
    """A rule with one step done wrong."""

    def __init__(self, mistake: str) -> None:
        self.mistake = mistake

    def verify(self, tree: DraftTree, target: Tensor, uniforms: Tensor) -> VerificationResult:
        return walk(tree, target, uniforms, self._decide)

    def _decide(self, fork: Fork) -> Decision:
        accepted, distribution = examine_in_turn(fork)
        if self.mistake == "no division":
            accepted = fork.uniforms <= fork.target.gather(-1, fork.tokens)
        if self.mistake == "no residual":
            distribution = fork.target
        if self.mistake == "rejects at will":
            for child in range(1, fork.tokens.shape[1]):
                accepted[:, child] &= fork.uniforms[:, child] < 0.9
        return accepted, distribution


@pytest.mark.parametrize("mistake", ["no division", "no residual", "rejects at will"])
@pytest.mark.parametrize("shape", ["three draft tokens", "two levels"])
def test_a_broken_rule_is_noticed(mistake: str, shape: str) -> None:
    problem = Problem(sizes(shape), seed=1)
    assert distance(Broken(mistake), problem, SHAPES[shape], "without_replacement") > 1e-3


def test_a_drafter_that_runs_out_of_tokens_does_no_harm() -> None:
    """Three children, one token of positive probability: the others are fillers."""
    problem = Problem(5, seed=4)
    problem.draft_probs = torch.zeros_like(problem.draft_probs)
    problem.draft_probs[:, 2] = 1.0
    for shape in ("three draft tokens", "two levels"):
        assert distance(Exact(), problem, SHAPES[shape], "without_replacement") < 1e-8


def test_repeated_deterministic_draft_tokens_are_exact() -> None:
    problem = Problem(4, seed=6)
    topology = Topology((-1, 0, 0, 0))
    target = problem.target[[0, 1, 1, 1]][None]
    tree = DraftTree.from_topology(topology, torch.tensor([[0, 2, 2, 1]]), draw_mode="deterministic")
    uniforms = torch.tensor([[0.0, ALMOST_ONE, 0.0, 0.0]], dtype=torch.float64)
    result = Exact().verify(tree, target, uniforms)
    assert result.nodes.tolist() == [[0, 3]], "the second try of a rejected token cannot succeed"


@pytest.mark.parametrize(
    ("draw_mode", "rule"),
    [("without_replacement", Exact()), ("independent", Exact()), ("independent", KSequential())],
)
def test_sampled_first_tokens_follow_the_target(draw_mode: Any, rule: Rule) -> None:
    """Drafts, uniform numbers and the following draw, all sampled; one number per node is enough."""
    generator = torch.Generator().manual_seed(0)
    rows, problem = 200_000, Problem(8, seed=7, kind="zeros")
    drawn = torch.multinomial(
        problem.draft_probs[0].expand(rows, -1),
        3,
        replacement=draw_mode == "independent",
        generator=generator,
    )
    tokens = torch.cat([torch.zeros(rows, 1, dtype=torch.int64), drawn], dim=1)
    draft_probs = problem.draft_probs[0].float().expand(rows, 4, -1)
    target = problem.target[0].float().expand(rows, 4, -1)
    tree = DraftTree.from_topology(
        Topology((-1, 0, 0, 0)), tokens, draw_mode=draw_mode, draft_probs=draft_probs
    )
    result = rule.verify(tree, target, torch.rand(rows, 4, generator=generator))
    extra = torch.multinomial(result.probs, 1, generator=generator)
    node = result.nodes[:, 1:]
    first = torch.where(node > 0, tokens.gather(1, node.clamp(min=0)), extra)[:, 0]
    counts = torch.bincount(first, minlength=8).double()
    expected = problem.target[0] * rows
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - expected) ** 2 / expected)[possible].sum()
    assert statistic < 25  # 4 degrees of freedom: p < 1e-4


# -- relations between rules -----------------------------------------------------------------------------------


def random_case(
    seed: int, topology: Topology, size: int = 32, rows: int = 64, draw_mode: Any = "without_replacement"
) -> tuple[DraftTree, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = (2 * torch.randn(rows, topology.num_nodes, size, generator=generator)).softmax(dim=-1)
    draft_probs = (target.log() + torch.randn(target.shape, generator=generator)).softmax(dim=-1)
    tokens = torch.zeros(rows, topology.num_nodes, dtype=torch.int64)
    for node, children in enumerate(topology.children):
        if children:
            tokens[:, list(children)] = torch.multinomial(
                draft_probs[:, node],
                len(children),
                replacement=draw_mode == "independent",
                generator=generator,
            )
    uniforms = torch.rand(rows, topology.num_nodes, generator=generator)
    given = None if draw_mode == "deterministic" else draft_probs
    return DraftTree.from_topology(topology, tokens, draw_mode=draw_mode, draft_probs=given), target, uniforms


def assert_same(left: VerificationResult, right: VerificationResult) -> None:
    assert torch.equal(left.nodes, right.nodes)
    assert torch.equal(left.length, right.length)
    assert torch.equal(left.rejected, right.rejected)
    torch.testing.assert_close(left.probs, right.probs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("draw_mode", ["deterministic", "without_replacement"])
@pytest.mark.parametrize("topology", [Topology.chain(5), NAMED_TREES["mc_sim_7b_63"]])
def test_no_neighbours_means_exact(topology: Topology, draw_mode: str) -> None:
    tree, target, uniforms = random_case(1, topology, draw_mode=draw_mode)
    exact = Exact().verify(tree, target, uniforms)
    table = line_table(32)
    modes: tuple[Residual, ...] = (
        ("paper", "dynamic") if draw_mode == "deterministic" else ("paper", "static", "static_b")
    )
    for residual in modes:
        assert_same(Relaxed(table, 0, delta=0.5, residual=residual).verify(tree, target, uniforms), exact)
    assert_same(Relaxed(table, 9, delta=0.0).verify(tree, target, uniforms), exact)
    assert 0 < exact.length.float().mean() < topology.max_depth
    greedy = Greedy().verify(tree, target, uniforms)
    assert_same(RelaxedGreedy(table, 0, delta=0.5).verify(tree, target, uniforms), greedy)
    assert_same(RelaxedGreedy(table, 4, multiplier=1.0).verify(tree, target, uniforms), greedy)


def test_a_single_independent_draft_token_is_ordinary_speculative_sampling() -> None:
    tree, target, uniforms = random_case(2, Topology.chain(6), draw_mode="independent")
    exact = Exact().verify(tree, target, uniforms)
    assert_same(KSequential().verify(tree, target, uniforms), exact)


def test_more_independent_draft_tokens_are_accepted_more_often() -> None:
    """k-SEQ with one draft token accepts 1 - TV(p, q); it never loses by having more."""
    means = []
    for width in (1, 2, 4, 8):
        tree, target, uniforms = random_case(
            3, Topology((-1,) + (0,) * width), rows=4000, draw_mode="independent"
        )
        means.append(KSequential().verify(tree, target, uniforms).length.float().mean().item())
    assert means == sorted(means)
    assert means[-1] > means[0] + 0.1


@pytest.mark.parametrize("free", [False, True])
def test_fixed_and_free_shapes_agree(free: bool) -> None:
    tree, target, uniforms = random_case(4, NAMED_TREES["naive_extend_57"], rows=16)
    result = Exact().verify(tree, target, uniforms)
    if free:
        same = DraftTree(tree.tokens, tree.parents.clone(), tree.draw_mode, tree.draft_probs)
        assert_same(Exact().verify(same, target, uniforms), result)
    for row in range(16):
        alone = DraftTree.from_topology(
            NAMED_TREES["naive_extend_57"],
            tree.tokens[row : row + 1],
            draw_mode=tree.draw_mode,
            draft_probs=tree.draft_probs[row : row + 1],  # type: ignore[index]
        )
        one = Exact().verify(alone, target[row : row + 1], uniforms[row : row + 1])
        assert torch.equal(one.nodes[0], result.nodes[row])
        torch.testing.assert_close(one.probs[0], result.probs[row])


@pytest.mark.parametrize("bound", [{"delta": 0.2}, {"delta": 1.0}, {"multiplier": 3.0}])
@pytest.mark.parametrize("k", [1, 5, 31])
def test_aggregation_moves_exactly_the_borrowed_mass(k: int, bound: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(8)
    distribution = torch.randn(200, 32, generator=generator, dtype=torch.float64).mul(2).softmax(dim=-1)
    token = torch.multinomial(distribution, 1, generator=generator)
    near, within, extra = Relaxed(line_table(32), k, **bound).aggregate(distribution, token)
    assert near.shape == (200, min(k + 1, 31))
    assert within.shape == (200, k)
    assert (within.int().diff(dim=-1) <= 0).all(), "a leading run"
    taken = distribution.gather(1, near[:, :k]) * within
    moved = distribution.scatter(1, near[:, :k], distribution.gather(1, near[:, :k]) * ~within)
    moved = moved.scatter_add(1, token, extra)
    torch.testing.assert_close(moved.sum(dim=-1), torch.ones(200, dtype=torch.float64))
    torch.testing.assert_close((distribution - moved).abs().sum(dim=-1) / 2, extra[:, 0])
    torch.testing.assert_close(taken.sum(dim=-1), extra[:, 0])
    most = bound.get("delta", (bound.get("multiplier", 1) - 1) * distribution.gather(1, token)[:, 0])
    assert (extra[:, 0] <= most).all()
    # and no further neighbour would have fitted
    following = torch.cat([distribution.gather(1, near[:, :k]), torch.full((200, 1), 9.0)], dim=1)
    assert (
        extra + following.gather(1, within.sum(dim=-1, keepdim=True)) > torch.as_tensor(most).view(-1, 1)
    ).all()


@pytest.mark.parametrize("draw_mode", ["deterministic", "without_replacement"])
@pytest.mark.parametrize("residual", ["paper", "published"])
def test_a_wider_bound_never_rejects_more(draw_mode: str, residual: str) -> None:
    tree, target, uniforms = random_case(9, Topology.chain(1), rows=2000, draw_mode=draw_mode)
    published: Residual = "dynamic" if draw_mode == "deterministic" else "static"
    mode: Residual = "paper" if residual == "paper" else published
    table = line_table(32)

    def passed(**options: Any) -> Tensor:
        return Relaxed(table, **options, residual=mode).verify(tree, target, uniforms).length

    for series in (
        [passed(k=8, delta=delta) for delta in (0, 0.05, 0.2, 0.7, 1)],
        [passed(k=8, multiplier=factor) for factor in (1, 1.5, 4, 20)],
        [passed(k=k, delta=0.4) for k in (0, 1, 3, 10, 31)],
        [passed(k=k, multiplier=5) for k in (0, 1, 3, 10, 31)],
    ):
        for narrow, wide in itertools.pairwise(series):
            assert (wide >= narrow).all()
        assert series[-1].sum() > series[0].sum()


def test_greedy_takes_the_longest_path() -> None:
    """Two siblings carry the same token; the second one leads further."""
    topology = Topology((-1, 0, 0, 2))
    target = torch.eye(4)[[1, 3, 2, 0]][None]
    tree = DraftTree.from_topology(topology, torch.tensor([[0, 1, 1, 2]]), draw_mode="deterministic")
    result = Greedy().verify(tree, target, torch.zeros(1, 4))
    assert result.nodes.tolist() == [[0, 2, 3]]
    assert result.probs.tolist() == [[1.0, 0, 0, 0]]
    ties = torch.tensor([[[0.4, 0.4, 0.2, 0.0]] * 4])
    stays = Greedy().verify(tree, ties, torch.zeros(1, 4))
    assert stays.length.tolist() == [0], "of equally likely tokens the first counts"
    assert stays.probs.tolist() == [[1.0, 0, 0, 0]]


def test_a_lone_root_yields_the_target() -> None:
    tree = DraftTree.from_topology(
        Topology((-1,)), torch.zeros(2, 1, dtype=torch.int64), draw_mode="deterministic"
    )
    target = torch.tensor([[[0.25, 0.75]], [[1.0, 0.0]]])
    for rule in (Exact(), Greedy(), Relaxed(line_table(2), 1, delta=0.5)):
        result = rule.verify(tree, target, torch.zeros(2, 1))
        assert result.nodes.tolist() == [[0], [0]]
        assert not result.rejected.any()
    assert torch.equal(Exact().verify(tree, target, torch.zeros(2, 1)).probs, target[:, 0])


@pytest.mark.parametrize("draw_mode", ["deterministic", "without_replacement", "independent"])
def test_certainty_never_yields_nan(draw_mode: str) -> None:
    """p = q = all on one token, and uniform numbers at both ends."""
    topology = Topology((-1, 0, 0, 1))
    sure = torch.eye(5)[[2]].expand(1, 4, -1)
    draft_probs = None if draw_mode == "deterministic" else sure * torch.tensor([1.0, 1, 0, 0])[:, None]
    tree = DraftTree.from_topology(
        topology, torch.tensor([[0, 2, 2, 2]]), draw_mode=draw_mode, draft_probs=draft_probs
    )
    rules: list[Rule] = [Exact(), Relaxed(line_table(5), 4, delta=1.0)]
    if draw_mode == "independent":
        rules.append(KSequential())
    for rule, number in itertools.product(rules, (0.0, 1.0)):
        result = rule.verify(tree, sure, torch.full((1, 4), number))
        assert torch.allclose(result.probs, sure[:, 0])


def test_a_number_of_zero_lets_no_impossible_token_through() -> None:
    target = torch.tensor([[[0.5, 0.5, 0.0]] * 2])
    draft_probs = torch.tensor([[[0.0, 0.0, 1.0], [0.0] * 3]])
    tokens = torch.tensor([[0, 2]])
    for draw_mode, given in (
        ("deterministic", None),
        ("independent", draft_probs),
        ("without_replacement", draft_probs),
    ):
        tree = DraftTree.from_topology(Topology.chain(1), tokens, draw_mode=draw_mode, draft_probs=given)
        rules: list[Rule] = [Exact()] + ([KSequential()] if draw_mode == "independent" else [])
        for rule in rules:
            result = rule.verify(tree, target, torch.zeros(1, 2))
            assert result.length.tolist() == [0]
            assert torch.equal(result.probs, target[:, 0])


def test_dynamic_trees_can_be_verified() -> None:
    generator = torch.Generator().manual_seed(11)
    first = torch.randn(3, 20, generator=generator).log_softmax(dim=-1)
    tree = DynamicTree(top_k=4, depth=2, total=12).grow(
        torch.zeros(3, dtype=torch.int64),
        first,
        lambda beam: torch.randn(3, 4, 20, generator=generator).log_softmax(dim=-1),
    )
    target = torch.randn(3, 12, 20, generator=generator).softmax(dim=-1)
    for rule in (Exact(), Greedy(), Relaxed(line_table(20), 5, multiplier=5.0)):
        result = rule.verify(tree, target, torch.rand(3, 12, generator=generator))
        torch.testing.assert_close(result.probs.sum(dim=-1), torch.ones(3))


# -- input that cannot be used ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Relaxed(line_table(8), 8, delta=0.1), "k must be smaller than the vocabulary of 8, got 8."),
        (lambda: Relaxed(line_table(8), -1, delta=0.1), "k must be an integer of at least 0, got -1."),
        (lambda: Relaxed(line_table(8)[:, :3], 3, delta=0.1), "lists 3 neighbours per token, k = 3 needs 4."),
        (
            lambda: Relaxed(line_table(8), 2, delta=-0.1),
            "(for a factor use multiplier), got -0.1",
        ),
        (lambda: Relaxed(line_table(8), 2, delta=5.0), "for a factor use multiplier"),
        (
            lambda: Relaxed(line_table(8), 2, delta=float("nan")),
            "(for a factor use multiplier), got nan",
        ),
        (
            lambda: Relaxed(line_table(8), 2, multiplier=0.5),
            "multiplier must be a number of at least 1, got 0.5.",
        ),
        (lambda: Relaxed(line_table(8), 2), "give either delta (additive) or multiplier (relative)"),
        (lambda: Relaxed(line_table(8), 2, delta=0.1, multiplier=2), "not both and not neither."),
        (lambda: Relaxed(line_table(8), 2, delta=0.1, residual="statik"), "did you mean 'static'?"),
        (lambda: Relaxed(torch.rand(8, 8), 2, delta=0.1), "table must be an integer tensor"),
        (lambda: RelaxedGreedy(line_table(8), 8, delta=0.1), "k must be smaller than the vocabulary"),
        (lambda: RelaxedGreedy(line_table(8), 2), "give either delta"),
        (lambda: KSequential(0), "iterations must be an integer of at least 1, got 0."),
    ],
)
def test_bad_options_are_explained(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        build()


def test_bad_inputs_are_explained() -> None:
    tree, target, uniforms = random_case(0, Topology.chain(3), size=8, rows=2)
    sure = DraftTree.from_topology(Topology.chain(3), tree.tokens, draw_mode="deterministic")
    for rule, drafts, distribution, numbers, message in (
        (Exact(), tree, target[:, 1:], uniforms, "target must be [M, T, V] = [2, 4, V], got [2, 3, 8]."),
        (Exact(), tree, target, uniforms[:1], "uniforms must be [M, T] = [2, 4], one per node, got [1, 4]."),
        (
            Exact(),
            tree,
            target[..., :5],
            uniforms,
            "draft_probs [2, 4, 8] and target [2, 4, 5] differ in shape.",
        ),
        (Greedy(), tree, target[:1], uniforms, "target must be [M, T, V]"),
        (KSequential(), sure, target, uniforms, "k-sequential selection needs draft tokens"),
        (Relaxed(line_table(9), 2, delta=0.1), tree, target, uniforms, "the neighbour table is for 9 tokens"),
        (RelaxedGreedy(line_table(9), 2, delta=0.1), tree, target, uniforms, "the target has 8."),
        (Relaxed(line_table(8), 2, delta=0.1, residual="dynamic"), tree, target, uniforms, "deterministic"),
        (
            Relaxed(line_table(8), 2, delta=0.1, residual="static"),
            sure,
            target,
            uniforms,
            "drawn draft tokens",
        ),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            rule.verify(drafts, distribution, numbers)
