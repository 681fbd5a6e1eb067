"""Folders and files of images, good and bad."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from varaccel import InputError
from varaccel.evaluation.metrics.image_sets import (
    CorruptImage,
    ImageBatch,
    ImageFolder,
    TrueScenes,
    centre_crop,
    open_images,
)
from varaccel.scenes import render, sample_scene


def pixels(count: int = 5, height: int = 12, width: int = 10, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def write(folder: Path, images: np.ndarray, start: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images, start):
        Image.fromarray(image).save(folder / f"{index:03}.png")
    return folder


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    write(tmp_path, pixels())
    (tmp_path / "notes.txt").write_text("no image")
    write(tmp_path / ".hidden", pixels(1))
    found = open_images(tmp_path)
    assert len(found) == 5
    assert all(torch.equal(found[i], torch.from_numpy(p).permute(2, 0, 1)) for i, p in enumerate(pixels()))
    assert found[0].dtype == torch.uint8
    assert found.label(2).endswith("002.png")


def test_folders_of_folders_are_read_if_asked_for(tmp_path: Path) -> None:
    for index in range(3):
        write(tmp_path / f"class-{index}", pixels(2))
    with pytest.raises(InputError, match="no images in"):
        ImageFolder(tmp_path)
    assert len(ImageFolder(tmp_path, recursive=True)) == 6


def test_the_folder_of_a_run_stands_for_its_images(tmp_path: Path) -> None:
    write(tmp_path / "images", pixels(3))
    assert len(ImageFolder(tmp_path)) == 3


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_batch_file_holds_the_same(tmp_path: Path, save: object) -> None:
    save(tmp_path / "batch.npz", arr_0=pixels(), arr_1=np.arange(5))  # type: ignore[operator]
    batch = open_images(tmp_path / "batch.npz")
    folder = open_images(write(tmp_path / "folder", pixels()))
    assert len(batch) == len(folder)
    assert all(torch.equal(batch[i], folder[i]) for i in range(5))


def test_a_stored_batch_file_is_not_read_whole(tmp_path: Path) -> None:
    np.savez(tmp_path / "batch.npz", labels=np.arange(7), arr_0=pixels())
    assert isinstance(ImageBatch(tmp_path / "batch.npz").pixels, np.memmap)


def test_bad_batch_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        ImageBatch(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(InputError, match="holds no batch of images"):
        ImageBatch(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    with pytest.raises(InputError, match="arr_0"):
        ImageBatch(tmp_path / "other.npz")
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(InputError, match="uint8"):
        ImageBatch(tmp_path / "float.npz")
    np.savez(tmp_path / "empty.npz", arr_0=np.zeros((0, 4, 4, 3), np.uint8))
    with pytest.raises(InputError, match="no images"):
        ImageBatch(tmp_path / "empty.npz")
    np.savez(tmp_path / "object.npz", arr_0=np.array([None, 1], dtype=object))
    with pytest.raises(InputError, match="holds no batch"):
        ImageBatch(tmp_path / "object.npz")


def test_no_folder_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        open_images(tmp_path / "none")
    with pytest.raises(InputError, match="no images in"):
        open_images(tmp_path)


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    write(tmp_path, pixels(2))
    whole = (tmp_path / "001.png").read_bytes()
    (tmp_path / "001.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptImage, match=r"001\.png cannot be read"):
        ImageFolder(tmp_path)[1]


def test_data_sets_of_torch_fidelity_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity.registry import DATASETS_REGISTRY

    tensors = [torch.from_numpy(p).permute(2, 0, 1) for p in pixels()]
    monkeypatch.setitem(DATASETS_REGISTRY, "cifar10-train", lambda root, download: tensors)
    found = open_images("cifar10-train")
    assert len(found) == 5
    assert torch.equal(found[3], tensors[3])
    assert found.label(3) == "cifar10-train[3]"

    def unreachable(root: str, download: bool) -> None:
        raise OSError("no network")

    monkeypatch.setitem(DATASETS_REGISTRY, "cifar10-train", unreachable)
    with pytest.raises(InputError, match="cifar10-train could not be had: no network"):
        open_images("cifar10-train")


def test_true_scenes_are_those_of_the_renderer() -> None:
    scenes = TrueScenes([7, 8], 32)
    assert scenes.name == "scenes:2"
    assert torch.equal(scenes[1], torch.from_numpy(render(sample_scene(8), 32).image.copy()).permute(2, 0, 1))


@pytest.mark.parametrize("size", [(500, 375), (256, 256), (100, 130), (1025, 513)])
def test_centre_crop(size: tuple[int, int]) -> None:
    width, height = size
    # a mark in the middle stays in the middle
    image = Image.new("RGB", size)
    image.paste((255, 0, 0), (width // 2 - 20, height // 2 - 20, width // 2 + 20, height // 2 + 20))
    cropped = centre_crop(image, 64)
    assert cropped.size == (64, 64)
    red = np.asarray(cropped)[..., 0].astype(float)
    rows, columns = np.nonzero(red > 128)
    assert abs(rows.mean() - 31.5) < 1.5
    assert abs(columns.mean() - 31.5) < 1.5
