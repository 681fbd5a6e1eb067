"""What a network says about positions: something to sample, to weigh and to subtract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from varaccel.nn.devices import real_type


class Distribution(Protocol):
    """A distribution for each of P positions of B images."""

    def sample(self, uniforms: Tensor) -> Tensor:
        """Turn uniform numbers [B, P] in [0, 1) into values [B, P] (or [B, P, C]); deterministic."""
        ...

    def log_prob(self, values: Tensor) -> Tensor:
        """Log-probability (density) of values, [B, P]."""
        ...


@dataclass(frozen=True)
class Categorical:
    """Distributions over a codebook, given by logits; -inf marks impossible tokens.

    Attributes:
        logits: [B, P, V] float32, not necessarily normalised.
        greedy: `sample` takes the most likely code, the first of several.
    """

    logits: Tensor
    greedy: bool = False

    @property
    def probs(self) -> Tensor:
        """[B, P, V]; in greedy mode all mass is on the most likely code."""
        if self.greedy:
            best = self.logits.argmax(dim=-1, keepdim=True)
            return torch.zeros_like(self.logits).scatter(-1, best, 1.0)
        return self.logits.softmax(dim=-1)

    def sample(self, uniforms: Tensor) -> Tensor:
        """Invert the cumulative distribution at `uniforms` [B, P] -> token ids [B, P] int64.

        In float64 where the device has it, so that neither rare tokens of a large codebook nor the last token are
        lost to rounding. A code of probability zero is never drawn.
        """
        if self.greedy:
            return self.logits.argmax(dim=-1)
        cumulative = self.logits.to(real_type(self.logits.device)).softmax(dim=-1).cumsum(dim=-1)  # [B, P, V]
        total = cumulative[..., -1:]
        target = uniforms.unsqueeze(-1).to(total) * total
        # strictly below the total: the first entry above the target then has positive probability
        below = torch.nextafter(total, torch.zeros_like(total))
        code = torch.searchsorted(cumulative, torch.minimum(target, below), right=True)
        # logits that are no numbers are found elsewhere; until then the index must be one
        return code.squeeze(-1).clamp(max=self.logits.shape[-1] - 1)

    def by_lane(self, lanes: int) -> Categorical:
        """Distributions of all lanes of an image, [B, A * n, V], as distributions of sequences, [B * A, n, V]."""
        size = self.logits.shape[-1]
        return Categorical(self.logits.view(self.logits.shape[0] * lanes, -1, size), self.greedy)

    def perturbed(self, noise: Tensor) -> Tensor:
        """Log-probabilities plus Gumbel noise [B, P, V]; the largest is a draw (the Gumbel-max trick), the k
        largest are k draws without replacement. Without noise in greedy mode."""
        return self.logits if self.greedy else self.logits.log_softmax(dim=-1) + noise

    def log_prob(self, values: Tensor) -> Tensor:
        if self.greedy:
            return self.probs.gather(-1, values.unsqueeze(-1)).squeeze(-1).log()
        return self.logits.log_softmax(dim=-1).gather(-1, values.unsqueeze(-1)).squeeze(-1)

    def residual(self, draft: Self) -> Categorical:
        """The distribution to draw from after a token drawn from `draft` was rejected: max(p - q, 0), normalised.

        Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding",
        section 2.3. Where p = q nothing can be rejected; the distribution itself is returned there.
        """
        rest = (self.probs - draft.probs).clamp(min=0)
        empty = rest.sum(dim=-1, keepdim=True) <= 0
        return Categorical(torch.where(empty, self.probs, rest).log())
