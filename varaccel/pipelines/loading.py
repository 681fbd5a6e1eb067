"""Where a model name leads: a shipped model, a folder or a hub repository."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn

from varaccel.errors import CheckpointError, InputError, unknown_name
from varaccel.nn.checkpoints import load_strict, not_weights, stored_names, wrapped_weights
from varaccel.nn.precision import as_dtype, cast, is_dtype_name
from varaccel.pipelines.catalog import PUBLISHED
from varaccel.pipelines.load_options import (
    HUB_OPTIONS,
    LoadOptions,
    constructor_parameters,
    number_type_option,
)
from varaccel.shipped import shipped_models

BORROWED = "borrowed.json"
"""File of a model folder that says which components lie in the folder of another model beside it."""

PIPELINES: dict[str, type[LoadablePipeline]] = {}
"""Pipeline classes by the name that a model folder records."""

MODEL_TYPES: dict[str, str] = {}
"""Names of pipeline classes by the `model_type` of the models of transformers that they are for."""

logger = logging.getLogger(__name__)


def resolve_model(name: str | os.PathLike[str], **hub_options: Any) -> Path:
    """The local folder of a model in diffusers' layout.

    Args:
        name: name of a shipped model, a folder, or a hub repository (downloaded as a whole, since diffusers
            only fetches components of its own classes). Where a folder is called like a shipped model, the bare name
            means the shipped one, with a warning; `./NAME`, `NAME/` and path objects mean the folder.
        hub_options: for `huggingface_hub.snapshot_download`: revision, token, cache_dir, ...

    Raises:
        CheckpointError: nothing there, or not a pipeline folder.
        InputError: neither a string nor a path.
    """
    if is_path(name):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise CheckpointError(f"there is no model folder {os.fspath(name)}; check the path.")
        return _local(folder, hub_options)
    text = str(name)
    shipped = shipped_models()
    if text in shipped:
        tell_of_namesake(text, "shipped", shipped[text])
        return _local(shipped[text], hub_options)
    folder = Path(text)
    if folder.is_dir():
        return _local(folder, hub_options)
    if text in PUBLISHED:
        raise CheckpointError(f"{text!r} is a published model; load it with varaccel.AutoPipeline.")
    if text.count("/") != 1:
        raise CheckpointError(str(unknown_name("model", text, [*shipped, *PUBLISHED])))
    try:
        return _checked(Path(snapshot_download(text, **hub_options)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{text!r} is neither a shipped model nor a folder, and the hub gave nothing "
            f"({type(error).__name__}); check the name and the connection."
        ) from error


def is_path(name: str | os.PathLike[str]) -> bool:
    """Whether a model's name can only mean a folder: a path object, `./NAME`, `NAME/`, `~/NAME`, an absolute path.

    Raises:
        InputError: neither a string nor a path.
    """
    if not isinstance(name, str):
        if not isinstance(name, os.PathLike):
            raise InputError(f"a model is named by a string or a path, got {type(name).__name__}.")
        return True
    ends = tuple(filter(None, ("/", os.sep, os.altsep)))
    return name.startswith((".", "~")) or name.endswith(ends) or Path(name).is_absolute()


def tell_of_namesake(name: str, kind: str, chosen: Path | None = None) -> None:
    """Warn where a model folder is called like a known model that is loaded in its place.

    Args:
        kind: what is loaded: "shipped" or "published".
        chosen: the folder that is loaded.
    """
    folder = Path(name)
    if (folder / "model_index.json").is_file() and (chosen is None or folder.resolve() != chosen.resolve()):
        logger.warning(
            "%r is the %s model; the folder %s is another one: write ./%s to load it.",
            name,
            kind,
            folder.absolute(),
            name,
        )


def _local(folder: Path, hub_options: Mapping[str, Any]) -> Path:
    if hub_options.get("revision") not in (None, "main"):
        logger.warning(
            "%s is a folder of one revision; revision=%r changes nothing.", folder, hub_options["revision"]
        )
    return _checked(folder)


def _checked(folder: Path) -> Path:
    if not is_pipeline_folder(folder) and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no model_index.json, so it is no pipeline folder, and no config.json of a model of "
            "transformers; load a published single file with from_single_file."
        )
    return folder


def is_pipeline_folder(folder: Path) -> bool:
    """Whether a folder is in diffusers' layout; otherwise it holds a single model."""
    return (folder / "model_index.json").is_file()


def pipeline_class_name(folder: Path) -> str:
    """The `_class_name` in the folder's index, or the class for its `model_type` if it holds a model of transformers.

    Raises:
        CheckpointError: the index is not readable; a model that draws no images.
    """
    if not is_pipeline_folder(folder):
        return _class_for_model(folder / "config.json")
    try:
        return str(json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"])
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / 'model_index.json'} is damaged; fetch the model again.") from error


def _class_for_model(file: Path) -> str:
    try:
        model_type = str(json.loads(file.read_text(encoding="utf-8")).get("model_type"))
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged; fetch the model again.") from error
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"{file.parent} holds a model of type {model_type!r}, which draws no images token by token; models of "
            f"transformers that do are {', '.join(sorted(MODEL_TYPES))}."
        )
    return MODEL_TYPES[model_type]


def borrowed_components(folder: Path) -> dict[str, Path]:
    """Components that `folder` borrows from models beside it, and where they are.

    `borrowed.json` names their folders relative to the model's own: {"tokenizer": "../mini-llamagen/tokenizer"}. What
    lies beside is seen from the path by which the model is loaded, and from where it lies if that path is a link.

    Raises:
        CheckpointError: the file is damaged, leads out of the directory that holds the model, or to nothing.
    """
    file = folder / BORROWED
    if not file.is_file():
        return {}
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged; fetch the model again.") from error
    if not isinstance(entries, dict) or not all(isinstance(path, str) for path in entries.values()):
        raise CheckpointError(f"{file} must name a folder for each component; fetch the model again.")
    found = {}
    for name, path in entries.items():
        # The text must stay beside the model; links may lead anywhere, since only the user of this machine makes them.
        places = [Path(os.path.normpath(home / path)) for home in (folder.absolute(), folder.resolve())]
        homes = [Path(os.path.normpath(folder.absolute())).parent, folder.resolve().parent]
        if any(home not in place.parents for home, place in zip(homes, places, strict=True)):
            raise CheckpointError(f"{file} borrows {name} from {path}, outside of {homes[0]}; mend the file.")
        target = next((place for place in places if place.is_dir()), None)
        if target is None:
            raise CheckpointError(
                f"{folder} borrows {name} from {path}, which is not there; put that model beside it."
            )
        found[name] = target
    return found


def _load_borrowed(folder: Path, options: LoadOptions) -> dict[str, Any]:
    """The borrowed components of a model folder that were not passed."""
    paths = borrowed_components(folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8")) if paths else {}
    return {
        name: _load_component(folder, name, index.get(name), path, options)
        for name, path in paths.items()
        if name not in options.parts
    }


def _load_wrapped(folder: Path, options: LoadOptions) -> dict[str, Any]:
    """Networks of a model folder whose weights bear names that DDP, FSDP or torch.compile changed.

    diffusers would find none of them, and leave the networks at random with no more than a warning.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    for name, entry in index.items():
        state = None if name in options.parts else wrapped_weights(folder / name)
        if state is None:
            continue
        network_class = _component_class(folder, name, entry)
        if not issubclass(network_class, ModelMixin):
            continue
        network: Any = network_class.from_config(network_class.load_config(folder / name))
        load_strict(network, state, source=str(folder / name))
        dtype = options.dtype_of(name)
        if dtype is not None:
            cast(network, dtype)
        found[name] = network.eval()
    return found


def _check_complete(folder: Path, pipe: Any, passed: Mapping[str, Any]) -> None:
    """Refuse a folder that lacks weights of the library's networks, which diffusers draws at random.

    Raises:
        CheckpointError: names the first of them.
    """
    for name, part in pipe.components.items():
        if name in passed or not isinstance(part, nn.Module) or not _is_own(type(part)):
            continue
        stored = stored_names(folder / name)
        missing = [] if stored is None else [key for key in part.state_dict() if key not in stored]
        if missing:
            raise CheckpointError(f"{folder / name} lacks {first_of(missing)}; save the model again.")


def first_of(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are, for messages."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _load_component(folder: Path, name: str, entry: Any, path: Path, options: LoadOptions) -> Any:
    component_class = _component_class(folder, name, entry)
    load: Any = component_class.from_pretrained
    if not issubclass(component_class, nn.Module):
        return load(path)
    dtype = options.dtype_of(name)
    return load(path, **({} if dtype is None else {"dtype": dtype}))


def _component_class(folder: Path, name: str, entry: Any) -> Any:
    """The class that a model's index names for a component, of a library that is trusted."""
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
    return component_class


_RECORDED = ("_class_name", "_diffusers_version", "_name_or_path")
"""Entries of a configuration that tell where a pipeline comes from."""


def _no_weights_in(folder: Path) -> str | None:
    """What stands in the place of weights in a folder that could not be loaded, if that is the reason."""
    files = (file for ending in ("safetensors", "bin") for file in sorted(folder.glob(f"*/*.{ending}")))
    return next((reason for file in files if (reason := not_weights(file)) is not None), None)


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
            options: components and settings instead of the other's; `dtype` converts the components, which the other
                pipeline shares (they keep their number types if it is left out).

        Raises:
            InputError: a component that this class needs and neither has; an option that it does not have.
        """
        dtype = number_type_option(options)
        parameters = constructor_parameters(cls)
        for name in options:
            if name not in parameters:
                raise unknown_name(f"option of {cls.__name__}", name, [*parameters, "dtype"])
        config = {name: value for name, value in pipeline.config.items() if name not in _RECORDED}
        # settings that a class on the way had no use for stay under private names, as in diffusers
        settings = {name[1:]: value for name, value in config.items() if name.startswith("_")}
        settings |= {
            name: value
            for name, value in config.items()
            if not name.startswith("_") and name not in pipeline.components
        }
        found = {**settings, **pipeline.components, **options}
        chosen = {name: found[name] for name in parameters if name in found}
        missing = [
            name
            for name, parameter in parameters.items()
            if parameter.default is inspect.Parameter.empty and name not in chosen
        ]
        if missing:
            raise InputError(
                f"a {type(pipeline).__name__} has no {' and no '.join(missing)} for a {cls.__name__}; pass it as well."
            )
        pipe = cls(**chosen)
        unused = {f"_{name}": value for name, value in settings.items() if name not in chosen}
        pipe.register_to_config(**unused, _name_or_path=pipeline.config.get("_name_or_path"))
        if dtype is not None:
            for part in pipe.components.values():
                if isinstance(part, nn.Module):
                    cast(part, dtype)
        return pipe

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> Self:
        """Load a shipped model by name, a folder, or a hub repository.

        Args:
            name: see `resolve_model`.
            options: `dtype` (or `torch_dtype`: a number type, its name, or one by component), `device_map` (a device,
                or "balanced"), components and settings instead of the model's own (`guidance_scale=4.0`), how
                diffusers reads the files (`variant`, `use_safetensors`, `low_cpu_mem_usage`, ...), or of the hub
                (`revision`, `token`, `cache_dir`, `local_files_only`, `force_download`), which concern downloads only.

        Raises:
            CheckpointError: nothing there, not a pipeline of this class, or a damaged file.
            InputError: an unknown option, number type or device.
        """
        chosen = LoadOptions.of(options)
        chosen.check_parts(cls)
        folder = resolve_model(name, **chosen.hub)
        found = pipeline_class_name(folder)
        if found != cls.__name__:
            raise CheckpointError(
                f"{folder} holds a {found}, not a {cls.__name__}; load it with AutoPipeline."
            )
        try:
            parts = {**chosen.parts, **_load_borrowed(folder, chosen), **_load_wrapped(folder, chosen)}
            dtype = {} if chosen.dtype is None else {"dtype": chosen.dtype}
            pipe: Self = super().from_pretrained(folder, **chosen.reading, **dtype, **parts)
        except CheckpointError:
            raise
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
            reason = _no_weights_in(folder) or str(error).strip().split("\n")[0]
            raise CheckpointError(f"{folder} cannot be loaded: {reason}") from error
        _check_complete(folder, pipe, parts)
        if chosen.device is not None:
            pipe.to(chosen.device)
        return pipe

    @classmethod
    def _of_single_files(cls, components: Mapping[str, Any], options: dict[str, Any]) -> Self:
        """A pipeline of components that were read from single files.

        Args:
            options: components and settings in their place, `dtype` and `device_map`.

        Raises:
            InputError: an unknown option; components that do not fit each other.
        """
        chosen = LoadOptions.of(options)
        chosen.check_parts(cls)
        chosen.check_single_files(cls.__name__)
        pipe = cls(**{**components, **chosen.parts})
        chosen.apply(pipe)
        return pipe

    def to(self, *arguments: Any, **options: Any) -> Self:
        """As diffusers', and number types may be named: `to("cuda", "bfloat16")`, `to(dtype="float16")`.

        Raises:
            InputError: an unknown number type.
        """
        typed = [as_dtype(a) if isinstance(a, str) and is_dtype_name(a) else a for a in arguments]
        dtype = options.pop("torch_dtype", None)
        dtype = options.pop("dtype", dtype)
        if dtype is not None:
            options["dtype"] = as_dtype(dtype)
        moved: Self = super().to(*typed, **options)
        return moved

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
    hub = {option: value for option, value in options.items() if option in HUB_OPTIONS}
    local = {option: value for option, value in options.items() if option not in hub}
    folder = resolve_model(name, **hub)
    class_name = pipeline_class_name(folder)
    if class_name not in PIPELINES:
        raise CheckpointError(str(unknown_name("pipeline class", class_name, PIPELINES)))
    return PIPELINES[class_name].from_pretrained(folder, **local)
