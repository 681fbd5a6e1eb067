"""MAR, its diffusion head and continuous speculative decoding against recorded runs of the published code."""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests import tiny
from tests.scripts import ROOT
from varaccel.engine.canvas import Canvas
from varaccel.engine.loop import decode
from varaccel.errors import CheckpointError, InputError
from varaccel.hosts.masked.denoising import (
    HeadSampling,
    Process,
    denoising_step,
    step_coefficients,
    step_table,
)
from varaccel.hosts.masked.distribution import DiffusionDistribution
from varaccel.hosts.masked.guidance import MaskedGuidance
from varaccel.hosts.masked.noise import TokenNoise
from varaccel.hosts.masked.schedule import CosineGroups, MaskedInputs
from varaccel.hosts.masked.session import FeatureCacheSession, MaskedSession
from varaccel.models.diffusion_head import time_frequencies
from varaccel.models.mar import PRESETS, MARTransformer, rows_of
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.condition import Condition
from varaccel.nn.noise_schedule import DiffusionSchedule
from varaccel.speculation import continuous_loop
from varaccel.speculation.continuous_loop import Comparison, speculate_groups
from varaccel.speculation.continuous_rejection import Aligned, Decision, ReferenceRule, ResampleNoise
from varaccel.speculation.group_verification import JointVerification
from varaccel.tokenizers.kl import unpatchify

GOLDEN = ROOT / "tests" / "golden" / "mar"
MANIFEST: dict[str, Any] = json.loads((GOLDEN / "manifest.json").read_text())
GENERATIONS, CSPD_RUNS = MANIFEST["generate"], MANIFEST["cspd_runs"]
TOKENS, CHANNELS = MANIFEST["seq_len"], MANIFEST["token_dim"]
NETWORKS = {"mar_weights": "mar_target", "mar_draft_weights": "mar_draft"}
"""Files of weights and their configurations."""


@cache
def tensors(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


@cache
def network(name: str = "mar_weights") -> MARTransformer:
    """The recorded transformer; shared by tests, so nobody may change it."""
    config = MANIFEST["config"][NETWORKS[name]]
    model = MARTransformer.from_original(
        GOLDEN / f"{name}.safetensors",
        num_heads=config["encoder_num_heads"],
        decoder_heads=config["decoder_num_heads"],
    )
    return model.requires_grad_(False)


def close(ours: Tensor, golden: Tensor, tolerance: float) -> None:
    """Equal up to `tolerance` times the largest number; tokens of a small head may be of any size."""
    assert ours.shape == golden.shape
    assert ours.isfinite().all()
    assert float((ours.double() - golden.double()).abs().max() / golden.double().abs().max()) < tolerance


# -- the schedule --------------------------------------------------------------------------------------

CONSTANTS = {
    "timesteps": "timestep_map",
    "betas": "betas",
    "alphas_cumprod": "alphas_cumprod",
    "log_posterior": "posterior_log_variance_clipped",
    "mean_start": "posterior_mean_coef1",
    "mean_noisy": "posterior_mean_coef2",
    "inverse_scale": "sqrt_recip_alphas_cumprod",
    "noise_scale": "sqrt_recipm1_alphas_cumprod",
}
"""What we call them, and what they were recorded as."""


@pytest.mark.parametrize("steps", [4, 10, 25, 50, 100, 250])
def test_schedule(steps: int) -> None:
    schedule, golden = DiffusionSchedule.respaced(steps), tensors("schedule")
    assert torch.equal(schedule.timesteps, golden[f"s{steps}.timestep_map"])
    for ours, theirs in CONSTANTS.items():
        expected = golden[f"s{steps}.{theirs}"].double()
        torch.testing.assert_close(getattr(schedule, ours).double(), expected, atol=0, rtol=1e-12, msg=ours)
    torch.testing.assert_close(schedule.log_beta, golden[f"s{steps}.betas"].log(), atol=0, rtol=1e-12)
    variance = golden[f"s{steps}.posterior_variance"]
    torch.testing.assert_close(schedule.log_posterior[1:].exp(), variance[1:], atol=0, rtol=1e-12)
    assert variance[0] == 0, "so that its logarithm has to be made up"
    assert schedule.log_posterior[0] == schedule.log_posterior[1]


# -- the head ------------------------------------------------------------------------------------------


def test_head() -> None:
    head, golden = network().head, tensors("diffusion_head")
    # angles reach 1000, whose last digit in single precision is 6e-5, and exponentials differ between machines
    close(time_frequencies(golden["t"]), golden["time_freq"], 1e-4)
    close(head.time_embed(golden["t"]), golden["time_emb"], 1e-5)
    close(head(golden["x_t"], golden["t"], golden["z"]), golden["out"], 1e-5)


def test_guided_head() -> None:
    """The noise is guided, the variance that of each half; tokens of the second half are those of the first."""
    head, golden = network().head, tensors("diffusion_head")
    modulations = head.modulations(head.time_embed(golden["cfg.t"]), head.cond_embed(golden["z"]))
    noise, place = head.step(golden["x_t"][:4], modulations).chunk(2, -1)
    conditional, unconditional = noise.chunk(2)
    guided = unconditional + golden["cfg.scale"] * (conditional - unconditional)
    close(torch.cat([torch.cat([guided, guided]), place], 1), golden["cfg.out"], 1e-5)


STEPS = sorted({tuple(key.split(".")[:2]) for key in tensors("diffusion_head") if ".i" in key})


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize(("steps", "index"), [(int(n[1:]), int(k[1:])) for n, k in STEPS])
def test_one_step(steps: int, index: int, guided: bool) -> None:
    head, golden = network().head, tensors("diffusion_head")
    schedule = DiffusionSchedule.respaced(steps)
    modulations = head.modulations(
        head.time_embed(schedule.timesteps[index : index + 1]), head.cond_embed(golden["z"])
    )
    rows = 4 if guided else 8
    row = step_coefficients(step_table(schedule, "ddpm"))[index].tolist()
    x = golden["x_t"][:rows]
    guidance = torch.full_like(x, float(golden["cfg.scale"]))
    mean, place, start = denoising_step(
        head,
        x,
        modulations,
        row,
        torch.cat([guidance, torch.ones_like(x)], 1) if guided else None,
        None,
        True,
    )
    assert start is not None
    log_variance = 2 * (place * row[2] + row[3])
    prefix = f"s{steps}.i{index}." + ("cfg." if guided else "")
    expected = {
        name: golden[prefix + name][:rows] for name in ("mean", "log_variance", "pred_xstart", "variance")
    }
    # the first steps multiply rounding errors of the predicted noise by hundreds
    tolerance = 1e-5 if index < steps - 2 else 1e-4
    close(mean, expected["mean"], tolerance)
    close(start, expected["pred_xstart"], tolerance)
    close(log_variance, expected["log_variance"], 1e-5)
    close(log_variance.exp(), expected["variance"], 1e-5)


@pytest.mark.parametrize("case", ["plain", "temp", "cfg"])
@pytest.mark.parametrize("steps", [25, 100])
def test_trajectory(steps: int, case: str) -> None:
    golden = {
        key.removeprefix(f"s{steps}.{case}."): value
        for key, value in tensors("trajectory").items()
        if key.startswith(f"s{steps}.{case}.")
    }
    sampling = HeadSampling(steps, 0.9 if case == "temp" else 1.0)
    process = Process.of(network().head, "cosine", sampling)
    start, noise = golden["x_T"], golden["noise"]
    scale = torch.full((len(start), 1), 2.5) if case == "cfg" else None

    whole = process.run(golden["z"], start, noise, scale)
    close(whole.value, golden["final"], 1e-3)
    close(whole.value, golden["final_f64"], 1e-3)

    # the same path from record to record
    x, first = start, steps - 1
    for row, index in enumerate(golden["visited"].tolist()):
        part = process.run(golden["z"], x, noise, scale, first=first, last=index)
        close(part.value, golden["x"][row], 1e-3)
        close(part.mean, golden["mean"][row], 1e-3)
        half = part.log_std - torch.tensor(sampling.temperature).log()
        close(2 * half, golden["log_variance"][row], 1e-3)
        x, first = part.value, index - 1
    assert first == -1
    close(x, golden["final"], 1e-3)


# -- the transformer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_sizes(name: str) -> None:
    config, model = MANIFEST["config"][NETWORKS[name]], network(name)
    assert not model.training
    assert (model.num_tokens, model.channels, model.buffer) == (TOKENS, CHANNELS, config["buffer_size"])
    ours = model.config
    assert (ours.dim, ours.encoder_depth, ours.num_heads) == (
        config["encoder_embed_dim"],
        config["encoder_depth"],
        config["encoder_num_heads"],
    )
    assert (ours.decoder_dim, ours.decoder_depth, ours.decoder_heads) == (
        config["decoder_embed_dim"],
        config["decoder_depth"],
        config["decoder_num_heads"],
    )
    assert (ours.head_depth, ours.head_width) == (config["diffloss_d"], config["diffloss_w"])
    assert (ours.mlp_ratio, ours.norm_eps) == (config["mlp_ratio"], config["norm_eps"])
    assert (ours.num_classes, ours.condition_type) == (config["class_num"], "class")
    assert ours.noise_schedule == "cosine"
    assert model.state_dict().keys() == tensors(name).keys()
    assert all(torch.equal(value, tensors(name)[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("case", ["a", "b", "c", "d"])
def test_encoder_and_decoder(case: str) -> None:
    model, golden = network(), tensors("encoder_decoder")
    masked, labels = golden[f"{case}.mask"].bool(), golden[f"{case}.labels"]
    named = model.embed_condition(labels.clamp(min=0))
    slots = torch.where((labels >= 0)[:, None, None], named, model.null_condition())
    known, asked = (torch.stack([row.nonzero()[:, 0] for row in part]) for part in (~masked, masked))
    tokens = rows_of(golden["tokens"], known)
    encoded = model.encode(
        torch.cat([model.embed_slots(slots), model.embed_tokens(tokens, known)], 1), AttentionInputs()
    )
    close(encoded, golden[f"{case}.encoder_out"], 1e-5)

    expected = golden[f"{case}.z"]
    everything = model(slots, tokens, known)
    close(everything, expected, 1e-5)
    close(model(slots, tokens, known, padded=False), expected, 1e-5)
    close(model(model.embed_slots(slots), tokens, known, embedded=True), expected, 1e-5)
    if asked.shape[1]:
        close(model(slots, tokens, known, asked), rows_of(expected, asked), 1e-5)
    # the order of known tokens is ours to choose
    turned = known.flip(1)
    close(model(slots, tokens.flip(1), turned), expected, 1e-5)


# -- generation ----------------------------------------------------------------------------------------


class Recorded:
    """Inputs of a recorded run.

    Args:
        options: of the manifest.
        golden: of its file.
    """

    def __init__(self, options: dict[str, Any], golden: dict[str, Tensor]) -> None:
        self.steps, self.batch = int(options["num_sampling_steps"]), len(golden["orders"])
        self.noise = TokenNoise(
            golden["orders"],
            golden["noise_init"],
            torch.zeros(self.batch, TOKENS),
            _steps={self.steps: golden["noise_steps"]},
        )
        self.order = CosineGroups(golden["orders"], options["num_iter"])
        self.labels = golden["labels"] if options.get("labels", True) else None
        self.session_options = {
            "batch": self.batch,
            "guidance": MaskedGuidance(options["cfg"], options["cfg_schedule"]),
            "sampling": HeadSampling(self.steps, options["temperature"]),
        }

    @property
    def condition(self) -> Condition | None:
        return None if self.labels is None else Condition(self.labels)

    def canvas(self) -> Canvas:
        return Canvas.empty(self.batch, TOKENS, channels=CHANNELS)


class Watched(MaskedSession):
    """A session that remembers what it told the head."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.told: list[tuple[MaskedInputs, Tensor, Tensor | None]] = []

    def distribution(self, conditions: Tensor, inputs: MaskedInputs) -> DiffusionDistribution:
        distribution = super().distribution(conditions, inputs)
        self.told.append((inputs, conditions, distribution.scale))
        return distribution


def in_raster_order(conditions: Tensor, positions: Tensor) -> Tensor:
    """Conditions [R, P, D] of positions [B, P] as rows of (half, image, place) by place."""
    index = positions.argsort(1).repeat(len(conditions) // len(positions), 1)
    return rows_of(conditions, index).flatten(0, 1)


@pytest.mark.parametrize("name", GENERATIONS)
def test_generation(name: str) -> None:
    options, golden = GENERATIONS[name], tensors(f"generate_{name}")
    run = Recorded(options, golden)
    session = Watched(network(), run.condition, **run.session_options)
    canvas = run.canvas()
    assert decode(session, canvas, run.order, run.noise) == options["num_iter"]
    assert canvas.is_full
    close(canvas.tokens, golden["tokens"], 1e-3)
    close(unpatchify(canvas.tokens, 1, 4), golden["latent"], 1e-3)
    assert session.rows_per_pass == run.batch * (1 if options["cfg"] == 1 else 2)

    # every iteration decides what it did there, under the same guidance
    assert [max(1, border) for border in run.order.borders[1:]] == options["mask_len"]
    for iteration, (inputs, _, scale) in enumerate(session.told):
        decided = torch.zeros(run.batch, TOKENS, dtype=torch.bool).scatter(1, inputs.positions, True)
        assert torch.equal(decided, golden["mask_to_pred"][iteration])
        assert torch.equal(canvas.written == iteration + 1, decided)
        if scale is None:
            assert options["cfg_iter"][iteration] == 1
        else:
            expected = torch.full_like(scale, options["cfg_iter"][iteration])
            torch.testing.assert_close(scale, expected, atol=0, rtol=1e-6)
    for key, (inputs, conditions, _) in (("z_first", session.told[0]), ("z_last", session.told[-1])):
        close(in_raster_order(conditions, inputs.positions), golden[key], 1e-3)


@pytest.mark.parametrize("keep_unconditional", [True, False])
@pytest.mark.parametrize("name", GENERATIONS)
def test_generation_with_caches_that_are_always_fresh(name: str, keep_unconditional: bool) -> None:
    options, golden = GENERATIONS[name], tensors(f"generate_{name}")
    run = Recorded(options, golden)
    session = FeatureCacheSession(
        network(),
        run.condition,
        refresh=1,
        keep_unconditional=keep_unconditional,
        **run.session_options,
    )
    canvas = run.canvas()
    decode(session, canvas, run.order, run.noise)
    close(canvas.tokens, golden["tokens"], 1e-3)


# -- continuous speculative decoding -------------------------------------------------------------------


class RecordedProposals:
    """Numbers of a recorded verification, one round at a time; rows brought into our order by `ours`."""

    def __init__(self, normals: Tensor, uniforms: Tensor) -> None:
        self.rounds = iter(zip(normals, uniforms, strict=True))

    def next(self, count: int) -> tuple[Tensor, Tensor]:
        assert count == 1, "the published code proposes for all tokens, round by round"
        normals, uniforms = next(self.rounds)
        return normals[:, None], uniforms[:, None]


class CheckedRule:
    """The reference rule on recorded numbers; checks what it is given and what it decides.

    Recorded rows are in raster order of (image, place), ours in the order in which groups were drafted.
    """

    def __init__(self, golden: dict[str, Tensor], inner_temperature: float) -> None:
        self.golden, self.rule = golden, ReferenceRule(inner_temperature)
        self.positions = torch.empty(0)  # [B, P], to be set before each judgement
        self.judgements = 0

    def ours(self, rows: Tensor) -> Tensor:
        batch, count = self.positions.shape
        by_image = rows.unflatten(0, (batch, count))
        rank = self.positions.argsort(1).argsort(1)
        return torch.stack([part[index] for part, index in zip(by_image, rank, strict=True)]).flatten(0, 1)

    def verify(
        self, aligned: Aligned, uniforms: Tensor, resample_noise: ResampleNoise, active: Tensor | None = None
    ) -> Decision:
        recorded = {
            key.removeprefix(f"v{self.judgements}."): value
            for key, value in self.golden.items()
            if key.startswith(f"v{self.judgements}.")
        }
        self.judgements += 1
        by_place = self.positions.sort(1).values
        decided = torch.zeros(len(by_place), TOKENS, dtype=torch.bool).scatter(1, by_place, True)
        assert torch.equal(decided, recorded["pred_mask"])
        close(aligned.value, self.ours(recorded["x"]), 1e-3)
        for distribution, who in ((aligned.draft, "q"), (aligned.target, "p")):
            close(distribution.mean, self.ours(recorded[f"{who}_mean"]), 1e-3)
            close(distribution.log_std.exp(), self.ours(recorded[f"{who}_std"]), 1e-3)
        log_sigma = self.ours(recorded["log_Sigma_paper"])
        torch.testing.assert_close(aligned.log_sigma, log_sigma, atol=2e-3, rtol=1e-3)
        ratio = self.rule.log_ratio(aligned)
        # far from its mean a value's ratio multiplies the rounding of the mean, which differs between processors
        torch.testing.assert_close(ratio, self.ours(recorded["log_ratio_code_f64"]), atol=2e-3, rtol=5e-3)
        rounds = RecordedProposals(
            torch.stack([self.ours(part) for part in recorded.get("res_normals", ())] or [torch.empty(0)]),
            torch.stack([self.ours(part) for part in recorded.get("res_uniforms", ())] or [torch.empty(0)]),
        )
        decision = self.rule.verify(aligned, self.ours(recorded["u"]), rounds, active)
        assert torch.equal(decision.accepted, self.ours(recorded["accept"]))
        close(decision.values, self.ours(recorded["out"]), 1e-3)
        if "res_normals" in recorded:
            rejected = ~decision.accepted
            assert (decision.tries[rejected] == len(recorded["res_normals"])).all()
        else:
            assert decision.accepted.all()
        return decision


class CheckedComparison(Comparison):
    """A comparison that tells its rule which places are judged."""

    def verify(
        self, distribution: DiffusionDistribution, drafted: Any, positions: Tensor, resample_noise: Any
    ) -> tuple[Tensor, Decision]:
        assert isinstance(self.rule, CheckedRule)
        self.rule.positions = positions
        return super().verify(distribution, drafted, positions, resample_noise)


@pytest.mark.parametrize("name", CSPD_RUNS)
def test_continuous_speculative_decoding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, golden = CSPD_RUNS[name], tensors(f"cspd_run_{name}")
    # a recorded run has no seeds, and brings its numbers itself
    monkeypatch.setattr(continuous_loop, "_resample_noise", lambda *_: None)
    run, rule = Recorded(options, golden), CheckedRule(golden, options["inner_temperature"])
    target, draft = (MaskedSession(network(n), run.condition, **run.session_options) for n in NETWORKS)
    canvas = run.canvas()
    stats = speculate_groups(
        target,
        draft,
        canvas,
        run.order,
        CheckedComparison(rule, 0, run.noise, run.noise),
        JointVerification(target, options["num_draft"]),
        prefill=options["ratio"],
    )
    assert canvas.is_full
    close(canvas.tokens, golden["tokens"], 1e-3)
    kinds = [kind for kind, _ in options["schedule"]]
    assert rule.judgements == options["n_verify"] == kinds.count("verify")
    assert draft.reads == stats.draft_passes == kinds.count("draft")
    assert target.reads == kinds.count("prefill") + kinds.count("verify")
    assert stats.passes.tolist() == [target.reads] * run.batch
    flags = [golden[f"v{i}.accept"].view(run.batch, -1) for i in range(rule.judgements)]
    assert stats.accepted.tolist() == sum(part.sum(1) for part in flags).tolist()
    assert stats.verified is not None
    assert stats.verified.tolist() == [sum(part.shape[1] for part in flags)] * run.batch


def test_recorded_runs_keep_some_tokens_and_replace_others() -> None:
    """Otherwise they would prove nothing about decisions."""
    flags = torch.cat(
        [v for name in CSPD_RUNS for k, v in tensors(f"cspd_run_{name}").items() if k.endswith(".accept")]
    )
    assert 0.1 < flags.float().mean() < 0.9


# -- published files -----------------------------------------------------------------------------------


def load(path: Path, **options: Any) -> MARTransformer:
    return MARTransformer.from_original(path, **{"num_heads": 4, "decoder_heads": 4, **options})


def holds(model: MARTransformer, state: dict[str, Tensor]) -> bool:
    ours = model.state_dict()
    return ours.keys() == state.keys() and all(torch.equal(ours[key], value) for key, value in state.items())


def test_averaged_weights_are_taken(tmp_path: Path) -> None:
    averaged = tensors("mar_weights")
    trained = {key: value + 1 for key, value in averaged.items()}
    content = {
        "model": trained,
        "model_ema": averaged,
        "epoch": 3,
        "args": argparse.Namespace(model="mar_base", lr=1e-4),
    }
    torch.save(content, tmp_path / "checkpoint-last.pth")
    assert holds(load(tmp_path / "checkpoint-last.pth"), averaged)
    assert holds(load(tmp_path / "checkpoint-last.pth", averaged=False), trained)
    assert not load(tmp_path / "checkpoint-last.pth").training


@pytest.mark.parametrize("wrapped", [None, "model", "model_ema"])
def test_whichever_weights_there_are(wrapped: str | None, tmp_path: Path) -> None:
    state = tensors("mar_weights")
    torch.save(state if wrapped is None else {wrapped: state}, tmp_path / "mar.pth")
    for averaged in (True, False):
        assert holds(load(tmp_path / "mar.pth", averaged=averaged), state)


def test_heads_are_asked_for_where_nobody_knows_them() -> None:
    file = GOLDEN / "mar_weights.safetensors"
    with pytest.raises(InputError, match="width 64 is of no published size; pass num_heads"):
        MARTransformer.from_original(file)
    with pytest.raises(InputError, match="width 64 is of no published size; pass decoder_heads"):
        MARTransformer.from_original(file, num_heads=4)
    assert load(file, num_heads=2).config.num_heads == 2
    assert load(file, num_heads=2).config.decoder_heads == 4
    assert holds(load(file, num_heads=2), tensors("mar_weights"))


def test_a_published_width_tells_its_heads(tmp_path: Path) -> None:
    """768, 1024 and 1280 mean 12, 16 and 16 heads."""
    for preset in PRESETS.values():
        small = {"dim": preset["dim"], "num_heads": preset["num_heads"], "mlp_ratio": 0.25, "grid_size": 2}
        with torch.device("meta"):
            made = MARTransformer(
                **small,
                encoder_depth=1,
                decoder_depth=1,
                head_depth=1,
                head_width=8,
                token_channels=4,
                buffer_size=2,
                num_classes=3,
            )
        save_file(
            {k: torch.zeros(v.shape) for k, v in made.state_dict().items()}, tmp_path / "mar.safetensors"
        )
        loaded = MARTransformer.from_original(tmp_path / "mar.safetensors").config
        assert (loaded.num_heads, loaded.decoder_heads) == (preset["num_heads"], preset["num_heads"])
        assert (loaded.mlp_ratio, loaded.grid_size, loaded.buffer_size) == (0.25, 2, 2)
        assert (loaded.head_depth, loaded.head_width, loaded.num_classes) == (1, 8, 3)


def test_a_file_of_another_size() -> None:
    file = GOLDEN / "mar_weights.safetensors"
    for name in PRESETS:
        with pytest.raises(CheckpointError, match=f"a MAR with dim=64, not MAR-{name}") as caught:
            load(file, size=name)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="did you mean 'base'"):
        load(file, size="bas")


@pytest.mark.parametrize(
    "key",
    [
        "mask_token",
        "fake_latent",
        "class_emb.weight",
        "z_proj.weight",
        "diffloss.net.input_proj.weight",
        "diffloss.net.final_layer.linear.bias",
        "encoder_blocks.1.attn.qkv.bias",
        "encoder_pos_embed_learned",
    ],
)
def test_a_file_that_lacks_a_tensor(key: str, tmp_path: Path) -> None:
    state = {name: value for name, value in tensors("mar_weights").items() if name != key}
    save_file(state, tmp_path / "mar.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"mar\.safetensors does not fit MARTransformer.*{key}"
    ) as caught:
        load(tmp_path / "mar.safetensors")
    assert "\n" not in str(caught.value)


def test_files_of_something_else(tmp_path: Path) -> None:
    state = tensors("mar_weights")
    save_file({k: v for k, v in state.items() if "decoder_blocks" not in k}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="no such blocks"):
        load(tmp_path / "a.safetensors")
    save_file(
        {k: v for k, v in state.items() if k != "diffusion_pos_embed_learned"}, tmp_path / "b.safetensors"
    )
    with pytest.raises(CheckpointError, match="belongs to another kind of model"):
        load(tmp_path / "b.safetensors")
    cut = {**state, "diffusion_pos_embed_learned": state["diffusion_pos_embed_learned"][:, :15].clone()}
    save_file(cut, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="15 tokens per image, which are no square grid"):
        load(tmp_path / "c.safetensors")
    save_file({**state, "surplus": torch.zeros(1)}, tmp_path / "d.safetensors")
    with pytest.raises(CheckpointError, match="surplus"):
        load(tmp_path / "d.safetensors")
    with pytest.raises(CheckpointError, match="no weights file"):
        load(tmp_path / "e.safetensors")


PARAMETERS = {"base": (207_924_768, 364), "large": (478_326_304, 476), "huge": (942_403_104, 604)}
"""Parameters and tensors of the published sizes."""


@pytest.mark.parametrize("size", PRESETS)
def test_published_sizes(size: str) -> None:
    with torch.device("meta"):
        model = MARTransformer.from_preset(size)
    assert (sum(p.numel() for p in model.parameters()), len(list(model.parameters()))) == PARAMETERS[size]
    assert not list(model.buffers())
    assert (model.num_tokens, model.channels, model.buffer) == (256, 16, 64)


def test_presets_can_be_changed() -> None:
    with torch.device("meta"):
        model = MARTransformer.from_preset("base", grid_size=8, encoder_depth=1)
    assert (model.num_tokens, len(model.encoder_blocks), len(model.decoder_blocks)) == (64, 1, 12)
    with pytest.raises(InputError, match="did you mean 'large'"):
        MARTransformer.from_preset("larg")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "at least 1"),
        ({"head_depth": 0}, "at least 1"),
        ({"buffer_size": 0}, "at least 1"),
        ({"num_heads": 5}, "multiples"),
        ({"decoder_dim": 30}, "multiples"),
        ({"condition_type": "clas"}, "did you mean 'class'"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {"dim": 16, "num_heads": 4, "encoder_depth": 1, "decoder_depth": 1}
    with pytest.raises(InputError, match=message):
        MARTransformer(**sizes | {"head_width": 8, "head_depth": 1} | changes)


def test_a_decoder_of_its_own_width() -> None:
    """Published models have none, but the layout allows it."""
    model = MARTransformer(
        dim=16,
        num_heads=2,
        encoder_depth=1,
        decoder_depth=1,
        decoder_dim=24,
        decoder_heads=3,
        grid_size=2,
        token_channels=4,
        buffer_size=2,
        num_classes=3,
        head_depth=1,
        head_width=8,
    ).eval()
    slots = model.embed_condition(torch.tensor([0, 2]))
    with torch.no_grad():
        assert model(slots, torch.randn(2, 1, 4), torch.tensor([[3], [0]])).shape == (2, 4, 24)
    encoder, decoder = model.new_caches(2)
    assert encoder.keys.shape == (1, 2, 2, 7, 8)
    assert decoder.keys.shape == (1, 2, 3, 7, 8)


@pytest.mark.parametrize("convert", ["pipe.to", "to", "to device", "half", "bfloat16", "module"])
def test_the_head_stays_in_float32_however_the_network_is_converted(convert: str) -> None:
    pipe: Any = tiny.new_pipeline("mar-class")
    network = pipe.transformer
    before = {name: value.clone() for name, value in network.state_dict().items()}
    dtype = torch.float16 if convert == "half" else torch.bfloat16
    {
        "pipe.to": lambda: pipe.to(torch.bfloat16),
        "to": lambda: network.to(torch.bfloat16),
        "to device": lambda: network.to("cpu", torch.bfloat16),
        "half": network.half,
        "bfloat16": network.bfloat16,
        "module": lambda: nn.ModuleList([network]).to(torch.bfloat16),
    }[convert]()
    for name, value in network.state_dict().items():
        head = name.startswith("diffloss.")
        if convert == "module":  # an outer module converts tensor by tensor and asks nobody
            continue
        assert value.dtype == (torch.float32 if head else dtype), name
        assert torch.equal(value.float(), before[name].to(value.dtype).float())
    assert len(pipe(1, seed=0).images) == 1
