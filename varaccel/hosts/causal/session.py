"""One network reading one canvas for one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varaccel.engine.canvas import Canvas
from varaccel.engine.distribution import Categorical
from varaccel.hosts.causal.cache_slots import CacheSlots, Visibility, branch_rows
from varaccel.hosts.causal.guidance import Guidance
from varaccel.hosts.causal.network import CausalNetwork
from varaccel.hosts.causal.sampling import Sampling
from varaccel.hosts.causal.schedule import StepInputs
from varaccel.nn.attention_inputs import AttentionInputs, prefix_mask
from varaccel.nn.condition import Condition
from varaccel.nn.devices import HOST
from varaccel.nn.grid import Grid
from varaccel.nn.kv_cache import KVCache
from varaccel.nn.number_check import NumberCheck


@dataclass(frozen=True)
class DraftInputs:
    """Tokens to be read although not all of them are decided.

    Attributes:
        tokens: [B, F] token ids.
        positions: [B, F] the position that each stands for, -1 for padding.
        draft_slots: [B, F] draft slot of a draft token, -1 for a decided token, which is read in its own slot.
        visible: [B, F, draft slots] bool, the draft tokens that each entry sees.
    """

    tokens: Tensor
    positions: Tensor
    draft_slots: Tensor | None = None
    visible: Tensor | None = None


Transform = Callable[[Tensor, AttentionInputs], Tensor]
"""`CausalNetwork.transform`, or a compiled version of it."""


class CausalSession:
    """A causal token network, its cache and guidance for one call.

    Rows of a guided call are [conditional; unconditional], or those of more branches one after the other; all get
    the same tokens. All but the conditional rows are dropped as soon as guidance ends.

    Args:
        network: the model, in eval mode; it is not changed.
        condition: of the B images.
        grids: that the image tokens stand in, one after the other.
        visibility: "encoded": a query sees the slots before it that hold a token. "causal": it sees all
            slots before it, empty ones with zero key and value, as published ZipAR does.
        draft_slots: number of draft tokens that can be read in one pass, see `CacheSlots`.
        given: canvas whose fixed tokens are the only ones possible at their positions; None if none are given.
        static_shapes: attend over all slots in every pass, so that shapes never change (for compiled
            networks); otherwise over the leading slots in use.
        transform: replaces `network.transform`, for a compiled version of it.

    Raises:
        InputError: a condition of another number of branches than guidance has scales for.
    """

    def __init__(
        self,
        network: CausalNetwork,
        condition: Condition,
        grids: Sequence[Grid],
        *,
        guidance: Guidance | None = None,
        sampling: Sampling | None = None,
        visibility: Visibility = "encoded",
        draft_slots: int = 0,
        given: Canvas | None = None,
        static_shapes: bool = False,
        transform: Transform | None = None,
    ) -> None:
        self.network, self.grids = network, tuple(grids)
        self.guidance = guidance or Guidance()
        self.guidance.check_branches(condition.branches)
        self.sampling = sampling or Sampling()
        self.static_shapes = static_shapes
        self._transform = transform or network.transform
        self.batch = condition.batch
        self._given = given if given is not None and given.fixed is not None else None
        with torch.inference_mode():
            prefix = network.encode_condition(condition, grids, guided=self.guidance.enabled)
        rows, self.prefix = prefix.embeddings.shape[:2]
        positions = sum(grid.num_positions for grid in grids)
        self._inputs: Tensor | None = prefix.embeddings  # until they are read
        self._mask = prefix.mask
        self.cache_slots = CacheSlots(
            network.new_cache(rows, self.prefix + positions + draft_slots + 1),
            prefix=self.prefix,
            positional=_on(prefix.positional, network.device),
            modulation=_on(prefix.modulation, network.device),
            draft_slots=draft_slots,
            mask=prefix.mask,
            branches_differ=self.guidance.enabled and _differ(prefix.mask, self.guidance.branches),
            visibility=visibility,
        )
        self._frontier = 0  # positions before it are all encoded, in every row
        self._prefix_features: Tensor | None = None
        self.reads = 0  # forward passes of the network, prefills included
        self._cost = (rows, self.cache.nbytes)
        self.number_check = NumberCheck.of(network)
        self.number_checks = [self.number_check]  # with those of drafters that read this session's features

    @property
    def cache(self) -> KVCache:
        return self.cache_slots.cache

    @property
    def rows_per_pass(self) -> int:
        """Network rows of a guided pass, as long as no image was dropped."""
        return self._cost[0]

    @property
    def condition_mask(self) -> Tensor | None:
        """[R, prefix], nonzero at condition slots that are used; None if all are."""
        return self._mask

    @property
    def cache_bytes(self) -> int:
        return self._cost[1]

    @property
    def prefix_features(self) -> Tensor:
        """[R, prefix, dim], features of the condition slots; the last predicts position 0."""
        if self._prefix_features is None:
            self._prefix_features = self._prefill()
        return self._prefix_features

    def assume_read(self, positions: int) -> None:
        """Take the condition and so many positions for read, whatever the empty cache says of them.

        Passes then take as long as in the middle of an image, which their results are not: for measurements.
        """
        assert self._inputs is not None, "nothing has been read yet"
        self._prefix_features, self._inputs = torch.zeros_like(self._inputs), None
        self.cache_slots.usable[:, self.cache_slots.base : self.cache_slots.base + positions] = True
        self._frontier = positions

    @torch.inference_mode()
    def predict(self, canvas: Canvas, inputs: StepInputs) -> Categorical:
        """The distribution of `inputs.positions`, [B, P, V], after guidance and filters.

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
        """Read decided tokens and draft tokens of any shape in one pass.

        Args:
            starts: the next positions that are decided, -1 for none; beyond the guidance interval the
                branches after the first are left out. None if they are needed.
            length: positions before it are all that is in use. If None and shapes are not static, the device
                is synchronised with for the last position.

        Returns:
            features [R, F, dim], R = G * B with G branches while guided; those of position p predict position p + 1.
        """
        _ = self.prefix_features  # the condition is encoded before anything else
        rows = self.cache_slots.rows if self._still_guided(starts) else self.batch
        if self.static_shapes:
            length = None
        elif length is None:
            length = int(drafts.positions.max()) + 1
        x = self.network.embed_tokens(drafts.tokens, drafts.positions)
        attention = self.cache_slots.attention_inputs(
            drafts.positions,
            rows=rows,
            draft_slots=drafts.draft_slots,
            visible=drafts.visible,
            length=None if length is None else self.cache_slots.base + length,
        )
        self.reads += 1
        return self._transform(x.repeat(rows // self.batch, 1, 1), attention)

    def put_rows(self, images: Tensor, other: CausalSession) -> None:
        """Images `images` [n] become those of a session of the same call that has read nothing but their condition."""
        mine, theirs = self.prefix_features, other.prefix_features
        rows = branch_rows(images, len(mine), self.batch)
        self._prefix_features = mine.index_copy(0, rows, theirs)
        if self._mask is not None or other._mask is not None:
            masks = (self._used_slots(), other._used_slots())
            self._mask = masks[0].index_copy(0, rows, masks[1])
        self.cache_slots.put_rows(images, other.cache_slots)
        self.reads += other.reads
        for own, new in zip(self.number_checks, other.number_checks, strict=True):
            own.join(new)

    def keep_rows(self, images: Tensor) -> None:
        """Only images `images` [n], which must ascend, stay."""
        features = self.prefix_features
        rows = branch_rows(images, len(features), self.batch)
        self._prefix_features = features[rows]
        self._mask = None if self._mask is None else self._mask[rows]
        self.cache_slots.keep_rows(images, self.batch)
        self.batch = len(images)

    def _used_slots(self) -> Tensor:
        """[R, prefix] bool."""
        if self._mask is not None:
            return self._mask.bool()
        return torch.ones(self.cache_slots.rows, self.prefix, dtype=torch.bool, device=self.cache.device)

    def _still_guided(self, starts: Tensor | None) -> bool:
        if starts is None or self.guidance.interval < 0:
            return self.guidance.enabled
        return self.guidance.active_at(int(starts[starts >= 0].min()))

    def distribution(self, features: Tensor, positions: Tensor) -> Categorical:
        """The distribution of `positions` ([P] or [B, P]) that features [R, P, dim] predict; guided if R > B."""
        logits = self.network.logits(features)
        if features.shape[0] > self.batch:
            logits = self.guidance.combine(*logits.split(self.batch), positions=positions)
        self.number_check.logits(logits, self.reads)
        logits = self._possible(logits, positions)
        return Categorical(self.sampling.filter(logits), greedy=self.sampling.greedy)

    def _possible(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, P, V] with -inf at tokens that cannot stand at `positions`; places outside are not looked at."""
        last = self.cache_slots.spare - self.cache_slots.base - 1
        places = positions.clamp(0, last)
        possible = self.network.possible_tokens(places, self.grids)
        if possible is not None:
            logits = logits.masked_fill(~possible, -torch.inf)
        if self._given is None:
            return logits
        assert self._given.fixed is not None
        index = places.expand(self.batch, -1)
        tokens, fixed = self._given.tokens.gather(1, index), self._given.fixed.gather(1, index)
        others = torch.arange(logits.shape[-1], device=logits.device) != tokens.unsqueeze(-1)
        # 0 and not what the network says: a given token may be one that it finds impossible
        only = torch.zeros_like(logits).masked_fill(others, -torch.inf)
        return torch.where(fixed.unsqueeze(-1), only, logits)

    def _guided(self, inputs: StepInputs) -> bool:
        if inputs.host is None:
            return self.guidance.enabled
        return any(self.guidance.active_at(p) for p in inputs.host.positions)

    @torch.inference_mode()
    def _prefill(self) -> Tensor:
        assert self._inputs is not None
        x, self._inputs = self._inputs, None
        mask = None if self._mask is None else prefix_mask(self._mask, self.prefix)
        self.reads += 1
        return self.network.transform(x, self.cache_slots.prefill_inputs(mask))

    def _features(self, canvas: Canvas, inputs: StepInputs) -> Tensor:
        """Features [R, P, dim] that predict the positions, of the conditional rows or of all."""
        rows = self.cache_slots.rows if self._guided(inputs) else self.batch
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
            if self._mask is not None or cache_slots.draft_slots
            else None
        )
        attention = AttentionInputs(
            *cache_slots.places(inputs.slots + self.prefix, rows),
            mask=mask,
            cache=self.cache,
            slots=slots,
            length=length,
        )
        self.reads += 1
        x = self.network.embed_tokens(canvas.tokens[:, inputs.tokens], inputs.slots.expand(self.batch, -1))
        return self._transform(x.repeat(rows // self.batch, 1, 1), attention)

    def _read_inputs(self, canvas: Canvas, inputs: StepInputs) -> Tensor:
        tokens, slots = inputs.tokens, inputs.slots
        if tokens.dim() == 1:
            tokens, slots = tokens.expand(self.batch, -1), slots.expand(self.batch, -1)
        drafts = DraftInputs(canvas.tokens.gather(1, tokens.clamp(min=0)), slots)
        if inputs.host is None:
            return self.read(drafts)
        # the host knows which positions are decided, so the device need not be asked for them
        starts = torch.tensor(inputs.host.positions, device=HOST) if self.guidance.interval >= 0 else None
        return self.read(drafts, starts, length=inputs.host.last_slot + 1)


def _differ(mask: Tensor | None, branches: int) -> bool:
    """Whether the branches of a mask [G * B, T] differ. Synchronises with the device, once per session."""
    if mask is None:
        return False
    of_each = mask.bool().unflatten(0, (branches, -1))
    return not torch.equal(of_each[1:], of_each[:-1])


def _on(table: Tensor | None, device: torch.device) -> Tensor | None:
    return None if table is None else table.to(device)
