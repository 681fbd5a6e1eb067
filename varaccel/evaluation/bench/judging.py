"""Judging images of the captioned world: their adherence to captions, and their distance from true images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from PIL import Image
from tqdm import tqdm

from varaccel.errors import InputError
from varaccel.evaluation.bench.comparison import Distance, Quality
from varaccel.evaluation.metrics.adherence import score_adherence
from varaccel.evaluation.metrics.frechet import (
    FeatureStatistics,
    frechet_distance,
    frechet_spread,
    scene_features,
    scene_space,
)
from varaccel.models.detector import SceneDetector
from varaccel.scenes.grammar import Caption
from varaccel.scenes.renderer import render
from varaccel.scenes.sampler import sample_scene

_REFERENCE_BATCH = 100
_REFERENCES: dict[tuple[str, tuple[int, ...]], FeatureStatistics] = {}


def true_images(seeds: Iterable[int], size: int) -> list[Image.Image]:
    """The scenes of `seeds` as they are, `size` pixels a side."""
    return [Image.fromarray(render(sample_scene(seed), size).image) for seed in seeds]


def reference_statistics(
    detector: SceneDetector, seeds: Sequence[int], *, progress: bool = True
) -> FeatureStatistics:
    """Feature statistics of the true images of `seeds`, kept for the next call of this process."""
    key = (scene_space(detector), tuple(seeds))
    if key not in _REFERENCES:
        features = []
        with tqdm(
            total=len(seeds), desc="true images", unit="image", leave=False, disable=not progress or None
        ) as bar:
            for start in range(0, len(seeds), _REFERENCE_BATCH):
                part = seeds[start : start + _REFERENCE_BATCH]
                features.append(scene_features(detector, true_images(part, detector.config.image_size)))
                bar.update(len(part))
        if not features:
            raise InputError("a reference needs at least two scenes, got none.")
        _REFERENCES[key] = FeatureStatistics.from_features(torch.cat(features), key[0])
    return _REFERENCES[key]


def judge_images(
    detector: SceneDetector,
    images: Sequence[Image.Image],
    captions: Sequence[Caption],
    reference: FeatureStatistics | None = None,
) -> Quality:
    """Adherence of `images` to `captions`, and their distance from `reference` if there is one."""
    scored = score_adherence(detector, images, captions)
    distance = None
    if reference is not None:
        features, space = scene_features(detector, images), scene_space(detector)
        own = FeatureStatistics.from_features(features, space)
        distance = Distance(frechet_distance(reference, own), frechet_spread(reference, features, space))
    return Quality(scored.rates["correct"], tuple(v.correct for v in scored.verdicts), distance)
