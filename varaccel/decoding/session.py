"""One network reading one canvas for one call."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from varaccel.decoding.cache import KVCache
from varaccel.decoding.canvas import Canvas
from varaccel.decoding.guidance import Guidance
from varaccel.decoding.law import Categorical, Law
from varaccel.decoding.order import Feed
from varaccel.decoding.reading import Reading, prefix_mask
from varaccel.decoding.sampling import Sampling

Visibility = Literal["encoded", "causal"]


class Session(Protocol):
    """Owns what one network knows of one canvas, and answers for positions of it."""

    def predict(self, canvas: Canvas, feed: Feed) -> Law: ...


class CausalNetwork(Protocol):
    """What a prefix-conditioned causal token network offers (LlamaGen and its kin)."""

    prefix_length: int
    num_tokens: int
    device: torch.device

    def embed_condition(self, condition: Tensor) -> Tensor: ...
    def embed_tokens(self, tokens: Tensor) -> Tensor: ...
    def unconditional(self, condition: Tensor) -> Tensor: ...
    def transform(self, x: Tensor, reading: Reading) -> Tensor: ...
    def logits(self, features: Tensor) -> Tensor: ...
    def rotary_table(self, device: torch.device | None = None) -> Tensor: ...
    def new_cache(self, batch: int, spare: int = 0) -> KVCache: ...


class CausalSession:
    """A causal token network, its cache and guidance for one call.

    Rows of a guided call are [conditional; unconditional]; both get the same tokens. The unconditional rows
    are dropped as soon as guidance ends.

    Args:
        network: the model, in eval mode; it is not changed.
        condition: class labels [B], or left-padded text features [B, T, C].
        condition_mask: [B, T], 1 where a caption slot is used. As published, the unconditional branch uses
            the same mask, so it depends on the length of the caption.
        visibility: "encoded": a query sees the slots before it that hold a token. "causal": it sees all
            slots before it, empty ones with zero key and value, as published ZipAR does.
        static_shapes: attend over all slots in every pass, so that shapes never change (for compiled
            networks); otherwise over the leading slots in use.
        transform: replaces `network.transform`, for a compiled version of it.
    """

    def __init__(
        self,
        network: CausalNetwork,
        condition: Tensor,
        condition_mask: Tensor | None = None,
        *,
        guidance: Guidance | None = None,
        sampling: Sampling | None = None,
        visibility: Visibility = "encoded",
        static_shapes: bool = False,
        transform: Any = None,
    ) -> None:
        self.network = network
        self.guidance = guidance or Guidance()
        self.sampling = sampling or Sampling()
        self.visibility = visibility
        self.static_shapes = static_shapes
        self._transform = transform or network.transform
        self.batch = condition.shape[0]
        self.prefix = network.prefix_length
        if self.guidance.enabled:
            condition = torch.cat([condition, network.unconditional(condition)])
            condition_mask = None if condition_mask is None else condition_mask.repeat(2, 1)
        self._condition = condition
        self._condition_mask = condition_mask
        # One spare slot takes what padded entries of ragged feeds write; nothing ever looks at it.
        self.cache = network.new_cache(condition.shape[0], spare=1)
        self._slots = self.prefix + network.num_tokens
        self._rotary = network.rotary_table(network.device)
        self._rotary = torch.cat([self._rotary, torch.zeros_like(self._rotary[:1])])
        self._usable = torch.zeros(
            condition.shape[0], self._slots + 1, dtype=torch.bool, device=network.device
        )
        self._usable[:, : self.prefix] = True if condition_mask is None else condition_mask.bool()
        self._padded = condition_mask is not None
        self._frontier = 0  # slots before it are all encoded, in every row
        self._first: Tensor | None = None  # features that predict position 0

    @property
    def rows_per_pass(self) -> int:
        """Network rows of a guided pass."""
        return self._usable.shape[0]

    @torch.inference_mode()
    def predict(self, canvas: Canvas, feed: Feed) -> Categorical:
        """The law of `feed.positions`, [B, P, V], after guidance and filters.

        Encodes the condition and the tokens named by `feed`. Slots before the first of them must have been
        fed in earlier passes; otherwise they are empty and treated as `visibility` says.
        """
        if self._first is None:
            self._first = self._prefill()
        features = self._features(canvas, feed)
        logits = self.network.logits(features)
        if features.shape[0] > self.batch:
            conditional, unconditional = logits.split(self.batch)
            logits = self._guide(conditional, unconditional, feed)
        return Categorical(self.sampling.filter(logits), greedy=self.sampling.greedy)

    def _guide(self, conditional: Tensor, unconditional: Tensor, feed: Feed) -> Tensor:
        guided = self.guidance.combine(conditional, unconditional)
        if self.guidance.interval < 0:
            return guided
        active = feed.positions <= self.guidance.last_position  # [P] or [B, P]
        return torch.where(active.unsqueeze(-1), guided, conditional)

    def _guided(self, feed: Feed) -> bool:
        if feed.host is None:
            return self.guidance.enabled
        return any(self.guidance.active_at(p) for p in feed.host.positions)

    def _prefill(self) -> Tensor:
        x = self.network.embed_condition(self._condition)
        mask = None if self._condition_mask is None else prefix_mask(self._condition_mask, self.prefix)
        slots = torch.arange(self.prefix, device=x.device)
        reading = Reading(
            self._rotary[: self.prefix],
            mask=mask,
            causal=mask is None,
            cache=self.cache,
            slots=slots,
            length=self.prefix,
        )
        self._frontier = self.prefix
        return self.network.transform(x, reading)[:, -1:]

    def _features(self, canvas: Canvas, feed: Feed) -> Tensor:
        """Features [R, P, dim] that predict the positions, R = B or 2 B rows."""
        assert self._first is not None
        rows = self.rows_per_pass if self._guided(feed) else self.batch
        if feed.host is not None and feed.host.positions == (0,):
            return self._first[:rows]
        x, slots = self._inputs(canvas, feed)
        if rows > self.batch:
            x = x.repeat(2, 1, 1)
            slots = slots.repeat(2, 1) if slots.dim() == 2 else slots
        features = self._transform(x, self._reading(slots, feed, rows))
        features = features[:, -feed.positions.shape[-1] :]
        if feed.host is None:  # rows that stand at position 0 are predicted from the condition
            at_start = (feed.positions == 0).repeat(rows // self.batch, 1).unsqueeze(-1)
            features = torch.where(at_start, self._first[:rows], features)
        return features

    def _inputs(self, canvas: Canvas, feed: Feed) -> tuple[Tensor, Tensor]:
        if feed.tokens.dim() == 1:
            return self.network.embed_tokens(canvas.tokens[:, feed.tokens]), feed.slots + self.prefix
        tokens = canvas.tokens.gather(1, feed.tokens.clamp(min=0))
        slots = torch.where(feed.slots >= 0, feed.slots + self.prefix, self._slots)
        return self.network.embed_tokens(tokens), slots

    def _reading(self, slots: Tensor, feed: Feed, rows: int) -> Reading:
        rotary = self._rotary[slots]
        if feed.host is not None:
            last = self.prefix + max((*feed.host.refresh, *(p - 1 for p in feed.host.positions)))
            length = None if self.static_shapes else last + 1
            if slots.shape[0] == 1 and last == self._frontier:
                # Raster decoding: everything before the query is encoded.
                self._frontier += 1
                if not self.static_shapes:
                    self._usable[:, last] = True
                    mask = self._usable[:rows, None, None, :length] if self._padded else None
                    return Reading(rotary, mask=mask, cache=self.cache, slots=slots, length=length)
        else:
            length = None
        return Reading(
            rotary, mask=self._mask(slots, rows, length), cache=self.cache, slots=slots, length=length
        )

    def _mask(self, slots: Tensor, rows: int, length: int | None) -> Tensor:
        """[R, 1, F, K] bool for queries at `slots`, which are encoded in this pass."""
        per_row = slots.expand(rows, -1) if slots.dim() == 1 else slots
        # both branches have the same slots, so the dropped branch stays consistent if rows are repeated
        repeats = self.rows_per_pass // rows
        self._usable.scatter_(1, per_row.repeat(repeats, 1), True)
        self._usable[:, -1] = False
        usable = self._usable[:rows, :length]
        if self.visibility == "causal":
            usable = usable.clone()
            usable[:, self.prefix : self._slots] = True
        index = torch.arange(usable.shape[1], device=slots.device)
        mask = usable[:, None] & (index <= per_row.unsqueeze(-1))
        # A padded entry would see nothing, and softmax over nothing is not a number.
        return (mask | (index == per_row.unsqueeze(-1))).unsqueeze(1)
