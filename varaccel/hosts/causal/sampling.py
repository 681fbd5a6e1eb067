"""Temperature, top-k and top-p, in the order and with the borders of LlamaGen's published sampler."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varaccel.engine.options import MIN_TEMPERATURE, check_integer, check_number, settle


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token instead of drawing.
        top_k: keep the k most likely tokens, 0 or more than there are for all; ties with the k-th are all kept.
        top_p: keep the most likely tokens up to this mass, the one that crosses it included; 1 or 0 for all.

    Raises:
        InputError: a value out of range or not a number.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        settle(
            self,
            temperature=check_number("temperature", self.temperature),
            top_k=check_integer("top_k", self.top_k, least=0, off="0 = off"),
            top_p=check_number("top_p", self.top_p, most=1, off="0 and 1 = off"),
        )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def filter(self, logits: Tensor) -> Tensor:
        """Scaled logits with -inf at dropped tokens: temperature, then top-k, then top-p.

        Args:
            logits: [..., V] float32.
        """
        if not self.greedy:
            logits = logits / max(self.temperature, MIN_TEMPERATURE)
        if 0 < self.top_k < logits.shape[-1]:
            # only the border is needed, and to sort what is above it would take most of the time
            border = logits.topk(self.top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
            logits = logits.masked_fill(logits < border, -torch.inf)
        if 0 < self.top_p < 1:
            ordered, index = logits.sort(dim=-1, descending=True)
            mass = ordered.softmax(dim=-1)
            dropped = mass.cumsum(dim=-1) - mass > self.top_p
            logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, index, dropped), -torch.inf)
        return logits
