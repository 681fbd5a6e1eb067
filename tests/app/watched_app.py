"""The demo as it is started, with a record of every address that its process looks up or connects to.

python tests/app/watched_app.py RECORD OPTION...
"""

from __future__ import annotations

import sys
from typing import Any

WATCHED = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")


def watch(record: str) -> None:
    """Write every address of this process to a file, from now on; hooks cannot be taken away."""
    file = open(record, "a", buffering=1)  # noqa: SIM115, PTH123 - open until the process ends

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in WATCHED:
            told = arguments[1:] if event in ("socket.connect", "socket.sendto") else arguments
            file.write(f"{event}\t{told[0]!r}\n")

    sys.addaudithook(note)


if __name__ == "__main__":
    watch(sys.argv.pop(1))
    sys.argv[1:1] = ["app"]
    from varaccel.__main__ import main

    main()
