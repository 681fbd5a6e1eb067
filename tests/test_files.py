"""Files are written whole or not at all, where they were asked for; what cannot be written is found before."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from PIL import Image

from varaccel.errors import InputError
from varaccel.files import atomic_path, check_writable, check_writable_folder, write_text
from varaccel.image_files import check_image_path, write_image

LONG_NAMES = ("猫" * 82 + ".png", "a" * 251 + ".png", "." + "b" * 250 + ".png")
"""As long as a name may be, 255 bytes, or nearly."""


@pytest.mark.parametrize("name", LONG_NAMES, ids=["wide characters", "ascii", "hidden"])
def test_names_of_full_length_are_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    check_image_path(path)
    write_image(Image.new("RGB", (4, 4), "red"), path)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def unusable(folder: Path) -> dict[str, Path]:
    (folder / "file").write_text("in the way")
    (folder / "folder.png").mkdir()
    return {
        "parent is a file": folder / "file" / "x.png",
        "a file further up": folder / "file" / "new" / "x.png",
        "too long": folder / ("a" * 300 + ".png"),
        "too long in bytes": folder / ("猫" * 90 + ".png"),
        "too long a folder": folder / ("a" * 300) / "x.png",
        "too long a path": folder.joinpath(*["a" * 200] * 30) / "x.png",
        "null": folder / "a\0b.png",
        "surrogate": folder / "file" / "\udc80.png",
        "folder": folder / "folder.png",
        "system": Path("/proc/x.png"),
    }


def test_what_cannot_be_written_is_refused_before(tmp_path: Path) -> None:
    paths = unusable(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for kind, path in paths.items():
        for check in (check_writable, check_image_path):
            with pytest.raises(InputError) as refused:
                check(path)
            assert "\n" not in str(refused.value), kind
    with pytest.raises(InputError, match="nothing could be written"):
        check_writable_folder(tmp_path / "file")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused_before(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    for path in (tmp_path / "x.png", tmp_path / "new" / "x.png"):
        with pytest.raises(InputError, match="Permission denied"):
            check_writable(path)


def test_a_check_leaves_nothing(tmp_path: Path) -> None:
    check_image_path(tmp_path / "new" / "deep" / "x.png")
    check_writable(None, tmp_path / "x.json", tmp_path / "other" / "x.json")
    check_writable_folder(tmp_path / "run")
    check_writable_folder(None)
    assert not list(tmp_path.iterdir())
    (tmp_path / "x.json").write_text("older")
    check_writable(tmp_path / "x.json")
    assert (tmp_path / "x.json").read_text() == "older"


@pytest.mark.parametrize(
    "suffix", [".msp", ".h5", ".hdf", ".xbm", ".palm", ".blp", ".wmf", ".grib", ".psd", ".what", ""]
)
def test_formats_that_hold_no_such_image(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(InputError, match="png"):
        check_image_path(tmp_path / f"x{suffix}")


@pytest.mark.parametrize("suffix", [".webp", ".jpg", ".gif"])
def test_images_that_are_too_large_for_a_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    for size in ((70_000, 20), (20, 70_000)):
        with pytest.raises(InputError, match="name another format"):
            check_image_path(path, size)
        check_image_path(path.with_suffix(".png"), size)


@pytest.mark.parametrize(
    "suffix", [".png", ".PNG", ".jpg", ".webp", ".bmp", ".gif", ".tif", ".pdf", ".ico", ".jp2"]
)
def test_formats_that_are_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    check_image_path(path)
    write_image(Image.new("RGB", (32, 32), "red"), path)
    assert path.stat().st_size > 0


# -- links ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False], ids=["of a file", "dangling"])
def test_a_link_stays_a_link(tmp_path: Path, there: bool) -> None:
    store = tmp_path / "store"
    store.mkdir()
    if there:
        (store / "abc").write_bytes(b"older")
    link = tmp_path / "latest.png"
    link.symlink_to(Path("store") / "abc")  # relative, and of a name without a suffix
    check_image_path(link)
    write_image(Image.new("RGB", (4, 4), "red"), link)
    assert link.is_symlink()
    with Image.open(link) as image:
        assert image.format == "PNG"
    assert sorted(entry.name for entry in store.iterdir()) == ["abc"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest.png", "store"]


def test_a_link_of_a_link_and_a_text(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("three.json")
    write_text("{}", tmp_path / "one")
    assert (tmp_path / "three.json").read_text() == "{}"
    assert (tmp_path / "one").is_symlink()
    assert (tmp_path / "two").is_symlink()


def test_a_link_of_a_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    (tmp_path / "large disk" / "old").touch()
    (tmp_path / "run").symlink_to("large disk")
    with atomic_path(tmp_path / "run") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert (tmp_path / "run").is_symlink()
    assert [entry.name for entry in (tmp_path / "large disk").iterdir()] == ["new"]


def test_a_failed_write_leaves_link_and_file_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "file.png").write_bytes(b"older")
    (tmp_path / "link.png").symlink_to("file.png")
    with contextlib.suppress(KeyboardInterrupt), atomic_path(tmp_path / "link.png") as temporary:
        temporary.write_bytes(b"half an im")
        raise KeyboardInterrupt
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "file.png").read_bytes() == b"older"
    assert len(list(tmp_path.iterdir())) == 2
