"""Options of `from_pretrained`: the same for shipped, published and saved models."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from varaccel.errors import InputError, unknown_name
from varaccel.nn.precision import as_dtype, cast

FIXED_PRECISION = ("vae", "vq_model", "text_encoder")
"""Components that keep their own precision, as with published models."""

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")

_HARMLESS = ("use_safetensors", "low_cpu_mem_usage", "disable_mmap")
"""How files are read; single files are read safely and one by one, whatever these say."""

READING_OPTIONS = (
    *_HARMLESS,
    "variant",
    "proxies",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "quantization_config",
    "trust_remote_code",
    "output_loading_info",
)
"""Options with which diffusers reads a folder."""

MODEL_OPTIONS = (
    "attn_implementation",
    "use_kernels",
    "distributed_config",
    "tp_plan",
    "tp_size",
    "offload_buffers",
    "experts_implementation",
    "gguf_file",
)
"""Further options with which transformers reads a model."""

DtypeChoice = torch.dtype | dict[str, torch.dtype] | None


@dataclass(frozen=True)
class LoadOptions:
    """Checked options of `from_pretrained`.

    Attributes:
        hub: of the download.
        dtype: number type, or one by component with that of the others under "default"; None: not said.
        device: where the pipeline goes; None: not said.
        reading: how diffusers reads a folder.
        parts: components and settings in the place of the model's own.
    """

    hub: Mapping[str, Any]
    dtype: DtypeChoice
    device: torch.device | None
    reading: Mapping[str, Any]
    parts: Mapping[str, Any]

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """The options as they were typed.

        Raises:
            InputError: an unknown number type, two of them, a device that is not there.
        """
        left = dict(options)
        hub = {name: left.pop(name) for name in HUB_OPTIONS if name in left}
        dtype = _chosen_dtype(left)
        reading = {name: left.pop(name) for name in READING_OPTIONS if name in left}
        device = None
        placed = left.pop("device_map", None)
        if placed == "balanced":  # over several GPUs: diffusers knows how
            reading["device_map"] = placed
        elif placed is not None:
            device = _device(placed)
        return cls(hub, dtype, device, reading, left)

    def check_parts(self, pipeline_class: type) -> None:
        """Refuse what is no component and no setting of a class.

        Raises:
            InputError: names the option.
        """
        known = constructor_parameters(pipeline_class)
        for name in self.parts:
            if name in MODEL_OPTIONS:
                raise InputError(
                    f"{name} is for models of transformers; leave it out for a {pipeline_class.__name__}."
                )
            if name not in known:
                raise unknown_name(
                    f"option of {pipeline_class.__name__}",
                    name,
                    [*known, *HUB_OPTIONS, *READING_OPTIONS, "dtype", "device_map"],
                )

    def check_single_files(self, name: str) -> None:
        """Refuse what only folders have.

        Raises:
            InputError: names the option.
        """
        for option, value in self.reading.items():
            if option not in _HARMLESS and value is not None:
                raise InputError(
                    f"{name!r} is published as single files, for which there is no {option}={value!r}; leave it out"
                    + (", or choose a number type with dtype." if option == "variant" else ".")
                )

    def dtype_of(self, component: str) -> torch.dtype | None:
        """The number type of a component; None if nothing was said of it."""
        if isinstance(self.dtype, dict):
            return self.dtype.get(component, self.dtype.get("default"))
        return self.dtype

    def apply(self, pipe: Any) -> None:
        """Convert and move a pipeline made of single files; a number type for all spares `FIXED_PRECISION`."""
        for name, part in pipe.components.items():
            fixed = name in FIXED_PRECISION and not isinstance(self.dtype, dict)
            dtype = self.dtype_of(name)
            if isinstance(part, nn.Module) and dtype is not None and not fixed:
                cast(part, dtype)
        if self.device is not None:
            pipe.to(self.device)


def is_placement(options: Mapping[str, Any]) -> bool:
    """Whether `device_map` spreads a model over devices, and does not name one."""
    placed = options.get("device_map")
    return isinstance(placed, Mapping) or placed in ("auto", "balanced", "balanced_low_0", "sequential")


def _chosen_dtype(options: dict[str, Any]) -> DtypeChoice:
    """Take both spellings of the number type out of the options."""
    given = [options.pop(name) for name in ("dtype", "torch_dtype") if options.get(name) is not None]
    for name in ("dtype", "torch_dtype"):
        options.pop(name, None)
    chosen: list[DtypeChoice] = [
        {part: as_dtype(dtype) for part, dtype in value.items()}
        if isinstance(value, Mapping)
        else as_dtype(value)
        for value in given
    ]
    if len(chosen) == 2 and chosen[0] != chosen[1]:
        raise InputError(f"dtype={given[0]!r} and torch_dtype={given[1]!r} differ; pass dtype alone.")
    return chosen[0] if chosen else None


def _device(placed: Any) -> torch.device:
    try:
        if not isinstance(placed, (str, int, torch.device)) or isinstance(placed, bool):
            raise TypeError(type(placed).__name__)
        device = torch.device(placed)
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"device_map={placed!r} is no device that torch can use here; name one, such as 'cpu', or 'balanced'."
        ) from error
    return device


def constructor_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The named parameters of a constructor, with those of its bases where it hands further ones on."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        found = {**{p.name: p for p in parameters if p.kind not in _COLLECTING}, **found}
        if not any(p.kind in _COLLECTING for p in parameters):
            break
    return found


_COLLECTING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def number_type_option(options: dict[str, Any]) -> torch.dtype | None:
    """Take `dtype` or `torch_dtype` out of options that have one number type for all.

    Raises:
        InputError: unknown, two of them, or one by component.
    """
    dtype = _chosen_dtype(options)
    if isinstance(dtype, dict):
        raise InputError("one dtype for all components is meant here, such as torch.float16.")
    return dtype
