"""What ships with the library, and where it lies: inside the installed package, or beside it in a checkout."""

from __future__ import annotations

import json
from pathlib import Path

from varaccel.errors import CheckpointError


def weights_folder() -> Path:
    """Where the shipped models are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    for folder in (package / "weights", package.parent / "weights"):
        if (folder / "manifest.json").is_file():
            return folder
    raise CheckpointError(
        f"no shipped models beside {package}; reinstall varaccel or pass the path of a model folder."
    )


def release_report_folder() -> Path | None:
    """Where the report of this release is, inside the installed package or beside it; None if it is in neither."""
    package = Path(__file__).parent
    folders = (package / "report", package.parent / "docs" / "report")
    return next((folder for folder in folders if any(folder.glob("*.json"))), None)


def shipped_models() -> dict[str, Path]:
    """Names and folders of the models that ship with the library."""
    folder = weights_folder()
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return {name: folder / name for name in manifest["models"]}


def smaller_model(model: str) -> str | None:
    """The shipped model that is a smaller version of `model`, if there is one."""
    name = f"{model}-small"
    return name if name in shipped_models() else None
