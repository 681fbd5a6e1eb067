"""Metrics: the numbers of torch-fidelity on the same files, known answers, noise, and what is refused."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image, ImageFilter
from torch import nn

from varaccel import CheckpointError, InputError
from varaccel.evaluation.bench.judging import true_images
from varaccel.evaluation.metrics import set_metrics as measuring
from varaccel.evaluation.metrics.adherence import held_out_prompts, score_adherence
from varaccel.evaluation.metrics.feature_spaces import (
    INCEPTION_DIGEST,
    STANDARD_SPACE,
    FeatureSpace,
    InceptionFeatures,
    inception_weights,
    load_space,
    register_scene_features,
)
from varaccel.evaluation.metrics.figures import Figure, difference
from varaccel.evaluation.metrics.frechet import FeatureStatistics, frechet_distance, scene_features
from varaccel.evaluation.metrics.image_features import ImageFeatures, extract_features
from varaccel.evaluation.metrics.image_sets import ImageFolder, open_images
from varaccel.evaluation.metrics.measured_sets import measure_sets
from varaccel.evaluation.metrics.metrics_report import MetricsReport
from varaccel.evaluation.metrics.references import Reference, load_reference, statistics_of
from varaccel.evaluation.metrics.set_metrics import SetReport, measure
from varaccel.evaluation.sampling.presets import PRESETS
from varaccel.models.detector import load_detector

SIZE = 128
COUNT = 64


def save(folder: Path, images: list[Image.Image]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        image.save(folder / f"{index:04}.png")
    return folder


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    return true_images(list(held_out_prompts(3 * COUNT)), SIZE)


@pytest.fixture(scope="module")
def folders(scenes: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Blurred scenes, and as many other true ones."""
    root = tmp_path_factory.mktemp("images")
    blurred = [image.filter(ImageFilter.GaussianBlur(2)) for image in scenes[:COUNT]]
    return save(root / "blurred", blurred), save(root / "true", scenes[COUNT : 2 * COUNT])


@pytest.fixture(scope="module")
def space() -> FeatureSpace:
    return load_space("scenes")


def features_of(images: list[Image.Image], space: FeatureSpace, folder: Path) -> ImageFeatures:
    return extract_features(ImageFolder(save(folder, images)), space, progress=False)


def reference_of(features: ImageFeatures, space: FeatureSpace) -> Reference:
    return Reference("reference", statistics_of(features, space.pooled), None, features)


def value(figures: list[Figure], metric: str) -> float:
    return next(figure.value for figure in figures if figure.metric == metric)


def test_files_that_are_passed_over_are_told_in_the_report(
    scenes: list[Image.Image], space: FeatureSpace, tmp_path: Path
) -> None:
    own, other = save(tmp_path / "own", scenes[:3]), save(tmp_path / "other", scenes[3:6])
    scenes[6].save(own / "more.tif")
    save(other / "class", scenes[:2])
    report, _ = measure_sets([own], space, reference=other, metrics=["fid"], resamples=0, progress=False)
    notes = " ".join(report.sets[0].notes)
    assert f"Passed over in {own}: 1 .tif file" in notes
    assert f"Passed over in {other}: 1 folder of images" in notes


# -- the same numbers ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_figures_are_those_of_torch_fidelity(folders: tuple[Path, Path], space: FeatureSpace) -> None:
    register_scene_features()
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        feature_extractor="scenes-detector",
        **{"isc": True, "fid": True, "kid": True, "prc": True},
        **{"cuda": False, "verbose": False, "save_cpu_ram": True, "cache": False},
        kid_subset_size=COUNT // 2,
    )
    own, other = (extract_features(ImageFolder(f), space, progress=False) for f in folders)
    ours = measure(own, space, ["fid", "is", "kid", "pr"], reference_of(other, space))
    for metric, key in (
        ("fid", torch_fidelity.KEY_METRIC_FID),
        ("is", torch_fidelity.KEY_METRIC_ISC_MEAN),
        ("kid", torch_fidelity.KEY_METRIC_KID_MEAN),
        ("precision", torch_fidelity.KEY_METRIC_PRECISION),
        ("recall", torch_fidelity.KEY_METRIC_RECALL),
    ):
        assert value(ours, metric) == pytest.approx(theirs[key], rel=1e-6, abs=1e-9), metric
    assert all("(scenes)" in figure.title for figure in ours)


def test_the_space_is_that_of_the_detector(folders: tuple[Path, Path], space: FeatureSpace) -> None:
    images = [Image.open(path) for path in ImageFolder(folders[0]).files]
    own = extract_features(ImageFolder(folders[0]), space, progress=False)
    expected = scene_features(load_detector(), images)
    torch.testing.assert_close(own.layers["pooled"], expected, rtol=1e-5, atol=1e-6)
    assert own.layers["logits"].exp().sum(1).allclose(torch.ones(COUNT), atol=1e-4)


def test_our_distance_is_torch_fidelitys(folders: tuple[Path, Path], space: FeatureSpace) -> None:
    own, other = (extract_features(ImageFolder(f), space, progress=False) for f in folders)
    theirs = value(measure(own, space, ["fid"], reference_of(other, space), resamples=0), "fid")
    ours = frechet_distance(*(statistics_of(one, space.pooled) for one in (own, other)))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_statistics_in_a_file_are_as_good_as_the_images(
    folders: tuple[Path, Path], space: FeatureSpace, tmp_path: Path
) -> None:
    report, statistics = measure_sets([folders[1]], space, progress=False)
    statistics.save(tmp_path / "statistics.npz")
    np.savez(
        tmp_path / "images.npz",
        arr_0=np.stack([np.asarray(Image.open(path)) for path in ImageFolder(folders[1]).files]),
    )
    values = []
    for reference in (folders[1], tmp_path / "statistics.npz", tmp_path / "images.npz"):
        report, _ = measure_sets([folders[0]], space, reference=reference, resamples=0, progress=False)
        figure = report.sets[0].figure("fid")
        assert figure is not None
        values.append(figure.value)
    assert values[1] == pytest.approx(values[0], rel=1e-12)
    assert values[2] == values[0]
    # a file of statistics tells how it was made, and cannot compare single images
    made = load_reference(tmp_path / "statistics.npz", space).describe()
    assert made["made"]["size"] == [SIZE, SIZE]
    assert made["images"] == COUNT
    with pytest.raises(InputError, match="statistics only"):
        measure_sets(
            [folders[0]], space, reference=tmp_path / "statistics.npz", metrics=["kid"], progress=False
        )


def test_a_fingerprint_changes_with_anything(folders: tuple[Path, Path], space: FeatureSpace) -> None:
    statistics = statistics_of(extract_features(ImageFolder(folders[0]), space, progress=False), "pooled")
    assert statistics.fingerprint == statistics.noting(**statistics.made).fingerprint
    assert statistics.fingerprint != statistics.noting(**{**statistics.made, "size": [1, 1]}).fingerprint
    moved = FeatureStatistics(
        statistics.mean + 1e-9, statistics.covariance, statistics.count, statistics.space, statistics.made
    )
    assert statistics.fingerprint != moved.fingerprint


# -- known answers -------------------------------------------------------------------------------------


def test_a_set_is_at_no_distance_from_itself(folders: tuple[Path, Path], space: FeatureSpace) -> None:
    own = extract_features(ImageFolder(folders[0]), space, progress=False)
    figures = measure(own, space, ["fid", "kid", "pr"], reference_of(own, space))
    assert abs(value(figures, "fid")) < 1e-4
    assert value(figures, "precision") == value(figures, "recall") == 1


@pytest.mark.parametrize("metric", ["fid", "sfid"])
@pytest.mark.parametrize("count", [2, 12, 20])
def test_distances_are_never_below_zero(count: int, metric: str) -> None:
    """torch-fidelity's value of a set and itself is; the first layer is also taken for the spatial one."""
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(count, 40, generator=generator)
    space: Any = SimpleNamespace(
        pooled="pooled", SPATIAL="spatial", title="FID", is_inception=True, label="s"
    )
    layers = {"pooled": rows, "spatial": rows}
    own: Any = SimpleNamespace(layers=layers, space="s")
    statistics = FeatureStatistics.from_features(rows, "s")
    same: Any = SimpleNamespace(name="itself", statistics=statistics, spatial=statistics, features=None)
    (figure,) = measure(own, space, [metric], same, resamples=3)
    assert figure.value >= 0
    assert figure.value == pytest.approx(0, abs=1e-3)
    assert "-" not in str(figure).split(" ")[0]


def test_a_reference_with_nan_is_refused(
    folders: tuple[Path, Path], space: FeatureSpace, tmp_path: Path
) -> None:
    features = extract_features(open_images(folders[0]), space, progress=False)
    statistics_of(features, space.pooled).save(tmp_path / "kept.npz")
    with np.load(tmp_path / "kept.npz") as file:
        values = dict(file)
    values["mean"][3] = np.nan
    np.savez(tmp_path / "kept.npz", **values)
    np.savez(tmp_path / "adm.npz", mu=values["mean"], sigma=values["covariance"])
    inception: Any = SimpleNamespace(is_inception=True, label="inception")
    for file, where in ((tmp_path / "kept.npz", space), (tmp_path / "adm.npz", inception)):
        with pytest.raises(InputError, match=rf"{file.name}: .* numbers that are not finite"):
            load_reference(file, where)


@pytest.mark.slow
def test_distances_grow_with_blur_and_noise(
    scenes: list[Image.Image], space: FeatureSpace, tmp_path: Path
) -> None:
    """Scenes are smooth: what is weaker than the weakest here changes less than the draw of the images does."""
    reference = reference_of(features_of(scenes[COUNT:], space, tmp_path / "reference"), space)
    rng = np.random.default_rng(0)

    def noisy(image: Image.Image, level: float) -> Image.Image:
        pixels = np.asarray(image) + rng.normal(0, level, (SIZE, SIZE, 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    blurs = [[p.filter(ImageFilter.GaussianBlur(r)) for p in scenes[:COUNT]] for r in (0, 3, 5, 8)]
    noises = [[noisy(p, level) for p in scenes[:COUNT]] for level in (0, 25, 60)]
    for name, levels in (("blur", blurs), ("noise", noises)):
        found = [
            measure(
                features_of(level, space, tmp_path / f"{name}{index}"),
                space,
                ["fid", "kid"],
                reference,
                resamples=0,
            )
            for index, level in enumerate(levels)
        ]
        for metric in ("fid", "kid"):
            values = [value(figures, metric) for figures in found]
            assert values == sorted(values), (name, metric, values)
            # the distance of true images is all bias, KID has none
            least = 2 * values[0] if metric == "fid" else 3 * abs(values[0])
            assert values[-1] > least, (name, metric, values)


def test_adherence_falls_with_wrong_captions(scenes: list[Image.Image]) -> None:
    captions = list(held_out_prompts(3 * COUNT).values())[:COUNT]
    shares = []
    for wrong in (0, COUNT // 4, COUNT // 2, COUNT):
        # the wrong ones get the caption of another scene
        asked = [captions[(i + 1) % COUNT] if i < wrong else captions[i] for i in range(COUNT)]
        shares.append(score_adherence(load_detector(), scenes[:COUNT], asked).rates["correct"].share)
    assert shares[0] > 0.9
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.2


def test_bounds_of_the_inception_score(space: FeatureSpace) -> None:
    def score(logits: torch.Tensor) -> float:
        layers = {"logits": logits, "pooled": torch.zeros(len(logits), 4)}
        features = ImageFeatures(layers, space.label, "made", "", (1, 1))
        return value(measure(features, space, ["is"]), "is")

    classes = 10
    certain = torch.eye(classes).repeat(100, 1) * 100
    assert score(torch.zeros(1000, classes)) == pytest.approx(1)
    assert score(certain[:1].repeat(1000, 1)) == pytest.approx(1)
    assert classes * 0.85 < score(certain) <= classes
    random = score(torch.randn(1000, classes, generator=torch.Generator().manual_seed(0)))
    assert 1 < random < classes


def test_noise_says_what_a_difference_is_worth(
    scenes: list[Image.Image], space: FeatureSpace, tmp_path: Path
) -> None:
    blurred = [p.filter(ImageFilter.GaussianBlur(8)) for p in scenes[:COUNT]]
    names = [
        save(tmp_path / "a", scenes[:COUNT]),
        save(tmp_path / "b", scenes[COUNT : 2 * COUNT]),
        save(tmp_path / "c", blurred),
    ]
    report, _ = measure_sets(
        names, space, reference=save(tmp_path / "r", scenes[2 * COUNT :]), progress=False
    )
    assert isinstance(report, MetricsReport)
    alike, worse = report.sets[1], report.sets[2]
    for metric in ("fid", "is", "kid", "precision", "recall"):
        figure = alike.figure(metric)
        assert figure is not None
        assert figure.error is not None
        assert figure.error > 0
        beside = report.against_baseline(alike, figure)
        assert beside is not None
        assert beside.within_noise, (metric, str(beside))
    for metric in ("fid", "kid"):
        figure = worse.figure(metric)
        assert figure is not None
        beside = report.against_baseline(worse, figure)
        assert beside is not None
        assert not beside.within_noise
        assert not beside.better
        assert "worse" in str(beside)
    assert any("no FID" in note for note in alike.notes)
    assert any("mostly bias" in note for note in alike.notes)
    assert json.loads(json.dumps(report.to_dict(), default=str))["sets"][2]["figures"][0]["against_first"]


def test_spread_is_the_spread_of_other_images(space: FeatureSpace, tmp_path: Path) -> None:
    """The standard errors of the Inception Score and of precision are about what other samples show."""
    generator = torch.Generator().manual_seed(0)
    scores, errors = [], []
    for _ in range(40):
        layers = {"logits": 3 * torch.randn(500, 8, generator=generator), "pooled": torch.zeros(500, 2)}
        figure = measure(ImageFeatures(layers, space.label, "made", "", (1, 1)), space, ["is"])[0]
        assert figure.error is not None
        scores.append(figure.value)
        errors.append(figure.error)
    assert 0.6 < np.mean(errors) / np.std(scores) < 1.6


def test_difference_knows_what_is_better() -> None:
    lower = Figure("fid", "FID", 2.0, 0.1, "lower")
    higher = Figure("is", "IS", 200.0, None, "higher")
    assert difference(Figure("fid", "FID", 1.5, 0.1, "lower"), lower).better
    assert not difference(Figure("fid", "FID", 2.5, 0.1, "lower"), lower).within_noise
    assert difference(Figure("fid", "FID", 2.2, 0.1, "lower"), lower).within_noise
    assert difference(Figure("is", "IS", 210.0, 1.0, "higher"), higher).within_noise is None


# -- features that are kept ----------------------------------------------------------------------------


class Counted(nn.Module):
    """Counts the images that a space is shown."""

    def __init__(self, space: FeatureSpace, stop_after: int = 10**9) -> None:
        super().__init__()
        self.inner, self.seen, self.stop_after = space.extractor, 0, stop_after

    def forward(self, images: torch.Tensor) -> Any:
        self.seen += len(images)
        if self.seen > self.stop_after:
            raise KeyboardInterrupt
        return self.inner(images)


def counted(space: FeatureSpace, stop_after: int = 10**9) -> tuple[FeatureSpace, Counted]:
    counting = Counted(space, stop_after)
    return FeatureSpace(
        counting,  # type: ignore[arg-type]
        *(space.layers, space.label, space.pooled, space.logits, space.title),
    ), counting


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varaccel.evaluation.metrics.image_features._CHUNK", 16)


@pytest.mark.usefixtures("small_chunks")
def test_features_are_kept_and_an_interrupted_call_goes_on(
    folders: tuple[Path, Path], space: FeatureSpace, tmp_path: Path
) -> None:
    images = ImageFolder(folders[0])
    options: dict[str, Any] = {"cache": tmp_path / "cache", "batch_size": 8, "progress": False}
    whole = extract_features(images, space, batch_size=8, progress=False)
    stopped, _ = counted(space, stop_after=24)
    with pytest.raises(KeyboardInterrupt):
        extract_features(images, stopped, **options)
    again, counting = counted(space)
    resumed = extract_features(images, again, **options)
    assert counting.seen == COUNT - 16
    kept, counting = counted(space)
    third = extract_features(images, kept, **options)
    assert counting.seen == 0
    for layer in space.layers:
        assert torch.equal(resumed.layers[layer], whole.layers[layer])
        assert torch.equal(third.layers[layer], whole.layers[layer])
    assert resumed.digest == whole.digest
    # a damaged file is taken again, another image is another chunk
    next((tmp_path / "cache").iterdir()).write_bytes(b"no features")
    repaired, counting = counted(space)
    extract_features(images, repaired, **options)
    assert counting.seen == 16


# -- bad input -----------------------------------------------------------------------------------------


def test_images_of_mixed_sizes_are_named(
    scenes: list[Image.Image], space: FeatureSpace, tmp_path: Path
) -> None:
    folder = save(tmp_path, [scenes[0], scenes[1], scenes[2].resize((64, 96))])
    with pytest.raises(InputError, match=r"0000\.png is 128 × 128, but .*0002\.png is 64 × 96"):
        extract_features(ImageFolder(folder), space, progress=False)
    cropped = extract_features(ImageFolder(folder, size=64), space, progress=False)
    assert cropped.size == (64, 64)


def test_a_corrupt_image_stops_or_is_skipped(
    scenes: list[Image.Image], space: FeatureSpace, tmp_path: Path
) -> None:
    folder = save(tmp_path, scenes[:12])
    (folder / "0003.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=r"0003\.png cannot be read"):
        extract_features(ImageFolder(folder), space, progress=False)
    features = extract_features(ImageFolder(folder), space, on_corrupt="skip", progress=False)
    assert len(features) == 11
    assert [Path(name).name for name in features.skipped] == ["0003.png"]
    notes = measuring.cautions(features, space, [], None)
    assert any("0003.png" in note for note in notes)
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="none of the 12 images"):
        extract_features(ImageFolder(folder), space, on_corrupt="skip", progress=False)


def test_what_cannot_be_measured(folders: tuple[Path, Path], space: FeatureSpace, tmp_path: Path) -> None:
    own = extract_features(ImageFolder(folders[0]), space, progress=False)
    reference = reference_of(own, space)
    with pytest.raises(InputError, match="did you mean 'fid'"):
        measure(own, space, ["fidd"], reference)
    with pytest.raises(InputError, match="name at least one metric"):
        measure(own, space, [])
    with pytest.raises(InputError, match="compare with a reference"):
        measure(own, space, ["fid"])
    with pytest.raises(InputError, match="leave out sfid"):
        measure(own, space, ["sfid"], reference)
    with pytest.raises(InputError, match="inception space"):
        load_space("scenes", spatial=True)
    with pytest.raises(InputError, match="scenes:N"):
        load_reference("scenes:all", space)
    with pytest.raises(InputError, match="there is no file"):
        load_reference(tmp_path / "none.npz", space)
    few = ImageFeatures({name: rows[:3] for name, rows in own.layers.items()}, own.space, "few", "", own.size)
    for metric, words in (("is", "10 splits"), ("kid", "at least four"), ("pr", "more than 4")):
        with pytest.raises(InputError, match=words):
            measure(few, space, [metric], reference_of(few, space))
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(InputError, match="inception space"):
        load_reference(tmp_path / "adm.npz", space)
    other = statistics_of(own, "pooled")
    FeatureStatistics(other.mean, other.covariance, COUNT, "scenes-detector/00000000").save(
        tmp_path / "o.npz"
    )
    with pytest.raises(InputError, match="same space"):
        load_reference(tmp_path / "o.npz", space)


# -- Inception -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the format of the published file: what they measure means nothing."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    original = torch_fidelity.FeatureExtractorInceptionV3.load_state_dict
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        patch.setattr(torch_fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(torch, "load", lambda *_, **__: {})
        network = torch_fidelity.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path="none"
        )
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    assert torch_fidelity.FeatureExtractorInceptionV3.load_state_dict is original
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.slow
def test_inception_gives_torch_fidelitys_numbers(
    scenes: list[Image.Image], random_inception: Path, tmp_path: Path
) -> None:
    folders = [
        save(tmp_path / "a", [p.resize((32, 32)) for p in scenes[:12]]),
        save(tmp_path / "b", [p.resize((32, 32)).filter(ImageFilter.BLUR) for p in scenes[12:24]]),
    ]
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        feature_extractor_weights_path=str(random_inception),
        feature_extractor="inception-v3-compat",
        **{"isc": True, "fid": True, "kid": True, "prc": True, "kid_subset_size": 6},
        **{"cuda": False, "verbose": False, "save_cpu_ram": True, "cache": False},
    )
    space = load_space("inception", weights=random_inception, spatial=True)
    own, other = (extract_features(ImageFolder(f), space, progress=False) for f in folders)
    # the reference as ADM's file: statistics and images
    statistics, spatial = statistics_of(other, space.pooled), statistics_of(other, "spatial")
    np.savez(
        tmp_path / "adm.npz",
        arr_0=np.stack([np.asarray(Image.open(path)) for path in ImageFolder(folders[1]).files]),
        **{"mu": statistics.mean.numpy(), "sigma": statistics.covariance.numpy()},
        **{"mu_s": spatial.mean.numpy(), "sigma_s": spatial.covariance.numpy()},
    )
    reference = load_reference(tmp_path / "adm.npz", space, progress=False)
    figures = measure(own, space, ["fid", "is", "kid", "pr"], reference, resamples=0)
    for metric, key in (
        ("fid", torch_fidelity.KEY_METRIC_FID),
        ("is", torch_fidelity.KEY_METRIC_ISC_MEAN),
        ("kid", torch_fidelity.KEY_METRIC_KID_MEAN),
        ("precision", torch_fidelity.KEY_METRIC_PRECISION),
        ("recall", torch_fidelity.KEY_METRIC_RECALL),
    ):
        assert value(figures, metric) == pytest.approx(theirs[key], rel=1e-4), metric
    assert [figure.title for figure in figures[:2]] == ["FID", "IS"]
    assert theirs[torch_fidelity.KEY_METRIC_FID] > 0.1
    # random weights are no reportable FID, and the report says so
    assert not space.standard
    assert any("not the standard ones" in n for n in measuring.cautions(own, space, figures, reference))
    # spatial features: the first seven channels of the block, channels last
    with torch.no_grad():
        kept: list[torch.Tensor] = []
        handle = space.extractor.Mixed_6d.register_forward_hook(lambda *call: kept.append(call[2]))
        space.extractor(torch.stack([ImageFolder(folders[0])[i] for i in range(2)]))
        handle.remove()
    assert own.layers["spatial"].shape == (12, 2023)
    expected = kept[0][:, :7].permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(own.layers["spatial"][:2], expected, rtol=1e-4, atol=1e-5)
    assert reference.spatial is not None
    assert reference.spatial.mean.allclose(spatial.mean)


def test_wrong_weights_of_inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="no weights at"):
        load_space("inception", weights=tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(CheckpointError, match="no plain weights"):
        load_space("inception", weights=tmp_path / "text.pth")

    class Evil:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    with (tmp_path / "evil.pth").open("wb") as file:
        pickle.dump({"weight": Evil()}, file)
    with pytest.raises(CheckpointError, match="no plain weights"):
        load_space("inception", weights=tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not hold the weights"):
        load_space("inception", weights=tmp_path / "other.pth")
    # the variable is an alternative to the argument
    monkeypatch.setenv("VARACCEL_INCEPTION", str(tmp_path / "elsewhere.pth"))
    with pytest.raises(CheckpointError, match="elsewhere"):
        inception_weights()
    monkeypatch.delenv("VARACCEL_INCEPTION")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def no_network(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(CheckpointError, match=r"could not be downloaded.*fetch https.*VARACCEL_INCEPTION"):
        inception_weights()
    with pytest.raises(InputError, match="did you mean 'inception'"):
        load_space("inceptoin")


def test_the_standard_weights_are_known_by_their_digest() -> None:
    assert len(INCEPTION_DIGEST) == 8
    assert set(INCEPTION_DIGEST) <= set("0123456789abcdef")
    assert issubclass(InceptionFeatures, torch_fidelity.FeatureExtractorInceptionV3)


# -- against what was published ------------------------------------------------------------------------


def test_the_published_figure_stands_beside_ours() -> None:
    preset = PRESETS["llamagen-xl-384"]
    figure = Figure("fid", "FID", 2.7, 0.02, "lower")
    run = {
        **{"model": preset.model, "count": 50_000, "image_size": 256, "rounding": "nearest"},
        **{"dtype": "bfloat16", "source": "classes:random", "accelerator": "plain", "options": {}},
        "call": dict(preset.call),
    }
    sets = (SetReport("run", 50_000, "", (256, 256), (figure,), (), run),)
    shown = MetricsReport(sets, STANDARD_SPACE, None, preset)
    found = shown.against_published(figure)
    assert found is not None
    assert found[0] == 2.62
    assert found[1].value == pytest.approx(0.08)
    assert not found[1].within_noise
    assert shown.to_dict()["sets"][0]["figures"][0]["published"] == 2.62
    assert shown.departures == []
    # features of another network are no FID, and nothing is published without a protocol
    assert MetricsReport(sets, "scenes-detector/1", None, preset).against_published(figure) is None
    assert MetricsReport(sets, STANDARD_SPACE).against_published(figure) is None
    # what was drawn in another way is told
    other = {
        **{**run, "count": 500, "accelerator": "zipar", "options": {"window": 8}},
        "call": {**preset.call, "guidance_scale": 2.0},
    }
    departing = MetricsReport((replace(sets[0], run=other),), STANDARD_SPACE, None, preset)
    assert departing.departures == [
        "count 500 instead of 50000",
        "accelerator 'zipar' instead of 'plain'",
        "options {'window': 8} instead of {}",
        "guidance_scale 2.0 instead of 1.75",
    ]


def test_open_images_refuses_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        open_images("cifar11-train")
