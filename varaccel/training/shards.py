"""Folders of what image tokenizers make of a cache of images: a manifest, and one array per shard of the cache.

A transformer trains on them without running the tokenizer. What the arrays hold is the business of
`training.token_ids` and `training.latents`, which are also the command lines that write them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from varaccel.errors import CheckpointError, InputError
from varaccel.files import atomic_path
from varaccel.scenes.cache import CachedScenes

MANIFEST = "manifest.json"
"""Name of the file that says what a folder was made from."""
ENCODING_PARTS = ("encoder.", "quant_conv.", "quantize.")
"""The parts of a tokenizer that decide which token ids or latents an image gets."""

Manifest = TypeVar("Manifest")


class CacheFacts(TypedDict):
    """What a manifest says about the image cache."""

    world: str
    first_seed: int
    size: int
    shard_size: int


def cache_facts(data: CachedScenes) -> CacheFacts:
    return CacheFacts(
        world=data.manifest.version,
        first_seed=data.manifest.first_seed,
        size=data.size,
        shard_size=data.manifest.shard_size,
    )


def weights_of(tokenizer: Any) -> nn.Module:
    """The module that holds an image tokenizer's weights: itself, or what a view of a transformers model looks at."""
    module: nn.Module = getattr(tokenizer, "vqmodel", tokenizer)
    return module


def fingerprint(tokenizer: Any) -> str:
    """A hash of what decides the token ids or latents of an image, the same on every machine; 16 hex digits.

    It covers the encoder and the codebook, if there is one. A decoder that was trained further leaves it, and token ids
    made before, valid.

    Args:
        tokenizer: a module, or the view of one in a model of transformers.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(weights_of(tokenizer).state_dict().items()):
        if not name.startswith(ENCODING_PARTS):
            continue
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def encode_shards(
    data: CachedScenes,
    shard_path: Callable[[int], Path],
    encode: Callable[[NDArray[np.uint8]], NDArray[Any]],
    *,
    batch_size: int,
    description: str,
    progress: bool,
) -> None:
    """Write what `encode` makes of the images of every finished shard; shards already there are kept.

    Args:
        data: the images.
        shard_path: file of a shard.
        encode: makes an array [n, ...] of pixels uint8 [n, H, W, 3].
        batch_size: images per call of `encode`.
        description: of the progress bar.
        progress: show a progress bar.

    Raises:
        InputError: a batch size below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}.")
    size = data.manifest.shard_size
    with tqdm(total=len(data), unit="image", desc=description, disable=not progress or None) as bar:
        for shard, start in enumerate(range(0, len(data), size)):
            stop = min(start + size, len(data))
            path = shard_path(shard)
            if path.is_file():
                bar.update(stop - start)
                continue
            parts = []
            for first in range(start, stop, batch_size):
                parts.append(encode(data.batch_pixels(range(first, min(first + batch_size, stop)))))
                bar.update(len(parts[-1]))
            with atomic_path(path) as temporary:
                np.save(temporary, np.concatenate(parts))


def load_shard(path: Path) -> NDArray[Any]:
    """The array in a shard.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        array: NDArray[Any] = np.load(path)
    except (ValueError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it and encode again.") from error
    return array


def read_shards(
    shard_path: Callable[[int], Path], read: Callable[[Path], NDArray[Any]], shard_size: int
) -> list[NDArray[Any]]:
    """What `read` makes of the leading finished shards; the first short one is the last."""
    parts: list[NDArray[Any]] = []
    while (path := shard_path(len(parts))).is_file():
        parts.append(read(path))
        if len(parts[-1]) < shard_size:
            break
    return parts


def claim_folder(
    folder: Path, manifest: Mapping[str, Any], present: Mapping[str, Any] | None, *, kind: str
) -> None:
    """Write `manifest` into `folder`, or make sure that the one that is `present` says the same.

    Args:
        kind: what the error message calls the content.

    Raises:
        CheckpointError: the folder was made from something else.
    """
    if present is not None:
        if changed := sorted(k for k, v in manifest.items() if present[k] != v):
            raise CheckpointError(
                f"{folder} holds {kind} made with another {', '.join(changed)}; choose another folder."
            )
        return
    with atomic_path(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def read_manifest(
    folder: str | os.PathLike[str], make: Callable[[dict[str, Any]], Manifest], content: str, module: str
) -> Manifest:
    """What `make` makes of the fields of a folder's manifest.

    Args:
        content: what the folder should hold.
        module: whose command line writes it.

    Raises:
        InputError: the folder holds no readable manifest.
    """
    path = Path(folder) / MANIFEST
    try:
        return make(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(
            f"{folder} holds no {content}: it has no {MANIFEST}; write them with "
            f"`python -m {module} --tokenizer FOLDER --scenes FOLDER --out FOLDER`."
        ) from None
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete the folder and encode again.") from error


def tokenizer_class(folder: str | os.PathLike[str]) -> str:
    """The name of the class of the tokenizer saved in `folder`.

    Raises:
        InputError: there is none.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"there is no tokenizer in {folder}; train one first.")
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["_class_name"])
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not the config of a tokenizer ({error}).") from error


def encoder_parser(module: str, content: str, tokenizer: str) -> argparse.ArgumentParser:
    """The options that the command lines share.

    Args:
        module: that the command line belongs to.
        content: what it makes.
        tokenizer: class of the image tokenizer.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=f"Encode a cache of images as {content}."
    )
    parser.add_argument("--tokenizer", required=True, help=f"folder of {tokenizer}")
    parser.add_argument("--scenes", required=True, help="folder written by varaccel.scenes.cache")
    parser.add_argument("--out", required=True, help=f"folder of the {content}")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    return parser
