"""Whether drawn images follow given conditional probabilities, for images of any length, with a bounded false alarm.

A token less its probability given all tokens before it, its innovation, has mean zero whatever was drawn before. So
the sum of innovations, each weighted by anything that was known before its token was drawn, has mean zero and a
covariance that is known; its chi-square needs neither a list of all images nor images that are independent inside.
Weights that are tested: constant, the tokens to the left and above, the innovation at the same position of another
image, and innovations of k positions and k passes ago. When a token is decided says nothing about which it will be, so
weights may go by passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ALARM = 1e-6 / 30_000
"""A statistic this improbable is a fault. The suite looks at fewer than 30 000 (some 270 of each of 70 settings),
so that all false alarms together have a probability below one in a million; and seeds are fixed."""
LONGEST_LAG = 40  # passes between two tokens that are held against each other
CLASSES = 5  # a larger vocabulary is looked at in so many classes


@dataclass(frozen=True)
class Drawn:
    """Tokens of B images and what they were drawn from.

    Attributes:
        tokens: [B, N] int64.
        probs: [B, N, V] float64, each given the tokens that were decided before it.
        passes: [B, N] int64, number of the pass that decided each, from 1.
    """

    tokens: Tensor
    probs: Tensor
    passes: Tensor

    def __post_init__(self) -> None:
        here = self.probs.gather(-1, self.tokens.unsqueeze(-1))
        assert (here > 0).all(), "what is impossible was drawn"

    def grouped(self) -> Drawn:
        """In classes of tokens, if there are too many tokens to look at each."""
        size = self.probs.shape[-1]
        if size <= CLASSES:
            return self
        # neighbouring numbers together: a random number that is used twice draws neighbours
        classes = torch.arange(size) * CLASSES // size
        return Drawn(classes[self.tokens], self.probs @ F.one_hot(classes, CLASSES).double(), self.passes)

    @property
    def innovations(self) -> Tensor:
        """[B, N, V], all but the last token's, which the others determine."""
        return (F.one_hot(self.tokens, self.probs.shape[-1]) - self.probs)[..., :-1]


def chance(statistic: float, freedom: int) -> float:
    """Probability that a chi-square of so many degrees of freedom is larger."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def weighted(drawn: Drawn, weights: Tensor) -> float:
    """The probability of a sum of innovations at least as far from zero.

    Args:
        weights: [B, N, K] known before the token is drawn.
    """
    rows = weights.abs().sum(-1) > 0
    h, e = weights[rows].double(), drawn.innovations[rows]  # [M, K], [M, V - 1]
    p = drawn.probs[rows][:, :-1]
    found = torch.einsum("mk,mv->kv", h, e).flatten()
    mixed = (h.unsqueeze(2) * p.unsqueeze(1)).flatten(1)  # [M, K * (V - 1)]
    size, values = h.shape[1], p.shape[1]
    covariance = -(mixed.T @ mixed).view(size, values, size, values)
    alike = torch.einsum("mk,ml,mv->kvl", h, h, p)  # the diagonal in v
    covariance += torch.einsum("kvl,vw->kvlw", alike, torch.eye(values, dtype=torch.float64))
    spread, axes = torch.linalg.eigh(covariance.reshape(size * values, -1))
    used = spread > 1e-6 * spread.max()  # what is certain has no spread
    statistic = ((axes.T @ found)[used] ** 2 / spread[used]).sum()
    return chance(float(statistic), int(used.sum()))


def contrast(drawn: Drawn, values: Tensor) -> float:
    """The probability of a total value at least as far from what is expected of it.

    Args:
        values: [B, N, V] of each token that might be drawn, known before it is.
    """
    found = values.gather(-1, drawn.tokens.unsqueeze(-1)).squeeze(-1)
    mean = (drawn.probs * values).sum(-1)
    variance = (drawn.probs * (values - mean.unsqueeze(-1)) ** 2).sum()
    if variance < 1e-9 * found.numel():  # all are worth the same
        return 1.0
    return chance(float((found - mean).sum() ** 2 / variance), 1)


def p_values(
    drawn: Drawn, neighbours: Mapping[str, int], lags: Sequence[int] | None = None
) -> dict[str, float]:
    """Probabilities of statistics as large as those found, by what was looked at.

    Args:
        neighbours: how many positions back each is.
        lags: passes between tokens of a pair; 1 to `LONGEST_LAG` if None.
    """
    likeliness = contrast(drawn, drawn.probs)  # colder or warmer
    drawn = drawn.grouped()
    innovations, passes = drawn.innovations, drawn.passes
    every = F.pad(innovations, (0, 1))
    every[..., -1] = -innovations.sum(-1)
    batch, positions, values = innovations.shape
    scores = {"likeliness": likeliness, "single": weighted(drawn, torch.ones(batch, positions, 1))}
    for name, back in neighbours.items():
        shown = F.one_hot(drawn.tokens, values + 1)[:, :-back]
        scores[name] = weighted(drawn, F.pad(shown, (0, 0, back, 0)))
    for back in range(1, positions):
        scores[f"{back} positions back"] = contrast(drawn, F.pad(every[:, :-back], (0, 0, back, 0)))
    # an image shares nothing with the one before it in the batch
    scores["next image"] = weighted(drawn, F.pad(innovations[:-1], (0, 0, 0, 0, 1, 0)))
    # of a pair of passes, tokens of the same place in them: the i-th that each decided
    earlier = (passes.unsqueeze(2) == passes.unsqueeze(1)).tril(-1).sum(2)  # [B, N]
    most = int(earlier.max()) + 1
    key = passes * most + earlier
    table = torch.zeros(batch, int(key.max()) + 1, values, dtype=torch.float64)
    table.scatter_(1, key.unsqueeze(-1).expand(-1, -1, values), innovations)
    for lag in range(1, LONGEST_LAG + 1) if lags is None else lags:
        before = key - lag * most
        there = table.gather(1, before.clamp(min=0).unsqueeze(-1).expand(-1, -1, values))
        weights = torch.where((before >= 0).unsqueeze(-1), there, 0.0)
        if weights.any():
            scores[f"{lag} passes ago"] = weighted(drawn, weights)
    return scores


def worst(scores: Mapping[str, float]) -> tuple[float, str]:
    """The least probable statistic and its name."""
    name = min(scores, key=lambda key: scores[key])
    return scores[name], name
