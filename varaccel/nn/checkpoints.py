"""Reading published weight files safely and loading them strictly.

Published files are pickles or safetensors, bare or wrapped in a training checkpoint. They are read with
`weights_only`, so a file that carries code is refused rather than run, and loaded strictly, so a key that is
missing, left over or mis-shaped is an error rather than a silently random layer.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from varaccel.errors import CheckpointError

WRAPPERS = ("model", "module", "state_dict")
"""Where training code keeps the weights, in the order in which LlamaGen's samplers look for them."""

_AVERAGES = {"ema", "average", "averaged", "avg", "swa", "shadow"}
"""Words in the name of an entry that holds averaged weights: `model_ema`, `ema_state_dict`."""

# What DDP and DeepSpeed, torch.compile, FSDP and activation checkpointing put into the names of weights, wherever the
# wrapped part is; no network of the library has parts of these names.
_WRAPPED = re.compile(
    r"(?<![^.])(module|_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)

_COUNTERS = ("n_averaged",)
"""Entries of `torch.optim.swa_utils.AveragedModel` beside the weights."""

# Training checkpoints keep their command line and figures beside the weights. These classes only hold values, so they
# are safe to restore; every other class is refused.
_PLAIN_RECORDS: list[Any] = [
    argparse.Namespace,
    types.SimpleNamespace,
    type(Path()),
    np.dtype,
    np.float64(0).__reduce__()[0],
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd"),
]

_DEEPEST = 4

_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
"""Of files of weights."""


def read_published_weights(
    path: str | os.PathLike[str], *, anchor_key: str | Sequence[str], averaged: bool = False
) -> dict[str, Tensor]:
    """Read the state dict in a `.safetensors`, `.pt`, `.pth`, `.ckpt` or `.bin` file, or in a folder of such files.

    It may be bare or an entry of a training checkpoint, at any name. What DDP, FSDP and torch.compile put before the
    names of weights is taken off.

    Args:
        path: the file; or a folder with an index of several (`*.index.json`, as transformers writes it), or with one.
        anchor_key: a key that the wanted state dict has for certain. It tells a bare state dict from a
            wrapped one, and one model family from another. Several if the published files of a model differ: the
            first one that is found.
        averaged: which weights to take from a checkpoint that holds trained ones and their average; of one that
            holds only either, these.

    Raises:
        CheckpointError: no such file, truncated, no weights at all (a web page, a pointer of git-lfs), holds code, or
            holds no such state dict; a folder without one of its files, or with several and no index.
    """
    file = Path(path)
    if file.is_dir():
        content = _read_folder(file)
    elif file.is_file():
        content = _read(file)
    else:
        raise CheckpointError(f"there is no weights file at {file}; check the path or download it first.")

    def rank(found: tuple[tuple[str, ...], dict[str, Tensor]]) -> tuple[bool, int, int]:
        names = found[0]
        known = WRAPPERS.index(names[0]) if names and names[0] in WRAPPERS else len(WRAPPERS)
        return _is_average(names) != averaged, len(names), known

    anchors = (anchor_key,) if isinstance(anchor_key, str) else tuple(anchor_key)
    for anchor in anchors:
        candidates = sorted(_states(content, anchor), key=rank)
        if candidates:
            return candidates[0][1]
    found = ", ".join(map(str, list(content)[:4])) or "nothing"
    raise CheckpointError(
        f"{file} holds no {anchors[0]!r}, bare or in a training checkpoint (it starts with: {found}); "
        "it belongs to another kind of model."
    )


def _is_average(names: Iterable[str]) -> bool:
    return any(_AVERAGES & set(name.lower().split("_")) for name in names)


def _states(
    content: Mapping[Any, Any], anchor_key: str, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every state dict with the key in nested mappings, and the names of the entries that lead to it."""
    tensors = {
        _WRAPPED.sub("", key): value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor) and key not in _COUNTERS
    }
    for key in tensors:
        if key != anchor_key and not key.endswith(f".{anchor_key}"):
            continue
        prefix = key.removesuffix(anchor_key)
        parts = tuple(prefix.split(".")[:-1])
        if any(part.isdecimal() for part in parts):  # a layer of another network, no wrapper
            continue
        # other keys beside a prefix are a second network or counters of the wrapper
        yield path + parts, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    if len(path) < _DEEPEST:
        for name, entry in content.items():
            if isinstance(name, str) and isinstance(entry, Mapping):
                yield from _states(entry, anchor_key, (*path, name))


def wrapped_weights(folder: Path) -> dict[str, Tensor] | None:
    """The weights in a component's folder under the network's own names, if wrappers have changed them; else None."""
    names = stored_names(folder)
    if not any(_WRAPPED.search(name) for name in names or ()):
        return None
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= {_WRAPPED.sub("", name): value for name, value in load_file(file).items()}
    return state


def stored_names(folder: Path) -> set[str] | None:
    """Names of the tensors in the safetensors of a component's folder; None if there are none or they are damaged."""
    names: set[str] = set()
    try:
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                names |= set(opened.keys())
    except (SafetensorError, OSError):
        return None
    return names or None


def weights_below(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Weights in a component's folder whose names begin with `prefix`, under the rest of their names.

    Raises:
        CheckpointError: a damaged file.
    """
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                wanted = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118
                state |= {name.removeprefix(prefix): opened.get_tensor(name) for name in wanted}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(not_weights(file) or _unreadable(file)) from error
    return state


def _read_folder(folder: Path) -> Mapping[str, Any]:
    """The content of all files of one state dict."""
    content: dict[str, Any] = {}
    for file in _shards(folder):
        if not file.is_file():
            raise CheckpointError(f"{folder} lacks {file.name}, which its index names; download it again.")
        content |= _read(file)
    return content


def _shards(folder: Path) -> list[Path]:
    # one index if the weights are there in both formats
    indices = sorted(folder.glob("*.index.json"), key=lambda file: "safetensors" not in file.name)
    if not indices:
        files = [file for file in sorted(folder.iterdir()) if file.suffix in _SUFFIXES]
        if len(files) != 1:
            raise CheckpointError(
                f"{folder} holds {len(files) or 'no'} files of weights and no index of them; give the path of one file."
            )
        return files
    try:
        weight_map = json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"]
        names = sorted({Path(name).name for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{indices[0]} is no index of weights (a 'weight_map' from names to files); download it again."
        ) from error
    return [folder / name for name in names]


def _read(file: Path) -> Mapping[str, Any]:
    reason = not_weights(file)
    if reason is not None:
        raise CheckpointError(reason)
    try:
        if _is_safetensors(file):
            return load_file(file)
        with torch.serialization.safe_globals(_PLAIN_RECORDS):
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


def _is_safetensors(file: Path) -> bool:
    """By the name, or by the JSON header that follows the eight bytes of its length."""
    if file.suffix == ".safetensors":
        return True
    with file.open("rb") as opened:
        head = opened.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < file.stat().st_size


def not_weights(file: Path) -> str | None:
    """A sentence that says what a file of text is that stands where weights should; None if it may hold weights."""
    with file.open("rb") as opened:
        head = opened.read(512)
    if head.startswith(b"version https://git-lfs"):
        return f"{file} is a pointer of git-lfs, not the weights; fetch them with `git lfs pull`."
    # the byte order mark of UTF-8
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] == b"<":
        return (
            f"{file} is a web page, not a weights file: its download went wrong, perhaps for want of a login; "
            "download it again."
        )
    if text and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        begin = text[:40].decode().split("\n")[0].strip()
        return (
            f"{file} is a text ({begin!r}), not a weights file: its download went wrong; download it again."
        )
    return None


def _unreadable(file: Path) -> str:
    return f"{file} is truncated or not a weights file ({file.stat().st_size} bytes); download it again."


def load_strict(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    drop: Iterable[str] = (),
    assign: bool = False,
) -> None:
    """Load `state` into `module`: every key must be there, none may be left over, every shape must fit.

    Args:
        source: what the error message calls the weights, usually the file.
        drop: regular expressions of keys that published files carry beside the weights; removed first.
        assign: take the tensors themselves instead of copying their numbers, for a module on the meta device.

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
    module.load_state_dict(dict(kept), assign=assign)


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
