"""Which entries of a codebook lie next to each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from varaccel.errors import InputError


def neighbour_table(codebook: Tensor, k: int, *, normalise: bool = False, block: int = 1024) -> Tensor:
    """The nearest other entries of each entry, by increasing Euclidean distance.

    One more than `k` is listed, because the published acceptance rules of LANTERN (arXiv 2410.03355) touch one
    more neighbour than they aggregate. Built block by block: the full matrix of distances never exists.

    Args:
        codebook: [V, d] floating point; distances are measured in float32.
        k: neighbours that will be aggregated, 0 <= k < V.
        normalise: measure between the entries scaled to length 1, as a tokenizer that looks up normalised
            code vectors does. The published tables are built from the stored entries.
        block: entries whose distances to all others are held at a time.

    Returns:
        [V, min(k + 1, V - 1)] int32. Entries at equal distance (unused ones are often equal) are listed by
        number, so a table is the beginning of any wider one.

    Raises:
        InputError: k out of range or not a codebook.
    """
    if codebook.dim() != 2:
        raise InputError(f"a codebook must be [V, d], got {list(codebook.shape)}.")
    size = codebook.shape[0]
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k < size:
        raise InputError(f"k must be an integer from 0 to {size - 1} for a codebook of {size}, got {k!r}.")
    if block < 1:
        raise InputError(f"block must be at least 1, got {block}.")
    points = codebook.detach().float()
    if normalise:
        points = F.normalize(points, dim=-1)
    width = min(k + 1, size - 1)
    table = torch.empty(size, width, dtype=torch.int32, device=codebook.device)
    numbers = torch.arange(size, device=codebook.device)
    for start in range(0, size, block):
        rows = points[start : start + block]
        # no matrix product: |a|² + |b|² - 2ab loses the digits that order the nearest entries
        distance = torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist")
        distance[numbers[: len(rows)], numbers[start : start + block]] = torch.inf
        # Non-negative floats are ordered like their bits; with the number below, no two keys are equal.
        keys = (distance.view(torch.int32).long() << 32) | numbers
        nearest = keys.topk(width, dim=-1, largest=False).values
        table[start : start + block] = (nearest & 0xFFFFFFFF).int()
    return table
