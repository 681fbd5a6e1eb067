"""Sets of images that are measured: folders, ADM batches, registered data sets, true scenes.

A set is a `torch.utils.data.Dataset` of uint8 tensors [3, H, W], so torch-fidelity takes it as it is.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from varaccel.errors import InputError, unknown_name
from varaccel.image_files import read_image
from varaccel.image_inputs import rgb_image
from varaccel.scenes.renderer import render
from varaccel.scenes.sampler import sample_scene

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""What counts as an image in a folder."""

_UNREAD = frozenset({".heic", ".heif", ".jxl"})
"""Image files of today that Pillow does not read by itself; they are told, too."""

RUN_IMAGES = "images"
"""Where a run of `eval/sample.py` keeps its images."""


class CorruptImage(InputError):
    """A file that is no readable image."""


class ImageSet(Dataset[Tensor]):
    """Images in a fixed order.

    Attributes:
        name: what the set is, for reports.
        note: what a reader of figures has to know about it; empty if there is nothing.
    """

    name: str
    note: str = ""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Tensor:
        """Image `index` as uint8 [3, H, W].

        Raises:
            CorruptImage: it cannot be read.
        """

    def label(self, index: int) -> str:
        """What image `index` is called in messages."""
        return f"{self.name}[{index}]"


class ImageFolder(ImageSet):
    """The images of a folder in the order of their names, read by `rgb_image`: upright, transparency on white.

    `note` tells what looks like an image and was passed over: other formats, folders in the folder.

    Args:
        folder: of images, or of a run of `eval/sample.py`; hidden files and folders are passed over.
        recursive: take those of its folders too, such as one folder per class.
        size: shrink and crop every image to this side, see `centre_crop`; they stay as they are if None.

    Raises:
        InputError: no such folder, or no images in it.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, recursive: bool = False, size: int | None = None
    ) -> None:
        root = Path(folder)
        if not root.is_dir():
            raise InputError(f"there is no folder {root}; check the path.")
        inner = root / RUN_IMAGES
        self.folder = inner if inner.is_dir() else root
        self.name = str(root)
        self.size = size
        found = [path for path in _visible(self.folder, recursive) if not path.is_dir()]
        self.files = sorted(path for path in found if path.suffix.lower() in SUFFIXES)
        others = Counter(s for path in found if (s := path.suffix.lower()) not in SUFFIXES and _of_images(s))
        told = [f"{count} {suffix} file{'s' * (count > 1)}" for suffix, count in sorted(others.items())]
        folders = 0 if recursive else sum(_holds_images(path) for path in _visible(self.folder, False))
        if folders:
            told.append(
                f"{folders} folder{'s' * (folders > 1)} of images, which are searched with --recursive"
            )
        if self.folder != root and any(path.suffix.lower() in SUFFIXES for path in _visible(root, False)):
            told.append(f"the images beside its folder {RUN_IMAGES!r}")
        if told:
            self.note = f"Passed over in {root}: {', '.join(told)}."
        if not self.files:
            deeper = "" if recursive else ", or let its folders be searched too (--recursive)"
            known = ", ".join(SUFFIXES)
            raise InputError(
                f"there are no images in {self.folder}; name a folder of {known} files{deeper}. {self.note}".rstrip()
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        path = self.files[index]
        try:
            pixels = rgb_image(read_image(path))
        except InputError as error:
            raise CorruptImage(str(error)) from error
        return _tensor(np.asarray(pixels if self.size is None else centre_crop(pixels, self.size)))

    def label(self, index: int) -> str:
        return str(self.files[index])


class ImageBatch(ImageSet):
    """The images of an ADM-style .npz file: `arr_0`, uint8 [N, H, W, 3].

    Raises:
        InputError: no such file, or none of this kind.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = str(path)
        try:
            self.pixels = _mapped_array(Path(path), "arr_0.npy")
        except FileNotFoundError:
            raise InputError(f"there is no file {path}; check the path.") from None
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, struct.error) as error:
            raise InputError(f"{path} holds no batch of images (arr_0): {error}") from error
        if self.pixels.ndim != 4 or self.pixels.shape[3] != 3 or self.pixels.dtype != np.uint8:
            raise InputError(
                f"arr_0 of {path} must be uint8 [N, H, W, 3], got {self.pixels.dtype} "
                f"{list(self.pixels.shape)}."
            )
        if not len(self.pixels):
            raise InputError(f"arr_0 of {path} holds no images.")

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return _tensor(self.pixels[index])


class TrueScenes(ImageSet):
    """True images of the captioned world, rendered when they are asked for.

    Args:
        seeds: of the scenes.
        size: side in pixels.
    """

    def __init__(self, seeds: Sequence[int], size: int = 128) -> None:
        if not seeds:
            raise InputError("a set of scenes needs at least one seed.")
        self.seeds, self.size = list(seeds), size
        self.name = f"scenes:{len(self.seeds)}"

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> Tensor:
        return _tensor(render(sample_scene(self.seeds[index]), self.size).image)


class RegisteredImages(ImageSet):
    """A data set that torch-fidelity knows by name, such as `cifar10-train`; downloaded when it is first used.

    Raises:
        InputError: it cannot be had.
    """

    def __init__(self, name: str) -> None:
        from torch_fidelity.registry import DATASETS_REGISTRY

        if name not in DATASETS_REGISTRY:
            raise unknown_name("data set", name, DATASETS_REGISTRY)
        self.name = name
        root = Path(torch.hub.get_dir()).parent / "fidelity_datasets"
        try:
            self._images: Any = DATASETS_REGISTRY[name](str(root), True)
        except (OSError, RuntimeError) as error:
            raise InputError(f"the data set {name} could not be had: {error}") from error

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return torch.as_tensor(self._images[index])


def open_images(
    name: str | os.PathLike[str], *, recursive: bool = False, size: int | None = None
) -> ImageSet:
    """The set of images that a command line names: a folder, an .npz file, or a registered data set.

    Raises:
        InputError: there is nothing of the kind.
    """
    from torch_fidelity.registry import DATASETS_REGISTRY

    path = Path(name)
    if str(name) in DATASETS_REGISTRY and not path.exists():
        return RegisteredImages(str(name))
    if path.suffix == ".npz":
        return ImageBatch(path)
    return ImageFolder(path, recursive=recursive, size=size)


def _visible(folder: Path, recursive: bool) -> Iterator[Path]:
    """What is in a folder, or in its folders, too; nothing that is hidden."""
    for path in folder.rglob("*") if recursive else folder.iterdir():
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _of_images(suffix: str) -> bool:
    """Whether files of a suffix are images."""
    return suffix in _UNREAD or Image.registered_extensions().get(suffix) in Image.OPEN


def _holds_images(path: Path) -> bool:
    """Whether there is an image somewhere in a folder."""
    return path.is_dir() and any(_of_images(one.suffix.lower()) for one in _visible(path, True))


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """An image shrunk until its shorter side is `size`, then cropped to a square, as references of ImageNet are.

    Halved by box averaging while it is more than twice too large, then resized bicubically (ADM, Dhariwal and
    Nichol 2021, arXiv 2105.05233).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 [H, W, 3] -> [3, H, W]."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def _mapped_array(path: Path, member: str) -> NDArray[Any]:
    """An array of an .npz file without reading it whole, as far as it is stored uncompressed."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(member)
        if entry.compress_type != zipfile.ZIP_STORED:
            with np.load(path, allow_pickle=False) as file:
                return np.asarray(file[member.removesuffix(".npy")])
    with path.open("rb") as file:
        file.seek(entry.header_offset)
        # the local header has its own, possibly longer, extra field
        name_length, extra_length = struct.unpack("<26x2H", file.read(30))
        file.seek(name_length + extra_length, os.SEEK_CUR)
        shape, column_major, dtype = _array_header(file)
        offset = file.tell()
    if dtype.hasobject or column_major:
        raise ValueError("it is not a plain array in C order")
    if math.prod(shape) == 0:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", offset, shape)


def _array_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)
