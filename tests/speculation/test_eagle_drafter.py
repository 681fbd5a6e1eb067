"""Drafting with an EAGLE head, step by step as recorded from the published code, and on models of our own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.test_eagle import GRIDS, case, golden, logits, recorded
from tests.tiny import drafting_pipeline
from varaccel.accelerators.speculative import Speculative
from varaccel.engine.canvas import Canvas
from varaccel.engine.distribution import Categorical
from varaccel.hosts.causal.guidance import Guidance
from varaccel.hosts.causal.lanes import Lanes
from varaccel.hosts.causal.sampling import Sampling
from varaccel.nn.attention_inputs import AttentionInputs, prefix_mask
from varaccel.speculation import proposers as drafting
from varaccel.speculation.batch import Batch
from varaccel.speculation.eagle_drafter import EagleReader
from varaccel.speculation.proposers import DynamicProposer, StaticProposer
from varaccel.speculation.step import Draws, StepResult
from varaccel.speculation.tree import DraftTree, DynamicTree, Topology

NO_DRAWS = Draws(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1))


class RecordedTarget:
    """What a reader asks of the target's session, answered from a recording; keeps all distributions it has given.

    The published code applies top-p before top-k; the recordings use at most one of them.
    """

    static_shapes = False
    rows_per_pass = 2
    prefix = 120
    condition_mask = None

    def __init__(self, index: int, options: dict[str, Any], prefix_features: Tensor) -> None:
        self.index, self.prefix_features = index, prefix_features
        self.scale = options["cfg"]
        processor = options["processor"] or {}
        assert processor.get("top_p", 1.0) == 1.0
        self.sampling = Sampling(processor.get("temperature", 1.0), processor.get("top_k", 0))
        self.greedy = options["greedy"]
        self.raw: list[Tensor] = []
        self.distributions: list[Tensor] = []
        self.positions: list[Tensor] = []

    def distribution(self, features: Tensor, positions: Tensor) -> Categorical:
        both = logits(self.index, features)
        conditional, unconditional = both.split(1)
        guided = conditional
        if self.scale > 1:
            guided = Guidance(self.scale).combine(conditional, unconditional)
        filtered = self.sampling.filter(guided)
        self.raw.append(both)
        self.distributions.append(filtered.log_softmax(-1))
        self.positions.append(positions)
        return Categorical(filtered, self.greedy)


def begin(index: int, name: str, options: dict[str, Any], draft_slots: int) -> tuple[Any, ...]:
    """Target, canvas, lanes and reader after the first token."""
    data = golden(index)
    target = RecordedTarget(index, options, data[f"{name}.hidden_in"])
    positions = GRIDS[case(index)["config"]["input_type"]] ** 2
    canvas = Canvas.empty(1, positions)
    ids = data[f"{name}.input_ids"].long()
    canvas.write(torch.zeros(1, dtype=torch.int64), ids[:, -1:], 1)
    reader = EagleReader(recorded(index), target, canvas, draft_slots, 1)  # type: ignore[arg-type]
    return target, canvas, Lanes.raster(positions), reader


RUNS = [(i, r) for i in (0, 1) for r in range(len(case(i)["runs"]))]


@pytest.mark.parametrize(("index", "run"), RUNS)
def test_dynamic_drafting_over_two_calls(index: int, run: int) -> None:
    """Trees are the recorded ones; after the first, only the true features of what was kept are left."""
    data, config, options = golden(index), case(index)["config"], case(index)["runs"][run]
    shape = DynamicTree(config["top_k"], config["depth"], config["total_tokens"])
    target, canvas, lanes, reader = begin(index, f"run{run}.call0", options, shape.depth * shape.top_k)
    proposer = DynamicProposer(reader, shape)
    for call in (0, 1):
        name = f"run{run}.call{call}"
        target.distributions.clear()
        fronts = lanes.fronts(canvas, call + 2)
        start = int(fronts.start)
        assert start == data[f"{name}.input_ids"].shape[1] - 120
        tree = proposer.propose(canvas.tokens.gather(1, fronts.source), fronts, NO_DRAWS)

        assert tree.tokens[0].tolist() == data[f"{name}.draft_tokens"].tolist()
        assert tree.parents[0].tolist() == data[f"{name}.parents"].tolist()
        assert tree.depths[0].tolist() == data[f"{name}.position_ids"].tolist()
        assert torch.equal(tree.ancestors[0], data[f"{name}.tree_mask"].bool())
        first, *levels = (distribution.exp() for distribution in target.distributions)
        torch.testing.assert_close(first[0, 0], data[f"{name}.logp0"].exp(), atol=1e-5, rtol=0)
        assert len(levels) == config["depth"]
        torch.testing.assert_close(torch.cat(levels), data[f"{name}.logp_levels"].exp(), atol=1e-5, rtol=0)
        assert [int(p.unique()) for p in target.positions[-len(levels) - 1 :]] == [
            start + level for level in range(len(levels) + 1)
        ]
        if call == 0:
            observe(proposer, canvas, tree, fronts, data, run)
    assert reader.passes == 2 * (1 + config["depth"])


def observe(
    proposer: Any, canvas: Canvas, tree: DraftTree, fronts: Any, data: dict[str, Tensor], run: int
) -> None:
    """Tell the drafter what the recorded target accepted, and its features there."""
    nodes = data[f"run{run}.call0.accepted_nodes"].long()
    true_features = data[f"run{run}.call1.hidden_in"]
    # wherever the target's features are not recorded, anything else must do
    features = torch.full((2, 1, tree.tokens.shape[1], true_features.shape[-1]), 9.0)
    features[:, 0, nodes] = true_features
    path = torch.full((1, tree.max_depth + 1), -1)
    path[0, : len(nodes)] = nodes
    tokens, positions = torch.full_like(path, 3), torch.full_like(path, -1)
    following = data[f"run{run}.call0.next_token"].long()
    tokens[0, : len(nodes)] = torch.cat([tree.tokens[0, nodes[1:]], following])
    positions[0, : len(nodes)] = fronts.start + torch.arange(len(nodes))
    canvas.write(positions, tokens, 2)
    assert canvas.tokens[0, : len(nodes) + 1].tolist() == data[f"run{run}.call1.input_ids"][0, 120:].tolist()
    outcome = StepResult(
        fronts=fronts,
        tree=tree,
        distribution=Categorical(torch.zeros(1, tree.tokens.shape[1], 2)),
        features=features,
        path=path,
        committed=torch.tensor([len(nodes)]),
        tokens=tokens,
        positions=positions,
    )
    proposer.observe(outcome, NO_DRAWS)


STATIC = [(i, r) for i in (0, 1) for r in range(len(case(i)["static_runs"]))]


@pytest.mark.parametrize(("index", "run"), STATIC)
def test_static_drafting(index: int, run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The distributions at all nodes that are continued, given the recorded draws; greedy ones draw themselves."""
    data, options, name = golden(index), case(index)["static_runs"][run], f"static{run}"
    topology = Topology.from_paths(options["choices"])
    target, canvas, lanes, reader = begin(index, name, options, len(topology.internal) - 1)
    recorded_draws = data[f"{name}.sampled_tokens"].long()
    if not options["greedy"]:
        rows = iter(recorded_draws)

        def draw_children(distribution: Categorical, numbers: Tensor, draw_mode: str, ranks: Any) -> Tensor:
            assert draw_mode == "without_replacement"
            drawn = torch.stack([next(rows) for _ in range(distribution.logits.shape[1])])
            return drawn[None, :, : numbers.shape[-1]]

        monkeypatch.setattr(drafting, "draw_children", draw_children)
    proposer = StaticProposer(
        reader,
        topology,
        "without_replacement",
        1,
        lane_width=lanes.width,
        batch=1,
        device=torch.device("cpu"),
    )
    fronts = lanes.fronts(canvas, 2)
    draws = Draws(torch.zeros(1, 1), torch.zeros(1, 1), torch.rand(1, topology.num_nodes))
    tree = proposer.propose(canvas.tokens[:, :1], fronts, draws)

    internal = list(topology.internal)
    for node in range(1, topology.num_nodes):
        row = internal.index(topology.parents[node])
        assert tree.tokens[0, node] == recorded_draws[row, topology.ranks[node]]
    torch.testing.assert_close(torch.cat(target.raw, dim=1), data[f"{name}.head_logits"], atol=1e-4, rtol=0)
    if options["greedy"]:
        assert tree.draft_probs is None
        # conditional "probabilities" of greedy runs are guided logits
        guided = torch.cat(target.distributions, dim=1)[0].gather(-1, recorded_draws)
        steps = data[f"{name}.cond_probs"].diff(dim=-1)
        torch.testing.assert_close(guided.diff(dim=-1), steps, atol=1e-4, rtol=0)
        return
    assert tree.draft_probs is not None
    draft = tree.draft_probs[0]
    torch.testing.assert_close(draft[internal], data[f"{name}.draft_probs"], atol=1e-5, rtol=0)
    assert not draft[[n for n in range(topology.num_nodes) if n not in internal]].any()
    # the distribution of a child given its elder siblings
    taken = draft[internal].gather(-1, recorded_draws)
    left = 1 - (taken.cumsum(-1) - taken)
    width = topology.branching
    torch.testing.assert_close(
        (taken / left)[:, :width], data[f"{name}.cond_probs"][:, :width], atol=1e-4, rtol=1e-3
    )
    assert reader.passes == 1 + sum(
        1 for level in topology.levels[1:] if any(topology.children[n] for n in level)
    )


# -- on models of our own ------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("host", ["c2i", "t2i"])
def test_what_the_head_has_read(host: str, guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was drafted and rejected on the way, its cache is that of one causal pass over the target's own
    features of the image.
    """
    pipe = drafting_pipeline(host)
    readers: list[EagleReader] = []
    build = EagleReader.__init__

    def remember(self: EagleReader, *args: Any, **options: Any) -> None:
        build(self, *args, **options)
        readers.append(self)

    monkeypatch.setattr(EagleReader, "__init__", remember)
    monkeypatch.setattr(Batch, "_drop", lambda self, rows: None)  # so that each image keeps its row
    prompts: list[Any] = [0, 3] if host == "c2i" else ["a red sphere", "cube"]
    tree = [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]]
    out = pipe(
        prompts,
        seed=0,
        guidance_scale=guidance,
        accelerator=Speculative("eagle", tree=tree),
        output_type="latent",
    )
    (reader,) = readers
    assert reader.passes == out.stats.draft_passes > 0
    head, model = reader.head, pipe.transformer
    given = pipe._condition(prompts)
    condition, mask = given.values, given.mask
    tokens = out.images.flatten(1)
    if guidance > 1:
        condition, tokens = torch.cat([condition, model.unconditional(condition)]), tokens.repeat(2, 1)
        mask = None if mask is None else mask.repeat(2, 1)
    pairs = model.prefix_length - 1
    count = pairs + model.num_tokens
    cache = head.new_cache(len(tokens), count)
    with torch.inference_mode():
        features = teacher_features(model, condition, mask, tokens)
        torch.testing.assert_close(
            reader.session.prefix_features, features[:, : pairs + 1], atol=1e-4, rtol=1e-3
        )
        paired = torch.cat([tokens.new_zeros(len(tokens), pairs), tokens], dim=1)
        attention = AttentionInputs(
            head.rotary_table(count), causal=True, cache=cache, slots=torch.arange(count), length=count
        )
        head.transform(head.fuse(paired, features[:, :-1]), attention)
    base = reader.cache_slots.base
    for row, theirs in enumerate(cache.keys[0]):
        ours, written = reader.cache_slots.cache.keys[0, row], out.written[row % 2].flatten()
        # what the last pass of an image decided is not read any more
        known = int((written < written.max()).sum())
        torch.testing.assert_close(ours[:, :pairs], theirs[:, :pairs], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(
            ours[:, base : base + known], theirs[:, pairs : pairs + known], atol=1e-4, rtol=1e-3
        )


def teacher_features(model: Any, condition: Tensor, mask: Tensor | None, tokens: Tensor) -> Tensor:
    """[R, T + N, dim] features of a full pass over condition and image."""
    x = torch.cat([model.embed_condition(condition), model.embed_tokens(tokens)], dim=1)
    table = model.rotary_table()
    if mask is None:
        return model.transform(x, AttentionInputs(table, causal=True))
    return model.transform(x, AttentionInputs(table, mask=prefix_mask(mask, x.shape[1])))
