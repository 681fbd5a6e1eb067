"""Guidance with three branches: the combination, whole images by enumeration, and what does not fit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.enumeration import IMAGES, LIMIT, POSITIONS, VOCAB_SIZE, exact_distribution, misfit
from tests.tiny import redraw
from tests.toys import PROMPTS, SCALES, BranchedPipeline, padded, toy_logits, toy_pipeline
from varaccel import InputError, Jacobi, LayerSkip, Plain, Speculative, ZipAR
from varaccel.accelerators import AnyAccelerator
from varaccel.engine.canvas import Canvas
from varaccel.hosts.causal.guidance import Guidance
from varaccel.hosts.causal.schedule import Raster
from varaccel.hosts.causal.session import CausalSession
from varaccel.models.eagle import EagleHead
from varaccel.nn.condition import Condition
from varaccel.nn.grid import Grid
from varaccel.pipelines.causal import CausalPipeline
from varaccel.speculation.tree import DynamicTree
from varaccel.training.drafter import DrafterRecipe, distribution_logits
from varaccel.training.feature_pairs import make_pairs

NAME = "branched"
GROUPS = ((0, 1, 2), (2, 3, 5), (0, 4, 8), (6, 7, 8))
BUSHY = [[0], [1], [0, 0], [0, 1], [0, 0, 0]]
METHODS: dict[str, AnyAccelerator] = {
    "plain": Plain(),
    "jacobi maximal": Jacobi(4, coupling="maximal", fill="above"),
    "jacobi gumbel": Jacobi(5, coupling="gumbel", fill="left"),
    "chain": Speculative("small", tree=3),
    "layers": Speculative(LayerSkip((0,)), tree=BUSHY),
    "dynamic": Speculative("small", tree=DynamicTree(top_k=2, depth=2, total=7)),
    "zipar of whole rows": ZipAR(3),
}


@cache
def distribution(prompt: int | str, scales: tuple[float, ...] = SCALES, interval: int = -1) -> Tensor:
    return exact_distribution(toy_logits(NAME, prompt, scales, interval), VOCAB_SIZE, POSITIONS)


def draw(accelerator: AnyAccelerator | str, prompts: Any, **options: Any) -> Any:
    return toy_pipeline(NAME)(
        prompts, accelerator=accelerator, output_type="latent", **{"seed": 0, **options}
    )


# -- the combination -----------------------------------------------------------------------------------


def test_two_branches_are_combined_as_ever() -> None:
    """Bit for bit, and a list of one number is that number."""
    told, other = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    for scale in (1.7, 4.0, 7.5):
        assert torch.equal(Guidance(scale).combine(told, other), other + scale * (told - other))
    assert Guidance([4.0]) == Guidance(4.0) != Guidance((4.0, 4.0))


def test_three_branches_are_successive_differences() -> None:
    both, image, none = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    guidance = Guidance((3.0, 1.5), interval=1)
    expected = none + 1.5 * (image - none) + 3.0 * (both - image)
    torch.testing.assert_close(guidance.combine(both, image, none), expected)
    expected[:, 3] = both[:, 3]  # tokens 0 to 2 are guided
    torch.testing.assert_close(guidance.combine(both, image, none, positions=torch.arange(4)), expected)
    # equal scales: what stands between does not matter
    torch.testing.assert_close(
        Guidance((2.0, 2.0)).combine(both, image, none), Guidance(2.0).combine(both, none)
    )
    # a mean of two prompts, weights 1/2 and 1/2
    torch.testing.assert_close(Guidance((0.5, 1.0)).combine(both, image, none), (both + image) / 2)


@pytest.mark.parametrize(
    ("scale", "branches"),
    [(1.0, 1), (0.5, 1), (2.0, 2), ((1, 1), 1), ((0.5, 1.0), 3), ((1.0, 2.0), 3), ([2, 3, 4], 4)],
    ids=str,
)
def test_rows_of_an_image(scale: Any, branches: int) -> None:
    assert Guidance(scale).branches == branches
    assert Guidance(scale).enabled == (branches > 1)
    hash(Guidance(scale))


@pytest.mark.parametrize(
    "scale", [(), (2.0, float("nan")), (2.0, -1.0), (2.0, None), "22", (True, 2)], ids=str
)
def test_scales_that_cannot_be_used(scale: Any) -> None:
    with pytest.raises(InputError, match="guidance_scale"):
        Guidance(scale)


# -- conditions ----------------------------------------------------------------------------------------


def test_conditions_count_their_branches() -> None:
    one = padded(["12", "3"])
    assert [
        one.branches,
        replace(one, negative=one).branches,
        replace(one, negative=(one, one)).branches,
    ] == [2, 2, 3]
    twice = replace(one, negative=(one, padded(["1", "2"]))).repeat_interleave(2)
    assert [branch.batch for branch in (twice, *twice.negatives)] == [4, 4, 4]
    assert twice.negatives[1].values.flatten().tolist() == [1, 1, 2, 2]
    with pytest.raises(InputError, match="a row for each image, 2 of them; a negative one has 1"):
        replace(one, negative=(one, padded(["1"])))
    with pytest.raises(InputError, match="in one tuple"):
        replace(one, negative=replace(one, negative=one))


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (2.0, "must be 2 numbers, one for each of the 3 branches of the condition but the last, got 1"),
        ((2.0, 3.0, 4.0), r"must be 2 numbers, .* got 3\."),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["plain", "jacobi maximal", "chain"])
def test_scales_must_fit_the_branches(method: str, scale: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw(METHODS[method], PROMPTS[NAME], guidance_scale=scale)
    with pytest.raises(InputError, match="must be one number, one for each of the 2 branches"):
        toy_pipeline("prompted")("12", guidance_scale=SCALES, accelerator=METHODS[method])


def test_a_negative_prompt_takes_the_place_of_the_last_branch() -> None:
    """The pipeline's own is "54", which is the picture 5 and the word 4."""
    own = draw("plain", PROMPTS[NAME], num_images_per_prompt=20).images
    same = draw("plain", PROMPTS[NAME], num_images_per_prompt=20, negative_prompt="4/5").images
    assert torch.equal(own, same)
    others = draw("plain", PROMPTS[NAME], num_images_per_prompt=20, negative_prompt=["12/3", "1/4", "2/1"])
    assert not torch.equal(own, others.images)


def test_the_longest_branch_may_be_any() -> None:
    """First and last of the same length, the one between shorter: every row looks at its own slots alone."""
    network, grids = toy_pipeline(NAME).transformer, (Grid(3, 3),)
    given = [padded(prompts) for prompts in (["1412", "2203"], ["3", "25"], ["5432", "1111"])]
    condition = Condition(given[0].values, given[0].mask, (given[1], given[2]))
    for static_shapes in (False, True):
        several = CausalSession(
            network, condition, grids, guidance=Guidance(SCALES), static_shapes=static_shapes
        )
        assert (several.rows_per_pass, several.prefix, several.cache_slots.branches_differ) == (6, 4, True)
        alone = [CausalSession(network, part, grids) for part in given]
        canvases = [Canvas.empty(2, 9) for _ in range(4)]
        steps = [Raster().step_inputs(canvas) for canvas in canvases]
        tokens = torch.randint(0, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(1))
        for number, inputs in enumerate(zip(*steps, strict=True), start=1):
            parts = [s.predict(c, i).logits for s, c, i in zip(alone, canvases[1:], inputs[1:], strict=True)]
            expected = 3.0 * parts[0] - 1.5 * parts[1] - 0.5 * parts[2]
            found = several.predict(canvases[0], inputs[0]).logits
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            for canvas in canvases:
                canvas.write(inputs[0].positions, tokens[:, inputs[0].positions], number)


# -- whole images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_lossless(method: str) -> None:
    """Three prompts in one call: thousands of images of each follow its own enumerated distribution."""
    out = draw(METHODS[method], PROMPTS[NAME], num_images_per_prompt=IMAGES // 2)
    assert out.stats.rows == 3 * len(out.images)
    for drawn, prompt in zip(out.images.split(IMAGES // 2), PROMPTS[NAME], strict=True):
        assert misfit(drawn, distribution(prompt), GROUPS) < LIMIT


@pytest.mark.parametrize("method", METHODS)
def test_three_together_are_three_alone(method: str) -> None:
    for options in ({}, {"guidance_interval": 2}, {"temperature": 0.0}):
        together = draw(METHODS[method], PROMPTS[NAME], **options)
        for row, prompt in enumerate(PROMPTS[NAME]):
            alone = draw(METHODS[method], prompt, **{**options, "seed": row})
            assert alone.stats.rows == 3
            assert torch.equal(alone.images[0], together.images[row])
            assert torch.equal(alone.written[0], together.written[row])


@pytest.mark.parametrize("method", METHODS)
def test_greedy(method: str) -> None:
    options: dict[str, Any] = {"temperature": 0.0, "num_images_per_prompt": 2}
    for interval in (-1, 3):
        plain = draw("plain", PROMPTS[NAME], guidance_interval=interval, **options)
        other = draw(METHODS[method], PROMPTS[NAME], guidance_interval=interval, **options)
        assert torch.equal(plain.images, other.images)


@pytest.mark.parametrize("method", ["plain", "jacobi maximal", "chain"])
def test_after_the_interval_only_the_condition_counts(method: str) -> None:
    prompt = PROMPTS[NAME][1]
    out = draw(METHODS[method], prompt, num_images_per_prompt=IMAGES, guidance_interval=3)
    assert misfit(out.images, distribution(prompt, SCALES, 3), GROUPS) < LIMIT


def test_swapped_scales_are_seen() -> None:
    """The measure tells the scale of the words from that of the picture, and the branches from each other."""
    prompt = PROMPTS[NAME][1]
    drawn = draw("plain", prompt, num_images_per_prompt=IMAGES).images
    assert misfit(drawn, distribution(prompt, SCALES[::-1]), GROUPS) > 2 * LIMIT
    assert misfit(drawn, distribution(prompt, (SCALES[0], 1.0)), GROUPS) > LIMIT
    assert misfit(drawn, distribution(prompt, (SCALES[0], SCALES[0])), GROUPS) > LIMIT


# -- an EAGLE head, which drafts every branch from its own features ------------------------------------


@cache
def with_head() -> CausalPipeline:
    pipe = toy_pipeline(NAME)
    network = pipe.transformer
    head = EagleHead.for_target(network, num_heads=2).eval()
    redraw(head, 2)
    own = BranchedPipeline(network, pipe.vq_model, guidance_scale=SCALES, eagle_head=head)
    own.set_progress_bar_config(disable=True)
    return own


def test_eagle() -> None:
    prompts, eagle = PROMPTS[NAME], Speculative("eagle", tree=BUSHY)
    out = with_head()(
        prompts, seed=0, num_images_per_prompt=IMAGES // 2, accelerator=eagle, output_type="latent"
    )
    assert out.stats.mean_accepted > 0
    for drawn, prompt in zip(out.images.split(IMAGES // 2), prompts, strict=True):
        assert misfit(drawn, distribution(prompt), GROUPS) < LIMIT
    for options in ({"temperature": 0.0}, {"guidance_interval": 2}):
        together = with_head()(prompts, seed=5, accelerator=eagle, output_type="latent", **options)
        if "temperature" in options:
            assert torch.equal(together.images, draw("plain", prompts, seed=5, **options).images)
        for row, prompt in enumerate(prompts):
            alone = with_head()(prompt, seed=5 + row, accelerator=eagle, output_type="latent", **options)
            assert torch.equal(alone.images[0], together.images[row])
            assert torch.equal(alone.written[0], together.written[row])


def test_what_a_head_is_trained_on() -> None:
    """All branches while guided; else a dropped condition is that of the last branch."""
    network, grids = toy_pipeline(NAME).transformer, (Grid(3, 3),)
    condition = toy_pipeline(NAME)._condition(PROMPTS[NAME][:2])
    assert condition is not None
    tokens = torch.randint(0, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(0))

    def wanted(given: Condition, guided: bool, dropped: Tensor | None = None) -> Tensor:
        pairs = make_pairs(network, network.transform, given, tokens, guided, grids=grids, dropped=dropped)
        return pairs.wanted

    each = torch.cat([wanted(part, False) for part in (condition, *condition.negatives)])
    torch.testing.assert_close(wanted(condition, True), each)
    mixed = torch.stack([each[2, 0], each[0, 1]])
    torch.testing.assert_close(wanted(condition, False, torch.tensor([True, False]))[0], mixed)
    recipe = DrafterRecipe(guidance_scale=SCALES, precision="float32")
    logits = network.logits(each)
    expected = 3.0 * logits[0] - 1.5 * logits[1] - 0.5 * logits[2]
    torch.testing.assert_close(distribution_logits(network, each, recipe), expected, atol=1e-4, rtol=1e-4)
