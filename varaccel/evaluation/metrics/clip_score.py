"""CLIP score: how well images go with their descriptions, for models of real text."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.multimodal.clip_score import CLIPScore
from tqdm import tqdm

from varaccel.errors import CheckpointError, InputError
from varaccel.evaluation.metrics.figures import Figure
from varaccel.evaluation.metrics.image_sets import ImageSet

CLIP_MODEL = "openai/clip-vit-base-patch32"
"""ViT-B/32, which most papers of the field report."""


class _Features(nn.Module):
    """A CLIP as torchmetrics knows it: transformers 5 returns projected features inside of an output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels: Tensor) -> Tensor:
        return _tensor(self.model.get_image_features(pixels))

    def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        return _tensor(self.model.get_text_features(ids, mask))


def _tensor(features: Any) -> Tensor:
    return features if isinstance(features, Tensor) else features.pooler_output


def load_clip(name: str = CLIP_MODEL) -> CLIPScore:
    """torchmetrics' CLIP score with a CLIP from a folder or the hub.

    Raises:
        CheckpointError: there is none, or it cannot be had.
    """
    from transformers import CLIPModel, CLIPProcessor

    def parts() -> tuple[Any, Any]:
        return _Features(CLIPModel.from_pretrained(name).eval()), CLIPProcessor.from_pretrained(name)

    try:
        return CLIPScore(model_name_or_path=parts)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"CLIP could not be loaded from {name}: {reason}; fetch {CLIP_MODEL} from the hub where there is a "
            "connection and pass its folder."
        ) from error


@torch.inference_mode()
def clip_figure(
    clip: CLIPScore,
    images: ImageSet,
    prompts: Sequence[str],
    *,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Figure:
    """The mean of 100 cos(image, prompt) over all images, at least 0 (Hessel et al. 2021, arXiv 2104.08718).

    Raises:
        InputError: other than one prompt per image.
    """
    if len(images) != len(prompts):
        raise InputError(f"{len(images)} images need as many prompts, got {len(prompts)}.")
    clip = clip.to(device)
    clip.reset()
    scores = []
    for index in tqdm(range(len(images)), desc="CLIP score", unit="image", disable=not progress or None):
        before = float(clip.score)
        # one at a time: the metric keeps a sum, and the standard error needs every image's own
        clip.update(images[index].to(device), prompts[index])
        scores.append(float(clip.score) - before)
    error = (
        float(torch.tensor(scores, dtype=torch.float64).std()) / sqrt(len(scores))
        if len(scores) > 1
        else None
    )
    return Figure("clip", "CLIP score", float(clip.compute()), error, "higher", {"images": len(scores)})
