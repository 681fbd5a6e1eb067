"""The loop that trains a transformer on image tokens, whatever family it is of.

What a sample costs is an `Objective`; everything else is here: sample order, condition dropout, optimisers,
averaged weights, validation, log and resume. Matrices of the blocks are trained with Muon, everything else with
AdamW: at the few thousand steps of a small run that needs markedly fewer samples than AdamW alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from varaccel.errors import InputError
from varaccel.training.run import Budget, ExponentialAverage, Schedule, TrainingRun

Condition = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Sample indices [B] -> condition (labels [B] or features [B, T, C]) and mask [B, T] or None."""

Scheduled = tuple[torch.optim.Optimizer, Schedule]


@dataclass(frozen=True)
class CourseRecipe:
    """What the loop of `train_tokens` goes by; a resumed run must have the same.

    Attributes:
        batch_size: samples per optimiser step.
        condition_dropout: share of samples whose condition is replaced by the unconditional one.
        warmup_steps, decay: see `Schedule`.
        ema_decay: of the averaged weights that are exported.
        grad_clip: largest gradient norm.
        seed: of everything that is drawn at random.
    """

    batch_size: int = 32
    condition_dropout: float = 0.1
    warmup_steps: int = 150
    decay: float = 0.4
    ema_decay: float = 0.998
    grad_clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class TokenRecipe(CourseRecipe):
    """Everything that decides what is learnt; a resumed run must have the same. See `CourseRecipe` for the rest.

    Attributes:
        matrix_lr, other_lr: peak learning rates of Muon (block matrices) and AdamW (the rest).
        weight_decay: decoupled, on matrices only.
    """

    matrix_lr: float = 0.02
    other_lr: float = 2e-3
    weight_decay: float = 0.02


class Objective(Protocol):
    """What a model is trained for; it knows the model, the tokens and their conditions."""

    @property
    def samples(self) -> int:
        """How many images there are, those held out included."""
        ...

    def backward(self, step: int, indices: Tensor, dropped: Tensor) -> Mapping[str, Tensor]:
        """Add the gradients of the training loss to those of the parameters.

        Args:
            step: of the run; all that is drawn at random follows from it, the samples and the seed.
            indices: [B] int64, samples.
            dropped: [B] bool on the CPU, those that go without their condition.

        Returns:
            named scalars for the log, "loss" among them.
        """
        ...

    def validate(self, indices: Tensor) -> Mapping[str, Tensor]:
        """Named scalars of held-out samples [B] with their conditions, "loss" among them; no gradients."""
        ...


class LossObjective(ABC):
    """An objective whose gradients are those of one loss of the whole batch."""

    @abstractmethod
    def loss(self, indices: Tensor, dropped: Tensor) -> Tensor:
        """The training loss, a scalar with gradients; arguments as of `Objective.backward`."""

    def backward(self, step: int, indices: Tensor, dropped: Tensor) -> Mapping[str, Tensor]:
        loss = self.loss(indices, dropped)
        loss.backward()
        return {"loss": loss.detach()}


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without gradients, and afterwards as it was."""
    training = model.training
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in trained:
            parameter.requires_grad_(True)


class SampleOrder:
    """A fresh permutation of the samples for every epoch, computed from the step: nothing to save."""

    def __init__(self, samples: int, batch_size: int, seed: int) -> None:
        if samples < batch_size:
            raise InputError(f"{samples} samples do not fill a batch of {batch_size}.")
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def __getitem__(self, step: int) -> Tensor:
        """Sample indices [batch_size] of a step; the rest of an epoch that fills no batch is left out."""
        epoch, batch = divmod(step, self.samples // self.batch_size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._permutation = torch.randperm(self.samples, generator=generator)
            self._epoch = epoch
        return self._permutation[batch * self.batch_size : (batch + 1) * self.batch_size]


def optimizers(
    model: nn.Module, recipe: TokenRecipe, is_matrix: Callable[[str, Tensor], bool]
) -> list[Scheduled]:
    """Muon (Jordan 2024) for the parameters that `is_matrix` picks by name and value, AdamW for the others."""
    matrices = [p for n, p in model.named_parameters() if is_matrix(n, p)]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay, momentum=0.95)
    adam = torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [
        (muon, Schedule(recipe.matrix_lr, recipe.warmup_steps, recipe.decay)),
        (adam, Schedule(recipe.other_lr, recipe.warmup_steps, recipe.decay)),
    ]


def train_tokens(
    model: nn.Module,
    objective: Objective,
    scheduled: Sequence[Scheduled],
    folder: Path,
    *,
    budget: Budget,
    recipe: CourseRecipe,
    settings: Mapping[str, Any],
    validation: int,
    title: str,
    validate_every: int = 500,
) -> TrainingRun:
    """Train until the budget is spent; resumes a run found in `folder`.

    Args:
        model: what the objective is about; ends with the averaged weights.
        scheduled: the optimisers of its parameters.
        settings: facts that must not change between resumes, beside the recipe.
        validation: the last so many samples are not trained on.
        title: of the progress bar.
        validate_every: steps between measurements on the samples held out.

    Raises:
        InputError: too few samples.
        CheckpointError: `folder` holds a different run.
    """
    ema = ExponentialAverage(model, recipe.ema_decay)
    samples = objective.samples
    order = SampleOrder(samples - validation, recipe.batch_size, recipe.seed)
    run = TrainingRun(
        folder,
        budget,
        {"recipe": asdict(recipe), **settings},
        {"model": model, "ema": ema, **{f"optimizer{i}": o for i, (o, _) in enumerate(scheduled)}},
    )

    @torch.no_grad()
    def validate(prefix: str) -> None:
        model.eval()
        held_out = torch.arange(samples - validation, samples).split(recipe.batch_size)
        sums: dict[str, float] = defaultdict(float)
        for indices in held_out:
            for name, value in objective.validate(indices).items():
                sums[name] += len(indices) * float(value)
        model.train()
        run.log(**{f"{prefix}_{name}": value / validation for name, value in sums.items()})

    model.train()
    bar = tqdm(total=100, desc=title, unit="%", bar_format="{l_bar}{bar}| {elapsed} {postfix}", disable=None)
    smooth: float | None = None
    for step in run.steps():
        drop_seed = torch.Generator().manual_seed(recipe.seed * 7_368_787 + step)
        dropped = torch.rand(recipe.batch_size, generator=drop_seed) < recipe.condition_dropout
        terms = objective.backward(step, order[step], dropped)
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
        for optimizer, schedule in scheduled:
            for group in optimizer.param_groups:
                group["lr"] = schedule(step, run.progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(model)
        if step % 20 == 0:
            row = {name: float(value) for name, value in terms.items()}
            smooth = row["loss"] if smooth is None else 0.8 * smooth + 0.2 * row["loss"]
            run.log(**row, grad_norm=norm)
            bar.n = min(100, round(100 * run.progress))
            bar.set_postfix_str(f"step {step}, loss {smooth:.3f}")
        if validation and step and step % validate_every == 0:
            validate("validation")
    ema.copy_to(model)
    if validation:
        validate("ema_validation")
    bar.close()
    model.eval()
    return run
