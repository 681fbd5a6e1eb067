"""The LlamaGen trainer: it learns what the condition says, resumes exactly and refuses what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tiny import GRID, transformer
from varaccel.errors import CheckpointError, InputError
from varaccel.models.llamagen import LlamaGenTransformer
from varaccel.training.llamagen import LlamaGenRecipe, SampleOrder, train_llamagen
from varaccel.training.run import Budget, Schedule, TrainingRun

RECIPE = LlamaGenRecipe(batch_size=8, warmup_steps=5, condition_dropout=0.2, ema_decay=0.8)
SAMPLES = 72


def data() -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, None]]]:
    """Images that are constant per class: class c is the token c everywhere."""
    labels = torch.arange(SAMPLES) % 5
    return labels.unsqueeze(1).repeat(1, GRID**2), lambda indices: (labels[indices], None)


def train(
    folder: Path, steps: int, recipe: LlamaGenRecipe = RECIPE
) -> tuple[LlamaGenTransformer, TrainingRun]:
    token_ids, condition = data()
    model = transformer("c2i", dropout=0.0)
    run = train_llamagen(
        model, token_ids, condition, folder, budget=Budget(steps=steps), recipe=recipe, validation=8
    )
    return model, run


def test_learns_the_condition(tmp_path: Path) -> None:
    model, run = train(tmp_path, 80)
    assert run.history()[-1]["ema_validation_loss"] < 0.3 < run.history()[0]["loss"]
    labels = torch.arange(5)
    first = model(labels, torch.zeros(5, 0, dtype=torch.long))[:, 0]
    assert torch.equal(first.argmax(-1), labels)
    unconditional = model(torch.full((1,), 5), torch.zeros(1, 0, dtype=torch.long))[0, 0].softmax(-1)
    assert unconditional[:5].min() > 0.05, "without a class every class is possible"
    assert unconditional[:5].sum() > 0.8


def test_resumes_where_it_stopped(tmp_path: Path) -> None:
    """A run in two parts is the run in one, bit for bit: weights, average and optimiser state."""
    schedule = {"warmup_steps": 1, "decay": 1e-9}  # the learning rate must not depend on the budget
    recipe = LlamaGenRecipe(batch_size=8, **schedule)
    train(tmp_path / "parts", 7, recipe)
    parts, _ = train(tmp_path / "parts", 15, recipe)
    whole, _ = train(tmp_path / "whole", 15, recipe)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    train(tmp_path, 2)
    with pytest.raises(CheckpointError, match="other settings \\(recipe\\)"):
        train(tmp_path, 4, LlamaGenRecipe(batch_size=8, matrix_lr=0.5))


def test_damaged_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    train(tmp_path, 2)
    (tmp_path / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match="remove it to start afresh"):
        train(tmp_path, 4)


def test_sample_order_visits_everything_once_per_epoch() -> None:
    order = SampleOrder(20, 5, seed=3)
    epochs = [torch.cat([order[e * 4 + s] for s in range(4)]) for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(20))
    assert not torch.equal(*epochs)
    assert torch.equal(SampleOrder(20, 5, seed=3)[6], order[6]), "a step's samples need no history"
    with pytest.raises(InputError, match="do not fill"):
        SampleOrder(3, 5, seed=0)


def test_schedule() -> None:
    rate = Schedule(peak=1.0, warmup_steps=10, decay=0.5, floor=0.1)
    assert rate(0, 0.0) == pytest.approx(0.1)
    assert rate(50, 0.3) == 1.0
    assert rate(50, 0.75) == pytest.approx(0.55)
    assert rate(50, 1.0) == pytest.approx(0.1)


def test_a_budget_has_an_end() -> None:
    with pytest.raises(InputError, match="a time when it ends"):
        Budget()
    assert Budget(steps=10).progress(5, 1e9) == 0.5
    assert Budget(minutes=2).progress(10**9, 60) == 0.5
    assert Budget(steps=10, minutes=1).progress(2, 30) == 0.5
