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
    replaced in one step; an existing folder is replaced by moving it aside first. If the block raises, the
    temporary is removed and `path` is as it was before.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    temporary = scratch / target.name
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


def check_writable(path: Path) -> None:
    """Refuse, before hours of work, a path that no file can be written to.

    Raises:
        InputError: it is a folder, or its folder cannot be made.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"nothing could be written to {path}: {error}") from error


def numbered(path: Path, index: int) -> Path:
    """`path` with a number at the end of its stem: image.png becomes image-0.png."""
    return path.with_name(f"{path.stem}-{index}{path.suffix}")
