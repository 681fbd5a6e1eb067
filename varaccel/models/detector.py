"""An object detector for the captioned world, to judge whether generated images show what was asked for.

A small convolutional network with one centre-based prediction per grid cell (CenterNet, Zhou et al. 2019, arXiv
1904.07850; box edges as distances from the cell as in FCOS, Tian et al. 2019, arXiv 1904.01355).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from varaccel.errors import CheckpointError, InputError
from varaccel.scenes.world import COLORS, FLOORS, MATERIALS, SHAPES, SIZES, TIMES, WORLD_VERSION
from varaccel.shipped import weights_folder

FEATURE_SPACE = "scenes-detector"
"""Name of the feature space of `SceneDetector.features`, to be stated with every distance measured in it."""

_PATCH = 4
_STRIDE = 2 * _PATCH
_DENSE = {
    "heat": 1,
    "edges": 4,
    "depth": 1,
    "shape": len(SHAPES),
    "color": len(COLORS),
    "material": len(MATERIALS),
    "size": len(SIZES),
}
_RARE = -3.5  # logit of the share of cells that hold a centre, so that training does not start by unlearning


@dataclass(frozen=True)
class Detection:
    """One object found in an image.

    Attributes:
        shape, color, material, size: the likeliest name of each kind.
        box: (left, top, right, bottom) of the visible part, as fractions of the image.
        depth: distance from the middle of the scene away from the camera, world units.
        score: confidence that there is an object, 0 to 1.
    """

    shape: str
    color: str
    material: str
    size: str
    box: tuple[float, float, float, float]
    depth: float
    score: float

    @property
    def column(self) -> float:
        """Centre of the box from the left, as a fraction of the image."""
        return (self.box[0] + self.box[2]) / 2


@dataclass(frozen=True)
class Observation:
    """What is seen in one image; `objects` are in order of falling score."""

    objects: tuple[Detection, ...]
    floor: str
    time_of_day: str


@dataclass
class DetectorOutput(BaseOutput):
    """Raw predictions for B images on a grid of G × G cells.

    Attributes:
        heat: [B, 1, G, G] logits that the centre of a visible box lies in the cell.
        edges: [B, 4, G, G] distances of the left, top, right and bottom edge from the cell's centre, in cells.
        depth: [B, 1, G, G] world units.
        shape, color, material, size: [B, K, G, G] logits.
        floor, time_of_day: [B, K] logits.
    """

    heat: Tensor
    edges: Tensor
    depth: Tensor
    shape: Tensor
    color: Tensor
    material: Tensor
    size: Tensor
    floor: Tensor
    time_of_day: Tensor


class ConvUnit(nn.Sequential):
    """Convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions around a skip connection (He et al. 2015, arXiv 1512.03385)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvUnit(channels, channels)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.second(self.first(x))))


class SceneDetector(ModelMixin, ConfigMixin):
    """Finds the objects of a scene with their attributes, and tells floor and time of day.

    Args:
        image_size: side of the images in pixels; a multiple of 16.
        widths: channels at strides 4, 8 and 16. Predictions are made at stride 8, where no two objects of the
            world have their centres in one cell.
        depths: residual blocks at each of them.
        world_version: version of the world whose objects the weights know.

    Raises:
        InputError: `image_size` is no multiple of 16, or `widths` and `depths` are not three each.
        CheckpointError: the weights were made for another version of the world.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 128,
        widths: Sequence[int] = (48, 96, 160),
        depths: Sequence[int] = (1, 2, 2),
        world_version: str = WORLD_VERSION,
    ) -> None:
        super().__init__()
        if image_size < 16 or image_size % 16:
            raise InputError(f"image_size must be a positive multiple of 16, got {image_size}.")
        if len(widths) != 3 or len(depths) != 3:
            raise InputError(f"widths and depths hold three numbers each, got {widths} and {depths}.")
        if world_version != WORLD_VERSION:
            raise CheckpointError(
                f"the detector was trained on world version {world_version!r}, this is {WORLD_VERSION!r}; "
                "train it again with eval/train_detector.py."
            )
        fine, middle, coarse = widths
        self.stem = ConvUnit(3 * _PATCH**2, fine)
        self.fine = nn.Sequential(*(ResidualBlock(fine) for _ in range(depths[0])))
        self.middle = nn.Sequential(
            ConvUnit(fine, middle, 2), *(ResidualBlock(middle) for _ in range(depths[1]))
        )
        self.coarse = nn.Sequential(
            ConvUnit(middle, coarse, 2), *(ResidualBlock(coarse) for _ in range(depths[2]))
        )
        self.lateral = nn.Conv2d(coarse, middle, 1)
        # size and depth follow from where an object stands in the image, which convolutions cannot see
        self.trunk = ConvUnit(middle + 2, middle)
        self.dense = nn.Conv2d(middle, sum(_DENSE.values()), 1)
        self.whole = nn.Linear(self.feature_dim, len(FLOORS) + len(TIMES))
        with torch.no_grad():
            bias = self.dense.bias
            assert bias is not None
            bias.zero_()
            bias[0] = _RARE

    @property
    def feature_dim(self) -> int:
        """Length of a vector of `features`."""
        return int(self.config.widths[1] + self.config.widths[2])

    @property
    def grid_size(self) -> int:
        """Cells along a side of the prediction grid."""
        return int(self.config.image_size // _STRIDE)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Trunk [B, C, G, G] and pooled features [B, feature_dim] of `images` [B, 3, S, S] in [-1, 1].

        Raises:
            InputError: the images have another shape.
        """
        size = self.config.image_size
        if images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise InputError(
                f"the detector takes images [B, 3, {size}, {size}], got {list(images.shape)}; resize them."
            )
        patches = F.pixel_unshuffle(images, _PATCH).contiguous(memory_format=torch.channels_last)
        middle = self.middle(self.fine(self.stem(patches)))  # [B, C1, G, G]
        coarse = self.coarse(middle)  # [B, C2, G / 2, G / 2]
        merged = middle + F.interpolate(self.lateral(coarse), scale_factor=2, mode="nearest")
        steps = torch.linspace(-1, 1, merged.shape[-1], dtype=merged.dtype, device=merged.device)
        place = torch.stack(torch.meshgrid(steps, steps, indexing="ij")).expand(len(merged), -1, -1, -1)
        trunk = self.trunk(torch.cat([merged, place], dim=1))
        return trunk, torch.cat([trunk.mean((2, 3)), coarse.mean((2, 3))], dim=1)

    def forward(self, images: Tensor) -> DetectorOutput:
        """Predictions for `images` [B, 3, S, S] in [-1, 1].

        Raises:
            InputError: the images have another shape.
        """
        trunk, features = self.encode(images)
        dense = self._dense(trunk)
        floor, time_of_day = self.whole(features).split([len(FLOORS), len(TIMES)], dim=1)
        return DetectorOutput(**dense, floor=floor, time_of_day=time_of_day)

    def _dense(self, trunk: Tensor) -> dict[str, Tensor]:
        """Predictions of every cell by kind, [B, K, G, G] each."""
        return dict(zip(_DENSE, self.dense(trunk).split(list(_DENSE.values()), dim=1), strict=True))

    def object_logits(self, trunk: Tensor) -> Tensor:
        """Log-probabilities [B, shapes × colours] of what the most certain object is; `trunk` is that of `encode`."""
        dense = self._dense(trunk)
        cell = dense["heat"].flatten(1).argmax(1)[:, None, None]  # [B, 1, 1]
        shape, color = (
            dense[kind].flatten(2).take_along_dim(cell, 2).squeeze(2).log_softmax(1)
            for kind in ("shape", "color")
        )
        return (shape[:, :, None] + color[:, None]).flatten(1)

    @torch.no_grad()
    def features(self, images: Tensor | Sequence[Image.Image], batch_size: int = 64) -> Tensor:
        """Pooled penultimate features [B, feature_dim], float32 on the CPU.

        A feature space of its own: distances in it compare with each other only, never with those of another
        network, and are to be labelled `FEATURE_SPACE`.
        """
        batches = self._prepare(images).split(batch_size)
        return torch.cat(
            [self.encode(batch.to(self.device, self.dtype))[1].float().cpu() for batch in batches]
        )

    @torch.no_grad()
    def observe(
        self, images: Tensor | Sequence[Image.Image], threshold: float = 0.4, batch_size: int = 64
    ) -> list[Observation]:
        """Objects, floor and time of day of each image.

        Args:
            images: [B, 3, H, W] in [-1, 1], or PIL images; resized to `image_size` if they differ.
            threshold: least score of an object.
            batch_size: images per forward pass.

        Raises:
            InputError: `images` has no images or the wrong shape, or the network is in training mode.
        """
        if self.training:
            raise InputError("the detector is in training mode; call eval() before judging images.")
        found: list[Observation] = []
        for batch in self._prepare(images).split(batch_size):
            found += decode(self(batch.to(self.device, self.dtype)), threshold)
        return found

    def detect(
        self, images: Tensor | Sequence[Image.Image], threshold: float = 0.4, batch_size: int = 64
    ) -> list[list[Detection]]:
        """The objects of each image in order of falling score; arguments as of `observe`."""
        return [list(seen.objects) for seen in self.observe(images, threshold, batch_size)]

    def _prepare(self, images: Tensor | Sequence[Image.Image]) -> Tensor:
        return as_batch(images, self.config.image_size)


def as_batch(images: Tensor | Sequence[Image.Image], size: int) -> Tensor:
    """Images as float32 [B, 3, size, size] in [-1, 1]; other sizes are resized with antialiasing.

    Raises:
        InputError: no images, or a tensor that is not [B, 3, H, W].
    """
    if len(images) == 0:
        raise InputError("there are no images to look at; pass at least one.")
    if isinstance(images, Tensor):
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise InputError(
                f"images are a floating-point tensor [B, 3, H, W], got {images.dtype} {list(images.shape)}."
            )
        batch = images.float()
        if batch.shape[-2:] != (size, size):
            batch = F.interpolate(batch, (size, size), mode="bilinear", antialias=True)
        return batch
    colored = [one.convert("RGB") for one in images]
    pixels = np.stack(
        [
            np.asarray(
                one if one.size == (size, size) else one.resize((size, size), Image.Resampling.BILINEAR)
            )
            for one in colored
        ]
    )  # [B, S, S, 3]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def decode(output: DetectorOutput, threshold: float, overlap: float = 0.5) -> list[Observation]:
    """Predictions to observations: cells above `threshold`, less those whose box has an intersection over union
    above `overlap` with a better one. Visible boxes of different objects of the world stay below 0.4."""
    grid = output.heat.shape[-1]
    scores = output.heat.float().sigmoid().flatten(1).cpu()  # [B, G G]
    steps = (torch.arange(grid) + 0.5) / grid
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    centres = torch.stack([columns, rows, columns, rows]).flatten(1).T  # [G G, 4]
    signs = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    boxes = (centres + signs * output.edges.float().flatten(2).transpose(1, 2).cpu() / grid).clamp(0, 1)
    names: dict[str, tuple[Tensor, tuple[str, ...]]] = {
        kind: (logits.flatten(2).argmax(1).cpu(), options)
        for kind, logits, options in (
            ("shape", output.shape, SHAPES),
            ("color", output.color, COLORS),
            ("material", output.material, MATERIALS),
            ("size", output.size, SIZES),
        )
    }
    depth = output.depth.float().flatten(1).cpu()
    floor, time_of_day = output.floor.argmax(1).tolist(), output.time_of_day.argmax(1).tolist()
    observations = []
    for index in range(len(scores)):
        cells = (scores[index] >= threshold).nonzero().flatten()
        cells = cells[nms(boxes[index, cells], scores[index, cells], overlap)]
        objects = tuple(
            Detection(
                **{kind: options[int(chosen[index, cell])] for kind, (chosen, options) in names.items()},
                box=tuple(boxes[index, cell].tolist()),
                depth=float(depth[index, cell]),
                score=float(scores[index, cell]),
            )
            for cell in cells.tolist()
        )
        observations.append(Observation(objects, FLOORS[floor[index]], TIMES[time_of_day[index]]))
    return observations


def load_detector(folder: str | Path | None = None, **options: Any) -> SceneDetector:
    """The detector in `folder`, by default the one that ships with the library, ready to judge images.

    Raises:
        CheckpointError: there is no detector in `folder`.
    """
    path = Path(folder) if folder is not None else weights_folder() / "scenes-detector"
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} holds no scene detector; train one with eval/train_detector.py or pass its folder."
        )
    detector: SceneDetector = SceneDetector.from_pretrained(path, **options)
    return detector.eval()
