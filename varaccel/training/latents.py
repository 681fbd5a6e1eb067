"""Latents of a cache of images, so that a transformer trains without running the image tokenizer.

A folder of latents is `manifest.json` and one `latents-00000.npy` (float16 [n, 2, N, C]: mean and standard deviation of
every token) per shard of the image cache. Run
`python -m varaccel.training.latents --tokenizer FOLDER --scenes FOLDER --out FOLDER` to write one, and run it again to
resume or to add shards that have been rendered since.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from varaccel.console import tolerant_console
from varaccel.errors import CheckpointError, InputError
from varaccel.scenes.cache import CachedScenes
from varaccel.tokenizers.kl import patchify
from varaccel.training import shards
from varaccel.training.command_line import exit_status
from varaccel.training.images import on_device
from varaccel.training.kl import downsample_factor
from varaccel.training.shards import MANIFEST, fingerprint

MODULE = "varaccel.training.latents"


@dataclass(frozen=True)
class LatentsManifest:
    """What a folder of latents was made from; folders are only ever continued with the same.

    Attributes:
        tokenizer: fingerprint of the encoder.
        scaling_factor: what latents are to be multiplied by; they are stored as they are.
        grid: rows and columns of the tokens of an image.
        channels: numbers C of a token.
        patch: side of the patches that are one token.
        world, first_seed, size, shard_size: of the image cache.
    """

    tokenizer: str
    scaling_factor: float
    grid: tuple[int, int]
    channels: int
    patch: int
    world: str
    first_seed: int
    size: int
    shard_size: int

    @property
    def num_tokens(self) -> int:
        """Number N of tokens of one image."""
        return self.grid[0] * self.grid[1]


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: NDArray[np.uint8], patch: int) -> NDArray[np.float16]:
    """Latents of `pixels` uint8 [n, H, W, 3]: float16 [n, 2, N, C] as in a folder of latents."""
    posterior = vae.encode(on_device(pixels, vae.device)).latent_dist
    pair = [patchify(posterior.mean, patch), patchify(posterior.std, patch)]
    return torch.stack(pair, 1).half().cpu().numpy()


def encode_cache(
    vae: AutoencoderKL,
    scenes: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    patch: int = 1,
    batch_size: int = 32,
    progress: bool = True,
) -> LatentsManifest:
    """Encode every finished shard of the image cache `scenes` into `out`; shards already there are kept.

    Args:
        vae: the tokenizer, on the device to use, in float32.
        scenes: folder written by `varaccel.scenes.cache`.
        out: folder of the latents.
        patch: side of the patches that are one token.
        batch_size: images per call of the encoder.
        progress: show a progress bar.

    Raises:
        InputError: no cache, or latents that cannot be cut into such patches.
        CheckpointError: `out` holds latents of another tokenizer or cache.
    """
    data = CachedScenes(scenes, allow_partial=True)
    cell = downsample_factor(vae) * patch
    if patch < 1 or data.size % cell:
        raise InputError(
            f"images of {data.size} pixels are no whole number of tokens of {cell} pixels; choose another patch."
        )
    side = data.size // cell
    vae.eval().to(memory_format=torch.channels_last)
    manifest = LatentsManifest(
        tokenizer=fingerprint(vae),
        scaling_factor=vae.config.scaling_factor,
        grid=(side, side),
        channels=vae.config.latent_channels * patch * patch,
        patch=patch,
        **shards.cache_facts(data),
    )
    target = Path(out)
    present = asdict(read_manifest(target)) if (target / MANIFEST).exists() else None
    shards.claim_folder(target, asdict(manifest), present, kind="latents")
    shards.encode_shards(
        data,
        lambda shard: latents_path(target, shard),
        lambda pixels: encode_pixels(vae, pixels, patch),
        batch_size=batch_size,
        description="latents",
        progress=progress,
    )
    return manifest


def load_tokenizer(folder: str | os.PathLike[str]) -> AutoencoderKL:
    """The KL tokenizer saved in `folder`, in float32.

    Raises:
        InputError: there is none, or it is something else.
    """
    if (name := shards.tokenizer_class(folder)) != AutoencoderKL.__name__:
        raise InputError(f"{folder} holds a {name}, which is no image tokenizer that makes latents.")
    return AutoencoderKL.from_pretrained(folder, dtype=torch.float32)


def read_latents(folder: str | os.PathLike[str]) -> tuple[Tensor, LatentsManifest]:
    """The latents of the leading finished shards, float16 [M, 2, N, C], and what they were made from.

    Row `i` belongs to image `i` of the cache.

    Raises:
        InputError: `folder` holds no latents.
        CheckpointError: a shard is damaged.
    """
    target = Path(folder)
    manifest = read_manifest(target)

    def read(path: Path) -> NDArray[np.float16]:
        part = shards.load_shard(path)
        if part.shape[1:] != (2, manifest.num_tokens, manifest.channels) or part.dtype != np.float16:
            raise CheckpointError(f"{path} does not match its manifest; delete it and encode again.")
        return part

    parts = shards.read_shards(lambda shard: latents_path(target, shard), read, manifest.shard_size)
    if not parts:
        raise InputError(f"{folder} holds no finished shard of latents yet; run {MODULE} on it.")
    return torch.from_numpy(np.concatenate(parts)), manifest


def read_manifest(folder: str | os.PathLike[str]) -> LatentsManifest:
    """The manifest of a folder of latents.

    Raises:
        InputError: the folder holds no readable manifest.
    """

    def made(fields: dict[str, Any]) -> LatentsManifest:
        return LatentsManifest(**{**fields, "grid": tuple(fields["grid"])})

    return shards.read_manifest(folder, made, "latents", MODULE)


def latents_path(folder: Path, shard: int) -> Path:
    return folder / f"latents-{shard:05d}.npy"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the encoder."""
    tolerant_console()
    parser = shards.encoder_parser(MODULE, "latents", "an AutoencoderKL")
    parser.add_argument("--patch", type=int, default=1, help="side of the patches that are one token")
    options = parser.parse_args(arguments)

    def encode() -> None:
        vae = load_tokenizer(options.tokenizer).to(options.device)
        encode_cache(vae, options.scenes, options.out, patch=options.patch, batch_size=options.batch_size)

    return exit_status(encode)


if __name__ == "__main__":
    sys.exit(main())
