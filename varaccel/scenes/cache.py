"""Rendered scenes on disk: shards of images with their captions and ground truth.

A cache is a folder of `manifest.json` and, numbered per shard, `images-00000.npy` (uint8 [n, S, S, 3]) and
`captions-00000.jsonl`, one record per image: `seed`, `caption`, the keys of `grammar.describe`, and `boxes`
and `visible_fraction` as in `renderer.Rendering`. Run
`python -m varaccel.scenes.cache --out FOLDER --count N` to write one; run it again to resume.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset
from tqdm import tqdm

from varaccel.console import tolerant_console
from varaccel.errors import InputError
from varaccel.files import atomic_path
from varaccel.scenes.dataset import make_sample, to_tensor
from varaccel.scenes.grammar import describe
from varaccel.scenes.renderer import check_size
from varaccel.scenes.world import HELD_OUT_SEED, WORLD_VERSION

_MANIFEST = "manifest.json"
_CHUNK = 50


@dataclass(frozen=True)
class Manifest:
    """What a cache holds: images of the seeds `first_seed` to `first_seed + count - 1`."""

    version: str
    first_seed: int
    count: int
    size: int
    shard_size: int

    def __post_init__(self) -> None:
        check_size(self.size)
        if self.first_seed < 0 or self.count < 1 or self.shard_size < 1:
            raise InputError(
                "a cache needs a first_seed of at least 0, a count and a shard_size of at least 1, got "
                f"first_seed={self.first_seed}, count={self.count}, shard_size={self.shard_size}."
            )
        if self.first_seed < HELD_OUT_SEED < self.first_seed + self.count:
            raise InputError(
                f"seeds {self.first_seed} to {self.first_seed + self.count - 1} mix training with "
                f"evaluation; stay below {HELD_OUT_SEED} or start from it."
            )

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.shard_size)

    def shard_range(self, shard: int) -> range:
        """Indices of the images in one shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))


def _images_path(folder: Path, shard: int) -> Path:
    return folder / f"images-{shard:05d}.npy"


def _captions_path(folder: Path, shard: int) -> Path:
    return folder / f"captions-{shard:05d}.jsonl"


def _finished(folder: Path, shard: int) -> bool:
    return _images_path(folder, shard).is_file() and _captions_path(folder, shard).is_file()


def finished_images(folder: str | os.PathLike[str]) -> int:
    """How many leading images of a cache can be read; 0 if it has not been begun."""
    if not (Path(folder) / _MANIFEST).is_file():
        return 0
    manifest = read_manifest(folder)
    return min(_finished_shards(Path(folder), manifest) * manifest.shard_size, manifest.count)


def _finished_shards(folder: Path, manifest: Manifest) -> int:
    return next((n for n in range(manifest.shards) if not _finished(folder, n)), manifest.shards)


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a cache.

    Raises:
        InputError: the folder holds no readable manifest, or one of another version of the world.
    """
    path = Path(folder) / _MANIFEST
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(
            f"{folder} is not a cache of scenes: it has no {_MANIFEST}; write one with "
            "`python -m varaccel.scenes.cache --out FOLDER --count N`."
        ) from None
    except (json.JSONDecodeError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete the folder and write it again.") from error
    if manifest.version != WORLD_VERSION:
        raise InputError(
            f"{folder} was written by world version {manifest.version!r}, this is {WORLD_VERSION!r}; "
            "write the cache again into another folder."
        )
    return manifest


def _claim(folder: Path, manifest: Manifest) -> None:
    """Store `manifest` in `folder`, or check that it continues the one already there."""
    path = folder / _MANIFEST
    if path.exists():
        present = read_manifest(folder)
        if present == manifest:
            return
        grown = Manifest(**{**asdict(present), "count": manifest.count})
        if grown != manifest or manifest.count < present.count or present.count % present.shard_size:
            raise InputError(
                f"{folder} already holds a cache with other settings ({present}); choose another folder."
            )
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")


def _render_chunk(task: tuple[int, int, int]) -> tuple[NDArray[np.uint8], list[str]]:
    first_seed, count, size = task
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    records = []
    for offset in range(count):
        sample = make_sample(first_seed + offset, size)
        images[offset] = sample.rendering.image
        record = {
            "seed": sample.seed,
            "caption": sample.caption.text,
            **describe(sample.scene, sample.caption),
            "boxes": [[round(edge, 4) for edge in box] for box in sample.rendering.boxes],
            "visible_fraction": [round(share, 4) for share in sample.rendering.visible_fraction],
        }
        records.append(json.dumps(record, separators=(",", ":")))
    return images, records


@contextmanager
def _renderers(workers: int) -> Iterator[Any]:
    """A `map` over chunks, in this process for one worker or in several."""
    if workers == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            yield pool.map
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def write_cache(
    folder: str | os.PathLike[str],
    first_seed: int,
    count: int,
    size: int = 128,
    workers: int = 1,
    shard_size: int = 1000,
    progress: bool = True,
) -> Manifest:
    """Render the scenes of `count` seeds into `folder`; finished shards of an earlier run are kept.

    A shard appears under its name only when it is complete, so an interrupted run loses at most one shard. A
    cache of whole shards may be extended by a larger `count`.

    Raises:
        InputError: `folder` holds a cache with other settings, or the settings are out of range.
    """
    if workers < 1:
        raise InputError(f"workers must be 1 or more, got {workers}.")
    target = Path(folder)
    manifest = Manifest(WORLD_VERSION, first_seed, count, size, shard_size)
    target.mkdir(parents=True, exist_ok=True)
    _claim(target, manifest)
    missing = [shard for shard in range(manifest.shards) if not _finished(target, shard)]
    ready = count - sum(len(manifest.shard_range(shard)) for shard in missing)
    with (
        tqdm(total=count, initial=ready, unit="image", disable=not progress or None) as bar,
        _renderers(workers) as run,
    ):
        for shard in missing:
            indices = manifest.shard_range(shard)
            tasks = [
                (first_seed + start, min(_CHUNK, indices.stop - start), size)
                for start in range(indices.start, indices.stop, _CHUNK)
            ]
            images = np.empty((len(indices), size, size, 3), dtype=np.uint8)
            lines: list[str] = []
            results: Iterable[tuple[NDArray[np.uint8], list[str]]] = run(_render_chunk, tasks)
            for part, records in results:
                images[len(lines) : len(lines) + len(records)] = part
                lines += records
                bar.update(len(records))
            # the images go last: they mark the shard as finished
            with atomic_path(_captions_path(target, shard)) as temporary:
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
            with atomic_path(_images_path(target, shard)) as temporary:
                np.save(temporary, images)
    return manifest


class CachedScenes(Dataset[dict[str, Any]]):
    """A cache written by `write_cache`, read by memory map.

    An item is the same dict as that of `ScenesDataset`: `image` (float32 [3, S, S] in [-1, 1]), `caption`,
    `seed`. `captions` lists the captions of all images.

    Args:
        folder: the cache.
        allow_partial: use the leading finished shards of a cache that is still being written.

    Raises:
        InputError: `folder` is no cache, or is incomplete and `allow_partial` is not set.
    """

    def __init__(self, folder: str | os.PathLike[str], allow_partial: bool = False) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        finished = _finished_shards(self.folder, self.manifest)
        if finished == 0 or (finished < self.manifest.shards and not allow_partial):
            raise InputError(
                f"{folder} has {finished} of {self.manifest.shards} shards finished; resume it with "
                f"`python -m varaccel.scenes.cache --out {folder} --count {self.manifest.count}`."
            )
        self.captions: list[str] = []
        self._offsets: list[int] = []
        for shard in range(finished):
            offset = 0
            for line in _captions_path(self.folder, shard).read_bytes().splitlines(keepends=True):
                self.captions.append(json.loads(line)["caption"])
                self._offsets.append(offset)
                offset += len(line)
        self._maps: dict[int, NDArray[np.uint8]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # a memory map pickles as its whole content; a worker opens its own
        return {**self.__dict__, "_maps": {}}

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return self.manifest.size

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a cache of {len(self)} images.")
        return divmod(index, self.manifest.shard_size)

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """Image `index` as a read-only view, uint8 [S, S, 3]."""
        shard, row = self._locate(index)
        if shard not in self._maps:
            self._maps[shard] = np.load(_images_path(self.folder, shard), mmap_mode="r")
        return self._maps[shard][row]

    def batch_pixels(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Images `indices` as a new array, uint8 [n, S, S, 3]."""
        return np.stack([self.pixels(int(index)) for index in indices])

    def ground_truth(self, index: int) -> dict[str, Any]:
        """The record of image `index`, with the keys listed at the top of this module."""
        shard, _ = self._locate(index)
        with _captions_path(self.folder, shard).open("rb") as file:
            file.seek(self._offsets[index])
            record: dict[str, Any] = json.loads(file.readline())
        return record

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "image": to_tensor(self.pixels(index)),
            "caption": self.captions[index],
            "seed": self.manifest.first_seed + index,
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the cache writer."""
    tolerant_console()
    parser = argparse.ArgumentParser(
        prog="python -m varaccel.scenes.cache", description="Render captioned scenes into a folder."
    )
    parser.add_argument("--out", required=True, help="folder of the cache")
    parser.add_argument("--count", type=int, required=True, help="number of images")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first image")
    parser.add_argument("--size", type=int, default=128, help="side of an image in pixels")
    parser.add_argument("--workers", type=int, default=1, help="rendering processes")
    parser.add_argument("--shard-size", type=int, default=1000, help="images per file")
    options = parser.parse_args(arguments)
    try:
        write_cache(
            options.out, options.first_seed, options.count, options.size, options.workers, options.shard_size
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
