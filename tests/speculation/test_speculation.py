"""The speculative loop and its accelerators: what they read, decide, count and refuse."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import (
    GRID,
    PROMPTS,
    VOCAB_SIZE,
    drafting_pipeline,
    eagle_head,
    pipeline,
    transformer,
    vq_model,
)
from varaccel import LlamaGenPipeline, Plain, ZipAR
from varaccel.accelerators import Accelerator, make_accelerator
from varaccel.accelerators.jacobi import Jacobi
from varaccel.accelerators.lantern import Lantern
from varaccel.accelerators.speculative import Speculative
from varaccel.engine.canvas import Canvas
from varaccel.engine.counts import SpeculationStats
from varaccel.engine.distribution import Categorical
from varaccel.engine.job import Job
from varaccel.engine.loop import Step, decode
from varaccel.engine.randomness import Randomness, image_generators
from varaccel.errors import InputError
from varaccel.hosts.causal.guidance import Guidance
from varaccel.hosts.causal.sampling import Sampling
from varaccel.hosts.causal.schedule import StaggeredRows
from varaccel.hosts.causal.session import CausalSession, DraftInputs
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.condition import Condition
from varaccel.nn.grid import Grid
from varaccel.pipelines.acceptance_map import pass_colors
from varaccel.speculation import loop as speculation
from varaccel.speculation import proposers as drafting
from varaccel.speculation.batch import Batch
from varaccel.speculation.drafters import LayerSkip
from varaccel.speculation.proposers import StaticProposer, draw_children
from varaccel.speculation.step import StepResult
from varaccel.speculation.tree import DynamicTree, Topology

HOSTS = ("c2i", "t2i")
POSITIONS = GRID**2
DYNAMIC = DynamicTree(top_k=3, depth=2, total=9)
BUSHY = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 0, 0]]

LOSSLESS: dict[str, Accelerator] = {
    "jacobi": Jacobi(),
    "jacobi 3 left": Jacobi(3, fill="left"),
    "jacobi 5 random": Jacobi(5, "none", "random"),
    "jacobi 4 maximal": Jacobi(4, "maximal"),
    "eagle chain": Speculative("eagle", tree=3),
    "eagle tree": Speculative("eagle", tree=BUSHY),
    "eagle dynamic": Speculative("eagle", tree=DYNAMIC),
    "eagle adaptive": Speculative("eagle", tree=6, adaptive=True),
    "small chain": Speculative("small", tree=9),
    "small named tree": Speculative("small", tree="mc_sim_7b_63"),
    "small adaptive tree": Speculative("small", tree=BUSHY, adaptive=True),
    "small dynamic": Speculative("small", tree=DYNAMIC, verification="recursive"),
    "small k_sequential": Speculative("small", tree=BUSHY, verification="k_sequential"),
    "small gumbel": Speculative("small", tree=BUSHY, verification="gumbel"),
    "eagle gumbel": Speculative("eagle", tree=5, verification="gumbel", adaptive=True),
    "layers": Speculative("layers", tree=5),
    "layers 0": Speculative(LayerSkip((0,)), tree=DYNAMIC),
    "layers matching": Speculative("layers", tree=BUSHY, verification="matching", adaptive=True),
    "lantern k 0": Lantern(k=0, drafter="small", tree=BUSHY),
    "lantern delta 0": Lantern(k=5, delta=0.0, drafter="eagle", tree=DYNAMIC),
    "lantern multiplier 1": Lantern(k=5, multiplier=1.0, drafter="small", tree=4, adaptive=True),
}
ORDERED: dict[str, Callable[[int | None], Accelerator]] = {
    "jacobi": lambda row_window: Jacobi(4, row_window=row_window),
    "jacobi maximal": lambda row_window: Jacobi(3, "maximal", "random", row_window=row_window),
    "eagle": lambda row_window: Speculative("eagle", tree=BUSHY, row_window=row_window),
    "small": lambda row_window: Speculative("small", tree=4, row_window=row_window, adaptive=True),
    "dynamic": lambda row_window: Speculative("small", tree=DYNAMIC, row_window=row_window),
    "lantern": lambda row_window: Lantern(
        k=3, delta=0.2, drafter="layers", tree=BUSHY, row_window=row_window
    ),
}
RUN: dict[type, Any] = {kind: kind.run for kind in (Jacobi, Speculative, Lantern)}
DISTRIBUTIONS: tuple[dict[str, Any], ...] = (
    {"guidance_scale": 1.0},
    {"guidance_scale": 2.5},
    {"guidance_scale": 2.5, "guidance_interval": 5},
)
lossless = pytest.mark.parametrize("name", LOSSLESS)
ordered = pytest.mark.parametrize("name", ORDERED)
hosts = pytest.mark.parametrize("host", HOSTS)


def draw(host: str, accelerator: Any, prompts: Any = None, **options: Any) -> Any:
    options = {"seed": 5, "output_type": "latent", **options}
    pipe = drafting_pipeline(host)
    return pipe(PROMPTS[host] if prompts is None else prompts, accelerator=accelerator, **options)


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> list[StepResult]:
    """What became of the draft tokens of every pass of the calls to come."""
    seen: list[StepResult] = []
    verify = speculation._verify_step

    def watched(*args: Any) -> StepResult:
        seen.append(verify(*args))
        return seen[-1]

    monkeypatch.setattr(speculation, "_verify_step", watched)
    return seen


# -- the image -----------------------------------------------------------------------------------------


@hosts
@lossless
def test_without_chance_the_image_is_that_of_plain_decoding(host: str, name: str) -> None:
    for distribution in DISTRIBUTIONS:
        plain = draw(host, Plain(), temperature=0.0, **distribution)
        fast = draw(host, LOSSLESS[name], temperature=0.0, seed=77, **distribution)
        assert fast.stats.lossless
        assert torch.equal(fast.images, plain.images)
        assert fast.stats.passes <= POSITIONS


@pytest.mark.slow
@pytest.mark.parametrize(
    "distribution", [*DISTRIBUTIONS, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.7}], ids=str
)
@hosts
def test_matching_draws_the_image_of_plain_decoding(host: str, distribution: dict[str, Any]) -> None:
    plain = draw(host, Plain(), **distribution).images
    for drafter, tree, adaptive in (
        ("small", 4, False),
        ("eagle", BUSHY, False),
        ("small", BUSHY, True),
        ("layers", DYNAMIC, False),
        ("eagle", "dynamic", False),
    ):
        accelerator = Speculative(drafter, tree=tree, verification="matching", adaptive=adaptive)
        out = draw(host, accelerator, **distribution)
        assert torch.equal(out.images, plain)
        assert out.stats.mean_accepted >= 0


@hosts
def test_gumbel_images_depend_on_neither_window_nor_fill(host: str) -> None:
    for distribution in (*DISTRIBUTIONS, {"temperature": 0.8, "top_k": 6}):
        one = draw(host, Jacobi(1), **distribution)
        assert one.stats.image_passes == (POSITIONS,) * 3
        assert one.stats.accepted == (0.0,) * 3
        for window, fill in ((5, "left"), (16, "above"), (99, "random")):
            assert torch.equal(draw(host, Jacobi(window, fill=fill), **distribution).images, one.images)


@pytest.mark.slow
@hosts
def test_gumbel_images_depend_on_no_drafter(host: str) -> None:
    for distribution in (*DISTRIBUTIONS, {"temperature": 0.8, "top_k": 6}, {"temperature": 0.0}):
        expected = draw(host, Jacobi(1), **distribution).images
        for drafter, tree in (("small", 4), ("eagle", BUSHY), ("layers", "mc_sim_7b_63"), ("small", DYNAMIC)):
            accelerator = Speculative(drafter, tree=tree, verification="gumbel")
            assert torch.equal(draw(host, accelerator, **distribution).images, expected)


@pytest.mark.parametrize("coupling", ["none", "gumbel", "maximal"])
@pytest.mark.parametrize("window", [1, 3, 7, 99])
def test_every_pass_advances_by_one_to_window(window: int, coupling: Any) -> None:
    for fill in ("left", "above", "random"):
        written = draw("c2i", Jacobi(window, coupling, fill), guidance_scale=1.0).written.flatten(1)
        for row in written:
            assert (row.diff() >= 0).all(), "from left to right"
            sizes = row.unique_consecutive(return_counts=True)[1]
            assert sizes[0] == 1
            assert sizes.max() <= window


@hosts
@lossless
def test_images_do_not_depend_on_their_batch(host: str, name: str) -> None:
    together = draw(host, LOSSLESS[name])
    assert together.stats.passes == max(together.stats.image_passes) <= POSITIONS
    for index, prompt in enumerate(PROMPTS[host]):
        alone = draw(host, LOSSLESS[name], prompt, seed=5 + index)
        assert torch.equal(alone.images[0], together.images[index])
        assert torch.equal(alone.written[0], together.written[index])
        assert alone.stats.image_passes[0] == together.stats.image_passes[index]
        assert alone.stats.accepted[0] == together.stats.accepted[index]


@pytest.mark.parametrize("name", [*LOSSLESS, *(f"{name} in rows" for name in ORDERED)])
def test_fixed_shapes_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = name.removesuffix(" in rows")
    accelerator = ORDERED[base](2) if name != base else LOSSLESS[name]
    pipe = drafting_pipeline("t2i")
    expected = draw("t2i", accelerator)
    shapes: set[Any] = set()

    def watched(x: Tensor, attention: Any) -> Tensor:
        shapes.add((x.shape, attention.length, attention.mask.shape))
        return pipe.transformer.transform(x, attention)

    monkeypatch.setattr(
        pipe,
        "_transforms",
        lambda network: watched if network is pipe.transformer else network.transform,
    )
    fixed = draw("t2i", accelerator)
    assert torch.equal(fixed.images, expected.images)
    assert torch.equal(fixed.written, expected.written)
    assert all(length is None for _, length, _ in shapes)
    assert len(shapes) == 1


def test_more_draft_tokens_than_the_vocabulary() -> None:
    """Named trees try up to four tokens per node; a model may have three."""
    pipe = drafting_pipeline("c2i", 3, 3, 0.8)

    def tokens(accelerator: Any, **options: Any) -> Tensor:
        return pipe([0, 1], seed=0, accelerator=accelerator, output_type="latent", **options).images

    sampled, greedy = tokens(Plain()), tokens(Plain(), temperature=0.0)
    for tree in ("mc_sim_7b_63", "naive_extend_57", "dynamic"):
        assert torch.equal(tokens(Speculative("small", tree=tree), temperature=0.0), greedy)
        assert torch.equal(tokens(Speculative("small", tree=tree, verification="matching")), sampled)
        by_noise = tokens(Speculative("small", tree=tree, verification="gumbel"))
        assert torch.equal(by_noise, tokens(Jacobi(1)))


# -- cache slots ---------------------------------------------------------------------------------------


def true_distributions(
    pipe: LlamaGenPipeline, prompts: Any, tokens: Tensor, guidance: Guidance, sampling: Sampling
) -> Tensor:
    """[B, N, V] log-probabilities of every position by one pass without a cache."""
    model = pipe.transformer
    given = pipe._condition(prompts)
    condition, mask = given.values, given.mask
    with torch.inference_mode():
        logits = model(condition, tokens[:, :-1], mask)[:, model.prefix_length - 1 :]
        if guidance.enabled:
            other = model(model.unconditional(condition), tokens[:, :-1], mask)[:, model.prefix_length - 1 :]
            active = torch.tensor([guidance.active_at(p) for p in range(POSITIONS)])
            logits = torch.where(active[:, None], guidance.combine(logits, other), logits)
    return sampling.filter(logits).log_softmax(-1)


@pytest.mark.slow
@hosts
@lossless
def test_distributions_are_those_of_a_pass_without_a_cache(
    host: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every pass, wherever the image went: after the root and after each accepted draft token."""
    passes: list[tuple[StepResult, list[int]]] = []
    write = Batch.write

    def watched(batch: Batch, outcome: StepResult) -> None:
        passes.append((outcome, list(batch._images)))  # rows of finished images are dropped
        write(batch, outcome)

    monkeypatch.setattr(Batch, "write", watched)
    for distribution in DISTRIBUTIONS:
        passes.clear()
        out = draw(host, LOSSLESS[name], **distribution)
        guidance = Guidance(distribution["guidance_scale"], distribution.get("guidance_interval", -1))
        truth = true_distributions(
            drafting_pipeline(host), PROMPTS[host], out.images.flatten(1), guidance, Sampling()
        )
        compared = 0
        for outcome, images in passes:
            found = outcome.distribution.logits.log_softmax(-1)
            for row, image in enumerate(images):
                committed = int(outcome.committed[row])
                nodes, positions = outcome.path[row, :committed], outcome.positions[row, :committed]
                assert (nodes >= 0).all()
                torch.testing.assert_close(found[row, nodes], truth[image, positions], atol=1e-4, rtol=1e-4)
                compared += committed
        assert compared == 3 * (POSITIONS - 1)


@ordered
@pytest.mark.parametrize(("row_window", "guidance"), [(1, 2.5), (2, 1.0), (3, 2.5)])
@torch.inference_mode()
def test_distributions_of_several_lanes_are_those_without_draft_slots(
    name: str, row_window: int, guidance: float, outcomes: list[StepResult]
) -> None:
    """What came of each pass, read again without draft slots: first the late token and the roots, then the
    accepted draft tokens of one lane after the other, the lowest first, so that none sees those of another.
    """
    pipe = drafting_pipeline("t2i")
    out = draw("t2i", ORDERED[name](row_window), "a red sphere", guidance_scale=guidance)
    tokens = out.images.flatten(1)
    given = pipe._condition(["a red sphere"])
    again = CausalSession(pipe.transformer, given, (Grid(GRID, GRID),), guidance=Guidance(guidance))
    compared = 0
    for outcome in outcomes:
        fronts = outcome.fronts
        lanes = [lane for lane in range(fronts.start.shape[1]) if fronts.open[0, lane]]
        late = [] if fronts.refresh is None or fronts.refresh[0] < 0 else [int(fronts.refresh[0])]
        starts = [int(fronts.start[0, lane]) for lane in lanes]
        fed = late + [int(fronts.source[0, lane]) for lane in lanes]
        features = read(again, tokens[:, fed], late + [start - 1 for start in starts])
        distributions = {lane: features[:, len(late) + i : len(late) + i + 1] for i, lane in enumerate(lanes)}
        for lane, start in reversed(list(zip(lanes, starts, strict=True))):
            committed = int(outcome.committed[lane])
            positions = list(range(start, start + committed - 1))
            found = distributions[lane]
            if positions:
                found = torch.cat([found, read(again, tokens[:, positions], positions)], dim=1)
            expected = again.distribution(found, torch.arange(start, start + committed)).logits[0]
            nodes = outcome.path[lane, :committed]
            torch.testing.assert_close(
                outcome.distribution.logits[lane, nodes], expected, atol=1e-4, rtol=1e-4
            )
            compared += committed
    assert compared == POSITIONS - 1


def read(session: CausalSession, tokens: Tensor, positions: list[int]) -> Tensor:
    return session.read(DraftInputs(tokens, torch.tensor([positions])))


# -- several lanes -------------------------------------------------------------------------------------


@pytest.mark.slow
@hosts
@ordered
@pytest.mark.parametrize("row_window", [1, 2, 3])
def test_images_of_several_lanes_do_not_depend_on_their_batch(host: str, name: str, row_window: int) -> None:
    accelerator, distribution = ORDERED[name](row_window), DISTRIBUTIONS[row_window - 1]
    # a seed none of whose numbers stands within rounding of a border between two tokens
    together = draw(host, accelerator, seed=50, **distribution)
    assert not together.stats.lossless
    ideal = GRID + (GRID - 1) * row_window
    assert together.stats.passes <= ideal, "never slower than without draft tokens"
    for index, prompt in enumerate(PROMPTS[host]):
        alone = draw(host, accelerator, prompt, seed=50 + index, **distribution)
        assert torch.equal(alone.images[0], together.images[index])
        assert torch.equal(alone.written[0], together.written[index])


@pytest.mark.slow
@hosts
@ordered
@pytest.mark.parametrize("row_window", [GRID, GRID + 3])
def test_a_wide_row_window_is_raster_order(host: str, name: str, row_window: int) -> None:
    wide, raster = draw(host, ORDERED[name](row_window)), draw(host, ORDERED[name](None))
    assert torch.equal(wide.images, raster.images)
    assert torch.equal(wide.written, raster.written)


def worst_children(distribution: Categorical, numbers: Tensor, *_: Any) -> Tensor:
    return distribution.logits.topk(numbers.shape[-1], dim=-1, largest=False).indices


@pytest.mark.slow
@hosts
@pytest.mark.parametrize("row_window", [1, 2, 3])
def test_without_accepted_tokens_the_course_is_that_of_zipar(
    host: str, row_window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draft tokens that are never accepted leave nothing behind: ZipAR's passes and images, greedy and drawn."""
    monkeypatch.setattr(drafting, "draw_children", worst_children)
    everything = LayerSkip((0, 1, 2))
    for tree in (3, BUSHY):
        hopeless = Speculative(everything, tree=tree, row_window=row_window, verification="matching")
        # with a filter, the worst tokens are impossible
        for options in ({"temperature": 0.0}, {"top_k": 12}, {"top_k": 12, "guidance_scale": 1.0}):
            zipar = draw(host, ZipAR(row_window), **options)
            out = draw(host, hopeless, **options)
            assert out.stats.passes == zipar.stats.passes == GRID + (GRID - 1) * row_window
            assert out.stats.mean_accepted == 0
            assert torch.equal(out.images, zipar.images)
            assert torch.equal(out.written, zipar.written)
    alone = draw(host, Jacobi(1, row_window=row_window), temperature=0.0)
    assert torch.equal(alone.images, draw(host, ZipAR(row_window), temperature=0.0).images)
    assert alone.stats.passes == GRID + (GRID - 1) * row_window


# -- rows that end in a token of their own -------------------------------------------------------------

END = VOCAB_SIZE - 1


@pytest.mark.parametrize(("width", "height"), [(4, 5), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 7])
def test_rows_with_an_end_of_line(width: int, height: int, window: int) -> None:
    """A model that reads an end of line after every row: known ahead, fed in its turn, never decided."""
    pitch = width + 1
    model = transformer("c2i", grid_size=pitch)
    total = height * pitch
    ends = torch.arange(width, total, pitch)
    canvas = Canvas.empty(2, total)
    canvas.write(ends, torch.full((2, height), END), 1)
    before = canvas.written[:, ends].clone()
    order = StaggeredRows(width, window, end_of_line=True)
    session = CausalSession(model, Condition(torch.tensor([0, 3])), (Grid(height, pitch),))

    distributions: dict[int, Tensor] = {}
    original = session.predict

    def predict(canvas: Canvas, inputs: Any) -> Any:
        distribution = original(canvas, inputs)
        for column, position in enumerate(inputs.host.positions):
            assert position not in distributions
            distributions[position] = distribution.logits[:, column]
        return distribution

    session.predict = predict  # type: ignore[method-assign]
    randomness = Randomness.draw(image_generators(2, seed=0), total)
    passes = decode(session, canvas, order, randomness)
    lag = min(window, width)
    assert passes == width + (height - 1) * lag
    assert canvas.is_full
    assert (canvas.tokens[:, ends] == END).all()
    assert torch.equal(canvas.written[:, ends], before)
    inner = [p for p in range(total) if (p + 1) % pitch]
    assert sorted(distributions) == inner

    # every token is fed once, in its own slot, and its true predecessor before it or with it
    groups = order.groups(total)
    fed: dict[int, int] = {}
    for number, group in enumerate(groups):
        assert group.sources == tuple(p - 1 for p in group.positions)
        for slot in (*group.refresh, *group.sources):
            assert slot not in fed
            if slot >= 0:
                fed[slot] = number
    assert sorted(fed) == list(range(total - 2)), "all but the last token and the last end of line"

    # one pass over everything, in which each slot sees what had been fed by then
    slots = torch.arange(total - 2)
    when = torch.tensor([fed[slot] for slot in range(total - 2)])
    sees = (slots[:, None] >= slots) & (when[:, None] >= when)
    mask = torch.zeros(total - 1, total - 1, dtype=torch.bool)
    mask[:, 0] = True
    mask[1:, 1:] = sees
    with torch.inference_mode():
        x = torch.cat(
            [model.embed_condition(torch.tensor([0, 3])), model.embed_tokens(canvas.tokens[:, :-2])], 1
        )
        full = model.logits(model.transform(x, AttentionInputs(model.rotary_table()[: total - 1], mask=mask)))
        causal = model(torch.tensor([0, 3]), canvas.tokens[:, :-2])
    for position in inner:
        torch.testing.assert_close(distributions[position], full[:, position], atol=2e-5, rtol=1e-5)
    if window >= width:
        torch.testing.assert_close(full, causal, atol=2e-5, rtol=1e-5)
        tokens = torch.full((2, total), END)
        with torch.inference_mode():
            for position in inner:
                distribution = Categorical(model(torch.tensor([0, 3]), tokens[:, :position])[:, -1:])
                tokens[:, position : position + 1] = distribution.sample(
                    randomness.at(torch.tensor([position]))
                )
        assert torch.equal(tokens, canvas.tokens)


# -- what is counted -----------------------------------------------------------------------------------


@hosts
@pytest.mark.parametrize("name", [*LOSSLESS, *(f"{name} in rows" for name in ORDERED)])
def test_counts_agree_with_the_canvas(host: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = name.removesuffix(" in rows")
    accelerator = ORDERED[base](2) if name != base else LOSSLESS[name]
    recorded: list[SpeculationStats] = []

    def remember(self: Accelerator, job: Job) -> SpeculationStats:
        recorded.append(RUN[type(self)](self, job))
        return recorded[-1]

    monkeypatch.setattr(type(accelerator), "run", remember)
    out = draw(host, accelerator)
    (counts,) = recorded
    written, stats = out.written.flatten(1), out.stats
    assert counts.passes.tolist() == written.max(1).values.tolist() == list(stats.image_passes)
    assert stats.passes == max(stats.image_passes)
    # what an attempt decides are its accepted draft tokens and one token more
    assert (1 + counts.attempts + counts.accepted == POSITIONS).all()
    if name == base:
        assert counts.attempts.tolist() == [len(row.unique()) - 1 for row in written]
    assert (counts.attempts >= counts.passes - 1).all()
    expected = counts.accepted / counts.attempts
    assert stats.accepted == pytest.approx(expected.tolist())
    assert stats.mean_accepted == pytest.approx(expected.mean().item())
    assert (stats.draft_passes > 0) == (accelerator.name != "jacobi")
    for image, row in zip(out.acceptance_maps(GRID, legend=False), out.written, strict=True):
        assert np.array_equal(np.asarray(image), pass_colors(row.numpy(), stats.passes))


@hosts
@pytest.mark.parametrize(
    "accelerator", [Jacobi(4), Speculative("eagle"), Speculative("small", row_window=1)], ids=str
)
def test_observers_see_every_pass_and_can_stop(host: str, accelerator: Accelerator) -> None:
    pipe = drafting_pipeline(host)
    seen: list[tuple[int, int, Tensor]] = []
    stop = 99

    def callback(pipe: Any, step: int, decided: int, state: dict[str, Any]) -> None:
        seen.append((step, decided, state["canvas"].written.clone()))
        if step == stop:
            pipe._interrupt = True

    out = draw(host, accelerator, callback_on_step_end=callback)
    assert [step for step, _, _ in seen] == list(range(out.stats.passes))
    filled = [0, *(int((written > 0).sum()) for _, _, written in seen)]
    assert all(after > before for before, after in itertools.pairwise(filled))
    assert filled[-1] == 3 * POSITIONS
    before = torch.zeros_like(seen[0][2])
    for step, decided, written in seen:
        changed = written != before
        assert (written[changed] == step + 1).all()
        assert decided == int(changed.sum(1).max())
        before = written

    seen.clear()
    stop = 2
    stopped = draw(host, accelerator, callback_on_step_end=callback)
    assert stopped.stats.passes == len(seen) == 3
    assert torch.equal(stopped.written.flatten(1), seen[-1][2])
    assert 0 < int((stopped.written > 0).sum()) < 3 * POSITIONS
    assert not stopped.images[stopped.written == 0].any()
    decided_before = stopped.written > 0
    assert torch.equal(stopped.images[decided_before], out.images[decided_before])
    assert torch.equal(draw(host, accelerator).images, out.images), "the next call is not interrupted"
    assert pipe.interrupt is False


def test_progress_rises_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Step] = []

    def watch(self: Jacobi | Speculative | Lantern, job: Job) -> SpeculationStats:
        return RUN[type(self)](self, replace(job, on_step=steps.append))

    for kind in RUN:
        monkeypatch.setattr(kind, "run", watch)
    for accelerator in (
        Jacobi(4),
        Speculative("small", tree=BUSHY),
        Lantern(k=3, drafter="eagle", row_window=2),
    ):
        steps.clear()
        passes = max(draw("t2i", accelerator).stats.image_passes)
        assert [step.number for step in steps] == list(range(1, passes + 1))
        progress = [step.progress for step in steps]
        assert progress == sorted(set(progress))
        assert progress[0] == pytest.approx(1 / POSITIONS)
        assert progress[-1] == 1


# -- adaptive depth ------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_window", [None, 2])
@pytest.mark.parametrize("tree", [6, 2, BUSHY])
def test_depth_follows_what_was_accepted(
    tree: Any, row_window: Any, outcomes: list[StepResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two levels deeper after a success, one less after a failure, per lane of each image."""
    proposers: list[StaticProposer] = []
    build = StaticProposer.__init__

    def remember(self: StaticProposer, *args: Any, **options: Any) -> None:
        build(self, *args, **options)
        proposers.append(self)

    monkeypatch.setattr(StaticProposer, "__init__", remember)
    monkeypatch.setattr(Batch, "_drop", lambda self, rows: None)  # so that each image keeps its row
    draw("c2i", Speculative("small", tree=tree, row_window=row_window, adaptive=True))
    (proposer,) = proposers
    deepest = proposer.topology.max_depth
    expected: dict[tuple[int, int], int] = {}
    sizes = set()
    for outcome in outcomes:
        batch, lanes = outcome.fronts.start.shape
        depths = outcome.tree.depths.max(-1).values.view(batch, lanes)
        for row, lane in outcome.fronts.open.nonzero().tolist():
            key = (row, int(outcome.fronts.start[row, lane]) // proposer.lane_width)
            depth = expected.setdefault(key, min(3, deepest))
            assert int(depths[row, lane]) == depth <= deepest
            sizes.add(depth)
            accepted = int(outcome.committed[row * lanes + lane]) - 1
            expected[key] = min(depth + 2, deepest) if accepted >= depth else max(depth - 1, 1)
    for (row, lane), depth in expected.items():
        assert int(proposer._depths[row, lane]) == depth
    assert len(sizes) > 1


@pytest.mark.parametrize("row_window", [None, 1, 2])
def test_dynamic_trees_reach_as_far_as_can_be_decided(row_window: Any, outcomes: list[StepResult]) -> None:
    draw("c2i", Speculative("small", tree=DYNAMIC, row_window=row_window))
    for outcome in outcomes:
        fronts, depths = outcome.fronts, outcome.tree.depths
        reached = depths.max(-1).values.view(fronts.start.shape)
        assert (reached <= fronts.limit.clamp(min=1)).all()
        assert ((depths >= 0).sum(-1) <= DYNAMIC.total).all()
    if row_window is None:
        assert max(outcome.tree.max_depth for outcome in outcomes) == DYNAMIC.depth + 1


def test_how_children_are_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, vocab_size = 60_000, 4
    logits = torch.randn(vocab_size, generator=generator).expand(rows, 1, vocab_size)
    numbers = torch.rand(rows, 1, 3, dtype=torch.float64, generator=generator)
    distribution = Categorical(logits)
    p = distribution.probs[0, 0].double()

    likeliest = draw_children(distribution, numbers, "deterministic")
    assert torch.equal(likeliest, p.argsort(descending=True)[:3].expand(rows, 1, 3))

    def frequencies(drawn: Tensor) -> Tensor:
        flat = drawn[:, 0, 0] * vocab_size + drawn[:, 0, 1]
        return (torch.bincount(flat, minlength=vocab_size**2).double() / rows).view(vocab_size, vocab_size)

    third = draw_children(distribution, numbers[..., :2], "deterministic", (0, 2))
    assert torch.equal(third, likeliest[..., [0, 2]])
    beyond = draw_children(distribution, numbers[..., :2], "deterministic", (1, 10**9))
    assert torch.equal(beyond[0, 0], p.argsort(descending=True)[[1, 3]])

    independent = draw_children(distribution, numbers, "independent")
    torch.testing.assert_close(frequencies(independent), p[:, None] * p, atol=0.01, rtol=0)
    different = draw_children(distribution, numbers, "without_replacement")
    expected = (p[:, None] * p / (1 - p[:, None])).fill_diagonal_(0)
    torch.testing.assert_close(frequencies(different), expected, atol=0.01, rtol=0)
    assert all(len(set(row)) == 3 for row in different[:500, 0].tolist())
    # two possible tokens: both are drawn, then any
    few = Categorical(torch.tensor([[[0.0, -torch.inf, 1.0, -torch.inf]]]))
    assert set(draw_children(few, numbers[:1], "without_replacement")[0, 0, :2].tolist()) == {0, 2}


# the same trees, numbered branch by branch and level by level
BRANCH_BY_BRANCH = Topology((-1, 0, 1, 2, 1, 0, 5)), Topology((-1, 0, 0, 1, 1, 2, 3))
GAPS = (  # trees that leave draws out
    Topology((-1, 0, 1, 2, 1, 0, 5), (0, 2, 1, 0, 0, 0, 3)),
    Topology.from_paths([[1], [3], [1, 0], [1, 2], [3, 1]]),
    Topology.from_paths([[2]]),
)
VERIFICATIONS = ("recursive", "k_sequential", "matching", "gumbel")


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("verification", VERIFICATIONS)
@pytest.mark.parametrize("drafter", ["eagle", "small"])
def test_how_a_tree_is_numbered_changes_nothing_that_is_drafted(
    drafter: str, verification: Any, adaptive: bool, outcomes: list[StepResult]
) -> None:
    """Every drafter is told the true parents: the courses of the two numberings are the same."""
    courses = []
    for tree in BRANCH_BY_BRANCH:
        outcomes.clear()
        accelerator = Speculative(drafter, tree=tree, verification=verification, adaptive=adaptive)
        out = draw("c2i", accelerator, temperature=2.0)
        courses.append((out.images, out.written, [outcome.tree.tokens for outcome in outcomes]))
    assert torch.equal(courses[0][0], courses[1][0])
    assert torch.equal(courses[0][1], courses[1][1])
    assert all(torch.equal(a, b) for a, b in zip(courses[0][2], courses[1][2], strict=True))


@pytest.mark.parametrize("tree", GAPS, ids=["branch by branch", "level by level", "alone"])
def test_a_child_takes_the_draw_of_its_rank(
    tree: Topology, outcomes: list[StepResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With matching, child r of a node is the drafter's likeliest token but r, after the tokens above it.

    The drafter is all layers of the model, so the model's own distributions say what the likeliest are."""
    accelerator = Speculative(LayerSkip((0, 1, 2)), tree=tree, verification="matching")
    draw("c2i", accelerator, guidance_scale=1.0)
    level = tree.by_level
    compared = 0
    for outcome in outcomes:
        likeliest = outcome.distribution.logits.argsort(-1, descending=True)  # [M, T, V]
        inside = (outcome.fronts.open.flatten()[:, None]) & (
            outcome.tree.depths <= outcome.fronts.end.view(-1, 1)
        )
        for node, (parent, rank) in enumerate(zip(level.parents, level.ranks, strict=True)):
            if node:
                rows = inside[:, node]
                assert torch.equal(outcome.tree.tokens[rows, node], likeliest[rows, parent, rank])
                compared += int(rows.sum())
    assert compared > 30


def test_independent_children_are_alike_whatever_their_rank() -> None:
    gaps, none = (Topology((-1, 0, 0, 1), ranks) for ranks in ((0, 1, 3, 2), (0, 0, 1, 0)))
    images = [
        draw("c2i", Speculative("small", tree=tree, verification="k_sequential")).images
        for tree in (gaps, none)
    ]
    assert torch.equal(*images)


# -- side effects --------------------------------------------------------------------------------------


@pytest.mark.slow
@hosts
def test_networks_and_global_randomness_are_left_alone(host: str) -> None:
    pipe = drafting_pipeline(host)
    networks = [pipe.transformer, pipe.eagle_head, pipe.draft_transformer]
    states = [{k: v.clone() for k, v in network.state_dict().items()} for network in networks]
    attributes = [set(vars(network)) for network in networks]
    torch.manual_seed(0)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for accelerator in (*LOSSLESS.values(), *(build(2) for build in ORDERED.values())):
        draw(host, accelerator)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    for network, state, names in zip(networks, states, attributes, strict=True):
        assert set(vars(network)) == names
        assert not network.training
        after = network.state_dict()
        assert after.keys() == state.keys()
        assert all(torch.equal(after[name], value) for name, value in state.items())


@hosts
@pytest.mark.parametrize("name", ["jacobi 5 random", "eagle tree", "small adaptive tree", "lantern k 0"])
def test_the_same_seed_draws_the_same(host: str, name: str) -> None:
    first, again, other = (draw(host, LOSSLESS[name], seed=seed) for seed in (8, 8, 9))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.written, again.written)
    assert not torch.equal(first.images, other.images)


def test_auto_takes_the_best_drafter_there_is() -> None:
    pipe = drafting_pipeline("c2i")
    auto = draw("c2i", Speculative())
    assert torch.equal(auto.images, draw("c2i", Speculative("eagle")).images)
    assert torch.equal(draw("c2i", Speculative(pipe.eagle_head)).images, auto.images)
    own = draw("c2i", Speculative(pipe.draft_transformer))
    assert torch.equal(own.images, draw("c2i", Speculative("small")).images)
    bare = pipeline("c2i")
    layers = bare([0, 1], seed=0, accelerator=Speculative("layers"), output_type="latent")
    assert torch.equal(
        bare([0, 1], seed=0, accelerator="speculative", output_type="latent").images, layers.images
    )
    all_layers = draw("c2i", Speculative(LayerSkip((0, 1, 2)), tree=20), temperature=0.0)
    assert all_layers.stats.passes == 2, "the model agrees with itself: all draft tokens are accepted"


# -- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Jacobi(0), r"Jacobi window must be an integer of at least 1, got 0\."),
        (lambda: Jacobi(True), r"Jacobi window must be an integer of at least 1, got True\."),
        (lambda: Jacobi(2.5), r"Jacobi window must be an integer of at least 1, got 2\.5\."),
        (lambda: Jacobi(coupling="gumble"), "unknown Jacobi coupling 'gumble'.*did you mean 'gumbel'"),
        (lambda: Jacobi(fill="abov"), "unknown Jacobi fill 'abov'.*did you mean 'above'"),
        (lambda: Jacobi(row_window="rastr"), "row_window must be an integer of at least 1, got 'rastr'"),
        (lambda: Jacobi(row_window=0), "row_window must be an integer of at least 1, got 0"),
        (
            lambda: Speculative(row_window=False),
            "row_window must be an integer of at least 1, got False",
        ),
        (lambda: Lantern(row_window=1.5), "row_window must be an integer of at least 1"),
        (lambda: Speculative(verification="recursiv"), "unknown verification.*did you mean 'recursive'"),
        (lambda: Speculative("eagel"), "unknown drafter 'eagel'.*did you mean 'eagle'"),
        (lambda: Lantern(drafter="tiny"), "unknown drafter 'tiny'"),
        (lambda: Speculative(tree=[[0], [1, 0]]), r"path \[1, 0\] is an orphan: \[1\] is not in the tree\."),
        (lambda: Lantern(tree=[[0, 0]]), r"\[0\] is not in the tree"),
        (lambda: Speculative(tree=[]), "at least one path"),
        (lambda: Speculative(tree=0), "the length of a chain must be an integer of at least 1, got 0"),
        (lambda: Speculative(tree=True), "the length of a chain must be an integer of at least 1, got True"),
        (lambda: Speculative(tree="chian"), "unknown tree 'chian'.*did you mean 'chain'"),
        (lambda: Speculative(tree=2.5), "a tree is a name, a chain length or a list of paths"),
        (lambda: Speculative(tree=[[0], [2]]), "must take draws 0, 1, 2, ... in order"),
        (lambda: Speculative(tree=[[1]], verification="recursive"), "must take draws 0, 1, 2"),
        (lambda: Speculative(tree=Topology((-1, 0, 0), (0, 1, 0))), "must take draws 0, 1, 2"),
        (lambda: Lantern(tree=[[0], [0, 0], [0, 3]]), "must take draws 0, 1, 2"),
        (lambda: Speculative(tree=Topology((-1,))), "at least one draft token below its root"),
        (lambda: Lantern(tree=Topology((-1,))), "at least one draft token below its root"),
        (lambda: Speculative(tree="dynamic", verification="k_sequential"), "k_sequential verification needs"),
        (lambda: Speculative(tree=DYNAMIC, adaptive=True), "leave adaptive off"),
        (lambda: Lantern(tree="dynamic", adaptive=True), "leave adaptive off"),
        (lambda: Lantern(k=-1), "k must be an integer of at least 0, got -1"),
        (lambda: Lantern(k=True), "k must be an integer of at least 0, got True"),
        (lambda: Lantern(k=1.5), r"k must be an integer of at least 0, got 1\.5"),
        (lambda: Lantern(delta=-0.1), r"delta must be a number from 0 to 1, got -0\.1\."),
        (lambda: Lantern(delta=1.5), r"delta must be a number from 0 to 1, got 1\.5\."),
        (lambda: Lantern(delta=float("nan")), "delta must be a number from 0 to 1, got nan"),
        (lambda: Lantern(delta=0.1, multiplier=2.0), r"either delta \(LANTERN\) or multiplier"),
        (lambda: Lantern(multiplier=0.5), r"multiplier must be a number of at least 1, got 0\.5\."),
        (lambda: Lantern(multiplier=float("inf")), "multiplier must be a number of at least 1, got inf"),
        (lambda: Lantern(multiplier=float("nan")), "multiplier must be a number of at least 1, got nan"),
        (lambda: Lantern(residual="statik"), "unknown LANTERN residual 'statik'.*did you mean 'static'"),
        (lambda: Lantern(tree="dynamic", residual="static"), "is for drawn draft tokens"),
        (lambda: Lantern(tree="dynamic", residual="static_b"), "is for drawn draft tokens"),
        (lambda: Lantern(tree=4, residual="dynamic"), "is for the draft tokens of a dynamic tree"),
        (lambda: make_accelerator("jacobi", {"windw": 3}), "did you mean 'window'"),
        (lambda: make_accelerator("speculative", {"k": 3}), "unknown option"),
    ],
)
def test_bad_options_are_one_sentence(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def test_what_does_not_fit_the_model_is_refused_in_the_call() -> None:
    pipe, bare = drafting_pipeline("c2i"), pipeline("c2i")
    sizes = {"dim": 8, "num_layers": 1, "num_heads": 1}

    def refused(accelerator: Any, message: str, pipe: LlamaGenPipeline = pipe) -> None:
        with pytest.raises(InputError, match=message) as error:
            pipe(0, seed=0, accelerator=accelerator)
        assert "\n" not in str(error.value)

    refused(Lantern(k=VOCAB_SIZE), f"k must be smaller than the vocabulary of {VOCAB_SIZE}, got {VOCAB_SIZE}")
    for name in ("eagle", "small"):
        refused(Speculative(name), f"came without a drafter called '{name}'", bare)
    refused(Lantern(drafter="eagle"), "came without a drafter called 'eagle'", bare)
    small = transformer("c2i", vocab_size=VOCAB_SIZE + 1, **sizes)
    refused(Speculative(small), f"number of token ids {VOCAB_SIZE + 1} instead of {VOCAB_SIZE}")
    refused(
        Speculative(transformer("c2i", grid_size=5, **sizes)),
        r"sides of grids or scales \(5,\) instead of \(4,\)",
    )
    refused(Speculative(transformer("t2i", **sizes)), "kind of condition caption instead of class")
    refused(
        Lantern(drafter=transformer("c2i", num_classes=7, **sizes)),
        "number of classes or width of text features 7",
    )
    text = drafting_pipeline("t2i")
    for change, what in (({"prefix_length": 6}, "condition slots"), ({"caption_dim": 8}, "text features")):
        with pytest.raises(InputError, match=what):
            text("sphere", seed=0, accelerator=Speculative(transformer("t2i", **sizes, **change)))
    same = {"dim": 8, "num_layers": 3, "num_heads": 1}
    for change, what in (
        ({"vocab_size": VOCAB_SIZE + 1}, f"{VOCAB_SIZE + 1} instead of {VOCAB_SIZE} token ids"),
        ({"grid_size": 5}, "5 instead of 4 tokens per row"),
        ({"dim": 16}, "16 instead of 8 feature channels"),
    ):
        refused(Speculative(eagle_head(transformer("c2i", **{**same, **change}))), what)
    refused(Speculative(eagle_head(transformer("t2i", **same))), "condition slots")
    for layers in ((), (3,), (-1,), (0, 0)):
        refused(Speculative(LayerSkip(layers)), "layers must be different numbers from 0 to 2")
    refused(Speculative(7), "drafter must be one of auto, eagle, small, layers.*got int")
    refused(Speculative(None), "got NoneType")


def test_a_pipeline_refuses_drafters_of_another_model() -> None:
    target = transformer("c2i")
    with pytest.raises(InputError, match="5 instead of 4 tokens per row"):
        LlamaGenPipeline(target, vq_model(), eagle_head=eagle_head(transformer("c2i", grid_size=5)))
    with pytest.raises(InputError, match="sides of grids"):
        LlamaGenPipeline(target, vq_model(), draft_transformer=transformer("c2i", grid_size=5))
