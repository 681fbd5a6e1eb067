"""Training a LlamaGen transformer on image codes (LlamaGen, arXiv 2406.06525, section 3).

Next-token cross-entropy on codes of a frozen image tokenizer, with the condition dropped for a share of the
samples so that the model can be guided. Matrices of the blocks are trained with Muon, everything else with
AdamW: at the few thousand steps of a small run that needs markedly fewer samples than AdamW alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from varaccel.errors import InputError
from varaccel.models.llamagen import LlamaGenTransformer
from varaccel.training.run import Budget, ExponentialAverage, Schedule, TrainingRun, model_settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LlamaGenRecipe:
    """Everything that decides what is learnt; a resumed run must have the same.

    Attributes:
        batch_size: samples per optimiser step.
        matrix_lr, other_lr: peak learning rates of Muon (block matrices) and AdamW (the rest).
        weight_decay: decoupled, on matrices only.
        condition_dropout: share of samples whose condition is replaced by the unconditional one.
        warmup_steps, decay: see `Schedule`.
        ema_decay: of the averaged weights that are exported.
        grad_clip: largest gradient norm.
        seed: of initialisation, sample order and condition dropout.
    """

    batch_size: int = 32
    matrix_lr: float = 0.02
    other_lr: float = 2e-3
    weight_decay: float = 0.02
    condition_dropout: float = 0.1
    warmup_steps: int = 150
    decay: float = 0.4
    ema_decay: float = 0.998
    grad_clip: float = 1.0
    seed: int = 0


Condition = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Sample indices [B] -> condition (labels [B] or features [B, T, C]) and mask [B, T] or None."""


def initialise(model: LlamaGenTransformer, generator: torch.Generator) -> None:
    """Normal weights of std 0.02, scaled down on residual outputs (GPT-2); a zero output head, so that
    training starts from the uniform law."""
    depth = model.config.num_layers
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        residual = name.endswith(("wo.weight", "w2.weight"))
        nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if residual else 0.02, generator=generator)
    nn.init.zeros_(model.output.weight)


def optimizers(
    model: LlamaGenTransformer, recipe: LlamaGenRecipe
) -> list[tuple[torch.optim.Optimizer, Schedule]]:
    """Muon (Jordan 2024) for the matrices inside the blocks, AdamW for embeddings, head and norms."""
    matrices = [p for n, p in model.named_parameters() if n.startswith("layers.") and p.dim() == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay, momentum=0.95)
    adam = torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [
        (muon, Schedule(recipe.matrix_lr, recipe.warmup_steps, recipe.decay)),
        (adam, Schedule(recipe.other_lr, recipe.warmup_steps, recipe.decay)),
    ]


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


def token_loss(
    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    condition: Tensor,
    mask: Tensor | None,
    codes: Tensor,
) -> Tensor:
    """Mean cross-entropy of the image codes [B, N], in nats per token."""
    logits = forward(condition, codes[:, :-1], mask)
    return F.cross_entropy(logits[:, -codes.shape[1] :].flatten(0, 1), codes.flatten())


def train_llamagen(
    model: LlamaGenTransformer,
    codes: Tensor,
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
        codes: [M, N] integer codes of M pictures in raster order, on the CPU; the last `validation` of them
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
    device = model.device
    if from_scratch:
        initialise(model, torch.Generator().manual_seed(recipe.seed))
    chosen = optimizers(model, recipe)
    ema = ExponentialAverage(model, recipe.ema_decay)
    order = SampleOrder(len(codes) - validation, recipe.batch_size, recipe.seed)
    config = model_settings(model.config)
    run = TrainingRun(
        folder,
        budget,
        {"recipe": asdict(recipe), "model": config, **(settings or {})},
        {"model": model, "ema": ema, **{f"optimizer{i}": o for i, (o, _) in enumerate(chosen)}},
    )
    forward = torch.compile(model.forward) if compile else model.forward

    def batch(indices: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        features, mask = condition(indices)
        return features, mask, codes[indices].to(device, torch.int64)

    @torch.no_grad()
    def validate() -> float:
        model.eval()
        held_out = torch.arange(len(codes) - validation, len(codes)).split(recipe.batch_size)
        with torch.autocast(device.type, torch.bfloat16):
            losses = [float(token_loss(model.forward, *batch(i))) for i in held_out]
        model.train()
        return sum(losses) / len(losses)

    model.train()
    bar = tqdm(total=100, desc="training LlamaGen", unit="%", bar_format="{l_bar}{bar}| {elapsed} {postfix}")
    smooth: float | None = None
    for step in run.steps():
        features, mask, target = batch(order[step])
        drop_seed = torch.Generator().manual_seed(recipe.seed * 7_368_787 + step)
        dropped = torch.rand(len(target), generator=drop_seed) < recipe.condition_dropout
        dropped = dropped.to(device).view(-1, *[1] * (features.dim() - 1))
        features = torch.where(dropped, model.unconditional(features), features)
        with torch.autocast(device.type, torch.bfloat16):
            loss = token_loss(forward, features, mask, target)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
        for optimizer, schedule in chosen:
            for group in optimizer.param_groups:
                group["lr"] = schedule(step, run.progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(model)
        if step % 20 == 0:
            value = float(loss.detach())
            smooth = value if smooth is None else 0.8 * smooth + 0.2 * value
            run.log(loss=value, grad_norm=norm)
            bar.n = min(100, round(100 * run.progress))
            bar.set_postfix_str(f"step {step}, loss {smooth:.3f}")
        if step and step % 500 == 0:
            run.log(validation_loss=validate())
    ema.copy_to(model)
    if validation:
        run.log(ema_validation_loss=validate())
    bar.close()
    model.eval()
    return run
