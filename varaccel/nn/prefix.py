"""A condition as a causal network reads it: what stands before the first image token."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from varaccel.errors import InputError
from varaccel.nn.condition import Condition
from varaccel.nn.grid import Grid, possible_tokens
from varaccel.nn.signature import Signature


@dataclass(frozen=True)
class Prefix:
    """An encoded condition of R rows, T slots, for an image of N positions.

    Rows of a guided call are the conditional ones, then those of each further branch (most often one, the
    unconditional); the branches may have prompts, and masks, of their own.

    Attributes:
        embeddings: [R, T, D] inputs of the slots.
        mask: [R, T], nonzero at slots that are used; None if all are.
        positional: [1, T + N, ...] shared by the rows, or [R, T + N, ...]: what the network is told of the place of
            each slot and position, such as rows of a rotary table or position ids of several axes. None for
            networks that are told nothing.
        modulation: [R, 1, C], or [R, T + N, C] if it differs from place to place: what adaptive norms read; None
            for networks that have none.
    """

    embeddings: Tensor
    mask: Tensor | None = None
    positional: Tensor | None = None
    modulation: Tensor | None = None

    def __post_init__(self) -> None:
        rows = self.embeddings.shape[0]
        for name in ("positional", "modulation"):
            table: Tensor | None = getattr(self, name)
            if table is not None and (table.dim() < 2 or table.shape[0] not in (1, rows)):
                raise InputError(
                    f"{name} of a prefix must have 1 row or {rows}, one per row of the embeddings, then a list of "
                    f"places; got {list(table.shape)}."
                )

    @property
    def length(self) -> int:
        """Number of slots T."""
        return self.embeddings.shape[1]


def stack_branches(branches: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Embeddings [B, T, D] and masks [B, T] of G branches as one, shorter ones padded on the left.

    Returns:
        embeddings [G * B, T, D] and mask [G * B, T] for the longest T; None as mask if every slot of all is used.
    """
    length = max(embeddings.shape[1] for embeddings, _ in branches)
    parts = [_left_padded(embeddings, mask, length) for embeddings, mask in branches]
    embeddings = torch.cat([part[0] for part in parts])
    if all(mask is None for _, mask in parts):
        return embeddings, None
    masks = [
        torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if m is None else m.bool()
        for x, m in parts
    ]
    return embeddings, torch.cat(masks)


def _left_padded(embeddings: Tensor, mask: Tensor | None, length: int) -> tuple[Tensor, Tensor | None]:
    missing = length - embeddings.shape[1]
    if missing == 0:
        return embeddings, mask
    used = (
        torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device) if mask is None else mask
    )
    return F.pad(embeddings, (0, 0, missing, 0)), F.pad(used, (missing, 0))


class PrefixConditioned:
    """A causal network that reads its condition as embeddings in front of the image tokens.

    A base class beside `nn.Module`: it makes the `Prefix` of a call from what a network says in `embed_condition` and,
    where the defaults do not fit, in `unconditional`, `positional` and `modulation`.
    """

    @abstractmethod
    def signature(self) -> Signature:
        """What the network reads and predicts."""

    @abstractmethod
    def embed_condition(self, values: Tensor) -> Tensor:
        """Inputs of the prefix slots [R, T, D] for `Condition.values`."""

    def unconditional(self, values: Tensor) -> Tensor:
        """The condition that means "none", in the shape of `values`; for classes the label after the last one."""
        signature = self.signature()
        if signature.condition != "class" or signature.condition_size is None:
            raise NotImplementedError(f"{type(self).__name__} must say what its unconditional branch reads")
        return torch.full_like(values, signature.condition_size)

    def positional(self, prefix: int, grids: Sequence[Grid], mask: Tensor | None) -> Tensor | None:
        """See `Prefix.positional`, for `prefix` slots (used ones by `mask` [R, T], see `Prefix`) and `grids`."""
        return None

    def modulation(self, values: Tensor, prefix: int, grids: Sequence[Grid]) -> Tensor | None:
        """See `Prefix.modulation`, for the rows of `values`, `prefix` slots and `grids`."""
        return None

    def encode_condition(self, condition: Condition, grids: Sequence[Grid], *, guided: bool) -> Prefix:
        """The condition of B images as R = B rows, or R = G * B while guided: those of branch after branch.

        Without a negative condition there are two, and the unconditional rows have the shape and the mask of the
        conditional ones.
        """
        values, mask = condition.values, condition.mask
        if guided and condition.negatives:
            branches = (condition, *condition.negatives)
            embeddings, mask = stack_branches([(self.embed_condition(b.values), b.mask) for b in branches])
            length = embeddings.shape[1]
            parts = [self.modulation(b.values, length, grids) for b in branches]
            modulation = None if parts[0] is None else torch.cat([part for part in parts if part is not None])
        else:
            if guided:
                values = torch.cat([values, self.unconditional(values)])
                mask = None if mask is None else mask.repeat(2, 1)
            embeddings = self.embed_condition(values)
            modulation = self.modulation(values, embeddings.shape[1], grids)
        return Prefix(embeddings, mask, self.positional(embeddings.shape[1], grids, mask), modulation)

    def possible_tokens(self, positions: Tensor, grids: Sequence[Grid]) -> Tensor | None:
        """Which tokens may stand at `positions` ([P] or [B, P]): bool [..., V]; None if all may everywhere."""
        if all(grid.end_of_line is None for grid in grids):
            return None
        vocab_size = self.signature().vocab_size
        return None if vocab_size is None else possible_tokens(positions, tuple(grids), vocab_size)
