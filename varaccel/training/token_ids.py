"""Token ids of a cache of images, so that a transformer trains without running the image tokenizer.

A folder of token ids is `manifest.json` and one `token-ids-00000.npy` (uint16 [n, N]) per shard of the image cache. The
N tokens of an image are its rows in raster order, or, of a multi-scale tokenizer, its scales one after another. Run
`python -m varaccel.training.token_ids --tokenizer FOLDER --scenes FOLDER --out FOLDER` to write one, and run it
again to resume or to add shards that have been rendered since.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from varaccel.console import tolerant_console
from varaccel.errors import CheckpointError, InputError
from varaccel.scenes.cache import CachedScenes
from varaccel.tokenizers.multiscale_vq import MultiScaleVQModel
from varaccel.tokenizers.vq import VQModel
from varaccel.training import shards
from varaccel.training.command_line import exit_status
from varaccel.training.images import to_images
from varaccel.training.precision import quick_bfloat16
from varaccel.training.shards import MANIFEST, fingerprint, weights_of
from varaccel.training.vq import ImageTokenizer

MODULE = "varaccel.training.token_ids"
MIN_AGREEMENT = 0.97
"""Below this share of equal token ids the half-precision encoder is not a stand-in for the float32 one."""


@dataclass(frozen=True)
class TokenIdsManifest:
    """What a folder of token ids was made from; folders are only ever continued with the same.

    Attributes:
        tokenizer: fingerprint of the tokenizer.
        codebook_size: number of codebook entries.
        grid: rows and columns of an image, or of the feature map of a multi-scale tokenizer.
        precision: dtype of the encoder's convolutions, "bfloat16" or "float32".
        world, first_seed, size, shard_size: of the image cache.
        scales: sides of the token maps of a multi-scale tokenizer; empty for a single scale, the grid.
    """

    tokenizer: str
    codebook_size: int
    grid: tuple[int, int]
    precision: str
    world: str
    first_seed: int
    size: int
    shard_size: int
    scales: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Number N of tokens of one image."""
        return sum(p * p for p in self.scales) or self.grid[0] * self.grid[1]


@torch.no_grad()
def encode_pixels(vq: ImageTokenizer, pixels: NDArray[np.uint8], precision: str) -> NDArray[np.uint16]:
    """Token ids of `pixels` uint8 [n, H, W, 3]: uint16 [n, N] as in a folder of token ids."""
    device = next(weights_of(vq).parameters()).device
    images = to_images(pixels).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        indices = vq.encode_tokens(images)
    return indices.flatten(1).cpu().numpy().astype(np.uint16)


def precision_agreement(vq: ImageTokenizer, pixels: NDArray[np.uint8], batch_size: int = 32) -> float:
    """Share of token ids of `pixels` uint8 [n, H, W, 3] that a bfloat16 encoder finds like the float32 one."""
    equal = 0.0
    for start in range(0, len(pixels), batch_size):
        part = pixels[start : start + batch_size]
        same = encode_pixels(vq, part, "bfloat16") == encode_pixels(vq, part, "float32")
        equal += float(same.mean()) * len(part)
    return equal / len(pixels)


def encode_cache(
    vq: ImageTokenizer,
    scenes: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    precision: str = "auto",
    batch_size: int = 32,
    progress: bool = True,
) -> TokenIdsManifest:
    """Encode every finished shard of the image cache `scenes` into `out`; shards already there are kept.

    Args:
        vq: the tokenizer, on the device to use; put into eval mode and channels-last.
        scenes: folder written by `varaccel.scenes.cache`.
        out: folder of the token ids.
        precision: "float32", "bfloat16", or "auto": bfloat16 if it is quicker on the device and finds at least 97 % of
            the same token ids on 64 images.
        batch_size: images per call of the encoder.
        progress: show a progress bar.

    Raises:
        InputError: unknown precision, no cache, images that the tokenizer cannot take, or a codebook of
            more than 65536 entries.
        CheckpointError: `out` holds token ids of another tokenizer, precision or cache.
    """
    if precision not in ("auto", "float32", "bfloat16"):
        raise InputError(f"precision must be auto, float32 or bfloat16, got {precision!r}.")
    if vq.codebook_size > 1 << 16:
        raise InputError(f"token ids are stored in 16 bits; a codebook of {vq.codebook_size} does not fit.")
    data = CachedScenes(scenes, allow_partial=True)
    grid = _grid(vq, data.size)
    weights_of(vq).eval().to(memory_format=torch.channels_last)
    target = Path(out)
    if precision == "auto":
        present = _present_precision(target)
        precision = present or _choose_precision(vq, data)
    manifest = TokenIdsManifest(
        tokenizer=fingerprint(vq),
        codebook_size=vq.codebook_size,
        grid=grid,
        precision=precision,
        **shards.cache_facts(data),
        scales=vq.schedule.sides if isinstance(vq, MultiScaleVQModel) else (),
    )
    existing = asdict(read_manifest(target)) if (target / MANIFEST).exists() else None
    shards.claim_folder(target, asdict(manifest), existing, kind="token ids")
    shards.encode_shards(
        data,
        lambda shard: token_ids_path(target, shard),
        lambda pixels: encode_pixels(vq, pixels, precision),
        batch_size=batch_size,
        description=f"token ids, {precision}",
        progress=progress,
    )
    return manifest


def _grid(vq: Any, size: int) -> tuple[int, int]:
    """Rows and columns of the tokens of an image of `size` pixels.

    Raises:
        InputError: a size that is no whole number of tokens.
    """
    if hasattr(vq, "grid"):
        rows, columns = vq.grid(size)
        return rows, columns
    if size % vq.downsample_factor:
        raise InputError(f"image sides must be multiples of {vq.downsample_factor}, got {size}.")
    return size // vq.downsample_factor, size // vq.downsample_factor


def read_token_ids(folder: str | os.PathLike[str]) -> tuple[Tensor, str]:
    """The token ids of the leading finished shards, int32 [M, N], and the tokenizer's fingerprint.

    Row `i` belongs to image `i` of the cache.

    Raises:
        InputError: `folder` holds no token ids.
        CheckpointError: a shard is damaged.
    """
    target = Path(folder)
    manifest = read_manifest(target)

    def read(path: Path) -> NDArray[np.int32]:
        part = shards.load_shard(path)
        if part.shape[1:] != (manifest.num_tokens,) or part.max() >= manifest.codebook_size:
            raise CheckpointError(f"{path} does not match its manifest; delete it and encode again.")
        return part.astype(np.int32)

    parts = shards.read_shards(lambda shard: token_ids_path(target, shard), read, manifest.shard_size)
    if not parts:
        raise InputError(f"{folder} holds no finished shard of token ids yet; run {MODULE} on it.")
    return torch.from_numpy(np.concatenate(parts)), manifest.tokenizer


def token_ids_path(folder: Path, shard: int) -> Path:
    return folder / f"token-ids-{shard:05d}.npy"


def read_manifest(folder: str | os.PathLike[str]) -> TokenIdsManifest:
    """The manifest of a folder of token ids.

    Raises:
        InputError: the folder holds no readable manifest.
    """

    def made(fields: dict[str, Any]) -> TokenIdsManifest:
        # manifests from before there were multi-scale tokenizers have no scales
        shape = {"grid": tuple(fields["grid"]), "scales": tuple(fields.get("scales", ()))}
        return TokenIdsManifest(**{**fields, **shape})

    return shards.read_manifest(folder, made, "token ids", MODULE)


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The image tokenizer saved in `folder`, of the class that its config names, or that of a model of transformers.

    Raises:
        InputError: there is none, or it is something else.
        CheckpointError: a model that draws no images, or that cannot be loaded.
    """
    if _holds_model(folder):
        from varaccel.pipelines.auto import AutoPipeline

        tokenizer: Any = getattr(AutoPipeline.from_pretrained(Path(folder)), "vq_model", None)
        if not (hasattr(tokenizer, "encode_tokens") and hasattr(tokenizer, "vqmodel")):
            raise InputError(f"the image tokenizer of the model in {folder} cannot make tokens of images.")
        return tokenizer
    name = shards.tokenizer_class(folder)
    for kind in (VQModel, MultiScaleVQModel):
        if name == kind.__name__:
            return kind.from_pretrained(folder)
    raise InputError(f"{folder} holds a {name}, which is no image tokenizer that makes token ids.")


def _holds_model(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is one of a model of transformers."""
    try:
        return "model_type" in json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _present_precision(folder: Path) -> str | None:
    return read_manifest(folder).precision if (folder / MANIFEST).exists() else None


def _choose_precision(vq: ImageTokenizer, data: CachedScenes) -> str:
    if not quick_bfloat16(next(weights_of(vq).parameters()).device):
        return "float32"
    sample = data.batch_pixels(range(min(64, len(data))))
    return "bfloat16" if precision_agreement(vq, sample) >= MIN_AGREEMENT else "float32"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the encoder."""
    tolerant_console()
    parser = shards.encoder_parser(
        MODULE, "token ids", "a VQModel, a MultiScaleVQModel or a model of transformers"
    )
    parser.add_argument("--precision", default="auto", help="auto, float32 or bfloat16")
    options = parser.parse_args(arguments)

    def encode() -> None:
        vq = load_tokenizer(options.tokenizer)
        weights_of(vq).to(options.device)
        encode_cache(
            vq, options.scenes, options.out, precision=options.precision, batch_size=options.batch_size
        )

    return exit_status(encode)


if __name__ == "__main__":
    sys.exit(main())
