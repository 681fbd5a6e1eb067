"""Tables of the nearest codebook entries."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file

from tests.scripts import ROOT
from varaccel.errors import InputError
from varaccel.tokenizers.neighbours import neighbour_table

GOLDEN = load_file(ROOT / "tests" / "golden" / "lantern" / "neighbours.safetensors")
SIZES = ("16x2", "64x8", "200x8")


@pytest.mark.parametrize("block", [7, 1024])
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_recorded_table(size: str, block: int) -> None:
    codebook, recorded = GOLDEN[f"codebook_{size}"], GOLDEN[f"neighbours_{size}"]
    table = neighbour_table(codebook, len(codebook) - 1, block=block)
    assert table.dtype == torch.int32
    # neighbours at practically the same distance may be swapped, all others may not
    exact = torch.cdist(codebook.double(), codebook.double())
    ours, theirs = exact.gather(1, table.long()), exact.gather(1, recorded.long())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert (table != recorded).float().mean() < 1e-3
    assert torch.equal(table.sort(dim=-1).values, recorded.sort(dim=-1).values)


@pytest.mark.parametrize("k", [0, 1, 5, 62, 63])
def test_a_narrow_table_is_the_beginning_of_a_wide_one(k: int) -> None:
    codebook = GOLDEN["codebook_64x8"].repeat(2, 1)[:100]  # with equal entries
    whole = neighbour_table(codebook, 99)
    table = neighbour_table(codebook, k)
    assert table.shape == (100, k + 1)
    assert torch.equal(table, whole[:, : k + 1])
    assert not (whole == torch.arange(100)[:, None]).any()


def test_equal_entries_are_listed_by_number() -> None:
    table = neighbour_table(torch.zeros(5, 3), 4, block=2)
    assert table.tolist() == [[j for j in range(5) if j != i] for i in range(5)]


def test_normalising_is_a_choice() -> None:
    codebook = torch.tensor([[1.0, 0.0], [9.0, 0.1], [0.9, 0.5]])
    assert neighbour_table(codebook, 0)[0].tolist() == [2]
    assert neighbour_table(codebook, 0, normalise=True)[0].tolist() == [1]


@pytest.mark.parametrize(
    ("codebook", "k", "message"),
    [
        (torch.zeros(8, 2), -1, "k must be an integer from 0 to 7"),
        (torch.zeros(8, 2), 8, "k must be an integer from 0 to 7 for a codebook of 8, got 8."),
        (torch.zeros(8), 1, "a codebook must be [V, d], got [8]."),
    ],
)
def test_bad_input_is_explained(codebook: torch.Tensor, k: int, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        neighbour_table(codebook, k)
