"""Scenes rendered on demand as a map-style dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from varaccel.errors import InputError
from varaccel.scenes.grammar import Caption, caption
from varaccel.scenes.renderer import Rendering, check_size, render
from varaccel.scenes.sampler import sample_scene
from varaccel.scenes.world import Scene


@dataclass(frozen=True, eq=False)
class Sample:
    """Everything made from one seed."""

    seed: int
    scene: Scene
    caption: Caption
    rendering: Rendering


def make_sample(seed: int, size: int = 128) -> Sample:
    """Scene, caption and image of `seed`; the same for the same arguments."""
    scene = sample_scene(seed)
    return Sample(seed, scene, caption(scene, seed), render(scene, size))


def to_tensor(image: NDArray[np.uint8]) -> Tensor:
    """[S, S, 3] uint8 to float32 [3, S, S] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float().div_(127.5).sub_(1.0)


class ScenesDataset(Dataset[dict[str, Any]]):
    """Scenes of the seeds `first_seed` to `first_seed + length - 1`.

    An item is a dict of `image` (float32 [3, S, S] in [-1, 1]), `caption` (str) and `seed` (int).
    """

    def __init__(self, first_seed: int, length: int, size: int = 128) -> None:
        if first_seed < 0 or length < 1:
            raise InputError(
                "a dataset needs a first_seed of at least 0 and a length of at least 1, got "
                f"first_seed={first_seed}, length={length}."
            )
        check_size(size)
        self.first_seed = first_seed
        self.length = length
        self.size = size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is outside a dataset of {self.length} scenes.")
        sample = make_sample(self.first_seed + index, self.size)
        return {
            "image": to_tensor(sample.rendering.image),
            "caption": sample.caption.text,
            "seed": sample.seed,
        }
