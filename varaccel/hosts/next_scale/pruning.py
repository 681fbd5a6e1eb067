"""Sub-layers that run on some tokens of a scale only (FastVAR, arXiv 2503.23367)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from varaccel.hosts.next_scale.importance import ReceivedAttention, highest, squared_distances
from varaccel.hosts.next_scale.plan import Pruning
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.gather import rows_of
from varaccel.nn.residual import Part, Residual, Update, add
from varaccel.nn.scale_schedule import ScaleSchedule

Grid = tuple[int, int]


class TokenPruning:
    """The rules of the scales of a call: what is stored at one of them, and what is left out at later ones.

    At a pruned scale each sub-layer chooses the tokens that it runs on, per row, from the stream as it is then. The
    others get what the same sub-layer added at the cached scale, averaged over their cells. Only keys of tokens that
    run enter the cache of that block.

    Args:
        plan: what is left out.
        schedule: the scales of the images.
        depth: blocks of the network.
    """

    def __init__(self, plan: Pruning, schedule: ScaleSchedule, depth: int) -> None:
        self.plan, self.schedule = plan, schedule
        self._layers = range(*slice(*plan.blocks).indices(depth))
        self._stored: dict[tuple[int, Part], Tensor] = {}
        self._received = ReceivedAttention()

    def observer(self, scale: int) -> ReceivedAttention | None:
        """What must see queries and keys of a scale."""
        asked = self.plan.criterion == "attention" and scale == self.plan.cached_scale
        return self._received if asked else None

    def rule(self, scale: int) -> Residual:
        """What becomes of sub-layers in a pass over one scale."""
        if scale == self.plan.cached_scale:
            return self._store
        share = self.plan.keep.get(scale)
        return add if share is None else self._pruned(scale, share)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Only rows `rows` stay, in this order."""
        index = list(rows)
        self._stored = {key: updated[index] for key, updated in self._stored.items()}
        self._received.scores = {layer: scores[index] for layer, scores in self._received.scores.items()}

    def _runs_all(self, layer: int, part: Part) -> bool:
        return layer not in self._layers or part not in self.plan.parts

    def _store(self, x: Tensor, update: Update, attention: AttentionInputs, layer: int, part: Part) -> Tensor:
        updated = update(x, attention)
        if not self._runs_all(layer, part):
            self._stored[layer, part] = updated
        return x + updated

    def _pruned(self, scale: int, share: float) -> Residual:
        grid, cached = self.schedule.grids[scale], self.schedule.grids[self.plan.cached_scale]
        count = kept_count(share, grid[0] * grid[1])

        def rule(x: Tensor, update: Update, attention: AttentionInputs, layer: int, part: Part) -> Tensor:
            if self._runs_all(layer, part):
                return add(x, update, attention, layer, part)
            if self.plan.criterion == "distance":
                scores = squared_distances(x)
            else:
                scores = resized(self._received.scores[layer].unsqueeze(-1), cached, grid).squeeze(-1)
            kept = highest(scores, count)
            computed = update(rows_of(x, kept), of_tokens(attention, kept))
            return x + restored(self._stored[layer, part], cached, grid, computed, kept)

        return rule


def kept_count(share: float, tokens: int) -> int:
    """How many of so many tokens run: L - int((1 - share) L), as published."""
    return tokens - int(round(1 - share, 9) * tokens)  # 1 - 0.9 is a little less than 0.1


def of_tokens(attention: AttentionInputs, kept: Tensor) -> AttentionInputs:
    """What a pass over all tokens reads, for tokens `kept` [R, K] of each row."""
    positional = attention.positional
    if positional is None:
        return attention
    shared = positional.dim() == 3  # [P, c / 2, 2]
    return replace(attention, positional=positional[kept] if shared else rows_of(positional, kept))


def resized(x: Tensor, source: Grid, target: Grid) -> Tensor:
    """[R, h_c w_c, C] of one grid -> [R, h w, C] of another, every cell the mean of those that it covers."""
    if source == target:
        return x
    return F.adaptive_avg_pool2d(x.mT.unflatten(2, source), target).flatten(2).mT


def restored(cached: Tensor, source: Grid, target: Grid, computed: Tensor, kept: Tensor) -> Tensor:
    """Updates of all tokens of a grid: of tokens `kept` [R, K] what was computed [R, K, C], of others what is cached.

    Args:
        cached: [R, h_c w_c, C], updates of the cached scale of grid `source`.

    Returns:
        [R, h w, C].
    """
    index = kept.unsqueeze(-1).expand_as(computed)
    return resized(cached, source, target).to(computed.dtype).scatter(1, index, computed)
