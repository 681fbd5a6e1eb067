"""Latents of a cache of pictures, so that a transformer trains without running the image tokenizer.

A folder of latents is `manifest.json` and one `latents-00000.npy` (float16 [n, 2, N, C]: mean and standard deviation of
every token) per shard of the picture cache. Run
`python -m varaccel.training.latents --tokenizer FOLDER --scenes FOLDER --out FOLDER` to write one, and run it again to
resume or to add shards that have been rendered since.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from varaccel.errors import CheckpointError, InputError, VaraccelError
from varaccel.files import atomic_path
from varaccel.scenes.cache import CachedScenes
from varaccel.tokenizers.kl import patchify
from varaccel.training.kl import on_device

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class LatentsManifest:
    """What a folder of latents was made from; folders are only ever continued with the same.

    Attributes:
        tokenizer: fingerprint of the encoder.
        scaling_factor: what latents are to be multiplied by; they are stored as they are.
        tokens, channels: N and C of a picture.
        patch: side of the patches that are one token.
        world, first_seed, size, shard_size: of the picture cache.
    """

    tokenizer: str
    scaling_factor: float
    tokens: int
    channels: int
    patch: int
    world: str
    first_seed: int
    size: int
    shard_size: int


def fingerprint(vae: AutoencoderKL) -> str:
    """A hash of what decides the latents of a picture, the same on every machine; 16 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(f"{name}{list(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode_cache(
    vae: AutoencoderKL,
    scenes: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    patch: int = 1,
    batch_size: int = 32,
    progress: bool = True,
) -> LatentsManifest:
    """Encode every finished shard of the picture cache `scenes` into `out`; shards already there are kept.

    Args:
        vae: the tokenizer, on the device to use, in float32.
        scenes: folder written by `varaccel.scenes.cache`.
        out: folder of the latents.
        patch: side of the patches that are one token.
        batch_size: pictures per call of the encoder.
        progress: show a progress bar.

    Raises:
        InputError: no cache, or latents that cannot be cut into such patches.
        CheckpointError: `out` holds latents of another tokenizer or cache.
    """
    data = CachedScenes(scenes, allow_partial=True)
    vae.eval().to(memory_format=torch.channels_last)
    side = data.size // 2 ** (len(vae.config.block_out_channels) - 1)
    manifest = LatentsManifest(
        tokenizer=fingerprint(vae),
        scaling_factor=vae.config.scaling_factor,
        tokens=(side // patch) ** 2,
        channels=vae.config.latent_channels * patch * patch,
        patch=patch,
        world=data.manifest.version,
        first_seed=data.manifest.first_seed,
        size=data.size,
        shard_size=data.manifest.shard_size,
    )
    target = Path(out)
    _claim(target, manifest)
    with tqdm(total=len(data), unit="picture", desc="latents", disable=not progress) as bar:
        for shard in range(-(-len(data) // manifest.shard_size)):
            start = shard * manifest.shard_size
            stop = min(start + manifest.shard_size, len(data))
            path = _path(target, shard)
            if not path.is_file():
                parts = []
                for first in range(start, stop, batch_size):
                    pixels = data.batch_pixels(range(first, min(first + batch_size, stop)))
                    posterior = vae.encode(on_device(pixels, vae.device)).latent_dist
                    pair = [patchify(posterior.mean, patch), patchify(posterior.std, patch)]
                    parts.append(torch.stack(pair, 1).half().cpu().numpy())
                    bar.update(len(pixels))
                with atomic_path(path) as temporary:
                    np.save(temporary, np.concatenate(parts))
            else:
                bar.update(stop - start)
    return manifest


def read_latents(folder: str | os.PathLike[str]) -> tuple[Tensor, LatentsManifest]:
    """The latents of the leading finished shards, float16 [M, 2, N, C], and what they were made from.

    Row `i` belongs to picture `i` of the cache.

    Raises:
        InputError: `folder` holds no latents.
        CheckpointError: a shard is damaged.
    """
    target = Path(folder)
    manifest = read_manifest(target)
    parts: list[NDArray[np.float16]] = []
    while (path := _path(target, len(parts))).is_file():
        try:
            part = np.load(path)
        except (ValueError, EOFError, OSError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete it and encode again.") from error
        if part.shape[1:] != (2, manifest.tokens, manifest.channels) or part.dtype != np.float16:
            raise CheckpointError(f"{path} does not match its manifest; delete it and encode again.")
        parts.append(part)
        if len(part) < manifest.shard_size:
            break
    if not parts:
        raise InputError(
            f"{folder} holds no finished shard of latents yet; run varaccel.training.latents on it."
        )
    return torch.from_numpy(np.concatenate(parts)), manifest


def read_manifest(folder: str | os.PathLike[str]) -> LatentsManifest:
    """The manifest of a folder of latents.

    Raises:
        InputError: the folder holds no readable manifest.
    """
    path = Path(folder) / _MANIFEST
    try:
        return LatentsManifest(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(
            f"{folder} holds no latents: it has no {_MANIFEST}; write them with "
            "`python -m varaccel.training.latents --tokenizer FOLDER --scenes FOLDER --out FOLDER`."
        ) from None
    except (json.JSONDecodeError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete the folder and encode again.") from error


def _path(folder: Path, shard: int) -> Path:
    return folder / f"latents-{shard:05d}.npy"


def _claim(folder: Path, manifest: LatentsManifest) -> None:
    path = folder / _MANIFEST
    if path.exists():
        present = asdict(read_manifest(folder))
        changed = sorted(k for k, v in asdict(manifest).items() if present[k] != v)
        if changed:
            raise CheckpointError(
                f"{folder} holds latents made with another {', '.join(changed)}; choose another folder."
            )
        return
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the encoder."""
    parser = argparse.ArgumentParser(
        prog="python -m varaccel.training.latents", description="Encode a cache of pictures as latents."
    )
    parser.add_argument("--tokenizer", required=True, help="folder of an AutoencoderKL")
    parser.add_argument("--scenes", required=True, help="folder written by varaccel.scenes.cache")
    parser.add_argument("--out", required=True, help="folder of the latents")
    parser.add_argument("--patch", type=int, default=1, help="side of the patches that are one token")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    try:
        if not (Path(options.tokenizer) / "config.json").is_file():
            raise InputError(f"there is no tokenizer in {options.tokenizer}; train one first.")
        vae = AutoencoderKL.from_pretrained(options.tokenizer, torch_dtype=torch.float32).to(options.device)
        encode_cache(vae, options.scenes, options.out, patch=options.patch, batch_size=options.batch_size)
    except VaraccelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
