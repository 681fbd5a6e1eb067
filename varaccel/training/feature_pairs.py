"""What an EAGLE drafter is trained on: pairs of a causal target's features and the tokens that follow them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from varaccel.errors import InputError
from varaccel.hosts.causal.network import CausalNetwork
from varaccel.models.eagle import EagleHead
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.condition import Condition
from varaccel.nn.grid import Grid, line_ends
from varaccel.nn.prefix import Prefix
from varaccel.training.teacher_forcing import teacher_forced

Conditions = Callable[[Tensor], Condition | tuple[Tensor, Tensor | None]]
"""Sample indices [B] -> their condition, or its values and mask."""


@dataclass(frozen=True)
class Pairs:
    """What a drafter reads and should say about some images; G branches, 2 or more with guidance, else 1.

    Attributes:
        tokens: [G, B, T + N - 2] int64, zeros at the T - 1 prefix pairs, then all image tokens but the last.
        features: [G, B, T + N - 2, dim], the target's features of the slots before those tokens.
        wanted: [G, B, N - 1, dim], its features at the image tokens.
        mask: [G, B, T - 1], nonzero at prefix pairs of condition slots that are used; None if all are.
    """

    tokens: Tensor
    features: Tensor
    wanted: Tensor
    mask: Tensor | None = None

    @property
    def prefix(self) -> int:
        """Number of prefix pairs T - 1."""
        return self.tokens.shape[2] - self.wanted.shape[2]


@torch.no_grad()
def make_pairs(
    target: CausalNetwork,
    transform: Callable[[Tensor, AttentionInputs], Tensor],
    condition: Condition,
    token_ids: Tensor,
    guided: bool,
    *,
    grids: Sequence[Grid],
    dropped: Tensor | None = None,
) -> Pairs:
    """One teacher-forced pass of the target over tokens [B, N] of these grids.

    Args:
        transform: the target's own or a compiled one.
        guided: read every image with and without its condition.
        dropped: [B] bool, images that are read without their condition; for passes that are not guided.
    """
    condition = _floats_as(condition, target.dtype)
    without = dropped is not None and bool(dropped.any())
    prefix = target.encode_condition(condition, grids, guided=guided or without)
    if without and not guided:
        assert dropped is not None
        last = len(prefix.embeddings) - len(dropped)  # where the rows of the last branch begin
        prefix = _rows(prefix, torch.arange(len(dropped)) + dropped.cpu() * last)
    branches = len(prefix.embeddings) // len(token_ids)
    x, attention = teacher_forced(target, prefix, token_ids)
    features = transform(x, attention).unflatten(0, (branches, -1))
    tokens = F.pad(token_ids[:, :-1], (prefix.length - 1, 0)).expand(branches, -1, -1)
    mask = None if prefix.mask is None else prefix.mask[:, :-1].unflatten(0, (branches, -1))
    return Pairs(tokens, features[:, :, :-1], features[:, :, prefix.length :], mask)


def _floats_as(condition: Condition, dtype: torch.dtype) -> Condition:
    """A condition whose text features are of the network's number type."""
    values = condition.values
    return replace(
        condition,
        values=values.to(dtype) if values.is_floating_point() else values,
        negative=tuple(_floats_as(branch, dtype) for branch in condition.negatives) or None,
    )


def _rows(prefix: Prefix, rows: Tensor) -> Prefix:
    """Some rows of a prefix."""

    def chosen(table: Tensor | None) -> Tensor | None:
        return table if table is None or len(table) == 1 else table[rows.to(table.device)]

    embeddings = prefix.embeddings[rows.to(prefix.embeddings.device)]
    return Prefix(embeddings, chosen(prefix.mask), chosen(prefix.positional), chosen(prefix.modulation))


def new_head(
    target: CausalNetwork,
    token_ids: Tensor,
    condition: Conditions,
    *,
    grids: Sequence[Grid] | None = None,
    samples: int = 4,
) -> EagleHead:
    """A drafter to be trained: `EagleHead.for_target`, with the scale of the target's features on some `samples`.

    See `train_drafter` for the arguments and errors.
    """
    if hasattr(target, "norm"):  # whose weight tells the scale
        return EagleHead.for_target(target)
    grids = grids_of(target) if grids is None else tuple(grids)
    indices = torch.arange(min(samples, len(token_ids)))
    image = checked_token_ids(token_ids[indices], target, grids).to(target.device, torch.int64)
    given = condition(indices)
    given = given if isinstance(given, Condition) else Condition(*given)
    pairs = make_pairs(target, target.transform, given, image, False, grids=grids)
    return EagleHead.for_target(target, features=pairs.wanted)


def grids_of(target: CausalNetwork) -> tuple[Grid, ...]:
    """The grids that the target's signature tells.

    Raises:
        InputError: it tells none, because they are decided by the call.
    """
    layout = target.signature().layout
    if layout is None or len(layout) > 2:
        raise InputError(
            f"the signature of {type(target).__name__} does not tell the grid of an image; pass the grids of the token "
            "ids as `grids` of train_drafter()."
        )
    return (Grid(layout[0], layout[-1]),)


def checked_token_ids(token_ids: Tensor, target: CausalNetwork, grids: Sequence[Grid]) -> Tensor:
    """Token ids [M, N] of these grids, with ends of line if the given ones lack them.

    Raises:
        InputError: token ids of another grid or codebook.
    """
    ends = line_ends(tuple(grids), token_ids.device)  # [N]
    cells = ends < 0
    count = token_ids.shape[1] if token_ids.dim() == 2 else 0
    if count != len(ends) and count != int(cells.sum()):
        raise InputError(
            f"the token ids have the shape {list(token_ids.shape)}, but the target makes images of {len(ends)} tokens; "
            "encode images of its size."
        )
    vocab_size = vocab_size_of(target)
    if int(token_ids.max()) >= vocab_size:
        raise InputError(
            f"the token ids go up to {int(token_ids.max())}, but the target has {vocab_size}; encode the images with "
            "its own image tokenizer."
        )
    if count == len(ends):
        return token_ids
    complete = ends.to(token_ids.dtype).repeat(len(token_ids), 1)
    complete[:, cells] = token_ids
    return complete


def vocab_size_of(target: CausalNetwork) -> int:
    """Number of token ids that the target predicts."""
    size = target.signature().vocab_size
    assert size is not None, "a causal target predicts token ids"
    return size
