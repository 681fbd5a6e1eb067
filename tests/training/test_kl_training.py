"""Training a KL tokenizer: loss, resume and export; latents of an image cache."""

from __future__ import annotations

import json
import math
import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from tests.scripts import ROOT
from varaccel.errors import CheckpointError, InputError
from varaccel.scenes.cache import CachedScenes, write_cache
from varaccel.tokenizers.kl import kl_config, patchify
from varaccel.tokenizers.vq import VQModel
from varaccel.training import latents as latents_module
from varaccel.training.images import on_device, to_images
from varaccel.training.kl import KLRecipe, KLTrainer, evaluate, latent_scale, pixel_batches
from varaccel.training.latents import encode_cache, encode_pixels, latents_path, main, read_latents
from varaccel.training.run import Budget
from varaccel.training.shards import fingerprint

RECIPE = KLRecipe(batch_size=4, warmup_steps=2, bfloat16=False)


def tiny(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    sizes = {"layers_per_block": 1, "attention_levels": 0, "norm_num_groups": 4, "sample_size": 32}
    return AutoencoderKL(**kl_config((8, 8, 16), 4, **sizes)).eval()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_cache(folder, first_seed=0, count=10, size=32, shard_size=4, progress=False)
    return folder


class Interrupted:
    """Images of a cache; asked for batch number `fail_at`, it stops the run as Ctrl-C would."""

    def __init__(self, data: CachedScenes, fail_at: int) -> None:
        self.data, self.fail_at, self.asked = data, fail_at, 0

    def __len__(self) -> int:
        return len(self.data)

    def batch_pixels(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        if self.asked == self.fail_at:
            raise KeyboardInterrupt
        self.asked += 1
        return self.data.batch_pixels(indices)


def trainer(
    scenes: Path,
    folder: Path,
    steps: int,
    recipe: KLRecipe = RECIPE,
    fail_at: int | None = None,
    **options: int,
) -> KLTrainer:
    data = CachedScenes(scenes)
    held_out = data.batch_pixels(range(8, 10))
    source = data if fail_at is None else Interrupted(data, fail_at)
    return KLTrainer(tiny(), source, held_out, folder, Budget(steps=steps), recipe, **options)


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# -- training ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_improves_and_exports_the_average(scenes: Path, tmp_path: Path) -> None:
    pixels = CachedScenes(scenes).batch_pixels(range(10))
    before = evaluate(tiny(), pixels)
    recipe = replace(RECIPE, learning_rate=4e-3)
    run = trainer(scenes, tmp_path, 40, recipe, log_every=10, evaluate_every=20)
    trained = run.train()
    assert evaluate(trained, pixels).psnr > before.psnr + 2
    logged = rows(tmp_path)
    losses = [row["loss"] for row in logged if "loss" in row]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert all(math.isfinite(value) for row in logged for value in row.values())
    measured = [row["held_out_psnr"] for row in logged if "held_out_psnr" in row]
    assert len(measured) == 2
    assert measured[-1] == pytest.approx(evaluate(trained, run.held_out).psnr, abs=1e-3)
    exported = AutoencoderKL.from_pretrained(tmp_path / "export")
    for name, value in run.average.average.items():
        assert torch.equal(dict(exported.named_parameters())[name], value), name


def test_exported_scale_makes_unit_variance(scenes: Path, tmp_path: Path) -> None:
    trainer(scenes, tmp_path, 2).train()
    exported = AutoencoderKL.from_pretrained(tmp_path / "export").eval()
    data = CachedScenes(scenes)
    assert exported.config.scaling_factor == pytest.approx(latent_scale(exported, data), rel=1e-6)
    assert latent_scale(exported, data, batch_size=3) == pytest.approx(latent_scale(exported, data), rel=0.1)
    with torch.no_grad():
        posterior = exported.encode(to_images(data.batch_pixels(range(10)))).latent_dist
    # the variance of samples is that of the means plus the mean of the variances
    variance = float(posterior.mean.var() + posterior.var.mean())
    assert exported.config.scaling_factor**2 * variance == pytest.approx(1, abs=0.1)


def test_resumed_run_ends_in_the_same_state(scenes: Path, tmp_path: Path) -> None:
    whole = trainer(scenes, tmp_path / "whole", 6)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(scenes, tmp_path / "parts", 6, fail_at=3).train()
    assert not (tmp_path / "parts" / "export").exists()
    rest = trainer(scenes, tmp_path / "parts", 6)
    assert rest.run.step == 3
    rest.train()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[name]), name
    for name, value in whole.average.average.items():
        assert torch.equal(value, rest.average.average[name]), name


def test_divergence_is_that_of_the_posterior(scenes: Path, tmp_path: Path) -> None:
    run = trainer(scenes, tmp_path, 1, replace(RECIPE, kl_weight=0.5))
    images = to_images(run.held_out)
    noise = torch.randn(len(images), *run.latent_shape)
    with torch.no_grad():
        loss, terms = run._losses(images, noise)
        posterior = run.model.encode(images).latent_dist
        distribution = torch.distributions.Normal(posterior.mean, posterior.std)
        expected = torch.distributions.kl_divergence(
            distribution, torch.distributions.Normal(0.0, 1.0)
        ).mean()
        without, _ = trainer(scenes, tmp_path, 1, replace(RECIPE, kl_weight=0.0))._losses(images, noise)
    torch.testing.assert_close(terms["kl"], expected)
    torch.testing.assert_close(loss - without, 0.5 * expected, rtol=1e-4, atol=1e-5)


def test_batches_are_a_function_of_seed_and_step(scenes: Path) -> None:
    data = CachedScenes(scenes)
    with pixel_batches(data, RECIPE, 0) as batches:
        first = [next(batches) for _ in range(4)]
    with pixel_batches(data, RECIPE, 2) as batches:
        assert torch.equal(next(batches), first[2])
    assert not torch.equal(first[0], first[1])
    assert first[0].dtype == torch.uint8
    assert first[0].shape == (4, 32, 32, 3)
    torch.testing.assert_close(on_device(first[0], torch.device("cpu")), to_images(first[0].numpy()))


def test_other_recipe_does_not_resume(scenes: Path, tmp_path: Path) -> None:
    trainer(scenes, tmp_path, 1).train()
    with pytest.raises(CheckpointError, match="recipe"):
        trainer(scenes, tmp_path, 1, replace(RECIPE, learning_rate=0.5))


def test_bad_recipes_and_data(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch_size"):
        KLRecipe(batch_size=0)
    with pytest.raises(InputError, match="kl_weight"):
        KLRecipe(kl_weight=-1.0)
    data = CachedScenes(scenes)
    for pixels, complaint in (
        (data.batch_pixels([0])[:0], "held-out"),
        (data.batch_pixels([0])[:, 1:], "of 4"),
    ):
        with pytest.raises(InputError, match=complaint):
            KLTrainer(tiny(), data, pixels, tmp_path, Budget(steps=1), RECIPE)


def test_shipped_recipe_fits_in_two_and_a_half_megabytes() -> None:
    config = json.loads((ROOT / "tokenizers" / "kl_scenes.json").read_text())
    KLRecipe(**config["recipe"])
    model = AutoencoderKL(**kl_config(**config["model"]))
    assert sum(p.numel() for p in model.parameters()) <= 1_250_000
    assert model.config.mid_block_add_attention
    with torch.no_grad():
        posterior = model.encode(torch.zeros(1, 3, 128, 128)).latent_dist
    assert posterior.mean.shape == (1, 4, 16, 16)


def test_training_script(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "model": {
            "block_out_channels": [8, 8],
            "latent_channels": 4,
            "norm_num_groups": 4,
            "layers_per_block": 1,
        },
        "recipe": {"batch_size": 2},
    }
    (tmp_path / "kl.json").write_text(json.dumps(config))
    script = runpy.run_path(str(ROOT / "tokenizers" / "train_kl_scenes.py"))

    def run(out: str, *changes: str) -> int:
        command = ["train", "--config", str(tmp_path / "kl.json"), "--data", str(scenes), "--held-out", "2"]
        command += ["--out", str(tmp_path / out), "--steps", "1", *changes]
        monkeypatch.setattr(sys, "argv", command)
        return int(script["main"]())

    def recipe(out: str) -> dict[str, float]:
        return torch.load(tmp_path / out / "checkpoint.pt", weights_only=True)["settings"]["recipe"]

    assert run("run") == 0
    assert json.loads((tmp_path / "run" / "quality.json").read_text())["images"] == 2
    assert (tmp_path / "run" / "export" / "config.json").is_file()
    assert recipe("run")["learning_rate"] == KLRecipe.learning_rate
    assert run("large", "--batch-size", "64") == 0
    assert recipe("large")["learning_rate"] == script["LARGE_BATCH_RATE"]
    assert run("bad", "--batch-size", "0") == 2
    assert "batch_size" in capsys.readouterr().err


# -- latents -------------------------------------------------------------------------------------------


def encode(vae: AutoencoderKL, scenes: Path, out: Path, patch: int = 1) -> None:
    encode_cache(vae, scenes, out, patch=patch, batch_size=3, progress=False)


@pytest.mark.parametrize("patch", [1, 2])
def test_latents_are_those_of_the_images(scenes: Path, tmp_path: Path, patch: int) -> None:
    vae = tiny()
    vae.register_to_config(scaling_factor=0.7)
    encode(vae, scenes, tmp_path, patch)
    latents, manifest = read_latents(tmp_path)
    assert latents.dtype == torch.float16
    assert latents.shape == (10, 2, (8 // patch) ** 2, 4 * patch * patch)
    assert [len(np.load(latents_path(tmp_path, i))) for i in range(3)] == [4, 4, 2]
    assert (manifest.tokenizer, manifest.scaling_factor) == (fingerprint(vae), 0.7)
    assert (manifest.grid, manifest.channels) == ((8 // patch, 8 // patch), 4 * patch * patch)
    assert (manifest.world, manifest.size, manifest.shard_size) == (
        CachedScenes(scenes).manifest.version,
        32,
        4,
    )
    with torch.no_grad():
        posterior = vae.encode(to_images(CachedScenes(scenes).batch_pixels(range(10)))).latent_dist
    expected = torch.stack([patchify(posterior.mean, patch), patchify(posterior.std, patch)], 1)
    torch.testing.assert_close(latents.float(), expected, rtol=2e-3, atol=1e-4)


def test_only_missing_shards_are_encoded(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = tiny()
    encode(vae, scenes, tmp_path)
    latents, _ = read_latents(tmp_path)
    latents_path(tmp_path, 1).unlink()
    assert len(read_latents(tmp_path)[0]) == 4
    counts: list[int] = []

    def counting(vae: AutoencoderKL, pixels: NDArray[np.uint8], patch: int) -> NDArray[np.float16]:
        counts.append(len(pixels))
        return encode_pixels(vae, pixels, patch)

    monkeypatch.setattr(latents_module, "encode_pixels", counting)
    encode(vae, scenes, tmp_path)
    assert sum(counts) == 4
    assert torch.equal(read_latents(tmp_path)[0], latents)


def test_fingerprint_sees_what_decides_the_latents() -> None:
    vae = tiny()
    expected = fingerprint(tiny())
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 1e-3
    assert fingerprint(vae) == expected
    with torch.no_grad():
        vae.quant_conv.bias[0] += 1e-3
    assert fingerprint(vae) != expected


def test_latents_of_other_tokenizers_do_not_mix(scenes: Path, tmp_path: Path) -> None:
    encode(tiny(), scenes, tmp_path)
    with pytest.raises(CheckpointError, match="latents made with another tokenizer"):
        encode(tiny(seed=1), scenes, tmp_path)
    other = tiny()
    other.register_to_config(scaling_factor=0.7)
    with pytest.raises(CheckpointError, match="another scaling_factor"):
        encode(other, scenes, tmp_path)


def test_bad_latents(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a cache"):
        encode(tiny(), tmp_path / "nothing", tmp_path)
    with pytest.raises(InputError, match="another patch"):
        encode(tiny(), scenes, tmp_path, patch=3)
    with pytest.raises(InputError, match="no latents"):
        read_latents(tmp_path)
    encode(tiny(), scenes, tmp_path)
    latents_path(tmp_path, 0).write_bytes(b"not an array")
    with pytest.raises(CheckpointError, match="damaged"):
        read_latents(tmp_path)
    np.save(latents_path(tmp_path, 0), np.zeros((4, 2, 64, 3), dtype=np.float16))
    with pytest.raises(CheckpointError, match="does not match"):
        read_latents(tmp_path)
    latents_path(tmp_path, 0).unlink()
    with pytest.raises(InputError, match="no finished shard"):
        read_latents(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read"):
        read_latents(tmp_path)


def test_command_line(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny().save_pretrained(tmp_path / "kl")
    arguments = ["--scenes", str(scenes), "--out", str(tmp_path / "latents")]
    assert main(["--tokenizer", str(tmp_path / "kl"), *arguments]) == 0
    assert read_latents(tmp_path / "latents")[1].tokenizer == fingerprint(tiny())
    assert main(["--tokenizer", str(tmp_path / "missing"), *arguments]) == 2
    assert "no tokenizer" in capsys.readouterr().err
    sizes = {"base_channels": 8, "channel_multipliers": (1, 1), "num_res_blocks": 1, "z_channels": 8}
    VQModel(**sizes, codebook_size=8, codebook_dim=4, norm_groups=4).save_pretrained(tmp_path / "vq")
    assert main(["--tokenizer", str(tmp_path / "vq"), *arguments]) == 2
    assert "holds a VQModel" in capsys.readouterr().err
