"""Training a VQ tokenizer from scratch, on a CPU in half an hour or on an accelerator.

The losses are those of LlamaGen's tokenizer (Sun et al., section 2.1) with one exchange: the perceptual term
is a Laplacian pyramid with SSIM, or random features, so that no pretrained network is needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from varaccel.errors import InputError
from varaccel.tokenizers.multiscale_vq import MultiScaleQuantizer, MultiScaleVQModel
from varaccel.tokenizers.vq import VQModel, VQTrainingOutput
from varaccel.training.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from varaccel.training.images import PixelSource, colorful_crop, drawn_pixels, mirror_half, to_images
from varaccel.training.perceptual import RandomFeatureLoss
from varaccel.training.precision import autocast
from varaccel.training.reconstruction import reconstruction_terms, summed_likeness
from varaccel.training.run import Budget, ExponentialAverage
from varaccel.training.tokenizer_trainer import TokenizerRecipe, TokenizerTrainer

CODEBOOK_KEY = "quantize.embedding.weight"
ImageTokenizer = VQModel | MultiScaleVQModel


@dataclass(frozen=True)
class VQRecipe(TokenizerRecipe):
    """How a VQ tokenizer is trained; see `TokenizerRecipe` for the rest.

    Attributes:
        feature_weight: of the distance between random features, see `training.perceptual`.
        codebook_weight: pulls codebook rows to the latents assigned to them.
        commitment_weight: pulls latents to their codebook rows (beta of VQ-VAE).
        entropy_weight: of confident single assignments at an evenly used codebook.
        entropy_temperature: softmax temperature on negative squared distances in that term.
        entropy_stride: only every n-th site enters that term.
        revive_every: steps between re-seedings of codebook entries that none of them used; 0 turns it off.
        adversarial_weight: of the hinge patch discriminator; 0 turns it off.
        adversarial_start: share of the budget after which the discriminator joins.
        crop_size: side of the crops that the first part of the run trains on; 0 for whole images only.
        crop_batch_size: crops per optimiser step.
        crop_candidates: each crop is the most colourful of so many random ones. Most of an image is plain
            background; crops let a step spend its time on objects.
        crop_until: share of the budget after which whole images take over, which they must: attention and
            group norms see other statistics in a crop.
        quantize_after: steps in which a multi-scale model trains without its quantiser; the codebook then starts
            from what the scales would have to say, instead of from noise.
        frozen: parameters whose names start like this stay as they are: the outer levels of a warm start.

    Raises:
        InputError: a batch, learning rate or interval that nothing can be trained with.
    """

    feature_weight: float = 0.0
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    entropy_weight: float = 0.01
    entropy_temperature: float = 0.01
    entropy_stride: int = 1
    revive_every: int = 50
    adversarial_weight: float = 0.0
    adversarial_start: float = 0.5
    crop_size: int = 0
    crop_batch_size: int = 16
    crop_candidates: int = 3
    crop_until: float = 0.7
    quantize_after: int = 0
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.revive_every < 0:
            raise InputError("a VQ recipe needs a revive_every of at least 0.")
        object.__setattr__(self, "frozen", tuple(self.frozen))


def entropy_loss(similarity: Tensor, temperature: float) -> Tensor:
    """Mean entropy of each site's distribution over the codebook minus the entropy of their mean.

    Low when every site is sure of its entry and the entries are used evenly. `similarity` [N, K] are cosines;
    the logits are negative squared distances on the unit sphere over `temperature`, in float32.

    Source: Yu et al., "Language Model Beats Diffusion" (MAGVIT-v2), equation 5; LlamaGen's tokenizer.
    """
    log_probabilities = F.log_softmax(similarity.float() * (2 / temperature), dim=-1)  # [N, K]
    probabilities = log_probabilities.exp()
    single = -(probabilities * log_probabilities).sum(-1).mean()
    mean = probabilities.mean(0)  # [K]
    return single + (mean * mean.clamp_min(1e-8).log()).sum()


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of `counts` [K]: the number of evenly used entries that would be as diverse."""
    share = counts.double() / counts.sum().clamp_min(1)
    return float(torch.special.entr(share).sum().exp())


class CodeRevival:
    """Re-seeds codebook entries that no site chose for a while with latents that are far from every entry.

    Without it, entries that lose out early in a short run are never updated again.

    Args:
        codebook_size: number of codebook entries.
        every: steps between re-seedings.
        seed: of the choice of latents.
    """

    def __init__(self, codebook_size: int, every: int, seed: int) -> None:
        self.every = every
        self.seed = seed
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counts.copy_(state["counts"])

    @torch.no_grad()
    def update(
        self,
        model: ImageTokenizer,
        average: ExponentialAverage,
        optimizer: torch.optim.Optimizer,
        output: VQTrainingOutput,
        step: int,
        *,
        enabled: bool,
    ) -> int:
        """Count the entries used in this step and, when due, revive the unused; returns how many were revived.

        New rows are latents of this step, drawn with probability proportional to their squared distance from
        the chosen entry, as k-means++ does. Their moving average and optimiser moments start afresh.
        """
        self.counts += torch.bincount(output.indices.flatten().cpu(), minlength=len(self.counts))
        if self.every == 0 or (step + 1) % self.every:
            return 0
        weight = model.quantize.embedding.weight
        dead = (self.counts == 0).nonzero().flatten().to(weight.device)
        self.counts.zero_()
        distance = (output.sites - output.rows).square().sum(-1).cpu()  # [N]
        far = distance.nonzero().flatten()
        dead = dead[: len(far)]
        if not enabled or not len(dead):
            return 0
        generator = torch.Generator().manual_seed(self.seed + step)
        chosen = torch.multinomial(distance, len(dead), generator=generator).to(weight.device)
        rows = output.sites[chosen].to(weight.dtype)
        weight[dead] = rows
        average.average[CODEBOOK_KEY][dead] = rows.float()
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimizer.state[weight]:
                optimizer.state[weight][moment][dead] = 0
        return len(dead)


@dataclass(frozen=True)
class VQQuality:
    """Reconstruction quality and codebook use over a set of images.

    Attributes:
        psnr: mean over images, dB.
        ssim: mean over images, 11x11 Gaussian window.
        entries_used: share of the codebook that occurs at all.
        perplexity: effective number of entries.
    """

    psnr: float
    ssim: float
    entries_used: float
    perplexity: float


@torch.no_grad()
def evaluate(model: ImageTokenizer, pixels: NDArray[np.uint8], batch_size: int = 32) -> VQQuality:
    """Reconstruct `pixels` uint8 [n, H, W, 3] in float32 and compare; needs the `train` extra (torchmetrics)."""
    counts = torch.zeros(model.codebook_size, dtype=torch.int64)
    psnr = ssim = 0.0
    training = model.training
    model.eval()
    for start in range(0, len(pixels), batch_size):
        images = to_images(pixels[start : start + batch_size]).to(model.device)
        encoding = model.encode(images)
        likeness = summed_likeness(model.decode(encoding.quantized), images)
        psnr, ssim = psnr + likeness[0], ssim + likeness[1]
        counts += torch.bincount(encoding.indices.flatten().cpu(), minlength=len(counts))
    model.train(training)
    used = float((counts > 0).double().mean())
    return VQQuality(psnr / len(pixels), ssim / len(pixels), used, perplexity(counts))


@torch.no_grad()
def warm_start(model: ImageTokenizer, source: VQModel) -> list[str]:
    """Copy what fits from a trained tokenizer that has the same widths and perhaps fewer levels.

    Levels are matched from the image inwards, so that a model with a level more starts with trained outer levels.

    Returns:
        the names of the parameters that were copied.

    Raises:
        InputError: nothing fits.
    """
    depths = [len(m.config.channel_multipliers) for m in (model, source)]
    lower = depths[0] - depths[1]
    own = dict(model.named_parameters())
    copied = []
    for name, value in source.named_parameters():
        if match := re.match(r"decoder\.conv_blocks\.(\d+)\.", name):
            name = f"decoder.conv_blocks.{int(match[1]) + lower}.{name[match.end() :]}"
        if name in own and own[name].shape == value.shape and not name.startswith(("quant", "post_quant")):
            own[name].copy_(value)
            copied.append(name)
    if not copied:
        raise InputError("nothing of the tokenizer to start from fits this model; give them the same widths.")
    return copied


class VQTrainer(TokenizerTrainer[ImageTokenizer, VQRecipe, Tensor]):
    """One training run of a VQ tokenizer, single-scale or multi-scale; see `TokenizerTrainer`.

    Args:
        decoder_only: keep the encoder and codebook as they are and train what follows them. Token ids
            made before, and transformers trained on them, stay valid.

    Raises:
        InputError: no data, images that the tokenizer cannot take, or `decoder_only` of a multi-scale model.
        CheckpointError: the folder holds a run with other settings.
    """

    shown: ClassVar[tuple[str, ...]] = ("psnr", "entries_used")

    def __init__(
        self,
        model: ImageTokenizer,
        data: PixelSource,
        held_out: NDArray[np.uint8],
        folder: Path,
        budget: Budget,
        recipe: VQRecipe | None = None,
        *,
        decoder_only: bool = False,
        device: str | torch.device = "cpu",
        log_every: int = 20,
        evaluate_every: int = 250,
    ) -> None:
        if decoder_only and isinstance(model, MultiScaleVQModel):
            raise InputError(
                "decoder_only is for single-scale tokenizers; freeze a multi-scale one by `frozen`."
            )
        recipe = recipe or VQRecipe()
        model.grid((held_out.shape[1], held_out.shape[2]))
        self.decoder_only = decoder_only
        _freeze(model, recipe.frozen, decoder_only=decoder_only)
        self.features = RandomFeatureLoss().to(device) if recipe.feature_weight else None
        self.revival = CodeRevival(model.codebook_size, recipe.revive_every, recipe.seed)
        state: dict[str, Any] = {"revival": self.revival}
        self.discriminator: PatchDiscriminator | None = None
        if recipe.adversarial_weight:
            self.discriminator = PatchDiscriminator(model.config.in_channels).to(device)
            self.discriminator_optimizer = torch.optim.AdamW(
                self.discriminator.parameters(),
                lr=recipe.learning_rate,
                betas=(0.5, 0.9),
                weight_decay=0.0,
                fused=True,
            )
            state["discriminator"] = self.discriminator
            state["discriminator_optimizer"] = self.discriminator_optimizer
        super().__init__(
            model,
            data,
            held_out,
            folder,
            budget,
            recipe,
            device=device,
            log_every=log_every,
            evaluate_every=evaluate_every,
            state=state,
            settings={"decoder_only": True} if decoder_only else {},
        )
        forward: Callable[..., VQTrainingOutput] = self._decoder_forward if decoder_only else self.model
        self._forward = torch.compile(forward) if recipe.compile else forward

    @contextmanager
    def _batches(self, start: int) -> Iterator[Iterator[Tensor]]:
        # drawn in their step and not ahead of it: what a batch is depends on how far the run is
        yield (self._batch(step) for step in count(start))

    def _measure(self, model: ImageTokenizer) -> Mapping[str, float]:
        return asdict(evaluate(model, self.held_out))

    def _batch(self, step: int) -> Tensor:
        """The images of `step`, or crops of them: [B, 3, H, W] in [-1, 1].

        Which ones is a function of the seed, the step and the phase of the run.
        """
        recipe = self.recipe
        generator = np.random.default_rng([recipe.seed, step])
        cropped = recipe.crop_size > 0 and self.run.progress < recipe.crop_until
        size = recipe.crop_batch_size if cropped else recipe.batch_size
        pixels = drawn_pixels(self.data, size, generator)
        if cropped:
            pixels = np.stack(
                [colorful_crop(p, recipe.crop_size, recipe.crop_candidates, generator) for p in pixels]
            )
        if recipe.flip:
            mirror_half(pixels, generator)
        return to_images(pixels).to(self.device)

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device, self.recipe.bfloat16)

    def _decoder_forward(self, images: Tensor) -> VQTrainingOutput:
        """As `VQModel.forward`, with gradients to the decoder alone."""
        with torch.no_grad():
            encoding = self.model.encode(images)
            sites, rows = (
                F.normalize(part.float().permute(0, 2, 3, 1).flatten(0, 2), dim=-1)
                for part in (encoding.latents, encoding.quantized)
            )  # [B*h*w, D]
            similarity = sites @ self.model.quantize.codebook().T
        reconstruction = self.model.decode(encoding.quantized)
        return VQTrainingOutput(reconstruction, sites, rows, encoding.indices, similarity, sites, rows)

    def _step(self, step: int, batch: Tensor) -> dict[str, Tensor | float]:
        recipe, images = self.recipe, batch
        rate = self._set_rate(step)
        quantized = step >= recipe.quantize_after
        if quantized and step == recipe.quantize_after > 0:
            self._seed_codebook()
        with self._autocast():
            output = self._forward(images) if quantized else self._forward(images, quantize=False)
        terms = self._losses(images, output)
        image_loss = terms.pop("image_loss")
        adversarial = self.discriminator is not None and self.run.progress >= recipe.adversarial_start
        if not quantized:
            terms["codebook_loss"] = torch.zeros_like(terms["codebook_loss"])
        total = image_loss + terms["codebook_loss"] + terms["entropy_loss"] * recipe.entropy_weight
        if adversarial:
            total = total + self._adversarial_term(output, image_loss, terms)
        norm = self._descend(total)
        if adversarial:
            terms["discriminator_loss"] = self._discriminator_step(
                images, output.reconstruction.detach(), rate
            )
        # Not in the decay phase: an entry that starts there no longer settles.
        settled = self.run.progress > 1 - self.schedule.decay
        revived = self.revival.update(
            self.model,
            self.average,
            self.optimizer,
            output,
            step,
            enabled=quantized and not settled and not self.decoder_only,
        )
        used = output.indices.unique().numel() / self.model.codebook_size
        return {
            "loss": total.detach(),
            **{name: value.detach() for name, value in terms.items()},
            "gradient_norm": norm,
            "learning_rate": rate,
            "batch_entries_used": used,
            "revived": float(revived),
        }

    @torch.no_grad()
    def _seed_codebook(self, images: int = 256, rounds: int = 10) -> None:
        """Start the codebook of a multi-scale model from k-means over what its scales would have to say."""
        quantizer: MultiScaleQuantizer = self.model.quantize
        parts = []
        for start in range(0, min(images, len(self.data)), 32):
            pixels = self.data.batch_pixels(range(start, min(start + 32, len(self.data))))
            with self._autocast():
                latents = self.model._latents(to_images(pixels).to(self.device))
            parts.append(quantizer.pyramid(latents).flatten(0, 1))
        sites = torch.cat(parts)
        weight = quantizer.embedding.weight
        generator = torch.Generator().manual_seed(self.recipe.seed)
        # far sites are few and matter most: coarse scales say more per token than fine ones
        chosen = torch.multinomial(
            sites.square().sum(1).cpu() + 1e-6, len(weight), len(sites) < len(weight), generator=generator
        )
        weight.copy_(sites[chosen.to(sites.device)])
        for _ in range(rounds):
            nearest = quantizer.nearest(sites)
            sums = torch.zeros_like(weight).index_add_(0, nearest, sites)
            counts = torch.bincount(nearest, minlength=len(weight)).unsqueeze(1)
            weight.copy_(torch.where(counts > 0, sums / counts.clamp_min(1), weight))
        self.average.average[CODEBOOK_KEY].copy_(weight)

    def _losses(self, images: Tensor, output: VQTrainingOutput) -> dict[str, Tensor]:
        recipe = self.recipe
        terms, image_loss = reconstruction_terms(recipe, images, output.reconstruction.float())
        if self.features is not None:
            with self._autocast():
                terms["feature_loss"] = self.features(output.reconstruction, images)
            image_loss = image_loss + recipe.feature_weight * terms["feature_loss"]
        commitment = F.mse_loss(output.latents, output.quantized.detach())
        codebook = F.mse_loss(output.quantized, output.latents.detach())
        terms["codebook_loss"] = recipe.codebook_weight * codebook + recipe.commitment_weight * commitment
        terms["entropy_loss"] = (
            entropy_loss(output.similarity[:: recipe.entropy_stride], recipe.entropy_temperature)
            if recipe.entropy_weight and not self.decoder_only and output.similarity is not None
            else commitment.new_zeros(())
        )
        return {**terms, "image_loss": image_loss}

    def _adversarial_term(
        self, output: VQTrainingOutput, image_loss: Tensor, terms: dict[str, Tensor]
    ) -> Tensor:
        assert self.discriminator is not None
        self.discriminator.requires_grad_(False)
        with self._autocast():
            logits = self.discriminator(output.reconstruction)
        self.discriminator.requires_grad_(True)
        terms["generator_loss"] = generator_loss(logits.float())
        weight = adaptive_weight(image_loss, terms["generator_loss"], self.model.decoder.last_layer)
        return self.recipe.adversarial_weight * weight * terms["generator_loss"]

    def _discriminator_step(self, images: Tensor, fake: Tensor, rate: float) -> Tensor:
        assert self.discriminator is not None
        for group in self.discriminator_optimizer.param_groups:
            group["lr"] = rate
        with self._autocast():
            loss = discriminator_loss(self.discriminator(images).float(), self.discriminator(fake).float())
        self.discriminator_optimizer.zero_grad()
        loss.backward()
        self.discriminator_optimizer.step()
        return loss.detach()


def _freeze(model: ImageTokenizer, frozen: tuple[str, ...], *, decoder_only: bool) -> None:
    """Exclude parameters from training: those whose names start like this, and all before the decoder."""
    if decoder_only:
        model.requires_grad_(False)
        for part in (model.post_quant_conv, model.decoder):
            part.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if name.startswith(frozen):
            parameter.requires_grad_(False)
