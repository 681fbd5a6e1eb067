"""VAR and CoDe against recorded runs of the published code, and the layout of its files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.scripts import ROOT
from varaccel.engine.canvas import Canvas
from varaccel.errors import CheckpointError
from varaccel.evaluation.published.var import published_loop
from varaccel.hosts.next_scale.feature_map import FeatureMap
from varaccel.hosts.next_scale.published_rng import PublishedDraws
from varaccel.hosts.next_scale.sampling import ScaleGuidance, ScaleSampling
from varaccel.hosts.next_scale.schedule import Scales
from varaccel.hosts.next_scale.session import ScaleSession
from varaccel.models.var import LEFTOVERS, VARTransformer
from varaccel.nn.condition import Condition
from varaccel.nn.scale_schedule import SCALES_256, ScaleSchedule, shared_convolution_table
from varaccel.tokenizers.multiscale_vq import MultiScaleVQModel

GOLDEN = ROOT / "tests" / "golden" / "var"
MANIFEST: dict[str, Any] = json.loads((GOLDEN / "manifest.json").read_text())
TOKENIZERS, TRANSFORMERS = MANIFEST["tokenizers"], MANIFEST["transformers"]
TOLERANCES, GENERATION, CODE = MANIFEST["tolerances"], MANIFEST["generation"], MANIFEST["code"]
GENERATORS = [name for name, config in TRANSFORMERS.items() if config["has_generation"]]


@cache
def tensors(file: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / file)


@cache
def tokenizer(name: str) -> MultiScaleVQModel:
    """The recorded tokenizer; shared by tests, so nobody may change it."""
    config = TOKENIZERS[name]
    model = MultiScaleVQModel.from_original(
        GOLDEN / config["weights"], scales=config["patch_nums"], norm_groups=config["norm_groups"]
    )
    return model.requires_grad_(False)


@cache
def network(name: str) -> VARTransformer:
    """The recorded transformer; shared by tests, so nobody may change it."""
    config = TRANSFORMERS[name]
    model = VARTransformer.from_original(
        GOLDEN / config["weights"], depth=config["depth"], num_heads=config["num_heads"]
    )
    return model.requires_grad_(False)


def close(ours: Tensor, golden: Tensor, kind: str, tolerances: dict[str, Any] = TOLERANCES) -> None:
    torch.testing.assert_close(ours, golden, **tolerances[kind])


def token_ids(golden: dict[str, Tensor], prefix: str) -> Tensor:
    """Recorded indices of all scales, [B, L]."""
    scales = sum(key.startswith(f"{prefix}.") for key in golden)
    return torch.cat([golden[f"{prefix}.{scale}"] for scale in range(scales)], dim=1)


# -- the tokenizer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
def test_sizes_of_the_tokenizer(name: str) -> None:
    config, model = TOKENIZERS[name], tokenizer(name)
    assert not model.training
    assert model.image_size == config["pixel_size"]
    assert model.codebook_size == config["vocab_size"]
    assert model.schedule.sides == tuple(config["patch_nums"])
    ours = model.config
    assert (ours.base_channels, list(ours.channel_multipliers)) == (config["ch"], config["ch_mult"])
    assert (ours.num_res_blocks, ours.codebook_dim) == (config["num_res_blocks"], config["z_channels"])
    assert ours.shared_convolutions == config["share_quant_resi"]
    assert ours.convolution_ratio == config["quant_resi"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_encode(name: str) -> None:
    model, golden = tokenizer(name), tensors(TOKENIZERS[name]["cases"])
    encoding = model.encode(golden["image"])
    close(encoding.latents, golden["f"], "f_hat")
    assert torch.equal(encoding.indices, token_ids(golden, "enc_idx"))
    close(encoding.quantized, golden[f"enc_f_hat.{len(model.schedule) - 1}"], "f_hat")
    close(model.decode(encoding.quantized).clamp(-1, 1), golden["enc_recon"], "images")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_residual_quantisation(name: str) -> None:
    """From the recorded latents: the indices and the running sum after every scale."""
    model, golden = tokenizer(name), tensors(TOKENIZERS[name]["cases"])
    indices, _, maps = model.quantize.encode(golden["f"])
    assert torch.equal(indices, token_ids(golden, "enc_idx"))
    assert len(maps) == len(model.schedule)
    for scale, value in enumerate(maps):
        close(value, golden[f"enc_f_hat.{scale}"], "f_hat")


@pytest.mark.parametrize("source", ["enc", "rnd"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_ids_to_images(name: str, source: str) -> None:
    """Feature maps after every scale, what each scale sees, and the image, of encoded and random token ids."""
    model, golden = tokenizer(name), tensors(TOKENIZERS[name]["cases"])
    indices = token_ids(golden, f"{source}_idx")
    for scale, value in enumerate(model.quantize.feature_maps(indices)):
        close(value, golden[f"{source}_f_hat.{scale}"], "f_hat")
    close(model.quantize.inputs(indices), golden[f"{source}_var_input"], "f_hat")
    image = golden["enc_recon" if source == "enc" else "rnd_image"]
    close(model.decode_tokens(indices).clamp(-1, 1), image, "images")


CONVOLUTIONS = {
    4: [0, 1, 2, 3],
    5: [0, 1, 2, 2, 3],
    6: [0, 0, 1, 2, 3, 3],
    7: [0, 0, 1, 2, 2, 3, 3],
    8: [0, 0, 1, 1, 2, 2, 3, 3],
    9: [0, 0, 1, 1, 2, 2, 2, 3, 3],
    10: [0, 0, 1, 1, 1, 2, 2, 3, 3, 3],
}


@pytest.mark.parametrize("scales", CONVOLUTIONS)
def test_convolution_of_a_scale(scales: int) -> None:
    schedule = ScaleSchedule(tuple(range(1, scales + 1)))
    assert list(shared_convolution_table(schedule, 4)) == CONVOLUTIONS[scales]


def test_convolutions_of_ten_scales_need_double_precision() -> None:
    """2/9 and 7/9 lie between two choices, where single precision rounds to the wrong one."""
    progress = torch.arange(10, dtype=torch.float32) / 9
    choices = torch.linspace(1 / 12, 11 / 12, 4, dtype=torch.float32)
    single = (progress.unsqueeze(1) - choices).abs().argmin(1).tolist()
    assert single == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert list(shared_convolution_table(ScaleSchedule(SCALES_256), 4)) == CONVOLUTIONS[10] != single
    assert list(tokenizer("vae_b").quantize.table) == CONVOLUTIONS[10]


# -- the transformer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_sizes_of_the_transformer(name: str) -> None:
    config, model = TRANSFORMERS[name], network(name)
    assert not model.training
    assert model.schedule.sides == tuple(config["patch_nums"])
    assert (model.dim, model.num_heads, len(model.blocks)) == (
        config["embed_dim"],
        config["num_heads"],
        config["depth"],
    )
    ours = model.config
    assert (ours.vocab_size, ours.codebook_dim) == (config["vocab_size"], config["z_channels"])
    assert (ours.shared_adaln, ours.l2_norm) == (config["shared_aln"], config["attn_l2_norm"])
    assert (ours.mlp_ratio, ours.norm_eps) == (config["mlp_ratio"], config["norm_eps"])
    assert ours.num_classes == config["num_classes"] == GENERATION["null_class"]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_teacher_forced_logits(name: str) -> None:
    """One masked pass over all scales; the last recorded row has no class."""
    config, golden = TRANSFORMERS[name], tensors(TRANSFORMERS[name]["cases"])
    inputs = tokenizer(config["tokenizer"]).quantize.inputs(token_ids(golden, "tf.idx"))
    close(inputs, golden["tf.x"], "f_hat")
    labels = golden["tf.labels"]
    assert labels[-1] == GENERATION["null_class"]
    close(network(name)(labels, golden["tf.x"]), golden["tf.logits"], "logits")
    dropped = labels == GENERATION["null_class"]
    close(
        network(name)(labels.clamp(max=0), golden["tf.x"], dropped=dropped)[-1],
        golden["tf.logits"][-1],
        "logits",
    )


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_teacher_forced_logits_of_leading_scales(name: str) -> None:
    golden, model = tensors(TRANSFORMERS[name]["cases"]), network(name)
    for tokens in model.schedule.borders[1:]:
        logits = model(golden["tf.labels"], golden["tf.x"][:, : tokens - 1])
        close(logits, golden["tf.logits"][:, :tokens], "logits")


# -- generation ----------------------------------------------------------------------------------------


class Run:
    """A published generation run, repeated: scale by scale, by one network or by two."""

    def __init__(
        self, names: list[str], labels: list[int], options: dict[str, Any], handover: int | None
    ) -> None:
        first = network(names[0])
        codebook = tokenizer(TRANSFORMERS[names[0]]["tokenizer"])
        draws = PublishedDraws(torch.Generator().manual_seed(options.get("g_seed", 0)))
        smooth = draws.gumbel(codebook.codebook_size) if options.get("more_smooth") else None
        features = FeatureMap(codebook.quantize, len(labels), smooth=smooth)
        settings = {
            "guidance": ScaleGuidance.published(options["cfg"]),
            "sampling": ScaleSampling(options.get("temperature", 1.0), options["top_k"], options["top_p"]),
        }
        canvas = Canvas.empty(len(labels), first.num_tokens)
        session = ScaleSession(first, features, Condition(torch.tensor(labels)), until=handover, **settings)
        logits = []
        for inputs in Scales(first.schedule).step_inputs(canvas):
            if inputs.scale == handover:
                features.follow(canvas, handover)
                self.handoff_map = features.value
                self.handoff_tokens = features.seen(canvas, 1, handover)
                session.close()
                session = ScaleSession(
                    network(names[1]), features, Condition(torch.tensor(labels)), **settings
                )
            # what `predict` does, with a look at the logits before the filters
            logits.append(session.logits(canvas, inputs.scale))
            kept = session.sampling.keep(logits[-1], inputs.scale)
            features.expect(kept)
            drawn = draws.sample(session.sampling.distribution(kept, inputs.scale), inputs.positions)
            canvas.write(inputs.positions, drawn, inputs.scale + 1)
        features.follow(canvas, len(first.schedule))
        self.tokens, self.logits, self.feature_map = canvas.tokens, torch.cat(logits, 1), features.value
        self.image = (codebook.decode(features.value).clamp(-1, 1) + 1) / 2

    def check(self, golden: dict[str, Tensor], name: str, tolerances: dict[str, Any] = TOLERANCES) -> None:
        assert torch.equal(self.tokens, token_ids(golden, f"{name}.idx"))
        close(self.logits, golden[f"{name}.cfg_logits"], "cfg_logits", tolerances)
        close(self.feature_map, golden[f"{name}.f_hat"], "f_hat", tolerances)
        close(self.image, golden[f"{name}.image"], "images", tolerances)


@pytest.mark.parametrize("run", GENERATION["runs"])
@pytest.mark.parametrize("name", GENERATORS)
def test_generation(name: str, run: str) -> None:
    options = GENERATION["runs"][run]
    tolerances = TOLERANCES["smooth_runs"] if options["more_smooth"] else TOLERANCES
    repeated = Run([name], GENERATION["class_labels"], options, handover=None)
    repeated.check(tensors(TRANSFORMERS[name]["cases"]), run, tolerances)


@pytest.mark.parametrize("run", CODE["runs"])
def test_collaborative_generation(run: str) -> None:
    options = CODE["runs"][run]
    golden, steps = tensors(options["file"]), options["draft_steps"]
    repeated = Run([CODE["large"], CODE["small"]], CODE["class_labels"], options, handover=steps)
    repeated.check(golden, run)
    close(repeated.handoff_map, golden[f"{run}.handoff_f_hat"], "f_hat")
    close(repeated.handoff_tokens, golden[f"{run}.handoff_tokens"], "f_hat")


def test_networks_of_a_collaboration_differ() -> None:
    """Otherwise its runs would prove nothing about the hand-over: each split gives other tokens."""
    runs = [
        token_ids(tensors(o["file"]), f"{name}.idx") for name, o in CODE["runs"].items() if o["cfg"] == 4.0
    ]
    base = token_ids(tensors(TRANSFORMERS[CODE["small"]]["cases"]), "greedy_cfg4.0.idx")
    assert len(runs) == 3
    for i, tokens in enumerate(runs):
        assert not any(torch.equal(tokens, other) for other in [base, *runs[:i]])


@pytest.mark.parametrize(
    "run", [r for r, options in GENERATION["runs"].items() if not options["more_smooth"]]
)
@pytest.mark.parametrize("name", GENERATORS)
def test_published_loop(name: str, run: str) -> None:
    """The plain loop that speed is compared with is the published one, too."""
    options, golden, model = GENERATION["runs"][run], tensors(TRANSFORMERS[name]["cases"]), network(name)
    tokens, feature_map = published_loop(
        model,
        tokenizer(TRANSFORMERS[name]["tokenizer"]).quantize,
        model.embed_condition(torch.tensor(GENERATION["class_labels"])),
        cfg=options["cfg"],
        top_k=options["top_k"],
        top_p=options["top_p"],
        generator=torch.Generator().manual_seed(options.get("g_seed", 0)),
    )
    assert torch.equal(tokens, token_ids(golden, f"{run}.idx"))
    close(feature_map, golden[f"{run}.f_hat"], "f_hat")


@pytest.mark.parametrize("combo", MANIFEST["sampling"]["combos"], ids=lambda c: c["probs"])
def test_sampling(combo: dict[str, Any]) -> None:
    golden = tensors(MANIFEST["sampling"]["file"])
    sampling = ScaleSampling(combo["temperature"], combo["top_k"], combo["top_p"])
    probs = sampling.distribution(sampling.keep(golden[combo["logits"]], scale=0), scale=0).probs
    close(probs, golden[combo["probs"]], "filtered_probs")
    assert torch.equal(probs == 0, golden[combo["probs"]] == 0)


# -- published files -----------------------------------------------------------------------------------


def same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    state = theirs.state_dict()
    return ours.state_dict().keys() == state.keys() and all(
        torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items()
    )


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_from_a_pickle(name: str, tmp_path: Path) -> None:
    """A .pth with the published buffers is the same model; parameters keep their names and values."""
    config = TRANSFORMERS[name]
    state = tensors(config["weights"])
    buffers = {"lvl_1L", "attn_bias_for_masking", "blocks.0.attn.zero_k_bias"}
    assert buffers <= state.keys()
    torch.save(state, tmp_path / "var.pth")
    model = VARTransformer.from_original(tmp_path / "var.pth", num_heads=config["num_heads"])
    assert same_weights(model, network(name))
    ours = model.state_dict()
    zero_biases = {f"blocks.{b}.attn.zero_k_bias" for b in range(config["depth"])}
    assert state.keys() - ours.keys() == {"lvl_1L", "attn_bias_for_masking", *zero_biases}
    assert ours.keys() <= state.keys()
    assert len(LEFTOVERS) == len(buffers)
    assert all(torch.equal(tensor, state[key]) for key, tensor in ours.items())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_from_a_pickle(name: str, tmp_path: Path) -> None:
    config = TOKENIZERS[name]
    state = tensors(config["weights"])
    assert "quantize.ema_vocab_hit_SV" in state
    torch.save(state, tmp_path / "vae.pth")
    model = MultiScaleVQModel.from_original(
        tmp_path / "vae.pth", scales=config["patch_nums"], norm_groups=config["norm_groups"]
    )
    assert same_weights(model, tokenizer(name))
    used = sum(tensor.numel() for key, tensor in state.items() if key != "quantize.ema_vocab_hit_SV")
    assert sum(p.numel() for p in model.parameters()) == used


@pytest.mark.parametrize(
    "key", ["pos_start", "head.weight", "lvl_1L", "blocks.1.ffn.fc2.bias", "blocks.0.ada_lin.1.weight"]
)
def test_transformer_file_that_lacks_a_tensor(key: str, tmp_path: Path) -> None:
    state = dict(tensors(TRANSFORMERS["base"]["weights"]))
    del state[key]
    torch.save(state, tmp_path / "var.pth")
    with pytest.raises(CheckpointError, match=key) as caught:
        VARTransformer.from_original(tmp_path / "var.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "lost",
    [
        "encoder.conv_in.weight",
        "encoder.mid.attn_1.qkv.bias",
        "decoder.conv_out.bias",
        "quantize.quant_resi",
        "decoder.up",
        "post_quant_conv",
    ],
)
def test_tokenizer_file_that_lacks_tensors(lost: str, tmp_path: Path) -> None:
    config = TOKENIZERS["vae_a"]
    state = {key: t for key, t in tensors(config["weights"]).items() if not key.startswith(lost)}
    torch.save(state, tmp_path / "vae.pth")
    with pytest.raises(CheckpointError, match=r"vae\.pth does not fit MultiScaleVQModel: it lacks") as caught:
        MultiScaleVQModel.from_original(
            tmp_path / "vae.pth", scales=config["patch_nums"], norm_groups=config["norm_groups"]
        )
    assert "\n" not in str(caught.value)
