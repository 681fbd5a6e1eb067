"""Images that tokenizers are trained on: where they come from, the draw of a step, and their form as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class PixelSource(Protocol):
    """Images by index, such as `varaccel.scenes.cache.CachedScenes`."""

    def __len__(self) -> int: ...

    def batch_pixels(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Images `indices`, uint8 [n, H, W, 3]."""
        ...


def to_images(pixels: NDArray[np.uint8]) -> Tensor:
    """Pixels uint8 [n, H, W, 3] as float32 images [n, 3, H, W] in [-1, 1], channels-last in memory."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def on_device(pixels: NDArray[np.uint8] | Tensor, device: torch.device) -> Tensor:
    """As `to_images`, copied as bytes and converted on the device."""
    raw = torch.as_tensor(pixels).to(device, non_blocking=True)
    return raw.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def drawn_pixels(data: PixelSource, count: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """`count` random images, in the order of their indices."""
    indices = generator.integers(len(data), size=count)
    return data.batch_pixels(np.sort(indices).tolist())


def mirror_half(pixels: NDArray[np.uint8], generator: np.random.Generator) -> None:
    """Mirror each of the images left to right, in place, with probability one half."""
    mirrored = generator.random(len(pixels)) < 0.5
    pixels[mirrored] = pixels[mirrored, :, ::-1]


def colorful_crop(
    pixels: NDArray[np.uint8], size: int, candidates: int, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Of `candidates` random square crops of [H, W, 3] pixels, the one whose colours vary most."""
    height, width = pixels.shape[:2]
    tops = generator.integers(height - size + 1, size=candidates)
    lefts = generator.integers(width - size + 1, size=candidates)
    best, most = pixels[:size, :size], -1.0
    for top, left in zip(tops, lefts, strict=True):
        crop = pixels[top : top + size, left : left + size]
        sparse = crop[::4, ::4].astype(np.float32)
        spread = float((sparse[..., :2] - sparse[..., 1:]).std(axis=(0, 1)).sum())
        if spread > most:
            best, most = crop, spread
    return best
