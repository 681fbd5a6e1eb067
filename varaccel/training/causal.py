"""Training any causal network on image tokens, its parts in transformers included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varaccel.hosts.causal.network import CausalNetwork
from varaccel.nn.condition import Condition
from varaccel.nn.grid import Grid
from varaccel.nn.prefix import PrefixConditioned
from varaccel.training import tokens
from varaccel.training.precision import autocast
from varaccel.training.run import Budget, TrainingRun
from varaccel.training.teacher_forcing import teacher_forced
from varaccel.training.tokens import TokenRecipe, train_tokens


class CausalObjective(tokens.LossObjective):
    """Next-token cross-entropy of a causal network; see `train_causal` for the arguments."""

    def __init__(
        self,
        network: CausalNetwork,
        token_ids: Tensor,
        condition: Callable[[Tensor], Condition],
        grids: Sequence[Grid],
    ) -> None:
        self.network, self.token_ids, self.condition, self.grids = network, token_ids, condition, grids

    @property
    def samples(self) -> int:
        return len(self.token_ids)

    def loss(self, indices: Tensor, dropped: Tensor) -> Tensor:
        condition = self.condition(indices)
        assert isinstance(self.network, PrefixConditioned)
        where = dropped.to(condition.values.device).view(-1, *[1] * (condition.values.dim() - 1))
        values = torch.where(where, self.network.unconditional(condition.values), condition.values)
        return self._loss(Condition(values, condition.mask), indices)

    @torch.no_grad()
    def validate(self, indices: Tensor) -> dict[str, Tensor]:
        return {"loss": self._loss(self.condition(indices), indices)}

    def _loss(self, condition: Condition, indices: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token."""
        image = self.token_ids[indices].to(self.network.device, torch.int64)
        with autocast(self.network.device):
            prefix = self.network.encode_condition(condition, self.grids, guided=False)
            x, attention = teacher_forced(self.network, prefix, image)
            logits = self.network.logits(self.network.transform(x, attention)[:, prefix.length - 1 :])
        return F.cross_entropy(logits.flatten(0, 1), image.flatten())


def train_causal(
    module: nn.Module,
    network: CausalNetwork,
    token_ids: Tensor,
    condition: Callable[[Tensor], Condition],
    grids: Sequence[Grid],
    folder: Path,
    *,
    budget: Budget,
    recipe: TokenRecipe | None = None,
    is_matrix: Callable[[str, Tensor], bool],
    settings: Mapping[str, Any],
    validation: int = 512,
) -> TrainingRun:
    """Train until the budget is spent; resumes a run found in `folder`.

    Args:
        module: whose parameters are trained, those that need gradients; ends with the averaged weights.
        network: the causal network that reads them.
        token_ids: [M, N] integers, the tokens of M images, on the CPU; the last `validation` are not trained on.
        condition: sample indices [B] -> their conditions, on the network's device.
        grids: that the tokens stand in.
        is_matrix: picks the parameters for Muon by name and value, see `tokens.optimizers`.
        settings: facts that must not change between resumes, such as the model's configuration.

    Raises:
        InputError: too few samples.
        CheckpointError: `folder` holds a different run.
    """
    recipe = recipe or TokenRecipe()
    return train_tokens(
        module,
        CausalObjective(network, token_ids, condition, grids),
        tokens.optimizers(module, recipe, is_matrix),
        folder,
        budget=budget,
        recipe=recipe,
        settings=settings,
        validation=validation,
        title=f"training {type(module).__name__}",
    )
