"""The project as a whole: layout, packaging, documents and shipped weights."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT_FOLDERS = ("tokenizers", "pipelines", "eval", "app")


@pytest.mark.parametrize("folder", SCRIPT_FOLDERS)
def test_root_folders_are_not_packages(folder: str) -> None:
    """A package called `tokenizers` at the root would hide the library that transformers needs."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_imports_from_the_root_find_installed_packages() -> None:
    code = "import tokenizers, transformers; print(tokenizers.__file__); from tokenizers import Encoding"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "site-packages" in run.stdout


def test_scripts_do_not_shadow_modules() -> None:
    """`python eval/x.py` puts eval/ first on the path: a script must not be called like something imported."""
    for folder in SCRIPT_FOLDERS:
        for script in (ROOT / folder).glob("*.py"):
            assert script.stem not in sys.stdlib_module_names, script
            assert script.stem not in {
                "torch",
                "diffusers",
                "transformers",
                "tokenizers",
                "gradio",
                "varaccel",
            }


@pytest.mark.slow
def test_import_is_quick_and_quiet() -> None:
    """`import varaccel` loads no heavy library; its names do when they are used."""
    code = (
        "import sys, varaccel; assert 'torch' not in sys.modules and 'diffusers' not in sys.modules;"
        "assert varaccel.ZipAR(3).window == 3; assert 'AutoPipeline' in dir(varaccel)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""


def test_unknown_names_of_the_package() -> None:
    import varaccel

    with pytest.raises(AttributeError, match="no attribute 'ZipArr'"):
        varaccel.ZipArr  # noqa: B018


def test_shipped_weights_match_the_manifest() -> None:
    manifest = json.loads((ROOT / "weights" / "manifest.json").read_text())
    listed = set()
    for name, entry in {**manifest["models"], **manifest.get("measures", {})}.items():
        folder = ROOT / "weights" / name
        assert (folder / "README.md").is_file(), f"{name} has no card"
        for file, digest in entry["sha256"].items():
            assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest, f"{name}/{file}"
            listed.add(folder / file)
    weights = set((ROOT / "weights").rglob("*.safetensors"))
    assert weights == {p for p in listed if p.suffix == ".safetensors"}
    size = sum(p.stat().st_size for p in (ROOT / "weights").rglob("*") if p.is_file())
    assert size < 80e6


def test_links_between_documents() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "weights").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_documented_accelerator_works() -> None:
    """Architecture leads to the page of the worked example, and that page shows the file which test_examples runs."""
    architecture = (ROOT / "docs" / "architecture.md").read_text()
    page = "extending/accelerator.md"
    assert f"]({page})" in architecture
    shown = re.findall(r'^--8<-- "(.+)"$', (ROOT / "docs" / page).read_text(), re.MULTILINE)
    assert shown == ["docs/examples/accelerator.py"]
    example = (ROOT / shown[0]).read_text()
    assert "@register" in example
    assert re.search(r"^class \w+\(Accelerator\[CausalJob\]\):$", example, re.MULTILINE)
