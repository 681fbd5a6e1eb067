"""Griffe extension of the site's build: names that a docstring describes together get a row each.

    head_steps, head_sampler: as in the call if None.

is how this code base writes options that share a description. Griffe reads one name per entry, so the group is
repeated for each of its names before it is parsed; then types and defaults are found as well. "Class attributes:" is
read like "Attributes:".
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Docstring, Extension, Function, Object, ParameterKind

_SECTION = re.compile(r"^(Args|Attributes|Class attributes):[ \t]*$")
_NAMES = re.compile(r"^    (\w+(?:,\s+\w+)+):\s*(.*)$", re.DOTALL)


def split_groups(text: str, stars: dict[str, str] | None = None) -> str:
    """`text` of a docstring with one entry per name in its sections of arguments and attributes.

    Args:
        text: without common indentation.
        stars: how a name stands in the signature, such as `**options`, where that differs.
    """
    lines: list[str] = []
    inside = False
    for block in _blocks(text.splitlines()):
        if not block.startswith(" "):
            inside = bool(_SECTION.match(block))
            block = block.replace("Class attributes:", "Attributes:") if inside else block
        group = _NAMES.match(block) if inside else None
        if group is None:
            lines.append(block)
            continue
        names = [name.strip() for name in group[1].split(",")]
        lines += [f"    {(stars or {}).get(name, name)}: {group[2]}" for name in names]
    return "\n".join(lines)


def _blocks(lines: list[str]) -> list[str]:
    """Lines joined with those that continue them: deeper than an entry of a section."""
    blocks: list[str] = []
    for line in lines:
        if blocks and line.startswith("     ") and re.match(r"^    \S", blocks[-1]):
            blocks[-1] += "\n" + line
        else:
            blocks.append(line)
    return blocks


class GroupedNames(Extension):
    """Splits groups of names in every docstring that is loaded."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        docstring: Docstring | None = obj.docstring
        if docstring is None:
            return
        stars: dict[str, str] = {}
        if isinstance(obj, Function):
            keywords = (p for p in obj.parameters if p.kind is ParameterKind.var_keyword)
            stars = {p.name.lstrip("*"): "**" + p.name.lstrip("*") for p in keywords}
        docstring.value = split_groups(docstring.value, stars)
