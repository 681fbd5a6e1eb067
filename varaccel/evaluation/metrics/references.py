"""What sets of images are compared with: statistics in files, folders of images, rendered scenes."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_fidelity

from varaccel.errors import InputError
from varaccel.evaluation.metrics.adherence import held_out_prompts
from varaccel.evaluation.metrics.feature_spaces import FeatureSpace
from varaccel.evaluation.metrics.frechet import FeatureStatistics
from varaccel.evaluation.metrics.image_features import ImageFeatures, OnCorrupt, extract_features
from varaccel.evaluation.metrics.image_sets import ImageSet, TrueScenes, open_images
from varaccel.scenes.world import HELD_OUT_SEED

REFERENCE_SCENES_SEED = HELD_OUT_SEED + 100_000_000
"""First seed of the scenes of a reference `scenes:N`: none of them is asked for in a prompt."""

ADM_REFERENCE = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz"
)
"""The reference that published figures on ImageNet at 256 × 256 are measured against."""


@dataclass(frozen=True, eq=False)
class Reference:
    """What images are compared with.

    Attributes:
        name: where it comes from.
        statistics: of the pooled features, for FID.
        spatial: of the spatial features, for sFID; None if there are none.
        features: of single images, for KID, precision and recall; None if there are only statistics.
        note: what a reader of figures has to know about the images, see `ImageSet`.
    """

    name: str
    statistics: FeatureStatistics
    spatial: FeatureStatistics | None = None
    features: ImageFeatures | None = None
    note: str = ""

    def describe(self) -> dict[str, Any]:
        """Plain values for a report."""
        return {
            "name": self.name,
            "space": self.statistics.space,
            "images": self.statistics.count or "not told by the file",
            "fingerprint": self.statistics.fingerprint,
            "made": dict(self.statistics.made),
        }


def load_reference(
    name: str | os.PathLike[str],
    space: FeatureSpace,
    *,
    images_needed: bool = True,
    recursive: bool = False,
    size: int | None = None,
    scene_size: int = 128,
    batch_size: int = 64,
    cache: str | os.PathLike[str] | None = None,
    on_corrupt: OnCorrupt = "stop",
    progress: bool = True,
) -> Reference:
    """A reference by name.

    Args:
        name: `scenes:N` for N true scenes that no prompt asks for; an .npz file: kept statistics (`FeatureStatistics`),
            an ADM reference batch (statistics `mu`, `sigma`, `mu_s`, `sigma_s`, images `arr_0`, or either); a folder
            of images; or a data set that torch-fidelity knows by name.
        space: where features are taken; the statistics of an ADM file are Inception's.
        images_needed: also take features of the images of an ADM file, which is not needed for FID alone.
        recursive, size: of a folder, see `ImageFolder`.
        scene_size: side of true scenes in pixels.
        batch_size, cache, on_corrupt, progress: see `extract_features`.

    Raises:
        InputError: nothing of the kind, or made in another feature space.
    """
    text = os.fspath(name)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "cache": cache,
        "on_corrupt": on_corrupt,
        "progress": progress,
    }
    if text.startswith("scenes:"):
        return _of_images(TrueScenes(_scene_seeds(text), scene_size), space, options)
    if text.endswith(".npz"):
        names = _members(Path(text))
        if "mean" in names:
            return _kept(text, space)
        if "mu" in names:
            return _adm(text, names, space, images_needed, options)
    return _of_images(open_images(text, recursive=recursive, size=size), space, options)


def holds_inception_statistics(name: str | os.PathLike[str]) -> bool:
    """Whether a reference is a file of Inception's statistics, so that only that network can be compared with it."""
    path = Path(name)
    return path.suffix == ".npz" and path.is_file() and "mu" in _members(path)


def _scene_seeds(name: str) -> list[int]:
    count = name.removeprefix("scenes:")
    if not count.isdecimal() or int(count) < 2:
        raise InputError(f"a reference of true scenes is written scenes:N with N at least 2, got {name!r}.")
    # the same mix of one, two and three objects as in prompts
    return list(held_out_prompts(int(count), first_seed=REFERENCE_SCENES_SEED))


def _members(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; check the path.") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no .npz file: {error}") from error


def _of_images(images: ImageSet, space: FeatureSpace, options: dict[str, Any]) -> Reference:
    features = extract_features(images, space, **options)
    spatial = features.layers.get(space.SPATIAL)
    return Reference(
        images.name,
        statistics_of(features, space.pooled),
        None if spatial is None else statistics_of(features, space.SPATIAL),
        features,
        images.note,
    )


def statistics_of(features: ImageFeatures, layer: str) -> FeatureStatistics:
    """Statistics of one layer, noting how they were made.

    Raises:
        InputError: fewer than two images.
    """
    made = {
        "images": features.images,
        "digest": features.digest,
        "size": list(features.size),
        "skipped": len(features.skipped),
        "layer": layer,
        "torch_fidelity": torch_fidelity.__version__,
        "torch": str(torch.__version__),
    }
    return FeatureStatistics.from_features(features.layers[layer], features.space).noting(**made)


def _kept(path: str, space: FeatureSpace) -> Reference:
    statistics = FeatureStatistics.load(path)
    if statistics.space != space.label:
        raise InputError(
            f"{path} holds statistics of {statistics.space}, but features are taken with {space.label}; choose the "
            "same space, or make the statistics again."
        )
    return Reference(path, statistics)


def _adm(
    path: str, names: set[str], space: FeatureSpace, images_needed: bool, options: dict[str, Any]
) -> Reference:
    if not space.is_inception:
        raise InputError(f"{path} holds statistics of Inception features; choose the inception space.")
    found: dict[str, FeatureStatistics] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for suffix in ("", "_s"):
                if f"mu{suffix}" in names:
                    found[suffix] = FeatureStatistics(
                        torch.from_numpy(file[f"mu{suffix}"].astype(np.float64)),
                        torch.from_numpy(file[f"sigma{suffix}"].astype(np.float64)),
                        0,
                        space.label,
                        {"images": f"statistics of {Path(path).name}"},
                    )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no statistics that can be used: {error}") from error
    features = None
    if images_needed and "arr_0" in names:
        features = extract_features(open_images(path), space, **options)
    return Reference(path, found[""], found.get("_s"), features)


def needs_images(metrics: Iterable[str]) -> bool:
    """Whether any of the metrics compares single images with those of the reference."""
    return bool({"kid", "pr"} & set(metrics))
