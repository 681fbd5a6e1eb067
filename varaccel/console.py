"""Consoles that cannot show every sign: reports are printed with stand-ins instead of ending in an error."""

from __future__ import annotations

import codecs
import sys
import unicodedata

_STAND_INS = {
    **{
        "×": "x",
        "·": "*",
        "±": "+/-",
        "−": "-",
        "–": "-",
        "—": "-",
        "…": "...",
        "→": "->",
        "≥": ">=",
        "≤": "<=",
    },
    **{"≈": "~", "“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "•": "*", "√": "sqrt", "∞": "inf"},
}


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler: a plain spelling where there is one, a question mark else."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = []
    for sign in error.object[error.start : error.end]:
        plain = unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode()
        signs.append(_STAND_INS.get(sign) or plain or "?")
    return "".join(signs), error.end


codecs.register_error("varaccel.stand_in", _stand_in)


def tolerant_console() -> None:
    """Let standard output and error replace what their encoding lacks, as on a console in ASCII or cp1252.

    For programs, at their start; a library leaves the streams of its user alone.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a notebook's or a test's stream may have none
        if reconfigure is not None and getattr(stream, "errors", None) in ("strict", "backslashreplace"):
            reconfigure(errors="varaccel.stand_in")
