"""Features of a set of images, kept on disk chunk by chunk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from varaccel.errors import InputError, unknown_name
from varaccel.evaluation.metrics.feature_spaces import FeatureSpace
from varaccel.evaluation.metrics.image_sets import CorruptImage, ImageSet
from varaccel.files import atomic_path

OnCorrupt = Literal["stop", "skip"]

_CHUNK = 512
_READERS = 4


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """Features of N images.

    Attributes:
        layers: [N, D] float32 by name of the layer.
        space: label of the feature space.
        images: what they were taken of.
        digest: of the pixels of all images in order: equal for the same images in a folder and in an .npz file.
        size: (height, width) of the images.
        skipped: names of images that could not be read.
    """

    layers: dict[str, Tensor]
    space: str
    images: str
    digest: str
    size: tuple[int, int]
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.layers.values())))


@torch.inference_mode()
def extract_features(
    images: ImageSet,
    space: FeatureSpace,
    *,
    batch_size: int = 64,
    cache: str | os.PathLike[str] | None = None,
    on_corrupt: OnCorrupt = "stop",
    progress: bool = True,
) -> ImageFeatures:
    """Features of all images of a set.

    Args:
        batch_size: images per pass of the network; torch-fidelity's default gives its very numbers.
        cache: folder in which features are kept, in chunks of 512 images that are named by their pixels and the
            network. An interrupted call goes on where it stopped, and images that were seen before, in whatever
            file, cost only their reading.
        on_corrupt: what to do about a file that cannot be read: "stop", or "skip" it and say so in the result.

    Raises:
        InputError: images of different sizes; a corrupt one (with "stop"); none that can be read; a cache that
            cannot be written.
    """
    if on_corrupt not in ("stop", "skip"):
        raise unknown_name("way with corrupt images", on_corrupt, ("stop", "skip"))
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}.")
    reader = _Reader(images, on_corrupt)
    found: list[dict[str, Tensor]] = []
    total = hashlib.sha256()
    with tqdm(
        total=len(images), desc=f"features of {images.name}", unit="image", disable=not progress or None
    ) as bar:
        for chunk, read in reader.chunks():
            if chunk is not None:
                digest = hashlib.sha256(chunk.numpy().tobytes()).hexdigest()
                total.update(digest.encode())
                found.append(_chunk_features(chunk, digest, space, batch_size, cache))
            bar.update(read)
    if reader.size is None:
        raise InputError(f"none of the {len(images)} images of {images.name} can be read.")
    return ImageFeatures(
        {layer: torch.cat([one[layer] for one in found]) for layer in space.layers},
        space.label,
        images.name,
        total.hexdigest()[:16],
        reader.size,
        tuple(reader.skipped),
    )


class _Reader:
    """Reads a set in chunks of equally large images.

    Attributes:
        size: of the first image that could be read; None before.
        skipped: names of those that could not.
    """

    def __init__(self, images: ImageSet, on_corrupt: OnCorrupt) -> None:
        self.images, self.on_corrupt = images, on_corrupt
        self.size: tuple[int, int] | None = None
        self.skipped: list[str] = []
        self._first = ""

    def chunks(self) -> Iterator[tuple[Tensor | None, int]]:
        """Images uint8 [n, 3, H, W], None if none of them can be read, and how many were tried."""
        # decoding an image leaves Python's lock, so a few threads keep up with the network
        with ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, len(self.images), _CHUNK):
                indices = range(start, min(start + _CHUNK, len(self.images)))
                images = zip(indices, pool.map(self._read, indices), strict=True)
                read = [self._checked(index, image) for index, image in images]
                kept = [one for one in read if one is not None]
                yield torch.stack(kept) if kept else None, len(indices)

    def _read(self, index: int) -> Tensor | CorruptImage:
        try:
            return self.images[index]
        except CorruptImage as error:
            return error

    def _checked(self, index: int, image: Tensor | CorruptImage) -> Tensor | None:
        if isinstance(image, CorruptImage):
            if self.on_corrupt == "stop":
                raise InputError(f"{image}; replace it, or let corrupt images be skipped.") from image
            self.skipped.append(self.images.label(index))
            return None
        size = (image.shape[-2], image.shape[-1])
        if self.size is None:
            self.size, self._first = size, self.images.label(index)
        if size != self.size:
            raise InputError(
                f"images must have one size: {self._first} is {self.size[1]} × {self.size[0]}, but "
                f"{self.images.label(index)} is {size[1]} × {size[0]}; give a size to crop all to."
            )
        return image


def _chunk_features(
    chunk: Tensor, digest: str, space: FeatureSpace, batch_size: int, cache: str | os.PathLike[str] | None
) -> dict[str, Tensor]:
    """Features of the images [n, 3, H, W] of one chunk, from the cache if they are there."""
    path = None
    if cache is not None:
        named = [space.label, *space.layers, str(batch_size), str(tuple(chunk.shape)), digest]
        path = Path(cache) / f"{hashlib.sha256(' '.join(named).encode()).hexdigest()[:32]}.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError):
            pass  # not there, or damaged: taken again
    batches = [space.extractor(batch.to(space.device)) for batch in chunk.split(batch_size)]
    features = {
        layer: torch.cat([batch[index].cpu() for batch in batches]).contiguous()
        for index, layer in enumerate(space.layers)
    }
    if path is not None:
        try:
            with atomic_path(path) as temporary:
                save_file(features, temporary)
        except (OSError, SafetensorError) as error:
            raise InputError(f"features could not be kept in {cache}: {error}") from error
    return features
