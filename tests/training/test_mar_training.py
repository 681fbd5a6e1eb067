"""Training of masked models: what is hidden, what it costs, and that it is learnt."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from varaccel.errors import CheckpointError, InputError
from varaccel.models.mar import MARTransformer
from varaccel.nn.noise_schedule import DiffusionSchedule
from varaccel.training.conditions import label_condition
from varaccel.training.mar import (
    DiffusionLoss,
    MARObjective,
    MARRecipe,
    initialise,
    optimizers,
    train_mar,
)
from varaccel.training.run import Budget, TrainingRun
from varaccel.training.tokens import Condition

TOKENS, CHANNELS, CLASSES, SAMPLES, SCALE = 9, 2, 3, 24, 0.5
RECIPE = MARRecipe(batch_size=8, warmup_steps=3, condition_dropout=0.2, ema_decay=0.8, repeats=2)
STEADY = MARRecipe(
    batch_size=4, warmup_steps=1, decay=1e-9, repeats=1
)  # the rate must not depend on the budget


def model(seed: int = 0, **changes: object) -> MARTransformer:
    sizes: dict[str, object] = {
        "dim": 16,
        "encoder_depth": 1,
        "decoder_depth": 1,
        "num_heads": 2,
        "grid_size": 3,
        "token_channels": CHANNELS,
        "buffer_size": 2,
        "num_classes": CLASSES,
        "caption_dim": 6,
        "head_depth": 1,
        "head_width": 16,
        "noise_schedule": "linear",
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MARTransformer(**{**sizes, **changes})


def data() -> tuple[Tensor, Condition]:
    """Latents around a random pattern per class."""
    labels = torch.arange(SAMPLES) % CLASSES
    patterns = 2 * torch.randn(CLASSES, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(1))
    mean = patterns[labels]
    return torch.stack([mean, torch.full_like(mean, 0.1)], 1), label_condition(labels, CLASSES, "cpu")


def train(
    folder: Path, steps: int, recipe: MARRecipe = RECIPE, **options: Any
) -> tuple[MARTransformer, TrainingRun]:
    trained = model()
    run = train_mar(
        trained, data()[0], SCALE, data()[1], folder, budget=Budget(steps=steps), recipe=recipe, **options
    )
    return trained, run


def objective(trained: MARTransformer | None = None, recipe: MARRecipe = RECIPE) -> MARObjective:
    return MARObjective(trained or model(), data()[0], SCALE, data()[1], recipe)


# -- what is hidden ------------------------------------------------------------------------------------


@pytest.mark.parametrize("least", [0.3, 0.5, 0.7, 1.0])
def test_hidden_tokens(least: float) -> None:
    """Between the least share and all of them; as many are asked for, and none of these is shown."""
    recipe = MARRecipe(least_hidden=least, repeats=3)
    ours, generator = objective(recipe=recipe), torch.Generator().manual_seed(0)
    asked, counts = math.ceil(TOKENS * least), []
    for _ in range(40):
        masked = ours.hide(torch.arange(8), generator)
        assert masked.asked.shape == (8, asked)
        assert masked.known.shape == (8, TOKENS - asked)
        assert masked.steps.shape == (8 * asked * 3,)
        assert masked.noise.shape == (8 * asked * 3, CHANNELS)
        assert 0 <= int(masked.steps.min()) <= int(masked.steps.max()) < 1000
        for shown, hidden in zip(masked.known.tolist(), masked.asked.tolist(), strict=True):
            seen = [p for p in shown if p >= 0]
            assert shown == [*seen, *[-1] * (len(shown) - len(seen))], "padding stands at the end"
            assert len({*seen, *hidden}) == len(seen) + len(hidden), "disjoint, and each once"
            assert {*seen, *hidden} <= set(range(TOKENS))
            counts.append(TOKENS - len(seen))
    assert asked <= min(counts)
    assert max(counts) == TOKENS
    if least == 0.3:
        # ceil(N share), the share from a normal distribution around 1 with deviation 1/4, cut to [0.3, 1]
        below = 0.5 * (1 + math.erf((least - 1) / 0.25 / math.sqrt(2)))
        for hidden in range(asked, TOKENS):
            share = 0.5 * (1 + math.erf((hidden / TOKENS - 1) / 0.25 / math.sqrt(2)))
            expected = (share - below) / (0.5 - below)
            found = sum(count <= hidden for count in counts) / len(counts)
            assert found == pytest.approx(expected, abs=0.09)
    if least < 1:
        assert min(counts) < TOKENS


def test_which_tokens_are_hidden_is_a_matter_of_chance() -> None:
    ours, generator = objective(), torch.Generator().manual_seed(0)
    hits = torch.zeros(TOKENS)
    for _ in range(100):
        masked = ours.hide(torch.arange(8), generator)
        hits += torch.bincount(masked.asked.flatten(), minlength=TOKENS)
        assert len({tuple(sorted(row)) for row in masked.asked.tolist()}) > 1
    shares = hits / 800
    assert torch.allclose(shares, torch.full_like(shares, 5 / 9), atol=0.06)


def test_latents_are_drawn_anew_and_scaled() -> None:
    ours, generator = objective(), torch.Generator().manual_seed(0)
    indices = torch.tensor([0, 5, 7])
    drawn = torch.stack([ours.hide(indices, generator).tokens for _ in range(200)])
    mean, std = data()[0][indices].unbind(1)
    torch.testing.assert_close(drawn.mean(0), SCALE * mean, atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.std(0), SCALE * std, atol=0.015, rtol=0)


# -- what it costs -------------------------------------------------------------------------------------


class Stub(nn.Module):
    """A head that predicts given numbers."""

    def __init__(self, predicted: Tensor, place: Tensor) -> None:
        super().__init__()
        self.predicted, self.place = nn.Parameter(predicted), nn.Parameter(place)
        self.seen = torch.empty(0)

    def forward(self, x: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        self.seen = x
        return torch.cat([self.predicted, self.place], -1)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_loss_by_definition(kind: Any) -> None:
    """Squared error of the noise; divergence of two Gaussians in bits, or the density of the token at the start."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.tensor([0, 0, 1, 2, 50, 300, 700, 950])
    values, noise = (torch.randn(8, 3, generator=generator) for _ in range(2))
    # predictions that are nearly right, as errors are multiplied by thousands at the noisy end
    predicted = noise + 0.01 * torch.randn(8, 3, generator=generator)
    place = torch.rand(8, 3, generator=generator) * 2.4 - 1.2
    head: Any = Stub(predicted, place)
    schedule = DiffusionSchedule.trained(kind)
    error, divergence = DiffusionLoss(schedule)(head, values, torch.zeros(8, 1), steps, noise)

    exact = [part.double() for part in (values, noise, predicted, place)]
    for row, step in enumerate(steps.tolist()):
        value, epsilon, said, where = (part[row] for part in exact)
        level = schedule.alphas_cumprod[step]
        before = schedule.alphas_cumprod[step - 1] if step else torch.ones((), dtype=torch.float64)
        beta = 1 - level / before
        noised = level.sqrt() * value + (1 - level).sqrt() * epsilon
        torch.testing.assert_close(head.seen[row].double(), noised, atol=1e-6, rtol=1e-6)

        def posterior(clean: Tensor, noised: Tensor = noised, **at: Tensor) -> Tensor:
            alpha = 1 - at["beta"]
            front = at["before"].sqrt() * at["beta"] * clean + alpha.sqrt() * (1 - at["before"]) * noised
            return front / (1 - at["level"])

        at = {"level": level, "before": before, "beta": beta}
        guess = posterior((noised - (1 - level).sqrt() * said) / level.sqrt(), **at)
        true = posterior(value, **at)
        share = (where + 1) / 2
        variance = (share * schedule.log_beta[step] + (1 - share) * schedule.log_posterior[step]).exp()
        if step:
            smallest = beta * (1 - before) / (1 - level)
            cost = 0.5 * ((variance / smallest).log() - 1 + (smallest + (true - guess) ** 2) / variance)
        else:
            cost = -torch.distributions.Normal(guess, variance.sqrt()).log_prob(value)
        assert float(error[row].detach()) == pytest.approx(float(((said - epsilon) ** 2).mean()), rel=1e-3)
        expected = float(cost.mean()) / math.log(2)
        assert float(divergence[row].detach()) == pytest.approx(expected, rel=2e-3, abs=2e-3)

    (error + divergence).sum().backward()
    assert head.place.grad.abs().min() > 0
    # the divergence leaves the mean alone
    torch.testing.assert_close(head.predicted.grad, 2 * (predicted - noise) / 3)


def test_a_perfect_prediction_costs_nothing() -> None:
    noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    head: Any = Stub(noise, torch.full((5, 3), -1.0))
    steps = torch.tensor([1, 20, 300, 700, 900])
    error, divergence = DiffusionLoss(DiffusionSchedule.trained("linear"))(
        head, torch.ones(5, 3), torch.zeros(5, 1), steps, noise
    )
    assert error.max() == 0
    assert float(divergence.detach().abs().max()) < 1e-3


def test_validation_repeats_itself() -> None:
    ours = objective(opinionated())
    first, again = (ours.validate(torch.arange(8)) for _ in range(2))
    assert first == again
    assert float(first["loss"]) == pytest.approx(float(first["error"] + first["divergence"]))
    assert float(first["loss"]) != float(ours.validate(torch.arange(8, 16))["loss"])
    nothing = torch.zeros(8, dtype=torch.bool)
    batches = (torch.arange(8), torch.arange(8), torch.arange(8).flip(0))
    losses = [float(ours.loss(batch, nothing).detach()) for batch in batches]
    assert losses[0] == losses[1], "a step hides what it would in a resumed run"
    assert losses[0] != losses[2], "the same samples in another batch show other tokens"


def opinionated(seed: int = 0, **changes: object) -> MARTransformer:
    """A model whose predictions depend on everything."""
    made = model(seed, **changes)
    initialise(made, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "adaLN" in name or "final_layer" in name or name == "fake_latent":
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    return made


def test_dropped_conditions_are_the_missing_one() -> None:
    """The loss of dropped samples is that of samples whose condition never was one, for classes and captions."""
    indices, dropped = torch.arange(8), torch.arange(8) % 2 == 0
    latents, _ = data()
    features = torch.randn(SAMPLES, 2, 6, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[True, True], [True, False]])[torch.arange(SAMPLES) % 2]
    captions = opinionated(condition_type="caption")

    def loss(features: Tensor, mask: Tensor, dropped: Tensor) -> float:
        ours = MARObjective(captions, latents, SCALE, lambda i: (features[i], mask[i]), RECIPE)
        return float(ours.loss(indices, dropped).detach())

    nobody = torch.zeros(8, dtype=torch.bool)
    # a caption without a single word is no condition
    without = mask & ~torch.cat([dropped, torch.zeros(SAMPLES - 8, dtype=torch.bool)]).unsqueeze(1)
    assert loss(features, mask, dropped) == pytest.approx(loss(features, without, nobody), rel=1e-6)
    other = torch.where(without.unsqueeze(-1), features, 5.0)
    assert loss(other, mask, dropped) == pytest.approx(loss(features, mask, dropped), rel=1e-6)
    assert loss(features, mask, dropped) != pytest.approx(loss(features, mask, nobody), rel=1e-6)

    classes = opinionated()
    with torch.no_grad():
        twin = opinionated()
        twin.class_emb.weight.copy_(twin.fake_latent.expand(CLASSES, -1))
    everybody = ~nobody
    expected = float(objective(twin).loss(indices, nobody).detach())
    assert float(objective(classes).loss(indices, everybody).detach()) == pytest.approx(expected, rel=1e-6)
    assert float(objective(classes).loss(indices, nobody).detach()) != pytest.approx(expected, rel=1e-6)


def test_gradients_reach_every_weight() -> None:
    trained = opinionated()
    dropped = torch.arange(8) % 2 == 0
    objective(trained).loss(torch.arange(8), dropped).backward()
    for name, parameter in trained.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


# -- training ------------------------------------------------------------------------------------------


def test_learns_what_belongs_to_a_condition(tmp_path: Path) -> None:
    trained, run = train(tmp_path, 120, validation=8)
    history = run.history()
    last = history[-1]
    assert last["ema_validation_error"] < 0.7 < history[0]["loss"]
    assert last["ema_validation_loss"] == pytest.approx(
        last["ema_validation_error"] + last["ema_validation_divergence"], abs=1e-4
    )
    assert history[-2]["loss"] < 0.8 * history[0]["loss"]
    assert not trained.training


def test_resumes_where_it_stopped(tmp_path: Path) -> None:
    """A run in two parts is the run in one."""
    train(tmp_path / "parts", 4, STEADY, validation=4)
    parts, run = train(tmp_path / "parts", 9, STEADY, validation=4)
    assert run.step == 9
    whole, _ = train(tmp_path / "whole", 9, STEADY, validation=4)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, atol=1e-6, rtol=1e-5, msg=name)
    early, _ = train(tmp_path / "early", 4, STEADY, validation=4)
    assert not torch.allclose(early.z_proj.weight, whole.z_proj.weight, atol=1e-4)
    with pytest.raises(CheckpointError, match=r"other settings \(recipe\)"):
        train(tmp_path / "parts", 10, RECIPE, validation=4)
    with pytest.raises(CheckpointError, match=r"other settings \(tokenizer\)"):
        train(tmp_path / "parts", 10, STEADY, validation=4, settings={"tokenizer": "other"})


def test_going_on_from_given_weights(tmp_path: Path) -> None:
    trained = opinionated()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    train_mar(
        trained,
        *(data()[0], SCALE, data()[1], tmp_path),
        budget=Budget(steps=1),
        recipe=STEADY,
        validation=4,
        from_scratch=False,
    )
    moved = [float((value - before[name]).abs().max()) for name, value in trained.state_dict().items()]
    assert 0 < max(moved) < 0.1
    fresh = model()
    initialise(fresh, torch.Generator().manual_seed(STEADY.seed))
    assert not torch.allclose(fresh.class_emb.weight, before["class_emb.weight"] + 0.1)


def test_initialisation() -> None:
    """Same seed, same weights; the head starts without an opinion."""
    made, again, other = model(), model(1), model()
    for each, seed in ((made, 3), (again, 3), (other, 4)):
        initialise(each, torch.Generator().manual_seed(seed))
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))
    assert not torch.equal(made.z_proj.weight, other.z_proj.weight)
    said = made.head(torch.randn(4, CHANNELS), torch.tensor([0, 1, 500, 999]), torch.randn(4, 16))
    assert not said.any()
    bound = math.sqrt(6 / (16 + 48))
    weight = made.encoder_blocks[0].attn.qkv.weight.detach()
    assert 0.95 * bound < float(weight.abs().max()) <= bound
    for table in (made.class_emb.weight, made.mask_token, made.decoder_pos_embed_learned):
        assert 0 < float(table.detach().std()) < 0.03
    for norm in (
        made.z_proj_ln,
        made.encoder_norm,
        made.decoder_blocks[0].norm2,
        made.head.res_blocks[0].in_ln,
    ):
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()


def test_muon_gets_the_matrices_of_attention_and_feed_forward() -> None:
    made = model(encoder_depth=2, head_depth=2)
    (muon, _), (adam, _) = optimizers(made, RECIPE)
    ours, theirs = ([p for g in o.param_groups for p in g["params"]] for o in (muon, adam))
    names = {id(p): n for n, p in made.named_parameters()}
    assert len(ours) == 4 * 3
    assert len(ours) + len(theirs) == len(names)
    assert not [names[id(p)] for p in ours if "diffloss" in names[id(p)] or p.dim() != 2]


# -- what cannot be used -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"least_hidden": 0}, {"least_hidden": 1.1}, {"hidden_spread": 0}, {"repeats": 0}], ids=str
)
def test_bad_recipes(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="a MAR recipe needs"):
        MARRecipe(**options)


def test_bad_input(tmp_path: Path) -> None:
    latents, condition = data()

    def start(latents: Tensor, **options: Any) -> None:
        train_mar(model(), latents, SCALE, condition, tmp_path, budget=Budget(steps=1), **options)

    for wrong in (latents[:, 0], latents[:, :1], latents[:, :, :8], latents[..., :1], latents.flatten(2)):
        with pytest.raises(InputError, match=r"the model needs \[M, 2, 9, 2\]"):
            start(wrong)
    with pytest.raises(InputError, match="do not fill a batch"):
        start(latents, validation=SAMPLES - 2, recipe=STEADY)
    assert not list(tmp_path.iterdir()), "nothing was started"
