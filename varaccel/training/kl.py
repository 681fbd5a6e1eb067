"""Training a KL image tokenizer from scratch, in minutes on a GPU or an hour on a CPU.

The losses are those of latent diffusion (Rombach et al. 2022, arXiv 2112.10752, section 3.1) with the structural
terms of `training.vq` in place of a pretrained perceptual network, and without a discriminator.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from varaccel.errors import InputError
from varaccel.files import atomic_path
from varaccel.training.precision import quick_bfloat16
from varaccel.training.run import Budget, ExponentialAverage, Schedule, TrainingRun, model_settings
from varaccel.training.vq import PixelSource, reconstruction_terms, summed_likeness, to_images

SCALE_IMAGES = 2048
"""From how many images the scaling factor of latents is measured."""


@dataclass(frozen=True)
class KLRecipe:
    """How a KL tokenizer is trained.

    Attributes:
        batch_size, learning_rate, warmup_steps, betas, clip_norm, average_decay, flip, seed: as in `VQRecipe`.
        bfloat16: run convolutions under bfloat16 autocast, where the device computes in it.
        compile: run the forward pass and the losses through `torch.compile`.
        l1_weight, l2_weight, chroma_weight, laplacian_weight, ssim_weight: of the terms that compare images.
        kl_weight: of the divergence of the posterior from a standard normal distribution, in nats per latent
            number. Small, so that latents stay informative; they are scaled to unit variance afterwards.

    Raises:
        InputError: a batch or learning rate that nothing can be trained with.
    """

    batch_size: int = 16
    learning_rate: float = 1.5e-3
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 1.0
    average_decay: float = 0.998
    flip: bool = True
    l1_weight: float = 1.0
    l2_weight: float = 1.0
    chroma_weight: float = 1.0
    laplacian_weight: float = 1.0
    ssim_weight: float = 0.2
    kl_weight: float = 1e-4
    bfloat16: bool = True
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.learning_rate <= 0 or self.kl_weight < 0:
            raise InputError("a KL recipe needs batch_size >= 1, learning_rate > 0 and kl_weight >= 0.")
        object.__setattr__(self, "betas", tuple(self.betas))


@contextmanager
def pixel_batches(
    data: PixelSource, recipe: KLRecipe, start: int, ahead: int = 4, *, pinned: bool = False
) -> Iterator[Iterator[Tensor]]:
    """Batches uint8 [B, H, W, 3] of the steps from `start` on, read by a thread of its own some steps ahead.

    Which images a step sees, and which of them mirrored, is a function of seed and step. What goes wrong in the
    thread is raised where the batch is asked for.

    Args:
        pinned: in page-locked memory; a copy from any other memory makes the host wait for the accelerator.
    """
    ready: queue.Queue[Tensor | BaseException] = queue.Queue(ahead)
    ended = threading.Event()

    def batch(step: int) -> Tensor:
        generator = np.random.default_rng([recipe.seed, step])
        indices = generator.integers(len(data), size=recipe.batch_size)
        pixels = data.batch_pixels(np.sort(indices).tolist())
        if recipe.flip:
            mirrored = generator.random(len(pixels)) < 0.5
            pixels[mirrored] = pixels[mirrored, :, ::-1]
        read = torch.from_numpy(pixels)
        return read.pin_memory() if pinned else read

    def read() -> None:
        step = start
        while not ended.is_set():
            item: Tensor | BaseException
            try:
                item = batch(step)
            except BaseException as error:
                item = error
            while not ended.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += 1

    def batches() -> Iterator[Tensor]:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield batches()
    finally:
        ended.set()
        reader.join()


def on_device(pixels: NDArray[np.uint8] | Tensor, device: torch.device) -> Tensor:
    """Pixels uint8 [B, H, W, 3] as images [B, 3, H, W] in [-1, 1], copied as bytes and converted on the device."""
    raw = torch.as_tensor(pixels).to(device, non_blocking=True)
    return raw.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def downsample_factor(model: AutoencoderKL) -> int:
    """Image pixels per latent along each side."""
    return int(2 ** (len(model.config.block_out_channels) - 1))


def _forward(model: AutoencoderKL, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruction, and mean and log-variance of the posterior; `noise` has the shape of latents."""
    posterior = model.encode(images).latent_dist
    latents = posterior.mean + posterior.std * noise
    return model.decode(latents).sample, posterior.mean, posterior.logvar


@dataclass(frozen=True)
class KLQuality:
    """Reconstruction from posterior means over a set of images.

    Attributes:
        psnr: mean over images, dB.
        ssim: mean over images, 11x11 Gaussian window.
    """

    psnr: float
    ssim: float


@torch.no_grad()
def evaluate(model: AutoencoderKL, pixels: NDArray[np.uint8], batch_size: int = 32) -> KLQuality:
    """Reconstruct `pixels` uint8 [n, H, W, 3] in float32; needs the `train` extra (torchmetrics)."""
    psnr = ssim = 0.0
    for start in range(0, len(pixels), batch_size):
        images = to_images(pixels[start : start + batch_size]).to(model.device)
        decoded = model.decode(model.encode(images).latent_dist.mean).sample
        likeness = summed_likeness(decoded, images)
        psnr, ssim = psnr + likeness[0], ssim + likeness[1]
    return KLQuality(psnr / len(pixels), ssim / len(pixels))


@torch.no_grad()
def latent_scale(model: AutoencoderKL, data: PixelSource, batch_size: int = 32) -> float:
    """One over the standard deviation of sampled latents: what makes them tokens of unit variance.

    Measured on the first `SCALE_IMAGES` images.

    Source: Rombach et al. 2022, appendix G.
    """
    count = min(SCALE_IMAGES, len(data))
    total = squares = numbers = 0.0
    generator = torch.Generator(model.device).manual_seed(0)
    for start in range(0, count, batch_size):
        pixels = data.batch_pixels(range(start, min(start + batch_size, count)))
        posterior = model.encode(on_device(pixels, model.device)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=model.device)
        latents = (posterior.mean + posterior.std * noise).double()
        total += float(latents.sum())
        squares += float(latents.square().sum())
        numbers += latents.numel()
    return float((squares / numbers - (total / numbers) ** 2) ** -0.5)


class KLTrainer:
    """One training run of a KL tokenizer in one folder; constructing it resumes what the folder holds.

    The folder holds the files of `TrainingRun` and, once trained, `export` with the averaged weights and their scaling
    factor.

    Args:
        model: in float32; moved to `device` and to channels-last.
        data: training images.
        held_out: uint8 [n, H, W, 3], images to measure on, never trained on.
        folder: of the run.
        budget: when to stop.
        recipe: how to train.
        device: where to train.
        log_every: steps between lines of the log.
        evaluate_every: steps between measurements on `held_out`.

    Raises:
        InputError: no data, or images that the tokenizer cannot take.
        CheckpointError: the folder holds a run with other settings.
    """

    def __init__(
        self,
        model: AutoencoderKL,
        data: PixelSource,
        held_out: NDArray[np.uint8],
        folder: Path,
        budget: Budget,
        recipe: KLRecipe | None = None,
        *,
        device: str | torch.device = "cpu",
        log_every: int = 50,
        evaluate_every: int = 1000,
    ) -> None:
        if len(data) == 0 or len(held_out) == 0:
            raise InputError("training a tokenizer needs at least one training and one held-out image.")
        factor = downsample_factor(model)
        height, width = held_out.shape[1:3]
        if height % factor or width % factor:
            raise InputError(f"image sides must be multiples of {factor}, got {height}x{width}.")
        self.latent_shape = (model.config.latent_channels, height // factor, width // factor)
        self.recipe, self.data, self.held_out = recipe or KLRecipe(), data, held_out
        self.device = torch.device(device)
        self.log_every, self.evaluate_every = log_every, evaluate_every
        self.model = model.to(device=self.device, memory_format=torch.channels_last).train()
        self._generator = torch.Generator(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.recipe.learning_rate,
            betas=self.recipe.betas,
            weight_decay=0.0,
            fused=True,
        )
        self.average = ExponentialAverage(self.model, self.recipe.average_decay)
        self.schedule = Schedule(self.recipe.learning_rate, self.recipe.warmup_steps)
        state: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "average": self.average,
        }
        settings = {"model": model_settings(model.config), "recipe": asdict(self.recipe)}
        self.run = TrainingRun(folder, budget, settings, state)
        self._bfloat16 = self.recipe.bfloat16 and quick_bfloat16(self.device)
        self._losses = torch.compile(self._eager) if self.recipe.compile else self._eager

    def train(self) -> AutoencoderKL:
        """Train until the budget is spent; returns a model with the averaged weights, also in `export`."""
        last: dict[str, float] = {}
        first = self.run.step
        with (
            pixel_batches(self.data, self.recipe, first, pinned=self.device.type == "cuda") as batches,
            tqdm(unit="step", initial=first, total=self.run.budget.steps) as bar,
        ):
            for step in self.run.steps():
                terms = self._step(step, next(batches))
                # reading a number makes the host wait for the accelerator, so only now and then
                if (step + 1) % self.log_every == 0:
                    row = {k: float(v) for k, v in terms.items()}
                    self.run.log(**row)
                    last["loss"] = row["loss"]
                    bar.set_postfix({k: f"{v:.4f}" for k, v in last.items()})
                if (step + 1) % self.evaluate_every == 0:
                    quality = evaluate(self.averaged(), self.held_out)
                    self.run.log(**{f"held_out_{k}": v for k, v in asdict(quality).items()})
                    last["psnr"] = quality.psnr
                bar.update()
        averaged = self.averaged()
        averaged.register_to_config(scaling_factor=latent_scale(averaged, self.data))
        with atomic_path(self.run.folder / "export") as temporary:
            averaged.save_pretrained(temporary)
        return averaged

    def averaged(self) -> AutoencoderKL:
        """A copy of the model with the exponential moving average of its weights, in eval mode."""
        result = copy.deepcopy(self.model)
        self.average.copy_to(result)
        return result.eval()

    def _eager(self, images: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16):
            reconstruction, mean, log_variance = _forward(self.model, images, noise)
        terms, total = reconstruction_terms(self.recipe, images, reconstruction.float())
        mean, log_variance = mean.float(), log_variance.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return total + self.recipe.kl_weight * divergence, {**terms, "kl": divergence}

    def _step(self, step: int, pixels: Tensor) -> dict[str, Tensor | float]:
        rate = self.schedule(step, self.run.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images = on_device(pixels, self.device)
        # drawn afresh for every step, so that a resumed run goes on as if it had never stopped
        self._generator.manual_seed(self.recipe.seed * 1_000_003 + step)
        shape = (len(images), *self.latent_shape)
        noise = torch.randn(shape, generator=self._generator, device=self.device)
        loss, terms = self._losses(images, noise)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.average.update(self.model)
        found = {name: value.detach() for name, value in terms.items()}
        return {"loss": loss.detach(), **found, "gradient_norm": norm, "learning_rate": rate}
