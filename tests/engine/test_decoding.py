"""The engine's parts by themselves: distributions as distributions, canvases, orders, randomness, sessions,
the loop."""

from __future__ import annotations

import json
from bisect import bisect
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import GRID, transformer
from varaccel.engine.canvas import Canvas
from varaccel.engine.counts import Stage
from varaccel.engine.distribution import Categorical
from varaccel.engine.loop import Step, decode
from varaccel.engine.randomness import Randomness, image_generators
from varaccel.engine.statistics import Statistics
from varaccel.errors import InputError
from varaccel.hosts.causal.guidance import Guidance
from varaccel.hosts.causal.sampling import Sampling
from varaccel.hosts.causal.schedule import Raster, StaggeredGrids, StaggeredRows, StepInputs
from varaccel.hosts.causal.session import CausalSession
from varaccel.nn.condition import Condition
from varaccel.nn.grid import Grid, line_ends
from varaccel.nn.kv_cache import KVCache


def uniforms(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- distributions ----------------------------------------------------------------------------------------------


def test_categorical_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([2.0, -1.0, float("-inf"), 0.5, -6.0])
    draws = 200_000
    token_ids = Categorical(logits.expand(1, draws, -1)).sample(uniforms((1, draws)))
    counts = torch.bincount(token_ids.flatten(), minlength=5).double()
    expected = logits.double().softmax(-1) * draws
    assert counts[2] == 0
    chi2 = ((counts - expected) ** 2 / expected.clamp(min=1e-9))[expected > 0].sum()
    assert chi2 < 16.3, "3 degrees of freedom, 0.1 % level"


def test_categorical_extremes() -> None:
    logits = torch.full((1, 2, 16384), -torch.inf)
    logits[..., 700] = 0.0
    logits[..., 16000] = -3.0
    edges = torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64)
    assert Categorical(logits).sample(edges).tolist() == [[700, 16000]]
    assert Categorical(logits, greedy=True).sample(edges).tolist() == [[700, 700]]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-8, 8), min_size=2, max_size=12), st.floats(0, 1, exclude_max=True))
def test_categorical_sample_is_the_inverse_of_the_cumulative(values: list[float], uniform: float) -> None:
    distribution = Categorical(torch.tensor(values).view(1, 1, -1))
    code = int(distribution.sample(torch.tensor([[uniform]], dtype=torch.float64)))
    cumulative = distribution.logits.double().softmax(-1).flatten().cumsum(0)
    assert (cumulative[code - 1] if code else 0.0) <= uniform + 1e-12
    assert uniform <= cumulative[code] + 1e-12


def test_log_prob_and_residual() -> None:
    p = Categorical(torch.tensor([[[0.5, 0.3, 0.2]]]).log())
    q = Categorical(torch.tensor([[[0.2, 0.5, 0.3]]]).log())
    torch.testing.assert_close(p.log_prob(torch.tensor([[1]])).exp(), torch.tensor([[0.3]]))
    torch.testing.assert_close(p.residual(q).probs, torch.tensor([[[1.0, 0.0, 0.0]]]))
    torch.testing.assert_close(p.residual(p).probs, p.probs)


def test_residual_restores_the_distribution() -> None:
    """min(p, q) plus the rejected mass times the residual is p: what speculative decoding rests on."""
    logits = torch.randn(2, 4, 3, 9, generator=torch.Generator().manual_seed(1))
    p, q = Categorical(logits[0]), Categorical(logits[1])
    kept = torch.minimum(p.probs, q.probs)
    rejected = 1 - kept.sum(-1, keepdim=True)
    torch.testing.assert_close(kept + rejected * p.residual(q).probs, p.probs)


# -- sampling options ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.floats(0.05, 1.0), st.integers(0, 2**31))
def test_filters_keep_the_likeliest(top_k: int, top_p: float, seed: int) -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed))
    kept = Sampling(top_k=top_k, top_p=top_p).filter(logits).isfinite()
    assert (kept.sum(-1) >= 1).all()
    assert (kept.sum(-1) <= min(top_k, 20)).all()
    worst_kept = logits.masked_fill(~kept, torch.inf).amin(-1)
    best_dropped = logits.masked_fill(kept, -torch.inf).amax(-1)
    assert (worst_kept > best_dropped).all()


# -- canvas and randomness -----------------------------------------------------------------------------


def test_ragged_writes_leave_padded_rows_alone() -> None:
    canvas = Canvas.empty(2, 5)
    canvas.write(torch.tensor([[0, 1], [3, -1]]), torch.tensor([[7, 8], [9, 6]]), step=4)
    assert canvas.tokens.tolist() == [[7, 8, 0, 0, 0], [0, 0, 0, 9, 0]]
    assert canvas.written.tolist() == [[4, 4, 0, 0, 0], [0, 0, 0, 4, 0]]
    assert not canvas.is_full


def test_vector_canvas() -> None:
    canvas = Canvas.empty(1, 3, channels=2)
    canvas.write(torch.tensor([[2, -1]]), torch.tensor([[[1.0, 2.0], [5.0, 5.0]]]), step=1)
    assert canvas.tokens.tolist() == [[[0, 0], [0, 0], [1, 2]]]


def partly_given() -> Canvas:
    tokens = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
    fixed = torch.tensor([[True, False, False, True], [False, True, False, False]])
    return Canvas.given(tokens, fixed)


def test_given_tokens_stand_before_the_first_pass() -> None:
    canvas = partly_given()
    assert canvas.tokens.tolist() == [[5, 0, 0, 8], [0, 2, 0, 0]]
    assert not canvas.written.any()
    with pytest.raises(InputError, match=r"\[2, 4\] and \[2, 3\]"):
        Canvas.given(canvas.tokens, torch.zeros(2, 3, dtype=torch.bool))


def test_given_tokens_stay_in_shared_writes() -> None:
    canvas = partly_given()
    canvas.write(torch.tensor([0, 1]), torch.tensor([[10, 11], [12, 13]]), step=1)
    canvas.write(torch.tensor([3, 2]), torch.tensor([[20, 21], [22, 23]]), step=2)
    assert canvas.tokens.tolist() == [[5, 11, 21, 8], [12, 2, 23, 22]]
    assert canvas.written.tolist() == [[1, 1, 2, 2]] * 2
    assert canvas.is_full


def test_given_tokens_stay_in_ragged_writes() -> None:
    canvas = partly_given()
    canvas.write(torch.tensor([[0, 1], [1, -1]]), torch.tensor([[10, 11], [12, 13]]), step=3)
    assert canvas.tokens.tolist() == [[5, 11, 0, 8], [0, 2, 0, 0]]
    assert canvas.written.tolist() == [[3, 3, 0, 0], [0, 3, 0, 0]]


@pytest.mark.parametrize("positions", [[0, 1, 2], [[0, 1, 2], [2, 0, -1]]])
def test_given_vectors_stay(positions: list) -> None:
    canvas = Canvas.empty(2, 3, channels=2)
    canvas.fixed = torch.tensor([[True, False, False], [False, False, False]])
    values = torch.arange(12.0).view(2, 3, 2) + 1
    canvas.write(torch.tensor(positions), values, step=1)
    assert canvas.tokens[0].tolist() == [[0, 0], [3, 4], [5, 6]]
    assert canvas.tokens[1, 2].tolist() == ([11, 12] if isinstance(positions[0], int) else [7, 8])


def test_raster_decoding_keeps_given_tokens() -> None:
    """What is given is read by all passes after it, like any other token."""
    tokens = torch.randint(0, 24, (2, GRID**2), generator=torch.Generator().manual_seed(1))
    canvas = Canvas.given(tokens, torch.rand(2, GRID**2, generator=torch.Generator().manual_seed(2)) < 0.5)
    fixed = canvas.fixed
    assert fixed is not None
    randomness = Randomness.draw(image_generators(2, seed=0), GRID**2)
    passes = decode(session("c2i", 2), canvas, Raster(), randomness)
    assert canvas.is_full
    assert passes == GRID**2
    assert torch.equal(canvas.tokens[fixed], tokens[fixed])
    assert not torch.equal(canvas.tokens, tokens)


def test_draws_of_positions_are_those_of_their_numbers() -> None:
    randomness = Randomness.draw(image_generators(2, seed=4), 6)
    distribution = Categorical(torch.randn(2, 2, 9, generator=torch.Generator().manual_seed(0)))
    for positions in (torch.tensor([3, 1]), torch.tensor([[0, -1], [5, 2]])):
        assert torch.equal(
            randomness.sample(distribution, positions), distribution.sample(randomness.at(positions))
        )


def test_stages_are_told() -> None:
    stages = (Stage("draft", 0.5, 8, 60, 1000), Stage("refine", 0.25, 2, 40, 50))
    stats = Statistics("plain", {}, False, 2, 100, 10, 4, 1050, {"tokens": 0.75}, stages=stages)
    told = json.loads(json.dumps(stats.to_dict()))["stages"]
    assert told[1] == {"name": "refine", "seconds": 0.25, "passes": 2, "tokens": 40, "cache_bytes": 50}
    assert str(stats).endswith("; draft 60 tokens in 8 passes, 0.50 s; refine 40 tokens in 2 passes, 0.25 s")
    assert ";" not in str(Statistics("plain", {}, True, 1, 1, 1, 1, 1))


def test_draws_belong_to_a_image_and_a_position() -> None:
    many = Randomness.draw(image_generators(3, seed=4), 6)
    alone = Randomness.draw(image_generators(1, seed=5), 6)
    assert torch.equal(many.uniforms[1:2], alone.uniforms)
    ragged = many.at(torch.tensor([[0, -1], [5, 2], [3, 3]]))
    assert torch.equal(ragged[1], many.uniforms[1, [5, 2]])


@pytest.mark.parametrize("seed", [-1, 2**63, "0", True])
def test_bad_seeds(seed: object) -> None:
    with pytest.raises(InputError, match="seed"):
        image_generators(1, seed=seed)  # type: ignore[arg-type]


# -- orders --------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.booleans())
def test_staggered_rows_decide_everything_once(height: int, width: int, window: int, alone: bool) -> None:
    groups = StaggeredRows(width, window, first_row_alone=alone).groups(height * width)
    decided = [p for g in groups for p in g.positions]
    assert sorted(decided) == list(range(height * width))
    lag = min(window, width)
    first = width if alone and height > 1 else lag
    assert len(groups) == width + (first + (height - 2) * lag if height > 1 else 0)
    when = {p: n for n, g in enumerate(groups) for p in g.positions}
    fed_true: set[int] = set()
    for number, group in enumerate(groups):
        for position, source in zip(group.positions, group.sources, strict=True):
            assert source == -1 or when[source] < number, "only what is decided can be fed"
            if source == position - 1:
                fed_true.add(source)
        for position in group.refresh:
            assert when[position] == number - 1, "a late token is fed as soon as it exists"
            fed_true.add(position)
    # every token is encoded for the tokens after it, the very last excepted
    assert fed_true >= set(range(height * width - 1))


def test_wide_windows_are_raster_order() -> None:
    raster = [f.host for f in Raster().step_inputs(Canvas.empty(1, 12))]
    assert StaggeredRows(4, 4).groups(12) == raster
    assert StaggeredRows(4, 99, first_row_alone=True).groups(12) == raster


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
)
def test_grids_are_decided_one_after_the_other(
    sizes: list[tuple[int, int]], window: int, alone: bool, ends: bool
) -> None:
    grids = tuple(Grid(height, width, 9 if ends else None) for height, width in sizes)
    given = line_ends(grids, torch.device("cpu")) >= 0
    groups = StaggeredGrids(grids, window, first_row_alone=alone).groups()
    last = len(given) - 1
    when = {p: n for n, group in enumerate(groups) for p in group.positions}
    assert sorted(when) == (~given).nonzero().flatten().tolist()
    assert sum(len(group.positions) for group in groups) == len(when), "everything once"
    borders = [0, *accumulate(grid.num_positions for grid in grids)]
    for number, group in enumerate(groups):
        # no grid begins before the one above it is there
        assert len({bisect(borders, p) for p in group.positions}) == 1
        for position, source in zip(group.positions, group.sources, strict=True):
            assert source == -1 or given[source] or when[source] < number, "only what is there can be read"
            if position in borders:
                assert source == position - 1, "a grid begins from the end of the one before it"
        assert all(given[p] or when[p] == number - 1 for p in group.refresh)
    read = {s for group in groups for p, s in zip(group.positions, group.sources, strict=True) if s == p - 1}
    read |= {p for group in groups for p in group.refresh}
    assert read >= set(range(last - ends)), "every token is read for those after it"
    if len(grids) == 1:
        rows = StaggeredRows(grids[0].width, window, first_row_alone=alone, end_of_line=ends)
        assert groups == rows.groups(grids[0].num_positions)


# -- cache and session ---------------------------------------------------------------------------------


def test_cache_rows_at_different_slots() -> None:
    shape = {"layers": 1, "batch": 2, "heads": 1, "slots": 4, "head_dim": 2}
    device = torch.device("cpu")
    shared = KVCache(**shape, dtype=torch.float32, device=device)
    ragged = KVCache(**shape, dtype=torch.float32, device=device)
    k = torch.randn(2, 1, 2, 2)
    shared.update(0, torch.tensor([1, 3]), k, -k)
    ragged.update(0, torch.tensor([[1, 3], [3, 1]]), torch.stack([k[0], k[1].flip(1)]), k)
    assert torch.equal(shared.keys, ragged.keys)
    assert shared.keys[0, :, :, [0, 2]].abs().sum() == 0


GRIDS = (Grid(GRID, GRID),)


def session(model_type: str, batch: int, guidance: float = 1.0, **options: object) -> CausalSession:
    model = transformer(model_type)
    generator = torch.Generator().manual_seed(3)
    if model_type == "c2i":
        return CausalSession(
            model, Condition(torch.arange(batch)), GRIDS, guidance=Guidance(guidance), **options
        )
    features = torch.randn(batch, 8, 16, generator=generator)
    mask = torch.arange(8) >= torch.tensor([[5], [2], [0]])[:batch]
    features = features * mask.unsqueeze(-1)
    return CausalSession(model, Condition(features, mask), GRIDS, guidance=Guidance(guidance), **options)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("model_type", ["c2i", "t2i"])
def test_rows_may_advance_at_different_speeds(model_type: str, guidance: float) -> None:
    """Rows that decide 1, 2 or 3 positions per pass, teacher-forced, get the distributions of one-by-one decoding."""
    total = GRID**2
    tokens = torch.randint(0, 24, (3, total), generator=torch.Generator().manual_seed(8))
    together = session(model_type, 3, guidance)
    canvas = Canvas.empty(3, total)
    expected = []
    for number, inputs in enumerate(Raster().step_inputs(canvas), start=1):
        expected.append(together.predict(canvas, inputs).logits)
        canvas.write(inputs.positions, tokens[:, inputs.positions], number)
    expected_logits = torch.cat(expected, dim=1)

    ragged, canvas = session(model_type, 3, guidance), Canvas.empty(3, total)
    seen = torch.zeros_like(expected_logits)
    done = torch.zeros(3, dtype=torch.long)
    while not canvas.is_full:
        offsets = torch.arange(3)
        positions = done.unsqueeze(1) + offsets  # row b decides b + 1 positions
        positions = torch.where((offsets <= torch.arange(3)[:, None]) & (positions < total), positions, -1)
        # the guesses of a pass must be on the canvas before they are read
        used = positions >= 0
        drafts = tokens.gather(1, positions.clamp(min=0))
        canvas.write(positions, drafts, 1)
        logits = ragged.predict(canvas, StepInputs.ragged(positions)).logits
        assert logits[used].isfinite().all()
        rows, columns = used.nonzero(as_tuple=True)
        seen[rows, positions[rows, columns]] = logits[rows, columns]
        done += used.sum(1)
    torch.testing.assert_close(seen, expected_logits, atol=2e-5, rtol=1e-5)


def test_staggered_rows_equal_a_full_pass_under_the_same_mask() -> None:
    """The oracle of out-of-order decoding: encode everything in one pass under the recorded visibility."""
    model = transformer("c2i")
    total, window = GRID**2, GRID - 1
    order = StaggeredRows(GRID, window)
    canvas = Canvas.empty(2, total)
    live = session("c2i", 2)
    distributions: dict[int, torch.Tensor] = {}
    randomness = Randomness.draw(image_generators(2, seed=0), total)
    for number, inputs in enumerate(order.step_inputs(canvas), start=1):
        distribution = live.predict(canvas, inputs)
        for column, position in enumerate(inputs.host.positions):
            distributions[position] = distribution.logits[:, column]
        canvas.write(inputs.positions, distribution.sample(randomness.at(inputs.positions)), number)

    # Position 1 and 2 of row 0 never see anything unusual; row 1 column 0 is predicted from a stand-in.
    full = model(torch.arange(2), canvas.tokens[:, :-1])
    for position in range(GRID):
        torch.testing.assert_close(distributions[position], full[:, position], atol=2e-5, rtol=1e-5)
    stand_in = canvas.tokens[:, :-1].clone()
    stand_in[:, GRID - 1] = canvas.tokens[:, window - 1]
    replaced = model(torch.arange(2), stand_in)
    torch.testing.assert_close(distributions[GRID], replaced[:, GRID], atol=2e-5, rtol=1e-5)
    assert not torch.allclose(distributions[GRID], full[:, GRID], atol=1e-3)


def test_guidance_interval_drops_the_second_branch() -> None:
    rows = []
    live = session("c2i", 2, guidance=3.0)
    live.guidance = Guidance(3.0, interval=2)
    original = live._transform

    def watched(x: torch.Tensor, attention: object) -> torch.Tensor:
        rows.append(x.shape[0])
        return original(x, attention)

    live._transform = watched
    canvas = Canvas.empty(2, GRID**2)
    decode(live, canvas, Raster(), Randomness.draw(image_generators(2, seed=0), GRID**2))
    # positions 1 to 3 are guided (interval counts decoding steps from 0), then one branch is left
    assert rows == [4] * 3 + [2] * (GRID**2 - 4)


def test_observers_see_every_step() -> None:
    steps: list[Step] = []
    canvas = Canvas.empty(2, GRID**2)
    randomness = Randomness.draw(image_generators(2, seed=0), GRID**2)
    passes = decode(session("c2i", 2), canvas, StaggeredRows(GRID, 2), randomness, steps.append)
    assert [s.number for s in steps] == list(range(1, passes + 1))
    assert [s.progress for s in steps] == [n / passes for n in range(1, passes + 1)]
    assert sum(s.decided for s in steps) == GRID**2
    assert int(canvas.written.max()) == passes
