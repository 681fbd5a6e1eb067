"""What ships: the model follows prompts, drafters pay off, the tokenizers reconstruct."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import PlainTokens, ShippedPipelines
from varaccel import (
    AutoPipeline,
    CoDe,
    CSpD,
    DynamicTree,
    FeatureCache,
    Jacobi,
    LlamaGenPipeline,
    MARPipeline,
    Speculative,
    VARPipeline,
    ZipAR,
)
from varaccel.evaluation.metrics.adherence import held_out_captions, score_adherence
from varaccel.evaluation.published.var import published_loop
from varaccel.models.detector import load_detector
from varaccel.scenes import HELD_OUT_SEED, render, sample_scene
from varaccel.scenes.grammar import Caption

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def raster(shipped: ShippedPipelines) -> LlamaGenPipeline:
    return shipped("mini-llamagen")


@pytest.fixture(scope="module")
def pyramid(shipped: ShippedPipelines) -> VARPipeline:
    return shipped("mini-var")


@pytest.fixture(scope="module")
def masked(shipped: ShippedPipelines) -> MARPipeline:
    return shipped("mini-mar")


def test_images_have_the_stated_size(raster: LlamaGenPipeline) -> None:
    out = raster("a red sphere", seed=0)
    assert out.images[0].size == (128, 128)
    assert out.written.shape == (1, 16, 16)
    assert np.asarray(out.images[0]).std() > 10, "no blank image"


def test_images_follow_prompts(raster: LlamaGenPipeline) -> None:
    """Far above what images score with another prompt's caption; the card has the measured figures."""
    captions = [c for c in held_out_captions(60) if len(c.mentions) == 1][:24]
    images = raster([c.text for c in captions], seed=0).images
    detector = load_detector()
    right = score_adherence(detector, images, captions).rates["correct"].share
    shuffled = score_adherence(detector, images, captions[1:] + captions[:1]).rates["correct"].share
    assert right >= 0.5
    assert shuffled <= 0.25


@pytest.mark.parametrize(
    "accelerator",
    [
        *(Jacobi(16, coupling) for coupling in ("none", "gumbel", "maximal")),
        *(Speculative(drafter, tree=5) for drafter in ("eagle", "small", "layers")),
        Speculative("eagle", tree="mc_sim_7b_63"),
        Speculative("eagle", tree=DynamicTree(top_k=5, depth=3, total=24)),
    ],
    ids=lambda a: f"{a.name}-{'-'.join(map(str, a.options().values()))}",
)
def test_greedy_images_are_those_of_plain_decoding(
    accelerator: Jacobi | Speculative, raster: LlamaGenPipeline, plain_tokens: PlainTokens
) -> None:
    """`eval/greedy.py` does the same for any number of prompts; 64 of 64 agree."""
    prompts = [caption.text for caption in held_out_captions(8)]
    images = raster(prompts, temperature=0.0, accelerator=accelerator, output_type="latent").images
    assert torch.equal(images, plain_tokens("mini-llamagen", prompts, temperature=0.0))


@pytest.mark.parametrize(
    ("accelerator", "gained"),
    [(Jacobi(16), 1.5), (Speculative("eagle", tree=5), 1.5), (Speculative("small", tree=5), 1.5)],
    ids=lambda value: getattr(value, "name", None),
)
def test_guesses_pay_off(accelerator: Jacobi | Speculative, gained: float, raster: LlamaGenPipeline) -> None:
    """Far below what the card and docs/bench.md have, far above what an untrained drafter gains."""
    prompts = [caption.text for caption in held_out_captions(4)]
    stats = raster(prompts, seed=0, accelerator=accelerator, output_type="latent").stats
    assert stats.mean_accepted is not None
    assert stats.mean_accepted > gained
    assert stats.passes < stats.tokens / (1 + gained / 2)


def test_tokenizer_reconstructs(raster: LlamaGenPipeline) -> None:
    scenes = np.stack([render(sample_scene(HELD_OUT_SEED + i)).image for i in range(8)])
    images = torch.from_numpy(scenes).permute(0, 3, 1, 2).float() / 127.5 - 1
    vq = raster.vq_model
    with torch.no_grad():
        encoding = vq.encode(images)
        decoded = vq.decode_tokens(encoding.indices)
    psnr = 10 * torch.log10(4 / (decoded - images).square().mean((1, 2, 3))).mean()
    assert psnr > 29
    assert encoding.indices.unique().numel() > 200


def test_cached_decoding_equals_a_full_pass(raster: LlamaGenPipeline) -> None:
    """The shipped network at full length: every distribution of 256 cached steps against one teacher-forced pass."""
    pipe = raster
    token_ids = pipe("a blue cube", seed=0, guidance_scale=1.0, output_type="latent").images.flatten(1)
    given = pipe._condition(["a blue cube"])
    condition, mask = given.values, given.mask
    with torch.no_grad():
        logits = pipe.transformer(condition, token_ids[:, :-1], mask)[:, pipe.transformer.prefix_length - 1 :]
    chosen = logits.log_softmax(-1).gather(-1, token_ids.unsqueeze(-1))
    assert chosen.mean() > -2.5, "the decoded tokens are likely under the full pass"
    greedy = pipe("a blue cube", temperature=0.0, guidance_scale=1.0, output_type="latent").images.flatten(1)
    with torch.no_grad():
        logits = pipe.transformer(condition, greedy[:, :-1], mask)[:, pipe.transformer.prefix_length - 1 :]
    assert (logits.argmax(-1) == greedy).float().mean() > 0.99


def test_wide_window_draws_the_plain_image(raster: LlamaGenPipeline) -> None:
    plain = raster("a yellow cone", seed=3).images[0]
    assert (
        raster("a yellow cone", seed=3, accelerator=ZipAR(window=16)).images[0].tobytes() == plain.tobytes()
    )


# -- the next-scale model ------------------------------------------------------------------------------


def one_object(count: int) -> list[Caption]:
    return [c for c in held_out_captions(3 * count) if len(c.mentions) == 1][:count]


def adherence(images: Sequence[Image.Image], captions: list[Caption]) -> float:
    return score_adherence(load_detector(), images, captions).rates["correct"].share


def test_var_images_follow_prompts_plainly_and_by_code(pyramid: VARPipeline) -> None:
    """Far above what images score with another prompt's caption; the card has the measured figures."""
    captions = one_object(24)
    prompts = [c.text for c in captions]
    for accelerator in (None, CoDe(draft_scales=5)):
        images = pyramid(prompts, seed=0, accelerator=accelerator).images
        assert adherence(images, captions) >= 0.4
        assert adherence(images, captions[1:] + captions[:1]) <= 0.25


def test_relay_of_the_shipped_model_with_itself_draws_its_images(pyramid: VARPipeline) -> None:
    pipe = pyramid
    plain = pipe("a blue cube", seed=4, output_type="latent").images
    for scales in range(1, 7):
        relay = CoDe(refiner=pipe.transformer, draft_scales=scales)
        assert torch.equal(pipe("a blue cube", seed=4, accelerator=relay, output_type="latent").images, plain)


def test_small_models_can_be_named_as_refiners(pyramid: VARPipeline) -> None:
    stats = pyramid("a blue cube", seed=4, accelerator=CoDe("mini-var-small", draft_scales=4)).stats
    assert [stage.passes for stage in stats.stages] == [4, 3]
    assert stats.cache_bytes < pyramid("a blue cube", seed=4).stats.cache_bytes


def test_published_loop_draws_what_the_engine_draws(pyramid: VARPipeline) -> None:
    """The shipped weights at full length, against the published loop without any of our savings."""
    pipe = pyramid
    given = pipe._condition(["a red sphere", "a green cone"])
    features, mask = given.values, given.mask
    with torch.no_grad():
        vectors = pipe.transformer.embed_condition(features, mask)
    theirs, _ = published_loop(pipe.transformer, pipe.vq_model.quantize, vectors, cfg=1.5, top_k=1)
    ours = pipe(["a red sphere", "a green cone"], guidance_scale=2.5, top_k=1, seed=0, output_type="latent")
    assert (ours.images == theirs).float().mean() > 0.99, "ties aside"


def test_multiscale_tokenizer_reconstructs(pyramid: VARPipeline) -> None:
    scenes = np.stack([render(sample_scene(HELD_OUT_SEED + i)).image for i in range(8)])
    images = torch.from_numpy(scenes).permute(0, 3, 1, 2).float() / 127.5 - 1
    vq = pyramid.vq_model
    with torch.no_grad():
        encoding = vq.encode(images)
        decoded = vq.decode_tokens(encoding.indices)
    psnr = 10 * torch.log10(4 / (decoded - images).square().mean((1, 2, 3))).mean()
    assert psnr > 28
    assert encoding.indices.unique().numel() > 150


# -- the masked model ----------------------------------------------------------------------------------


def test_the_masked_model_brings_its_drafter(masked: MARPipeline) -> None:
    pipe = masked
    small = AutoPipeline.from_pretrained("mini-mar-small").transformer
    drafter = pipe.draft_transformer
    assert drafter is not None
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in drafter.state_dict().items())
    assert pipe.image_size == 128


def test_mar_images_follow_prompts_plainly_and_accelerated(masked: MARPipeline) -> None:
    """Far above what images score with another prompt's caption; the card has the measured figures."""
    captions = one_object(8)
    prompts = [c.text for c in captions]
    quick = {"num_iterations": 32, "head_steps": 20, "head_sampler": "dpm++"}
    noisy = {"num_iterations": 16, "head_steps": 25}
    runs = ((None, quick), (FeatureCache(refresh=2), quick), (CSpD("exact", draft_length=2), noisy))
    for accelerator, call in runs:
        images = masked(prompts, seed=0, accelerator=accelerator, **call).images
        assert adherence(images, captions) >= 0.6
        assert adherence(images, captions[1:] + captions[:1]) <= 0.25


def test_continuous_speculation_keeps_some_guesses_of_the_shipped_pair(masked: MARPipeline) -> None:
    call = {"seed": 0, "num_iterations": 16, "head_steps": 25, "output_type": "latent"}
    stats = masked(
        ["a red sphere", "a blue cube"], accelerator=CSpD("reference", draft_length=3), **call
    ).stats
    assert 0.05 < sum(stats.kept) / 2 < 0.9
    assert stats.passes == 6
    assert stats.draft_passes == 15


def test_kl_tokenizer_reconstructs(masked: MARPipeline) -> None:
    scenes = np.stack([render(sample_scene(HELD_OUT_SEED + i)).image for i in range(8)])
    images = torch.from_numpy(scenes).permute(0, 3, 1, 2).float() / 127.5 - 1
    vae = masked.vae
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
        decoded = vae.decode(latents).sample
    psnr = 10 * torch.log10(4 / (decoded - images).square().mean((1, 2, 3))).mean()
    assert psnr > 33
    assert (latents * vae.config.scaling_factor).std().item() == pytest.approx(1, abs=0.15)
