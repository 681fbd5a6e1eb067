"""Options of `from_pretrained` that transformers takes: offloading, quantised weights, attention implementations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import varaccel
from tests import tiny_transformers as tiny
from tests.transformers_cases import RECENT, quiet
from varaccel.accelerators import AnyAccelerator
from varaccel.errors import InputError, NumberError
from varaccel.pipelines.janus import JanusPipeline

PROMPTS = ["a red sphere", "a blue cube left of a red sphere"]
ACCELERATED: list[AnyAccelerator] = [varaccel.Jacobi(4), varaccel.Speculative("layers", 3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Janus as transformers saves it."""
    tiny.janus().save_pretrained(tmp_path / "janus")
    tiny.janus_processor().save_pretrained(tmp_path / "janus")
    return tmp_path / "janus"


def loaded(folder: Path, **options: Any) -> Any:
    return quiet(varaccel.AutoPipeline.from_pretrained(folder, **options))


def drawn(pipe: Any, accelerator: AnyAccelerator | None = None, **options: Any) -> Tensor:
    images: Tensor = pipe(
        PROMPTS, seed=0, accelerator=accelerator, output_type="latent", **{"temperature": 0, **options}
    ).images
    return images


recent = pytest.mark.skipif(not RECENT, reason="weights on disk need a newer transformers")


@recent
@pytest.mark.parametrize(
    "options", [{"device_map": "auto"}, {"device_map": {"": "disk"}}], ids=["auto", "disk"]
)
def test_weights_on_disk_draw_what_weights_in_memory_draw(
    folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    if options["device_map"] == "auto":
        options = {**options, "max_memory": {"cpu": "100KB"}}
    pipe = loaded(folder, offload_folder=tmp_path / "offloaded", **options)
    assert any(weight.is_meta for weight in pipe.transformer.parameters())
    whole = loaded(folder)
    for accelerator in (varaccel.Plain(), *ACCELERATED):
        assert torch.equal(drawn(pipe, accelerator), drawn(whole, accelerator))
    pixels = [p("cone", seed=0, temperature=0, output_type="pt").images for p in (pipe, whole)]
    assert torch.equal(*pixels)


@recent
def test_a_saved_pipeline_takes_the_options_too(folder: Path, tmp_path: Path) -> None:
    whole = loaded(folder)
    whole.save_pretrained(tmp_path / "pipeline")
    again = loaded(tmp_path / "pipeline", attn_implementation="eager", device_map={"": "disk"})
    assert again.transformer.decoder.config._attn_implementation == "eager"
    assert any(weight.is_meta for weight in again.transformer.parameters())
    assert torch.equal(drawn(again, varaccel.Jacobi(4)), drawn(whole, varaccel.Jacobi(4)))


def test_attention_implementations(folder: Path) -> None:
    expected = drawn(loaded(folder))
    eager = loaded(folder, attn_implementation="eager")
    assert eager.transformer.decoder.config._attn_implementation == "eager"
    for accelerator in (varaccel.Plain(), *ACCELERATED):
        assert torch.equal(drawn(eager, accelerator), expected)
    with pytest.raises(
        InputError, match="'flex_attention' takes no masks of draft tokens; load the model with"
    ) as raised:
        loaded(folder, attn_implementation={"text_config": "flex_attention"})
    assert "\n" not in str(raised.value)


# -- quantised weights, where the libraries are installed ---------------------------------------------------


def torchao_weights() -> Any:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quanto() -> Any:
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


def bitsandbytes() -> Any:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["generation_head"])


@pytest.mark.slow
@pytest.mark.parametrize("configuration", [torchao_weights, quanto, bitsandbytes])
def test_quantised_models_draw_alike_by_every_lossless_method(
    folder: Path, configuration: Callable[[], Any]
) -> None:
    pipe = loaded(folder, quantization_config=configuration())
    weight = pipe.transformer.layers[0].self_attn.k_proj.weight
    assert type(weight) is not torch.nn.Parameter
    assert pipe.transformer.dtype == torch.float32  # of what is computed, and of the cache
    expected = drawn(pipe)
    for accelerator in ACCELERATED:
        assert torch.equal(drawn(pipe, accelerator), expected)
    sampled = pipe("cone", seed=0, output_type="latent")
    assert sampled.stats.dtype == "float32"


def test_checks_name_the_number_type_that_is_computed_in() -> None:
    """Not that of packed weights."""
    model = tiny.janus()
    embedding = model.model.language_model.embed_tokens.weight
    pipe = quiet(JanusPipeline(model, tiny.janus_processor()))
    with torch.no_grad():
        next(iter(model.model.language_model.layers[1].parameters())).fill_(torch.nan)
    embedding.requires_grad_(False)
    embedding.data = embedding.data.to(torch.int8)
    packed = torch.nn.functional.embedding
    model.model.language_model.embed_tokens.forward = lambda ids: packed(ids, embedding.data.float())
    with pytest.raises(NumberError, match="in float32"):
        drawn(pipe)
