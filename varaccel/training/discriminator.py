"""The patch discriminator of VQGAN training and its hinge losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Strided convolutions that score overlapping patches: [B, in_channels, H, W] -> [B, 1, h, w] logits.

    Source: Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks" (PatchGAN),
    section 3.2.2; GroupNorm replaces BatchNorm so that real and generated batches do not share statistics.

    Args:
        in_channels: image channels.
        channels: width of the first layer, doubled per layer up to eightfold; a multiple of 8.
        layers: number of stride-2 layers; images must have sides of at least 2 ** (layers + 2).
    """

    def __init__(self, in_channels: int = 3, channels: int = 32, layers: int = 3) -> None:
        super().__init__()
        blocks: list[nn.Module] = [
            nn.Conv2d(in_channels, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        width = channels
        for layer in range(1, layers + 1):
            out = channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            blocks += [
                nn.Conv2d(width, out, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(8, out),
                nn.LeakyReLU(0.2),
            ]
            width = out
        blocks.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator on logits of real and generated images."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """Hinge loss of the generator: the negative mean logit of what it made."""
    return -fake.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """The factor that gives both losses gradients of equal norm at `last_layer`, at most 1e4.

    Source: Esser et al., "Taming Transformers", equation 7.
    """
    (by_reconstruction,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (by_adversary,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    ratio = by_reconstruction.norm() / (by_adversary.norm() + 1e-4)
    return ratio.clamp(0, 1e4).detach()
