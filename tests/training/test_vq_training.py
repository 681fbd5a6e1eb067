"""Losses of tokenizer training, code revival, and a run that is stopped and resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from varaccel.errors import CheckpointError, InputError
from varaccel.tokenizers.vq import VQModel
from varaccel.training.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from varaccel.training.images import colorful_crop, to_images
from varaccel.training.perceptual import RandomFeatureLoss, laplacian_loss, ssim_loss
from varaccel.training.reconstruction import chroma_loss
from varaccel.training.run import Budget, ExponentialAverage
from varaccel.training.shards import fingerprint
from varaccel.training.vq import (
    CODEBOOK_KEY,
    CodeRevival,
    VQRecipe,
    VQTrainer,
    entropy_loss,
    evaluate,
    perplexity,
)

RECIPE = VQRecipe(batch_size=4, warmup_steps=2, revive_every=2, bfloat16=False, feature_weight=0.1)


def tiny(seed: int = 0) -> VQModel:
    torch.manual_seed(seed)
    return VQModel(
        base_channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        z_channels=8,
        codebook_size=32,
        codebook_dim=4,
        norm_groups=4,
    )


def discs(count: int, seed: int, size: int = 16) -> NDArray[np.uint8]:
    """Images uint8 [count, size, size, 3] of a coloured disc on a coloured ground."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    pixels = np.empty((count, size, size, 3), dtype=np.uint8)
    for image in pixels:
        centre, radius = generator.uniform(4, size - 4, 2), generator.uniform(2, 5)
        inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
        image[:] = np.where(
            inside[..., None], generator.integers(256, size=3), generator.integers(256, size=3)
        )
    return pixels


class Discs:
    """Images by index; asked for batch number `fail_at`, it stops the run as Ctrl-C would."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.images = discs(40, seed=1)
        self.asked = 0
        self.fail_at = fail_at

    def __len__(self) -> int:
        return len(self.images)

    def batch_pixels(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        if self.asked == self.fail_at:
            raise KeyboardInterrupt
        self.asked += 1
        return self.images[list(indices)]


def trainer(
    folder: Path, steps: int, recipe: VQRecipe = RECIPE, data: Discs | None = None, **options: int
) -> VQTrainer:
    held_out = discs(8, seed=2)
    return VQTrainer(tiny(), data or Discs(), held_out, folder, Budget(steps=steps), recipe, **options)


def test_resumed_run_ends_in_the_same_state(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", 6)
    whole.train()
    try:
        trainer(tmp_path / "parts", 6, data=Discs(fail_at=3)).train()
        stopped = False
    except KeyboardInterrupt:
        stopped = True
    assert stopped
    rest = trainer(tmp_path / "parts", 6)
    assert rest.run.step == 3
    rest.train()
    assert rest.run.step == 6
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[name]), name
    for name, value in whole.average.average.items():
        assert torch.equal(value, rest.average.average[name]), name
    assert torch.equal(whole.revival.counts, rest.revival.counts)


@pytest.mark.slow
def test_training_improves_reconstruction_and_exports_the_average(tmp_path: Path) -> None:
    held_out = discs(8, seed=2)
    before = evaluate(tiny().eval(), held_out)
    run = trainer(tmp_path, 32, replace(RECIPE, learning_rate=4e-3), log_every=8, evaluate_every=32)
    after = evaluate(run.train(), held_out)
    assert after.psnr > before.psnr + 1
    assert after.ssim > before.ssim + 0.15
    assert after.perplexity > before.perplexity
    exported = VQModel.from_pretrained(tmp_path / "export").eval()
    for name, value in run.average.average.items():
        assert torch.equal(dict(exported.named_parameters())[name], value), name
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum("l1" in row for row in rows) == 4
    assert [row["held_out_psnr"] for row in rows if "held_out_psnr" in row] == [
        pytest.approx(after.psnr, abs=1e-3)
    ]


def test_other_recipe_does_not_resume(tmp_path: Path) -> None:
    trainer(tmp_path, 1).train()
    with pytest.raises(CheckpointError, match="recipe"):
        trainer(tmp_path, 1, replace(RECIPE, learning_rate=0.5))


def test_discriminator_joins_and_learns(tmp_path: Path) -> None:
    recipe = replace(RECIPE, adversarial_weight=0.5, adversarial_start=0.5)
    held_out = discs(8, seed=2, size=32)
    data = Discs()
    data.images = discs(40, seed=1, size=32)
    run = VQTrainer(tiny(), data, held_out, tmp_path, Budget(steps=4), recipe, log_every=1)
    assert run.discriminator is not None
    before = [p.detach().clone() for p in run.discriminator.parameters()]
    run.train()
    assert all(not torch.equal(a, b) for a, b in zip(before, run.discriminator.parameters(), strict=True))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert ["generator_loss" in row for row in rows] == [False, False, True, True]
    assert all(math.isfinite(row["discriminator_loss"]) for row in rows[2:])


def test_decoder_alone_improves_and_leaves_the_token_ids(tmp_path: Path) -> None:
    held_out = discs(8, seed=2)
    model = tiny()
    before = evaluate(model.eval(), held_out)
    kept = fingerprint(model)
    recipe = replace(RECIPE, learning_rate=4e-3)
    run = VQTrainer(model, Discs(), held_out, tmp_path, Budget(steps=24), recipe, decoder_only=True)
    trained = run.train()
    assert fingerprint(trained) == kept
    assert evaluate(trained, held_out).psnr > before.psnr + 1
    with pytest.raises(CheckpointError, match="decoder_only"):
        trainer(tmp_path, 24, recipe)


def test_bad_recipes_and_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch_size"):
        VQRecipe(batch_size=0)
    with pytest.raises(InputError, match="held-out"):
        VQTrainer(tiny(), Discs(), discs(0, 0), tmp_path, Budget(steps=1), RECIPE)
    with pytest.raises(InputError, match="multiples of 2"):
        VQTrainer(tiny(), Discs(), discs(1, 0, size=15), tmp_path, Budget(steps=1), RECIPE)


def test_entropy_loss_extremes() -> None:
    sure_and_even = torch.eye(8)  # each site on another entry
    sure_and_collapsed = torch.zeros(8, 8)
    sure_and_collapsed[:, 0] = 1
    unsure = torch.zeros(8, 8)
    assert float(entropy_loss(sure_and_even, 0.01)) == pytest.approx(-math.log(8), abs=1e-4)
    assert float(entropy_loss(sure_and_collapsed, 0.01)) == pytest.approx(0, abs=1e-4)
    assert float(entropy_loss(unsure, 0.01)) == pytest.approx(0, abs=1e-4)


def test_perplexity() -> None:
    assert perplexity(torch.tensor([5, 5, 0, 5, 5])) == pytest.approx(4)
    assert perplexity(torch.tensor([9, 0, 0])) == pytest.approx(1)


def test_laplacian_pyramid_separates_scales() -> None:
    zero = torch.zeros(1, 3, 16, 16)
    assert float(laplacian_loss(zero, zero)) == 0
    # a constant shift is left to the pixel terms
    assert float(laplacian_loss(zero + 0.5, zero)) == 0
    checker = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    # the finest level sees all of a checkerboard, the others nothing
    assert float(laplacian_loss(zero + checker, zero)) == pytest.approx(1)
    blocks = checker[:8, :8].repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert float(laplacian_loss(zero + blocks, zero, levels=1)) == pytest.approx(0)
    assert float(laplacian_loss(zero + blocks, zero, levels=2)) == pytest.approx(1)


def test_ssim_loss_is_the_mean_over_windows() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, 12, 12, generator=generator)
    b = (a + 0.2 * torch.randn(a.shape, generator=generator)).clamp(0, 1)
    x, y = (image.unfold(2, 7, 1).unfold(3, 7, 1).flatten(4).double() for image in (a, b))
    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = x.mean(-1), y.mean(-1)
    covariance = ((x - mean_x[..., None]) * (y - mean_y[..., None])).mean(-1)
    similarity = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    similarity *= (2 * covariance + c2) / (x.var(-1, correction=0) + y.var(-1, correction=0) + c2)
    assert float(ssim_loss(a, b)) == pytest.approx(1 - float(similarity.mean()), abs=1e-4)
    assert float(ssim_loss(a, a)) == pytest.approx(0, abs=1e-5)


def test_random_features_repeat_and_grow_with_blur() -> None:
    images = to_images(discs(4, seed=3, size=32))
    loss = RandomFeatureLoss()
    slight, strong = (F.avg_pool2d(images, k, 1, k // 2) for k in (3, 9))
    assert float(loss(images, images)) == 0
    assert 0 < float(loss(slight, images)) < float(loss(strong, images))
    assert float(loss(slight, images)) == float(RandomFeatureLoss()(slight, images))
    assert float(loss(slight, images)) != float(RandomFeatureLoss(seed=1)(slight, images))


def test_discriminator_shapes_and_losses() -> None:
    scores = PatchDiscriminator()(torch.zeros(2, 3, 64, 64))
    assert scores.shape[:2] == (2, 1)
    assert float(discriminator_loss(torch.full((3,), 2.0), torch.full((3,), -2.0))) == 0
    assert float(discriminator_loss(torch.zeros(3), torch.zeros(3))) == 1
    assert float(generator_loss(torch.tensor([1.0, 3.0]))) == -2
    weight = torch.ones(2, requires_grad=True)
    assert float(adaptive_weight((3 * weight).sum(), weight.sum(), weight)) == pytest.approx(3, rel=1e-3)


def test_revival_moves_only_unused_entries() -> None:
    model = tiny().train()
    average = ExponentialAverage(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(to_images(discs(4, 1))).similarity.sum().backward()
    optimizer.step()
    output = model(to_images(discs(4, 1)))
    weight = model.quantize.embedding.weight
    before = weight.detach().clone()
    used = torch.zeros(32, dtype=torch.bool)
    used[output.indices.flatten()] = True
    assert 0 < int(used.sum()) < 32
    revival = CodeRevival(32, every=1, seed=0)
    assert revival.update(model, average, optimizer, output, 0, enabled=False) == 0
    assert torch.equal(weight, before)
    revived = revival.update(model, average, optimizer, output, 1, enabled=True)
    assert 0 < revived <= int((~used).sum())
    changed = (weight != before).any(-1)
    assert int(changed.sum()) == revived
    assert not changed[used].any()
    # every new row is one of the latents, also in the average, and its optimiser state is fresh
    assert (torch.cdist(weight[changed], output.latents).min(-1).values < 1e-3).all()
    assert torch.equal(average.average[CODEBOOK_KEY][changed], weight[changed])
    assert (optimizer.state[weight]["exp_avg"][changed] == 0).all()
    assert (optimizer.state[weight]["exp_avg"][used] != 0).any()


def test_to_images_range() -> None:
    pixels = np.array([[[[0, 255, 51]]]], dtype=np.uint8)
    torch.testing.assert_close(to_images(pixels).flatten(), torch.tensor([-1.0, 1.0, -0.6]))


def test_crop_takes_the_most_colourful_candidate() -> None:
    pixels = np.full((32, 32, 3), 128, dtype=np.uint8)
    pixels[20:28, 20:28] = (255, 0, 0)
    generator = np.random.default_rng(0)
    crops = [colorful_crop(pixels, 16, 12, generator) for _ in range(20)]
    assert all(crop.shape == (16, 16, 3) for crop in crops)
    assert all((crop[..., 0] == 255).any() for crop in crops)
    # a single candidate is a uniform draw, which often misses the square
    single = [colorful_crop(pixels, 8, 1, generator) for _ in range(60)]
    assert not all((crop[..., 0] == 255).any() for crop in single)


def test_crops_give_way_to_whole_images(tmp_path: Path) -> None:
    recipe = replace(RECIPE, crop_size=8, crop_batch_size=6, crop_until=0.5)
    run = trainer(tmp_path, 4, recipe)
    shapes = [tuple(run._batch(step).shape) for step in run.run.steps()]
    assert shapes == [(6, 3, 8, 8)] * 2 + [(4, 3, 16, 16)] * 2
    assert torch.equal(run._batch(3), run._batch(3))
    assert not torch.equal(run._batch(3), run._batch(2))


def test_chroma_loss_ignores_brightness() -> None:
    grey = torch.full((1, 3, 2, 2), 0.3)
    assert float(chroma_loss(grey)) == pytest.approx(0, abs=1e-6)
    red = torch.zeros(1, 3, 2, 2)
    red[:, 0] = 1
    assert float(chroma_loss(red)) == pytest.approx(1.5)
