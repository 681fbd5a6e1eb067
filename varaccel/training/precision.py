"""Number types of training."""

from __future__ import annotations

import torch

from varaccel.nn.devices import is_host


def quick_bfloat16(device: torch.device) -> bool:
    """Whether `device` computes in bfloat16; CPUs that only emulate it take ten times as long as in float32."""
    return not is_host(device) or torch.cpu._is_avx512_bf16_supported()
