"""Which images need no more scales, or no more guidance, told from the image so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SkipRule:
    """What becomes of an image after a scale, by the high frequencies that it has got so far.

    Attributes:
        scale: the last scale that every image has.
        stop_below: images with a smaller share of high frequencies end here.
        unguided_below: of the others, those with a smaller share go on without their unconditional row.
    """

    scale: int
    stop_below: float
    unguided_below: float

    def split(self, seen: Tensor, grid: tuple[int, int]) -> tuple[list[int], list[int]]:
        """The images that go on, and those among them that stay guided. Waits for the device.

        Args:
            seen: [B, h w, D], the running feature map at the grid of the scale.
        """
        shares = high_frequency_share(seen, grid).tolist()
        going = [image for image, share in enumerate(shares) if share >= self.stop_below]
        return going, [image for image in going if shares[image] >= self.unguided_below]


def high_frequency_share(seen: Tensor, grid: tuple[int, int]) -> Tensor:
    """How much of what varies within an image is fine detail: [B], from 0 to 1.

    The energy at frequencies above a quarter of a cycle per token along either axis, over the energy at all frequencies
    but zero; 0 for what does not vary.

    Args:
        seen: [B, h w, D], a feature map of `grid` (h, w).
    """
    height, width = grid
    energy = torch.fft.rfft2(seen.float().mT.unflatten(2, grid)).abs().square().sum(1)  # [B, h, w // 2 + 1]
    rows = torch.fft.fftfreq(height, device=seen.device).abs()
    columns = torch.fft.rfftfreq(width, device=seen.device)
    # a real signal's other half of the columns mirrors these, but for zero and the middle one
    doubled = torch.where((columns == 0) | (columns == 0.5), 1.0, 2.0)
    energy = energy * doubled
    energy[:, 0, 0] = 0
    fine = (rows.unsqueeze(1) > 0.25) | (columns > 0.25)
    total = energy.sum((1, 2))
    return torch.where(total > 0, (energy * fine).sum((1, 2)) / total.clamp(min=1e-30), 0.0)
