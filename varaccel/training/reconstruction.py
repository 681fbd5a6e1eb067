"""How well a tokenizer gives an image back: the training losses that compare pixels, and PSNR and SSIM."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from varaccel.training.perceptual import laplacian_loss, ssim_loss


class ImageWeights(Protocol):
    """Weights of the terms that compare a reconstruction with its image, see `TokenizerRecipe`."""

    @property
    def l1_weight(self) -> float: ...
    @property
    def l2_weight(self) -> float: ...
    @property
    def chroma_weight(self) -> float: ...
    @property
    def laplacian_weight(self) -> float: ...
    @property
    def ssim_weight(self) -> float: ...


def chroma_loss(difference: Tensor) -> Tensor:
    """Mean absolute red-green and yellow-blue part of RGB differences [B, 3, H, W]."""
    red, green, blue = difference.unbind(1)
    return ((red - green).abs() + ((red + green) / 2 - blue).abs()).mean()


def reconstruction_terms(
    weights: ImageWeights, images: Tensor, reconstruction: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The terms by name, and their weighted sum.

    Args:
        images, reconstruction: [B, 3, H, W] float32 in [-1, 1].
    """
    difference = reconstruction - images
    terms = {"l1": difference.abs().mean(), "l2": difference.square().mean()}
    total = weights.l1_weight * terms["l1"] + weights.l2_weight * terms["l2"]
    if weights.chroma_weight:
        terms["chroma"] = chroma_loss(difference)
        total = total + weights.chroma_weight * terms["chroma"]
    if weights.laplacian_weight:
        terms["laplacian"] = laplacian_loss(reconstruction, images)
        total = total + weights.laplacian_weight * terms["laplacian"]
    if weights.ssim_weight:
        terms["ssim_loss"] = ssim_loss((reconstruction + 1) / 2, (images + 1) / 2)
        total = total + weights.ssim_weight * terms["ssim_loss"]
    return terms, total


def summed_likeness(decoded: Tensor, images: Tensor) -> tuple[float, float]:
    """PSNR in dB and SSIM (11x11 Gaussian window) of reconstructions, summed over images.

    Needs the `train` extra (torchmetrics).

    Args:
        decoded, images: [n, 3, H, W] in [-1, 1]; what is decoded beyond that is cut.
    """
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    decoded, target = ((decoded + 1) / 2).clamp(0, 1), (images + 1) / 2
    psnr = peak_signal_noise_ratio(decoded, target, data_range=1.0, dim=(1, 2, 3), reduction="sum")
    ssim = structural_similarity_index_measure(decoded, target, data_range=1.0, reduction="sum")
    return float(psnr), float(ssim)
