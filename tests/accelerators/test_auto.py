"""What `auto` chooses by measured passes, and that measuring leaves no trace."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch

from tests.tiny import GRID, PROMPTS, drafting_pipeline, pipeline
from varaccel import Auto, AutoPipeline, Jacobi
from varaccel.accelerators import auto
from varaccel.accelerators.trial import TrialJob
from varaccel.engine.accelerator import Accelerator
from varaccel.evaluation.metrics.adherence import held_out_prompts
from varaccel.evaluation.speed.probe import Probe
from varaccel.hosts.causal.job import CausalJob

RECORDED = Path(__file__).parents[2] / "docs" / "acceptance.json"
Times = Callable[[int, bool], float]
"""Seconds of a pass by the tokens that it reads per image, and whether a drafter has run before."""


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_TIMES", WeakKeyDictionary())


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Times], list[Accelerator[CausalJob]]]:
    """Say what passes take; returns what is asked for."""

    def planted(times: Times) -> list[Accelerator[CausalJob]]:
        asked: list[Accelerator[CausalJob]] = []

        def seconds(trial: TrialJob, accelerator: Any) -> float:
            asked.append(accelerator)
            drafts = accelerator.name == "speculative"
            return times(accelerator.tree + 1 if drafts else accelerator.window, drafts)

        monkeypatch.setattr(auto, "pass_seconds", seconds)
        monkeypatch.setattr(auto, "_TIMES", WeakKeyDictionary())
        return asked

    return planted


def chosen(accelerator: Any = "auto", images: int = 1) -> str:
    out = pipeline("c2i")([0] * images, seed=0, accelerator=accelerator, output_type="latent")
    return str(out.stats.label)


@pytest.mark.parametrize(
    ("times", "label"),
    [
        pytest.param(lambda tokens, _: 1.0, "jacobi(window=16)", id="flat"),
        pytest.param(lambda tokens, _: float(tokens), "jacobi(window=1)", id="linear"),
        pytest.param(lambda tokens, _: max(1.0, tokens / 4), "jacobi(window=4)", id="flat to 4"),
        pytest.param(lambda tokens, _: 1.0 + (tokens > 1), "jacobi(window=16)", id="drafting costs a pass"),
        pytest.param(
            lambda tokens, _: 1.0 + 2.2 * (tokens > 1), "jacobi(window=1)", id="below the gain asked"
        ),
    ],
)
def test_the_window_follows_the_curve(plant: Any, times: Times, label: str) -> None:
    plant(times)
    assert chosen() == label


def test_passes_that_cannot_pay_are_not_timed(plant: Any) -> None:
    asked = plant(lambda tokens, _: float(tokens))
    chosen()
    assert [a.window for a in asked] == [1, 4]


def test_slower_images_of_a_batch_count(plant: Any) -> None:
    plant(lambda tokens, _: 1.0 if tokens == 1 else 2.6)
    assert (chosen(images=1), chosen(images=8)) == ("jacobi(window=16)", "jacobi(window=1)")


@pytest.mark.parametrize(
    ("times", "label"),
    [
        pytest.param(
            lambda tokens, drafts: 1.0 if drafts else max(1.0, tokens / 3),
            "speculative(drafter=eagle, tree=5, verification=gumbel)",
            id="cheap",
        ),
        pytest.param(lambda tokens, drafts: 3.0 if drafts else 1.0, "jacobi(window=16)", id="dear"),
    ],
)
def test_a_drafter_that_pays_is_taken(
    plant: Any, monkeypatch: pytest.MonkeyPatch, times: Times, label: str
) -> None:
    asked = plant(times)
    pipe = drafting_pipeline("c2i")
    large = pipe(0, seed=0, accelerator="auto", output_type="latent")
    assert large.stats.accelerator == "jacobi"
    assert not any(a.name == "speculative" for a in asked), "its drafters are as large as the model"
    monkeypatch.setattr(auto, "DRAFTER_SHARE", 10.0)
    drafted = pipe(0, seed=0, accelerator="auto", output_type="latent")
    assert drafted.stats.label == label
    assert torch.equal(large.images, drafted.images), "the choice does not change the image"


def test_zipar_takes_two_rows_where_they_pay(plant: Any) -> None:
    fast = Auto(quality="approximate")
    plant(lambda tokens, _: 1.0)
    assert chosen(fast) == f"zipar(window={GRID // 2})"
    plant(lambda tokens, _: float(tokens))
    assert chosen(fast) == f"zipar(window={GRID})", "which is raster order"


def test_each_size_of_call_is_measured_once(plant: Any) -> None:
    asked = plant(lambda tokens, _: 1.0)
    for images in (1, 1, 2, 2, 1):
        chosen(images=images)
    assert [a.window for a in asked] == [1, 4, 16] * 2


@pytest.mark.parametrize("host", ["c2i", "t2i"])
def test_measuring_leaves_no_trace(host: str) -> None:
    pipe, steps = pipeline(host), []

    def draw(accelerator: Any) -> Any:
        shown: list[int] = []
        out = pipe(
            PROMPTS[host],
            seed=3,
            accelerator=accelerator,
            output_type="latent",
            callback_on_step_end=lambda pipe, step, decided, shown_: shown.append(step) or {},
        )
        steps.append(shown)
        return out

    before = torch.get_rng_state()
    by_auto = draw("auto")  # truly measured
    assert torch.equal(torch.get_rng_state(), before)
    assert auto._TIMES[pipe.transformer]
    same = draw(Jacobi(**by_auto.stats.options))
    assert torch.equal(by_auto.images, same.images)
    assert steps[0] == steps[1]
    for name in ("passes", "image_passes", "accepted", "rows", "cache_bytes", "tokens"):
        assert getattr(by_auto.stats, name) == getattr(same.stats, name), name


@pytest.mark.parametrize("window", [1, 3])
def test_a_trial_takes_its_time_from_the_passes(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that are made to take longer are found to."""
    found: dict[str, Any] = {}
    slow = 0.02

    def measure(job: Any) -> None:
        canvas = dataclasses.replace(job.canvas, written=job.canvas.written.clone())
        for name, pause in (("quick", 0.0), ("slow", slow)):
            monkeypatch.setattr(type(job.network), "embed_tokens", delayed(embed, pause))
            found[name] = TrialJob.of(job).pass_seconds(Jacobi(window))
        assert torch.equal(job.canvas.written, canvas.written)
        assert not job.sessions
        job.open_session()  # which the statistics of the call read

    pipe = pipeline("c2i")
    embed = type(pipe.transformer).embed_tokens
    pipe(0, accelerator=Probe(measure), output_type="latent", seed=0)
    assert found["slow"] >= slow > found["quick"]


def delayed(function: Any, seconds: float) -> Any:
    def run(*arguments: Any) -> Any:
        time.sleep(seconds)
        return function(*arguments)

    return run


def test_scales_go_to_a_refiner_that_came_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline("var-class")
    assert pipe(0, seed=0, accelerator="auto").stats.accelerator == "plain"
    large = pipe(0, seed=0, accelerator=Auto("approximate")).stats
    assert large.accelerator == "plain", "its refiner has two thirds of its layers"
    monkeypatch.setattr(auto, "REFINER_SHARE", 0.9)
    fast = pipe(0, seed=0, accelerator=Auto("approximate")).stats
    assert fast.accelerator == "code"
    assert not fast.lossless


def test_tokens_per_pass_are_those_on_record() -> None:
    found = json.loads(RECORDED.read_text())
    for method, table in auto.TOKENS_PER_PASS.items():
        for length, (one, eight) in table.items():
            if length == 1:
                continue
            passes = found["passes"][f"{method} {length}"]
            slowest = mean(map(max, combinations(passes, 8)))  # of any eight of them
            assert one == pytest.approx(found["tokens"] / mean(passes), abs=0.01)
            assert eight == pytest.approx(found["tokens"] / slowest, abs=0.01)


@pytest.mark.slow
def test_the_record_can_be_made_again() -> None:
    pipe = AutoPipeline.from_pretrained("mini-llamagen")
    prompts = list(map(str, held_out_prompts(8).values()))
    out = pipe(prompts, seed=0, accelerator=Jacobi(16), output_type="latent")
    assert list(out.stats.image_passes) == json.loads(RECORDED.read_text())["passes"]["jacobi 16"][:8]
