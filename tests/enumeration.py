"""The exact distribution of all images of a small causal network, and how well drawn images follow it.

A network of three tokens on a grid of three by three has 19683 images. One teacher-forced pass over all of them
gives the whole distribution; a call for thousands of images is then held against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import drafting_pipeline
from varaccel import LlamaGenPipeline
from varaccel.accelerators import Accelerator
from varaccel.hosts.causal.guidance import Guidance
from varaccel.hosts.causal.sampling import Sampling

# teacher-forced logits of token ids [n, N], position by position [n, N, V], guided and before any filter
Logits = Callable[[Tensor], Tensor]

VOCAB_SIZE, GRID = 3, 3
POSITIONS = GRID**2
IMAGES = 2048
# of the grid of three by three: what is drawn together, at the start, at the end, across a row border, and far apart
GROUPS = ((0, 1, 2, 3), (6, 7, 8), (2, 3, 5, 6), (0, 4, 8), (4, 5, 6, 7))
# one number in 300 000 lies beyond; a few hundred are looked at, with fixed seeds
LIMIT = 4.5


# -- the distribution ----------------------------------------------------------------------------------


def exact_distribution(
    logits: Logits, vocab_size: int, positions: int, sampling: Sampling | None = None
) -> Tensor:
    """[V, ..., V] float64, the probability of every image, or of every beginning of `positions` tokens.

    Args:
        logits: called with some of all V ** positions sequences; entry i may depend on the tokens before i only.
            -inf marks impossible tokens; what is said after one does not count.
        sampling: filters; none by default.
    """
    images = torch.cartesian_prod(*[torch.arange(vocab_size)] * positions).view(-1, positions)
    sampling = sampling or Sampling()
    parts = []
    with torch.inference_mode():
        for part in images.split(4096):
            filtered = sampling.filter(logits(part)).double().log_softmax(-1)
            log_probs = filtered.gather(-1, part.unsqueeze(-1)).squeeze(-1)  # [n, N]
            impossible = log_probs.isneginf().any(-1)
            parts.append(log_probs.sum(-1).masked_fill(impossible, -torch.inf))
    probs = torch.cat(parts).exp()
    assert probs.sum() == pytest.approx(1, abs=1e-6)
    return probs.view([vocab_size] * positions)


def marginal(distribution: Tensor, group: tuple[int, ...]) -> Tensor:
    """[V ** len(group)] the joint distribution of some positions."""
    others = [position for position in range(distribution.dim()) if position not in group]
    return (distribution.sum(dim=others) if others else distribution).flatten()


def sampled(distribution: Tensor, seed: int, images: int = IMAGES) -> Tensor:
    """Images [n, N] drawn from the distribution itself."""
    index = torch.multinomial(
        distribution.flatten(), images, replacement=True, generator=torch.Generator().manual_seed(seed)
    )
    return torch.stack(torch.unravel_index(index, distribution.shape), dim=1)


# -- the measure ---------------------------------------------------------------------------------------


def counts(drawn: Tensor, group: tuple[int, ...], vocab_size: int) -> Tensor:
    """[V ** len(group)] how often each combination stands at some positions of images [n, N]."""
    index = sum(drawn[:, position] * vocab_size**power for power, position in enumerate(reversed(group)))
    assert isinstance(index, Tensor)
    return torch.bincount(index, minlength=vocab_size ** len(group)).double()


def chi_square(observed: Tensor, expected: Tensor) -> float:
    """Pearson's statistic as a standard normal number (Wilson and Hilferty 1931); rare cells are pooled."""
    assert observed[expected == 0].sum() == 0, "what is impossible was drawn"
    rare = expected < 5
    if rare.any():
        observed = torch.cat([observed[~rare], observed[rare].sum().view(1)])
        expected = torch.cat([expected[~rare], expected[rare].sum().view(1)])
    possible = expected > 0
    freedom = int(possible.sum()) - 1
    statistic = ((observed - expected) ** 2 / expected)[possible].sum().item()
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - 1 + spread) / spread**0.5


def misfit(drawn: Tensor, distribution: Tensor, groups: Sequence[tuple[int, ...]] = GROUPS) -> float:
    """How far images [n, ...] are from the distribution, in standard deviations; the worst of several measures.

    Besides the joint distributions of groups of positions, the mean log-probability of whole images, which no group
    sees. At least two combinations of every group must be possible.
    """
    drawn = drawn.flatten(1)
    vocab_size = distribution.shape[0]
    scores = [
        chi_square(counts(drawn, group, vocab_size), len(drawn) * marginal(distribution, group))
        for group in groups
    ]
    weights = distribution[distribution > 0]
    mean = (weights * weights.log()).sum()
    variance = (weights * (weights.log() - mean) ** 2).sum()
    found = distribution[tuple(drawn.T)].log().mean()
    scores.append(float((found - mean).abs() / (variance / len(drawn)).sqrt()))
    return max(scores)


# -- LlamaGen ------------------------------------------------------------------------------------------

SHARPNESS = {"c2i": 0.8, "t2i": 0.25}
PROMPT: dict[str, int | str] = {"c2i": 1, "t2i": "a red sphere"}


def teacher_forced(pipe: LlamaGenPipeline, prompt: int | str, guidance: Guidance | None = None) -> Logits:
    """The logits of a pipeline's network on one prompt."""
    model = pipe.transformer
    guidance = guidance or Guidance()
    encoded = pipe._condition([prompt])
    assert encoded is not None
    condition, mask = encoded.values, encoded.mask

    def branch(condition: Tensor, tokens: Tensor) -> Tensor:
        wide = condition.expand(len(tokens), *condition.shape[1:])
        masks = None if mask is None else mask.expand(len(tokens), -1)
        out: Tensor = model(wide, tokens[:, :-1], masks)[:, model.prefix_length - 1 :]
        return out

    def logits(tokens: Tensor) -> Tensor:
        conditional = branch(condition, tokens)
        if not guidance.enabled:
            return conditional
        guided = guidance.combine(conditional, branch(model.unconditional(condition), tokens))
        active = torch.tensor([guidance.active_at(position) for position in range(tokens.shape[1])])
        return torch.where(active[:, None], guided, conditional)

    return logits


@dataclass(frozen=True)
class Setting:
    """A distribution of LlamaGen images: whose, and how it is guided and filtered."""

    host: str = "c2i"
    guidance: float = 1.0
    interval: int = -1
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def pipe(self) -> LlamaGenPipeline:
        return drafting_pipeline(self.host, VOCAB_SIZE, GRID, SHARPNESS[self.host])

    @property
    def distribution(self) -> Tensor:
        return _distribution(self)

    def draw(self, accelerator: Accelerator, images: int = IMAGES, **options: Any) -> Any:
        if "generator" not in options:
            options = {"seed": 0, **options}
        return self.pipe(
            PROMPT[self.host],
            num_images_per_prompt=images,
            guidance_scale=self.guidance,
            guidance_interval=self.interval,
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            accelerator=accelerator,
            output_type="latent",
            **options,
        )


@cache
def _distribution(setting: Setting) -> Tensor:
    logits = teacher_forced(setting.pipe, PROMPT[setting.host], Guidance(setting.guidance, setting.interval))
    return exact_distribution(logits, VOCAB_SIZE, POSITIONS, setting.sampling)
