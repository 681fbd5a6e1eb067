"""Networks whose features images are compared in: torch-fidelity's Inception, and the scene detector.

A distance means something only together with the space that it was measured in. Only Inception features give a
FID; the scene detector's give figures of the same formulas for the small shipped models, offline, which compare with
each other only.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorBase, FeatureExtractorInceptionV3, register_feature_extractor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from varaccel.errors import CheckpointError, InputError, unknown_name
from varaccel.evaluation.metrics.frechet import scene_space
from varaccel.models.detector import FEATURE_SPACE, SceneDetector, as_batch, load_detector

INCEPTION = "inception-v3-compat"
"""torch-fidelity's name of the Inception that FID, IS and KID are defined with."""

INCEPTION_FILE = URL_INCEPTION_V3.rsplit("/", 1)[1]
INCEPTION_DIGEST = INCEPTION_FILE.rsplit("-", 1)[1].removesuffix(".pth")
"""First digits of the sha256 of the standard weights."""

STANDARD_SPACE = f"{INCEPTION}/{INCEPTION_DIGEST}"
"""Label of the features that published figures are of."""

_INCEPTION_VARIABLE = "VARACCEL_INCEPTION"
_SPATIAL_CHANNELS = 7

SPACES = {"scenes": FEATURE_SPACE, "inception": INCEPTION}
"""What a command line calls them, and their names in torch-fidelity."""


class SceneFeatures(FeatureExtractorBase):
    """The shipped scene detector as a feature extractor of torch-fidelity, registered as `scenes-detector`.

    Provides `pooled` ([B, D], see `SceneDetector.features`) and `logits` ([B, shapes × colours]: what the likeliest
    object of the image is, for a score in the manner of the Inception Score). Takes uint8 [B, 3, H, W]; other sizes
    than the detector's are resized with antialiasing.

    Args:
        feature_extractor_weights_path: folder of another detector.
    """

    def __init__(
        self,
        name: str,
        features_list: Sequence[str],
        feature_extractor_weights_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name, list(features_list))
        self.detector: SceneDetector = load_detector(feature_extractor_weights_path)
        self.requires_grad_(False)
        self.eval()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("pooled", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "pooled"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        batch = images.float().div(127.5).sub(1)
        trunk, pooled = self.detector.encode(as_batch(batch, self.detector.config.image_size))
        found = {"pooled": pooled.float()}
        if "logits" in self.features_list:
            found["logits"] = self.detector.object_logits(trunk).float()
        return tuple(found[layer] for layer in self.features_list)


class InceptionFeatures(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception, which here also provides `spatial`: what sFID compares.

    sFID (Nash et al. 2021, arXiv 2103.03841), in the form of ADM's evaluation: the first seven channels of the first
    branch of the 17 × 17 block `Mixed_6d`, flattened with channels last, [B, 2023].
    """

    def __init__(self, name: str, features_list: Sequence[str], **kwargs: Any) -> None:
        self.wanted = list(features_list)
        super().__init__(name, [layer for layer in self.wanted if layer != "spatial"] or ["768"], **kwargs)
        self._branch: Tensor | None = None
        if "spatial" in self.wanted:
            self.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._branch = output[:, :_SPATIAL_CHANNELS]

    def get_requested_features_list(self) -> list[str]:
        return self.wanted

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = dict(zip(self.features_list, super().forward(images), strict=True))
        if self._branch is not None:
            found["spatial"] = self._branch.permute(0, 2, 3, 1).flatten(1).float()
            self._branch = None
        return tuple(found[layer] for layer in self.wanted)


@dataclass(frozen=True)
class FeatureSpace:
    """A network, ready to take features.

    Attributes:
        extractor: takes uint8 [B, 3, H, W], gives a tuple of the `layers`.
        layers: what it gives, in order.
        label: name of the network and a digest of its weights; features of different labels cannot be compared.
        pooled, logits: layers for distances and for the Inception Score.
        title: what the Fréchet distance in this space is called.
    """

    extractor: FeatureExtractorBase
    layers: tuple[str, ...]
    label: str
    pooled: str
    logits: str
    title: str

    SPATIAL: ClassVar[str] = "spatial"

    @property
    def is_inception(self) -> bool:
        return self.label.startswith(INCEPTION)

    @property
    def standard(self) -> bool:
        """Whether figures of this space may be compared with published ones."""
        return self.label == STANDARD_SPACE

    @property
    def device(self) -> torch.device:
        return next(self.extractor.parameters()).device


@cache
def register_scene_features() -> None:
    """Make `scenes-detector` known to torch-fidelity, for `calculate_metrics(feature_extractor=...)`."""
    if FEATURE_SPACE not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(FEATURE_SPACE, SceneFeatures)


def load_space(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    logits: bool = True,
    spatial: bool = False,
) -> FeatureSpace:
    """A feature space by name.

    Args:
        name: "scenes" (the shipped detector) or "inception".
        weights: folder of another detector, or file of Inception's weights. Without one, Inception's are looked for
            in the environment variable VARACCEL_INCEPTION and in torch's hub folder, then downloaded.
        device: where to run.
        logits: also take what the Inception Score needs.
        spatial: also take what sFID needs (Inception only).

    Raises:
        InputError: an unknown name; `spatial` of the scene detector.
        CheckpointError: weights that are missing, damaged, unsafe or of another network.
    """
    if name not in SPACES:
        raise unknown_name("feature space", name, SPACES)
    if name == "scenes":
        if spatial:
            raise InputError(
                "sFID is defined in Inception features only; use the inception space, or leave it out."
            )
        register_scene_features()
        layers = ["pooled", *(["logits"] if logits else [])]
        scenes = SceneFeatures(FEATURE_SPACE, layers, None if weights is None else os.fspath(weights))
        return FeatureSpace(
            scenes.to(device),
            tuple(layers),
            scene_space(scenes.detector),
            "pooled",
            "logits",
            "Fréchet distance (scenes)",
        )
    layers = [
        "2048",
        *(["logits_unbiased"] if logits else []),
        *([FeatureSpace.SPATIAL] if spatial else []),
    ]
    path, digest = inception_weights(weights)
    try:
        extractor = InceptionFeatures(INCEPTION, layers, feature_extractor_weights_path=str(path))
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} does not hold the weights of torch-fidelity's Inception; fetch {URL_INCEPTION_V3}."
        ) from error
    return FeatureSpace(
        extractor.to(device), tuple(layers), f"{INCEPTION}/{digest}", "2048", "logits_unbiased", "FID"
    )


def check_space(name: str, weights: str | os.PathLike[str] | None = None) -> None:
    """Refuse, before any work is done, a space that cannot be loaded; downloads Inception's weights if need be.

    Raises:
        InputError: an unknown name.
        CheckpointError: see `load_space`.
    """
    if name not in SPACES:
        raise unknown_name("feature space", name, SPACES)
    if name == "inception":
        inception_weights(weights)
    else:
        load_detector(None if weights is None else Path(weights))


def inception_weights(path: str | os.PathLike[str] | None = None) -> tuple[Path, str]:
    """The file of Inception's weights, downloaded if there is none, and the first 8 digits of its sha256.

    Raises:
        CheckpointError: the file is missing, damaged or unsafe, or there is no connection.
    """
    file = _find_inception(path)
    try:
        # torch-fidelity itself would also run code that is in the file
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file} holds no plain weights; fetch {URL_INCEPTION_V3}.") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{file} holds no plain weights; fetch {URL_INCEPTION_V3}.")
    with file.open("rb") as opened:
        return file, hashlib.file_digest(opened, "sha256").hexdigest()[:8]


def _find_inception(path: str | os.PathLike[str] | None) -> Path:
    wanted = path or os.environ.get(_INCEPTION_VARIABLE)
    if wanted is not None:
        if not Path(wanted).is_file():
            raise CheckpointError(f"there are no weights at {wanted}; fetch {URL_INCEPTION_V3}.")
        return Path(wanted)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not cached.is_file():
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(cached), hash_prefix=INCEPTION_DIGEST)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"Inception's weights could not be downloaded ({error}); fetch {URL_INCEPTION_V3} where there is a "
                f"connection and pass the file, or set {_INCEPTION_VARIABLE} to its path."
            ) from error
    return cached
