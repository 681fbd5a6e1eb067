"""Where a model name leads: a shipped model, a folder or a hub repository."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn

from varaccel.errors import CheckpointError, InputError, unknown_name
from varaccel.pipelines.catalog import PUBLISHED
from varaccel.shipped import shipped_models

BORROWED = "borrowed.json"
"""File of a model folder that says which components lie in the folder of another model beside it."""

PIPELINES: dict[str, type[LoadablePipeline]] = {}
"""Pipeline classes by the name that a model folder records."""

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that concern the download from the hub."""
    return {name: options[name] for name in HUB_OPTIONS if name in options}


def resolve_model(name: str | os.PathLike[str], **hub_options: Any) -> Path:
    """The local folder of a model in diffusers' layout.

    Args:
        name: name of a shipped model, a folder, or a hub repository (downloaded as a whole, since diffusers
            only fetches components of its own classes).
        hub_options: for `huggingface_hub.snapshot_download`: revision, token, cache_dir, ...

    Raises:
        CheckpointError: nothing there, or not a pipeline folder.
    """
    text = os.fspath(name)
    shipped = shipped_models()
    if text in shipped:
        return _checked(shipped[text])
    folder = Path(text)
    if folder.is_dir():
        return _checked(folder)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(str(unknown_name("model", text, [*shipped, *PUBLISHED])))
    try:
        return _checked(Path(snapshot_download(text, **hub_options)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{text!r} is neither a shipped model nor a folder, and the hub gave nothing "
            f"({type(error).__name__}); check the name and the connection."
        ) from error


def _checked(folder: Path) -> Path:
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"{folder} holds no model_index.json, so it is no pipeline folder; "
            "load a published single file with from_single_file."
        )
    return folder


def pipeline_class_name(folder: Path) -> str:
    """The `_class_name` in the folder's index.

    Raises:
        CheckpointError: the index is not readable.
    """
    try:
        return str(json.loads((folder / "model_index.json").read_text())["_class_name"])
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / 'model_index.json'} is damaged; fetch the model again.") from error


def borrowed_components(folder: Path) -> dict[str, Path]:
    """Components that `folder` borrows from models beside it, and where they are.

    `borrowed.json` names their folders relative to the model's own: {"tokenizer": "../mini-llamagen/tokenizer"}.

    Raises:
        CheckpointError: the file is damaged, leads out of the directory that holds the model, or to nothing.
    """
    file = folder / BORROWED
    if not file.is_file():
        return {}
    try:
        entries = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged; fetch the model again.") from error
    if not isinstance(entries, dict) or not all(isinstance(path, str) for path in entries.values()):
        raise CheckpointError(f"{file} must name a folder for each component; fetch the model again.")
    home = folder.resolve()
    found = {}
    for name, path in entries.items():
        target = (home / path).resolve()
        if home.parent not in target.parents:
            raise CheckpointError(
                f"{file} borrows {name} from {path}, outside of {home.parent}; mend the file."
            )
        if not target.is_dir():
            raise CheckpointError(
                f"{folder} borrows {name} from {path}, which is not there; put that model beside it."
            )
        found[name] = target
    return found


def _load_borrowed(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The borrowed components of a model folder that are not among `options` already."""
    paths = borrowed_components(folder)
    index = json.loads((folder / "model_index.json").read_text()) if paths else {}
    return {
        name: _load_component(folder, name, index.get(name), path, options)
        for name, path in paths.items()
        if name not in options
    }


def _load_component(folder: Path, name: str, entry: Any, path: Path, options: Mapping[str, Any]) -> Any:
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
        raise CheckpointError(
            f"{folder} borrows {name}, but its model_index.json names no class for it; fetch the model again."
        )
    module, class_name = entry
    if module.split(".")[0] not in ("varaccel", "transformers", "diffusers"):
        raise CheckpointError(
            f"{folder} borrows a {class_name} of {module}; only classes of varaccel, transformers and diffusers "
            "can be borrowed."
        )
    try:
        component_class: Any = getattr(importlib.import_module(module), class_name)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} borrows a {class_name}, which {module} does not have; update the library."
        ) from error
    if not (isinstance(component_class, type) and hasattr(component_class, "from_pretrained")):
        raise CheckpointError(f"{folder} borrows a {class_name}, which is nothing that can be loaded.")
    load: Any = component_class.from_pretrained
    if not issubclass(component_class, nn.Module):
        return load(path)
    dtype = options.get("dtype", options.get("torch_dtype"))
    if isinstance(dtype, Mapping):
        dtype = dtype.get(name, dtype.get("default", torch.float32))  # as diffusers does
    return load(path, **({} if dtype is None else {"dtype": dtype}))


def _is_own(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "varaccel"


class LoadablePipeline(DiffusionPipeline):
    """diffusers' pipeline with the library's names for models and whole-or-nothing saving.

    Every subclass is known by its name, so that `AutoPipeline` loads folders that it saved. Of a user's classes of one
    name the last defined counts, as in a notebook whose cell runs again; the library's own names are kept.
    """

    def __init_subclass__(cls, *, abstract: bool = False, **options: Any) -> None:
        super().__init_subclass__(**options)
        if abstract:
            return
        known = PIPELINES.get(cls.__name__)
        if known is not None and _is_own(known) and not _is_own(cls):
            raise TypeError(
                f"there is a pipeline class {cls.__name__} in {known.__module__}; model folders record the name, so "
                "choose another."
            )
        PIPELINES[cls.__name__] = cls

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options: Any) -> Self:
        """A pipeline of this class on the components and settings of another, which share them.

        Args:
            options: components and settings instead of the other's.

        Raises:
            InputError: a component that this class needs and neither has.
        """
        parameters = inspect.signature(cls.__init__).parameters
        found = {**dict(pipeline.config), **pipeline.components, **options}
        chosen = {name: found[name] for name in parameters if name in found and name != "self"}
        missing = [
            name
            for name, parameter in parameters.items()
            if name != "self" and parameter.default is parameter.empty and name not in chosen
        ]
        if missing:
            raise InputError(
                f"a {type(pipeline).__name__} has no {' and no '.join(missing)} for a {cls.__name__}; pass it as well."
            )
        return cls(**chosen)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> Self:
        """Load a shipped model by name, a folder, or a hub repository.

        Args:
            name: see `resolve_model`.
            options: of `DiffusionPipeline.from_pretrained`, such as `dtype=torch.bfloat16`, or of the hub
                (`revision`, `token`, `cache_dir`, `local_files_only`).

        Raises:
            CheckpointError: nothing there, not a pipeline of this class, or a damaged file.
        """
        folder = resolve_model(name, **hub_options(options))
        found = pipeline_class_name(folder)
        if found != cls.__name__:
            raise CheckpointError(
                f"{folder} holds a {found}, not a {cls.__name__}; load it with AutoPipeline."
            )
        try:
            local = {k: v for k, v in options.items() if k not in HUB_OPTIONS}
            return super().from_pretrained(folder, **local, **_load_borrowed(folder, local))
        except CheckpointError:
            raise
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
            reason = str(error).strip().split("\n")[0]
            raise CheckpointError(f"{folder} cannot be loaded: {reason}") from error

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Write all components, borrowed ones too; a failure on the way (a full disk) leaves `folder` as it was.

        Files of `folder` that are no part of the pipeline, such as a model card, stay.
        """
        target = Path(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{target.name}.", suffix=".tmp", dir=target.parent
        ) as scratch:
            written, replaced = Path(scratch) / "new", Path(scratch) / "old"
            super().save_pretrained(written, **options)
            replaced.mkdir()
            target.mkdir(exist_ok=True)
            for entry in written.iterdir():  # renames only: nothing here needs space
                if (target / entry.name).exists():
                    (target / entry.name).rename(replaced / entry.name)
                entry.rename(target / entry.name)
            if (target / BORROWED).exists():  # everything is here now
                (target / BORROWED).rename(replaced / BORROWED)


def load_folder(name: str | os.PathLike[str], **options: Any) -> LoadablePipeline:
    """The pipeline of a shipped model, a folder or a hub repository, by the class that it records.

    Raises:
        CheckpointError: nothing there, or nothing that this library can load.
    """
    folder = resolve_model(name, **hub_options(options))
    class_name = pipeline_class_name(folder)
    if class_name not in PIPELINES:
        raise CheckpointError(str(unknown_name("pipeline class", class_name, PIPELINES)))
    return PIPELINES[class_name].from_pretrained(folder, **options)
