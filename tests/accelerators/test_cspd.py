"""Continuous speculative decoding: its course, its special cases, and the distribution of its images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pipelines.test_mar_pipeline import TOKENS, assert_same, drawn, latents, on_hosts
from tests.tiny import PROMPTS, kl_vae, mar_transformer, pipeline, sizes_of
from varaccel import CSpD, MARPipeline
from varaccel.engine.canvas import Canvas
from varaccel.engine.counts import SpeculationStats
from varaccel.engine.loop import decode
from varaccel.engine.randomness import image_generators
from varaccel.hosts.masked import denoising
from varaccel.hosts.masked.denoising import HeadSampling
from varaccel.hosts.masked.guidance import MaskedGuidance
from varaccel.hosts.masked.noise import TokenNoise
from varaccel.hosts.masked.schedule import CosineGroups, MaskedInputs
from varaccel.hosts.masked.session import MaskedSession
from varaccel.models.mar import MARTransformer
from varaccel.nn import noise_schedule as diffusion_schedule
from varaccel.nn.condition import Condition
from varaccel.speculation.continuous_loop import Comparison, speculate_groups
from varaccel.speculation.continuous_rejection import (
    Aligned,
    ContinuousRule,
    Decision,
    ExactRule,
    PaperRule,
    ReferenceRule,
    ResampleNoise,
)
from varaccel.speculation.group_verification import (
    GroupVerification,
    JointVerification,
    SequentialVerification,
)


def with_itself(host: str, **options: Any) -> CSpD:
    """CSpD whose drafter is the model itself."""
    return CSpD(drafter=pipeline(host).transformer, **options)


# -- its course -----------------------------------------------------------------------------------


class Always:
    """A rule that keeps all or nothing; what is replaced becomes the target's own token."""

    def __init__(self, keeps: bool) -> None:
        self.keeps = keeps

    def verify(
        self, aligned: Aligned, uniforms: Tensor, resample_noise: ResampleNoise, active: Tensor | None = None
    ) -> Decision:
        accepted = torch.full_like(uniforms, self.keeps, dtype=torch.bool)
        if active is not None:
            accepted = accepted | ~active
        values = torch.where(accepted.unsqueeze(1), aligned.value, aligned.target.mean)
        zeros = torch.zeros_like(uniforms, dtype=torch.int64)
        return Decision(accepted, values, zeros, zeros.bool())


class Merged:
    """The groups of an order, some of them decided at once."""

    def __init__(self, order: CosineGroups, blocks: list[list[int]]) -> None:
        self.order, self.blocks = order, blocks

    def step_inputs(self, canvas: Canvas) -> list[MaskedInputs]:
        single = self.order.step_inputs(canvas)
        return [
            replace(
                single[b[-1]],
                positions=torch.cat([single[i].positions for i in b], 1),
                known=single[b[0]].known,
            )
            for b in self.blocks
        ]


Answer = tuple[Canvas, SpeculationStats, MaskedSession, MaskedSession]


def speculate(
    rule: ContinuousRule,
    *,
    sequential: bool,
    draft_length: int,
    iterations: int = 10,
    prefill: float = 0.0,
    step: int = 0,
    target: MARTransformer | None = None,
    draft: MARTransformer | None = None,
    labels: tuple[int, ...] = (3, 0, 4),
    seed: int = 5,
    sampling: HeadSampling | None = None,
    guidance: MaskedGuidance | None = None,
) -> Answer:
    """One run on class labels; by default the tiny pipeline's model and drafter, guided."""
    pipe = pipeline("mar-class")
    target, draft = target or pipe.transformer, draft or pipe.draft_transformer
    assert isinstance(target, MARTransformer)
    numbers = noise(target, len(labels), seed)
    vectors = torch.tensor(labels)

    def session(network: MARTransformer, contexts: int = 1) -> MaskedSession:
        return MaskedSession(
            network,
            Condition(vectors.repeat_interleave(contexts)),
            batch=len(labels) * contexts,
            guidance=guidance or MaskedGuidance(3.0),
            sampling=sampling or HeadSampling(6),
        )

    page = Canvas.empty(len(labels), target.num_tokens, channels=target.channels)
    order = CosineGroups(numbers.permutation, iterations)
    comparison = Comparison(rule, step, numbers, numbers)
    own, small = session(target), session(draft)
    verification: GroupVerification = JointVerification(own, draft_length)
    if sequential:
        verification = SequentialVerification(session(target, draft_length), order, draft_length)
    stats = speculate_groups(own, small, page, order, comparison, verification, prefill=prefill)
    assert page.is_full
    return page, stats, own, small


def noise(network: MARTransformer, batch: int, seed: int) -> TokenNoise:
    generators = image_generators(batch, seed=seed)
    return TokenNoise.draw(generators, network.num_tokens, network.channels, torch.device("cpu"))


def plain(
    network: MARTransformer,
    *,
    blocks: list[list[int]] | None = None,
    iterations: int = 10,
    labels: tuple[int, ...] = (3, 0, 4),
    seed: int = 5,
    sampling: HeadSampling | None = None,
    guidance: MaskedGuidance | None = None,
) -> Tensor:
    """Plain decoding with the numbers of `speculate`, some groups at once."""
    numbers = noise(network, len(labels), seed)
    session = MaskedSession(
        network,
        Condition(torch.tensor(labels)),
        batch=len(labels),
        guidance=guidance or MaskedGuidance(3.0),
        sampling=sampling or HeadSampling(6),
    )
    page = Canvas.empty(len(labels), network.num_tokens, channels=network.channels)
    order: Any = CosineGroups(numbers.permutation, iterations)
    decode(session, page, order if blocks is None else Merged(order, blocks), numbers)
    return page.tokens


def joint_blocks(iterations: int, draft_length: int, prefill: float) -> list[list[int]]:
    """Iterations that are decided by the same pass of the target."""
    blocks: list[list[int]] = [[]]
    for step in range(iterations):
        blocks[-1].append(step)
        if step <= prefill * iterations or step % draft_length == 0 or step == iterations - 1:
            blocks.append([])
    return blocks[:-1]


JOINT = pytest.mark.parametrize(
    ("draft_length", "prefill"), [(1, 0.0), (2, 0.0), (3, 0.25), (4, 0.0), (4, 0.5), (50, 0.0), (4, 1.0)]
)


@JOINT
def test_a_block_of_own_tokens_is_plain_decoding_in_larger_groups(draft_length: int, prefill: float) -> None:
    """What the target thinks of a block is the distribution of deciding it at once, with the same noise."""
    blocks = joint_blocks(10, draft_length, prefill)
    page, stats, own, small = speculate(
        Always(False), sequential=False, draft_length=draft_length, prefill=prefill
    )
    assert_same(page.tokens, plain(pipeline("mar-class").transformer, blocks=blocks))
    first = min(10, math.floor(prefill * 10) + 1)
    assert own.reads == len(blocks) == int(page.written.max())
    assert small.reads == stats.draft_passes == 10 - first
    assert stats.passes.tolist() == [len(blocks)] * 3
    assert stats.attempts.tolist() == [len(blocks) - first] * 3
    assert stats.accepted.tolist() == [0] * 3
    assert stats.verified is not None
    borders = CosineGroups(torch.arange(TOKENS)[None], 10).borders
    assert stats.verified.tolist() == [borders[first]] * 3


@JOINT
@pytest.mark.parametrize("sequential", [False, True])
def test_keeping_everything_is_decoding_with_the_drafter(
    sequential: bool, draft_length: int, prefill: float
) -> None:
    pipe = pipeline("mar-class")
    page, stats, *_ = speculate(
        Always(True), sequential=sequential, draft_length=draft_length, prefill=prefill
    )
    first = min(10, math.floor(prefill * 10) + 1)
    assert stats.verified is not None
    assert torch.equal(stats.accepted, stats.verified)
    expected = plain(pipe.draft_transformer if first == 1 else pipe.transformer)
    if prefill == 1:
        assert_same(page.tokens, expected)
    elif first == 1:
        # the first group is the target's; the drafter goes on from there
        target = plain(pipe.transformer)
        begun = page.written == 1
        assert_same(page.tokens[begun], target[begun])
        assert not torch.allclose(page.tokens[~begun], target[~begun], atol=1e-2)
    if sequential:
        assert int(page.written.max()) == first + -(-(10 - first) // draft_length)
        joint, *_ = speculate(Always(True), sequential=False, draft_length=draft_length, prefill=prefill)
        assert_same(page.tokens, joint.tokens)


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("draft_length", [1, 3, 12])
def test_rejecting_everything_in_turn_is_plain_decoding(draft_length: int, step: int) -> None:
    """Every block then advances by the one group that the target decides in sight of all before it."""
    network = pipeline("mar-class").transformer
    page, stats, own, small = speculate(Always(False), sequential=True, draft_length=draft_length, step=step)
    if step == 0:
        assert_same(page.tokens, plain(network))
    else:
        # the mean of a later step goes on without the noise of that step
        assert not torch.allclose(page.tokens, plain(network), atol=1e-2)
    assert stats.passes.tolist() == [10] * 3
    assert own.reads == 1
    assert small.reads == 9 * draft_length
    assert stats.accepted.tolist() == [0] * 3
    for image in page.written:
        assert sorted(set(image.tolist())) == list(range(1, 11))


MODES = [
    CSpD(mode="reference", draft_length=1),
    CSpD(mode="paper", draft_length=1),
    CSpD(mode="exact", draft_length=1, coupling_step=0),
    CSpD(mode="exact", draft_length=1, coupling_step=3),
    CSpD(mode="reference", verification="sequential"),
    CSpD(mode="paper", verification="sequential", draft_length=3),
    CSpD(mode="exact", verification="sequential", coupling_step=0),
    CSpD(mode="exact", verification="sequential", coupling_step=3, draft_length=99),
]


@on_hosts
@pytest.mark.parametrize("accelerator", MODES, ids=lambda a: f"{a.mode}-{a.verification}-{a.coupling_step}")
def test_a_model_agrees_with_itself(host: str, accelerator: CSpD) -> None:
    """In sight of the same tokens both paths are one: all is kept, and the image is that of plain decoding."""
    itself = replace(accelerator, drafter=pipeline(host).transformer)
    out = drawn(host, accelerator=itself, num_iterations=10)
    assert out.stats.kept == (1.0,) * 3
    final_noise = accelerator.mode != "reference" and accelerator.compared_step == 0
    assert_same(out.images, latents(host, num_iterations=10, final_noise=final_noise))
    if accelerator.verification == "sequential":
        assert out.stats.passes == 1 + -(-9 // accelerator.draft_length)
    else:
        assert out.stats.passes == 10


def blind(network: MARTransformer) -> MARTransformer:
    """A copy to which no token means anything to another."""
    copy = MARTransformer(**sizes_of(network)).eval()
    copy.load_state_dict(network.state_dict())
    with torch.no_grad():
        for block in (*copy.encoder_blocks, *copy.decoder_blocks):
            block.attn.proj.weight.zero_()
    return copy


@pytest.mark.parametrize("draft_length", [2, 4, 50])
@pytest.mark.parametrize(
    "accelerator",
    [CSpD(mode="reference"), CSpD(), CSpD(mode="exact", coupling_step=0), CSpD(mode="paper")],
    ids=lambda a: f"{a.mode}-{a.coupling_step}",
)
def test_blocks_of_tokens_that_do_not_depend_on_each_other(accelerator: CSpD, draft_length: int) -> None:
    """Then deciding them at once is deciding them in turn: all of a model's own draft tokens are kept."""
    network = blind(pipeline("mar-class").transformer)
    pipe = MARPipeline(network, kl_vae(), draft_transformer=network, head_steps=8)
    pipe.set_progress_bar_config(disable=True)
    options = {"seed": 2, "output_type": "latent", "num_iterations": 10}
    chosen = replace(accelerator, draft_length=draft_length)
    out = pipe([0, 1], accelerator=chosen, **options)
    assert out.stats.kept == (1.0, 1.0)
    assert out.stats.passes == len(joint_blocks(10, draft_length, 0.05))
    final_noise = accelerator.mode != "reference" and accelerator.compared_step == 0
    assert_same(out.images, pipe([0, 1], final_noise=final_noise, **options).images)


@on_hosts
@pytest.mark.parametrize("verification", ["joint", "sequential"])
@pytest.mark.parametrize("mode", ["reference", "paper", "exact"])
def test_all_iterations_by_the_model_are_plain_decoding(host: str, mode: Any, verification: Any) -> None:
    accelerator = CSpD(mode=mode, prefill=1, verification=verification)
    out = drawn(host, accelerator=accelerator)
    assert_same(out.images, latents(host, final_noise=mode == "paper"))
    assert out.stats.passes == TOKENS
    assert out.stats.draft_passes == 0


@on_hosts
@pytest.mark.parametrize("verification", ["joint", "sequential"])
@pytest.mark.parametrize("draft_length", [6, 15])
def test_one_block_for_everything(host: str, draft_length: int, verification: Any) -> None:
    accelerator = CSpD(draft_length=draft_length, verification=verification, prefill=0)
    out = drawn(host, accelerator=accelerator, num_iterations=6)
    assert (out.written > 0).all()
    assert out.images.isfinite().all()
    if verification == "joint":
        assert out.stats.passes == 2
        assert out.stats.draft_passes == 5


@pytest.mark.slow
@on_hosts
@pytest.mark.parametrize(
    "accelerator",
    [
        CSpD(mode="reference", verification="sequential"),
        CSpD(mode="reference", verification="sequential", draft_length=2, iterations=7),
        CSpD(mode="exact", verification="sequential", coupling_step=4, draft_length=3),
        CSpD(mode="exact", verification="sequential", coupling_step=5, iterations=9),
    ],
    ids=lambda a: f"{a.mode}-{a.draft_length}",
)
def test_images_go_at_their_own_pace(host: str, accelerator: CSpD) -> None:
    together = drawn(host, accelerator=accelerator)
    iterations = accelerator.iterations or TOKENS
    passes = together.stats.image_passes
    assert max(passes) == together.stats.passes <= iterations
    assert 0 < sum(together.stats.kept) / 3 < 1, "something is kept, and something is not"
    first = math.floor(accelerator.prefill * iterations) + 1
    for index, prompt in enumerate(PROMPTS[host]):
        alone = drawn(host, prompt, seed=3 + index, accelerator=accelerator)
        assert_same(alone.images[0], together.images[index])
        assert torch.equal(alone.written[0], together.written[index])
        assert alone.stats.image_passes == (passes[index],)
        assert alone.stats.kept[0] == pytest.approx(together.stats.kept[index])
        # every pass decides something of an image that is not finished
        assert sorted(set(alone.written.flatten().tolist())) == list(range(1, passes[index] + 1))
        assert first + (iterations - first) / accelerator.draft_length <= passes[index]


@on_hosts
def test_alignment_helps(host: str) -> None:
    accelerator = CSpD(mode="reference", draft_length=2)
    aligned, free = (drawn(host, accelerator=replace(accelerator, aligned=a)).stats for a in (True, False))
    assert sum(aligned.kept) > sum(free.kept)


def test_what_is_told() -> None:
    assert drawn("mar-class", accelerator="cspd").stats.label == "cspd(mode=exact)"
    stats = drawn("mar-class", accelerator=CSpD("reference")).stats
    assert stats.label == "cspd(mode=reference)"
    assert not stats.lossless
    # 16 iterations: one by the model, blocks that end with iterations 4, 8, 12 and 15
    assert (stats.passes, stats.draft_passes) == (5, 15)
    assert stats.image_passes == (5, 5, 5)
    assert len(stats.kept) == 3
    assert all(0 < share < 1 for share in stats.kept)
    assert all(kept * 15 == pytest.approx(round(kept * 15), abs=1e-5) for kept in stats.kept)
    assert stats.accepted == pytest.approx([kept * 15 / 4 for kept in stats.kept])
    assert stats.to_dict()["kept"] == pytest.approx(stats.kept)
    assert drawn("mar-class").stats.kept == ()
    named = drawn("mar-class", accelerator=CSpD(mode="exact", coupling_step=2, draft_length=2)).stats
    assert named.label == "cspd(mode=exact, draft_length=2, coupling_step=2)"
    assert named.options["drafter"] is None


@on_hosts
def test_drafters_in_every_form(host: str, tmp_path: Path) -> None:
    """A network, a pipeline, a folder, or what came with the model."""
    pipe = pipeline(host)
    small = MARPipeline(pipe.draft_transformer, pipe.vae, pipe.text_encoder, pipe.tokenizer)
    small.save_pretrained(tmp_path / "small")
    # of this mode, because tokens that are kept are the drafter's own
    expected = latents(host, accelerator=CSpD("reference"))
    for drafter in (pipe.draft_transformer, small, str(tmp_path / "small")):
        assert torch.equal(latents(host, accelerator=CSpD("reference", drafter=drafter)), expected)
    other = mar_transformer(host.removeprefix("mar-"), seed=9)
    assert not torch.allclose(
        latents(host, accelerator=CSpD("reference", drafter=other)), expected, atol=1e-3
    )


@on_hosts
def test_a_later_step_is_finished_by_the_target(host: str) -> None:
    """With everything compared at the first step, the starting noise alone is the drafter's: nothing else is seen."""
    accelerator = CSpD(mode="exact", coupling_step=7, draft_length=1)
    out = drawn(host, accelerator=accelerator)
    assert sum(out.stats.kept) > 0
    assert out.images.isfinite().all()


# -- its distribution -------------------------------------------------------------------------------------


@pytest.fixture
def friendly_schedule(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Levels of noise from 30 to 70 %: the last step has enough of it for drafts to be kept now and then."""
    levels = torch.linspace(0.7, 0.3, 1000, dtype=torch.float64)
    betas = 1 - levels / torch.cat([torch.ones(1, dtype=torch.float64), levels[:-1]])

    def forget() -> None:
        diffusion_schedule._respaced.cache_clear()
        denoising._tables.cache_clear()

    monkeypatch.setitem(diffusion_schedule._BETAS, "linear", lambda count: betas)
    forget()
    yield
    forget()


IMAGES = 6000
DISTRIBUTION_SIZES: dict[str, Any] = {
    "grid_size": 2,
    "token_channels": 2,
    "buffer_size": 2,
    "dim": 16,
    "num_heads": 2,
    "decoder_depth": 1,
    "head_depth": 1,
    "head_width": 16,
}
DISTRIBUTION_SAMPLING = HeadSampling(3, final_noise=True)


@cache
def pair() -> tuple[MARTransformer, MARTransformer]:
    """Target and draft on four tokens of two numbers.

    Tokens depend strongly on those before them, and variances on everything, so that mistakes show.
    """
    models = []
    for disturbance in (0.0, 0.4):
        model, other = (
            mar_transformer("class", seed=s, **DISTRIBUTION_SIZES).requires_grad_(False) for s in (3, 4)
        )
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            ours.lerp_(theirs, disturbance)
        for block in (*model.encoder_blocks, *model.decoder_blocks):
            block.attn.proj.weight.mul_(6)
        model.head.cond_embed.weight.mul_(2)
        last = model.head.final_layer.linear
        last.weight[model.channels :].mul_(8)
        models.append(model)
    return models[0], models[1]


def energy(first: Tensor, second: Tensor) -> float:
    """P-value of the energy distance between two samples [n, D], by permutation."""
    both = torch.cat([first, second]).double()
    distances = torch.cdist(both, both)
    count = len(first)
    generator = torch.Generator().manual_seed(0)
    signs = torch.cat([torch.ones(count), -torch.ones(count)]).double() / count
    shuffled = torch.stack([signs[torch.randperm(2 * count, generator=generator)] for _ in range(1999)], 1)
    columns = torch.cat([signs[:, None], shuffled], 1)
    values = -(columns * (distances @ columns)).sum(0)
    return float((values >= values[0]).double().mean())


def kolmogorov(first: Tensor, second: Tensor) -> float:
    """P-value of the largest difference between the distributions of two samples [n], for large n."""
    n, both = len(first), torch.cat([first, second]).sort().values
    shares = [
        torch.searchsorted(part.sort().values, both, right=True).double() / n for part in (first, second)
    ]
    reach = float((shares[0] - shares[1]).abs().max()) * math.sqrt(n / 2)
    if reach < 0.2:  # where the series converges slowly; the probability is 1 to twelve digits
        return 1.0
    return 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * reach) ** 2) for k in range(1, 101))


def p_values(first: Tensor, second: Tensor) -> list[float]:
    """Of each coordinate (Kolmogorov and Smirnov) and of whole images (energy distance)."""
    a, b = first.flatten(1), second.flatten(1)
    each = [kolmogorov(a[:, i], b[:, i]) for i in range(a.shape[1])]
    return [*each, energy(a[:1000], b[:1000])]


def images(
    rule: ContinuousRule | None,
    seed: int,
    networks: tuple[MARTransformer, MARTransformer] | None = None,
    *,
    blocks: list[list[int]] | None = None,
    iterations: int = 4,
    draft_length: int = 2,
    sequential: bool = True,
    step: int = 0,
) -> tuple[Tensor, float]:
    """Images and the share of draft tokens that was kept; plain decoding without a rule."""
    target, draft = networks or pair()
    common: dict[str, Any] = {
        "labels": (1,) * IMAGES,
        "seed": seed,
        "iterations": iterations,
        "sampling": DISTRIBUTION_SAMPLING,
        "guidance": MaskedGuidance(2.0),
    }
    if rule is None:
        return plain(target, blocks=blocks, **common), 1.0
    page, stats, *_ = speculate(
        rule,
        sequential=sequential,
        draft_length=draft_length,
        step=step,
        target=target,
        draft=draft,
        **common,
    )
    assert stats.verified is not None
    return page.tokens, float(stats.accepted.sum() / stats.verified.sum())


@cache
def distribution(iterations: int = 4) -> Tensor:
    """Images of plain decoding; must be made while the schedule of these tests is in place."""
    return images(None, 10**6, iterations=iterations)[0]


@cache
def blind_pair() -> tuple[MARTransformer, MARTransformer]:
    target, draft = (blind(network) for network in pair())
    return target, draft


@cache
def blind_distributions() -> tuple[Tensor, Tensor]:
    """Images of plain decoding with the target and with the draft."""
    target, draft = blind_pair()
    return images(None, 10**6, (target, draft))[0], images(None, 2 * 10**6, (draft, draft))[0]


FITS = 1e-3
"""The least p-value, of nine per comparison; seeds are fixed."""


@pytest.mark.slow
@pytest.mark.usefixtures("friendly_schedule")
def test_the_measure_is_calibrated() -> None:
    """The same distribution again fits; a little of another, and groups decided at once instead of in turn, do not."""
    again = images(None, 2 * 10**6)[0]
    assert min(p_values(distribution(), again)) > FITS
    assert min(p_values(distribution(), again + 0.06)) < FITS
    assert energy(distribution()[:1000].flatten(1), again[:1000].flatten(1) * 1.3) < FITS
    assert kolmogorov(distribution()[:, 0, 0], distribution()[:, 0, 0]) == 1.0
    at_once = images(None, 3 * 10**6, blocks=[[0], [1, 2, 3]])[0]
    assert min(p_values(distribution(), at_once)) < FITS


def test_p_values_of_the_measure_are_even() -> None:
    generator = torch.Generator().manual_seed(0)
    values = [kolmogorov(*torch.randn(2, 2000, generator=generator)) for _ in range(300)]
    for level in (0.1, 0.3, 0.6):
        assert sum(v < level for v in values) / 300 == pytest.approx(level, abs=0.07)


@pytest.mark.slow
@pytest.mark.usefixtures("friendly_schedule")
@pytest.mark.parametrize(
    ("iterations", "draft_length"), [(4, 2), (4, 3), (3, 1), (2, 2)], ids=lambda v: str(v)
)
def test_exact_and_sequential_is_the_distribution_of_plain_decoding(
    iterations: int, draft_length: int
) -> None:
    tokens, kept = images(ExactRule(), 5 * 10**6, iterations=iterations, draft_length=draft_length)
    assert 0.5 < kept < 0.9, "something is kept, and something is not"
    assert min(p_values(distribution(iterations), tokens)) > FITS


def inverse(rule: PaperRule) -> ContinuousRule:
    """The printed rule with the factor of the published code, without its other peculiarities."""

    class Inverse:
        def verify(
            self,
            aligned: Aligned,
            uniforms: Tensor,
            resample_noise: ResampleNoise,
            active: Tensor | None = None,
        ) -> Decision:
            turned = replace(aligned, log_sigma=-aligned.log_sigma)
            return rule.verify(turned, uniforms, resample_noise, active)

    return Inverse()


WRONG = {
    "a factor for earlier steps": PaperRule(),
    "its inverse": inverse(PaperRule()),
    "keeping too much": PaperRule(inner_temperature=5.0),
    "the published code": ReferenceRule(),
    "keeping everything": Always(True),
}


@pytest.mark.slow
@pytest.mark.usefixtures("friendly_schedule")
@pytest.mark.parametrize("rule", WRONG.values(), ids=WRONG)
def test_what_is_not_exact_is_seen(rule: ContinuousRule) -> None:
    tokens, kept = images(rule, 5 * 10**6)
    assert kept > 0.3
    assert min(p_values(distribution(), tokens)) < FITS / 10


@pytest.mark.slow
@pytest.mark.usefixtures("friendly_schedule")
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_each_token_follows_the_distribution_at_every_compared_step(step: int, sequential: bool) -> None:
    """Where tokens do not depend on each other, blocks and drafted contexts make no difference."""
    tokens, kept = images(ExactRule(), 5 * 10**6, blind_pair(), step=step, sequential=sequential)
    assert 0.3 < kept < 0.95
    target, draft = blind_distributions()
    assert min(p_values(target, tokens)) > FITS
    assert min(p_values(draft, tokens)) < FITS
