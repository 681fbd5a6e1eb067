"""Image losses that look at structure rather than single pixels and need no downloaded network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Constants of SSIM for a dynamic range of 1 (Wang et al. 2004, section III.B).
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2


def laplacian_loss(a: Tensor, b: Tensor, levels: int = 3) -> Tensor:
    """Mean absolute difference of the Laplacian pyramids of `a` and `b` [B, C, H, W], summed over levels.

    Level `i` holds the detail lost by halving the resolution for the `i`-th time, so that edges count at
    several scales (Bojanowski et al., "Optimizing the Latent Space of Generative Networks", section 3.2).
    The pyramid is linear, hence it is taken of the difference once.
    """
    difference = a - b
    total = difference.new_zeros(())
    for _ in range(levels):
        if min(difference.shape[-2:]) < 2:
            break
        coarse = F.avg_pool2d(difference, 2)
        smooth = F.interpolate(coarse, size=difference.shape[-2:], mode="nearest")
        total = total + (difference - smooth).abs().mean()
        difference = coarse
    return total


def ssim_loss(a: Tensor, b: Tensor, window: int = 7) -> Tensor:
    """One minus the mean structural similarity of `a` and `b` [B, C, H, W] in [0, 1], uniform window.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity".
    """
    maps = torch.cat([a, b, a * a, b * b, a * b], dim=1)  # [B, 5*C, H, W]
    maps = F.avg_pool2d(F.avg_pool2d(maps, (window, 1), stride=1), (1, window), stride=1)
    mean_a, mean_b, square_a, square_b, product = maps.chunk(5, dim=1)
    variance_a, variance_b = square_a - mean_a**2, square_b - mean_b**2
    covariance = product - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + SSIM_C1) / (mean_a**2 + mean_b**2 + SSIM_C1)
    structure = (2 * covariance + SSIM_C2) / (variance_a + variance_b + SSIM_C2)
    return 1 - (luminance * structure).mean()


class RandomFeatureLoss(nn.Module):
    """Distance in the features of a frozen, randomly initialised convolutional network.

    Random filters see oriented edges and colour contrasts over growing neighbourhoods without any training;
    the distance is the mean absolute difference of unit-variance features, averaged over the stages.

    Args:
        channels: width of the first stage, doubled at each further one.
        stages: strided convolutions, each halving the resolution.
        seed: seed of the filters; the same seed gives the same loss.
    """

    def __init__(self, channels: int = 16, stages: int = 3, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.convs = nn.ModuleList()
        width = 3
        for stage in range(stages):
            out = channels * 2**stage
            conv = nn.utils.skip_init(nn.Conv2d, width, out, 3, stride=2, padding=1, bias=False)
            nn.init.orthogonal_(conv.weight, generator=generator)
            self.convs.append(conv)
            width = out
        self.requires_grad_(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Features of `images` [B, 3, H, W], one [B, C_i, H/2^i, W/2^i] per stage."""
        result = []
        h = images
        for conv in self.convs:
            h = F.leaky_relu(conv(h), 0.2)
            result.append(h)
        return result

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance of `a` and `b` [B, 3, H, W]; gradients reach `a` only."""
        with torch.no_grad():
            targets = self.features(b)
        terms = []
        for feature, target in zip(self.features(a), targets, strict=True):
            scale = target.float().std().clamp_min(1e-4)
            terms.append((feature - target).float().abs().mean() / scale)
        return torch.stack(terms).mean()
