"""Next-scale sessions and tokenizers: caches, hand-overs, guidance and filters change nothing but the speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from varaccel.engine.canvas import Canvas
from varaccel.engine.randomness import Randomness, image_generators
from varaccel.errors import CheckpointError, InputError
from varaccel.hosts.next_scale.feature_map import FeatureMap
from varaccel.hosts.next_scale.published_rng import PublishedDraws
from varaccel.hosts.next_scale.sampling import ScaleGuidance, ScaleSampling
from varaccel.hosts.next_scale.schedule import Scales
from varaccel.hosts.next_scale.session import ScaleSession
from varaccel.models.var import VARTransformer
from varaccel.nn.condition import Condition as Given
from varaccel.nn.scale_schedule import ScaleSchedule
from varaccel.tokenizers.multiscale_vq import MultiScaleVQModel

SIDES = (1, 2, 3, 5)  # 2 and 3 do not divide 5: cells of unequal size
SCHEDULE = ScaleSchedule(SIDES)
SCALES, TOKENS = len(SIDES), SCHEDULE.num_tokens
VOCAB_SIZE, WIDTH, DIM, DEPTH, CAPTION = 24, 4, 32, 2, 8
EXACT = {"atol": 1e-5, "rtol": 1e-5}
GREEDY = ScaleSampling(temperature=0)
DRAWN = ScaleSampling(temperature=(1.2, 1.1, 1.0, 0.9), top_k=16, top_p=0.95)
VARIANTS = [
    pytest.param(kind, shared, id=f"{kind}-{'shared' if shared else 'per block'}")
    for kind in ("class", "caption")
    for shared in (False, True)
]


def redraw(model: nn.Module, seed: int, std: float) -> None:
    """Draw all parameters anew, biases, norms and gates included, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=std, generator=generator)
            if name.endswith("scale_mul_1H11"):
                parameter.add_(math.log(4))  # the published start; sharper heads amplify rounding
            elif "norm" in name and name.endswith("weight"):
                parameter.add_(1)


def new_transformer(seed: int = 0, **changes: object) -> VARTransformer:
    sizes: dict[str, object] = {
        "depth": DEPTH,
        "dim": DIM,
        "num_heads": 4,
        "vocab_size": VOCAB_SIZE,
        "codebook_dim": WIDTH,
        "scales": SIDES,
        "num_classes": 5,
        "caption_dim": CAPTION,
    }
    model = VARTransformer(**{**sizes, **changes})
    redraw(model, seed, 0.2)
    return model.eval()


@cache
def transformer(kind: str = "class", shared: bool = False, seed: int = 0) -> VARTransformer:
    """A random model; shared by tests, so nobody may change it."""
    return new_transformer(seed, condition_type=kind, shared_adaln=shared).requires_grad_(False)


def new_tokenizer(seed: int = 0) -> MultiScaleVQModel:
    model = MultiScaleVQModel(
        base_channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        codebook_size=VOCAB_SIZE,
        codebook_dim=WIDTH,
        scales=SIDES,
        norm_groups=4,
    )
    redraw(model, seed, 0.2)
    with torch.no_grad():
        model.quantize.embedding.weight.mul_(5)
    return model.eval()


@cache
def tokenizer() -> MultiScaleVQModel:
    """A random tokenizer; shared by tests, so nobody may change it."""
    return new_tokenizer().requires_grad_(False)


def images(count: int = 3) -> Tensor:
    side = tokenizer().image_size
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1


def random_token_ids(count: int = 3) -> Tensor:
    return torch.randint(VOCAB_SIZE, (count, TOKENS), generator=torch.Generator().manual_seed(4))


Condition = tuple[Tensor | None, Tensor | None]


def condition(kind: str) -> Condition:
    """Three images' labels, or captions of 6, 1 and 4 words with noise after them."""
    if kind == "class":
        return torch.tensor([3, 0, 4]), None
    features = torch.randn(3, 6, CAPTION, generator=torch.Generator().manual_seed(5)) * 3
    return features, torch.arange(6) < torch.tensor([[6], [1], [4]])


def given_of(values: Tensor | None, mask: Tensor | None) -> Given | None:
    return None if values is None else Given(values, mask)


class Run:
    """Images made scale by scale, and what was seen on the way.

    Args:
        successor: takes over before scale `handover`.
        options: of all sessions.
    """

    def __init__(
        self,
        network: VARTransformer,
        condition: Condition,
        *,
        batch: int = 3,
        guidance: float = 3.0,
        sampling: ScaleSampling = DRAWN,
        seed: int = 7,
        successor: VARTransformer | None = None,
        handover: int | None = None,
        canvas: Canvas | None = None,
        **options: Any,
    ) -> None:
        features = FeatureMap(tokenizer().quantize, batch)
        self.canvas = canvas or Canvas.empty(batch, TOKENS)
        randomness = Randomness.draw(image_generators(batch, seed=seed), TOKENS)
        options |= {"guidance": ScaleGuidance.published(guidance), "sampling": sampling}
        session = ScaleSession(network, features, given_of(*condition), until=handover, **options)
        self.sessions = [session]
        self.logits: list[Tensor] = []
        for inputs in Scales(SCHEDULE).step_inputs(self.canvas):
            if inputs.scale == handover:
                session.close()
                session = ScaleSession(successor or network, features, given_of(*condition), **options)
                self.sessions.append(session)
            # what `predict` does, with a look at the logits before the filters
            logits = session.logits(self.canvas, inputs.scale)
            distribution = sampling.distribution(sampling.keep(logits, inputs.scale), inputs.scale)
            self.canvas.write(
                inputs.positions, distribution.sample(randomness.at(inputs.positions)), inputs.scale + 1
            )
            self.logits.append(logits)
        features.follow(self.canvas, SCALES)
        self.tokens, self.feature_map = self.canvas.tokens, features.value


def uncached(network: VARTransformer, condition: Condition, tokens: Tensor, guidance: float) -> list[Tensor]:
    """Guided logits of every scale by definition: two teacher-forced passes over the finished tokens."""
    vectors, mask = condition
    inputs = tokenizer().quantize.inputs(tokens)
    with torch.no_grad():
        conditional = network(vectors, inputs, mask)
        null = network(vectors, inputs, mask, dropped=torch.ones(len(tokens), dtype=torch.bool))
    return [
        (1 + guidance * scale / (SCALES - 1)) * conditional[:, SCHEDULE.span(scale)]
        - guidance * scale / (SCALES - 1) * null[:, SCHEDULE.span(scale)]
        for scale in range(SCALES)
    ]


def assert_same(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    """Logits of each scale agree to `tolerance`, in units of the largest one if that is above 1."""
    for mine, other in zip(ours, theirs, strict=True):
        size = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(mine, other, atol=tolerance * size, rtol=0.0)


# -- sessions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "shared"), VARIANTS)
def test_random_models_have_opinions(kind: str, shared: bool) -> None:
    """The tests below prove something only if conditions, earlier tokens and networks matter."""
    network, (vectors, mask) = transformer(kind, shared), condition(kind)
    inputs = tokenizer().quantize.inputs(random_token_ids())

    def far_apart(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).abs().amax(dim=(1, 2)).min() > 0.1)

    logits = network(vectors, inputs, mask)
    assert far_apart(logits, network(vectors.roll(1, 0), inputs, None if mask is None else mask.roll(1, 0)))
    assert far_apart(logits, network(vectors, inputs, mask, dropped=torch.ones(3, dtype=torch.bool)))
    assert far_apart(logits, transformer(kind, shared, seed=1)(vectors, inputs, mask))
    last = SCHEDULE.span(SCALES - 1)
    early = inputs.clone()
    early[:, : SCHEDULE.borders[2] - 1] = 0  # what scale 1 sees reaches the last scale through attention only
    assert far_apart(logits[:, last], network(vectors, early, mask)[:, last])
    early = inputs.clone()
    early[:, SCHEDULE.borders[2] - 1 :] = 0
    leading = SCHEDULE.borders[2]
    torch.testing.assert_close(network(vectors, early, mask)[:, :leading], logits[:, :leading], **EXACT)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize(("kind", "shared"), VARIANTS)
def test_cached_is_uncached(kind: str, shared: bool, sampling: ScaleSampling) -> None:
    network, given = transformer(kind, shared), condition(kind)
    run = Run(network, given, sampling=sampling)
    assert run.canvas.is_full
    assert_same(run.logits, uncached(network, given, run.tokens, 3.0))
    torch.testing.assert_close(run.feature_map, tokenizer().quantize.feature_maps(run.tokens)[-1])
    assert run.sessions[0].reads == SCALES
    assert run.sessions[0].rows_per_pass == 6


@pytest.mark.parametrize("l2_norm", [True, False])
def test_both_kinds_of_attention(l2_norm: bool) -> None:
    network = new_transformer(2, l2_norm=l2_norm)
    run = Run(network, condition("class"))
    assert_same(run.logits, uncached(network, condition("class"), run.tokens, 3.0))


def test_prediction() -> None:
    """`predict` filters the guided logits."""
    network, given = transformer(), condition("class")
    run = Run(network, given)
    features = FeatureMap(tokenizer().quantize, 3)
    session = ScaleSession(
        network, features, given_of(*given), guidance=ScaleGuidance.published(3.0), sampling=DRAWN
    )
    for inputs in Scales(SCHEDULE).step_inputs(run.canvas):
        distribution = session.predict(run.canvas, inputs)
        kept = DRAWN.keep(run.logits[inputs.scale], inputs.scale)
        torch.testing.assert_close(distribution.logits, DRAWN.distribution(kept, inputs.scale).logits)
        assert torch.isinf(distribution.logits).any()


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize(("kind", "shared"), VARIANTS)
def test_taking_over_from_oneself(kind: str, shared: bool, sampling: ScaleSampling) -> None:
    """A fresh session on the same canvas reads what is there in one masked pass and goes on as if never away."""
    network, given = transformer(kind, shared), condition(kind)
    run = Run(network, given, sampling=sampling)
    for handover in range(1, SCALES):
        split = Run(network, given, sampling=sampling, handover=handover)
        assert_same(split.logits, run.logits)
        assert torch.equal(split.tokens, run.tokens)
        assert [s.reads for s in split.sessions] == [handover, SCALES - handover]


@pytest.mark.parametrize("handover", range(1, SCALES))
def test_taking_over_from_another(handover: int) -> None:
    """Scales before the hand-over have the distributions of one network, those after it the distributions of
    the other."""
    draft, refine, given = transformer(seed=0), transformer(shared=True, seed=1), condition("class")
    run = Run(draft, given, successor=refine, handover=handover)
    first = uncached(draft, given, run.tokens, 3.0)
    second = uncached(refine, given, run.tokens, 3.0)
    assert_same(run.logits, first[:handover] + second[handover:])
    assert (first[-1] - second[-1]).abs().max() > 0.5


def test_skipping_scales() -> None:
    """A session that is asked for some scales only reads those between on the way."""
    network, given = transformer(), condition("class")
    run = Run(network, given)
    session = ScaleSession(
        network,
        FeatureMap(tokenizer().quantize, 3),
        given_of(*given),
        guidance=ScaleGuidance.published(3.0),
        sampling=DRAWN,
    )
    assert_same([session.logits(run.canvas, 1)], run.logits[1:2])
    assert_same([session.logits(run.canvas, 3)], run.logits[3:])
    assert session.reads == 2


@pytest.mark.parametrize("guidance", [0.0, 3.0])
@pytest.mark.parametrize("until", range(1, SCALES + 1))
def test_cache_holds_what_will_be_looked_at(until: int, guidance: float) -> None:
    """Nothing is stored for the last scale that is asked for, let alone for those beyond."""
    network, given = transformer(), condition("class")
    run = Run(network, given, guidance=guidance)
    session = ScaleSession(
        network,
        FeatureMap(tokenizer().quantize, 3),
        given_of(*given),
        guidance=ScaleGuidance.published(guidance),
        until=until,
    )
    for scale in range(until):
        assert_same([session.logits(run.canvas, scale)], run.logits[scale : scale + 1])
    slots, rows = SCHEDULE.borders[until - 1], 6 if guidance else 3
    if slots == 0:
        assert session.cache is None
        assert session.cache_bytes == 0
        return
    assert session.cache is not None
    assert session.cache.keys.shape == session.cache.values.shape == (DEPTH, rows, 4, slots, DIM // 4)
    assert (session.cache.keys != 0).any(-1).all()  # no slot is spare
    assert session.cache_bytes == session.cache.nbytes == 2 * 4 * DEPTH * rows * slots * DIM
    session.close()
    assert session.cache is None
    assert session.cache_bytes == 2 * 4 * DEPTH * rows * slots * DIM


def test_last_scale_only_needs_no_cache() -> None:
    run = Run(transformer(), condition("class"), handover=SCALES - 1)
    assert run.sessions[0].cache is None  # closed
    assert run.sessions[0].cache_bytes == 2 * 4 * DEPTH * 6 * SCHEDULE.borders[SCALES - 2] * DIM
    assert run.sessions[1].cache is None
    assert run.sessions[1].cache_bytes == 0


def test_half_precision_cache() -> None:
    """bfloat16 keeps 8 bits: logits of size 10 move by some hundredths at most, and memory halves."""
    network, given = transformer(), condition("class")
    exact = Run(network, given)
    options = {"guidance": ScaleGuidance.published(3.0), "cache_dtype": torch.bfloat16}
    session = ScaleSession(network, FeatureMap(tokenizer().quantize, 3), given_of(*given), **options)
    logits = [session.logits(exact.canvas, scale) for scale in range(SCALES)]
    assert all(part.dtype == torch.float32 for part in logits)
    assert session.cache is not None
    assert session.cache.keys.dtype == session.cache.values.dtype == torch.bfloat16
    assert 2 * session.cache_bytes == exact.sessions[0].cache_bytes
    assert_same(logits, exact.logits, tolerance=0.005)
    assert (logits[-1] - exact.logits[-1]).abs().mean() < 0.01
    assert not torch.equal(logits[-1], exact.logits[-1])


@pytest.mark.parametrize("kind", ["class", "caption"])
def test_no_guidance(kind: str) -> None:
    """At 0 the unconditional half is not worked out; the first scale never is guided."""
    network, given = transformer(kind), condition(kind)
    run = Run(network, given, guidance=0.0)
    assert run.sessions[0].rows_per_pass == 3
    with torch.no_grad():
        plain = network(given[0], tokenizer().quantize.inputs(run.tokens), given[1])
    assert_same([torch.cat(run.logits, 1)], [plain])
    guided = Run(network, given, guidance=3.0)
    assert_same(guided.logits[:1], run.logits[:1])
    assert not torch.allclose(guided.logits[1], run.logits[1], atol=0.1)


@pytest.mark.parametrize("kind", ["class", "caption"])
def test_no_condition(kind: str) -> None:
    """Without a condition guidance is off and every image has the distribution of "none"."""
    network, given = transformer(kind), condition(kind)
    run = Run(network, (None, None), guidance=3.0)
    assert run.sessions[0].rows_per_pass == 3
    with torch.no_grad():
        dropped = torch.ones(3, dtype=torch.bool)
        null = network(given[0], tokenizer().quantize.inputs(run.tokens), given[1], dropped=dropped)
    assert_same([torch.cat(run.logits, 1)], [null])


@pytest.mark.parametrize("handover", [None, 2])
@pytest.mark.parametrize(("kind", "shared"), VARIANTS)
def test_images_are_independent(kind: str, shared: bool, handover: int | None) -> None:
    network, (vectors, mask) = transformer(kind, shared), condition(kind)
    assert vectors is not None
    together = Run(network, (vectors, mask), handover=handover)
    for i in range(3):
        one = slice(i, i + 1)
        given = (vectors[one], None if mask is None else mask[one])
        alone = Run(network, given, batch=1, seed=7 + i, handover=handover)
        assert_same(alone.logits, [part[one] for part in together.logits])
        assert torch.equal(alone.tokens, together.tokens[one])


def test_padding_of_captions() -> None:
    """Neither what stands behind a caption nor how much of it matters; no mask means all of it."""
    network, (features, mask) = transformer("caption"), condition("caption")
    assert features is not None
    assert mask is not None
    run = Run(network, (features, mask))
    other = torch.where(mask.unsqueeze(-1), features, -50.0)
    assert_same(Run(network, (other, mask)).logits, run.logits)
    longer = torch.cat([features, torch.full((3, 2, CAPTION), 9.0)], 1)
    assert_same(Run(network, (longer, torch.cat([mask, mask.new_zeros(3, 2)], 1))).logits, run.logits)
    assert_same(Run(network, (features, mask.long())).logits, run.logits)
    short = Run(network, (features[2:, :4], None), batch=1, seed=9)
    assert_same(short.logits, [part[2:] for part in run.logits])


def test_decoding_leaves_no_trace() -> None:
    models: list[nn.Module] = [transformer(seed=0), transformer(seed=1), tokenizer()]
    before = [{k: t.clone() for k, t in m.state_dict().items()} for m in models]
    state = torch.get_rng_state()
    first = Run(models[0], condition("class"), successor=models[1], handover=2)
    again = Run(models[0], condition("class"), successor=models[1], handover=2)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(torch.get_rng_state(), state)
    for model, old in zip(models, before, strict=True):
        assert model.state_dict().keys() == old.keys()
        assert all(torch.equal(tensor, old[key]) for key, tensor in model.state_dict().items())


def test_distributions_depend_on_the_seed() -> None:
    network, given = transformer(), condition("class")
    assert not torch.equal(Run(network, given, seed=7).tokens, Run(network, given, seed=8).tokens)


# -- the feature map -----------------------------------------------------------------------------------


def test_feature_map_is_replaced_not_changed() -> None:
    """Tensors that were handed out keep their values, and are those of the tokenizer."""
    quantizer, canvas = tokenizer().quantize, Canvas.empty(3, TOKENS)
    features, tokens = FeatureMap(quantizer, 3), random_token_ids()
    inputs, maps = quantizer.inputs(tokens), [quantizer.start(3), *quantizer.feature_maps(tokens)]
    handed: list[tuple[Tensor, Tensor]] = [(features.value, features.value.clone())]
    for scale in range(SCALES):
        span = SCHEDULE.span(scale)
        canvas.write(torch.arange(TOKENS)[span], tokens[:, span], scale + 1)
        features.follow(canvas, scale + 1)
        assert features.scales == scale + 1
        torch.testing.assert_close(features.value, maps[scale + 1])
        handed.append((features.value, features.value.clone()))
        if scale + 1 < SCALES:
            for first in range(scale + 2):
                seen = features.seen(canvas, first, scale + 1)
                start = max(SCHEDULE.borders[first] - 1, 0)
                torch.testing.assert_close(seen, inputs[:, start : SCHEDULE.borders[scale + 2] - 1])
                handed.append((seen, seen.clone()))
    assert features.seen(canvas, 0, 0).shape == (3, 0, WIDTH)
    assert all(torch.equal(tensor, copy) for tensor, copy in handed)
    late = FeatureMap(quantizer, 3)
    torch.testing.assert_close(late.seen(canvas, 0, SCALES - 1), inputs)
    assert late.scales == SCALES - 1


def smooth_run(canvas: Canvas, smooth: bool = True) -> FeatureMap:
    draws = PublishedDraws(torch.Generator().manual_seed(3))
    features = FeatureMap(tokenizer().quantize, 3, smooth=draws.gumbel(VOCAB_SIZE) if smooth else None)
    session = ScaleSession(
        transformer(), features, given_of(*condition("class")), guidance=ScaleGuidance.published(3.0)
    )
    for inputs in Scales(SCHEDULE).step_inputs(canvas):
        distribution = session.predict(canvas, inputs)
        canvas.write(inputs.positions, draws.sample(distribution, inputs.positions), inputs.scale + 1)
    features.follow(canvas, SCALES)
    return features


def test_smooth_vectors_stay_code_vectors_where_fixed() -> None:
    """Softened vectors are means of tokens; a given token keeps its own."""
    given = random_token_ids()
    fixed = torch.rand(3, TOKENS, generator=torch.Generator().manual_seed(6)) < 0.5
    quantizer = tokenizer().quantize
    spread: list[Tensor] = []

    class Spy(FeatureMap):
        def _vectors(self, canvas: Canvas, scale: int) -> Tensor:
            spread.append(super()._vectors(canvas, scale))
            return spread[-1]

    draws = PublishedDraws(torch.Generator().manual_seed(3))
    features = Spy(quantizer, 3, smooth=draws.gumbel(VOCAB_SIZE))
    session = ScaleSession(
        transformer(), features, given_of(*condition("class")), guidance=ScaleGuidance.published(3.0)
    )
    canvas = Canvas.given(given, fixed)
    for inputs in Scales(SCHEDULE).step_inputs(canvas):
        distribution = session.predict(canvas, inputs)
        canvas.write(inputs.positions, draws.sample(distribution, inputs.positions), inputs.scale + 1)
    features.follow(canvas, SCALES)
    vectors, plain = torch.cat(spread, 1), quantizer.lookup(canvas.tokens)
    assert torch.equal(canvas.tokens[fixed], given[fixed])
    assert torch.equal(vectors[fixed], plain[fixed])
    assert ((vectors - plain)[~fixed].abs().amax(-1) > 1e-3).float().mean() > 0.2


def test_smooth_with_all_tokens_fixed_is_not_smooth() -> None:
    given = random_token_ids()
    features = smooth_run(Canvas.given(given, torch.ones(3, TOKENS, dtype=torch.bool)))
    torch.testing.assert_close(features.value, tokenizer().quantize.feature_maps(given)[-1])
    free = smooth_run(canvas := Canvas.empty(3, TOKENS))
    token_ids = tokenizer().quantize.feature_maps(canvas.tokens)[-1]
    assert not torch.allclose(free.value, token_ids, atol=1e-2)
    plain = smooth_run(canvas := Canvas.empty(3, TOKENS), smooth=False)
    torch.testing.assert_close(plain.value, tokenizer().quantize.feature_maps(canvas.tokens)[-1])


# -- filters and guidance ------------------------------------------------------------------------------


def naive_probabilities(logits: list[float], top_k: int, top_p: float, temperature: float) -> list[float]:
    """The published order of filters in plain Python: top-k, top-p on what is left, temperature."""
    border = sorted(logits)[-top_k] if top_k else -math.inf
    alive = [i for i, x in enumerate(logits) if x >= border]
    if 0 < top_p < 1:
        total = math.fsum(math.exp(logits[i]) for i in alive)
        ascending, mass, dropped = sorted(alive, key=lambda i: logits[i]), 0.0, set()
        for i in ascending[:-1]:
            mass += math.exp(logits[i]) / total
            assume(abs(mass - (1 - top_p)) > 1e-5)  # on the border, rounding decides
            if mass <= 1 - top_p:
                dropped.add(i)
        alive = [i for i in alive if i not in dropped]
    weights = {i: math.exp((logits[i] - max(logits)) / temperature) for i in alive}
    return [weights.get(i, 0.0) / math.fsum(weights.values()) for i in range(len(logits))]


@given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.3, 1.0, 4.0]),
    top_k=st.integers(0, VOCAB_SIZE),
    top_p=st.one_of(st.sampled_from([0.0, 1.0, 0.01]), st.floats(0, 1)),
    temperature=st.floats(0.2, 3),
)
@settings(max_examples=120, deadline=None)
def test_filters_by_definition(
    seed: int, spread: float, top_k: int, top_p: float, temperature: float
) -> None:
    logits = torch.randn(2, 3, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * spread
    sampling = ScaleSampling(temperature, top_k, top_p)
    original = logits.clone()
    probs = sampling.distribution(sampling.keep(logits, 0), 0).probs
    assert torch.equal(logits, original)  # not in place, unlike the published code
    want = torch.tensor(
        [[naive_probabilities(row, top_k, top_p, temperature) for row in rows] for rows in logits.tolist()]
    )
    assert torch.equal(probs == 0, want == 0)
    torch.testing.assert_close(probs, want, atol=1e-6, rtol=1e-4)


def test_temperature_never_changes_who_survives() -> None:
    logits = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 2
    kept = [ScaleSampling(t, 10, 0.8).keep(logits, 0) for t in (0.1, 1.0, 5.0)]
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[1], kept[2])


def test_ties_with_the_kth_are_kept() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 2.0, 2.0, 0.0]])
    kept = ScaleSampling(top_k=2).keep(logits, 0)
    assert kept.tolist() == [[3.0, 2.0, -math.inf, 2.0, 2.0, -math.inf]]
    # the ties count in the mass that top-p weighs: 3 has 47 % of it, not 73 %
    assert torch.equal(ScaleSampling(top_k=2, top_p=0.6).keep(logits, 0), kept)
    assert torch.isfinite(ScaleSampling(top_k=2, top_p=0.4).keep(logits, 0)).sum() == 1


def test_settings_per_scale() -> None:
    logits = torch.randn(1, 5, VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    sampling = ScaleSampling(temperature=[2.0, 1.0, 0.5, 0.0], top_k=[1, 4, 0, 2])
    sampling.check(SCHEDULE)
    for scale, (temperature, top_k) in enumerate(((2.0, 1), (1.0, 4), (0.5, 0))):
        one = ScaleSampling(temperature=temperature, top_k=top_k)
        ours = sampling.distribution(sampling.keep(logits, scale), scale)
        assert torch.equal(ours.probs, one.distribution(one.keep(logits, 0), 0).probs)
        assert ((ours.probs > 0).sum(-1) == (top_k or VOCAB_SIZE)).all()
    assert sampling.distribution(sampling.keep(logits, 3), 3).greedy


def test_one_candidate_is_greedy() -> None:
    logits = torch.randn(3, 5, VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    uniforms = torch.rand(3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for sampling in (ScaleSampling(top_k=1), ScaleSampling(top_p=1e-6), GREEDY):
        distribution = sampling.distribution(sampling.keep(logits, 0), 0)
        assert torch.equal(distribution.sample(uniforms), logits.argmax(-1))
    network, given = transformer(), condition("class")
    assert torch.equal(
        Run(network, given, sampling=ScaleSampling(top_k=1)).tokens,
        Run(network, given, sampling=GREEDY, seed=99).tokens,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 1.5},
        {"top_p": -0.1},
        {"top_p": math.nan},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": [1.0, -1.0, 1.0, 1.0]},
        {"temperature": "warm"},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_k": True},
        {"top_k": [1, 2, -3, 4]},
    ],
    ids=str,
)
def test_impossible_filters(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        ScaleSampling(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": [5, 5]}, "top_k has 2 entries but the model has 4 scales"),
        ({"temperature": [1.0] * 5}, "temperature has 5 entries but the model has 4 scales"),
        ({"temperature": []}, "temperature has 0 entries"),
    ],
    ids=str,
)
def test_filters_of_another_model(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ScaleSampling(**settings).check(SCHEDULE)


def test_filters_that_just_fit() -> None:
    ScaleSampling(temperature=[0.0] * SCALES, top_k=[VOCAB_SIZE] * SCALES, top_p=1.0).check(SCHEDULE)


def test_more_candidates_than_tokens_are_all() -> None:
    logits = torch.randn(1, 5, VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    for top_k in (0, VOCAB_SIZE, VOCAB_SIZE + 1, 10**9):
        assert torch.equal(ScaleSampling(top_k=top_k).keep(logits, 0), logits)


@pytest.mark.parametrize("scale", [math.nan, math.inf, 1e39, -0.5, True, "2"])
def test_impossible_guidance(scale: Any) -> None:
    with pytest.raises(InputError, match="guidance_scale must be a number"):
        ScaleGuidance(scale)


def test_guidance_grows_with_the_scale() -> None:
    assert [ScaleGuidance.published(3.0).strength(SCHEDULE, s) for s in range(SCALES)] == pytest.approx(
        [0, 1, 2, 3]
    )
    assert ScaleGuidance.published(3.0).strength(SCHEDULE, 0) == 0
    assert not ScaleGuidance.published(0.0).enabled
    assert not ScaleGuidance(0.9).enabled
    assert ScaleGuidance.published(0.1).enabled
    assert ScaleGuidance.published(3.0) == ScaleGuidance(4.0)
    assert not ScaleGuidance(1.0).enabled


# -- schedules, models and tokens ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "sides", [(), (0, 1), (-1,), (1, 2, 2), (1, 3, 2), (True, 2), (1, 2.0), ("1",)], ids=str
)
def test_impossible_schedules(sides: tuple[Any, ...]) -> None:
    with pytest.raises(InputError, match="schedule"):
        ScaleSchedule(sides)


def test_schedule() -> None:
    schedule = ScaleSchedule([1, 2, 4])  # type: ignore[arg-type]
    assert schedule == ScaleSchedule((1, 2, 4))
    assert schedule.borders == (0, 1, 5, 21)
    assert (len(schedule), schedule.num_tokens, schedule.last_side) == (3, 21, 4)
    assert [schedule.span(s) for s in range(3)] == [slice(0, 1), slice(1, 5), slice(5, 21)]
    assert [schedule.progress(s) for s in range(3)] == [0, 0.5, 1]
    assert ScaleSchedule((4,)).progress(0) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode(torch.zeros(1, 3, 12, 12)), "for 10x10 images, got 12x12"),
        (lambda m: m.encode(torch.zeros(1, 3, 10, 8)), "for 10x10 images, got 10x8"),
        (lambda m: m.encode(torch.zeros(1, 1, 10, 10)), r"\[B, 3, H, W\], got \[1, 1, 10, 10\]"),
        (lambda m: m.encode(torch.zeros(3, 10, 10)), r"\[B, 3, H, W\], got \[3, 10, 10\]"),
        (lambda m: m(torch.zeros(1, 3, 12, 12)), "for 10x10 images, got 12x12"),
        (lambda m: m.decode(torch.zeros(1, 5, 5, 5)), r"\[B, 4, h, w\] latents, got \[1, 5, 5, 5\]"),
        (lambda m: m.decode(torch.zeros(4, 5, 5)), r"\[B, 4, h, w\] latents"),
        (lambda m: m.decode_tokens(torch.zeros(1, TOKENS)), "token ids must be integers"),
        (lambda m: m.decode_tokens(torch.zeros(1, TOKENS, dtype=torch.bool)), "token ids must be integers"),
        (lambda m: m.decode_tokens(torch.zeros(1, 25, dtype=torch.long)), r"\[B, 39\] for the scales"),
        (lambda m: m.decode_tokens(torch.zeros(TOKENS, dtype=torch.long)), r"\[B, 39\] for the scales"),
        (lambda m: m.decode_tokens(torch.full((1, TOKENS), VOCAB_SIZE)), r"must lie in \[-1, 24\)"),
        (lambda m: m.decode_tokens(torch.full((1, TOKENS), -2)), r"must lie in \[-1, 24\)"),
        (lambda m: MultiScaleVQModel(base_channels=8), "norm_groups=32 must divide"),
        (lambda m: MultiScaleVQModel(scales=(2, 1)), "must increase"),
        (lambda m: MultiScaleVQModel(channel_multipliers=()), "at least one level"),
        (lambda m: VARTransformer(depth=2, dim=32, num_heads=5), "multiple of num_heads=5"),
        (lambda m: VARTransformer(depth=2, condition_type="image"), "image"),  # type: ignore[arg-type]
        (lambda m: VARTransformer.from_preset("d17"), "d17"),
    ],
)
def test_inputs_that_do_not_fit(call: Callable[[MultiScaleVQModel], object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call(tokenizer())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [0, 3, 12, 37])
def test_inputs_that_are_no_whole_scales(count: int) -> None:
    model, labels = transformer(), torch.tensor([1, 2])
    if count + 1 in SCHEDULE.borders:
        assert model(labels, torch.zeros(2, count, WIDTH)).shape == (2, count + 1, VOCAB_SIZE)
        return
    with pytest.raises(InputError, match=f"{count + 1} tokens are no whole scales"):
        model(labels, torch.zeros(2, count, WIDTH))


def test_inputs_that_are_longer_than_a_image() -> None:
    with pytest.raises(InputError, match="40 tokens are no whole scales"):
        transformer()(torch.tensor([1]), torch.zeros(1, TOKENS, WIDTH))


def broken_file(kind: str, folder: Path) -> Path:
    path = folder / ("weights.safetensors" if kind == "another model" else "weights.pth")
    if kind == "another model":
        save_file({"tok_embeddings.weight": torch.zeros(3)}, path)
    elif kind == "truncated":
        torch.save(transformer().state_dict(), path)
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "no tensors":
        torch.save([1, 2], path)
    elif kind == "only the anchor":
        anchors = {"quantize.embedding.weight": torch.zeros(4, 2), "pos_1LC": torch.zeros(1, 5, 8)}
        torch.save(anchors, path)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no weights file"),
        ("another model", "another kind of model"),
        ("truncated", "truncated or not a weights file"),
        ("no tensors", "holds a list"),
        ("only the anchor", "it lacks"),
    ],
)
@pytest.mark.parametrize("model", [MultiScaleVQModel, VARTransformer])
def test_files_of_something_else(
    model: type[MultiScaleVQModel] | type[VARTransformer], kind: str, message: str, tmp_path: Path
) -> None:
    path = broken_file(kind, tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        model.from_original(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def published(model: VARTransformer) -> dict[str, Tensor]:
    levels = model.scale_of_tokens().unsqueeze(0)
    return {**model.state_dict(), "lvl_1L": levels}


@pytest.mark.parametrize("shared", [False, True])
def test_published_file_of_another_depth(shared: bool, tmp_path: Path) -> None:
    path = tmp_path / "var_d2.pth"
    torch.save(published(transformer(shared=shared)), path)
    model = VARTransformer.from_original(path, depth=DEPTH)
    assert len(model.blocks) == DEPTH
    with pytest.raises(CheckpointError, match=r"holds a VAR of depth 2, not 16; choose the file") as caught:
        VARTransformer.from_original(path, depth=16)
    assert "\n" not in str(caught.value)
    labels, inputs = torch.tensor([1, 2, 3]), tokenizer().quantize.inputs(random_token_ids())
    assert torch.equal(model(labels, inputs), transformer(shared=shared)(labels, inputs))


def test_published_file_with_uneven_maps(tmp_path: Path) -> None:
    state = published(transformer())
    state["lvl_1L"] = torch.tensor([[0] * 2 + [1] * 37])
    torch.save(state, tmp_path / "var.pth")
    with pytest.raises(CheckpointError, match="not square"):
        VARTransformer.from_original(tmp_path / "var.pth")


def test_encode_and_decode_agree() -> None:
    model = tokenizer()
    encoding = model.encode(images())
    assert encoding.indices.shape == (3, TOKENS)
    assert encoding.indices.dtype == torch.int64
    assert encoding.latents.shape == encoding.quantized.shape == (3, WIDTH, 5, 5)
    assert len(encoding.indices.unique()) > VOCAB_SIZE // 3
    decoded = model.decode_tokens(encoding.indices)
    assert decoded.shape == (3, 3, 10, 10)
    torch.testing.assert_close(decoded, model.decode(encoding.quantized), **EXACT)
    assert torch.equal(model.decode_tokens(encoding.indices.int()), decoded)
    alone = model.encode(images()[1:2])
    assert torch.equal(alone.indices, encoding.indices[1:2])


def test_inputs_do_not_need_the_last_scale() -> None:
    quantizer, indices = tokenizer().quantize, random_token_ids()
    inputs = quantizer.inputs(indices)
    assert inputs.shape == (3, TOKENS - 1, WIDTH)
    assert torch.equal(quantizer.inputs(indices[:, : SCHEDULE.borders[-2]]), inputs)


def test_saved_tokenizer(tmp_path: Path) -> None:
    model = tokenizer()
    model.save_pretrained(tmp_path)
    again = MultiScaleVQModel.from_pretrained(tmp_path)
    assert again.schedule == model.schedule
    assert again.quantize.table == model.quantize.table
    assert torch.equal(again.encode(images()).indices, model.encode(images()).indices)
    assert torch.equal(again.decode_tokens(random_token_ids()), model.decode_tokens(random_token_ids()))


@pytest.mark.parametrize(("kind", "shared"), VARIANTS)
def test_saved_transformer(kind: str, shared: bool, tmp_path: Path) -> None:
    model = transformer(kind, shared)
    model.save_pretrained(tmp_path)
    again = VARTransformer.from_pretrained(tmp_path)
    assert again.schedule == model.schedule
    vectors, mask = condition(kind)
    inputs = tokenizer().quantize.inputs(random_token_ids())
    assert torch.equal(again(vectors, inputs, mask), model(vectors, inputs, mask))
    assert torch.equal(Run(again, (vectors, mask)).tokens, Run(model, (vectors, mask)).tokens)


def test_encode_under_autocast() -> None:
    """Convolutions run in bfloat16, the residual quantisation does not: the tokens stay consistent."""
    model = tokenizer()
    exact = model.encode(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoding = model.encode(images())
        inputs = model.quantize.inputs(encoding.indices)
        image = model.decode_tokens(encoding.indices)
    assert encoding.latents.dtype == torch.bfloat16
    assert encoding.quantized.dtype == inputs.dtype == torch.float32
    difference = (encoding.latents.float() - exact.latents).abs().mean()
    assert difference < 0.05 * exact.latents.abs().mean()
    assert torch.equal(inputs, model.quantize.inputs(encoding.indices))
    torch.testing.assert_close(encoding.quantized, model.quantize.feature_maps(encoding.indices)[-1], **EXACT)
    wanted = model.decode_tokens(encoding.indices)
    assert (image.float() - wanted).abs().mean() < 0.05 * wanted.abs().mean()


def test_half_precision_tokenizer() -> None:
    """float16 weights have 11 bits; the feature map is still summed in float32."""
    model, half = tokenizer(), new_tokenizer().to(torch.float16)
    wanted, image = model.decode_tokens(random_token_ids()), half.decode_tokens(random_token_ids())
    assert image.dtype == torch.float16
    assert (image.float() - wanted).abs().max() < 0.01 * wanted.abs().max()
    maps = half.quantize.feature_maps(random_token_ids())[-1]
    assert maps.dtype == torch.float32
    torch.testing.assert_close(
        maps, model.quantize.feature_maps(random_token_ids())[-1], atol=0.01, rtol=0.01
    )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.03), (torch.float16, 0.005)], ids=str)
def test_half_precision_transformer(dtype: torch.dtype, bound: float) -> None:
    """A whole network in half precision decodes; its distributions are close where it reads the same tokens."""
    exact, network = Run(transformer(), condition("class"), guidance=1.0), new_transformer().to(dtype)
    session = ScaleSession(
        network,
        FeatureMap(tokenizer().quantize, 3),
        given_of(*condition("class")),
        guidance=ScaleGuidance.published(1.0),
    )
    logits = [session.logits(exact.canvas, scale) for scale in range(SCALES)]
    assert session.cache is not None
    assert session.cache.keys.dtype == dtype
    for ours, theirs in zip(logits, exact.logits, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().mean() < bound * theirs.std()
