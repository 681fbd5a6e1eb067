"""Acceptance rules of continuous speculative decoding: the published decisions, and the distribution of the
exact rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.scripts import ROOT
from varaccel.errors import InputError
from varaccel.speculation.continuous_rejection import (
    Aligned,
    ContinuousRule,
    Decision,
    ExactRule,
    Gaussian,
    PaperRule,
    ReferenceRule,
    SeededResampleNoise,
)

GOLDEN = ROOT / "tests" / "golden" / "mar"
LEVEL = 1e-3  # of every test of a distribution
DRAWS, IMAGES = 100_000, 8
ROWS = DRAWS // IMAGES

# --------------------------------------------------------------------------------------------------------------
# recorded decisions of the published code


class Recorded:
    """Numbers [rounds, M, C] and [rounds, M] in the order in which they were drawn."""

    def __init__(self, normals: Tensor, uniforms: Tensor) -> None:
        self.normals, self.uniforms, self.used = normals, uniforms, 0

    def next(self, count: int) -> tuple[Tensor, Tensor]:
        part = slice(self.used, self.used + count)
        self.used += count
        return self.normals[part].transpose(0, 1), self.uniforms[part].transpose(0, 1)


@dataclass(frozen=True, eq=False)
class Record:
    """One call of the published acceptance code."""

    tensors: dict[str, Tensor]
    inner_temperature: float

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    @property
    def aligned(self) -> Aligned:
        def distribution(side: str) -> Gaussian:
            return Gaussian(self[f"{side}_mean"], self[f"{side}_std"].double().log())

        log_sigma = (self["q_logstd_sum"].double() - self["p_logstd_sum"].double()).sum(-1)
        return Aligned(self["x"], distribution("q"), distribution("p"), log_sigma)

    @property
    def resample_noise(self) -> Recorded:
        return Recorded(self["res_normals"], self["res_uniforms"])

    @property
    def candidates(self) -> Tensor:
        """[M, rounds, C]"""
        normals = self["res_normals"].transpose(0, 1).double()
        return self["p_mean"].unsqueeze(1) + self["p_std"].unsqueeze(1) * normals

    @property
    def lost(self) -> Tensor:
        """[M] bool, the tokens that the published code replaced by zeros."""
        return (self["out"] == 0).all(-1)


def _records() -> Iterator[tuple[str, Record]]:
    for name in ("cspd_heads", "cspd_run_c0", "cspd_run_c1", "cspd_run_c2"):
        tensors = load_file(GOLDEN / f"{name}.safetensors")
        for case in sorted(key.removesuffix(".accept") for key in tensors if key.endswith(".accept")):
            own = {
                key.removeprefix(case + "."): t for key, t in tensors.items() if key.startswith(case + ".")
            }
            yield f"{name}.{case}", Record(own, 1.0 if case.endswith("inner1") else 42.0)


RECORDS = dict(_records())


@pytest.fixture(params=RECORDS)
def record(request: pytest.FixtureRequest) -> Record:
    return RECORDS[request.param]


def close(found: Tensor, recorded: Tensor, tolerance: float = 1e-3) -> bool:
    """Whether the largest difference is small against the largest recorded value."""
    if not len(recorded):
        return True
    return bool((found.double() - recorded.double()).abs().max() <= tolerance * recorded.abs().max().double())


def test_recorded_cases_cover_everything() -> None:
    assert len(RECORDS) == 14 + 5 + 3 + 2
    assert sum(int((~record["accept"]).sum()) for record in RECORDS.values()) > 100
    assert sum(int(record.lost.sum()) for record in RECORDS.values()) == 3


def test_recorded_decisions(record: Record) -> None:
    resample_noise = record.resample_noise
    decision = ReferenceRule(record.inner_temperature).verify(record.aligned, record["u"], resample_noise)
    assert torch.equal(decision.accepted, record["accept"])
    assert resample_noise.used == len(record["res_normals"])
    assert torch.equal(decision.values[decision.accepted], record["x"][decision.accepted])
    assert close(decision.values[~record.lost], record["out"][~record.lost])
    # what never succeeds becomes zero there, and the target's mean here
    assert torch.equal(decision.exhausted, record.lost)
    assert torch.equal(decision.values[record.lost], record["p_mean"][record.lost])
    assert torch.equal(decision.tries, torch.where(decision.accepted, 0, resample_noise.used))


def test_recorded_ratios(record: Record) -> None:
    aligned = record.aligned
    assert close(aligned.log_sigma, record["log_Sigma_paper"])
    assert close(aligned.target.log_prob(aligned.value), record["log_p0"])
    assert close(aligned.draft.log_prob(aligned.value), record["log_q0"])
    assert close(ReferenceRule(record.inner_temperature).log_ratio(aligned), record["log_ratio_code_f64"])
    assert close(PaperRule().log_ratio(aligned), record["log_ratio_paper"])


def test_recorded_residuals(record: Record) -> None:
    found = ReferenceRule(record.inner_temperature).residual(record.aligned, record.candidates)
    assert close(found.T, record["res_alpha_code"])
    # the inner temperature is for the acceptance alone
    found = PaperRule(record.inner_temperature).residual(record.aligned, record.candidates)
    assert close(found.T, record["res_alpha_paper"])


def test_paper_resamples_by_its_own_residual() -> None:
    record = RECORDS["cspd_heads.toy2.inner42"]
    tries = len(record["res_normals"]) - 1  # and one for the last resort
    decision = PaperRule(tries=tries).verify(record.aligned, record["u"], record.resample_noise)
    assert torch.equal(decision.accepted, record["log_ratio_paper"] > record["u"].log())
    success = (record["res_uniforms"] < record["res_alpha_paper"])[:tries]  # [rounds, M]
    assert torch.equal(decision.exhausted, ~decision.accepted & ~success.any(0))
    assert (~decision.accepted & ~decision.exhausted).any()
    for row in (~decision.accepted).nonzero()[:, 0].tolist():
        taken = tries if decision.exhausted[row] else int(success[:, row].nonzero()[0])
        assert decision.tries[row] == min(taken + 1, tries)
        assert torch.allclose(decision.values[row].double(), record.candidates[row, taken], rtol=1e-5)


# --------------------------------------------------------------------------------------------------------------
# measures of a distribution


def chance_of_distance(distance: float, effective: float) -> float:
    """How likely a Kolmogorov-Smirnov distance at least this large is by chance."""
    root = math.sqrt(effective)
    scaled = (root + 0.12 + 0.11 / root) * distance
    if scaled < 0.3:  # the series has not converged there, and its value is 1 to five digits
        return 1.0
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 100)))


@dataclass(frozen=True)
class Fit:
    """How far draws are from a distribution, and how likely that is by chance."""

    distance: float
    chance: float


def one_sample(drawn: Tensor, cdf: Callable[[Tensor], Tensor]) -> Fit:
    """Kolmogorov-Smirnov against a known distribution; drawn [n]."""
    expected = cdf(drawn.sort().values)
    steps = torch.arange(len(drawn) + 1, dtype=torch.float64) / len(drawn)
    distance = torch.maximum(steps[1:] - expected, expected - steps[:-1]).max().item()
    return Fit(distance, chance_of_distance(distance, len(drawn)))


def two_sample(drawn: Tensor, other: Tensor) -> Fit:
    """Kolmogorov-Smirnov between draws [n] and [m]."""
    n, m = len(drawn), len(other)
    order = torch.cat([drawn, other]).argsort()  # no value comes twice
    steps = torch.where(order < n, 1 / n, -1 / m).cumsum(0, dtype=torch.float64)
    distance = steps.abs().max().item()
    return Fit(distance, chance_of_distance(distance, n * m / (n + m)))


def grid(drawn: Tensor, other: Tensor, cells: int = 10) -> float:
    """Chance of the chi-square statistic between draws [n, 2] and [m, 2] on a grid of the other's quantiles."""
    edges = [other[:, c].sort().values[:: len(other) // cells][1:cells].contiguous() for c in range(2)]

    def counts(draws: Tensor) -> Tensor:
        x, y = (torch.searchsorted(edges[c], draws[:, c].contiguous()) for c in range(2))
        return torch.bincount(cells * x + y, minlength=cells**2).double()

    a, b = counts(drawn), counts(other)
    share = math.sqrt(len(other) / len(drawn))
    filled = a + b > 0
    statistic = ((a * share - b / share) ** 2 / (a + b))[filled].sum().item()
    freedom = int(filled.sum()) - 1
    spread = 2 / (9 * freedom)  # Wilson and Hilferty 1931
    normal = ((statistic / freedom) ** (1 / 3) - 1 + spread) / spread**0.5
    return 0.5 * math.erfc(normal / math.sqrt(2))


def normal_cdf(values: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-values / math.sqrt(2))


def test_measures_see_what_they_should() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(DRAWS, 2, generator=g, dtype=torch.float64)
    b = torch.randn(4 * DRAWS, 2, generator=g, dtype=torch.float64)
    assert one_sample(a[:, 0], normal_cdf).chance > LEVEL
    assert two_sample(a[:, 0], b[:, 0]).chance > LEVEL
    assert grid(a, b) > LEVEL
    assert one_sample(a[:, 0] + 0.03, normal_cdf).chance < LEVEL
    assert two_sample(a[:, 0] * 1.03, b[:, 0]).chance < LEVEL
    # the coordinates keep their distributions, but are no longer independent
    tied = torch.stack([a[:, 0], 0.05 * a[:, 0] + (1 - 0.05**2) ** 0.5 * a[:, 1]], dim=1)
    assert two_sample(tied[:, 1].contiguous(), b[:, 1].contiguous()).chance > LEVEL
    assert grid(tied, b) < LEVEL
    assert chance_of_distance(1.9495 / 1000, 1e6) == pytest.approx(LEVEL, rel=0.01)


# --------------------------------------------------------------------------------------------------------------
# chains of two steps


@dataclass(frozen=True)
class Head:
    """A chain x_T -> x_1 -> x_0 of Gaussian steps; `bend` makes the deviations depend on the latent before."""

    slope: tuple[float, float] = (0.8, 0.9)
    shift: tuple[float, float] = (0.0, 0.0)
    std: tuple[float, float] = (0.5, 0.5)
    bend: float = 0.0
    mix: float = 0.0

    def step(self, index: int, latent: Tensor) -> Gaussian:
        """Of x_1 given x_T (0), or x_0 given x_1 (1)."""
        mean = self.slope[index] * latent + self.mix * latent.flip(-1) + self.shift[index]
        return Gaussian(mean, math.log(self.std[index]) + self.bend * torch.tanh(latent))


@dataclass(frozen=True)
class Pair:
    """Draft and target, whose tokens have some channels."""

    draft: Head
    target: Head
    channels: int = 1

    def aligned(self, seed: int, count: int) -> Aligned:
        g = torch.Generator().manual_seed(seed)
        start, noise, last = (
            torch.randn(count, self.channels, dtype=torch.float64, generator=g) for _ in range(3)
        )
        before = [head.step(0, start) for head in (self.draft, self.target)]
        draft, target = (
            head.step(1, distribution.sample(noise))
            for head, distribution in zip((self.draft, self.target), before, strict=True)
        )
        return Aligned(draft.sample(last), draft, target, (before[0].log_std - before[1].log_std).sum(-1))

    @cache  # noqa: B019
    def plain(self) -> Tensor:
        """[4 DRAWS, C] of the target alone."""
        g = torch.Generator().manual_seed(999)
        noises = torch.randn(3, 4 * DRAWS, self.channels, dtype=torch.float64, generator=g)
        middle = self.target.step(0, noises[0]).sample(noises[1])
        return self.target.step(1, middle).sample(noises[2])


def verified(rule: ContinuousRule, aligned: Aligned, seed: int = 0) -> Decision:
    """A batch of images, verified with numbers of their own."""
    count, channels = aligned.value.shape
    uniforms = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 500))
    return rule.verify(
        aligned, uniforms, SeededResampleNoise(range(seed, seed + IMAGES), count // IMAGES, channels)
    )


PAIRS = {
    # unequal deviations before the compared step: Sigma is a constant other than 1
    "scalar": Pair(Head((0.6, 0.8), (0.0, 0.3), (0.5, 0.6)), Head((0.8, 0.9), (0.2, 0.0), (0.8, 0.5))),
    "scalar, equal last": Pair(
        Head((0.6, 0.8), (0.0, 0.2), (0.9, 0.5)), Head((0.8, 0.8), (0.0, 0.0), (0.5, 0.5))
    ),
    "scalar, bent": Pair(Head((0.7, 0.9), (0.1, 0.0), (0.5, 0.6), 0.3), Head(std=(0.6, 0.5), bend=-0.4)),
    "plane": Pair(
        Head((0.7, 0.8), (0.0, 0.2), (0.6, 0.6), mix=0.2), Head(std=(0.8, 0.5), mix=0.3), channels=2
    ),
    "plane, bent": Pair(
        Head((0.7, 0.9), (0.1, 0.0), (0.6, 0.7), 0.2, 0.1),
        Head(std=(0.7, 0.6), bend=-0.3, mix=0.3),
        channels=2,
    ),
}


@cache
def drawn(name: str, rule: ContinuousRule) -> tuple[Aligned, Decision]:
    aligned = PAIRS[name].aligned(seed=2024, count=DRAWS)
    return aligned, verified(rule, aligned)


def marginals(name: str, rule: ContinuousRule) -> list[Fit]:
    """Of each coordinate of the token, whatever the steps before."""
    pair, (_, decision) = PAIRS[name], drawn(name, rule)
    columns = zip(decision.values.unbind(1), pair.plain().unbind(1), strict=True)
    return [two_sample(a.contiguous(), b.contiguous()) for a, b in columns]


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_exact_keeps_the_distribution(name: str) -> None:
    pair, (aligned, decision) = PAIRS[name], drawn(name, ExactRule())
    share = decision.accepted.double().mean().item()
    assert 0.1 < share < 0.9, "the pair tests nothing"
    assert all(fit.chance > LEVEL for fit in marginals(name, ExactRule()))
    if pair.channels == 2:
        assert grid(decision.values, pair.plain()) > LEVEL
    # given the steps before, the token has the target's Gaussian: the stronger statement
    inner = (decision.values - aligned.target.mean) / aligned.target.log_std.exp()
    assert all(one_sample(column, normal_cdf).chance > LEVEL for column in inner.unbind(1))
    assert all(one_sample(column[::IMAGES], normal_cdf).chance > LEVEL for column in inner.unbind(1))
    # 1 / (e tries) of the tokens at most
    assert decision.exhausted.sum() <= DRAWS / (math.e * 1000)
    assert torch.equal(decision.tries > 0, ~decision.accepted)


def test_exact_distribution_in_closed_form() -> None:
    head = PAIRS["scalar"].target
    mean = head.slope[1] * head.shift[0] + head.shift[1]
    std = math.sqrt(head.slope[1] ** 2 * (head.slope[0] ** 2 + head.std[0] ** 2) + head.std[1] ** 2)
    values = drawn("scalar", ExactRule())[1].values[:, 0]
    assert one_sample(values, lambda x: normal_cdf((x - mean) / std)).chance > LEVEL


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    "rule", [PaperRule(), ReferenceRule(inner_temperature=1.0)], ids=["paper", "reference"]
)
def test_factors_of_the_steps_before_change_the_distribution(name: str, rule: ContinuousRule) -> None:
    assert min(fit.chance for fit in marginals(name, rule)) < LEVEL


def test_few_tries_change_the_distribution_within_the_bound() -> None:
    # p and q almost agree: what is rejected is rarely found again
    values = torch.randn(DRAWS, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    distribution = Gaussian(
        torch.zeros(DRAWS, 1, dtype=torch.float64), torch.zeros(DRAWS, 1, dtype=torch.float64)
    )
    near = Gaussian(distribution.mean + 0.25, distribution.log_std)
    for tries in (1, 4, 32, 50):
        decision = verified(ExactRule(tries), Aligned(values + 0.25, near, distribution, torch.zeros(DRAWS)))
        assert 0 < decision.exhausted.double().mean() <= 1 / (math.e * tries) + 4e-3
        assert decision.tries.max() == tries
        fit = one_sample(decision.values[:, 0], normal_cdf)
        assert fit.distance <= 1 / (math.e * tries) + 1.95 / math.sqrt(DRAWS)


@pytest.mark.parametrize(("shift", "std"), [(0.0, 2.0), (0.7, 1.0), (0.5, 0.6), (2.0, 1.0)])
def test_acceptance_is_the_overlap(shift: float, std: float) -> None:
    places = torch.linspace(-20, 20, 400_001, dtype=torch.float64).unsqueeze(1)
    draft = Gaussian(torch.full((1, 1), shift, dtype=torch.float64), torch.full((1, 1), math.log(std)))
    target = Gaussian(torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1))
    overlap = torch.minimum(draft.log_prob(places).exp(), target.log_prob(places).exp()).sum().item() * 1e-4

    def wide(distribution: Gaussian) -> Gaussian:
        return Gaussian(distribution.mean.expand(DRAWS, 1), distribution.log_std.expand(DRAWS, 1))

    noise = torch.randn(DRAWS, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    value = draft.sample(noise)
    decision = verified(ExactRule(100), Aligned(value, wide(draft), wide(target), torch.full((DRAWS,), 3.0)))
    deviation = math.sqrt(overlap * (1 - overlap) / DRAWS)
    assert decision.accepted.double().mean().item() == pytest.approx(overlap, abs=4 * deviation)
    assert one_sample(decision.values[:, 0], normal_cdf).chance > LEVEL
    # a candidate is taken with the chance that a draft is rejected
    taken = decision.tries[~decision.accepted & ~decision.exhausted].double()
    assert taken.mean().item() == pytest.approx(1 / (1 - overlap), rel=0.05)


RULES = [ExactRule(), PaperRule(), ReferenceRule(), ReferenceRule(1.0)]


class Forbidden:
    """No numbers at all."""

    def next(self, count: int) -> tuple[Tensor, Tensor]:
        raise AssertionError("nothing was rejected, yet numbers were asked for")


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_the_same_distribution_is_always_accepted(rule: ContinuousRule) -> None:
    head = Head(std=(0.01, 0.006), bend=0.3)
    aligned = Pair(head, head, channels=16).aligned(0, 1000)
    uniforms = torch.full((1000,), 1 - 2**-53, dtype=torch.float64)
    decision = rule.verify(aligned, uniforms, Forbidden())
    assert decision.accepted.all()
    assert torch.equal(decision.values, aligned.value)
    assert not decision.tries.any()
    assert not decision.exhausted.any()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_distributions_far_apart(rule: ContinuousRule) -> None:
    """Hundreds of thousands of deviations away: densities that no float holds, as with heads of few steps."""
    draft, target = Head((0.9, 0.9), (3.0, 3.0), (0.02, 1e-5)), Head((0.9, 0.9), (0.0, 0.0), (0.01, 1e-5))
    decision = verified(rule, Pair(draft, target).aligned(1, 8000))
    aligned = Pair(draft, target).aligned(1, 8000)
    assert not decision.accepted.any()
    assert (
        decision.tries == 1
    ).all()  # the draft's distribution has no mass there, so the first candidate is taken
    inner = (decision.values - aligned.target.mean) / 1e-5
    assert one_sample(inner[:, 0], normal_cdf).chance > LEVEL


@pytest.mark.parametrize("rule", [ExactRule(40), PaperRule(), ReferenceRule()], ids=repr)
def test_what_is_no_number_is_rejected(rule: ContinuousRule) -> None:
    nan, inf = float("nan"), float("inf")
    # NaN value, infinite value, NaN draft, infinite draft, draft without width, factor that is NaN
    value = torch.tensor([nan, inf, 0.0, 0.0, 0.0, 0.0]).view(-1, 1).repeat(8, 1)
    mean = torch.tensor([0.0, 0.0, nan, inf, 0.0, 0.0]).view(-1, 1).repeat(8, 1)
    log_std = torch.tensor([0.0, 0.0, 0.0, 0.0, -inf, nan]).view(-1, 1).repeat(8, 1)
    target = Gaussian(torch.full((48, 1), 0.1), torch.zeros(48, 1))
    aligned = Aligned(value, Gaussian(mean, log_std), target, torch.zeros(48))
    decision = verified(rule, aligned)
    assert not decision.accepted.any()
    assert decision.values.isfinite().all()
    assert (decision.values != 0).all()

    broken = Gaussian(torch.zeros(48, 1), torch.full((48, 1), nan))
    decision = verified(rule, Aligned(torch.zeros(48, 1), target, broken, torch.zeros(48)))
    assert not decision.accepted.any()
    assert decision.exhausted.all()
    decision = verified(rule, Aligned(target.mean, target, target, torch.full((48,), nan)))
    assert decision.values.isfinite().all()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_padding_costs_nothing(rule: ContinuousRule) -> None:
    aligned = PAIRS["plane"].aligned(2, 64)
    active = torch.arange(64) % 4 > 0
    broken = torch.where(active[:, None], aligned.value, float("nan"))
    distribution = Gaussian(
        torch.where(active[:, None], aligned.target.mean, float("nan")), aligned.target.log_std
    )
    uniforms = torch.rand(64, generator=torch.Generator().manual_seed(0))
    padded = rule.verify(
        Aligned(broken, aligned.draft, distribution, aligned.log_sigma),
        uniforms,
        SeededResampleNoise([1], 64, 2),
        active,
    )
    assert padded.accepted[~active].all()
    assert not padded.tries[~active].any()
    assert not padded.exhausted[~active].any()
    assert padded.values[active].isfinite().all()
    if not isinstance(rule, ReferenceRule):  # whose rounds end when the last token has had a success
        whole = rule.verify(aligned, uniforms, SeededResampleNoise([1], 64, 2))
        assert torch.equal(padded.values[active], whole.values[active])
        assert torch.equal(padded.tries[active], whole.tries[active])
    none = rule.verify(aligned, torch.ones(64), Forbidden(), torch.zeros(64, dtype=torch.bool))
    assert none.accepted.all()


def part(aligned: Aligned, rows: slice) -> Aligned:
    def distribution(gaussian: Gaussian) -> Gaussian:
        return Gaussian(gaussian.mean[rows], gaussian.log_std[rows])

    return Aligned(
        aligned.value[rows],
        distribution(aligned.draft),
        distribution(aligned.target),
        aligned.log_sigma[rows],
    )


@pytest.mark.parametrize("rule", [ExactRule(), ExactRule(6), PaperRule(), PaperRule(tries=3)], ids=repr)
def test_a_image_does_not_depend_on_its_batch(rule: ContinuousRule) -> None:
    width = 5
    together = SeededResampleNoise([11, 12, 13, 14], width, 2)
    alone = SeededResampleNoise([13], width, 2)
    own = slice(2 * width, 3 * width)
    rejected = 0
    for verification in range(20):
        aligned = PAIRS["plane, bent"].aligned(verification, 4 * width)
        uniforms = torch.rand(4 * width, generator=torch.Generator().manual_seed(verification))
        together.restart()
        alone.restart()
        batch = rule.verify(aligned, uniforms, together)
        single = rule.verify(part(aligned, own), uniforms[own], alone)
        rejected += int((~single.accepted).sum())
        for field in ("accepted", "values", "tries", "exhausted"):
            assert torch.equal(getattr(batch, field)[own], getattr(single, field))
    assert rejected > 20


def test_seeded_numbers() -> None:
    first, second = SeededResampleNoise([3, 4], 2, 3), SeededResampleNoise([3, 4], 2, 3)
    normals, uniforms = first.next(7)
    assert normals.shape == (4, 7, 3)
    assert uniforms.shape == (4, 7)
    assert normals.dtype == uniforms.dtype == torch.float64
    assert torch.equal(normals, second.next(7)[0])
    assert not torch.equal(normals, first.next(7)[0])
    assert not torch.equal(normals[:2], normals[2:])
    # however many were used, the next verification has its own numbers
    first.restart()
    second.restart()
    again, _ = first.next(7)
    assert torch.equal(again, second.next(7)[0])
    assert not torch.equal(again, normals)


def test_dtype_of_the_drafted_value_is_kept() -> None:
    aligned = PAIRS["plane"].aligned(0, 64)
    single = Aligned(
        aligned.value.float(),
        Gaussian(aligned.draft.mean.float(), aligned.draft.log_std.float()),
        Gaussian(aligned.target.mean.float(), aligned.target.log_std.float()),
        aligned.log_sigma.float(),
    )
    for rule in RULES:
        assert verified(rule, single).values.dtype == torch.float32
        assert verified(rule, single).accepted.dtype == torch.bool
        assert verified(rule, single).tries.dtype == torch.int64
    assert single.target.log_prob(single.value).dtype == torch.float64


def test_density() -> None:
    distribution = Gaussian(torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, -1.0]]))
    values = torch.tensor([[0.3, -1.7]])
    theirs = (
        torch.distributions.Normal(distribution.mean, distribution.log_std.exp()).log_prob(values).sum(-1)
    )
    assert torch.allclose(distribution.log_prob(values).float(), theirs)
    assert torch.equal(distribution.sample(torch.zeros(1, 2)), distribution.mean)
    several = distribution.at(torch.tensor([0, 0])).log_prob(values.expand(2, 3, 2))
    assert several.shape == (2, 3)
    assert torch.allclose(several, distribution.log_prob(values).expand(2, 3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ExactRule(0),
        lambda: ExactRule(tries=2.5),  # type: ignore[arg-type]
        lambda: PaperRule(tries=True),
        lambda: PaperRule(inner_temperature=0.0),
        lambda: PaperRule(inner_temperature=float("nan")),
        lambda: ReferenceRule(inner_temperature=float("inf")),
        lambda: ReferenceRule(inner_temperature="42"),  # type: ignore[arg-type]
        lambda: ReferenceRule(tries=-1),
        lambda: SeededResampleNoise([], 1, 1),
        lambda: SeededResampleNoise([1], 0, 1),
        lambda: SeededResampleNoise([1], 1, 0),
    ],
)
def test_bad_options(make: Callable[[], Any]) -> None:
    with pytest.raises(InputError, match=r"^[^\n]*\.$"):
        make()


def test_shapes_that_do_not_fit() -> None:
    aligned = PAIRS["plane"].aligned(0, 4)
    wide = Gaussian(torch.zeros(4, 3), torch.zeros(4, 3))
    with pytest.raises(InputError, match="value must be"):
        replace(aligned, value=aligned.value[0])
    with pytest.raises(InputError, match="of the draft must be"):
        replace(aligned, draft=wide)
    with pytest.raises(InputError, match="of the target must be"):
        replace(aligned, target=wide)
    with pytest.raises(InputError, match="log_sigma must be"):
        replace(aligned, log_sigma=torch.zeros(3))
    far = replace(aligned, value=aligned.value + 100)
    for rule in RULES:
        with pytest.raises(InputError, match="uniforms must be"):
            rule.verify(aligned, torch.rand(3), Forbidden())
        with pytest.raises(InputError, match="active must be"):
            rule.verify(aligned, torch.rand(4), Forbidden(), torch.ones(4))
    with pytest.raises(InputError, match="resample_noise must be"):
        ExactRule().verify(far, torch.rand(4), SeededResampleNoise([1], 3, 2))
