"""FID, sFID, Inception Score, KID, precision and recall of sets of images, each with its sampling noise.

The formulas are torch-fidelity's (sFID: ADM's features in the same formula as FID). What is added: references given as
statistics, features that are kept, and standard errors, so that a comparison can say when it shows nothing.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from math import hypot, sqrt
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch_fidelity
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from varaccel.errors import InputError, unknown_name
from varaccel.evaluation.metrics.adherence import held_out_prompts, share_error
from varaccel.evaluation.metrics.feature_spaces import FeatureSpace
from varaccel.evaluation.metrics.frechet import FeatureStatistics, frechet_spread
from varaccel.evaluation.metrics.image_features import ImageFeatures, OnCorrupt, extract_features
from varaccel.evaluation.metrics.image_sets import ImageSet, TrueScenes, open_images
from varaccel.scenes.world import HELD_OUT_SEED

METRICS = ("fid", "sfid", "is", "kid", "pr")

REFERENCE_SCENES_SEED = HELD_OUT_SEED + 100_000_000
"""First seed of the scenes of a reference `scenes:N`: none of them is asked for in a prompt."""

ADM_REFERENCE = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz"
)
"""The reference that published figures on ImageNet at 256 × 256 are measured against."""

_SPLITS = 10
_KID_SUBSETS = 100
_KID_SUBSET = 1000
_NEIGHBOURS = 3
_SPREAD_SEED = 0


@dataclass(frozen=True)
class Figure:
    """One figure of a set of images.

    Attributes:
        metric: one of fid, sfid, is, kid, precision, recall, clip, adherence.
        title: what it is called in a report; says so if it is no Inception figure.
        value: the figure.
        error: its standard error over the draw of the images; None if it was not estimated.
        better: whether "lower" or "higher" is better.
        details: how it was made, such as the numbers of splits and subsets.
    """

    metric: str
    title: str
    value: float
    error: float | None
    better: Literal["lower", "higher"]
    details: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        noise = "" if self.error is None else f" ± {self.error:.2g}"
        return f"{self.value:.4g}{noise}"


@dataclass(frozen=True)
class Difference:
    """A figure beside that of a baseline.

    Attributes:
        value: figure minus baseline.
        noise: twice the standard error of the difference, as if both were of independent images; None if either
            has no standard error. Images of the same prompts and seeds move together, so it is on the wide side.
        better: whether the figure is the better one.
    """

    value: float
    noise: float | None
    better: bool

    @property
    def within_noise(self) -> bool | None:
        return None if self.noise is None else abs(self.value) <= self.noise

    def __str__(self) -> str:
        if self.noise is None:
            return f"{self.value:+.2g}"
        word = "within noise" if self.within_noise else "better" if self.better else "worse"
        return f"{word} ({self.value:+.2g}, noise {self.noise:.2g})"


def difference(figure: Figure, baseline: Figure) -> Difference:
    """`figure` beside `baseline`, a figure of the same metric."""
    value = figure.value - baseline.value
    noise = None
    if figure.error is not None and baseline.error is not None:
        noise = 2 * hypot(figure.error, baseline.error)
    return Difference(value, noise, value < 0 if figure.better == "lower" else value > 0)


@dataclass(frozen=True, eq=False)
class Reference:
    """What images are compared with.

    Attributes:
        name: where it comes from.
        statistics: of the pooled features, for FID.
        spatial: of the spatial features, for sFID; None if there are none.
        features: of single images, for KID, precision and recall; None if there are only statistics.
    """

    name: str
    statistics: FeatureStatistics
    spatial: FeatureStatistics | None = None
    features: ImageFeatures | None = None

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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no statistics that can be used: {error}") from error
    features = None
    if images_needed and "arr_0" in names:
        features = extract_features(open_images(path), space, **options)
    return Reference(path, found[""], found.get("_s"), features)


# -- the figures ---------------------------------------------------------------------------------------


def needs_images(metrics: Iterable[str]) -> bool:
    """Whether any of the metrics compares single images with those of the reference."""
    return bool({"kid", "pr"} & set(metrics))


def check_metrics(metrics: Sequence[str]) -> None:
    """Refuse unknown metrics, or none.

    Raises:
        InputError: then.
    """
    if not metrics:
        raise InputError(f"name at least one metric of {', '.join(METRICS)}.")
    for metric in metrics:
        if metric not in METRICS:
            raise unknown_name("metric", metric, METRICS)


def measure(
    features: ImageFeatures,
    space: FeatureSpace,
    metrics: Sequence[str],
    reference: Reference | None = None,
    *,
    resamples: int | None = None,
    progress: bool = True,
) -> list[Figure]:
    """Figures of images whose features were taken in `space`.

    Args:
        metrics: of `METRICS`; "pr" gives two figures, precision and recall (Kynkäänniemi et al. 2019, k = 3, in the
            pooled features of `space`, as ADM's evaluation does and unlike torch-fidelity's default of VGG16).
        reference: needed by all but "is".
        resamples: bootstrap resamples for the standard errors of Fréchet distances; by default 200 in a small space
            and 20 in Inception's, whose eigenvalues take seconds. 0: no standard errors.

    Raises:
        InputError: an unknown metric, one that the reference does not allow, too few images for it.
    """
    check_metrics(metrics)
    if reference is None and set(metrics) != {"is"}:
        raise InputError("all metrics but the Inception Score compare with a reference; name one.")
    figures: list[Figure] = []
    count = resamples
    if count is None:
        count = 20 if space.is_inception else 200
    for metric in dict.fromkeys(metrics):
        if metric == "is":
            figures.append(_inception_score(features, space))
            continue
        assert reference is not None
        if metric == "fid":
            figures.append(_frechet(features, space.pooled, reference.statistics, "fid", space.title, count))
        elif metric == "sfid":
            if reference.spatial is None or space.SPATIAL not in features.layers:
                raise InputError(f"{reference.name} has no statistics of spatial features; leave out sfid.")
            figures.append(_frechet(features, space.SPATIAL, reference.spatial, "sfid", "sFID", count))
        else:
            if reference.features is None:
                raise InputError(
                    f"{reference.name} holds statistics only, but {metric} compares with single images; leave it "
                    "out, or name a reference of images."
                )
            if metric == "kid":
                figures.append(_kernel_distance(features, reference.features, space))
            else:
                figures += _precision_recall(features, reference.features, space)
    return figures


def _named(space: FeatureSpace, title: str) -> str:
    return title if space.is_inception else f"{title} (scenes)"


def _frechet(
    features: ImageFeatures,
    layer: str,
    reference: FeatureStatistics,
    metric: str,
    title: str,
    resamples: int,
) -> Figure:
    own = FeatureStatistics.from_features(features.layers[layer], features.space)
    if own.space != reference.space or own.mean.shape != reference.mean.shape:
        raise InputError(
            f"features of {own.space!r} [{len(own.mean)}] and of {reference.space!r} [{len(reference.mean)}] cannot "
            "be compared; take both from one network."
        )
    # in float64 throughout: torch-fidelity's own statistics have a mean in float32
    pair = [{"mu": one.mean.numpy(), "sigma": one.covariance.numpy()} for one in (own, reference)]
    value = fid_statistics_to_metric(*pair, verbose=False)[KEY_METRIC_FID]
    error = None
    if resamples:
        error = frechet_spread(
            reference, features.layers[layer], features.space, resamples=resamples, seed=_SPREAD_SEED
        ).std
    return Figure(
        metric,
        title,
        value,
        error,
        "lower",
        {"images": own.count, "dimensions": len(own.mean), "resamples": resamples},
    )


def _inception_score(features: ImageFeatures, space: FeatureSpace) -> Figure:
    if space.logits not in features.layers:
        raise InputError("the features were taken without the logits that the Inception Score needs.")
    if len(features) < _SPLITS:
        raise InputError(
            f"the Inception Score takes the mean of {_SPLITS} splits, but there are {len(features)} images."
        )
    found = isc_features_to_metric(features.layers[space.logits], _SPLITS)
    std = found[KEY_METRIC_ISC_STD]
    # the splits are disjoint, so their mean is less noisy than each
    error = std / sqrt(_SPLITS - 1)
    details = {"images": len(features), "splits": _SPLITS, "std_of_splits": std}
    return Figure("is", _named(space, "IS"), found[KEY_METRIC_ISC_MEAN], error, "higher", details)


def _kernel_distance(features: ImageFeatures, reference: ImageFeatures, space: FeatureSpace) -> Figure:
    own, other = features.layers[space.pooled], reference.layers[space.pooled]
    smaller = min(len(own), len(other))
    if smaller < 4:
        raise InputError("KID needs at least four images on either side.")
    # two disjoint ones at least, without which nothing could be said about noise; KID has no bias that depends on it
    subset = min(_KID_SUBSET, smaller // 2)
    found = kid_features_to_metric(
        own, other, kid_subsets=_KID_SUBSETS, kid_subset_size=subset, verbose=False
    )
    std = found[KEY_METRIC_KID_STD]
    # the whole set is less noisy than a subset by as many disjoint ones as it holds
    error = std / sqrt(smaller // subset)
    details = {
        "images": len(own),
        "subsets": _KID_SUBSETS,
        "subset_size": subset,
        "std_of_subsets": std,
    }
    return Figure("kid", _named(space, "KID"), found[KEY_METRIC_KID_MEAN], error, "lower", details)


def _precision_recall(features: ImageFeatures, reference: ImageFeatures, space: FeatureSpace) -> list[Figure]:
    own, other = features.layers[space.pooled], reference.layers[space.pooled]
    if min(len(own), len(other)) <= _NEIGHBOURS + 1:
        raise InputError(f"precision and recall need more than {_NEIGHBOURS + 1} images on either side.")
    found = prc_features_to_metric(own, other, prc_neighborhood=_NEIGHBOURS, save_cpu_ram=True, verbose=False)
    figures = []
    for metric, key, judged in (
        ("precision", KEY_METRIC_PRECISION, own),
        ("recall", KEY_METRIC_RECALL, other),
    ):
        share = found[key]
        error = share_error(round(share * len(judged)), len(judged))
        details = {"images": len(own), "reference_images": len(other), "neighbours": _NEIGHBOURS}
        figures.append(Figure(metric, _named(space, metric), share, error, "higher", details))
    return figures


# -- the report ----------------------------------------------------------------------------------------


def cautions(
    features: ImageFeatures, space: FeatureSpace, figures: Sequence[Figure], reference: Reference | None
) -> list[str]:
    """What a reader of the figures has to know."""
    notes = []
    if not space.is_inception:
        notes.append(
            f"Figures are of the feature space {space.label}, a detector of the small captioned world: they compare "
            "with each other only and are no FID, IS or KID of Inception features."
        )
    elif not space.standard:
        notes.append(
            f"The Inception weights ({space.label}) are not the standard ones: no figure compares with published ones."
        )
    for figure in figures:
        dimensions = figure.details.get("dimensions")
        if dimensions is not None and len(features) <= dimensions:
            notes.append(
                f"{figure.title}: {len(features)} images are no more than the {dimensions} dimensions of the "
                "features, so the figure is mostly bias; compare it with figures of as many images only."
            )
    if reference is not None and not reference.statistics.made.get("digest") and space.is_inception:
        notes.append(
            "The reference's statistics come from TensorFlow's Inception; torch-fidelity's is its conversion."
        )
    if features.skipped:
        shown = ", ".join(features.skipped[:3]) + (" …" if len(features.skipped) > 3 else "")
        notes.append(f"{len(features.skipped)} images could not be read and were skipped: {shown}.")
    return notes


@dataclass(frozen=True)
class SetReport:
    """All figures of one set of images.

    Attributes:
        images: the set.
        count: images that were read.
        digest: of their pixels.
        size: (height, width).
        figures: of the set.
        notes: what a reader has to know.
        run: how they were drawn, where that is known.
    """

    images: str
    count: int
    digest: str
    size: tuple[int, int]
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()
    run: dict[str, Any] | None = None

    def figure(self, metric: str) -> Figure | None:
        return next((one for one in self.figures if one.metric == metric), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)
