"""Drafting with an EAGLE head, which continues the target's own features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from varaccel.engine.canvas import Canvas
from varaccel.engine.distribution import Categorical
from varaccel.errors import InputError
from varaccel.hosts.causal.cache_slots import CacheSlots, branch_rows, lane_draft_slots, spread
from varaccel.hosts.causal.lanes import Fronts
from varaccel.hosts.causal.session import CausalSession, Transform
from varaccel.nn.attention_inputs import prefix_mask
from varaccel.nn.devices import HOST
from varaccel.nn.number_check import NumberCheck
from varaccel.speculation.network_drafter import draft_positions
from varaccel.speculation.proposers import Branch
from varaccel.speculation.step import StepResult

if TYPE_CHECKING:
    from varaccel.models.eagle import EagleHead


class EagleReader:
    """An EAGLE head at work: reads the target's features of decided tokens, and its own of draft tokens.

    A pair joins the feature that predicted a token with the token, and stands at the token's position. Pairs
    of decided tokens carry the target's features, pairs of draft tokens those that the head predicted. All
    branches of a guided call are drafted, from their own features; distributions come from the guided logits.

    A lane that has just begun from a stand-in has no pair yet; its draft tokens follow the distribution of a
    feature of zeros and are rarely accepted, which costs time only.

    Args:
        head: drafter of the session's network.
        session: of the target.
        canvas: of the call.
        draft_slots: of every lane.
        lanes: lanes that are open at once at most.
        transform: replaces `head.transform`, for a compiled version of it.

    Raises:
        InputError: a call of another prefix or grid than the head has fixed.
    """

    def __init__(
        self,
        head: EagleHead,
        session: CausalSession,
        canvas: Canvas,
        draft_slots: int,
        lanes: int,
        *,
        transform: Transform | None = None,
    ) -> None:
        self.head, self.session, self.canvas, self.draft_slots = head, session, canvas, draft_slots
        if head.config.prefix_length not in (None, session.prefix):
            raise InputError(
                f"the drafter was made for {head.config.prefix_length} condition slots, but the call has "
                f"{session.prefix}."
            )
        pairs, positions, spare = session.prefix - 1, canvas.num_positions, lanes * draft_slots
        # pair t has a feature if slot t holds something
        mask = session.condition_mask
        self._mask = None if mask is None or not head.masks_padding else mask[:, :-1]
        self.cache_slots = CacheSlots(
            head.new_cache(session.rows_per_pass, pairs + positions + spare + 1),
            prefix=pairs,
            positional=head.rotary_table(pairs + positions).unsqueeze(0),
            draft_slots=spare,
            mask=self._mask,
            branches_differ=self._mask is not None and session.cache_slots.branches_differ,
        )
        self._transform = transform or head.transform
        self.passes = 0
        self.number_check = NumberCheck.of(head)
        self._fronts: Fronts | None = None
        # pairs that the head has not read yet: tokens and positions [B, P], features [R, P, dim]
        self._pairs: tuple[Tensor, Tensor, Tensor] | None = None
        self._root = torch.empty(0, device=HOST)  # [R, A, dim] feature predicted after each root
        self._predicted = torch.empty(0, device=HOST)  # [R, A, S, dim] features predicted after draft tokens

    def begin(self, roots: Tensor, fronts: Fronts) -> Categorical:
        self._fronts = fronts
        tokens, positions, features = self._unread()
        predicted = self._read(tokens, positions, features)  # [R, P, dim]
        here = (positions.unsqueeze(1) == (fronts.start - 1).unsqueeze(-1)) & fronts.open.unsqueeze(-1)
        found, column = here.to(torch.uint8).max(dim=-1)  # [B, A]
        repeats = predicted.shape[0] // roots.shape[0]
        index = column.repeat(repeats, 1).unsqueeze(-1).expand(-1, -1, predicted.shape[-1])
        self._root = predicted.gather(1, index) * found.repeat(repeats, 1).unsqueeze(-1)
        self._predicted = predicted.new_zeros(*self._root.shape[:2], self.draft_slots, predicted.shape[-1])
        return self._distribution(self._root, fronts.start.clamp(min=0))

    def extend(self, branch: Branch) -> Categorical:
        assert self._fronts is not None
        batch, lanes, count = branch.tokens.shape
        rows, _, _, dim = self._predicted.shape
        known = torch.cat([self._root.unsqueeze(2), self._predicted], dim=2)  # [R, A, 1 + S, dim]
        parents = (branch.parents + 1).repeat(rows // batch, 1, 1).unsqueeze(-1)
        before = known.gather(2, parents.expand(-1, -1, -1, dim)).flatten(1, 2)
        positions = draft_positions(self._fronts, branch)
        entries = branch.first + torch.arange(count, device=positions.device)
        features = self._read(
            branch.tokens.flatten(1),
            positions.flatten(1),
            before,
            lane_draft_slots(lanes, self.draft_slots, entries).flatten().expand(batch, -1),
            spread(branch.visible, self.draft_slots, self.cache_slots.draft_slots),
        )
        self._predicted[:, :, branch.first : branch.first + count] = features.unflatten(1, (lanes, count))
        return self._distribution(features, (positions + 1).flatten(1))

    def observe(self, outcome: StepResult) -> None:
        """Every decided token makes a pair with the target feature that predicted it."""
        features = outcome.features  # [R, A, T, dim]
        rows, lanes, _, dim = features.shape
        batch = self.canvas.batch
        path = outcome.path.clamp(min=0).view(batch, lanes, -1).repeat(rows // batch, 1, 1)
        taken = features.gather(2, path.unsqueeze(-1).expand(-1, -1, -1, dim))  # [R, A, D + 1, dim]
        self._pairs = (
            outcome.tokens.view(batch, -1),
            outcome.positions.view(batch, -1),
            taken.flatten(1, 2),
        )

    def put_rows(self, rows: Tensor, other: EagleReader) -> None:
        mine, theirs = self._unread(), other._unread()
        wide = max(mine[0].shape[1], theirs[0].shape[1])
        tokens, positions, features = _filled_up(mine, wide)
        new_tokens, new_positions, new_features = _filled_up(theirs, wide)
        branches = len(new_features) // len(new_tokens)
        if len(features) < branches * len(tokens):
            # Beyond the guidance interval the other branches are not read. These images never need them again.
            features = features.repeat(branches, 1, 1)
        target = branch_rows(rows, len(features), len(tokens))
        self._pairs = (
            tokens.index_copy(0, rows, new_tokens),
            positions.index_copy(0, rows, new_positions),
            features.index_copy(0, target, new_features),
        )
        self.cache_slots.put_rows(rows, other.cache_slots)
        self.passes += other.passes

    def keep_rows(self, rows: Tensor) -> None:
        tokens, positions, features = self._unread()
        of_branches = branch_rows(rows, len(features), len(tokens))
        self._pairs = (tokens[rows], positions[rows], features[of_branches])
        self.cache_slots.keep_rows(rows, len(tokens))

    def _unread(self) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs that the head has not read yet."""
        if self._pairs is None:
            self._read_prefix()
        assert self._pairs is not None
        return self._pairs

    def _read_prefix(self) -> None:
        features, pairs = self.session.prefix_features, self.cache_slots.prefix
        if pairs:
            tokens = torch.zeros(features.shape[0], pairs, dtype=torch.int64, device=features.device)
            mask = None if self._mask is None else prefix_mask(self._mask, pairs)
            self.head.transform(
                self.head.fuse(tokens, features[:, :-1].to(self.head.dtype)),
                self.cache_slots.prefill_inputs(mask),
            )
        first = torch.zeros(self.canvas.batch, 1, dtype=torch.int64, device=features.device)
        self._pairs = (self.canvas.tokens[:, :1], first, features[:, -1:])

    def _read(
        self,
        tokens: Tensor,
        positions: Tensor,
        features: Tensor,
        draft_slots: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        rows = features.shape[0]
        length = None if self.session.static_shapes else self.cache_slots.base + int(positions.max()) + 1
        attention = self.cache_slots.attention_inputs(
            positions, rows=rows, draft_slots=draft_slots, visible=visible, length=length
        )
        self.passes += 1
        joined = self.head.fuse(tokens.repeat(rows // tokens.shape[0], 1), features.to(self.head.dtype))
        predicted = self._transform(joined, attention)
        self.number_check.values(predicted, self.passes)
        return predicted.to(features.dtype)  # the target's own head reads them

    def _distribution(self, features: Tensor, positions: Tensor) -> Categorical:
        assert self._fronts is not None
        return self.session.distribution(features, positions).by_lane(self._fronts.start.shape[1])


def _filled_up(pairs: tuple[Tensor, Tensor, Tensor], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs with as many columns as `width`; those that are added stand nowhere."""
    tokens, positions, features = pairs
    missing = width - tokens.shape[1]
    return (
        F.pad(tokens, (0, missing)),
        F.pad(positions, (0, missing), value=-1),
        F.pad(features, (0, 0, 0, missing)),
    )
