"""Scripts of the root folders as modules, which they are not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent


def load_script(path: str, name: str | None = None) -> ModuleType:
    """A script such as `eval/fid.py`, loaded anew; run if its name is "__main__"."""
    file = ROOT / path
    spec = importlib.util.spec_from_file_location(name or f"script_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if name is None:
        sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module
