"""Classes by their names."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from varaccel.errors import InputError, unknown_name

logger = logging.getLogger(__name__)


def find_class(name: str, entries: Sequence[str], classes: int) -> int:
    """The label that a name means.

    An entry of the list, such as "cardigan" or "crane, construction crane", is the class that it stands for. One of the
    names in it, which commas part, will do if no other entry has it: ImageNet has two pandas, and "crane" twice.
    Upper case and lower case are the same.

    Args:
        entries: of each label, names parted by commas; empty for a model without names.
        classes: how many labels the model has, for the message.

    Raises:
        InputError: no class of that name, or several.
    """
    wanted = _plain(name)
    whole = [label for label, entry in enumerate(entries) if _plain(entry) == wanted]
    parts = [label for label, entry in enumerate(entries) if wanted in map(_plain, str(entry).split(","))]
    found = whole or parts
    if not found:
        names = [_plain(part) for entry in entries for part in str(entry).split(",")]
        raise unknown_name("class", name, list(dict.fromkeys(names)) or [f"0 to {classes - 1}"])
    if len(found) > 1:
        meant = " or ".join(f"{label} ({entries[label]})" for label in found)
        raise InputError(f"{name!r} means several classes; say which by its label: {meant}.")
    others = [label for label in parts if label != found[0]]
    if others:
        also = ", ".join(f"{label} ({entries[label]})" for label in others)
        logger.warning("%r is class %d; it may also mean %s.", name, found[0], also)
    return found[0]


def _plain(name: object) -> str:
    return " ".join(str(name).lower().split())
