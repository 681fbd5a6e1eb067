"""The notebook of the documents: it runs, and what it shows is what it shows again.

python -m tests.docs.test_notebook    # runs it and writes its outputs anew
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image

from tests.scripts import ROOT

pytestmark = pytest.mark.slow

NOTEBOOK = ROOT / "docs" / "notebooks" / "tour.ipynb"
MEASURED = "measured"
"""Tag of cells that tell seconds: other numbers on every machine."""

TOLERANCE = 0.05
"""How far other numbers may be off: rounding differs between processors, and with it what a guess is worth."""

_NUMBER = re.compile(r"\d+(?:\.\d+)?")


class ThisPython(KernelSpecManager):
    """One kernel: the Python that runs the tests, whatever kernels are installed for the user."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(notebook: Any, folder: Path) -> Any:
    """Run all cells in a fresh kernel that works in `folder` and talks over the loopback device."""
    environment = {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
    }
    manager = AsyncKernelManager(
        kernel_name="python3",
        kernel_spec_manager=ThisPython(),
        ip="127.0.0.1",
        connection_file=str(folder / "kernel.json"),
    )
    client = NotebookClient(
        notebook, km=manager, timeout=600, startup_timeout=120, resources={"metadata": {"path": str(folder)}}
    )
    return client.execute(env={**os.environ, **environment})


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: Any) -> tuple[str, list[tuple[int, int]]]:
    """What a cell printed or answered as text, and the sizes of the images that it showed."""
    text, sizes = "", []
    for output in cell.outputs:
        if output.output_type == "stream":
            text += output.text
        else:
            data = output.data
            if "image/png" in data:
                sizes.append(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).size)
            else:
                text += data["text/plain"]
    return text, sizes


def same_but_for_rounding(text: str, other: str) -> bool:
    """Equal words, and numbers that differ by at most the tolerance."""
    if [w.split() for w in _NUMBER.split(text)] != [w.split() for w in _NUMBER.split(other)]:
        return False
    pairs = zip(_NUMBER.findall(text), _NUMBER.findall(other), strict=True)
    return all(abs(float(a) - float(b)) <= max(1.0, TOLERANCE * float(a)) for a, b in pairs)


def test_numbers_may_differ_by_rounding_only() -> None:
    assert same_but_for_rounding("jacobi  74 passes, True", "jacobi 73 passes, True")
    assert not same_but_for_rounding("jacobi 74 passes", "jacobi 60 passes")
    assert not same_but_for_rounding("True", "False")


def test_it_is_committed_as_it_ran() -> None:
    notebook = read()
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 1.5e6
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), (
        "run once, from the top"
    )
    outputs = [output for cell in cells for output in cell.outputs]
    assert len(outputs) >= 10
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)
    assert sum(len(shown(cell)[1]) for cell in cells) >= 6
    assert not re.search(r"/(work|home|tmp|root)/", NOTEBOOK.read_text()), "a path of some machine"


@pytest.mark.timeout(900)
def test_it_runs_and_shows_the_same(tmp_path: Path) -> None:
    notebook = read()
    before = [shown(cell) for cell in code_cells(notebook)]
    after = execute(notebook, tmp_path)
    for number, (cell, (text, sizes)) in enumerate(zip(code_cells(after), before, strict=True), start=1):
        assert not [o for o in cell.outputs if o.get("name") == "stderr"], f"cell {number}: {cell.outputs}"
        now, now_sizes = shown(cell)
        assert now_sizes == sizes, f"cell {number}"
        if MEASURED in cell.metadata.get("tags", []):
            assert _NUMBER.sub("", now).split() == _NUMBER.sub("", text).split(), (
                f"cell {number}:\n{now}\n{text}"
            )
        else:
            assert same_but_for_rounding(text, now), f"cell {number}:\n{now}\ninstead of\n{text}"


def main() -> None:
    import tempfile

    from varaccel.files import atomic_path

    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(read(), Path(folder))
    for cell in code_cells(notebook):
        cell.metadata.pop("execution", None)  # when it ran
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    with atomic_path(NOTEBOOK) as temporary:
        nbformat.write(notebook, temporary)
    print(f"{NOTEBOOK.relative_to(ROOT)}: {NOTEBOOK.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
