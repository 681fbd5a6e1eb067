"""Training a LlamaGen transformer on image tokens (LlamaGen, arXiv 2406.06525, section 3).

Next-token cross-entropy on tokens of a frozen image tokenizer, with the condition dropped for a share of the
samples so that the model can be guided. The loop and the optimisers are those of `training.tokens`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varaccel.models.llamagen import LlamaGenTransformer
from varaccel.training import tokens
from varaccel.training.precision import autocast
from varaccel.training.run import Budget, TrainingRun, model_settings
from varaccel.training.tokens import Condition, SampleOrder, Scheduled, TokenRecipe, train_tokens

__all__ = [
    "Condition",
    "LlamaGenObjective",
    "LlamaGenRecipe",
    "SampleOrder",
    "initialise",
    "optimizers",
    "token_loss",
    "train_llamagen",
]


@dataclass(frozen=True)
class LlamaGenRecipe(TokenRecipe):
    """Everything that decides what is learnt; a resumed run must have the same. See `TokenRecipe`."""


def initialise(model: LlamaGenTransformer, generator: torch.Generator) -> None:
    """Normal weights of std 0.02, scaled down on residual outputs (GPT-2); a zero output head, so that
    training starts from the uniform distribution."""
    depth = model.config.num_layers
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        residual = name.endswith(("wo.weight", "w2.weight"))
        nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if residual else 0.02, generator=generator)
    nn.init.zeros_(model.output.weight)


def optimizers(model: LlamaGenTransformer, recipe: TokenRecipe) -> list[Scheduled]:
    """Muon (Jordan 2024) for the matrices inside the blocks, AdamW for embeddings, head and norms."""
    return tokens.optimizers(model, recipe, lambda n, p: n.startswith("layers.") and p.dim() == 2)


def token_loss(
    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    condition: Tensor,
    mask: Tensor | None,
    token_ids: Tensor,
) -> Tensor:
    """Mean cross-entropy of the image tokens [B, N], in nats per token."""
    logits = forward(condition, token_ids[:, :-1], mask)
    return F.cross_entropy(logits[:, -token_ids.shape[1] :].flatten(0, 1), token_ids.flatten())


class LlamaGenObjective(tokens.LossObjective):
    """Next-token cross-entropy; see `train_llamagen` for the arguments."""

    def __init__(
        self, model: LlamaGenTransformer, token_ids: Tensor, condition: Condition, compile: bool = False
    ) -> None:
        self.model, self.token_ids, self.condition = model, token_ids, condition
        self._forward = torch.compile(model.forward) if compile else model.forward

    @property
    def samples(self) -> int:
        return len(self.token_ids)

    def loss(self, indices: Tensor, dropped: Tensor) -> Tensor:
        features, mask, image = self._batch(indices)
        where = dropped.to(features.device).view(-1, *[1] * (features.dim() - 1))
        features = torch.where(where, self.model.unconditional(features), features)
        with autocast(features.device):
            return token_loss(self._forward, features, mask, image)

    @torch.no_grad()
    def validate(self, indices: Tensor) -> dict[str, Tensor]:
        features, mask, image = self._batch(indices)
        with autocast(features.device):
            return {"loss": token_loss(self.model.forward, features, mask, image)}

    def _batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        features, mask = self.condition(indices)
        return features, mask, self.token_ids[indices].to(self.model.device, torch.int64)


def train_llamagen(
    model: LlamaGenTransformer,
    token_ids: Tensor,
    condition: Condition,
    folder: Path,
    *,
    budget: Budget,
    recipe: LlamaGenRecipe | None = None,
    validation: int = 512,
    compile: bool = False,
    from_scratch: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> TrainingRun:
    """Train until the budget is spent; resumes a run found in `folder`.

    Args:
        model: ends with the averaged weights.
        token_ids: [M, N] integers, the tokens of M images in raster order, on the CPU; the last `validation` of them
            are not trained on.
        condition: gives the condition of samples, on the model's device.
        compile: compile the forward and backward pass (worth minutes of compilation on long runs).
        from_scratch: draw new weights when the run is new; otherwise go on from those that `model` has.
        settings: further facts that must not change between resumes, such as the tokenizer's fingerprint.

    Raises:
        InputError: too few samples.
        CheckpointError: `folder` holds a different run.
    """
    recipe = recipe or LlamaGenRecipe()
    if from_scratch:
        initialise(model, torch.Generator().manual_seed(recipe.seed))
    return train_tokens(
        model,
        LlamaGenObjective(model, token_ids, condition, compile),
        optimizers(model, recipe),
        folder,
        budget=budget,
        recipe=recipe,
        settings={"model": model_settings(model.config), **(settings or {})},
        validation=validation,
        title="training LlamaGen",
    )
