"""Lossless accelerators draw from the distribution of plain decoding, measured where all images can be listed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.enumeration import (
    GROUPS,
    IMAGES,
    LIMIT,
    POSITIONS,
    VOCAB_SIZE,
    Setting,
    chi_square,
    counts,
    exact_distribution,
    marginal,
    misfit,
    sampled,
    teacher_forced,
)
from tests.tiny import drafting_pipeline
from varaccel.accelerators import Accelerator, jacobi, speculative
from varaccel.accelerators.jacobi import Jacobi
from varaccel.accelerators.lantern import Lantern
from varaccel.accelerators.plain import Plain
from varaccel.accelerators.speculative import Speculative
from varaccel.engine.distribution import Categorical
from varaccel.hosts.causal.sampling import Sampling
from varaccel.speculation.drafters import LayerSkip
from varaccel.speculation.jacobi_proposer import JacobiProposer
from varaccel.speculation.rejection import Exact, VerificationResult
from varaccel.speculation.step import Draws, StepResult
from varaccel.speculation.tree import DraftTree, DynamicTree

# a smaller choice of the same methods runs in tests/hosts/causal/test_conditions.py, which is in the fast lane
pytestmark = pytest.mark.slow

FREE = Setting()
GUIDED = Setting("t2i", 2.5)
FILTERED = Setting("c2i", 2.5, sampling=Sampling(0.8, top_k=2))
NUCLEUS = Setting("c2i", 1.0, sampling=Sampling(1.2, top_p=0.8))
HALF_GUIDED = Setting("t2i", 2.5, interval=3)
SETTINGS = {
    "free": FREE,
    "guided": GUIDED,
    "filtered": FILTERED,
    "nucleus": NUCLEUS,
    "half guided": HALF_GUIDED,
}


# -- the measure itself --------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_plain_decoding_follows_the_distribution(setting: Setting) -> None:
    assert misfit(setting.draw(Plain()).images, setting.distribution) < LIMIT


def test_the_measure_is_calibrated() -> None:
    """Draws from the distribution itself: never beyond the limit, and not far below it either."""
    distribution = GUIDED.distribution
    scores = [misfit(sampled(distribution, seed), distribution) for seed in range(40)]
    assert max(scores) < LIMIT
    assert 0.5 < sum(scores) / len(scores) < 2.0
    assert misfit(sampled(distribution**1.1 / (distribution**1.1).sum(), 0), distribution) > LIMIT, (
        "a tenth colder"
    )


def test_impossible_tokens_have_no_images() -> None:
    """A network that never repeats a token and says nothing sensible after one that it excluded."""

    def logits(tokens: Tensor) -> Tensor:
        out = torch.zeros(len(tokens), 2, 3)
        out[:, 0] = torch.tensor([0.0, 1.0, -torch.inf])
        out[:, 1] = out[:, 1].scatter(-1, tokens[:, :1], -torch.inf)
        out[tokens[:, 0] == 2, 1] = torch.nan
        return out

    first = torch.tensor([0.0, 1.0]).softmax(0).double()
    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[0, 1:], expected[1, ::2] = first[0] / 2, first[1] / 2
    torch.testing.assert_close(exact_distribution(logits, 3, 2), expected, atol=1e-7, rtol=0)


def test_total_variation_is_at_the_noise_floor() -> None:
    """The same in the everyday measure: no further from the distribution than as many draws from the
    distribution are."""
    distribution = GUIDED.distribution
    drawn = GUIDED.draw(Speculative("small", tree=4)).images.flatten(1)
    for group in GROUPS:
        expected = marginal(distribution, group)

        def variation(tokens: Tensor, group: Any = group, expected: Tensor = expected) -> float:
            return float((counts(tokens, group, VOCAB_SIZE) / len(tokens) - expected).abs().sum() / 2)

        floor = max(variation(sampled(distribution, seed)) for seed in range(50))
        assert variation(drawn) < 1.5 * floor


# -- exact methods -------------------------------------------------------------------------------------

DYNAMIC = DynamicTree(top_k=2, depth=2, total=8)
BUSHY = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]]
SHAPES = {str(DYNAMIC): "dynamic", str(BUSHY): "bushy"}

EXACT: list[tuple[Setting, Accelerator]] = [
    # Jacobi: couplings, fills and windows against each other
    (FREE, Jacobi(window=4, coupling="none", fill="left")),
    (GUIDED, Jacobi(window=3, coupling="none", fill="above")),
    (FILTERED, Jacobi(window=9, coupling="none", fill="random")),
    (HALF_GUIDED, Jacobi(window=5, coupling="none", fill="above")),
    (FREE, Jacobi(window=2, coupling="maximal", fill="random")),
    (FREE, Jacobi(window=9, coupling="maximal", fill="above")),
    (GUIDED, Jacobi(window=5, coupling="maximal", fill="left")),
    (FILTERED, Jacobi(window=4, coupling="maximal", fill="above")),
    (NUCLEUS, Jacobi(window=3, coupling="maximal", fill="left")),
    (FREE, Jacobi(window=5, coupling="gumbel", fill="above")),
    (GUIDED, Jacobi(window=9, coupling="gumbel", fill="left")),
    (FILTERED, Jacobi(window=3, coupling="gumbel", fill="random")),
    # chains
    (FREE, Speculative("small", tree=3)),
    (GUIDED, Speculative("eagle", tree=2)),
    (FILTERED, Speculative("layers", tree=5)),
    (NUCLEUS, Speculative("small", tree=9)),
    (HALF_GUIDED, Speculative("small", tree=4)),
    (HALF_GUIDED, Speculative("eagle", tree=4)),
    (FILTERED, Speculative("eagle", tree=4, adaptive=True)),
    (GUIDED, Speculative("small", tree=5, adaptive=True)),
    # trees of tokens drawn without replacement; the named ones have more children than the vocabulary has tokens
    (FREE, Speculative("eagle", tree=BUSHY)),
    (GUIDED, Speculative("small", tree=BUSHY)),
    (FILTERED, Speculative("small", tree="mc_sim_7b_63")),
    (NUCLEUS, Speculative("eagle", tree="mc_sim_7b_63")),
    (GUIDED, Speculative(LayerSkip((0,)), tree=BUSHY, adaptive=True)),
    # independent draft tokens
    (FREE, Speculative("eagle", tree=4, verification="k_sequential")),
    (GUIDED, Speculative("small", tree=BUSHY, verification="k_sequential")),
    (NUCLEUS, Speculative("eagle", tree="mc_sim_7b_63", verification="k_sequential")),
    (FILTERED, Speculative("layers", tree=BUSHY, verification="k_sequential", adaptive=True)),
    # the likeliest draft tokens, verified by chance or by matching
    (FREE, Speculative("small", tree=DYNAMIC, verification="recursive")),
    (GUIDED, Speculative("eagle", tree=DYNAMIC, verification="recursive")),
    (FILTERED, Speculative("layers", tree=DYNAMIC, verification="recursive")),
    (FREE, Speculative("eagle", tree=DYNAMIC)),
    (GUIDED, Speculative("small", tree=BUSHY, verification="matching")),
    (NUCLEUS, Speculative("small", tree=3, verification="matching", adaptive=True)),
    # draft tokens and target tokens drawn with the same noise
    (FREE, Speculative("eagle", tree=5, verification="gumbel", adaptive=True)),
    (GUIDED, Speculative("small", tree=BUSHY, verification="gumbel")),
    (FILTERED, Speculative("layers", tree=DYNAMIC, verification="gumbel")),
    # LANTERN that borrows nothing
    (FILTERED, Lantern(k=0, drafter="small", tree=BUSHY)),
    (FILTERED, Lantern(k=2, delta=0.0, drafter="eagle", tree=BUSHY)),
    (GUIDED, Lantern(k=2, multiplier=1.0, drafter="small", tree=4)),
    (FILTERED, Lantern(k=2, delta=0.0, drafter="small", tree=DYNAMIC)),
    (NUCLEUS, Lantern(k=1, multiplier=1.0, drafter="layers", tree=BUSHY, adaptive=True)),
]


def label(value: Any) -> str | None:
    if isinstance(value, Setting):
        return next(name for name, setting in SETTINGS.items() if setting == value)
    if isinstance(value, Accelerator):
        default = type(value)()
        changed = [
            getattr(value, f.name)
            for f in fields(value)
            if getattr(value, f.name) != getattr(default, f.name)
        ]
        return "-".join([value.name, *(SHAPES.get(str(v), str(v)) for v in changed)])
    return None


@pytest.mark.parametrize(("setting", "accelerator"), EXACT, ids=label)
def test_exact(setting: Setting, accelerator: Accelerator) -> None:
    """Images follow the distribution, and each is the one that would have been drawn alone or with any others."""
    out = setting.draw(accelerator)
    assert out.stats.lossless
    assert misfit(out.images, setting.distribution) < LIMIT
    # something must have been accepted and something rejected
    assert out.stats.mean_accepted > 0
    passes = torch.tensor(out.stats.image_passes)
    assert passes.min() < passes.max() <= POSITIONS

    # the quickest two and the slowest two, together and alone
    order = passes.argsort(stable=True)
    chosen = torch.stack([order[0], order[-1], order[1], order[-2]])
    seeds = chosen.tolist()

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    four = setting.draw(accelerator, 4, generator=generators())
    assert torch.equal(four.images, out.images[chosen])
    assert torch.equal(four.written, out.written[chosen])
    assert four.stats.image_passes == tuple(passes[chosen].tolist())
    for index in (0, 1):
        alone = setting.draw(accelerator, 1, generator=generators()[index : index + 1])
        assert torch.equal(alone.images[0], four.images[index])
        assert torch.equal(alone.written[0], four.written[index])
        assert alone.stats.accepted[0] == four.stats.accepted[index]


def test_exact_on_a_larger_image() -> None:
    """Four tokens on four by four: too many images to list, but not too many beginnings."""
    pipe = drafting_pipeline("c2i", 4, 4, 0.5)
    distribution = exact_distribution(teacher_forced(pipe, 1), vocab_size=4, positions=7)
    for accelerator in (
        Jacobi(8, "maximal"),
        Speculative("eagle", tree=[[0], [1], [0, 0], [0, 1], [0, 0, 0]]),
    ):
        drawn = pipe(
            1,
            num_images_per_prompt=IMAGES,
            seed=0,
            guidance_scale=1.0,
            accelerator=accelerator,
            output_type="latent",
        ).images.flatten(1)
        for group in ((0, 1, 2), (3, 4, 5), (0, 3, 6), (5, 6)):
            assert chi_square(counts(drawn, group, 4), IMAGES * marginal(distribution, group)) < LIMIT


# -- what is not exact is seen -------------------------------------------------------------------------


class Altered:
    """The exact rule with one thing about it changed."""

    def __init__(self, change: Callable[[DraftTree, Tensor, Tensor], VerificationResult]) -> None:
        self.verify = change


def _without_draft(tree: DraftTree, target: Tensor, uniforms: Tensor) -> VerificationResult:
    """Accepts with u <= p instead of u <= p / q."""
    if tree.draft_probs is None:
        return Exact().verify(tree, target, uniforms)
    parents = tree.parents.clamp(min=0).unsqueeze(-1).expand(-1, -1, target.shape[-1])
    q = tree.draft_probs.gather(1, parents).gather(-1, tree.tokens.unsqueeze(-1)).squeeze(-1)
    return Exact().verify(tree, target, uniforms / q.clamp(min=1e-9))


def _without_residual(tree: DraftTree, target: Tensor, uniforms: Tensor) -> VerificationResult:
    """Draws what follows a rejection from the plain distribution."""
    result = Exact().verify(tree, target, uniforms)
    last = result.nodes.gather(1, result.length.unsqueeze(1))[:, 0]
    return replace(result, probs=target[torch.arange(len(target)), last])


def _wrong_draft(tree: DraftTree, target: Tensor, uniforms: Tensor) -> VerificationResult:
    """Believes that draft tokens were drawn evenly."""
    if tree.draft_probs is None:
        return Exact().verify(tree, target, uniforms)
    even = torch.full_like(tree.draft_probs, 1 / target.shape[-1])
    return Exact().verify(DraftTree(tree.tokens, tree.parents, tree.draw_mode, even), target, uniforms)


def _eldest_alone(tree: DraftTree, target: Tensor, uniforms: Tensor) -> VerificationResult:
    """Verifies later siblings as if they had been drawn with replacement."""
    return Exact().verify(replace(tree, draw_mode="independent"), target, uniforms)


@pytest.mark.parametrize(
    ("module", "accelerator", "change"),
    [
        (jacobi, Jacobi(4, "none"), _without_draft),
        (jacobi, Jacobi(4, "none"), _without_residual),
        (jacobi, Jacobi(4, "none"), _wrong_draft),
        (jacobi, Jacobi(4, "maximal"), _wrong_draft),
        (speculative, Speculative("eagle", tree=3), _without_draft),
        (speculative, Speculative("eagle", tree=3), _without_residual),
        (speculative, Speculative("eagle", tree=BUSHY), _wrong_draft),
        (speculative, Speculative("small", tree=[[0], [1], [0, 0], [0, 1]]), _eldest_alone),
        (speculative, Speculative("small", tree=DYNAMIC, verification="recursive"), _without_residual),
    ],
    ids=lambda v: getattr(v, "__name__", None) or label(v),
)
def test_a_broken_rule_is_seen(
    module: Any,
    accelerator: Accelerator,
    change: Callable[[DraftTree, Tensor, Tensor], VerificationResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "Exact", lambda: Altered(change))
    assert misfit(FILTERED.draw(accelerator).images, FILTERED.distribution) > 2 * LIMIT


def test_a_broken_coupling_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft tokens that stay where they may but are else drawn from the whole distribution follow no distribution
    that is known."""

    def answer(self: JacobiProposer, outcome: StepResult, draws: Draws) -> Tensor:
        distribution, width = outcome.distribution, self.nodes - 1
        assert outcome.tree.draft_probs is not None
        draft_token = outcome.tree.tokens[:, 1:].unsqueeze(-1)
        p, q = distribution.probs[:, :width], outcome.tree.draft_probs[:, :width]
        kept = draws.drafting[:, self.nodes : self.nodes + width] < (p / q).gather(-1, draft_token).squeeze(
            -1
        )
        fresh = Categorical(distribution.logits).sample(draws.drafting[:, : self.nodes])
        return torch.cat(
            [torch.where(kept, draft_token.squeeze(-1), fresh[:, :width]), fresh[:, width:]], dim=1
        )

    monkeypatch.setattr(JacobiProposer, "_answer", answer)
    assert misfit(FREE.draw(Jacobi(9, "maximal", "left"), 2 * IMAGES).images, FREE.distribution) > 2 * LIMIT


@pytest.mark.parametrize(
    "accelerator",
    [
        Lantern(k=2, delta=0.5, drafter="small"),
        Lantern(k=1, multiplier=3.0, drafter="eagle", tree=BUSHY),
        Lantern(k=2, delta=0.3, drafter="small", tree=DYNAMIC),
        Lantern(k=2, delta=0.3, drafter="small", tree=DYNAMIC, residual="dynamic"),
        Lantern(k=2, multiplier=2.0, drafter="small", tree=BUSHY, residual="static"),
        Lantern(k=2, multiplier=2.0, drafter="small", tree=BUSHY, residual="static_b"),
        Jacobi(row_window=1),
    ],
    ids=label,
)
def test_what_is_approximate_says_so(accelerator: Accelerator) -> None:
    out = FREE.draw(accelerator)
    assert not out.stats.lossless
    assert misfit(out.images, FREE.distribution) > 2 * LIMIT
