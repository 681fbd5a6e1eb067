"""The published MAR loop, said again: the same images as ours, so that only the time differs."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import mar_transformer
from varaccel.engine.randomness import image_generators
from varaccel.evaluation.published.mar import Shares, our_shares, published_loop
from varaccel.hosts.masked.denoising import HeadSampling
from varaccel.hosts.masked.guidance import MaskedGuidance
from varaccel.hosts.masked.noise import TokenNoise


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize("condition_type", ["class", "caption"])
def test_draws_the_same_images(condition_type: str, schedule: str) -> None:
    model = mar_transformer(condition_type)
    noise = TokenNoise.draw(image_generators(2, 5), model.num_tokens, model.channels, torch.device("cpu"))
    mask = None
    condition = torch.tensor([1, 3])
    if condition_type == "caption":
        condition = torch.randn(2, model.buffer, 16, generator=torch.Generator().manual_seed(0))
        mask = torch.arange(model.buffer) >= torch.tensor([[3], [0]])
    common = {
        "guidance": MaskedGuidance(2.5, schedule),  # type: ignore[arg-type]
        "sampling": HeadSampling(6, 0.9),
        "iterations": 5,
    }
    theirs, slow = published_loop(model, condition, mask, noise, **common)  # type: ignore[arg-type]
    ours, quick = our_shares(model, condition, mask, noise, **common)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
    for shares in (slow, quick):
        assert shares.transformer > 0
        assert shares.head > 0


def test_shares() -> None:
    shares = Shares(transformer=1.0, head=3.0)
    assert shares.total == 4
    assert shares.head_share == 0.75
