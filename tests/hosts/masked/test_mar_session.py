"""Masked sessions and the step loop of the head: samplers, orders, noise and caches against their definitions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tiny import mar_transformer
from varaccel.engine.canvas import Canvas
from varaccel.engine.loop import decode
from varaccel.engine.randomness import image_generators
from varaccel.errors import InputError
from varaccel.hosts.masked import denoising
from varaccel.hosts.masked.denoising import Denoised, HeadSampling, Process, denoising_step, step_table
from varaccel.hosts.masked.guidance import MaskedGuidance
from varaccel.hosts.masked.noise import TokenNoise
from varaccel.hosts.masked.schedule import CosineGroups, MaskedInputs, cosine_borders
from varaccel.hosts.masked.session import FeatureCacheSession, MaskedSession
from varaccel.models.mar import MARTransformer, rows_of
from varaccel.nn.condition import Condition
from varaccel.nn.noise_schedule import DiffusionSchedule

TOKENS, CHANNELS, BUFFER, BATCH = 16, 4, 8, 3
CLOSE = {"atol": 2e-5, "rtol": 0.0}
GUIDED = MaskedGuidance(3.0)
SAMPLING = HeadSampling(6)


@cache
def network(kind: str = "class") -> MARTransformer:
    """A random model; shared by tests, so nobody may change it."""
    return mar_transformer(kind).requires_grad_(False)


def condition(kind: str = "class") -> tuple[Tensor, Tensor | None]:
    """Three images' labels, or captions of 8, 1 and 4 words with noise after them."""
    if kind == "class":
        return torch.tensor([3, 0, 4]), None
    features = torch.randn(BATCH, BUFFER, 16, generator=torch.Generator().manual_seed(5)) * 3
    return features, torch.arange(BUFFER) < torch.tensor([[8], [1], [4]])


def noise(batch: int = BATCH, seed: int = 7, positions: int = TOKENS) -> TokenNoise:
    return TokenNoise.draw(image_generators(batch, seed=seed), positions, CHANNELS, torch.device("cpu"))


def canvas() -> Canvas:
    return Canvas.empty(BATCH, TOKENS, channels=CHANNELS)


def drawn(session: MaskedSession, iterations: int = TOKENS) -> Tensor:
    """Tokens of plain decoding."""
    numbers, page = noise(), canvas()
    decode(session, page, CosineGroups(numbers.permutation, iterations), numbers)
    assert page.is_full
    return page.tokens


def half_drawn(iterations: int = 6, done: int = 4) -> tuple[Canvas, list[MaskedInputs]]:
    """A canvas on which the first iterations have written random numbers, and all feeds."""
    page = canvas()
    step_inputs = CosineGroups(noise().permutation, iterations).step_inputs(page)
    generator = torch.Generator().manual_seed(1)
    for number, inputs in enumerate(step_inputs[:done], start=1):
        values = torch.randn(*inputs.positions.shape, CHANNELS, generator=generator)
        page.write(inputs.positions, values, number)
    return page, step_inputs


# -- samplers ------------------------------------------------------------------------------------------

MEAN, STD = 0.7, 0.4


class GaussianHead(nn.Module):
    """What a perfectly trained head says of data that are Gaussian: the expected noise in a token.

    Args:
        place: of the variance, between the smallest (-1) and the largest (1).
    """

    def __init__(self, kind: str = "linear", place: float = -1.0) -> None:
        super().__init__()
        self.input_proj, self.cond_embed = nn.Linear(1, 1), nn.Linear(1, 1)
        self.depth, self.width, self.place = 1, 1, place
        self.levels = DiffusionSchedule.trained(kind).alphas_cumprod
        self.calls = 0

    def time_embed(self, timesteps: Tensor) -> Tensor:
        return self.levels[timesteps].unsqueeze(1)

    def modulations(self, times: Tensor, conditions: Tensor) -> list[Tensor]:
        self.calls += 1
        return [times.expand(-1, conditions.shape[0], -1)]

    def step(self, x: Tensor, modulations: list[Tensor]) -> Tensor:
        level = modulations[0]
        centred = x.double() - level.sqrt() * MEAN
        predicted = (1 - level).sqrt() * centred / (level * STD**2 + 1 - level)
        return torch.cat([predicted.float(), torch.full_like(predicted.float(), self.place)], -1)


def start(count: int = 64) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(0))


def sampled(steps: int, sampler: Any, x: Tensor, **options: Any) -> Tensor:
    process = Process.of(GaussianHead(), "linear", HeadSampling(steps, sampler=sampler, **options))
    numbers = None
    if sampler == "ddpm":
        numbers = torch.randn(steps, *x.shape, generator=torch.Generator().manual_seed(1))
    return process.run(torch.zeros(len(x), 1), x, numbers).value


def limit(x: Tensor) -> Tensor:
    """Where the path without noise leads in the limit of many steps: distances to the mean keep their rank."""
    last = DiffusionSchedule.trained("linear").alphas_cumprod[-1]
    return MEAN + STD * (x - last.sqrt() * MEAN) / (last * STD**2 + 1 - last).sqrt()


def test_ddim_is_that_of_diffusers() -> None:
    """With all 1000 steps; with fewer it takes other ones."""
    scheduler = DDIMScheduler(
        1000, beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="linspace"
    )
    scheduler.set_timesteps(1000)
    head, x = GaussianHead(), start()
    assert torch.equal(scheduler.timesteps.flip(0), DiffusionSchedule.respaced(1000, "linear").timesteps)
    theirs = x
    for step in scheduler.timesteps:
        told = head.modulations(head.time_embed(step[None])[None], theirs)
        said, _ = head.step(theirs, told).chunk(2, -1)
        theirs = scheduler.step(said[0] if said.dim() == 3 else said, step, theirs).prev_sample
    torch.testing.assert_close(sampled(1000, "ddim", x), theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
def test_ddim_by_definition(steps: int, kind: Any) -> None:
    """x0 and noise are mixed anew at the next level (2010.02502, equation 12 without its noise)."""
    schedule = DiffusionSchedule.respaced(steps, kind)
    table = step_table(schedule, "ddim")
    levels = [1.0, *schedule.alphas_cumprod.tolist()]
    x, said = (
        torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1)
    )
    for k in range(steps):
        after, before = levels[k], levels[k + 1]
        begin = (x - math.sqrt(1 - before) * said) / math.sqrt(before)
        expected = math.sqrt(after) * begin + math.sqrt(1 - after) * said
        row = table[k]
        ours = row[2] * (row[0] * x - row[1] * said) + row[3] * x
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)
    assert (table[:, 6] == 0).all()


@pytest.mark.parametrize("steps", [2, 3, 5, 20, 60])
def test_dpm_solver_is_that_of_diffusers(steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(
        1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    schedule = DiffusionSchedule.respaced(steps, "linear")
    scheduler.set_timesteps(timesteps=schedule.timesteps.flip(0).tolist())
    head, x = GaussianHead(), start()
    theirs = x
    for step in scheduler.timesteps:
        told = head.modulations(head.time_embed(step[None])[None], theirs)
        said, _ = head.step(theirs, told).chunk(2, -1)
        theirs = scheduler.step(said[0] if said.dim() == 3 else said, step, theirs).prev_sample
    torch.testing.assert_close(sampled(steps, "dpm++", x), theirs, atol=1e-3, rtol=0)
    if steps > 2:
        assert not torch.allclose(theirs, sampled(steps, "ddim", x), atol=1e-3), "second order shows"


def test_samplers_without_noise_agree_in_the_limit() -> None:
    """The error falls with the steps, that of the second order with their square."""
    x = start()

    def error(steps: int, sampler: str) -> float:
        return float((sampled(steps, sampler, x) - limit(x)).abs().max())

    first, second = ([error(steps, sampler) for steps in (100, 200, 400)] for sampler in ("ddim", "dpm++"))
    assert all(1.7 < a / b < 2.3 for a, b in pairwise(first))
    assert all(3.5 < a / b < 6 for a, b in pairwise(second))
    assert all(b < a for a, b in zip(first, second, strict=True))
    assert second[-1] < 0.002


@pytest.mark.parametrize("final_noise", [False, True])
def test_noisy_sampler_follows_the_distribution(final_noise: bool) -> None:
    x = start(20_000)
    tokens = sampled(1000, "ddpm", x, final_noise=final_noise)
    assert float(tokens.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(tokens.std()) == pytest.approx(STD, rel=0.01)
    correlation = torch.corrcoef(torch.stack([tokens[:, 0], x[:, 0]]))[0, 1]
    assert abs(float(correlation)) < 0.03, "little is left of where a path started"


def test_temperature_scales_noise_but_not_the_start() -> None:
    """Every step is mean + temperature * std * noise; the variances do not change."""
    head, x = GaussianHead(place=0.3), start()
    numbers = torch.randn(3, *x.shape, generator=torch.Generator().manual_seed(1))
    nothing = torch.zeros(len(x), 1)
    for temperature in (0.5, 1.0, 2.0):
        for final_noise in (False, True):
            process = Process.of(head, "linear", HeadSampling(3, temperature, final_noise=final_noise))
            value = x
            for k in (2, 1, 0):
                row = process.table[k]
                mean, place, _ = denoising_step(
                    head,
                    value,
                    head.modulations(process.times[k : k + 1], nothing),
                    row,
                    None,
                    None,
                )
                mean, log_std = mean.reshape(x.shape), (place * row[2] + row[3]).reshape(x.shape)
                spread = temperature * log_std.exp() * numbers[k]
                value = mean + (spread if k or final_noise else 0)
            out = process.run(nothing, x, numbers, record=True)
            torch.testing.assert_close(out.value, value)
            torch.testing.assert_close(out.mean, mean)
            torch.testing.assert_close(out.log_std, log_std + math.log(temperature))
            assert torch.equal(out.value, out.mean) == (not final_noise)


def test_recorded_deviations_are_those_of_all_steps_but_the_last() -> None:
    head, x = network().head, torch.randn(5, CHANNELS, generator=torch.Generator().manual_seed(2))
    told = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    numbers = torch.randn(6, 5, CHANNELS, generator=torch.Generator().manual_seed(4))
    process = Process.of(head, "linear", HeadSampling(6, 0.7))
    with torch.no_grad():
        total, value = torch.zeros_like(x), x
        for k in (5, 4, 3, 2, 1):
            part = process.run(told, value, numbers, first=k, last=k)
            total, value = total + part.log_std - math.log(0.7), part.value
        out = process.run(told, x, numbers, record=True)
        torch.testing.assert_close(out.log_std_sum, total)
        early = process.run(told, x, numbers, last=3, record=True)
        rest = process.run(told, early.value, numbers, first=2, record=True)
        torch.testing.assert_close(early.log_std_sum + rest.log_std_sum, total)
        torch.testing.assert_close(rest.value, out.value)
        assert not process.run(told, x, numbers).log_std_sum.any()
    assert total.std() > 0.01


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("guided", [False, True])
def test_steps_in_portions(guided: bool, sampler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows from the condition may be worked out for any number of steps at once."""
    head, generator = network().head, torch.Generator().manual_seed(2)
    x = torch.randn(5, CHANNELS, generator=generator)
    told = torch.randn(10 if guided else 5, 32, generator=generator)
    numbers = torch.randn(11, 5, CHANNELS, generator=generator) if sampler == "ddpm" else None
    scale = torch.linspace(1, 3, 5).unsqueeze(1) if guided else None
    process = Process.of(head, "linear", HeadSampling(11, sampler=sampler))
    with torch.no_grad():
        whole = process.run(told, x, numbers, scale, record=True)
        one_step = len(told) * (3 * head.depth + 2) * head.width * 4
        calls: list[int] = []
        honest = head.modulations

        def counted(times: Tensor, conditions: Tensor) -> list[Tensor]:
            calls.append(len(times))
            return honest(times, conditions)

        monkeypatch.setattr(head, "modulations", counted)
        for together, expected in ((1, [1] * 11), (4, [4, 4, 3]), (99, [11])):
            monkeypatch.setattr(denoising, "HOST_MODULATION_BYTES", together * one_step)
            calls.clear()
            parts = process.run(told, x, numbers, scale, record=True)
            assert calls == expected
            for name in ("value", "mean", "log_std", "log_std_sum"):
                torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=1e-5, rtol=1e-5)
        monkeypatch.setattr(denoising, "HOST_MODULATION_BYTES", 0)
        torch.testing.assert_close(process.run(told, x, numbers, scale).value, whole.value, **CLOSE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "head_steps"),
        ({"steps": 2.5}, "head_steps"),
        ({"steps": True}, "head_steps"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"sampler": "ddmp"}, "did you mean 'ddpm'"),
        ({"sampler": "ddim", "temperature": 0.9}, "adds no noise"),
        ({"sampler": "dpm++", "final_noise": True}, "adds no noise"),
    ],
    ids=str,
)
def test_sampling_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        HeadSampling(**options)


@pytest.mark.parametrize(("steps", "kind"), [(0, "cosine"), (1001, "cosine"), (1001, "linear"), (10, "sqrt")])
def test_schedules_that_cannot_be(steps: int, kind: Any) -> None:
    with pytest.raises(InputError):
        DiffusionSchedule.respaced(steps, kind)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_respaced_schedules_are_of_the_same_process(steps: int, kind: Any) -> None:
    """Levels at the chosen steps are those of all 1000; everything is finite."""
    schedule, full = DiffusionSchedule.respaced(steps, kind), DiffusionSchedule.trained(kind)
    assert schedule.steps == steps
    torch.testing.assert_close(
        schedule.alphas_cumprod, full.alphas_cumprod[schedule.timesteps], atol=1e-15, rtol=1e-6
    )
    assert schedule.timesteps[0] == 0
    assert steps == 1 or schedule.timesteps[-1] == 999
    for sampler in ("ddpm", "ddim", "dpm++"):
        assert step_table(schedule, sampler).isfinite().all()


def test_linear_betas() -> None:
    betas = DiffusionSchedule.trained("linear").betas
    torch.testing.assert_close(
        betas, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), atol=1e-12, rtol=1e-9
    )


# -- orders --------------------------------------------------------------------------------------------

GROUPS = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@given(GROUPS)
def test_borders_are_a_cosine(sizes: tuple[int, int]) -> None:
    tokens, iterations = sizes
    borders = cosine_borders(tokens, iterations)
    assert (len(borders), borders[0], borders[-1]) == (iterations + 1, tokens, 0)
    assert all(before > after for before, after in pairwise(borders))
    for step in range(1, iterations):
        wanted = math.floor(tokens * math.cos(math.pi / 2 * step / iterations))
        # one token at least in each iteration, and one left for the last
        assert borders[step] == max(1, min(borders[step - 1] - 1, wanted))
    assert len(set(borders)) == iterations + 1


@settings(deadline=None, max_examples=60)
@given(GROUPS, st.integers(0, 2**31), st.integers(1, 3))
def test_every_position_is_decided_once(sizes: tuple[int, int], seed: int, batch: int) -> None:
    tokens, iterations = sizes
    numbers = noise(batch, seed, tokens)
    order = CosineGroups(numbers.permutation, iterations)
    step_inputs = order.step_inputs(Canvas.empty(batch, tokens, channels=1))
    assert len(step_inputs) == iterations
    known = torch.zeros(batch, 0, dtype=torch.int64)
    for number, inputs in enumerate(step_inputs):
        assert inputs.number == number
        assert not inputs.padded
        assert torch.equal(inputs.known.sort(1).values, known.sort(1).values), "what was decided before"
        assert inputs.positions.shape[1] >= 1
        known = torch.cat([known, inputs.positions], 1)
        assert inputs.remaining == max(1, tokens - known.shape[1])
        assert inputs.share(tokens) == (tokens - inputs.remaining) / tokens
    assert torch.equal(known.sort(1).values, torch.arange(tokens).expand(batch, -1))
    assert order.widest == max(inputs.positions.shape[1] for inputs in step_inputs)
    # the last entries of the order come first
    assert torch.equal(step_inputs[0].positions[:, -1], numbers.permutation[:, -1])


@settings(deadline=None, max_examples=60)
@given(GROUPS, st.integers(0, 2**31), st.data())
def test_ragged_iterations_are_the_plain_ones(sizes: tuple[int, int], seed: int, data: st.DataObject) -> None:
    tokens, iterations = sizes
    steps = data.draw(st.lists(st.integers(0, iterations + 2), min_size=1, max_size=4))
    numbers = noise(len(steps), seed, tokens)
    order = CosineGroups(numbers.permutation, iterations)
    step_inputs = order.step_inputs(Canvas.empty(len(steps), tokens, channels=1))
    ragged = order.ragged(steps, torch.device("cpu"))
    assert ragged.padded
    assert isinstance(ragged.remaining, Tensor)
    for row, step in enumerate(steps):
        asked, known = (part[row][part[row] >= 0].sort().values for part in (ragged.positions, ragged.known))
        # padding stands at the end
        assert (ragged.known[row, : len(known)] >= 0).all()
        if step >= iterations:
            assert len(asked) == 0
            assert len(known) == tokens
            continue
        assert torch.equal(asked, step_inputs[step].positions[row].sort().values)
        assert torch.equal(known, step_inputs[step].known[row].sort().values)
        assert int(ragged.remaining[row]) == step_inputs[step].remaining
        share = ragged.share(tokens)
        assert isinstance(share, Tensor)
        assert float(share[row]) == pytest.approx(step_inputs[step].share(tokens), abs=1e-6)


@pytest.mark.parametrize("iterations", [0, -1, TOKENS + 1, 2.0, True])
def test_orders_that_cannot_be(iterations: Any) -> None:
    with pytest.raises(InputError, match="num_iterations"):
        CosineGroups(noise().permutation, iterations)


# -- guidance ------------------------------------------------------------------------------------------


def test_guidance_schedules() -> None:
    assert [MaskedGuidance(3.0).at(share) for share in (0.0, 0.25, 1.0)] == [1.0, 1.5, 3.0]
    assert [MaskedGuidance(3.0, "constant").at(share) for share in (0.0, 0.25, 1.0)] == [3.0] * 3
    torch.testing.assert_close(
        MaskedGuidance(5.0).at(torch.tensor([[0.5], [1.0]])), torch.tensor([[3.0], [5.0]])
    )
    assert not any(MaskedGuidance(scale, "constant").enabled for scale in (0, 0.99, 1.0))
    assert MaskedGuidance(1.01).enabled


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, -0.01, -3, "3", None])
def test_guidance_that_cannot_be(scale: Any) -> None:
    with pytest.raises(InputError, match="guidance_scale"):
        MaskedGuidance(scale)


def test_guidance_schedule_that_cannot_be() -> None:
    schedule: Any = "linaer"
    with pytest.raises(InputError, match="did you mean 'linear'"):
        MaskedGuidance(3.0, schedule)


# -- noise ---------------------------------------------------------------------------------------------


def test_noise_of_a_image_does_not_depend_on_its_batch() -> None:
    together = noise(3, seed=10)
    for index in range(3):
        alone = noise(1, seed=10 + index)
        for name in ("permutation", "start", "uniforms"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[index])
        assert alone.seeds[0] == together.seeds[index]
        for count in (4, 9):
            assert torch.equal(alone.steps(count)[0], together.steps(count)[index])
        assert torch.equal(alone.other().start[0], together.other().start[index])
    assert together.steps(4) is together.steps(4)
    assert torch.equal(together.permutation.sort(1).values, torch.arange(TOKENS).expand(3, -1))
    assert len(set(together.seeds)) == 3
    for part in (together.permutation, together.start, together.steps(4)):
        assert not torch.equal(part[0], part[1])


def test_noise_belongs_to_positions() -> None:
    numbers = noise()
    positions = torch.tensor([[3, 0, -1], [15, 7, 2], [1, -1, -1]])
    begin, steps = numbers.paths(positions, 5)
    assert steps is not None
    assert (begin.shape, steps.shape) == ((9, CHANNELS), (5, 9, CHANNELS))
    for row in range(9):
        image, place = divmod(row, 3)
        position = int(positions[image, place])
        if position < 0:
            continue
        assert torch.equal(begin[row], numbers.start[image, position])
        assert torch.equal(steps[:, row], numbers.steps(5)[image, position])
        assert numbers.accepting(positions)[row] == numbers.uniforms[image, position]
    assert numbers.paths(positions, None)[1] is None


def test_other_noise_is_unrelated() -> None:
    numbers = noise(50)
    other = numbers.other()
    assert torch.equal(other.permutation, numbers.permutation), "of the same images"
    assert torch.equal(numbers.other().start, other.start), "and always the same"
    for ours, theirs in ((numbers.start, other.start), (numbers.steps(3), other.steps(3))):
        correlation = torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.06
        assert float(theirs.std()) == pytest.approx(1, abs=0.05)


# -- the network ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class", "caption"])
def test_random_models_have_opinions(kind: str) -> None:
    """The tests below prove something only if conditions and known tokens matter."""
    model, (vectors, mask) = network(kind), condition(kind)
    page, step_inputs = half_drawn()
    inputs = step_inputs[4]
    slots = model.embed_condition(vectors, mask)
    tokens = rows_of(page.tokens, inputs.known)

    def apart(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).abs().amax((1, 2)).min() > 0.01)

    told = model(slots, tokens, inputs.known, inputs.positions)
    assert apart(told, model(slots.roll(1, 0), tokens, inputs.known, inputs.positions))
    assert apart(told, model(model.null_condition().expand_as(slots), tokens, inputs.known, inputs.positions))
    assert apart(told, model(slots, tokens.roll(1, 0), inputs.known, inputs.positions))
    assert apart(told, model(slots, tokens, inputs.known.roll(1, 1), inputs.positions))
    assert apart(told, model(slots, tokens[:, 1:], inputs.known[:, 1:], inputs.positions))


@pytest.mark.parametrize("kind", ["class", "caption"])
def test_padding_changes_nothing(kind: str) -> None:
    model, (vectors, mask) = network(kind), condition(kind)
    page, step_inputs = half_drawn()
    inputs = step_inputs[4]
    slots = model.embed_condition(vectors, mask)
    tokens = rows_of(page.tokens, inputs.known)
    expected = model(slots, tokens, inputs.known, inputs.positions, padded=False)
    torch.testing.assert_close(model(slots, tokens, inputs.known, inputs.positions), expected, **CLOSE)
    known = F.pad(inputs.known, (0, 3), value=-1)
    rubbish = torch.cat([tokens, 100 * torch.randn(BATCH, 3, CHANNELS)], 1)
    torch.testing.assert_close(model(slots, rubbish, known, inputs.positions), expected, **CLOSE)
    asked = F.pad(inputs.positions, (2, 1), value=-1)
    torch.testing.assert_close(model(slots, rubbish, known, asked)[:, 2:-1], expected, **CLOSE)
    everything = model(slots, rubbish, known)
    torch.testing.assert_close(rows_of(everything, inputs.positions), expected, **CLOSE)


def test_captions_fill_their_slots() -> None:
    """Unused slots hold what stands for no condition, whatever the features there."""
    model, (features, mask) = network("caption"), condition("caption")
    assert mask is not None
    slots = model.embed_condition(features, mask)
    other = torch.where(mask.unsqueeze(-1), features, 7.0)
    assert torch.equal(model.embed_condition(other, mask), slots)
    assert torch.equal(slots[~mask], model.fake_latent.expand(int((~mask).sum()), -1))
    torch.testing.assert_close(slots[mask], model.caption_emb(features)[mask])
    with pytest.raises(InputError, match="must have 8 features, padding included, got 7"):
        model.embed_condition(features[:, :7], mask[:, :7])
    labels = network().embed_condition(torch.tensor([2, 1]))
    assert torch.equal(labels, network().class_emb.weight[[2, 1]].unsqueeze(1).expand(-1, BUFFER, -1))


# -- sessions ------------------------------------------------------------------------------------------

SESSIONS = pytest.mark.parametrize("guidance", [MaskedGuidance(), GUIDED], ids=["plain", "guided"])
KINDS = pytest.mark.parametrize("kind", ["class", "caption"])


def session(kind: str = "class", cls: type[MaskedSession] = MaskedSession, **options: Any) -> MaskedSession:
    return cls(network(kind), Condition(*condition(kind)), batch=BATCH, **{"sampling": SAMPLING, **options})


@KINDS
@SESSIONS
def test_prediction_by_definition(kind: str, guidance: MaskedGuidance) -> None:
    """Conditions of both halves are two passes; the scale is that of the iteration."""
    model, page_and_feeds = network(kind), half_drawn()
    page, step_inputs = page_and_feeds
    ours, inputs = session(kind, guidance=guidance), step_inputs[4]
    distribution = ours.predict(page, inputs)
    slots = model.embed_condition(*condition(kind))
    tokens = rows_of(page.tokens, inputs.known)
    told = [model(slots, tokens, inputs.known, inputs.positions)]
    if guidance.enabled:
        told.append(model(model.null_condition().expand_as(slots), tokens, inputs.known, inputs.positions))
        assert distribution.scale is not None
        expected = torch.full(
            (BATCH * inputs.positions.shape[1], 1), guidance.at(1 - step_inputs[4].remaining / TOKENS)
        )
        torch.testing.assert_close(distribution.scale, expected)
    else:
        assert distribution.scale is None
    torch.testing.assert_close(distribution.conditions, torch.cat(told), **CLOSE)
    assert distribution.shape == tuple(inputs.positions.shape)
    assert ours.rows_per_pass == len(told) * BATCH
    assert (ours.reads, ours.cache_bytes) == (1, 0)

    # tokens by definition: one step after the other under guided noise
    numbers = noise()
    begin, steps = numbers.paths(inputs.positions, SAMPLING.steps)
    assert steps is not None
    x = begin
    schedule = DiffusionSchedule.respaced(SAMPLING.steps, "linear")
    for k in reversed(range(SAMPLING.steps)):
        time = schedule.timesteps[k].expand(len(x))
        heads = [model.head(x, time, part.flatten(0, 1)) for part in told]
        said = heads[0][:, :CHANNELS]
        if guidance.enabled:
            other = heads[1][:, :CHANNELS]
            said = other + distribution.scale * (said - other)
        share = (heads[0][:, CHANNELS:] + 1) / 2
        level = float(schedule.alphas_cumprod[k])
        clean = (x - math.sqrt(1 - level) * said) / math.sqrt(level)
        x = float(schedule.mean_start[k]) * clean + float(schedule.mean_noisy[k]) * x
        if k:
            log_variance = share * float(schedule.log_beta[k]) + (1 - share) * float(
                schedule.log_posterior[k]
            )
            x = x + (log_variance / 2).exp() * steps[k]
    torch.testing.assert_close(
        numbers.sample(distribution, inputs.positions).flatten(0, 1), x, atol=1e-4, rtol=1e-4
    )


def test_without_a_condition_there_is_nothing_to_guide() -> None:
    model = network()
    ours = MaskedSession(model, None, batch=BATCH, guidance=GUIDED, sampling=SAMPLING)
    assert ours.rows_per_pass == BATCH
    page, step_inputs = half_drawn()
    distribution = ours.predict(page, step_inputs[4])
    assert distribution.scale is None
    slots = model.null_condition().expand(BATCH, BUFFER, -1)
    tokens = rows_of(page.tokens, step_inputs[4].known)
    expected = model(slots, tokens, step_inputs[4].known, step_inputs[4].positions)
    torch.testing.assert_close(distribution.conditions, expected, **CLOSE)


@KINDS
@SESSIONS
def test_images_at_different_iterations(kind: str, guidance: MaskedGuidance) -> None:
    """A ragged pass says of each image what a pass of its own iteration says."""
    page, step_inputs = half_drawn(done=6)
    order, ours = CosineGroups(noise().permutation, 6), session(kind, guidance=guidance)
    steps = [4, 0, 2]
    ragged = order.ragged(steps, torch.device("cpu"))
    distribution = ours.predict(page, ragged)
    halves = distribution.conditions.unflatten(0, (-1, BATCH))
    for row, step in enumerate(steps):
        alone = ours.predict(page, step_inputs[step])
        expected = alone.conditions.unflatten(0, (-1, BATCH))[:, row]
        # positions of a ragged group stand the other way round
        count = step_inputs[step].positions.shape[1]
        assert torch.equal(ragged.positions[row, :count].flip(0), step_inputs[step].positions[row])
        torch.testing.assert_close(halves[:, row, :count].flip(1), expected, **CLOSE)
        if guidance.enabled:
            assert distribution.scale is not None
            assert alone.scale is not None
            scales = distribution.scale.view(BATCH, -1)[row]
            torch.testing.assert_close(scales[:count], alone.scale.view(BATCH, -1)[row])


@KINDS
@SESSIONS
@pytest.mark.parametrize("keep_unconditional", [True, False])
def test_always_fresh_caches_change_nothing(
    kind: str, guidance: MaskedGuidance, keep_unconditional: bool
) -> None:
    expected = drawn(session(kind, guidance=guidance))
    options = {"guidance": guidance, "refresh": 1, "keep_unconditional": keep_unconditional}
    torch.testing.assert_close(
        drawn(session(kind, FeatureCacheSession, **options)), expected, atol=1e-4, rtol=0
    )


@KINDS
@SESSIONS
@pytest.mark.parametrize("keep_unconditional", [True, False])
def test_nothing_is_stale_in_one_iteration(
    kind: str, guidance: MaskedGuidance, keep_unconditional: bool
) -> None:
    options = {"guidance": guidance, "refresh": 4, "keep_unconditional": keep_unconditional}
    expected = drawn(session(kind, guidance=guidance), 1)
    torch.testing.assert_close(
        drawn(session(kind, FeatureCacheSession, **options), 1), expected, atol=1e-4, rtol=0
    )


class CacheSlots:
    """Keys and values of all slots of a stack of blocks, written and looked at one slot at a time: no cache code."""

    def __init__(self, blocks: Any, rows: int) -> None:
        self.blocks, self.rows = list(blocks), rows
        self.kept: list[list[dict[int, tuple[Tensor, Tensor]]]] = []
        self.forget()

    def forget(self) -> None:
        self.kept = [[{} for _ in self.blocks] for _ in range(self.rows)]

    def read(self, x: Tensor, slots: Tensor) -> Tensor:
        """Inputs [R, P, C] at `slots` [R, P] take the place of what is kept there, and look at everything kept."""
        out = []
        for row, places in enumerate(slots.tolist()):
            hidden = x[row]
            for block, kept in zip(self.blocks, self.kept[row], strict=True):
                heads = block.attn.num_heads
                q, k, v = (
                    block.attn.qkv(block.norm1(hidden)).unflatten(1, (3, heads, -1)).unbind(1)
                )  # [P, H, D]
                kept.update({place: (k[i], v[i]) for i, place in enumerate(places)})
                keys, values = (torch.stack([pair[i] for pair in kept.values()]) for i in (0, 1))
                weights = torch.einsum("phd,khd->hpk", q, keys) / math.sqrt(q.shape[-1])
                mixed = torch.einsum("hpk,khd->phd", weights.softmax(-1), values).flatten(1)
                hidden = hidden + block.attn.proj(mixed)
                hidden = hidden + block.mlp(block.norm2(hidden))
            out.append(hidden)
        return torch.stack(out)


class StaleByDefinition:
    """What a `FeatureCacheSession` is documented to do, in the slowest way."""

    def __init__(self, kind: str, guided: bool, refresh: int, keep_unconditional: bool) -> None:
        self.model = network(kind)
        slots = self.model.embed_condition(*condition(kind))
        if guided:
            slots = torch.cat([slots, self.model.null_condition().expand_as(slots)])
        self.slots = self.model.embed_slots(slots)
        self.refresh, self.keep = refresh, keep_unconditional and guided
        self.encoder = CacheSlots(self.model.encoder_blocks, len(slots))
        self.decoder = CacheSlots(self.model.decoder_blocks, len(slots))
        self.passes, self.known = 0, torch.zeros(BATCH, 0, dtype=torch.int64)
        self.difference = torch.zeros(0)

    def conditions(self, page: Canvas, inputs: MaskedInputs) -> Tensor:
        full = self.passes % self.refresh == 0
        self.passes += 1
        model, rows = self.model, len(self.slots)
        if not full and self.keep:
            rows = BATCH
        asked = inputs.positions.repeat(rows // BATCH, 1)
        seen = {int(p) for p in self.known[0]}
        fresh = (
            inputs.known
            if full
            else torch.stack(
                [
                    torch.tensor([p for p in row if p not in set(self.known[b].tolist())], dtype=torch.int64)
                    for b, row in enumerate(inputs.known.tolist())
                ]
            )
        )
        assert full or fresh.shape[1] == inputs.known.shape[1] - len(seen)
        self.known = inputs.known
        new = fresh.repeat(rows // BATCH, 1)
        tokens = model.embed_tokens(rows_of(page.tokens, fresh).repeat(rows // BATCH, 1, 1), new)
        front = torch.arange(model.buffer).expand(rows, -1)
        if full:
            self.encoder.forget()
            read = torch.cat([self.slots, tokens], 1)
            encoded = model.encoder_norm(self.encoder.read(read, torch.cat([front, new + model.buffer], 1)))
            x = model.spread(encoded, new)
            every = torch.arange(model.buffer + model.num_tokens).expand(rows, -1)
            features = model.decoder_norm(self.decoder.read(x, every))[:, model.buffer :]
            if self.keep:
                conditional, unconditional = features.chunk(2)
                self.difference = unconditional - conditional
            return model.conditions(rows_of(features, asked), asked)
        encoded = model.encoder_norm(self.encoder.read(tokens, new + model.buffer))
        places = torch.cat([new, asked], 1) + model.buffer
        masks = model.mask_token.expand(rows, asked.shape[1], -1)
        x = torch.cat([model.decoder_embed(encoded), masks], 1)
        x = x + torch.stack([model.decoder_pos_embed_learned[0, row] for row in places])
        features = model.decoder_norm(self.decoder.read(x, places))[:, new.shape[1] :]
        if self.keep:
            features = torch.cat([features, features + rows_of(self.difference, asked)])
            asked = asked.repeat(2, 1)
        return model.conditions(features, asked)


@KINDS
@SESSIONS
@pytest.mark.parametrize("keep_unconditional", [True, False])
@pytest.mark.parametrize("refresh", [2, 3])
def test_stale_passes_by_definition(
    kind: str, guidance: MaskedGuidance, keep_unconditional: bool, refresh: int
) -> None:
    """Partial passes renew what they read, look at everything that is kept, and full passes start anew."""
    page, step_inputs = half_drawn(iterations=7, done=7)
    options = {"guidance": guidance, "refresh": refresh, "keep_unconditional": keep_unconditional}
    ours = session(kind, FeatureCacheSession, **options)
    oracle = StaleByDefinition(kind, guidance.enabled, refresh, keep_unconditional)
    exact = session(kind, guidance=guidance)
    for number, inputs in enumerate(step_inputs):
        told = ours.predict(page, inputs).conditions
        torch.testing.assert_close(told, oracle.conditions(page, inputs), **CLOSE)
        plain = exact.predict(page, inputs).conditions
        if number % refresh == 0:
            torch.testing.assert_close(told, plain, **CLOSE)
        else:
            assert not torch.allclose(told, plain, atol=1e-3), "it is an approximation"
    assert ours.reads == len(step_inputs)


def test_caches_are_counted() -> None:
    rows, slots, dim = 2 * BATCH, BUFFER + TOKENS + 1, 32
    guided = session("class", FeatureCacheSession, guidance=GUIDED, refresh=4)
    assert guided.cache_bytes == 2 * 4 * rows * slots * dim * (1 + 2)  # one layer of encoder, two of decoder
    assert session("class", FeatureCacheSession, refresh=4).cache_bytes == guided.cache_bytes // 2


def test_a_session_for_each_call_of_the_network() -> None:
    """`transform`, `step` and `loop` take the place of what they are documented to replace."""
    calls = {"transform": 0, "step": 0, "loop": 0}

    def transform(*arguments: Any, **options: Any) -> Tensor:
        calls["transform"] += 1
        return network()(*arguments, **options)

    def step(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        calls["step"] += 1
        return denoising_step(*arguments)

    def loop(process: Process, *arguments: Any) -> Denoised:
        calls["loop"] += 1
        return process.run_eagerly(*arguments)

    expected = drawn(session(guidance=GUIDED), 5)
    replaced = session(guidance=GUIDED, transform=transform, step=step, loop=loop)
    assert torch.equal(drawn(replaced, 5), expected)
    assert calls == {"transform": 5, "step": 5 * SAMPLING.steps, "loop": 5}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
