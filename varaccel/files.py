"""Writing files so that an interrupted or failed write leaves nothing half-written behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from varaccel.errors import InputError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path` (a file or a folder); rename it to `path` if the block succeeds.

    The temporary name keeps the suffix, because writers choose their format by it. An existing file is
    replaced in one step; an existing folder is replaced by moving it aside first; a link stays and what it leads to is
    replaced. If the block raises, the temporary is removed and `path` is as it was before.
    """
    given = Path(path)
    target = Path(os.path.realpath(given))
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name[:20]}.", suffix=".tmp", dir=target.parent))
    temporary = scratch / given.name
    try:
        yield temporary
        if target.is_dir() and temporary.is_dir():
            target.rename(scratch / "replaced")
        temporary.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(text: str, path: Path) -> None:
    """Write a text file whole or not at all.

    Raises:
        InputError: it cannot be written there.
    """
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"nothing could be written to {path}: {error}") from error


def check_writable(*paths: Path | None) -> None:
    """Refuse, before hours of work, a path that no file can be written to; nothing is left there.

    Args:
        paths: of files; None, an option that was left out, is passed over.

    Raises:
        InputError: it is a folder; its name is too long; its folder cannot be made or written to.
    """
    for path in paths:
        if path is None:
            continue
        if is_folder(path):
            raise InputError(f"{path} is a folder; name a file in it.")
        _try(path)


def check_writable_folder(path: Path | None) -> None:
    """As `check_writable`, for a folder that is to be made or written into.

    Raises:
        InputError: it is a file, or it cannot be made or written to.
    """
    if path is not None:
        _try(path / "file")


def is_folder(path: Path) -> bool:
    """Whether a path, of whatever characters and length, is that of a folder."""
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises at names that are too long


def _try(path: Path) -> None:
    """Write an empty file of the same name, in folders of the same names, and remove them."""
    try:
        target = Path(os.path.realpath(path))
        there = next(folder for folder in target.parents if os.path.lexists(folder))
        with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=there) as scratch:
            trial = scratch / target.relative_to(there)
            trial.parent.mkdir(parents=True, exist_ok=True)
            trial.touch()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"nothing could be written to {path}: {reason}; name another place.") from error


def numbered(path: Path, index: int) -> Path:
    """`path` with a number at the end of its stem: image.png becomes image-0.png."""
    return path.with_name(f"{path.stem}-{index}{path.suffix}")
