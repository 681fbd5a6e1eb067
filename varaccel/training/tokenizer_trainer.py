"""The course of training an image tokenizer, whatever its latents are: batches, steps, measurements and export.

What a step optimises is the business of `training.vq` and `training.kl`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from varaccel.errors import InputError
from varaccel.files import atomic_path
from varaccel.training.images import PixelSource
from varaccel.training.run import (
    Budget,
    ExponentialAverage,
    Schedule,
    Stateful,
    TrainingRun,
    model_settings,
)


@dataclass(frozen=True)
class TokenizerRecipe:
    """How an image tokenizer is trained.

    Attributes:
        batch_size: images per optimiser step.
        learning_rate: peak of the warm-up, constant, decay schedule.
        warmup_steps: steps of linear warm-up.
        betas: of AdamW; there is no weight decay.
        clip_norm: gradients are scaled down to this global norm.
        average_decay: decay of the exponential moving average that is exported.
        flip: mirror half of the images left to right.
        l1_weight, l2_weight: of the pixel differences, images in [-1, 1].
        chroma_weight: of the differences in colour opponents. Colours vary little compared with brightness, so
            plain pixel losses learn them last; early in a run whole hues are missing.
        laplacian_weight, ssim_weight: of the structural terms in `training.perceptual`.
        bfloat16: run convolutions under bfloat16 autocast.
        compile: run the model through `torch.compile`.
        seed: of everything that is drawn at random.

    Raises:
        InputError: a batch or learning rate that nothing can be trained with.
    """

    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 1.0
    average_decay: float = 0.998
    flip: bool = True
    l1_weight: float = 1.0
    l2_weight: float = 1.0
    chroma_weight: float = 0.0
    laplacian_weight: float = 1.0
    ssim_weight: float = 0.2
    bfloat16: bool = True
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.learning_rate <= 0:
            raise InputError(
                "a tokenizer recipe needs a batch_size of at least 1 and a learning_rate above 0."
            )
        object.__setattr__(self, "betas", tuple(self.betas))


Recipe = TypeVar("Recipe", bound=TokenizerRecipe)
Model = TypeVar("Model", bound=Any)  # diffusers' models
Batch = TypeVar("Batch")


class TokenizerTrainer(ABC, Generic[Model, Recipe, Batch]):
    """One training run of a tokenizer in one folder; constructing it resumes what the folder holds.

    The folder holds the files of `TrainingRun` and, once trained, `export` with the averaged weights.

    Args:
        model: the tokenizer to train, in float32; moved to `device` and to channels-last. Parameters that want no
            gradient stay as they are.
        data: training images.
        held_out: uint8 [n, H, W, 3], images to measure on, never trained on.
        folder: of the run.
        budget: when to stop.
        recipe: how to train.
        device: where to train.
        log_every: steps between lines of the log.
        evaluate_every: steps between measurements on `held_out`.
        state: what else is saved and restored, by name.
        settings: what else must not change between resumes.

    Raises:
        InputError: no data.
        CheckpointError: the folder holds a run with other settings.
    """

    shown: ClassVar[tuple[str, ...]] = ("psnr",)
    """Measurements that the progress bar shows beside the loss."""

    def __init__(
        self,
        model: Model,
        data: PixelSource,
        held_out: NDArray[np.uint8],
        folder: Path,
        budget: Budget,
        recipe: Recipe,
        *,
        device: str | torch.device,
        log_every: int,
        evaluate_every: int,
        state: Mapping[str, Stateful] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if len(data) == 0 or len(held_out) == 0:
            raise InputError("training a tokenizer needs at least one training and one held-out image.")
        self.recipe, self.data, self.held_out = recipe, data, held_out
        self.device = torch.device(device)
        self.log_every, self.evaluate_every = log_every, evaluate_every
        self.model: Any = model.to(device=self.device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=recipe.learning_rate,
            betas=recipe.betas,
            weight_decay=0.0,
            fused=True,
        )
        self.average = ExponentialAverage(self.model, recipe.average_decay)
        self.schedule = Schedule(recipe.learning_rate, recipe.warmup_steps)
        facts = {"model": model_settings(model.config), "recipe": asdict(recipe), **(settings or {})}
        saved = {
            "model": self.model,
            "optimizer": self.optimizer,
            "average": self.average,
            **(state or {}),
        }
        self.run = TrainingRun(folder, budget, facts, saved)

    def train(self) -> Model:
        """Train until the budget is spent; returns a model with the averaged weights, also in `export`."""
        last: dict[str, float] = {}
        first = self.run.step
        with (
            self._batches(first) as batches,
            tqdm(unit="step", initial=first, total=self.run.budget.steps, disable=None) as bar,
        ):
            for step in self.run.steps():
                terms = self._step(step, next(batches))
                # reading a number makes the host wait for the accelerator, so only now and then
                if (step + 1) % self.log_every == 0:
                    row = {name: float(value) for name, value in terms.items()}
                    self.run.log(**row)
                    last["loss"] = row["loss"]
                if (step + 1) % self.evaluate_every == 0:
                    quality = self._measure(self.averaged())
                    self.run.log(**{f"held_out_{name}": value for name, value in quality.items()})
                    last |= {name: quality[name] for name in self.shown}
                bar.set_postfix({name: f"{value:.4f}" for name, value in last.items()})
                bar.update()
        averaged = self._finished(self.averaged())
        with atomic_path(self.run.folder / "export") as temporary:
            averaged.save_pretrained(temporary)
        return averaged

    def averaged(self) -> Model:
        """A copy of the model with the exponential moving average of its weights, in eval mode."""
        result = copy.deepcopy(self.model)
        self.average.copy_to(result)
        return result.eval()

    @abstractmethod
    def _batches(self, start: int) -> AbstractContextManager[Iterator[Batch]]:
        """The batches of the steps from `start` on; each is asked for in its step."""

    @abstractmethod
    def _step(self, step: int, batch: Batch) -> Mapping[str, Tensor | float]:
        """One optimiser step; returns what the log is told of it, "loss" included."""

    @abstractmethod
    def _measure(self, model: Model) -> Mapping[str, float]:
        """Quality of a model on the held-out images."""

    def _finished(self, model: Model) -> Model:
        """What becomes of the averaged model before it is exported."""
        return model

    def _set_rate(self, step: int) -> float:
        """Give the optimiser the learning rate of a step, and return it."""
        rate = self.schedule(step, self.run.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _descend(self, loss: Tensor) -> Tensor:
        """One step of the optimiser and of the average along the gradient of `loss`; returns its norm."""
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.average.update(self.model)
        return norm
