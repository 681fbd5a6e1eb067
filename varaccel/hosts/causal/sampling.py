"""Temperature, top-k and top-p, in the order and with the borders of LlamaGen's published sampler."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from varaccel.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token instead of drawing.
        top_k: keep the k most likely tokens, 0 for all; ties with the k-th are all kept.
        top_p: keep the most likely tokens up to this mass, the one that crosses it included; 1 for all.

    Raises:
        InputError: a value out of range or not a number.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise InputError(f"temperature must be a number >= 0, got {self.temperature}.")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise InputError(f"top_k must be an integer >= 0 (0 = off), got {self.top_k!r}.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def filter(self, logits: Tensor) -> Tensor:
        """Scaled logits with -inf at dropped tokens: temperature, then top-k, then top-p.

        Args:
            logits: [..., V] float32.
        """
        if not self.greedy:
            logits = logits / max(self.temperature, 1e-5)
        if 0 < self.top_k < logits.shape[-1]:
            border = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < border, -torch.inf)
        if self.top_p < 1:
            ordered, index = logits.sort(dim=-1, descending=True)
            mass = ordered.softmax(dim=-1)
            dropped = mass.cumsum(dim=-1) - mass > self.top_p
            logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, index, dropped), -torch.inf)
        return logits
