"""Number types of training."""

from __future__ import annotations

import torch


def quick_bfloat16(device: torch.device) -> bool:
    """Whether `device` computes in bfloat16; CPUs that only emulate it take ten times as long as in float32."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
