"""FID, sFID, Inception Score, KID, precision and recall of sets of images, each with its sampling noise.

The formulas are torch-fidelity's (sFID: ADM's features in the same formula as FID). What is added: references given as
statistics, features that are kept, and standard errors, so that a comparison can say when it shows nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from varaccel.errors import InputError, unknown_name
from varaccel.evaluation.metrics.adherence import share_error
from varaccel.evaluation.metrics.feature_spaces import FeatureSpace
from varaccel.evaluation.metrics.figures import Figure
from varaccel.evaluation.metrics.frechet import FeatureStatistics, frechet_spread
from varaccel.evaluation.metrics.image_features import ImageFeatures
from varaccel.evaluation.metrics.references import Reference

METRICS = ("fid", "sfid", "is", "kid", "pr")

_SPLITS = 10
_KID_SUBSETS = 100
_KID_SUBSET = 1000
_NEIGHBOURS = 3
_SPREAD_SEED = 0


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
    # a distance; rounding takes that of a set from itself below zero
    value = max(0.0, float(fid_statistics_to_metric(*pair, verbose=False)[KEY_METRIC_FID]))
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
