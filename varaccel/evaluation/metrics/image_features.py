"""Features of a set of pictures, kept on disk chunk by chunk."""

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
from varaccel.evaluation.metrics.image_sets import CorruptPicture, PictureSet
from varaccel.files import atomic_path

OnCorrupt = Literal["stop", "skip"]

_CHUNK = 512
_READERS = 4


@dataclass(frozen=True, eq=False)
class PictureFeatures:
    """Features of N pictures.

    Attributes:
        layers: [N, D] float32 by name of the layer.
        space: label of the feature space.
        pictures: what they were taken of.
        digest: of the pixels of all pictures in order: equal for the same pictures in a folder and in an .npz file.
        size: (height, width) of the pictures.
        skipped: names of pictures that could not be read.
    """

    layers: dict[str, Tensor]
    space: str
    pictures: str
    digest: str
    size: tuple[int, int]
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.layers.values())))


@torch.inference_mode()
def extract_features(
    pictures: PictureSet,
    space: FeatureSpace,
    *,
    batch_size: int = 64,
    cache: str | os.PathLike[str] | None = None,
    on_corrupt: OnCorrupt = "stop",
    progress: bool = True,
) -> PictureFeatures:
    """Features of all pictures of a set.

    Args:
        batch_size: pictures per pass of the network; torch-fidelity's default gives its very numbers.
        cache: folder in which features are kept, in chunks of 512 pictures that are named by their pixels and the
            network. An interrupted call goes on where it stopped, and pictures that were seen before, in whatever
            file, cost only their reading.
        on_corrupt: what to do about a file that cannot be read: "stop", or "skip" it and say so in the result.

    Raises:
        InputError: pictures of different sizes; a corrupt one (with "stop"); none that can be read; a cache that
            cannot be written.
    """
    if on_corrupt not in ("stop", "skip"):
        raise unknown_name("way with corrupt pictures", on_corrupt, ("stop", "skip"))
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}.")
    reader = _Reader(pictures, on_corrupt)
    found: list[dict[str, Tensor]] = []
    total = hashlib.sha256()
    with tqdm(
        total=len(pictures), desc=f"features of {pictures.name}", unit="picture", disable=not progress
    ) as bar:
        for chunk, read in reader.chunks():
            if chunk is not None:
                digest = hashlib.sha256(chunk.numpy().tobytes()).hexdigest()
                total.update(digest.encode())
                found.append(_chunk_features(chunk, digest, space, batch_size, cache))
            bar.update(read)
    if reader.size is None:
        raise InputError(f"none of the {len(pictures)} pictures of {pictures.name} can be read.")
    return PictureFeatures(
        {layer: torch.cat([one[layer] for one in found]) for layer in space.layers},
        space.label,
        pictures.name,
        total.hexdigest()[:16],
        reader.size,
        tuple(reader.skipped),
    )


class _Reader:
    """Reads a set in chunks of equally large pictures.

    Attributes:
        size: of the first picture that could be read; None before.
        skipped: names of those that could not.
    """

    def __init__(self, pictures: PictureSet, on_corrupt: OnCorrupt) -> None:
        self.pictures, self.on_corrupt = pictures, on_corrupt
        self.size: tuple[int, int] | None = None
        self.skipped: list[str] = []
        self._first = ""

    def chunks(self) -> Iterator[tuple[Tensor | None, int]]:
        """Pictures uint8 [n, 3, H, W], None if none of them can be read, and how many were tried."""
        # decoding a picture leaves Python's lock, so a few threads keep up with the network
        with ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, len(self.pictures), _CHUNK):
                indices = range(start, min(start + _CHUNK, len(self.pictures)))
                pictures = zip(indices, pool.map(self._read, indices), strict=True)
                read = [self._checked(index, picture) for index, picture in pictures]
                kept = [one for one in read if one is not None]
                yield torch.stack(kept) if kept else None, len(indices)

    def _read(self, index: int) -> Tensor | CorruptPicture:
        try:
            return self.pictures[index]
        except CorruptPicture as error:
            return error

    def _checked(self, index: int, picture: Tensor | CorruptPicture) -> Tensor | None:
        if isinstance(picture, CorruptPicture):
            if self.on_corrupt == "stop":
                raise InputError(f"{picture}; replace it, or let corrupt pictures be skipped.") from picture
            self.skipped.append(self.pictures.label(index))
            return None
        size = (picture.shape[-2], picture.shape[-1])
        if self.size is None:
            self.size, self._first = size, self.pictures.label(index)
        if size != self.size:
            raise InputError(
                f"pictures must have one size: {self._first} is {self.size[1]} × {self.size[0]}, but "
                f"{self.pictures.label(index)} is {size[1]} × {size[0]}; give a size to crop all to."
            )
        return picture


def _chunk_features(
    chunk: Tensor, digest: str, space: FeatureSpace, batch_size: int, cache: str | os.PathLike[str] | None
) -> dict[str, Tensor]:
    """Features of the pictures [n, 3, H, W] of one chunk, from the cache if they are there."""
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
