"""Infinity against recorded runs of the published code: bits, guided logits, feature maps, pixels."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.scripts import ROOT
from varaccel.engine.canvas import Canvas
from varaccel.engine.loop import decode
from varaccel.evaluation.published.infinity import published_loop
from varaccel.hosts.next_scale.bit_sampling import BitDistribution, BitSampling, PublishedBitDraws
from varaccel.hosts.next_scale.feature_map import FeatureMap
from varaccel.hosts.next_scale.sampling import ScaleGuidance
from varaccel.hosts.next_scale.schedule import Scales
from varaccel.hosts.next_scale.session import ScaleSession
from varaccel.models.infinity import InfinityTransformer
from varaccel.nn.aspect_schedules import infinity_schedule
from varaccel.nn.condition import Condition
from varaccel.nn.scale_schedule import ScaleSchedule
from varaccel.pipelines.infinity import InfinityPipeline
from varaccel.tokenizers.bitwise_vq import BitwiseVQModel, pack_bits, unpack_bits

GOLDEN = ROOT / "tests" / "golden" / "infinity"
MANIFEST: dict[str, Any] = json.loads((GOLDEN / "manifest.json").read_text())
RUNS: dict[str, dict[str, Any]] = {name: run for name, run in MANIFEST["runs"].items() if "cfg" in run}


@cache
def tensors(file: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{file}.safetensors")


def recorded(run: str) -> dict[str, Tensor]:
    """What was recorded of a run, by name."""
    model, name = run.split(".", 1)
    prefix = f"{name}."
    table = tensors(f"inf_{model}_cases")
    return {key.removeprefix(prefix): value for key, value in table.items() if key.startswith(prefix)}


@cache
def pipeline(model: str) -> InfinityPipeline:
    """The recorded tiny model; shared by tests, so nobody may change it."""
    config = MANIFEST["transformers"][model]
    tokenizer = MANIFEST["tokenizers"][config["tokenizer"]]
    transformer = InfinityTransformer.from_original(GOLDEN / config["weights"])
    vq = BitwiseVQModel.from_original(
        GOLDEN / tokenizer["weights"], patchify=2 if config["spatial_patchify"] else 1
    )
    pipe = InfinityPipeline(
        transformer.requires_grad_(False),
        vq.requires_grad_(False),
        Features(),
        Features(),
        height=256,
        width=256,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Features(torch.nn.Module):
    """Stands for T5: these tests bring its features."""

    config = None
    device = torch.device("cpu")


def padded(packed: Tensor, lens: list[int]) -> Condition:
    """Left-padded features of texts that were recorded one after the other."""
    values = packed.new_zeros(len(lens), max(lens), packed.shape[-1])
    mask = torch.zeros(values.shape[:2], dtype=torch.bool)
    for row, text in enumerate(packed.split(lens)):
        values[row, -len(text) :], mask[row, -len(text) :] = text, True
    return Condition(values, mask)


def condition(run: dict[str, Any], given: dict[str, Tensor]) -> Condition:
    told = padded(given["text"].float(), run["lens"])
    if "negative_lens" not in run:
        return told
    return Condition(told.values, told.mask, padded(given["negative_text"].float(), run["negative_lens"]))


def schedule(run: dict[str, Any]) -> ScaleSchedule:
    return infinity_schedule(run["ratio"], run["pn"])


def leaked(run: dict[str, Any], given: dict[str, Tensor], scales: ScaleSchedule, batch: int) -> Canvas:
    """A canvas whose first scales are given, if the run says so."""
    if "gt_leak" not in run:
        return Canvas.empty(batch, scales.num_tokens)
    first = scales.borders[run["gt_leak"]]
    fixed = torch.zeros(batch, scales.num_tokens, dtype=torch.bool)
    fixed[:, :first] = True
    return Canvas.given(pack_bits(given["bits"]), fixed)


def guidance(run: dict[str, Any]) -> ScaleGuidance:
    layers = run.get("cfg_insertion_layer", [0])
    return ScaleGuidance(
        run["cfg"], ramp=False, inside=tuple(-layer for layer in layers if layer < 0), on_logits=0 in layers
    )


class Kept:
    """A sampling that remembers the logits of every scale."""

    def __init__(self, sampling: BitSampling) -> None:
        self.sampling, self.logits = sampling, []

    def check(self, scales: ScaleSchedule) -> None:
        self.sampling.check(scales)

    def keep(self, logits: Tensor, scale: int) -> Tensor:
        self.logits.append(self.sampling.keep(logits, scale))
        return self.logits[-1]

    def distribution(self, kept: Tensor, scale: int) -> BitDistribution:
        return self.sampling.distribution(kept, scale)


@pytest.mark.parametrize("name", RUNS)
@torch.inference_mode()
def test_runs(name: str) -> None:
    run, given = RUNS[name], recorded(name)
    pipe, scales = pipeline(name.split(".")[0]), schedule(run)
    if "trunk_scale" in run:
        stopped = ScaleSchedule(scales.grids[: run["trunk_scale"]], scales.reference)
    else:
        stopped = scales
    told = condition(run, given)
    canvas = leaked(run, given, scales, told.batch)
    features = FeatureMap(pipe.vq_model.quantizer(scales), told.batch)
    kept = Kept(BitSampling(run["tau"], run["top_k"], run.get("top_p", 0.0)))
    session = ScaleSession(pipe.transformer, features, told, guidance=guidance(run), sampling=kept)
    draws = PublishedBitDraws(torch.Generator().manual_seed(run.get("g_seed", 0)))
    decode(session, canvas, Scales(stopped), draws)
    features.follow(canvas, len(stopped))

    bits = pipe.transformer.config.token_bits
    assert torch.equal(unpack_bits(canvas.tokens[:, : stopped.num_tokens], bits), given["bits"].bool())
    seen = torch.cat(features._seen, 1)[:, : stopped.num_tokens - 1]
    found = {"logits": torch.cat(kept.logits, 1), "codes": features.value, "inputs": seen}
    for what, tolerance in {"logits": (2e-3, 1e-3), "codes": (1e-4, 0.0), "inputs": (1e-4, 0.0)}.items():
        if what in given:
            atol, rtol = tolerance
            torch.testing.assert_close(found[what], given[what].float(), atol=atol, rtol=rtol)
    if "image_u8_bgr" not in given:
        return
    pixels = ((pipe.vq_model.decode(features.value).clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)
    shown = pixels.permute(0, 2, 3, 1).flip(-1).int() - given["image_u8_bgr"].int()
    assert shown.abs().max() <= 1
    assert (shown != 0).float().mean() <= 0.01


@pytest.mark.parametrize(
    "name", ["base.greedy_cfg3", "base.sampled_demo", "patchify.greedy_cfg3", "patchify.sampled_8b"]
)
def test_published_loop(name: str) -> None:
    """The plain loop that speed is compared with is the published one, too."""
    run, given = RUNS[name], recorded(name)
    pipe = pipeline(name.split(".")[0])
    tokens, feature_map = published_loop(
        pipe.transformer,
        pipe.vq_model.quantizer(schedule(run)),
        condition(run, given),
        cfg=run["cfg"],
        temperature=run["tau"],
        top_k=run["top_k"],
        top_p=run.get("top_p", 0.0),
        generator=torch.Generator().manual_seed(run.get("g_seed", 0)),
    )
    bits = pipe.transformer.config.token_bits
    assert torch.equal(unpack_bits(tokens, bits), given["bits"].bool())
    if "codes" in given:
        torch.testing.assert_close(feature_map, given["codes"].float(), atol=1e-4, rtol=0)


CALLS = [
    name
    for name, run in RUNS.items()
    # a flag that the published code ignores, and what accelerators and in-painting do
    if run.get("cfg_insertion_layer") != [1] and not {"gt_leak", "trunk_scale"} & run.keys()
]


@pytest.mark.parametrize("name", CALLS)
def test_pipeline_makes_the_recorded_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user calls, with the features of the recorded texts."""
    run, given = RUNS[name], recorded(name)
    pipe, told = pipeline(name.split(".")[0]), condition(run, given)
    texts = {"prompt": Condition(told.values, told.mask), "negative": told.negative}
    monkeypatch.setattr(pipe, "_features", lambda wanted: texts["negative" if "no" in wanted else "prompt"])
    height, width = pipe.vq_model.image_size(schedule(run))
    out = pipe(
        ["one"] * told.batch,
        negative_prompt=["no"] * told.batch if told.negatives else None,
        height=height,
        width=width,
        guidance_scale=run["cfg"],
        guidance_layers=run.get("cfg_insertion_layer", [0]),
        temperature=run["tau"],
        top_k=run["top_k"],
        top_p=run.get("top_p", 0.0),
        seed=run.get("g_seed", 0),
        published_rng=True,
        output_type="latent",
    )
    bits = pipe.transformer.config.token_bits
    assert torch.equal(unpack_bits(out.images, bits), given["bits"].bool())


def test_probabilities_of_filtered_bits() -> None:
    table = tensors("sampling_cases")
    logits = table["logits"].float()
    for index, (top_k, top_p) in enumerate(MANIFEST["sampling"]["combos"]):
        sampling = BitSampling(1.0, int(top_k), float(top_p))
        distribution = sampling.distribution(logits.reshape(1, -1, 2 * logits.shape[-2]), 0)
        expected = table[f"probs.{index}"].float()
        found = distribution.probs.view_as(expected)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        assert torch.equal(found == 0, expected == 0)
