"""From names of folders and files to a report of their figures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch_fidelity
from torchmetrics.multimodal.clip_score import CLIPScore

from varaccel.errors import InputError
from varaccel.evaluation.metrics.adherence import (
    CaptionVerdict,
    held_out_captions,
    score_adherence,
    share_error,
    summarise,
)
from varaccel.evaluation.metrics.clip_score import clip_figure
from varaccel.evaluation.metrics.feature_spaces import FeatureSpace
from varaccel.evaluation.metrics.figures import Figure
from varaccel.evaluation.metrics.frechet import FeatureStatistics
from varaccel.evaluation.metrics.image_features import ImageFeatures, OnCorrupt, extract_features
from varaccel.evaluation.metrics.image_sets import ImageFolder, ImageSet, open_images
from varaccel.evaluation.metrics.metrics_report import MetricsReport
from varaccel.evaluation.metrics.references import Reference, load_reference, needs_images, statistics_of
from varaccel.evaluation.metrics.set_metrics import METRICS, SetReport, cautions, measure
from varaccel.evaluation.sampling.image_run import read_prompts
from varaccel.evaluation.sampling.presets import Preset
from varaccel.evaluation.sampling.prompt_lists import SCENES
from varaccel.evaluation.sampling.run_settings import RunSettings
from varaccel.models.detector import load_detector
from varaccel.version import __version__

_JUDGED_TOGETHER = 256
"""Images that are in memory at one time while adherence is judged."""


def measure_sets(
    names: Sequence[str | os.PathLike[str]],
    space: FeatureSpace,
    *,
    reference: str | os.PathLike[str] | None = None,
    metrics: Sequence[str] | None = None,
    clip: CLIPScore | None = None,
    preset: Preset | None = None,
    recursive: bool = False,
    crop: int | None = None,
    on_corrupt: OnCorrupt = "stop",
    batch_size: int = 64,
    cache: str | os.PathLike[str] | None = None,
    resamples: int | None = None,
    progress: bool = True,
) -> tuple[MetricsReport, FeatureStatistics]:
    """Measure sets of images alike.

    Args:
        names: folders, runs of `eval/sample.py`, .npz files; the first is the baseline of the others.
        space: see `load_space`; with `spatial` for sFID.
        reference: see `load_reference`.
        metrics: of `METRICS`; by default all that reference and space allow.
        clip: also take the CLIP score of runs, whose prompts are known.
        preset: the protocol that the first set follows.
        recursive, crop: see `ImageFolder`.
        on_corrupt, batch_size, cache: see `extract_features`.
        resamples: see `measure`.

    Returns:
        The report, and the statistics of the first set, to be kept as a reference for others.

    Raises:
        InputError: sets that are not there or that hold too few images, metrics that do not go with the reference.
    """
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "cache": cache,
        "on_corrupt": on_corrupt,
        "progress": progress,
    }
    sets = [open_images(name, recursive=recursive, size=crop) for name in names]
    features = [extract_features(images, space, **common) for images in sets]
    compared = None
    if reference is not None:
        compared = load_reference(
            reference,
            space,
            images_needed=metrics is None or needs_images(metrics),
            recursive=recursive,
            size=crop,
            scene_size=features[0].size[0],
            **common,
        )
    wanted = _possible(space, compared) if metrics is None else list(metrics)
    reports = []
    for images, own in zip(sets, features, strict=True):
        figures = measure(own, space, wanted, compared, resamples=resamples) if wanted else []
        notes = cautions(own, space, figures, compared)
        notes += [note for note in (images.note, "" if compared is None else compared.note) if note]
        prompted, run = _of_run(images, own, clip, progress, notes)
        reports.append(
            SetReport(images.name, len(own), own.digest, own.size, (*figures, *prompted), tuple(notes), run)
        )
    versions = {
        "varaccel": __version__,
        "torch": str(torch.__version__),
        "torch_fidelity": torch_fidelity.__version__,
    }
    report = MetricsReport(
        tuple(reports), space.label, None if compared is None else compared.describe(), preset, versions
    )
    return report, statistics_of(features[0], space.pooled)


def _possible(space: FeatureSpace, reference: Reference | None) -> list[str]:
    """All metrics that can be had."""
    if reference is None:
        return ["is"]
    lacking = set() if reference.features is not None else {"kid", "pr"}
    if reference.spatial is None or space.SPATIAL not in space.layers:
        lacking.add("sfid")
    return [metric for metric in METRICS if metric not in lacking]


def _of_run(
    images: ImageSet,
    features: ImageFeatures,
    clip: CLIPScore | None,
    progress: bool,
    notes: list[str],
) -> tuple[list[Figure], dict[str, Any] | None]:
    """Figures that need prompts, and the settings: both known of a run only."""
    root = Path(images.name)
    settings = RunSettings.read(root) if isinstance(images, ImageFolder) else None
    if settings is None:
        if clip is not None:
            raise InputError(
                f"{images.name} is no run of eval/sample.py, so its prompts are not known; leave out the CLIP score."
            )
        return [], None
    figures = []
    whole = len(features) == settings.count
    if not whole:
        notes.append(f"{images.name} holds {len(features)} of the {settings.count} images of its run.")
    if whole and settings.source == SCENES:
        figures.append(_adherence_figure(images, settings.count))
    if whole and clip is not None:
        prompts = read_prompts(root) or []
        figures.append(
            clip_figure(
                clip, images, [str(prompt) for prompt in prompts], device=clip.device, progress=progress
            )
        )
    return figures, asdict(settings)


def _adherence_figure(images: ImageSet, count: int) -> Figure:
    """The share of images that show all that their captions say."""
    detector = load_detector()
    verdicts: list[CaptionVerdict] = []
    captions = held_out_captions(count)
    for start in range(0, count, _JUDGED_TOGETHER):
        part = captions[start : start + _JUDGED_TOGETHER]
        batch = torch.stack([images[start + index] for index in range(len(part))])
        verdicts += score_adherence(detector, batch.float().div(127.5).sub(1), part).verdicts
    rates = summarise(verdicts).rates
    rate = rates["correct"]
    error = share_error(rate.successes, rate.total)
    shares = {name: [one.successes, one.total] for name, one in rates.items()}
    return Figure("adherence", "prompt adherence", rate.share, error, "higher", {"rates": shares})
