"""Published MAR models by name. The hub is a folder here; the files in it are tiny and have the published layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from tests.tiny import kl_vae, mar_transformer
from varaccel import AutoPipeline, MARPipeline
from varaccel.accelerators import ACCELERATORS
from varaccel.errors import CheckpointError
from varaccel.pipelines.auto import PIPELINE_CLASSES
from varaccel.pipelines.catalog import PUBLISHED

MIRROR = "jadechoghari/mar"
ORIGINAL = "773c9bdcd98740c7b876ce0d66f684a0e2468990"
"""The mirror's commit that has the published checkpoint of MAR-B."""


class Hub:
    """Stands for the hub: any file of it is one of two transformers, averaged weights and trained ones."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self.tokenizers: list[str] = []
        monkeypatch.setattr("varaccel.pipelines.published.hf_hub_download", self.download)
        monkeypatch.setattr("varaccel.pipelines.mar.load_kl", self.load_kl)
        # a published width, which tells the number of heads
        sizes = {"dim": 768, "num_heads": 12, "decoder_depth": 1, "mlp_ratio": 0.25, "num_classes": 1000}
        # the checkpoints do not tell the noise either: it is that of the published models
        model = mar_transformer("class", **sizes, noise_schedule="cosine")
        self.averaged = model.state_dict()
        self.trained = {name: value + 1 for name, value in self.averaged.items()}

    def download(self, repository: str, name: str, **options: Any) -> str:
        self.asked.append((repository, name, options))
        path = self.folder / name
        if path.suffix == ".pth":
            torch.save({"model": self.trained, "model_ema": self.averaged, "epoch": 799}, path)
        elif name.startswith("mar"):
            save_file(self.averaged, path)
        return str(path)

    def load_kl(self, path: str) -> AutoencoderKL:
        self.tokenizers.append(Path(path).name)
        return kl_vae()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("name", "weights", "tokenizer", "scale", "revision"),
    [
        ("mar-base", "checkpoint-last.pth", "kl16.ckpt", 2.9, {"revision": ORIGINAL}),
        ("mar-large", "mar-large.safetensors", "kl16.safetensors", 3.0, {}),
        ("mar-huge", "mar-huge.safetensors", "kl16.safetensors", 3.2, {}),
    ],
)
def test_published_model_by_name(
    name: str, weights: str, tokenizer: str, scale: float, revision: dict[str, str], hub: Hub
) -> None:
    pipe = AutoPipeline.from_pretrained(name, cache_dir="there")
    assert isinstance(pipe, MARPipeline)
    asked = {"cache_dir": "there", **revision}
    assert hub.asked == [(MIRROR, weights, asked), (MIRROR, tokenizer, asked)]
    assert hub.tokenizers == [tokenizer]
    state = pipe.transformer.state_dict()
    assert all(torch.equal(state[key], value) for key, value in hub.averaged.items())
    settings = pipe.config
    assert (settings.guidance_scale, settings.guidance_schedule, settings.temperature) == (
        scale,
        "linear",
        1.0,
    )
    assert (settings.num_iterations, settings.head_steps, settings.head_sampler) == (None, 100, "ddpm")
    assert len(settings.class_names) == 1000
    assert pipe.class_label("goldfish") == 1
    assert pipe.drafters == {}


def test_it_draws(hub: Hub) -> None:
    pipe: Any = AutoPipeline.from_pretrained("mar-base")
    pipe.set_progress_bar_config(disable=True)
    output = pipe(["tench", 1], seed=0, head_steps=2)
    assert [image.size for image in output.images] == [(pipe.image_size, pipe.image_size)] * 2
    assert output.stats.passes == pipe.transformer.num_tokens, "one iteration per token unless told otherwise"


def test_a_revision_of_ones_own(hub: Hub) -> None:
    AutoPipeline.from_pretrained("mar-base", revision="main")
    assert [options for *_, options in hub.asked] == [{"revision": "main"}] * 2


def test_another_precision_is_not_for_the_image_tokenizer(hub: Hub) -> None:
    pipe: Any = AutoPipeline.from_pretrained("mar-huge", dtype=torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.float32


def test_failed_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("varaccel.pipelines.published.hf_hub_download", fail)
    with pytest.raises(
        CheckpointError, match=r"could not be downloaded from jadechoghari/mar.*MARPipeline\.from"
    ) as caught:
        AutoPipeline.from_pretrained("mar-large")
    assert "\n" not in str(caught.value)


def test_families_are_those_of_pipelines_and_accelerators() -> None:
    families: set[str] = {pipeline.family for pipeline in PIPELINE_CLASSES}
    assert {model.family for model in PUBLISHED.values()} <= families
    jobs = [pipeline.job_type for pipeline in PIPELINE_CLASSES]
    for name, accelerator in ACCELERATORS.items():
        assert any(issubclass(job, accelerator.job_type) for job in jobs), f"no pipeline for {name}"
    starts: dict[str, Callable[[str], bool]] = {
        family: lambda name, family=family: name.startswith(f"{family}-") for family in families
    }
    for name, model in PUBLISHED.items():
        assert [family for family, fits in starts.items() if fits(name)] == [model.family]
