"""The Fréchet distance: closed forms, hard covariances, and its noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from varaccel.errors import InputError
from varaccel.evaluation.metrics.frechet import (
    FeatureStatistics,
    frechet_distance,
    frechet_spread,
    scene_features,
    scene_space,
    scene_statistics,
)
from varaccel.models.detector import FEATURE_SPACE, SceneDetector
from varaccel.training.detector import new_detector


def _features(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mix + seed


def _gaussian(mean: list[float], covariance: torch.Tensor, space: str = "s") -> FeatureStatistics:
    return FeatureStatistics(torch.tensor(mean, dtype=torch.float64), covariance.double(), 100, space)


def test_statistics_of_features() -> None:
    features = _features(50, 6)
    statistics = FeatureStatistics.from_features(features.float(), "s")
    np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-4)
    assert (statistics.count, statistics.space) == (50, "s")
    assert statistics.mean.dtype == statistics.covariance.dtype == torch.float64


@pytest.mark.parametrize(("count", "dim"), [(200, 8), (5, 40), (2, 3)])
def test_a_set_has_no_distance_from_itself(count: int, dim: int) -> None:
    statistics = FeatureStatistics.from_features(_features(count, dim), "s")
    scale = float(statistics.covariance.trace())
    assert 0 <= frechet_distance(statistics, statistics) < 1e-6 * scale


def test_closed_form_of_commuting_gaussians() -> None:
    """Diagonal covariances: the distance is the sum of squared differences of means and of deviations."""
    a = _gaussian([0.0, 1.0, 2.0], torch.diag(torch.tensor([1.0, 4.0, 0.0])))
    b = _gaussian([3.0, 1.0, 0.0], torch.diag(torch.tensor([9.0, 0.25, 1.0])))
    assert frechet_distance(a, b) == pytest.approx(9 + 4 + 4 + 2.25 + 1, rel=1e-12)


def test_closed_form_of_rotated_gaussians() -> None:
    """Two dimensions: tr((A B)^½) = (tr(A B) + 2 det(A B)^½)^½."""
    a, b = torch.tensor([[2.0, 0.5], [0.5, 1.0]]), torch.tensor([[1.0, -0.7], [-0.7, 3.0]])
    cross = (torch.trace(a @ b) + 2 * torch.det(a @ b).sqrt()).sqrt()
    expected = float(1 + a.trace() + b.trace() - 2 * cross)
    assert frechet_distance(_gaussian([0, 0], a), _gaussian([1, 0], b)) == pytest.approx(expected, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 25), st.integers(0, 99))
def test_symmetric_and_finite_at_any_rank(first: int, second: int, dim: int, seed: int) -> None:
    a = FeatureStatistics.from_features(_features(first, dim, seed), "s")
    b = FeatureStatistics.from_features(_features(second, dim, seed + 1), "s")
    forth, back = frechet_distance(a, b), frechet_distance(b, a)
    assert np.isfinite(forth)
    assert forth == pytest.approx(back, rel=1e-5, abs=1e-5)


def test_agrees_with_torchmetrics() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    a = FeatureStatistics.from_features(_features(300, 12, 1), "s")
    b = FeatureStatistics.from_features(_features(300, 12, 2), "s")
    expected = float(fid._compute_fid(a.mean, a.covariance, b.mean, b.covariance))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_constant_features() -> None:
    """Images that are all alike, as a collapsed model makes them: no covariance at all."""
    alike = torch.ones(10, 4)
    reference = FeatureStatistics.from_features(_features(50, 4), "s")
    expected = float((reference.mean - 1).square().sum() + reference.covariance.trace())
    assert frechet_distance(reference, FeatureStatistics.from_features(alike, "s")) == pytest.approx(expected)
    spread = frechet_spread(reference, alike, "s", resamples=5)
    assert spread.mean == pytest.approx(expected)
    assert spread.std == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("count", "dim"), [(40, 6), (6, 40)])
def test_spread_is_the_distance_of_resamples(count: int, dim: int) -> None:
    """Both of its ways, over images and over features, against the definition."""
    reference = FeatureStatistics.from_features(_features(100, dim, 1), "s")
    features = _features(count, dim, 2)
    generator = torch.Generator().manual_seed(7)
    distances = [
        frechet_distance(
            reference,
            FeatureStatistics.from_features(
                features[torch.randint(count, (count,), generator=generator)], "s"
            ),
        )
        for _ in range(12)
    ]
    spread = frechet_spread(reference, features, "s", resamples=12, seed=7)
    assert spread.resamples == 12
    assert spread.mean == pytest.approx(np.mean(distances), rel=1e-6)
    assert spread.std == pytest.approx(np.std(distances, ddof=1), rel=1e-5)


def test_spread_tells_the_noise_of_sampling() -> None:
    """Its standard deviation is about that of the distances of fresh samples of the same size."""
    reference = FeatureStatistics.from_features(_features(5000, 4, 3), "s")
    pool = _features(40 * 60, 4, 3) * 1.5
    fresh = [
        frechet_distance(reference, FeatureStatistics.from_features(part, "s")) for part in pool.split(60)
    ]
    spread = frechet_spread(reference, pool[:60], "s")
    assert 0.5 < spread.std / float(np.std(fresh)) < 2
    assert spread == frechet_spread(reference, pool[:60], "s"), "the same for the same seed"


def test_small_samples_lie_further_away() -> None:
    reference = FeatureStatistics.from_features(_features(5000, 10, 4), "s")
    same = _features(5000, 10, 4)
    few, many = (
        frechet_distance(reference, FeatureStatistics.from_features(same[:n], "s")) for n in (20, 500)
    )
    assert few > 2 * many


def test_spaces_do_not_mix() -> None:
    features = _features(20, 3)
    ours, other = (FeatureStatistics.from_features(features, space) for space in ("ours", "inception"))
    with pytest.raises(InputError, match="'ours' and of 'inception'"):
        frechet_distance(ours, other)
    with pytest.raises(InputError, match="cannot be compared"):
        frechet_spread(ours, features, "inception")
    longer = FeatureStatistics.from_features(_features(20, 4), "ours")
    with pytest.raises(InputError, match="3 and of 4 numbers"):
        frechet_distance(ours, longer)
    with pytest.raises(InputError, match="3 and of 4 numbers"):
        frechet_spread(ours, _features(20, 4), "ours")


@pytest.mark.parametrize(
    "features",
    [torch.zeros(1, 3), torch.zeros(3), torch.zeros(0, 3), torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])],
    ids=["one", "flat", "none", "nan"],
)
def test_features_that_have_no_statistics(features: torch.Tensor) -> None:
    with pytest.raises(InputError):
        FeatureStatistics.from_features(features, "s")


def test_resamples_and_shapes_are_checked() -> None:
    reference = FeatureStatistics.from_features(_features(20, 3), "s")
    with pytest.raises(InputError, match="at least 2 resamples"):
        frechet_spread(reference, _features(20, 3), "s", resamples=1)
    with pytest.raises(InputError, match=r"\[D, D\]"):
        FeatureStatistics(torch.zeros(3), torch.zeros(3, 4), 5, "s")


# -- files ---------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path: Path) -> None:
    statistics = FeatureStatistics.from_features(_features(20, 5), "a space")
    for name in ("x.npz", "without-suffix"):
        statistics.save(tmp_path / name)
        loaded = FeatureStatistics.load(tmp_path / name)
        assert torch.equal(loaded.mean, statistics.mean)
        assert torch.equal(loaded.covariance, statistics.covariance)
        assert (loaded.count, loaded.space) == (20, "a space")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["without-suffix", "x.npz"]


def test_failed_save_keeps_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = FeatureStatistics.from_features(_features(20, 5), "s")
    statistics.save(tmp_path / "x.npz")
    older = (tmp_path / "x.npz").read_bytes()

    def fail(file: object, **_: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="No space"):
        statistics.save(tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == older
    assert len(list(tmp_path.iterdir())) == 1


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="check the path"):
        FeatureStatistics.load(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "pickled.npz", mean=np.array([{}], dtype=object))
    np.savez(tmp_path / "skewed.npz", mean=np.zeros(3), covariance=np.zeros((2, 2)), count=5, space="s")
    whole = tmp_path / "whole.npz"
    FeatureStatistics.from_features(_features(20, 5), "s").save(whole)
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:200])
    for name in ("text.npz", "other.npz", "array.npy", "pickled.npz", "skewed.npz", "cut.npz"):
        with pytest.raises(InputError, match=r"holds no feature statistics|\[D, D\]"):
            FeatureStatistics.load(tmp_path / name)


# -- the scene detector --------------------------------------------------------------------------------


def _detector(seed: int) -> SceneDetector:
    return new_detector(seed, image_size=32, widths=(8, 8, 8), depths=(1, 1, 1)).eval()


def test_features_of_scenes() -> None:
    detector = _detector(0)
    images = [Image.new("RGB", (64, 64), (shade, 0, 255 - shade)) for shade in range(0, 250, 25)]
    statistics = scene_statistics(detector, images)
    assert statistics.space.startswith(FEATURE_SPACE + "/")
    assert statistics.mean.shape == (detector.feature_dim,)
    again = FeatureStatistics.from_features(scene_features(detector, images), scene_space(detector))
    assert frechet_distance(statistics, again) == pytest.approx(0, abs=1e-6)


def test_another_training_is_another_space() -> None:
    images = [Image.new("RGB", (32, 32), (shade, 0, 0)) for shade in range(0, 250, 50)]
    assert scene_space(_detector(0)) == scene_space(_detector(0))
    with pytest.raises(InputError, match="cannot be compared"):
        frechet_distance(scene_statistics(_detector(0), images), scene_statistics(_detector(1), images))


def test_a_detector_in_training_is_refused() -> None:
    with pytest.raises(InputError, match="eval"):
        scene_features(_detector(0).train(), [Image.new("RGB", (32, 32))])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["mean", "covariance"])
def test_statistics_that_are_not_finite_are_refused(tmp_path: Path, part: str, value: float) -> None:
    """Else their distance is 0: `max` takes NaN for nothing."""
    good = FeatureStatistics.from_features(_features(9, 3), "s")
    parts = {"mean": good.mean.clone(), "covariance": good.covariance.clone()}
    parts[part].view(-1)[1] = value
    with pytest.raises(InputError, match="numbers that are not finite"):
        FeatureStatistics(parts["mean"], parts["covariance"], 9, "s")
    path = tmp_path / "kept.npz"
    np.savez(path, **{name: tensor.numpy() for name, tensor in parts.items()}, count=9, space="s")
    with pytest.raises(
        InputError, match=r"kept\.npz: the feature statistics hold numbers that are not finite"
    ):
        FeatureStatistics.load(path)
