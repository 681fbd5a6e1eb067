"""The MAR pipeline as a user calls it: options, callbacks, inputs good and bad, saving and loading."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.tiny import CLASSES, GRID, PROMPTS, kl_vae, mar_transformer, new_pipeline, pipeline, sizes_of
from varaccel import Auto, AutoPipeline, CSpD, FeatureCache, FewerSteps, MARPipeline
from varaccel.accelerators import ACCELERATORS, Accelerator, fitting
from varaccel.errors import CheckpointError, InputError
from varaccel.hosts.masked.job import MaskedJob
from varaccel.hosts.masked.schedule import CosineGroups
from varaccel.models.mar import MARTransformer
from varaccel.nn.precision import cast

HOSTS = ("mar-class", "mar-caption")
TOKENS, CHANNELS, SIZE = GRID * GRID, 4, 2 * GRID

on_hosts = pytest.mark.parametrize("host", HOSTS)


def drawn(host: str, prompt: Any = None, **options: Any) -> Any:
    prompt = PROMPTS[host] if prompt is None else prompt
    return pipeline(host)(prompt, output_type="latent", **{"seed": 3, **options})


def latents(host: str, prompt: Any = None, **options: Any) -> Tensor:
    return drawn(host, prompt, **options).images


def assert_same(ours: Tensor, theirs: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def apart(ours: Tensor, theirs: Tensor) -> bool:
    """Every image is another one, by more than rounding."""
    return bool(((ours - theirs).abs().flatten(1).amax(1) > 1e-3).all())


# -- plain decoding ------------------------------------------------------------------------------------


@on_hosts
def test_everything_matters(host: str) -> None:
    plain = latents(host)
    for options in (
        {"seed": 4},
        {"guidance_scale": 1.0},
        {"guidance_schedule": "constant"},
        {"temperature": 0.8},
        {"num_iterations": 4},
        {"head_steps": 5},
        {"head_sampler": "ddim"},
        {"head_sampler": "dpm++"},
        {"final_noise": True},
    ):
        assert apart(latents(host, **options), plain), options
    assert apart(latents(host, PROMPTS[host][1:] + PROMPTS[host][:1]), plain)


@on_hosts
def test_defaults_are_those_of_the_model(host: str) -> None:
    named = {
        "guidance_scale": 2.0,
        "guidance_schedule": "linear",
        "temperature": 1.0,
        "num_iterations": TOKENS,
        "head_steps": 8,
        "head_sampler": "ddpm",
    }
    assert torch.equal(latents(host, **named), latents(host))


@on_hosts
def test_guidance_is_off_at_one(host: str) -> None:
    one = PROMPTS[host][0]
    assert drawn(host, one, guidance_scale=1).stats.rows == 1
    assert drawn(host, one, guidance_scale=1.01).stats.rows == 2
    assert_same(latents(host, guidance_scale=1.0001), latents(host, guidance_scale=1.0), atol=0.01)


@on_hosts
@pytest.mark.parametrize("iterations", [1, 3, TOKENS])
def test_every_iteration_decides_its_share(host: str, iterations: int) -> None:
    out = drawn(host, num_iterations=iterations)
    borders = CosineGroups(torch.arange(TOKENS)[None], iterations).borders
    assert out.stats.passes == iterations
    assert out.written.shape == (3, GRID, GRID)
    for image in out.written.flatten(1):
        counts = torch.bincount(image, minlength=iterations + 1)[1:]
        assert counts.tolist() == [a - b for a, b in pairwise(borders)]
    if iterations > 1:
        assert not torch.equal(out.written[0], out.written[1]), "each image has its own order"


@on_hosts
def test_output_types(host: str) -> None:
    pipe = pipeline(host)
    images = pipe(PROMPTS[host], seed=1).images
    assert pipe.image_size == SIZE
    assert [p.size for p in images] == [(SIZE, SIZE)] * 3
    tensor = pipe(PROMPTS[host], seed=1, output_type="pt").images
    array = pipe(PROMPTS[host], seed=1, output_type="np").images
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy())
    assert max(np.abs(a * 255 - np.asarray(p)).max() for a, p in zip(array, images, strict=True)) <= 1
    latent, stats = pipe(PROMPTS[host], seed=1, output_type="latent", return_dict=False)
    with torch.no_grad():
        decoded = pipe.vae.decode(latent / 0.5).sample.clamp(-1, 1) / 2 + 0.5
    assert_same(tensor, decoded, atol=1e-5)
    assert tensor.std() > 0.02
    assert stats.tokens == TOKENS


def test_tokens_of_several_latents() -> None:
    """A token of 16 numbers over 4 latent channels is a patch of two by two."""
    network = mar_transformer("class", token_channels=16)
    pipe = MARPipeline(network, kl_vae(), head_steps=4)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.image_size == 4 * GRID
    out = pipe([0, 1], seed=0, output_type="latent")
    assert out.images.shape == (2, 4, 2 * GRID, 2 * GRID)
    assert pipe(0, seed=0).images[0].size == (4 * GRID, 4 * GRID)


@on_hosts
@pytest.mark.parametrize("accelerator", [None, "cspd", CSpD(verification="sequential")], ids=str)
def test_callback_sees_every_pass(host: str, accelerator: Any) -> None:
    seen: list[tuple[int, int, int]] = []
    previews = []

    def callback(pipe: Any, step: int, tokens: int, state: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, tokens, int((state["canvas"].written > 0).sum())))
        previews.append(state["preview"]())
        return state

    pipe = new_pipeline(host)
    out = pipe(PROMPTS[host], seed=3, accelerator=accelerator, callback_on_step_end=callback)
    assert [step for step, _, _ in seen] == list(range(out.stats.passes))
    written = [0, *(count for _, _, count in seen)]
    assert written[-1] == 3 * TOKENS
    assert all(before < after for before, after in pairwise(written))
    if accelerator is None:
        assert seen == [(i, 1, 3 * (i + 1)) for i in range(TOKENS)]
    assert all([p.size for p in images] == [(SIZE, SIZE)] * 3 for images in previews)
    without = pipeline(host)(PROMPTS[host], seed=3, accelerator=accelerator).images
    for shown, last, alone in zip(previews[-1], out.images, without, strict=True):
        assert shown.tobytes() == last.tobytes() == alone.tobytes(), "previews change nothing"
    assert previews[0][0].tobytes() != previews[-1][0].tobytes()


@on_hosts
@pytest.mark.parametrize("accelerator", [None, "cspd", CSpD(verification="sequential")], ids=str)
def test_stopping_early(host: str, accelerator: Any) -> None:
    """The images show what is there, and what is there is what would have been there."""
    pipe = new_pipeline(host)

    def stop(pipe: Any, step: int, tokens: int, state: dict[str, Any]) -> None:
        pipe._interrupt = step == 2

    out = pipe(
        PROMPTS[host],
        seed=3,
        accelerator=accelerator,
        output_type="latent",
        callback_on_step_end=stop,
    )
    full = drawn(host, accelerator=accelerator)
    assert out.stats.passes == 3
    there = out.written > 0
    assert 0 < int(there.sum()) < 3 * TOKENS
    assert torch.equal(there, (full.written > 0) & (full.written <= 3))
    wide = there.unsqueeze(1).expand_as(full.images)
    assert torch.equal(out.images[wide], full.images[wide])
    assert not out.images[~wide].any()
    again = pipe(PROMPTS[host], seed=3, accelerator=accelerator, output_type="latent").images
    assert torch.equal(again, full.images), "the next call is not stopped"


@pytest.mark.slow
@on_hosts
def test_compiled_networks_draw_the_same(host: str) -> None:
    pipe = new_pipeline(host)
    pipe.compile(backend="eager")
    for accelerator in (None, "cspd", "feature_cache"):
        ours = pipe(PROMPTS[host], seed=3, accelerator=accelerator, output_type="latent").images
        assert_same(ours, latents(host, accelerator=accelerator), atol=1e-5)


@on_hosts
def test_half_precision(host: str) -> None:
    """Tokens stay what they are: single precision, and finite."""
    pipe = new_pipeline(host).to(torch.bfloat16)
    for accelerator in (None, "cspd", "feature_cache"):
        out = pipe(PROMPTS[host], seed=3, accelerator=accelerator, output_type="latent")
        assert out.stats.dtype == "bfloat16"
        assert out.images.dtype == torch.float32
        assert out.images.isfinite().all()
        assert (out.written > 0).all()
    assert [p.size for p in pipe(PROMPTS[host], seed=0).images] == [(SIZE, SIZE)] * 3


# -- fewer steps and caches ----------------------------------------------------------------------------


@on_hosts
def test_fewer_steps_are_those_of_the_call(host: str) -> None:
    accelerator = FewerSteps(iterations=5, head_steps=4, head_sampler="dpm++")
    out = drawn(host, accelerator=accelerator)
    assert torch.equal(out.images, latents(host, num_iterations=5, head_steps=4, head_sampler="dpm++"))
    assert out.stats.passes == 5
    assert not out.stats.lossless
    assert torch.equal(latents(host, accelerator=FewerSteps()), latents(host))
    assert "iterations=5" in out.stats.label


@on_hosts
def test_fresh_features_are_plain_decoding(host: str) -> None:
    assert_same(latents(host, accelerator=FeatureCache(refresh=1)), latents(host))
    assert_same(latents(host, accelerator=FeatureCache(iterations=1)), latents(host, num_iterations=1))
    fresh, stale = (drawn(host, accelerator=FeatureCache(refresh=n)).stats for n in (1, 3))
    assert fresh.cache_bytes == stale.cache_bytes > 0
    assert drawn(host).stats.cache_bytes == 0
    assert apart(latents(host, accelerator=FeatureCache(refresh=3)), latents(host))


@pytest.mark.parametrize(
    ("accelerator", "options", "message"),
    [
        (FewerSteps, {"iterations": 0}, "iterations"),
        (FewerSteps, {"iterations": 2.5}, "iterations"),
        (FewerSteps, {"head_steps": 0}, "head_steps"),
        (FewerSteps, {"head_sampler": "euler"}, "head_sampler"),
        (FeatureCache, {"refresh": 0}, "refresh"),
        (FeatureCache, {"refresh": True}, "refresh"),
        (FeatureCache, {"keep_unconditional": 1}, "keep_unconditional"),
        (FeatureCache, {"iterations": 0}, "iterations"),
        (CSpD, {"mode": "exakt"}, "did you mean 'exact'"),
        (CSpD, {"verification": "sequentiel"}, "did you mean 'sequential'"),
        (CSpD, {"draft_length": 0}, "draft_length"),
        (CSpD, {"draft_length": 1.5}, "draft_length"),
        (CSpD, {"prefill": -0.1}, "prefill"),
        (CSpD, {"prefill": 1.1}, "prefill"),
        (CSpD, {"prefill": math.nan}, "prefill"),
        (CSpD, {"prefill": "0.1"}, "prefill"),
        (CSpD, {"coupling_step": -1}, "coupling_step"),
        (CSpD, {"coupling_step": True}, "coupling_step"),
        (CSpD, {"coupling_step": 1.0}, "coupling_step"),
        (CSpD, {"mode": "exact", "inner_temperature": 42.0}, "no inner_temperature"),
        (CSpD, {"inner_temperature": 0.0}, "inner_temperature"),
        (CSpD, {"mode": "paper", "inner_temperature": math.inf}, "inner_temperature"),
        (CSpD, {"tries": 0}, "tries"),
        (CSpD, {"mode": "exact", "tries": -1}, "tries"),
        (CSpD, {"head_sampler": "ddim"}, "adds no noise"),
        (CSpD, {"aligned": "yes"}, "aligned"),
        (CSpD, {"iterations": 0}, "iterations"),
        (CSpD, {"head_steps": 0}, "head_steps"),
    ],
    ids=str,
)
def test_options_that_cannot_be(
    accelerator: type[Accelerator], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        accelerator(**options)


# -- what cannot be used -------------------------------------------------------------------------------


def refused(message: str, error: type[Exception] = InputError) -> Any:
    """Raises an error whose text has `message` in it and is one sentence."""
    return pytest.raises(error, match=rf"^(?=[^\n]*{message})[^\n]+\.\Z")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "no prompt"),
        ({"prompt": "goldfisch"}, "did you mean 'goldfish'"),
        ({"prompt": 5}, "from 0 to 4"),
        ({"guidance_scale": math.nan}, "guidance_scale"),
        ({"guidance_scale": math.inf}, "guidance_scale"),
        ({"guidance_scale": -0.1}, "guidance_scale"),
        ({"guidance_schedule": "cosine"}, "guidance_schedule"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"num_iterations": 0}, "num_iterations"),
        ({"num_iterations": TOKENS + 1}, "at most the model's 16 tokens"),
        ({"num_iterations": 2.5}, "num_iterations"),
        ({"head_steps": 0}, "head_steps"),
        ({"head_steps": 1001}, "from 1 to 1000"),
        ({"head_sampler": "euler"}, "head_sampler"),
        ({"head_sampler": "ddim", "temperature": 0.5}, "adds no noise"),
        ({"head_sampler": "ddim", "final_noise": True}, "adds no noise"),
        ({"head_sampler": "ddim", "accelerator": "cspd"}, "adds no noise"),
        ({"seed": -1}, "seed"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be an integer of at least 1"),
        ({"output_type": "jpeg"}, "pil"),
        ({"accelerator": FewerSteps(iterations=TOKENS + 1)}, "at most the model's 16 tokens"),
        ({"accelerator": FewerSteps(head_steps=1001)}, "from 1 to 1000"),
        ({"accelerator": FeatureCache(head_steps=1001)}, "from 1 to 1000"),
        ({"accelerator": FewerSteps(head_sampler="ddim"), "temperature": 0.5}, "adds no noise"),
        ({"accelerator": CSpD(iterations=TOKENS + 1)}, "at most the model's 16 tokens"),
        ({"accelerator": CSpD(mode="exact", coupling_step=8)}, "below the 8 steps"),
        ({"accelerator": CSpD(mode="exact", coupling_step=4, head_steps=4)}, "below the 4 steps"),
        ({"accelerator": CSpD(drafter=nn.Linear(1, 1))}, "got Linear"),
        ({"accelerator": CSpD(drafter=3)}, "got int"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with refused(message):
        pipeline("mar-class")(**{"prompt": 0, **arguments})


def test_a_coupled_step_counts_in_the_mode_that_uses_it() -> None:
    assert latents("mar-class", 0, accelerator=CSpD(mode="reference", coupling_step=8)).isfinite().all()


@pytest.mark.parametrize("prompt", [3, "", "  ", ["a cube", 1]])
def test_bad_descriptions(prompt: Any) -> None:
    with pytest.raises(InputError):
        pipeline("mar-caption")(prompt)


@pytest.mark.parametrize("name", [n for n in ACCELERATORS if n not in fitting(MaskedJob)])
def test_accelerators_of_other_families(name: str) -> None:
    with refused("does not work on mar models"):
        pipeline("mar-class")(0, accelerator=name)


@pytest.mark.parametrize("name", ["cspd", "fewer_steps", "feature_cache"])
@pytest.mark.parametrize("host", ["c2i", "var-class"])
def test_other_families(host: str, name: str) -> None:
    with refused("does not work on .* models; what does: .*plain"):
        pipeline(host)(0, accelerator=name)


def test_no_drafter() -> None:
    pipe = MARPipeline(mar_transformer("class"), kl_vae(), head_steps=4)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.drafters == {}
    with refused("came without a smaller one"):
        pipe(0, accelerator="cspd")
    assert len(pipe(0, seed=0, accelerator=CSpD(drafter=mar_transformer("class", seed=1))).images) == 1


@pytest.mark.parametrize(
    ("condition", "changes", "message"),
    [
        ("class", {"token_channels": 8}, "numbers per token 8 instead of 4"),
        ("class", {"grid_size": 5}, r"sides of grids or scales \(5,\)"),
        ("class", {"noise_schedule": "cosine"}, "noise schedule cosine instead of linear"),
        ("class", {"num_classes": 6}, "number of classes or width of text features 6"),
        ("caption", {}, "kind of condition caption instead of class"),
    ],
    ids=str,
)
def test_drafters_that_do_not_fit(condition: str, changes: dict[str, Any], message: str) -> None:
    accelerator = CSpD(drafter=mar_transformer(condition, **changes))
    with refused(message):
        pipeline("mar-class")(0, accelerator=accelerator)


def test_drafters_of_other_captions_and_families() -> None:
    with refused("width of text features 8 instead of 16"):
        pipeline("mar-caption")("a cube", accelerator=CSpD(drafter=mar_transformer("caption", caption_dim=8)))
    with refused("paradigm causal instead of masked"):
        pipeline("mar-class")(0, accelerator=CSpD(drafter=pipeline("c2i")))
    with pytest.raises(CheckpointError):
        pipeline("mar-class")(0, accelerator=CSpD(drafter="no-such-model"))


def test_a_drafter_on_another_device() -> None:
    with torch.device("meta"):
        small = MARTransformer(**sizes_of(mar_transformer("class")))
    with refused("on meta, the model on cpu"):
        pipeline("mar-class")(0, accelerator=CSpD(drafter=small))


def test_components_must_fit() -> None:
    network = mar_transformer("class")
    with refused("tokens of 4 numbers but the image tokenizer has 3"):
        MARPipeline(network, kl_vae(latent_channels=3))
    with refused("tokens of 8 numbers but the image tokenizer has 4"):
        MARPipeline(mar_transformer("class", token_channels=8), kl_vae())
    with refused("tokens of 8 numbers"):
        MARPipeline(network, kl_vae(), draft_transformer=mar_transformer("class", token_channels=8))
    with refused("text_encoder"):
        MARPipeline(mar_transformer("caption"), kl_vae())


# -- saving and loading --------------------------------------------------------------------------------


@on_hosts
def test_save_and_load(host: str, tmp_path: Path) -> None:
    pipe = pipeline(host)
    pipe.save_pretrained(tmp_path / "model")
    for loader in (MARPipeline, AutoPipeline):
        loaded = loader.from_pretrained(tmp_path / "model")
        loaded.set_progress_bar_config(disable=True)
        assert isinstance(loaded, MARPipeline)
        assert (loaded.config.guidance_scale, loaded.config.head_steps) == (2.0, 8)
        for accelerator in (None, "cspd"):
            ours = loaded(PROMPTS[host], seed=3, accelerator=accelerator, output_type="latent").images
            assert torch.equal(ours, latents(host, accelerator=accelerator))
        shown = loaded(PROMPTS[host], seed=3).images
        for a, b in zip(shown, pipe(PROMPTS[host], seed=3).images, strict=True):
            assert a.tobytes() == b.tobytes()


def test_the_head_is_loaded_in_full_precision(tmp_path: Path) -> None:
    pipeline("mar-class").save_pretrained(tmp_path / "model")
    loaded = MARPipeline.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    for network in (loaded.transformer, loaded.draft_transformer):
        assert network.dtype == torch.bfloat16
        assert {p.dtype for p in network.head.parameters()} == {torch.float32}
    loaded.set_progress_bar_config(disable=True)
    assert loaded(0, seed=0, accelerator="cspd").stats.dtype == "bfloat16"


def test_from_single_files(tmp_path: Path) -> None:
    """Two checkpoints in the published layout, whose widths tell the heads."""
    wide = {"dim": 768, "num_heads": 12, "mlp_ratio": 0.125, "decoder_depth": 1, "noise_schedule": "cosine"}
    networks = [mar_transformer("class", seed, **wide) for seed in (0, 1)]
    for number, network in enumerate(networks):
        torch.save({"model_ema": network.state_dict()}, tmp_path / f"{number}.pth")
    pipe = MARPipeline.from_single_file(
        tmp_path / "0.pth",
        vae=kl_vae(),
        draft_transformer=tmp_path / "1.pth",
        class_names=CLASSES,
        head_steps=4,
    )
    for ours, theirs in zip((pipe.transformer, pipe.draft_transformer), networks, strict=True):
        assert ours is not None
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert pipe.config.head_steps == 4
    assert pipe.config.guidance_scale == 3.0
    assert pipe.class_label("goldfish") == 1
    small = MARPipeline.from_single_file(tmp_path / "0.pth", vae=kl_vae(), draft_transformer=networks[1])
    assert small.draft_transformer is networks[1]
    with refused("not MAR-large", CheckpointError):
        MARPipeline.from_single_file(tmp_path / "0.pth", vae=kl_vae(), size="large")


def test_auto_is_plain_or_what_measured_best() -> None:
    pipe = pipeline("mar-caption")
    exact = pipe("a red sphere", seed=1, accelerator="auto", output_type="latent")
    assert exact.stats.accelerator == "plain"
    assert exact.stats.lossless
    fast = pipe("a red sphere", seed=1, accelerator=Auto(quality="approximate"), output_type="latent")
    assert fast.stats.label == f"fewer_steps(iterations={pipe.transformer.num_tokens // 8})"
    assert not fast.stats.lossless
    few = pipe("a red sphere", seed=1, num_iterations=1, accelerator=Auto(quality="approximate"))
    assert few.stats.passes == 1, "never more than the call asks for"


def test_casting_leaves_the_head_alone() -> None:
    """From the command line too, where a loaded pipeline is put into another precision."""
    network = mar_transformer("class")
    head = {name: value.clone() for name, value in network.head.state_dict().items()}
    cast(network, torch.bfloat16)
    assert network.dtype == torch.bfloat16
    assert all(torch.equal(value, head[name]) for name, value in network.head.state_dict().items())
    assert {p.dtype for n, p in network.named_parameters() if not n.startswith("diffloss.")} == {
        torch.bfloat16
    }
    pipe = MARPipeline(network, kl_vae(), head_steps=4)
    pipe.set_progress_bar_config(disable=True)
    assert pipe([0, 1], seed=0, output_type="latent").images.isfinite().all()
