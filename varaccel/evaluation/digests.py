"""Short digests that say whether two results are of the same model and the same prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from torch import nn


def weights_digest(pipe: Any) -> str:
    """Names, shapes and the first numbers of all weights: training changes them, and a large model is read quickly."""
    digest = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, nn.Module):
            for key, value in sorted(part.state_dict().items()):
                first = value.detach().flatten()[:16].cpu().double()
                digest.update(f"{name}.{key}{list(value.shape)}".encode() + first.numpy().tobytes())
    return digest.hexdigest()[:8]


def text_digest(texts: Sequence[str]) -> str:
    """Digest of several texts in their order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:8]
