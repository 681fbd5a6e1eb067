"""FastVAR on a tiny Infinity against recorded runs of the published code: bits, kept tokens, pixels."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.pipelines.test_infinity_parity import padded
from tests.scripts import ROOT
from varaccel import FastVAR
from varaccel.engine.canvas import Canvas
from varaccel.engine.randomness import Randomness, image_generators
from varaccel.hosts.next_scale import pruning
from varaccel.hosts.next_scale.bit_sampling import BitDraws, BitSampling
from varaccel.hosts.next_scale.feature_map import FeatureMap
from varaccel.hosts.next_scale.job import ScaleJob
from varaccel.hosts.next_scale.sampling import ScaleGuidance
from varaccel.hosts.next_scale.schedule import Scales
from varaccel.models.infinity import InfinityTransformer
from varaccel.nn.aspect_schedules import infinity_schedule
from varaccel.tokenizers.bitwise_vq import BitwiseVQModel, unpack_bits

GOLDEN = ROOT / "tests" / "golden" / "fastvar"
RUNS: dict[str, dict[str, Any]] = json.loads((GOLDEN / "runs.json").read_text())
PARTS = ("sa", "ca", "mlp")


@cache
def networks() -> tuple[InfinityTransformer, BitwiseVQModel]:
    """Shared by tests, so nobody may change them."""
    transformer = InfinityTransformer.from_original(GOLDEN / "small_inf.safetensors")
    vq = BitwiseVQModel.from_original(GOLDEN / "small_vae.safetensors")
    return transformer.requires_grad_(False), vq.requires_grad_(False)


@pytest.mark.parametrize("name", RUNS)
def test_recorded_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, table = RUNS[name], load_file(GOLDEN / "small_cases.safetensors")
    given = {
        key.removeprefix(f"{name}."): value for key, value in table.items() if key.startswith(f"{name}.")
    }
    network, vq = networks()
    schedule = infinity_schedule(run["ratio"], run["pn"])
    chosen: list[Tensor] = []
    highest = pruning.highest

    def noted(scores: Tensor, count: int) -> Tensor:
        chosen.append(highest(scores, count))
        return chosen[-1]

    monkeypatch.setattr(pruning, "highest", noted)
    canvas = Canvas.empty(1, schedule.num_tokens)
    features = FeatureMap(vq.quantizer(schedule), 1)
    randomness = Randomness.draw(image_generators(1, seed=0), schedule.num_tokens)
    job = ScaleJob(
        network=network,
        canvas=canvas,
        rows=2,
        condition=padded(given["text"].float(), run["lens"]),
        features=features,
        guidance=ScaleGuidance(run["cfg"], ramp=False),
        sampling=BitSampling(temperature=0.0),
        randomness=BitDraws(randomness, 8),
        schedule=Scales(schedule),
    )
    # the recorded run prunes widths 8 and 12 and leaves 16 out
    plan = FastVAR(keep=(0.6, 0.5), skip_scales=1, blocks=(1, 3))
    assert plan.plan(job).run() is not None
    drawn = canvas.tokens[:, : given["bits"].shape[1]]
    assert torch.equal(unpack_bits(drawn, 8), given["bits"].bool())
    assert (canvas.tokens[:, given["bits"].shape[1] :] == -1).all()
    recorded = [
        given[f"kept.w{width}.block{block}.{part}"] for width in (8, 12) for block in (1, 2) for part in PARTS
    ]
    assert len(chosen) == len(recorded)
    assert all(torch.equal(ours.int(), theirs.int()) for ours, theirs in zip(chosen, recorded, strict=True))
    features.follow(canvas, len(schedule))
    torch.testing.assert_close(features.value, given["codes"], atol=1e-4, rtol=1e-4)
    image = (vq.decode(features.value)[0].clamp(-1, 1) + 1) / 2 * 255
    shown = image.permute(1, 2, 0).flip(-1).to(torch.uint8)  # blue first
    assert (shown.int() - given["image_u8_bgr"][0].int()).abs().max() <= 1
