"""One network reading one canvas for one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from varaccel.engine.canvas import Canvas
from varaccel.engine.distribution import Categorical
from varaccel.hosts.causal.cache_slots import CacheSlots, Visibility
from varaccel.hosts.causal.guidance import Guidance
from varaccel.hosts.causal.sampling import Sampling
from varaccel.hosts.causal.schedule import StepInputs
from varaccel.nn.attention_inputs import AttentionInputs, prefix_mask
from varaccel.nn.kv_cache import KVCache


class CausalNetwork(Protocol):
    """What a prefix-conditioned causal token network offers (LlamaGen and its kin)."""

    prefix_length: int
    num_tokens: int
    device: torch.device

    def embed_condition(self, condition: Tensor) -> Tensor: ...
    def embed_tokens(self, tokens: Tensor) -> Tensor: ...
    def unconditional(self, condition: Tensor) -> Tensor: ...
    def transform(self, x: Tensor, attention: AttentionInputs) -> Tensor: ...
    def logits(self, features: Tensor) -> Tensor: ...
    def rotary_table(self, device: torch.device | None = None) -> Tensor: ...
    def new_cache(self, batch: int, spare: int = 0) -> KVCache: ...


@dataclass(frozen=True)
class DraftInputs:
    """Tokens to be read although not all of them are decided.

    Attributes:
        tokens: [B, F] codes.
        positions: [B, F] the position that each stands for, -1 for padding.
        draft_slots: [B, F] scratch slot of a guess, -1 for a decided token, which is read in its own slot.
        visible: [B, F, scratch] bool, the guesses that each entry sees.
    """

    tokens: Tensor
    positions: Tensor
    draft_slots: Tensor | None = None
    visible: Tensor | None = None


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
        draft_slots: number of guesses that can be read in one pass, see `CacheSlots`.
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
        draft_slots: int = 0,
        static_shapes: bool = False,
        transform: Any = None,
    ) -> None:
        self.network = network
        self.guidance = guidance or Guidance()
        self.sampling = sampling or Sampling()
        self.static_shapes = static_shapes
        self._transform = transform or network.transform
        self.batch = condition.shape[0]
        self.prefix = network.prefix_length
        if self.guidance.enabled:
            condition = torch.cat([condition, network.unconditional(condition)])
            condition_mask = None if condition_mask is None else condition_mask.repeat(2, 1)
        self._condition = condition
        self._condition_mask = condition_mask
        self.cache_slots = CacheSlots(
            network.new_cache(condition.shape[0], spare=draft_slots + 1),
            network.rotary_table(network.device),
            prefix=self.prefix,
            draft_slots=draft_slots,
            condition_mask=condition_mask,
            visibility=visibility,
        )
        self._padded = condition_mask is not None
        self._frontier = 0  # positions before it are all encoded, in every row
        self._prefix_features: Tensor | None = None
        self.reads = 0  # forward passes of the network, the prefill included

    @property
    def cache(self) -> KVCache:
        return self.cache_slots.cache

    @property
    def rows_per_pass(self) -> int:
        """Network rows of a guided pass."""
        return self.cache_slots.rows

    @property
    def prefix_features(self) -> Tensor:
        """[R, prefix, dim], features of the condition slots; the last predicts position 0."""
        if self._prefix_features is None:
            self._prefix_features = self._prefill()
        return self._prefix_features

    @torch.inference_mode()
    def predict(self, canvas: Canvas, inputs: StepInputs) -> Categorical:
        """The distribution of `feed.positions`, [B, P, V], after guidance and filters.

        Encodes the condition and the tokens named by `inputs`. Slots before the first of them must have been
        fed in earlier passes; otherwise they are empty and treated as `visibility` says.
        """
        return self.distribution(self._features(canvas, inputs), inputs.positions)

    @torch.inference_mode()
    def first_distribution(self) -> Categorical:
        """The distribution of position 0, [B, 1, V], from the condition alone."""
        positions = torch.zeros(1, dtype=torch.int64, device=self.network.device)
        return self.distribution(self.prefix_features[:, -1:], positions)

    @torch.inference_mode()
    def read(self, drafts: DraftInputs, starts: Tensor | None = None, *, length: int | None = None) -> Tensor:
        """Read decided tokens and guesses of any shape in one pass.

        Args:
            starts: the next positions that are decided, -1 for none; beyond the guidance interval the
                unconditional branch is left out. None if it is needed.
            length: positions before it are all that is in use. If None and shapes are not static, the device
                is asked for the last position.

        Returns:
            features [R, F, dim], R = 2 B while guided; those of position p predict position p + 1.
        """
        _ = self.prefix_features  # the condition is encoded before anything else
        rows = self.rows_per_pass if self._still_guided(starts) else self.batch
        if self.static_shapes:
            length = None
        elif length is None:
            length = int(drafts.positions.max()) + 1
        x = self.network.embed_tokens(drafts.tokens)
        attention = self.cache_slots.attention_inputs(
            drafts.positions,
            rows=rows,
            draft_slots=drafts.draft_slots,
            visible=drafts.visible,
            length=None if length is None else self.cache_slots.base + length,
        )
        self.reads += 1
        return self._transform(x.repeat(rows // self.batch, 1, 1), attention)

    def _still_guided(self, starts: Tensor | None) -> bool:
        if starts is None or self.guidance.interval < 0:
            return self.guidance.enabled
        return self.guidance.active_at(int(starts[starts >= 0].min()))

    def distribution(self, features: Tensor, positions: Tensor) -> Categorical:
        """The distribution of `positions` ([P] or [B, P]) that features [R, P, dim] predict; guided if R = 2 B."""
        logits = self.network.logits(features)
        if features.shape[0] > self.batch:
            conditional, unconditional = logits.split(self.batch)
            logits = self._guide(conditional, unconditional, positions)
        return Categorical(self.sampling.filter(logits), greedy=self.sampling.greedy)

    def _guide(self, conditional: Tensor, unconditional: Tensor, positions: Tensor) -> Tensor:
        guided = self.guidance.combine(conditional, unconditional)
        if self.guidance.interval < 0:
            return guided
        active = positions <= self.guidance.last_position  # [P] or [B, P]
        return torch.where(active.unsqueeze(-1), guided, conditional)

    def _guided(self, inputs: StepInputs) -> bool:
        if inputs.host is None:
            return self.guidance.enabled
        return any(self.guidance.active_at(p) for p in inputs.host.positions)

    @torch.inference_mode()
    def _prefill(self) -> Tensor:
        x = self.network.embed_condition(self._condition)
        mask = None if self._condition_mask is None else prefix_mask(self._condition_mask, self.prefix)
        slots = torch.arange(self.prefix, device=x.device)
        attention = AttentionInputs(
            self.cache_slots.rotary[: self.prefix],
            mask=mask,
            causal=mask is None,
            cache=self.cache,
            slots=slots,
            length=self.prefix,
        )
        self.reads += 1
        return self.network.transform(x, attention)

    def _features(self, canvas: Canvas, inputs: StepInputs) -> Tensor:
        """Features [R, P, dim] that predict the positions, R = B or 2 B rows."""
        rows = self.rows_per_pass if self._guided(inputs) else self.batch
        first = self.prefix_features[:rows, -1:]
        if inputs.host is not None and inputs.host.positions == (0,):
            return first
        if inputs.host is not None and self._is_next(inputs):
            features = self._read_next(canvas, inputs, rows)
        else:
            features = self._read_inputs(canvas, inputs)
        features = features[:, -inputs.positions.shape[-1] :]
        if inputs.host is None:  # rows that stand at position 0 are predicted from the condition
            at_start = (inputs.positions == 0).repeat(rows // self.batch, 1).unsqueeze(-1)
            features = torch.where(at_start, first, features)
        return features

    def _is_next(self, inputs: StepInputs) -> bool:
        """Whether one token is read and all tokens before it are encoded: raster decoding."""
        assert inputs.host is not None
        if inputs.host.refresh or inputs.host.positions != (self._frontier + 1,):
            return False
        self._frontier += 1
        return not self.static_shapes

    def _read_next(self, canvas: Canvas, inputs: StepInputs, rows: int) -> Tensor:
        """A raster step needs no mask of its own: everything encoded so far is visible."""
        cache_slots, last = self.cache_slots, self._frontier - 1
        slots = inputs.slots + cache_slots.base
        cache_slots.usable[:, cache_slots.base + last] = True
        length = cache_slots.base + last + 1
        mask = (
            cache_slots.usable[:rows, None, None, :length]
            if self._padded or cache_slots.draft_slots
            else None
        )
        attention = AttentionInputs(
            cache_slots.rotary[inputs.slots + self.prefix],
            mask=mask,
            cache=self.cache,
            slots=slots,
            length=length,
        )
        self.reads += 1
        x = self.network.embed_tokens(canvas.tokens[:, inputs.tokens])
        return self._transform(x.repeat(rows // self.batch, 1, 1), attention)

    def _read_inputs(self, canvas: Canvas, inputs: StepInputs) -> Tensor:
        tokens, slots = inputs.tokens, inputs.slots
        if tokens.dim() == 1:
            tokens, slots = tokens.expand(self.batch, -1), slots.expand(self.batch, -1)
        drafts = DraftInputs(canvas.tokens.gather(1, tokens.clamp(min=0)), slots)
        if inputs.host is None:
            return self.read(drafts)
        # the host knows which positions are decided, so the device need not be asked for them
        starts = torch.tensor(inputs.host.positions) if self.guidance.interval >= 0 else None
        return self.read(drafts, starts, length=inputs.host.last_slot + 1)
