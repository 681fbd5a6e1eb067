"""What one network has read during one call: its cache, which slots count, and who may look at them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.kv_cache import KVCache

Visibility = Literal["encoded", "causal"]


class CacheSlots:
    """A cache with one slot per condition entry and per position, and scratch slots for guesses.

    Slots are laid out as [prefix | scratch | positions | spare]. Guesses of several branches can stand for
    the same position, so they are read in scratch slots; those that are kept are moved to the slot of their
    position. The spare slot takes what padded entries write, and nothing looks at it.

    Args:
        cache: an empty cache with `prefix + scratch + positions + 1` slots.
        rotary: [prefix + positions, D / 2, 2], the rotary rows of condition and positions.
        prefix: number of condition slots.
        draft_slots: number of scratch slots.
        condition_mask: [R, prefix], nonzero where a condition slot is used; None if all are.
        visibility: see `CausalSession`.
    """

    def __init__(
        self,
        cache: KVCache,
        rotary: Tensor,
        *,
        prefix: int,
        draft_slots: int = 0,
        condition_mask: Tensor | None = None,
        visibility: Visibility = "encoded",
    ) -> None:
        self.cache = cache
        self.prefix, self.draft_slots = prefix, draft_slots
        self.base = prefix + draft_slots  # slot of position 0
        self.visibility = visibility
        self.rotary = torch.cat([rotary, torch.zeros_like(rotary[:1])])
        rows, slots = cache.keys.shape[1], cache.keys.shape[3]
        self.spare = slots - 1
        self.usable = torch.zeros(rows, slots, dtype=torch.bool, device=rotary.device)
        self.usable[:, :prefix] = True if condition_mask is None else condition_mask.bool()
        self._slots = torch.arange(slots, device=rotary.device)

    @property
    def rows(self) -> int:
        return self.usable.shape[0]

    def attention_inputs(
        self,
        positions: Tensor,
        *,
        rows: int,
        draft_slots: Tensor | None = None,
        visible: Tensor | None = None,
        length: int | None = None,
    ) -> AttentionInputs:
        """The reading of entries that stand at `positions`, and a record that they are encoded.

        An entry in the slot of its position sees the encoded slots up to its own. A guess in a scratch slot
        sees the encoded slots before its position, and those guesses that `visible` names.

        Args:
            positions: [B, F], -1 for padding. B divides `rows`: both branches of a guided call read alike.
            rows: rows of the pass, at most those of the memory.
            draft_slots: [B, F] scratch slot of each entry, -1 for the slot of its position; None for all -1.
            visible: [B, F, scratch] bool, which scratch slots each entry sees.
            length: number of leading slots to attend over, None for all.
        """
        batch = positions.shape[0]
        used = positions >= 0
        own = torch.where(used, positions + self.base, self.spare)  # [B, F]
        permanent = own
        slots = own
        if draft_slots is not None:
            draft_token = (draft_slots >= 0) & used
            slots = torch.where(draft_token, draft_slots + self.prefix, own)
            permanent = torch.where(draft_token, self.spare, own)
            own = torch.where(draft_token, own - 1, own)  # a guess does not see what stands for it so far
        self.usable.scatter_(1, permanent.repeat(self.rows // batch, 1), True)
        self.usable[:, self.spare] = False
        usable = self.usable[:batch, :length]
        if self.visibility == "causal":
            usable = usable.clone()
            usable[:, self.base : self.spare] = True
        keys = self._slots[: usable.shape[1]]
        mask = usable.unsqueeze(1) & (keys <= own.unsqueeze(-1))  # [B, F, K]
        if draft_slots is not None:
            if visible is not None:
                mask[:, :, self.prefix : self.base] = visible & used.unsqueeze(-1)
            mask |= keys == slots.unsqueeze(-1)
        # a padded entry would see nothing, and softmax over nothing is not a number
        mask |= (keys == 0) & ~used.unsqueeze(-1)
        # the rotary row of padding is never used; the last row is zero
        rotary = self.rotary[torch.where(used, positions + self.prefix, self.rotary.shape[0] - 1)]
        repeats = rows // batch
        if repeats > 1:
            mask, rotary, slots = (
                mask.repeat(repeats, 1, 1),
                rotary.repeat(repeats, 1, 1, 1),
                slots.repeat(repeats, 1),
            )
        return AttentionInputs(rotary, mask=mask.unsqueeze(1), cache=self.cache, slots=slots, length=length)

    def keep(self, draft_slots: Tensor, positions: Tensor) -> None:
        """Move guesses from scratch slots to the slots of their positions.

        Args:
            draft_slots: [B, M] scratch slots.
            positions: [B, M], -1 for entries that are not kept.
        """
        kept = positions >= 0
        repeats = self.rows // positions.shape[0]
        source = torch.where(kept, draft_slots + self.prefix, self.spare).repeat(repeats, 1)
        target = torch.where(kept, positions + self.base, self.spare).repeat(repeats, 1)
        self.cache.move(source, target)
        self.usable.scatter_(1, target, True)
        self.usable[:, self.spare] = False


def lane_draft_slots(lanes: int, per_lane: int, entries: Tensor) -> Tensor:
    """Scratch slots [A, n] of `entries` [n] of every lane; each lane has `per_lane` of them in a row."""
    return torch.arange(lanes, device=entries.device).unsqueeze(1) * per_lane + entries


def spread(visible: Tensor, per_lane: int, total: int) -> Tensor:
    """What guesses see of the entries of their own lane, [B, A, n, S], over the `total` scratch slots of all.

    Returns:
        [B, A * n, total] bool.
    """
    batch, lanes, count, size = visible.shape
    wide = visible.new_zeros(batch, lanes, count, total)
    for lane in range(lanes):
        wide[:, lane, :, lane * per_lane : lane * per_lane + size] = visible[:, lane]
    return wide.flatten(1, 2)
