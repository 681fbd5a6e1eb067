"""What the passes of a session leave out, with the scales of a model told by their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from varaccel.hosts.next_scale.importance import Criterion
from varaccel.hosts.next_scale.skipping import SkipRule
from varaccel.nn.residual import Part


@dataclass(frozen=True)
class Pruning:
    """Scales of which some tokens run only.

    Attributes:
        keep: share of tokens that run, of every pruned scale.
        cached_scale: a scale before them, whose updates the other tokens get.
        blocks: first block and the end, as in a slice.
        parts: the sub-layers.
        criterion: what tokens are chosen by.
    """

    keep: Mapping[int, float]
    cached_scale: int
    blocks: tuple[int | None, int | None] = (None, None)
    parts: tuple[Part, ...] = ("attention", "cross", "ffn")
    criterion: Criterion = "distance"


@dataclass(frozen=True)
class SessionPlan:
    """What the passes of one network cost; by default each reads and keeps everything.

    Attributes:
        guided: leading scales for which unconditional rows run; all of them if None.
        together: how many of the last scales are decided in one pass.
        pruning: scales of which some tokens run only.
        cache: of scales, the share of keys that stay in each layer's cache: one number, or one per layer.
        criterion: what keys are chosen by.
        skip: what images are finished, or no longer guided, before the others.
    """

    guided: int | None = None
    together: int = 1
    pruning: Pruning | None = None
    cache: Mapping[int, float | tuple[float, ...]] = field(default_factory=dict)
    criterion: Criterion = "distance"
    skip: SkipRule | None = None

    @property
    def uneven(self) -> bool:
        """Whether layers come to hold different numbers of tokens."""
        return self.pruning is not None or bool(self.cache)

    @property
    def drops_rows(self) -> bool:
        """Whether some rows end before the others."""
        return self.guided is not None or self.skip is not None

    def counts(self, scale: int, tokens: int, layers: int) -> tuple[int, ...] | None:
        """Keys of a scale that stay in each layer, at least one; None if all do."""
        share = self.cache.get(scale)
        if share is None:
            return None
        shares = share if isinstance(share, tuple) else (share,) * layers
        return tuple(max(1, round(each * tokens)) for each in shares)
