"""Reading published weight files safely and loading them strictly.

Published files are pickles or safetensors, bare or wrapped in a training checkpoint. They are read with
`weights_only`, so a file that carries code is refused rather than run, and loaded strictly, so a key that is
missing, left over or mis-shaped is an error rather than a silently random layer.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from varaccel.errors import CheckpointError

WRAPPERS = ("model", "module", "state_dict")
"""Where training code keeps the weights, in the order in which LlamaGen's samplers look for them."""


def read_published_weights(
    path: str | os.PathLike[str],
    *,
    anchor_key: str,
    wrappers: Iterable[str] = WRAPPERS,
) -> dict[str, Tensor]:
    """Read the state dict in a `.safetensors`, `.pt` or `.pth` file.

    Args:
        path: the file.
        anchor_key: a key that the wanted state dict has for certain. It tells a bare state dict from a
            wrapped one, and one model family from another.
        wrappers: entries of a training checkpoint to look into, in order of preference.

    Raises:
        CheckpointError: no such file, truncated, holds code, or holds no such state dict.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"there is no weights file at {file}; check the path or download it first.")
    content = _read(file)
    candidates: list[Any] = [content, *(content.get(w) for w in wrappers)]
    for candidate in candidates:
        if isinstance(candidate, Mapping) and anchor_key in candidate:
            return {k: v for k, v in candidate.items() if isinstance(v, Tensor)}
    found = ", ".join(map(str, list(content)[:4])) or "nothing"
    raise CheckpointError(
        f"{file} holds no {anchor_key!r}, bare or under {', '.join(wrappers)} (it starts with: {found}); "
        "it belongs to another kind of model."
    )


def _read(file: Path) -> Mapping[str, Any]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Published training checkpoints keep their command line beside the weights, as an argparse
        # Namespace: a plain record, safe to restore. Every other class is refused.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            raise CheckpointError(
                f"{file} holds Python objects other than tensors, which could run code when loaded; "
                "convert it to safetensors on a machine where you trust it."
            ) from error
        raise CheckpointError(_unreadable(file)) from error
    except (RuntimeError, EOFError, SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(_unreadable(file)) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds a {type(content).__name__} instead of named tensors.")
    return content


def _unreadable(file: Path) -> str:
    return f"{file} is truncated or not a weights file ({file.stat().st_size} bytes); download it again."


def load_strict(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    drop: Iterable[str] = (),
) -> None:
    """Load `state` into `module`: every key must be there, none may be left over, every shape must fit.

    Args:
        source: what the error message calls the weights, usually the file.
        drop: regular expressions of keys that published files carry beside the weights; removed first.

    Raises:
        CheckpointError: names the first keys that do not fit; `module` is unchanged.
    """
    patterns = [re.compile(p) for p in drop]
    kept = {k: v for k, v in state.items() if not any(p.fullmatch(k) for p in patterns)}
    wanted = module.state_dict()
    problems = []
    if missing := [k for k in wanted if k not in kept]:
        problems.append(f"lacks {_some(missing)}")
    if extra := [k for k in kept if k not in wanted]:
        problems.append(f"has unexpected {_some(extra)}")
    if shapes := [
        f"{k} {list(kept[k].shape)} instead of {list(wanted[k].shape)}"
        for k in wanted
        if k in kept and kept[k].shape != wanted[k].shape
    ]:
        problems.append(f"has {_some(shapes)}")
    if problems:
        raise CheckpointError(
            f"{source} does not fit {type(module).__name__}: it {'; it '.join(problems)}. "
            "Choose the model size and type that the file was made for."
        )
    module.load_state_dict(dict(kept))


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
