"""Folders and files of images, good and bad."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.datasets import ImagesPathDataset, TransformPILtoRGBTensor

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


def test_what_is_passed_over_is_told(tmp_path: Path) -> None:
    write(tmp_path, pixels(2))
    (tmp_path / "notes.txt").write_text("no image")
    assert ImageFolder(tmp_path).note == ""
    image = Image.fromarray(pixels(1)[0])
    for name in ("a.tif", "b.TIF", "c.gif", "d.ppm"):
        image.save(tmp_path / name)
    (tmp_path / "e.heic").write_bytes(b"an image of a phone")
    write(tmp_path / "one", pixels(1))
    write(tmp_path / "two" / "inner", pixels(1))
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "notes.txt").write_text("no image")
    found = ImageFolder(tmp_path)
    assert len(found) == 2
    assert found.note == (
        f"Passed over in {tmp_path}: 1 .gif file, 1 .heic file, 1 .ppm file, 2 .tif files, 2 folders of images, which "
        "are searched with --recursive."
    )
    deeper = ImageFolder(tmp_path, recursive=True)
    assert len(deeper) == 4
    assert "2 .tif files." in deeper.note


def test_a_folder_of_other_formats_only_is_told_as_that(tmp_path: Path) -> None:
    for index in range(3):
        Image.fromarray(pixels(1)[0]).save(tmp_path / f"{index}.tif")
    with pytest.raises(InputError, match=r"no images in .*3 \.tif files"):
        ImageFolder(tmp_path)


def test_images_beside_those_of_a_run_are_told(tmp_path: Path) -> None:
    write(tmp_path / "images", pixels(3))
    write(tmp_path, pixels(2))
    assert "beside its folder 'images'" in ImageFolder(tmp_path).note


def test_folders_that_are_called_as_images_are_none(tmp_path: Path) -> None:
    write(tmp_path, pixels(2))
    (tmp_path / "x.png").mkdir()
    assert len(ImageFolder(tmp_path)) == 2


def test_images_are_read_as_viewers_show_them(tmp_path: Path) -> None:
    """Upright and on white, where torch-fidelity drops orientation and transparency."""
    image = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 10, 10))
    image.getexif()[0x0112] = 3
    image.save(tmp_path / "a.png", exif=image.getexif())
    Image.fromarray(np.full((10, 20), 51400, np.uint16)).save(tmp_path / "b.png")
    turned, deep = ImageFolder(tmp_path)
    assert turned[:, 5, 5].tolist() == [255, 255, 255]
    assert turned[:, 5, 15].tolist() == [0, 0, 255]
    assert deep.unique().tolist() == [200]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK"])
def test_ordinary_files_are_read_as_torch_fidelity_reads_them(tmp_path: Path, mode: str) -> None:
    suffix = ".jpg" if mode == "CMYK" else ".png"
    Image.fromarray(pixels(1)[0]).convert(mode).save(tmp_path / f"a{suffix}")
    (found,) = ImageFolder(tmp_path)
    assert torch.equal(found, ImagesPathDataset([str(tmp_path / f"a{suffix}")], TransformPILtoRGBTensor())[0])


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
