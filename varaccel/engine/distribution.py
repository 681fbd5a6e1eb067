"""What a network says about positions: something to sample, to weigh and to subtract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from varaccel.nn.devices import real_type

_MANY_TOKENS, _BLOCK = 4096, 128
"""From so many tokens on a draw looks for a block of them first."""


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
        size = self.logits.shape[-1]
        if size >= _MANY_TOKENS and size % _BLOCK == 0:
            return _drawn_in_blocks(self.logits, uniforms)
        cumulative = self.logits.to(real_type(self.logits.device)).softmax(dim=-1).cumsum(dim=-1)  # [B, P, V]
        target = _below_total(uniforms, cumulative[..., -1:])
        code = torch.searchsorted(cumulative, target, right=True)
        # logits that are no numbers are found elsewhere; until then the index must be one
        return code.squeeze(-1).clamp(max=size - 1)

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


def _drawn_in_blocks(logits: Tensor, uniforms: Tensor) -> Tensor:
    """As `Categorical.sample`, in two steps: a block by the sums of all, then a token of it.

    Sums over a whole codebook in float64 would be most of what a pass with many draft tokens takes on a processor.
    """
    real = real_type(logits.device)
    probs = logits.softmax(dim=-1).unflatten(-1, (-1, _BLOCK))  # [B, P, N, K]
    sums = probs.sum(dim=-1, dtype=real).cumsum(dim=-1)  # [B, P, N]
    target = _below_total(uniforms, sums[..., -1:])
    block = torch.searchsorted(sums, target, right=True).clamp(max=sums.shape[-1] - 1)  # [B, P, 1]
    before = torch.where(block > 0, sums.gather(-1, (block - 1).clamp(min=0)), 0)
    inside = probs.gather(-2, block.unsqueeze(-1).expand(*block.shape, _BLOCK)).squeeze(-2)
    # adding up token by token rounds otherwise than the sum of the block: its last token must not be passed
    cumulative = torch.minimum(before + inside.to(real).cumsum(dim=-1), sums.gather(-1, block))
    code = torch.searchsorted(cumulative, target, right=True)
    last = (cumulative < cumulative[..., -1:]).sum(dim=-1, keepdim=True)  # the first that reaches the end
    return (block * _BLOCK + torch.minimum(code, last)).squeeze(-1)


def _below_total(uniforms: Tensor, total: Tensor) -> Tensor:
    """Where to look in a cumulative distribution, [B, P, 1].

    Strictly below the total [B, P, 1]: the first entry above the target then has positive probability.
    """
    target = uniforms.unsqueeze(-1).to(total) * total
    return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
