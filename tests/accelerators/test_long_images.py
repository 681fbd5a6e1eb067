"""Lossless accelerators follow the distribution of plain decoding over images as long as real ones are in passes.

Enumerated images (`test_exactness`) are decided in a few passes from three tokens. What goes wrong later, or with more
siblings than two, is seen here: tens of passes, five tokens and more. Whatever is registered as lossless is looked at,
with every value of its options that are choices; `FURTHER` adds what defaults do not reach.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.enumeration import teacher_forced
from tests.innovations import ALARM, CLASSES, Drawn, contrast, p_values, worst
from tests.markov import NEIGHBOURS, POSITIONS, VOCAB_SIZE, Chain, MarkovHost, markov_pipeline
from tests.tiny import drafting_pipeline
from varaccel import (
    CoDe,
    CSpD,
    InputError,
    Jacobi,
    Lantern,
    LayerSkip,
    MARPipeline,
    Plain,
    Speculative,
    VARPipeline,
)
from varaccel.accelerators import ACCELERATORS, AnyAccelerator, auto, fitting
from varaccel.engine.job import Job
from varaccel.engine.randomness import Randomness
from varaccel.hosts.causal.guidance import Guidance
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.causal.sampling import Sampling
from varaccel.hosts.masked.job import MaskedJob
from varaccel.hosts.masked.noise import TokenNoise
from varaccel.hosts.next_scale.job import ScaleJob
from varaccel.speculation.tree import DynamicTree

IMAGES = 64
PASSES = 40  # that every image takes at least
WIDE = [[0], [1], [2], [3], [0, 0], [0, 1], [0, 2], [1, 0], [0, 0, 0]]
GAPS = [[0], [2], [2, 1]]
DYNAMIC = DynamicTree(top_k=3, depth=2, total=9)


def against() -> MarkovHost:
    """A drafter that prefers what the model does not: siblings after the first are examined most of the time."""
    network = MarkovHost().eval()
    with torch.no_grad():
        network.weights.neg_()
    return network


FURTHER: dict[type[Job], list[AnyAccelerator]] = {
    CausalJob: [
        Jacobi(4, coupling="none", fill="random"),
        Jacobi(9, coupling="maximal", fill="left"),
        Speculative(tree=WIDE),
        Speculative(against(), tree=WIDE),
        Speculative(LayerSkip((0, 2)), tree=WIDE, verification="k_sequential"),
        Speculative(against(), tree=WIDE, verification="k_sequential"),
        Speculative("small", tree=DYNAMIC, verification="recursive"),
        Speculative("small", tree=GAPS, verification="matching"),
        Lantern(k=0, drafter=against(), tree=WIDE),
        Lantern(k=2, delta=0.0, drafter="small", tree=DYNAMIC),
    ],
    ScaleJob: [CoDe(draft_scales=6)],
    # not called lossless, for it adds the noise of the last step; called with that noise it is
    MaskedJob: [CSpD("exact", verification="sequential", coupling_step=0)],
}


def choices(kind: type[AnyAccelerator]) -> Iterator[AnyAccelerator]:
    """The accelerator with its defaults, and with every other value of each option that is a choice or a switch."""
    default = kind()
    yield default
    for field in dataclasses.fields(kind):
        hint = get_type_hints(kind)[field.name]
        values = get_args(hint) if get_origin(hint) is Literal else (True, False) if hint is bool else ()
        for value in values:
            if value != getattr(default, field.name):
                try:
                    yield dataclasses.replace(default, **{field.name: value})
                except InputError:  # an option that needs another
                    continue


def label(option: str, value: object) -> str:
    for name, tree in (("wide", WIDE), ("gaps", GAPS), ("dynamic", DYNAMIC)):
        if value == tree:
            return name
    if value is True:
        return option
    return {LayerSkip: "layers", MarkovHost: "against"}.get(type(value), str(value))


def lossless(job_type: type[Job]) -> list[Any]:
    """Parameters of a test: all that is registered as lossless for a kind of job, and `FURTHER` ones."""
    registered = [
        accelerator
        for name in fitting(job_type)
        for accelerator in choices(ACCELERATORS[name])
        if accelerator.lossless
    ]
    found = {}
    for accelerator in (*registered, *FURTHER[job_type]):
        default = type(accelerator)()
        changed = [
            label(field.name, value)
            for field in dataclasses.fields(accelerator)
            if (value := getattr(accelerator, field.name)) != getattr(default, field.name)
        ]
        found["-".join([accelerator.name, *changed])] = accelerator
    return [pytest.param(accelerator, id=name) for name, accelerator in found.items()]


@pytest.fixture(autouse=True)
def _a_machine_with_free_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` goes by a measurement; here it finds that all passes take as long."""
    monkeypatch.setattr(auto, "pass_seconds", lambda *_: 1.0)
    monkeypatch.setattr(auto, "_TIMES", WeakKeyDictionary())


# -- raster order --------------------------------------------------------------------------------------


def check_chain(accelerator: AnyAccelerator, images: int, guidance: float, sampling: Sampling) -> None:
    pipe = markov_pipeline()
    out = pipe(
        1,
        num_images_per_prompt=images,
        seed=0,
        guidance_scale=guidance,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        accelerator=accelerator,
        output_type="latent",
    )
    assert out.stats.lossless
    chain = Chain(pipe.transformer, 1, Guidance(guidance), sampling)
    drawn = chain.drawn(out)
    assert drawn.passes.amax(1).min() >= PASSES
    if accelerator.name not in ("plain", "auto"):
        assert out.stats.mean_accepted > 0
    scores = p_values(drawn, NEIGHBOURS) | chain.p_values(drawn.tokens)
    drafter = getattr(accelerator, "drafter", None)
    if drafter is not None:
        network = drafter if isinstance(drafter, MarkovHost) else pipe.draft_transformer
        drafted = Chain(network, 1, Guidance(guidance), sampling).probs(drawn.tokens)
        scores["drafted"] = contrast(drawn, drafted)
    assert worst(scores)[0] > ALARM, worst(scores)


@pytest.mark.parametrize("accelerator", lossless(CausalJob))
def test_a_chain_on_a_grid(accelerator: AnyAccelerator) -> None:
    check_chain(accelerator, IMAGES, 1.0, Sampling())


@pytest.mark.slow
@pytest.mark.parametrize("accelerator", lossless(CausalJob))
def test_a_chain_on_a_grid_guided_and_filtered(accelerator: AnyAccelerator) -> None:
    check_chain(accelerator, 2 * IMAGES, 1.5, Sampling(1.5, top_p=0.95))


@pytest.mark.parametrize(
    "tree", [2, pytest.param(WIDE, id="wide"), pytest.param(DYNAMIC, id="dynamic", marks=pytest.mark.slow)]
)
def test_an_eagle_head(tree: Any) -> None:
    """It reads features of a network of its own kind, LlamaGen, one pass of which tells the probabilities of images."""
    pipe = drafting_pipeline("c2i", grid=9)
    accelerator = Speculative("eagle", tree=tree, verification="recursive")
    out = pipe(
        1,
        num_images_per_prompt=IMAGES,
        seed=0,
        guidance_scale=2.0,
        accelerator=accelerator,
        output_type="latent",
    )
    tokens = out.images.flatten(1)
    with torch.inference_mode():
        probs = teacher_forced(pipe, 1, Guidance(2.0))(tokens).double().softmax(-1)
    drawn = Drawn(tokens, probs.clone(), out.written.flatten(1).long())
    assert drawn.passes.amax(1).min() >= PASSES
    scores = p_values(drawn, {"left": 1, "above": 9})
    assert worst(scores)[0] > ALARM, worst(scores)


# -- whole scales and masked groups, held against plain decoding of the same tokens -----------------------


def tokens_of(pipe: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Tensor, Any]:
    """The tokens of a call as its canvas holds them, and what it returns."""
    canvases = []
    new_canvas = type(pipe)._new_canvas

    def kept(self: Any, run: Any) -> Any:
        canvases.append(new_canvas(self, run))
        return canvases[-1]

    with monkeypatch.context() as patch:
        patch.setattr(type(pipe), "_new_canvas", kept)
        out = pipe(1, seed=0, output_type="latent", **options)
    return canvases[0].tokens, out


@pytest.mark.parametrize("accelerator", lossless(ScaleJob))
def test_scales(accelerator: AnyAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass per scale is all that there is: 91 tokens of 24 kinds, each scale in sight of those before it."""
    scales = (1, 2, 3, 4, 5, 6)
    pipe = VARPipeline(
        tiny.var_transformer("class", scales=scales), tiny.multiscale_vq(scales=scales), guidance_scale=3.0
    )
    pipe.set_progress_bar_config(disable=True)
    call = {"guidance_scale": 1.5, "num_images_per_prompt": 4 * IMAGES}
    tokens, out = tokens_of(pipe, monkeypatch, accelerator=accelerator, **call)
    assert out.stats.lossless
    probs: list[Tensor] = []

    def forced(self: Randomness, distribution: Any, positions: Tensor) -> Tensor:
        probs.append(distribution.logits.double().softmax(-1))
        return tokens[:, positions]

    with monkeypatch.context() as patch:
        patch.setattr(Randomness, "sample", forced)
        tokens_of(pipe, monkeypatch, accelerator=Plain(), **call)
    passes = torch.cat([torch.full((p.shape[1],), i + 1) for i, p in enumerate(probs)])
    drawn = Drawn(tokens, torch.cat(probs, 1), passes.expand_as(tokens))
    scores = p_values(drawn, {}, range(1, len(scales)))
    assert worst(scores)[0] > ALARM, worst(scores)


@pytest.mark.parametrize("accelerator", lossless(MaskedJob))
def test_masked_groups(accelerator: AnyAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the noise of the last step, a token is Gaussian given its path so far, which is that of plain decoding.

    So plain decoding of the same tokens gives their Gaussians, which are looked at in classes of equal probability.
    """
    network = tiny.mar_transformer("class", grid_size=7)
    pipe = MARPipeline(
        network,
        tiny.kl_vae(sample_size=14),
        draft_transformer=tiny.mar_drafter(network),
        guidance_scale=1.0,
        head_steps=3,
    )
    pipe.set_progress_bar_config(disable=True)
    call = {"num_iterations": 45, "final_noise": True, "num_images_per_prompt": IMAGES // 2}
    tokens, _ = tokens_of(pipe, monkeypatch, accelerator=accelerator, **call)
    found: list[Tensor] = []

    def forced(self: TokenNoise, distribution: Any, positions: Tensor) -> Tensor:
        start, noise = self.paths(positions, distribution.noisy_steps)
        path = distribution.run(start, noise, record=True)
        given = tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))
        distance = (given.flatten(0, 1) - path.mean).double() * (-path.log_std.double()).exp()
        found.append(distance.unflatten(0, positions.shape))  # [B, P, C]
        return given

    with monkeypatch.context() as patch:
        patch.setattr(TokenNoise, "sample", forced)
        tokens_of(pipe, monkeypatch, accelerator=Plain(), **call)
    assert len(found) >= PASSES
    distances = torch.cat(found, 1)  # [B, N, C] in the order of decision
    assert distances.std().item() == pytest.approx(1, abs=0.05)
    classes = (torch.special.ndtr(distances) * CLASSES).long().clamp(max=CLASSES - 1).flatten(1)
    even = torch.full((*classes.shape, CLASSES), 1 / CLASSES, dtype=torch.float64)
    passes = torch.cat([torch.full((f.shape[1] * f.shape[2],), i + 1) for i, f in enumerate(found)])
    drawn = Drawn(classes, even, passes.expand_as(classes))
    scores = p_values(drawn, {"channel before": 1, "token before": tokens.shape[2]})
    assert worst(scores)[0] > ALARM, worst(scores)


# -- the measure itself --------------------------------------------------------------------------------


def test_the_chain_agrees_with_itself() -> None:
    """Transfer against all images of a beginning, and the network against the chain."""
    pipe = markov_pipeline()
    chain = Chain(pipe.transformer, 0, Guidance(2.0), Sampling(top_k=4))
    beginnings = torch.cartesian_prod(*[torch.arange(VOCAB_SIZE)] * 6)
    steps = chain.probs(beginnings).gather(-1, beginnings.unsqueeze(-1)).squeeze(-1)
    whole = steps.prod(1).view([VOCAB_SIZE] * 6)
    torch.testing.assert_close(chain.pair(0, 5), whole.sum((1, 2, 3, 4)))
    torch.testing.assert_close(chain.pair(2, 3), whole.sum((0, 1, 4, 5)))
    torch.testing.assert_close(chain.single(4), whole.sum((0, 1, 2, 3, 5)))
    torch.testing.assert_close(chain.pair(3, 150).sum(0), chain.single(150))


def test_probabilities_of_the_measure_are_even() -> None:
    """Images drawn from the chain itself: statistics are chi-squares, neither too large nor too small."""
    chain = Chain(markov_pipeline().transformer, 0, Guidance(), Sampling())
    generator = torch.Generator().manual_seed(0)
    scores: list[float] = []
    for _ in range(4):
        tokens = torch.zeros(IMAGES, 0, dtype=torch.int64)
        for position in range(POSITIONS):
            probs = chain.probs(torch.nn.functional.pad(tokens, (0, 1)))[:, position]
            tokens = torch.cat([tokens, probs.multinomial(1, generator=generator)], 1)
        # passes of different length, by a rule that knows what was decided before
        passes = 1 + torch.cat([torch.zeros(IMAGES, 1).long(), (tokens[:, :-1] < 3).long().cumsum(1)], 1)
        found = p_values(Drawn(tokens, chain.probs(tokens), passes), NEIGHBOURS) | chain.p_values(tokens)
        scores.extend(found.values())
    ordered = torch.tensor(scores).sort().values
    uniform = (torch.arange(len(ordered)) + 0.5) / len(ordered)
    assert (ordered - uniform).abs().max() < 1.63 / len(ordered) ** 0.5  # Kolmogorov, one in a hundred
    assert ordered.min() > 1e-4
