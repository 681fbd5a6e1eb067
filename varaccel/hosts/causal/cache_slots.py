"""What one network has read during one call: its cache, which slots count, and who may look at them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.kv_cache import KVCache

Visibility = Literal["encoded", "causal"]


class CacheSlots:
    """A cache with one slot per condition entry and per position, and draft slots for draft tokens.

    Slots are laid out as [prefix | draft slots | positions | spare]. Draft tokens of several branches can stand for
    the same position, so they are read in draft slots; those that are kept are moved to the slot of their position.
    The spare slot takes what padded entries write, and nothing looks at it.

    Args:
        cache: an empty cache of R rows with `prefix + draft_slots + positions + 1` slots.
        prefix: number of condition slots T.
        positional, modulation: of prefix and positions, see `Prefix`; None where the network has none.
        draft_slots: number of draft slots.
        mask: [R, T], nonzero where a condition slot is used; None if all are.
        branches_differ: whether the rows of the branches of guidance have masks of their own. If not, masks are made
            once and repeated.
        visibility: see `CausalSession`.
    """

    def __init__(
        self,
        cache: KVCache,
        *,
        prefix: int,
        positional: Tensor | None = None,
        modulation: Tensor | None = None,
        draft_slots: int = 0,
        mask: Tensor | None = None,
        branches_differ: bool = False,
        visibility: Visibility = "encoded",
    ) -> None:
        self.cache = cache
        self.prefix, self.draft_slots = prefix, draft_slots
        self.base = prefix + draft_slots  # slot of position 0
        self.visibility, self.branches_differ = visibility, branches_differ
        # one row more, of zeros, for padding; whatever stands there is never used
        self._positional = _with_padding(positional)
        self._modulation = _with_padding(modulation)
        rows, slots, device = cache.batch, cache.slots, cache.device
        self.spare = slots - 1
        self.usable = torch.zeros(rows, slots, dtype=torch.bool, device=device)
        self.usable[:, :prefix] = True if mask is None else mask.bool()
        self._slots = torch.arange(slots, device=device)

    @property
    def rows(self) -> int:
        return self.usable.shape[0]

    def places(self, index: Tensor | slice, rows: int) -> tuple[Tensor | None, Tensor | None]:
        """Positional rows and modulation of shared places `index` ([P], or a slice), counted from the first slot of
        the prefix, for the first `rows` rows; see `AttentionInputs`."""
        positional = None if self._positional is None else self._positional[:rows, index]
        modulation = self._modulation
        if modulation is None:
            return positional, None
        return positional, modulation[:rows] if modulation.shape[1] == 1 else modulation[:rows, index]

    def prefill_inputs(self, mask: Tensor | None) -> AttentionInputs:
        """The attention inputs of a pass over the prefix slots, under `mask` ([R, 1, T, T], None for causal)."""
        positional, modulation = self.places(slice(0, self.prefix), self.rows)
        return AttentionInputs(
            positional,
            modulation,
            mask=mask,
            causal=mask is None,
            cache=self.cache,
            slots=self._slots[: self.prefix],
            length=self.prefix,
        )

    def attention_inputs(
        self,
        positions: Tensor,
        *,
        rows: int,
        draft_slots: Tensor | None = None,
        visible: Tensor | None = None,
        length: int | None = None,
    ) -> AttentionInputs:
        """The attention inputs of entries that stand at `positions`, and a record that they are encoded.

        An entry in the slot of its position sees the encoded slots up to its own. A draft token in a draft slot
        sees the encoded slots before its position, and those draft tokens that `visible` names.

        Args:
            positions: [B, F], -1 for padding. B divides `rows`: all branches of a guided call read alike.
            rows: rows of the pass, at most those of the cache.
            draft_slots: [B, F] draft slot of each entry, -1 for the slot of its position; None for all -1.
            visible: [B, F, draft_slots] bool, which draft slots each entry sees.
            length: number of leading slots to attend over, None for all.
        """
        if self.branches_differ and (repeats := rows // positions.shape[0]) > 1:
            positions = positions.repeat(repeats, 1)
            draft_slots = None if draft_slots is None else draft_slots.repeat(repeats, 1)
            visible = None if visible is None else visible.repeat(repeats, 1, 1)
        batch = positions.shape[0]
        used = positions >= 0
        own = torch.where(used, positions + self.base, self.spare)  # [B, F]
        permanent = own
        slots = own
        if draft_slots is not None:
            drafted = (draft_slots >= 0) & used
            slots = torch.where(drafted, draft_slots + self.prefix, own)
            permanent = torch.where(drafted, self.spare, own)
            own = torch.where(drafted, own - 1, own)  # a draft token does not see what stands for it so far
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
        repeats = rows // batch
        if repeats > 1:
            mask, slots = mask.repeat(repeats, 1, 1), slots.repeat(repeats, 1)
        places = torch.where(used, positions + self.prefix, -1)  # the last row is that of padding
        modulation = self._modulation
        if modulation is not None:
            modulation = modulation[:rows] if modulation.shape[1] == 1 else _at(modulation, places, rows)
        return AttentionInputs(
            None if self._positional is None else _at(self._positional, places, rows),
            modulation,
            mask=mask.unsqueeze(1),
            cache=self.cache,
            slots=slots,
            length=length,
        )

    def put_rows(self, images: Tensor, other: CacheSlots) -> None:
        """The rows of images `images` [n], in all branches, become those of `other`, which has read its prefix only."""
        mine = branch_rows(images, self.rows, self.rows * len(images) // other.rows)
        self.cache.put_rows(mine, other.cache, self.prefix)
        self.usable[mine] = other.usable
        self.branches_differ |= other.branches_differ
        self._positional = _with_rows(self._positional, mine, other._positional, self.rows)
        self._modulation = _with_rows(self._modulation, mine, other._modulation, self.rows)

    def keep_rows(self, images: Tensor, batch: int) -> None:
        """Of `batch` images only `images` [n], which must ascend, stay, in all branches."""
        rows = branch_rows(images, self.rows, batch)
        self.cache.keep_rows(rows.tolist())
        self._positional, self._modulation = (
            table if table is None or len(table) == 1 else table[rows]
            for table in (self._positional, self._modulation)
        )
        self.usable = self.usable[rows]

    def keep(self, draft_slots: Tensor, positions: Tensor) -> None:
        """Move draft tokens from draft slots to the slots of their positions.

        Args:
            draft_slots: [B, M] draft slots.
            positions: [B, M], -1 for entries that are not kept.
        """
        kept = positions >= 0
        repeats = self.rows // positions.shape[0]
        source = torch.where(kept, draft_slots + self.prefix, self.spare).repeat(repeats, 1)
        target = torch.where(kept, positions + self.base, self.spare).repeat(repeats, 1)
        self.cache.move(source, target)
        self.usable.scatter_(1, target, True)
        self.usable[:, self.spare] = False


def branch_rows(images: Tensor, rows: int, batch: int) -> Tensor:
    """Which of `rows` rows, those of `batch` images in branch after branch, belong to `images` [n]: in that order."""
    return (torch.arange(0, rows, batch, device=images.device).unsqueeze(1) + images).flatten()


def _with_rows(table: Tensor | None, rows: Tensor, other: Tensor | None, total: int) -> Tensor | None:
    """A table of `total` rows, or 1 that they share, whose rows `rows` become those of `other`."""
    if table is None or other is None:
        return table
    # one row may be that of all, or of the only one
    if len(table) == len(other) == 1 and (total == 1 or torch.equal(table, other)):
        return other
    return table.expand(total, *table.shape[1:]).index_copy(
        0, rows, other.expand(len(rows), *other.shape[1:])
    )


def _with_padding(table: Tensor | None) -> Tensor | None:
    """A table [R, S, ...] with a row of zeros behind each list; one that all places share needs none."""
    if table is None or table.shape[1] == 1:
        return table
    return torch.cat([table, torch.zeros_like(table[:, :1])], dim=1)


def _at(table: Tensor, places: Tensor, rows: int) -> Tensor:
    """Entries of a table ([1, S, ...] shared, or [R, S, ...]) at `places` [B, F], for `rows` rows: [rows, F, ...]."""
    repeats = rows // places.shape[0]
    if table.shape[0] == 1:
        found = table[0, places]
        return found if repeats == 1 else found.repeat(repeats, *[1] * (found.dim() - 1))
    every = torch.arange(rows, device=places.device).unsqueeze(1)
    return table[every, places.repeat(repeats, 1)]


def lane_draft_slots(lanes: int, per_lane: int, entries: Tensor) -> Tensor:
    """Draft slots [A, n] of `entries` [n] of every lane; each lane has `per_lane` of them in a row."""
    return torch.arange(lanes, device=entries.device).unsqueeze(1) * per_lane + entries


def spread(visible: Tensor, per_lane: int, total: int) -> Tensor:
    """What draft tokens see of the entries of their own lane, [B, A, n, S], over the `total` draft slots of all.

    Returns:
        [B, A * n, total] bool.
    """
    batch, lanes, count, size = visible.shape
    wide = visible.new_zeros(batch, lanes, count, total)
    for lane in range(lanes):
        wide[:, lane, :, lane * per_lane : lane * per_lane + size] = visible[:, lane]
    return wide.flatten(1, 2)
