"""One launch at a time in the folder of a run, whatever ends its processes."""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
from pathlib import Path

from varaccel.errors import InputError

if sys.platform != "win32":
    import fcntl

LOCK = ".lock"

_IN_USE = (errno.EACCES, errno.EAGAIN)

# the system's locks are between processes, these between the threads of one
_held: set[Path] = set()
_guard = threading.Lock()


class FolderLock:
    """Locks on a file in a folder: byte i belongs to process i of the launch that draws there.

    The system takes them back when a process ends, however it ends. A launch starts by locking all bytes, so not while
    any process of another is alive.

    Args:
        folder: of a run, which exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key = folder.resolve()
        self._file: int | None = None
        self._entered = False

    @property
    def held(self) -> bool:
        """Whether the system keeps others out; False where it knows no such locks."""
        return self._file is not None

    def begin(self) -> None:
        """Lock the whole folder.

        Raises:
            InputError: another process is at work in it.
            OSError: the folder cannot be written to.
        """
        with _guard:
            if self._key in _held:
                raise self._in_use()
            _held.add(self._key)
            self._entered = True
        self._lock(0, 0)
        if self._file is not None:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def share(self) -> None:
        """Give the bytes of the other processes of the launch to them."""
        if self._file is not None:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 0, 1)

    def join(self, process: int) -> None:
        """Lock the byte of a further process of the launch, after its first one has shared the folder."""
        self._lock(1, process)

    def release(self) -> None:
        """Give back what is held."""
        if self._file is not None:
            os.close(self._file)  # the locks go with it
            self._file = None
        with _guard:
            if self._entered:
                _held.discard(self._key)
                self._entered = False

    def _lock(self, length: int, start: int) -> None:
        """Lock bytes; a length of 0 means all from the start on."""
        if sys.platform == "win32":
            return
        file = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except OSError as error:
            os.close(file)
            if error.errno in _IN_USE:
                self.release()
                raise self._in_use() from error
            return  # a file system without locks
        self._file = file

    def _in_use(self) -> InputError:
        try:
            who = (self.folder / LOCK).read_text() or "another process"
        except OSError:
            who = "another process"
        return InputError(
            f"{self.folder} is in use: {who} draws there; wait until it ends, or name another folder."
        )
