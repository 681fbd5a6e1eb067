"""Random orders: a draw of the image like every other, which no batch and no other draw changes."""

from __future__ import annotations

import torch

from varaccel.engine.randomness import Randomness, image_generators, random_orders


def test_orders_are_permutations_that_belong_to_the_image() -> None:
    together = Randomness.draw(image_generators(3, seed=7), 40)
    orders = together.orders()
    assert torch.equal(orders.sort(1).values, torch.arange(40).expand(3, -1))
    assert len({tuple(row.tolist()) for row in orders}) == 3
    assert torch.equal(orders, together.orders()), "the same whenever it is asked for"
    for row in range(3):
        alone = Randomness.draw(image_generators(1, seed=7 + row), 40)
        alone.gumbel(5).at(torch.tensor([[3]]))
        alone.stream(4).next()
        assert torch.equal(alone.orders()[0], orders[row])


def test_orders_are_even() -> None:
    """Every position stands in every place equally often, to within noise."""
    firsts = random_orders([torch.Generator().manual_seed(seed) for seed in range(3000)], 5)[:, 0]
    counts = torch.bincount(firsts, minlength=5)
    assert ((counts - 600).abs() < 5 * (3000 * 0.2 * 0.8) ** 0.5).all()
