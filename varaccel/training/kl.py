"""Training a KL image tokenizer from scratch, in minutes on a GPU or an hour on a CPU.

The losses are those of latent diffusion (Rombach et al. 2022, arXiv 2112.10752, section 3.1) with the structural
terms of `training.reconstruction` in place of a pretrained perceptual network, and without a discriminator.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from varaccel.errors import InputError
from varaccel.nn.devices import is_gpu
from varaccel.training.images import PixelSource, drawn_pixels, mirror_half, on_device, to_images
from varaccel.training.precision import quick_bfloat16
from varaccel.training.reconstruction import reconstruction_terms, summed_likeness
from varaccel.training.run import Budget
from varaccel.training.tokenizer_trainer import TokenizerRecipe, TokenizerTrainer

SCALE_IMAGES = 2048
"""From how many images the scaling factor of latents is measured."""


@dataclass(frozen=True)
class KLRecipe(TokenizerRecipe):
    """How a KL tokenizer is trained; see `TokenizerRecipe` for the rest.

    Attributes:
        bfloat16: run convolutions under bfloat16 autocast, where the device computes in it.
        compile: run the forward pass and the losses through `torch.compile`.
        kl_weight: of the divergence of the posterior from a standard normal distribution, in nats per latent
            number. Small, so that latents stay informative; they are scaled to unit variance afterwards.

    Raises:
        InputError: a batch, learning rate or weight that nothing can be trained with.
    """

    learning_rate: float = 1.5e-3
    chroma_weight: float = 1.0
    kl_weight: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_weight < 0:
            raise InputError("a KL recipe needs a kl_weight of at least 0.")


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
        pixels = drawn_pixels(data, recipe.batch_size, generator)
        if recipe.flip:
            mirror_half(pixels, generator)
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


class KLTrainer(TokenizerTrainer[AutoencoderKL, KLRecipe, Tensor]):
    """One training run of a KL tokenizer, see `TokenizerTrainer`; `export` has the scaling factor of its latents.

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
        factor = downsample_factor(model)
        height, width = held_out.shape[1:3]
        if height % factor or width % factor:
            raise InputError(f"image sides must be multiples of {factor}, got {height}x{width}.")
        self.latent_shape = (model.config.latent_channels, height // factor, width // factor)
        super().__init__(
            model,
            data,
            held_out,
            folder,
            budget,
            recipe or KLRecipe(),
            device=device,
            log_every=log_every,
            evaluate_every=evaluate_every,
        )
        self._generator = torch.Generator(self.device)
        self._bfloat16 = self.recipe.bfloat16 and quick_bfloat16(self.device)
        self._losses = torch.compile(self._eager) if self.recipe.compile else self._eager

    def _batches(self, start: int) -> AbstractContextManager[Iterator[Tensor]]:
        return pixel_batches(self.data, self.recipe, start, pinned=is_gpu(self.device))

    def _measure(self, model: AutoencoderKL) -> Mapping[str, float]:
        return asdict(evaluate(model, self.held_out))

    def _finished(self, model: AutoencoderKL) -> AutoencoderKL:
        model.register_to_config(scaling_factor=latent_scale(model, self.data))
        return model

    def _eager(self, images: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16):
            reconstruction, mean, log_variance = _forward(self.model, images, noise)
        terms, total = reconstruction_terms(self.recipe, images, reconstruction.float())
        mean, log_variance = mean.float(), log_variance.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return total + self.recipe.kl_weight * divergence, {**terms, "kl": divergence}

    def _step(self, step: int, batch: Tensor) -> dict[str, Tensor | float]:
        rate = self._set_rate(step)
        images = on_device(batch, self.device)
        # drawn afresh for every step, so that a resumed run goes on as if it had never stopped
        self._generator.manual_seed(self.recipe.seed * 1_000_003 + step)
        shape = (len(images), *self.latent_shape)
        noise = torch.randn(shape, generator=self._generator, device=self.device)
        loss, terms = self._losses(images, noise)
        norm = self._descend(loss)
        found = {name: value.detach() for name, value in terms.items()}
        return {"loss": loss.detach(), **found, "gradient_norm": norm, "learning_rate": rate}
