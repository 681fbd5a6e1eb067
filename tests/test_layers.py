"""Import direction: a room of the package imports only from rooms before it, and no two modules import each other.

Every import statement counts, wherever it stands: at the top, inside a function or under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "varaccel"

LEAVES = ("console", "errors", "files", "image_files", "image_inputs", "public_names", "shipped", "version")
"""Modules of the package itself that every room may import."""

LAYERS = (
    "scenes",
    "nn",
    "models",
    "tokenizers",
    "engine",
    "hosts",
    "speculation",
    "accelerators",
    "pipelines",
    "evaluation",
    "training",
)
"""Rooms from bottom to top."""

DOORS = ("cli", "app")
"""Rooms above all others, which nothing imports but `__main__`, and which do not import each other."""

Imports = Mapping[str, Mapping[str, int]]
"""Module -> imported module of the package -> line of the first such statement."""


def modules(root: Path) -> dict[str, Path]:
    """The modules of the package in `root` by their dotted names; a package's name stands for its `__init__`."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(module: str, path: Path, known: Mapping[str, Path]) -> Iterator[tuple[str, int]]:
    """What the statements of a module import from the package, and in which lines."""
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import module` reads the module; any other name comes out of `package/__init__.py`
            names = [f"{source}.{a.name}" if f"{source}.{a.name}" in known else source for a in node.names]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name.split(".")[0] == PACKAGE)


def all_imports(root: Path) -> Imports:
    known = modules(root)
    table: dict[str, dict[str, int]] = {}
    for module, path in known.items():
        table[module] = {}
        for target, line in imported(module, path, known):
            table[module].setdefault(target, line)
    return table


def room(module: str) -> str:
    """The part of a name after the package's: a room, a leaf, `__main__`, or "" for the package root."""
    return module.split(".")[1] if "." in module else ""


def complaint(module: str, target: str) -> str | None:
    """What is wrong with an import of `target` by `module`; None if nothing is."""
    here, there = room(module), room(target)
    if there == "":
        return "imports the package root"
    if here == "":  # the root offers the names of all rooms
        return None
    if there in DOORS:
        return None if here in (there, "__main__") else f"imports {there}, which nothing may import"
    if here in LEAVES:
        return None if there in LEAVES else "is a leaf and imports a room"
    if there in LEAVES or here in (*DOORS, "__main__") or here == there:
        return None
    if here not in LAYERS or there not in LAYERS:
        return f"{here if here not in LAYERS else there} has no place among the layers"
    return None if LAYERS.index(there) < LAYERS.index(here) else f"{here} lies below {there}"


def wrong_ways(imports: Imports) -> list[str]:
    """One line for every import that goes the wrong way."""
    return [
        f"{module}:{line} imports {target}: {wrong}"
        for module, targets in imports.items()
        for target, line in targets.items()
        if (wrong := complaint(module, target)) is not None
    ]


def cycle(imports: Imports) -> Sequence[str]:
    """Modules that import each other in a ring, the first of them again at the end; none if there is no ring."""
    try:
        TopologicalSorter({module: set(targets) for module, targets in imports.items()}).prepare()
    except CycleError as error:
        ring: list[str] = error.args[1]
        return ring[::-1]  # graphlib lists predecessors, which here are what is imported
    return ()


def test_rooms_import_only_from_rooms_before_them() -> None:
    found = wrong_ways(all_imports(ROOT))
    assert not found, "\n".join(found)


def test_no_modules_import_each_other() -> None:
    ring = cycle(all_imports(ROOT))
    assert not ring, " -> ".join(ring)


def test_networks_are_called_with_plain_data() -> None:
    """What all rooms share knows nothing but errors."""
    table = all_imports(ROOT)
    rooms = {room(target) for module, targets in table.items() if room(module) == "nn" for target in targets}
    assert rooms <= {"errors", "nn"}


def test_every_room_has_its_place() -> None:
    assert {room(module) for module in modules(ROOT)} == {"", "__main__", *LEAVES, *LAYERS, *DOORS}


# -- the checker itself --------------------------------------------------------------------------------


def write(root: Path, files: Mapping[str, str]) -> Imports:
    """The imports of a made-up package that has these modules and nothing else."""
    for name, text in {"__init__.py": "", "errors.py": "", **files}.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (path.parent / "__init__.py").touch()
    return all_imports(root)


def test_what_is_allowed(tmp_path: Path) -> None:
    table = write(
        tmp_path,
        {
            "__init__.py": "from varaccel.pipelines.base import Pipeline\n",
            "__main__.py": "from varaccel.cli.commands import main\n",
            "cli/commands.py": "from varaccel.pipelines import base\nfrom . import options\n",
            "cli/options.py": "import varaccel.errors\nimport json\n",
            "pipelines/base.py": "from ..engine.loop import run\nfrom varaccel.errors import InputError\n",
            "engine/loop.py": "import torch\nimport varaccelerate\n",
        },
    )
    assert wrong_ways(table) == []
    assert cycle(table) == ()
    assert set(table["varaccel.cli.commands"]) == {"varaccel.pipelines.base", "varaccel.cli.options"}
    assert set(table["varaccel.pipelines.base"]) == {"varaccel.engine.loop", "varaccel.errors"}
    assert set(table["varaccel.engine.loop"]) == set()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("nn/cache.py", "from varaccel.engine import loop\n", "nn lies below engine"),
        ("nn/cache.py", "def f():\n    from varaccel.engine.loop import run\n", "nn lies below engine"),
        (
            "models/net.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..engine.loop import run\n",
            "varaccel.models.net:3 imports varaccel.engine.loop: models lies below engine",
        ),
        ("training/run.py", "import varaccel.cli.commands\n", "imports cli, which nothing may import"),
        ("app/page.py", "from varaccel.cli import commands\n", "imports cli, which nothing may import"),
        ("cli/commands.py", "from varaccel.app import page\n", "imports app, which nothing may import"),
        ("pipelines/base.py", "from varaccel import ZipAR\n", "imports the package root"),
        ("pipelines/base.py", "import varaccel\n", "imports the package root"),
        ("errors.py", "from varaccel.engine import loop\n", "is a leaf and imports a room"),
        ("attic/box.py", "from varaccel.engine import loop\n", "attic has no place among the layers"),
    ],
)
def test_a_wrong_way_is_found(tmp_path: Path, file: str, text: str, message: str) -> None:
    others = {"engine/loop.py": "", "cli/commands.py": "", "app/page.py": ""}
    (found,) = wrong_ways(write(tmp_path, {**others, file: text}))
    assert message in found


def test_a_ring_is_found(tmp_path: Path) -> None:
    files = {
        "engine/loop.py": "from varaccel.engine.job import Job\n",
        "engine/job.py": "def f():\n    from varaccel.engine import session\n",
        "engine/session.py": "from .loop import run\n",
    }
    ring = cycle(write(tmp_path, files))
    assert ring[0] == ring[-1]
    assert set(ring) == {"varaccel.engine.loop", "varaccel.engine.job", "varaccel.engine.session"}
    table = all_imports(tmp_path)
    assert all(after in table[before] for before, after in pairwise(ring))
