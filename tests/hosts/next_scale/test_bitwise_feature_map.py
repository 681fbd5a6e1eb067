"""The running feature map over the bitwise quantiser, whose tokens may be patches of cells."""

from __future__ import annotations

import pytest
import torch

from varaccel.engine.canvas import Canvas
from varaccel.hosts.next_scale.feature_map import FeatureMap, ScaleQuantizer
from varaccel.nn.scale_schedule import ScaleSchedule
from varaccel.tokenizers.bitwise_vq import BitwiseQuantizer

SCHEDULE = ScaleSchedule(((1, 1), (2, 3), (3, 4)))


@pytest.mark.parametrize(("bits", "patchify"), [(7, 1), (62, 1), (5, 2), (14, 2)])
def test_follows_a_canvas_of_packed_bits(bits: int, patchify: int) -> None:
    quantizer = BitwiseQuantizer(SCHEDULE, bits, patchify)
    checked: ScaleQuantizer = quantizer
    canvas = Canvas.empty(2, SCHEDULE.num_tokens)
    canvas.tokens.random_(quantizer.codebook_size, generator=torch.Generator().manual_seed(5))
    feature_map = FeatureMap(checked, 2)
    assert feature_map.seen(canvas, 0, 0).shape == (2, 0, quantizer.token_bits)
    inputs = quantizer.inputs(canvas.tokens)
    assert inputs.shape == (2, 18, quantizer.token_bits)
    assert torch.equal(feature_map.seen(canvas, 0, 1), inputs[:, :6])
    assert torch.equal(feature_map.seen(canvas, 2, 2), inputs[:, 6:])
    feature_map.follow(canvas, 3)
    assert torch.equal(feature_map.value, quantizer.feature_maps(canvas.tokens)[-1])


def test_skipped_scale_adds_nothing() -> None:
    quantizer = BitwiseQuantizer(SCHEDULE, 5, 2)
    canvas = Canvas.empty(1, SCHEDULE.num_tokens)
    canvas.tokens.random_(quantizer.codebook_size, generator=torch.Generator().manual_seed(6))
    canvas.tokens[:, SCHEDULE.span(1)] = -1
    feature_map = FeatureMap(quantizer, 1)
    feature_map.follow(canvas, 1)
    first = feature_map.value
    feature_map.follow(canvas, 2)
    assert torch.equal(feature_map.value, first)
    feature_map.follow(canvas, 3)
    assert not torch.equal(feature_map.value, first)
