"""The pipeline as a user calls it: every accelerator on every host, inputs good and bad, saving and loading."""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.tiny import (
    CLASSES,
    GRID,
    PROMPTS,
    SCALES,
    VOCAB_SIZE,
    drafting_pipeline,
    new_pipeline,
    pipeline,
    transformer,
    vq_model,
)
from varaccel import AutoPipeline, DynamicTree, Jacobi, LlamaGenPipeline, Plain, Speculative, ZipAR
from varaccel.accelerators import ACCELERATORS, fitting, make_accelerator
from varaccel.engine.balance import measure_balance
from varaccel.engine.job import Job
from varaccel.errors import CheckpointError, InputError
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.masked.job import MaskedJob
from varaccel.hosts.next_scale.job import ScaleJob
from varaccel.pipelines.auto import PIPELINE_CLASSES
from varaccel.pipelines.memory import OutOfMemory
from varaccel.tokenizers.text import WordTokenizer

HOSTS = ("c2i", "t2i")
PARADIGMS: dict[type[Job], tuple[str, ...]] = {
    CausalJob: HOSTS,
    ScaleJob: ("var-class", "var-caption", "infinity"),
    MaskedJob: ("mar-class", "mar-caption"),
}
"""Hosts that make each kind of job."""

CANVASES = {
    **dict.fromkeys(PARADIGMS[CausalJob], (GRID, GRID)),
    **dict.fromkeys(PARADIGMS[ScaleJob], (sum(side**2 for side in SCALES),)),
    **dict.fromkeys(PARADIGMS[MaskedJob], (4, GRID, GRID)),
}
"""Shape of one image's tokens, or of its latents."""


def on(*job_types: type[Job]) -> pytest.MarkDecorator:
    """Every accelerator that can do those kinds of jobs, on every host that makes them."""
    pairs = [(host, name) for kind in job_types for host in PARADIGMS[kind] for name in fitting(kind)]
    return pytest.mark.parametrize(("host", "name"), pairs)


every = on(*PARADIGMS)


def token_ids(host: str, prompts: Any, **options: Any) -> torch.Tensor:
    return pipeline(host)(prompts, output_type="latent", **options).images


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal tokens; latents are as equal as sums can be whose order depends on the size of the batch."""
    return torch.allclose(a, b, atol=1e-4, rtol=0) if a.is_floating_point() else torch.equal(a, b)


# -- what every accelerator owes on every host ---------------------------------------------------------


def test_no_kind_of_job_is_forgotten() -> None:
    """What the tests below do not know they would leave out in silence."""
    for name, accelerator in ACCELERATORS.items():
        assert any(issubclass(kind, accelerator.job_type) for kind in PARADIGMS), name
    assert {pipe.job_type for pipe in PIPELINE_CLASSES} == PARADIGMS.keys()
    for kind, hosts in PARADIGMS.items():
        assert all(pipeline(host).job_type is kind for host in hosts)


@every
def test_fills_the_canvas(host: str, name: str) -> None:
    out = pipeline(host)(PROMPTS[host], seed=3, accelerator=name, output_type="latent")
    assert out.images.shape == (3, *CANVASES[host])
    assert (out.written > 0).all()
    assert int(out.written.max()) == out.stats.passes
    if out.images.is_floating_point():
        assert out.images.isfinite().all()
        assert (out.images.flatten(2).std(2) > 0.01).all(), "tokens of an image differ"
    else:
        assert 0 <= int(out.images.min()) <= int(out.images.max()) < VOCAB_SIZE


@every
def test_deterministic_under_a_seed(host: str, name: str) -> None:
    first, again, other = (token_ids(host, PROMPTS[host], seed=s, accelerator=name) for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@every
def test_independent_of_the_batch(host: str, name: str) -> None:
    together = token_ids(host, PROMPTS[host], seed=11, accelerator=name)
    for index, prompt in enumerate(PROMPTS[host]):
        alone = token_ids(host, prompt, seed=11 + index, accelerator=name)
        assert same(alone[0], together[index])
        assert not same(alone[0], together[index - 1])


@every
def test_leaves_networks_and_global_randomness_alone(host: str, name: str) -> None:
    pipe = pipeline(host)
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    before = [{k: v.clone() for k, v in network.state_dict().items()} for network in networks]
    attributes = [set(vars(network)) for network in networks]
    torch.manual_seed(0)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    pipe(PROMPTS[host], seed=1, accelerator=name)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    assert [set(vars(network)) for network in networks] == attributes
    for network, old in zip(networks, before, strict=True):
        assert all(torch.equal(old[k], tensor) for k, tensor in network.state_dict().items())


@on(CausalJob)
def test_static_shapes_equal_dynamic_ones(host: str, name: str) -> None:
    """What a compiled network is given (fixed shapes, all slots) yields the same tokens as the eager path."""
    pipe = new_pipeline(host)
    expected = pipe(PROMPTS[host], seed=2, accelerator=name, output_type="latent").images
    shapes = set()

    def watched(x: torch.Tensor, attention: Any) -> torch.Tensor:
        shapes.add((x.shape, attention.length))
        return pipe.transformer.transform(x, attention)

    pipe._transforms = lambda network: watched if network is pipe.transformer else network.transform  # type: ignore[method-assign]
    assert torch.equal(pipe(PROMPTS[host], seed=2, accelerator=name, output_type="latent").images, expected)
    assert all(length is None for _, length in shapes)


# -- ZipAR ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("mode", ["masked", "published"])
def test_wide_window_is_plain_decoding(host: str, mode: str) -> None:
    plain = token_ids(host, PROMPTS[host], seed=4)
    for window in (GRID, GRID + 3):
        assert torch.equal(token_ids(host, PROMPTS[host], seed=4, accelerator=ZipAR(window, mode)), plain)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_zipar_passes(window: int) -> None:
    masked = pipeline("c2i")([0], seed=0, accelerator=ZipAR(window))
    published = pipeline("c2i")([0], seed=0, accelerator=ZipAR(window, mode="published"))
    assert masked.stats.passes == GRID + (GRID - 1) * window
    assert published.stats.passes == 2 * GRID + (GRID - 2) * window


# -- Jacobi and drafting --------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_gumbel_images_do_not_depend_on_the_window(host: str) -> None:
    one = token_ids(host, PROMPTS[host], seed=4, accelerator=Jacobi(window=1))
    for window in (2, 5, 99):
        assert torch.equal(token_ids(host, PROMPTS[host], seed=4, accelerator=Jacobi(window)), one)
    assert torch.equal(token_ids(host, PROMPTS[host], seed=4, accelerator="auto"), one)


def test_a_dynamic_tree_can_be_typed() -> None:
    """As a command line gives it: `-o tree={"top_k":3,"depth":2,"total":8}`."""
    pipe = drafting_pipeline("c2i")
    typed = make_accelerator("speculative", {"tree": {"top_k": 3, "depth": 2, "total": 8}})
    images = pipe(0, seed=1, accelerator=typed, output_type="latent").images
    made = Speculative(tree=DynamicTree(top_k=3, depth=2, total=8))
    assert torch.equal(images, pipe(0, seed=1, accelerator=made, output_type="latent").images)


def test_a_device_is_measured() -> None:
    balance = measure_balance(torch.device("cpu"), torch.float32)
    assert min(balance.rate, balance.bandwidth) > 0
    assert measure_balance(torch.device("cpu"), torch.float32) is balance, "once per process"


# -- arguments -----------------------------------------------------------------------------------------


def test_images_of_one_prompt_stand_together() -> None:
    pair = token_ids("t2i", ["a red sphere", "a blue cube"], num_images_per_prompt=2, seed=7)
    assert torch.equal(pair[2:], token_ids("t2i", "a blue cube", num_images_per_prompt=2, seed=9))


def test_classes_by_label_and_name() -> None:
    by_label = token_ids("c2i", 0, seed=0)
    for name in ("tench", "Tinca Tinca ", "0"):
        assert torch.equal(token_ids("c2i", name, seed=0), by_label)


def test_guidance_of_one_is_no_guidance() -> None:
    out = pipeline("t2i")("a red sphere", guidance_scale=1.0, seed=0)
    assert out.stats.rows == 1
    assert pipeline("t2i")("a red sphere", guidance_scale=3.0, seed=0).stats.rows == 2


def test_temperature_zero_is_greedy() -> None:
    assert torch.equal(
        token_ids("t2i", "cube", temperature=0.0, seed=0), token_ids("t2i", "cube", top_k=1, seed=9)
    )


def test_output_types() -> None:
    pipe, size = pipeline("c2i"), GRID * 2
    image = pipe(1, seed=0).images[0]
    assert isinstance(image, Image.Image)
    assert image.size == (size, size)
    array = pipe(1, seed=0, output_type="np").images
    tensor = pipe(1, seed=0, output_type="pt").images
    assert array.shape == (1, size, size, 3)
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy())
    assert np.abs(array[0] * 255 - np.asarray(image)).max() <= 1
    images, stats = pipe(1, seed=0, return_dict=False)
    assert images[0].tobytes() == image.tobytes()
    assert stats.tokens == GRID**2


def test_generators() -> None:
    def fresh(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    assert torch.equal(
        token_ids("c2i", [0, 1], generator=[fresh(5), fresh(6)]), token_ids("c2i", [0, 1], seed=5)
    )
    one = token_ids("c2i", [0, 1], generator=fresh(1))
    assert torch.equal(one, token_ids("c2i", [0, 1], generator=fresh(1)))
    assert not torch.equal(token_ids("c2i", 0), token_ids("c2i", 0)), "without a seed every call differs"


def test_callback_sees_every_pass_and_can_stop() -> None:
    pipe = new_pipeline("t2i")
    seen = []

    def callback(pipe: LlamaGenPipeline, step: int, tokens: int, state: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, tokens, int((state["canvas"].written > 0).sum())))
        if step == 4:
            pipe._interrupt = True
        return state

    out = pipe("a red cube", seed=0, callback_on_step_end=callback)
    assert seen == [(i, 1, i + 1) for i in range(5)]
    assert out.stats.passes == 5
    assert int((out.written > 0).sum()) == 5
    assert pipe("a red cube", seed=0).stats.passes == GRID**2, "the next call is not interrupted"


@pytest.mark.parametrize("output_type", ["pil", "latent"])
def test_callback_can_look_at_the_image_so_far(output_type: str) -> None:
    """Previews and the map of passes grow to what the call returns, and change nothing."""
    pipe = pipeline("t2i")
    previews, maps = [], []

    def callback(pipe: LlamaGenPipeline, step: int, tokens: int, state: dict[str, Any]) -> None:
        previews.append(np.asarray(state["preview"]()[0]))
        maps.append(state["written"]().clone())

    call: dict[str, Any] = {"seed": 0, "accelerator": "zipar", "output_type": output_type}
    out = pipe("a red cube", callback_on_step_end=callback, **call)
    assert [int((m > 0).sum()) for m in maps] == sorted(int((m > 0).sum()) for m in maps)
    assert torch.equal(maps[-1], out.written)
    assert not np.array_equal(previews[0], previews[-1])
    images = pipe("a red cube", **{**call, "output_type": "np" if output_type == "latent" else "pil"}).images
    assert np.array_equal(previews[-1], np.asarray(images[0]))
    assert len(previews) == out.stats.passes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "   "}, "prompt"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": 3}, "descriptions"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be an integer of at least 1"),
        ({"num_images_per_prompt": 1.5}, "integer"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"guidance_interval": -2}, "guidance_interval"),
        ({"guidance_interval": 2.5}, "guidance_interval"),
        ({"guidance_interval": True}, "guidance_interval"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": -0.1}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 0, "generator": torch.Generator()}, "either seed or generator"),
        ({"generator": [torch.Generator()] * 2}, "2"),
        ({"output_type": "jpeg"}, "pil"),
        ({"accelerator": "zippar"}, "did you mean 'zipar'"),
        ({"accelerator": 4}, "Accelerator"),
    ],
    # without addresses, so that every process collects the same names
    ids=lambda value: re.sub(r" at 0x[0-9a-f]+", "", str(value)),
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipeline("t2i")(**{"prompt": "a red sphere", **arguments})


@pytest.mark.parametrize("label", [-1, len(CLASSES), "goldfisch", "", True])
def test_bad_classes(label: Any) -> None:
    with pytest.raises(InputError, match=r"class"):
        pipeline("c2i")(label)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("zipar", {"windw": 3}, "did you mean 'window'"),
        ("zipar", {"window": 0}, "of at least 1"),
        ("zipar", {"window": 2.5}, "integer"),
        ("zipar", {"mode": "fast"}, "masked"),
        ("plain", {"window": 1}, "unknown option"),
        ("auto", {"quality": "good"}, "lossless"),
        ("speculative", {"tree": {"topk": 3}}, "did you mean 'top_k'"),
        ("speculative", {"tree": {"top_k": 0}}, "of at least 1"),
        ("none", {}, "unknown accelerator"),
    ],
)
def test_bad_accelerator_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_accelerator(name, options)


def test_unknown_and_endless_prompts_are_drawn() -> None:
    """Unknown words and text beyond the prefix change nothing about the call; the docstring says so."""
    assert token_ids("t2i", "a red zebra", seed=0).shape == (1, GRID, GRID)
    assert token_ids("t2i", "a red sphere " * 800, seed=0).shape == (1, GRID, GRID)


def test_components_must_fit() -> None:
    with pytest.raises(InputError, match="token ids"):
        LlamaGenPipeline(transformer("c2i"), vq_model(codebook_size=VOCAB_SIZE + 1))
    with pytest.raises(InputError, match="text_encoder"):
        LlamaGenPipeline(transformer("t2i"), vq_model())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 3.64 TiB for an array"),
        RuntimeError("std::bad_alloc"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("MPS backend out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
    ids=str,
)
@pytest.mark.parametrize("host", ["c2i", "var-class", "mar-class"])
def test_failed_allocations_of_all_kinds(
    error: Exception, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    pipe = pipeline(host)
    monkeypatch.setattr(type(pipe), "_job", fail)
    with pytest.raises(OutOfMemory, match="fewer than 2 images"):
        pipe(0, num_images_per_prompt=2, seed=0)


@pytest.mark.parametrize("host", ["c2i", "var-class", "mar-class"])
@pytest.mark.parametrize("count", [10**12, 10**9, 10**8])
def test_more_images_than_memory_holds_are_refused_at_once(
    host: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("memory was asked for")

    pipe = pipeline(host)
    monkeypatch.setattr("varaccel.pipelines.base.image_generators", fail)
    with pytest.raises(OutOfMemory, match=f"{count:,} images in one call"):
        pipe(0, num_images_per_prompt=count, seed=0)
    if hasattr(pipe, "inpaint"):
        side = pipe.image_size
        with pytest.raises(OutOfMemory, match=f"{count:,} images in one call"):
            pipe.inpaint(torch.rand(3, side, side), torch.ones(side, side), num_images=count, seed=0)


def test_out_of_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = new_pipeline("c2i")

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipe.transformer, "new_cache", fail)
    with pytest.raises(OutOfMemory, match="fewer than 2 images"):
        pipe([0, 1])


# -- saving and loading --------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_save_and_load(host: str, tmp_path: Path) -> None:
    pipe = pipeline(host)
    pipe.save_pretrained(tmp_path / "model")
    for loader in (LlamaGenPipeline, AutoPipeline):
        loaded = loader.from_pretrained(tmp_path / "model")
        loaded.set_progress_bar_config(disable=True)
        assert isinstance(loaded, LlamaGenPipeline)
        assert loaded.config.guidance_scale == 2.0
        expected = pipe(PROMPTS[host], seed=0).images
        for a, b in zip(loaded(PROMPTS[host], seed=0).images, expected, strict=True):
            assert a.tobytes() == b.tobytes()


def test_saving_again_keeps_the_card(tmp_path: Path) -> None:
    pipeline("c2i").save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("card")
    pipeline("c2i").save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "card"
    assert AutoPipeline.from_pretrained(tmp_path)(0, seed=0).stats.images == 1
    assert not list(tmp_path.parent.glob(".*.tmp"))


def test_full_disk_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    pipeline("c2i").save_pretrained(target)
    before = {p.relative_to(target): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    changed = new_pipeline("c2i")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(changed.vq_model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        changed.save_pretrained(target)
    assert {p.relative_to(target): p.read_bytes() for p in target.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_loading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="did you mean 'llamagen-c2i-xl-384'"):
        AutoPipeline.from_pretrained("llamagen-c2i-xl-834")
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        AutoPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        AutoPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(CheckpointError, match="unknown pipeline class"):
        AutoPipeline.from_pretrained(tmp_path)


def test_damaged_component(tmp_path: Path) -> None:
    pipeline("c2i").save_pretrained(tmp_path)
    file = next((tmp_path / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        AutoPipeline.from_pretrained(tmp_path)


def test_plain_is_the_default() -> None:
    assert torch.equal(token_ids("c2i", 0, seed=0), token_ids("c2i", 0, seed=0, accelerator=Plain()))


def test_unknown_words_are_named_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipeline("t2i")
    with caplog.at_level(logging.WARNING, logger="varaccel"):
        pipe(["a red sphere", "A Red CUBE!"], seed=0)
        assert not caplog.records
        pipe(["a red \udc80 zebra", "zebra left of a shiny2 cube"], seed=0)
        assert [r.getMessage() for r in caplog.records] == [
            "the model has never seen the words: zebra, shiny2; they are ignored."
        ]
        caplog.clear()
        pipe("a sphere " + " ".join(f"word{i}" for i in range(300)), seed=0)
        told = [r.getMessage() for r in caplog.records if "never seen" in r.getMessage()]
    assert len(told) == 1
    assert told[0].endswith("word9 and 290 more; they are ignored.")


def test_unknown_words_of_an_open_vocabulary_are_no_matter(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(WordTokenizer, "unknown_words")
    with caplog.at_level(logging.WARNING, logger="varaccel"):
        pipeline("t2i")("a zebra", seed=0)
    assert not caplog.records


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", ["plain", "zipar"])
def test_compiled_network_draws_the_same(name: str) -> None:
    """Compilation wraps the network from outside and changes nothing but rounding."""
    pipe = new_pipeline("t2i")
    expected = pipe(PROMPTS["t2i"], seed=0, accelerator=name, output_type="latent").images
    pipe.compile()
    compiled = pipe(PROMPTS["t2i"], seed=0, accelerator=name, output_type="latent").images
    assert (compiled == expected).float().mean() > 0.95
