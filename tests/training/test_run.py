"""When a training run ends, and in what precision it computes."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
import torch

from varaccel.training import precision, run
from varaccel.training.precision import autocast, quick_bfloat16
from varaccel.training.run import Budget, TrainingRun


def test_progress_until_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.time, "time", lambda: 1000.0)
    budget = Budget(until=1060.0)
    assert budget.progress(0, 0.0) == 0.0
    assert budget.progress(5, 60.0) == 0.5, "of what it trained and what it still will"
    assert Budget(until=999.0).progress(0, 0.0) == 1.0
    assert Budget(steps=10, until=1060.0).progress(8, 0.0) == 0.8, "whatever comes first"


def test_a_run_ends_at_its_time_and_goes_on_from_there(tmp_path: Path) -> None:
    weight = torch.nn.Linear(1, 1)

    def steps(seconds: float) -> list[float]:
        training = TrainingRun(tmp_path, Budget(until=time.time() + seconds), {}, {"model": weight})
        progress = []
        for _ in training.steps():
            progress.append(training.progress)
            time.sleep(0.01)
        return progress

    first = steps(0.3)
    assert first == sorted(first)
    assert len(first) < 40
    assert steps(0.3)[0] == pytest.approx(0.5, abs=0.2), "half of it was done before"


@pytest.mark.parametrize(("half", "single", "quick"), [(1.0, 2.0, True), (2.0, 1.0, False)])
def test_a_cpu_is_measured_once(
    half: float, single: float, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def seconds(dtype: torch.dtype) -> float:
        next(calls)
        return half if dtype == torch.bfloat16 else single

    monkeypatch.setattr(precision, "_product_seconds", seconds)
    precision._quick_on_this_cpu.cache_clear()
    cpu = torch.device("cpu")
    try:
        assert [quick_bfloat16(cpu) for _ in range(3)] == [quick] * 3
        assert next(calls) == 2
        for wanted in (True, False):
            with autocast(cpu, wanted):
                product = torch.ones(2, 2) @ torch.ones(2, 2)
            assert (product.dtype == torch.bfloat16) == (quick and wanted)
    finally:
        precision._quick_on_this_cpu.cache_clear()


def test_the_measurement_measures() -> None:
    assert 0 < precision._product_seconds(torch.float32) < 1
