"""Training a MAR transformer on latents of images (MAR, arXiv 2406.11838, section 3).

A random share of the tokens is hidden and the diffusion head learns to draw them from what the transformer says about
their places. The loop and the optimisers are those of `training.tokens`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varaccel.errors import InputError
from varaccel.models.diffusion_head import DiffusionHead
from varaccel.models.mar import MARTransformer
from varaccel.nn.gather import rows_of
from varaccel.nn.noise_schedule import TRAINING_STEPS, DiffusionSchedule
from varaccel.training import tokens
from varaccel.training.precision import quick_bfloat16
from varaccel.training.run import Budget, TrainingRun, model_settings
from varaccel.training.tokens import Condition, Scheduled, TokenRecipe, train_tokens

_MATRICES = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")


@dataclass(frozen=True)
class MARRecipe(TokenRecipe):
    """Everything that decides what is learnt; a resumed run must have the same. See `TokenRecipe`.

    Attributes:
        least_hidden: smallest share of tokens that is hidden. The published 0.7 leaves the last iterations of
            decoding to generalisation, for which small models have no reserve.
        hidden_spread: the share is drawn from a normal distribution around 1 with this deviation, cut to
            [least_hidden, 1].
        repeats: time steps per token and transformer pass; the head is cheap.
    """

    least_hidden: float = 0.5
    hidden_spread: float = 0.25
    repeats: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.least_hidden <= 1 or self.hidden_spread <= 0 or self.repeats < 1:
            raise InputError(
                "a MAR recipe needs a least_hidden above 0 and up to 1, a hidden_spread above 0 and repeats of at "
                "least 1."
            )


@torch.no_grad()
def initialise(model: MARTransformer, generator: torch.Generator) -> None:
    """The published initialisation: Xavier-uniform matrices, 0.02 for tables, modulations and outputs from zero.

    Args:
        generator: on the CPU, so that a seed means the same weights on every device.
    """
    for name, parameter in model.named_parameters():
        value = torch.zeros(parameter.shape)
        if name.endswith("bias"):
            pass
        elif "norm" in name or name.endswith(("_ln.weight", "in_ln.weight")):
            value.fill_(1.0)
        elif "adaLN_modulation" in name or "final_layer.linear" in name:
            pass
        elif parameter.dim() == 2 and name.endswith("weight") and "class_emb" not in name:
            if "time_embed" in name:
                value.normal_(0, 0.02, generator=generator)
            else:
                bound = math.sqrt(6 / sum(parameter.shape))
                value.uniform_(-bound, bound, generator=generator)
        else:
            value.normal_(0, 0.02, generator=generator)
        parameter.copy_(value)


def optimizers(model: MARTransformer, recipe: TokenRecipe) -> list[Scheduled]:
    """Muon for the matrices of attention and feed-forward, AdamW for everything else, the head included."""
    return tokens.optimizers(model, recipe, lambda n, _: "_blocks." in n and n.endswith(_MATRICES))


class DiffusionLoss(nn.Module):
    """What a head pays for its prediction of noise and variance.

    Mean squared error of the noise plus, for the variance alone, the divergence of the predicted denoising step from
    the true one, in bits per number (Nichol & Dhariwal 2021, arXiv 2102.09672, section 3.1), not rescaled.

    Args:
        schedule: all the steps that the head is trained on.
    """

    def __init__(self, schedule: DiffusionSchedule) -> None:
        super().__init__()
        columns = (
            *(schedule.alphas_cumprod.sqrt(), (1 - schedule.alphas_cumprod).sqrt()),
            *(schedule.mean_start, schedule.mean_noisy, schedule.log_beta, schedule.log_posterior),
            *(schedule.inverse_scale, schedule.noise_scale),
        )
        self.table: Tensor
        self.register_buffer("table", torch.stack(columns, 1).float())

    def forward(
        self, head: DiffusionHead, values: Tensor, conditions: Tensor, steps: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses of R tokens.

        Args:
            values: [R, C] float32, true tokens.
            conditions: [R, D].
            steps: [R] int64, of the 1000.
            noise: [R, C].

        Returns:
            squared error and divergence, [R] each.
        """
        signal, spread, start, noisy, log_beta, log_posterior, inverse, scale = (
            self.table[steps].unsqueeze(-1).unbind(1)
        )
        noised = signal * values + spread * noise
        predicted, place = head(noised, steps, conditions).chunk(2, -1)
        error = (predicted - noise).square().mean(-1)
        share = (place + 1) / 2
        log_variance = share * log_beta + (1 - share) * log_posterior
        # the variance learns what it should be; the mean has its own loss
        own = start * (inverse * noised - scale * predicted.detach()) + noisy * noised
        true = start * values + noisy * noised
        distance = (true - own).square()
        divergence = 0.5 * (
            log_variance
            - log_posterior
            - 1
            + (log_posterior - log_variance).exp()
            + distance * (-log_variance).exp()
        )
        first = 0.5 * (math.log(2 * math.pi) + log_variance + (values - own).square() * (-log_variance).exp())
        at_start = (steps == 0).unsqueeze(-1)
        return error, torch.where(at_start, first, divergence).mean(-1) / math.log(2)


@dataclass(frozen=True)
class Masked:
    """Images of which a part is hidden.

    Attributes:
        tokens: [B, N, C] float32, all of them.
        known: [B, K] positions that are shown, -1 is padding.
        asked: [B, A] positions that are hidden and asked for.
        steps: [B * A * repeats] int64; noise: [B * A * repeats, C].
    """

    tokens: Tensor
    known: Tensor
    asked: Tensor
    steps: Tensor
    noise: Tensor


class MARObjective(tokens.LossObjective):
    """Denoising of hidden tokens.

    Args:
        model, latents, scale, condition, recipe, compile: see `train_mar`.

    Raises:
        InputError: latents that do not fit the model.
    """

    def __init__(
        self,
        model: MARTransformer,
        latents: Tensor,
        scale: float,
        condition: Condition,
        recipe: MARRecipe,
        *,
        compile: bool = False,
    ) -> None:
        shape = (2, model.num_tokens, model.channels)
        if latents.dim() != 4 or tuple(latents.shape[1:]) != shape:
            raise InputError(
                f"the latents have the shape {list(latents.shape)}, but the model needs [M, {shape[0]}, {shape[1]}, "
                f"{shape[2]}]; encode the images with its own image tokenizer."
            )
        self.model, self.latents, self.scale = model, latents, scale
        self.condition, self.recipe = condition, recipe
        self.criterion = DiffusionLoss(DiffusionSchedule.trained(model.config.noise_schedule)).to(
            model.device
        )
        self.generator = torch.Generator(model.device)
        self._quick = quick_bfloat16(model.device)  # measured here, outside of what is compiled
        self._losses = torch.compile(self._eager, dynamic=False) if compile else self._eager

    @property
    def samples(self) -> int:
        return len(self.latents)

    def loss(self, indices: Tensor, dropped: Tensor) -> Tensor:
        # from the batch alone, so that a resumed run hides what an uninterrupted one would
        weights = torch.arange(1, len(indices) + 1)
        self.generator.manual_seed(self.recipe.seed * 1_000_003 + int((indices * weights).sum()))
        error, divergence = self._pass(self._losses, indices, dropped, self.generator)
        return error + divergence

    @torch.no_grad()
    def validate(self, indices: Tensor) -> dict[str, Tensor]:
        # the same hidden tokens, steps and noise every time, so that losses compare
        generator = torch.Generator(self.model.device).manual_seed(int(indices[0]))
        dropped = torch.zeros(len(indices), dtype=torch.bool)
        error, divergence = self._pass(self._eager, indices, dropped, generator)
        return {"loss": error + divergence, "error": error, "divergence": divergence}

    def _pass(
        self, losses: Any, indices: Tensor, dropped: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        features, mask = self.condition(indices)
        masked = self.hide(indices, generator)
        device = self.model.device
        return losses(features, mask, dropped.to(device, non_blocking=True), masked)

    @torch.no_grad()
    def hide(self, indices: Tensor, generator: torch.Generator) -> Masked:
        """Draw latents of samples [B] and what of them is hidden."""
        recipe, device = self.recipe, self.model.device
        mean, std = self.latents[indices.to(self.latents.device)].to(device).float().unbind(1)
        noise = torch.randn(mean.shape, generator=generator, device=device)
        tokens = (mean + std * noise) * self.scale
        batch, count, channels = tokens.shape
        # the normal distribution around 1, cut: by inverting its cumulative distribution
        below = 0.5 * (1 + math.erf((recipe.least_hidden - 1) / recipe.hidden_spread / math.sqrt(2)))
        level = below + (0.5 - below) * torch.rand(batch, 1, generator=generator, device=device)
        share = 1 + recipe.hidden_spread * math.sqrt(2) * torch.erfinv(2 * level - 1)
        hidden = (count * share).ceil().clamp(math.ceil(count * recipe.least_hidden), count)
        asked = math.ceil(count * recipe.least_hidden)
        order = torch.rand(batch, count, generator=generator, device=device).argsort(1)
        shown, index = order[:, : count - asked], torch.arange(count - asked, device=device)
        rows = batch * asked * recipe.repeats
        return Masked(
            tokens,
            torch.where(index < count - hidden, shown, -1),
            order[:, count - asked :],
            torch.randint(TRAINING_STEPS, (rows,), generator=generator, device=device),
            torch.randn(rows, channels, generator=generator, device=device),
        )

    def _eager(
        self, features: Tensor, mask: Tensor | None, dropped: Tensor, masked: Masked
    ) -> tuple[Tensor, Tensor]:
        model = self.model
        with torch.autocast(features.device.type, torch.bfloat16, enabled=self._quick):
            slots = model.embed_condition(features, mask)
            slots = torch.where(dropped[:, None, None], model.null_condition().to(slots.dtype), slots)
            shown = rows_of(masked.tokens, masked.known)
            conditions = model(slots, shown, masked.known, masked.asked)
            values = rows_of(masked.tokens, masked.asked)
            repeats = self.recipe.repeats
            error, divergence = self.criterion(
                model.head,
                values.flatten(0, 1).repeat(repeats, 1),
                conditions.flatten(0, 1).repeat(repeats, 1),
                masked.steps,
                masked.noise,
            )
        return error.mean(), divergence.mean()


def train_mar(
    model: MARTransformer,
    latents: Tensor,
    scale: float,
    condition: Condition,
    folder: Path,
    *,
    budget: Budget,
    recipe: MARRecipe | None = None,
    validation: int = 512,
    compile: bool = False,
    from_scratch: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> TrainingRun:
    """Train until the budget is spent; resumes a run found in `folder`.

    Args:
        model: ends with the averaged weights.
        latents: [M, 2, N, C], mean and standard deviation of every token of M images, from `training.latents`; the
            last `validation` of them are not trained on.
        scale: what latents are multiplied by to have unit variance.
        condition: gives the condition of samples, on the model's device.
        compile: compile the forward and backward pass (worth minutes of compilation on long runs).
        from_scratch: draw new weights when the run is new; otherwise go on from those that `model` has.
        settings: further facts that must not change between resumes, such as the tokenizer's fingerprint.

    Raises:
        InputError: too few samples, or latents that do not fit the model.
        CheckpointError: `folder` holds a different run.
    """
    recipe = recipe or MARRecipe()
    if from_scratch:
        initialise(model, torch.Generator().manual_seed(recipe.seed))
    objective = MARObjective(model, latents, scale, condition, recipe, compile=compile)
    return train_tokens(
        model,
        objective,
        optimizers(model, recipe),
        folder,
        budget=budget,
        recipe=recipe,
        settings={"model": model_settings(model.config), "scale": scale, **(settings or {})},
        validation=validation,
        title="training MAR",
    )
