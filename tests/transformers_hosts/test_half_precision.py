"""Hosts of transformers in bfloat16: cached passes say what a whole pass of the model's own modules says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny_transformers as tiny
from varaccel.engine.canvas import Canvas
from varaccel.hosts.causal.guidance import Guidance
from varaccel.hosts.causal.schedule import Raster
from varaccel.hosts.causal.session import CausalSession
from varaccel.models.transformers_host.janus import JanusHost
from varaccel.nn.condition import Condition
from varaccel.nn.grid import Grid
from varaccel.pipelines.janus import JanusPipeline

TOLERANCE = 0.03
"""Largest difference of log-probabilities, as a share of how far apart those of one place are. bfloat16 has 8 bits."""

IDS, MASK = torch.tensor([[1, 7, 8, 9, 3], [0, 1, 10, 11, 3]]), torch.tensor([[1] * 5, [0, 1, 1, 1, 1]])


def teacher_forced(model: Any, tokens: Tensor) -> Tensor:
    """Logits [B, N, V] of the conditional branch by one whole pass of the model's own modules."""
    rows = []
    for ids, mask, image in zip(IDS, MASK, tokens, strict=True):
        words = model.get_input_embeddings()(ids[mask.bool()][None])
        x = torch.cat([words, model.prepare_embeddings_for_image_generation(image[None, :-1])], 1)
        features = model.model.language_model(inputs_embeds=x, use_cache=False).last_hidden_state
        rows.append(model.model.generation_head(features[:, words.shape[1] - 1 :]).float())
    return torch.cat(rows)


def spread(logits: Tensor) -> Tensor:
    """[B, N, 1], from the least to the most likely token of each place."""
    return logits.amax(-1, keepdim=True) - logits.amin(-1, keepdim=True)


@torch.inference_mode()
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_cached_passes_are_as_near_to_float32_as_a_whole_pass(kv_heads: int) -> None:
    wide = tiny.janus(kv_heads=kv_heads)
    half = copy.deepcopy(wide).to(torch.bfloat16)
    tokens = torch.randint(24, (2, 16), generator=torch.Generator().manual_seed(0))
    grids = (Grid(4, 4),)
    session = CausalSession(
        JanusHost(half), Condition(IDS, MASK), grids, guidance=Guidance(1.0), given=Canvas.empty(2, 16)
    )
    assert session.cache.keys.dtype == torch.bfloat16
    canvas = Canvas.empty(2, 16)
    canvas.tokens.copy_(tokens)
    steps = Raster().step_inputs(canvas)
    found = torch.cat([session.predict(canvas, step).logits for step in steps], 1)
    exact, own = teacher_forced(wide, tokens), teacher_forced(half, tokens)
    scale = spread(exact)
    assert float(((found - own) / scale).abs().max()) < TOLERANCE
    assert float(((found - exact) / scale).abs().max()) < 2 * TOLERANCE
    # nearer than another token would make it
    assert float(((found - exact.roll(1, 0)) / scale).abs().max()) > 10 * TOLERANCE


def test_images_in_bfloat16_are_whole() -> None:
    pipe = JanusPipeline(copy.deepcopy(tiny.janus()), tiny.janus_processor()).to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    for accelerator in ("plain", "jacobi", "speculative", "zipar", "lantern"):
        out: Any = pipe(["a red sphere", "cone"], accelerator=accelerator, seed=0, output_type="pt")
        assert out.stats.dtype == "bfloat16"
        assert out.images.isfinite().all()
        assert (out.written > 0).all()
