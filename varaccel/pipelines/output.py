"""What a pipeline call returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput

from varaccel.decoding.statistics import Statistics


@dataclass
class ImageOutput(BaseOutput):
    """Pictures and their cost.

    Attributes:
        images: PIL pictures, an array [B, H, W, 3] or tensor [B, 3, H, W] in [0, 1], or token codes
            [B, h, w], by `output_type`. Pictures of one prompt stand together.
        stats: what the call cost.
        written: [B, h, w] int32, the pass that decided each token: the acceptance map.
    """

    images: Any
    stats: Statistics
    written: Any
