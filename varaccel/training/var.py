"""Training a VAR transformer on multi-scale image tokens (VAR, arXiv 2404.02905, section 3.2).

Teacher-forced cross-entropy on the tokens of all scales at once. A specialised drafter learns the leading scales
only, a specialised refiner learns the other ones from a larger model (CoDe, arXiv 2411.17787, section 3.3). The
loop and the optimisers are those of `training.tokens`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from varaccel.errors import InputError
from varaccel.models.var import VARTransformer
from varaccel.tokenizers.multiscale_vq import MultiScaleQuantizer
from varaccel.training import tokens
from varaccel.training.precision import autocast
from varaccel.training.run import Budget, TrainingRun, model_settings
from varaccel.training.tokens import Condition, Scheduled, TokenRecipe, frozen, train_tokens

GATES = 0.1
"""What gates start from, relative to the other modulations; 1e-5 in the published code, which trains for hundreds
of epochs. A run of a few thousand steps cannot wait for the gates to open."""

MODULATIONS = 0.5
"""Scales and shifts relative to other weights, as published."""

HEAD = 0.02
"""The head relative to other weights, as published: training starts close to the uniform distribution."""

_MATRICES = ("attn.mat_qkv.weight", "attn.proj.weight", "ffn.fc1.weight", "ffn.fc2.weight")


@dataclass(frozen=True)
class VARRecipe(TokenRecipe):
    """Everything that decides what is learnt; a resumed run must have the same. See `TokenRecipe`."""


@torch.no_grad()
def initialise(model: VARTransformer, generator: torch.Generator) -> None:
    """The published initialisation, with gates that are open a little (`GATES`).

    Args:
        generator: on the CPU, so that a seed means the same weights on every device.

    Source: `VAR.init_weights` of the published code.
    """
    dim, depth = model.dim, len(model.blocks)
    std = (1 / dim / 3) ** 0.5
    for name, parameter in model.named_parameters():
        if name.endswith("scale_mul_1H11"):
            parameter.fill_(math.log(4.0))
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            value = torch.randn(parameter.shape, generator=generator)
            if name.endswith("ada_gss"):  # [1, 1, 6, C], gates first
                value *= dim**-0.5
                value[:, :, :2].sign_().mul_(GATES * dim**-0.5)  # none of them starts shut
                value[:, :, 2:] *= MODULATIONS
            elif name.startswith("head_nm."):
                value *= std * MODULATIONS
            elif name.endswith("ada_lin.1.weight"):  # [6 * C, C], gates first
                value *= std
                value[: 2 * dim] *= GATES
                value[2 * dim :] *= MODULATIONS
            elif name.endswith(("attn.proj.weight", "ffn.fc2.weight")):
                value *= std / (2 * depth) ** 0.5
            else:
                value *= std * HEAD if name == "head.weight" else std
            parameter.copy_(value)


def optimizers(model: VARTransformer, recipe: TokenRecipe) -> list[Scheduled]:
    """Muon for the matrices of attention and feed-forward, AdamW for embeddings, modulation and head."""
    return tokens.optimizers(model, recipe, lambda n, _: n.startswith("blocks.") and n.endswith(_MATRICES))


class _Objective(tokens.LossObjective):
    """Images of a multi-scale tokenizer as a VAR model reads them.

    Args:
        model, quantizer, token_ids, condition, compile: see `train_var`.
        scales: only the scales before this one are read; None for all.

    Raises:
        InputError: token ids, quantiser or number of scales that do not fit the model.
    """

    def __init__(
        self,
        model: VARTransformer,
        quantizer: MultiScaleQuantizer,
        token_ids: Tensor,
        condition: Condition,
        *,
        scales: int | None = None,
        compile: bool = False,
    ) -> None:
        _check_token_ids(model, quantizer, token_ids)
        if scales is not None:
            _check_scales(model, scales)
        self.model, self.token_ids, self.condition = model, token_ids, condition
        self.quantizer = quantizer.to(model.device)
        self.scales = len(model.schedule) if scales is None else scales
        self._forward = torch.compile(model.forward) if compile else model.forward

    @property
    def samples(self) -> int:
        return len(self.token_ids)

    @torch.no_grad()
    def _batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Condition, its mask, inputs [B, P - 1, D] and tokens [B, P] of the scales that are read."""
        features, mask = self.condition(indices)
        length = self.model.schedule.borders[self.scales]
        image = self.token_ids[indices].to(self.model.device, torch.int64)
        inputs = self.quantizer.inputs(image)[:, : length - 1]
        return features, mask, inputs, image[:, :length]

    def _by_scale(self, losses: Tensor, first: int = 0) -> dict[str, Tensor]:
        """The mean of losses [B, P] of the tokens of scales `first` on: of all of them and of each scale."""
        borders = self.model.schedule.borders
        start = borders[first]
        result = {"loss": losses.mean()}
        for scale in range(first, self.scales):
            part = losses[:, borders[scale] - start : borders[scale + 1] - start]
            result[f"loss_scale{scale}"] = part.mean()
        return result


class VARObjective(_Objective):
    """Cross-entropy of the tokens, in nats per token; of the scales before `scales` only, if that is given."""

    def loss(self, indices: Tensor, dropped: Tensor) -> Tensor:
        features, mask, inputs, image = self._batch(indices)
        with autocast(inputs.device):
            logits = self._forward(features, inputs, mask, dropped.to(inputs.device))
        return F.cross_entropy(logits.flatten(0, 1), image.flatten())

    @torch.no_grad()
    def validate(self, indices: Tensor) -> dict[str, Tensor]:
        features, mask, inputs, image = self._batch(indices)
        with autocast(inputs.device):
            logits = self.model.forward(features, inputs, mask)
        return self._by_scale(F.cross_entropy(logits.mT, image, reduction="none"))


class RefinerObjective(_Objective):
    """KL(teacher || student) in nats per token, of the scales from `draft_scales` on.

    Both read the same tokens of the same images, with or without the condition alike.

    Args:
        student, teacher, quantizer, token_ids, condition, draft_scales, compile: see `train_refiner`.

    Raises:
        InputError: token ids or quantiser that do not fit, models that do not fit each other, or `draft_scales` out
            of range.
    """

    def __init__(
        self,
        student: VARTransformer,
        teacher: VARTransformer,
        quantizer: MultiScaleQuantizer,
        token_ids: Tensor,
        condition: Condition,
        *,
        draft_scales: int,
        compile: bool = False,
    ) -> None:
        super().__init__(student, quantizer, token_ids, condition, compile=compile)
        _check_scales(student, draft_scales)
        _check_pair(student, teacher)
        self.teacher, self.draft_scales = teacher.to(student.device), draft_scales
        self._teach = torch.compile(teacher.forward) if compile else teacher.forward

    def loss(self, indices: Tensor, dropped: Tensor) -> Tensor:
        features, mask, inputs, _ = self._batch(indices)
        where = dropped.to(inputs.device)
        with autocast(inputs.device):
            with torch.no_grad():
                taught = self._teach(features, inputs, mask, where)
            logits = self._forward(features, inputs, mask, where)
        return self._divergence(taught, logits).mean()

    @torch.no_grad()
    def validate(self, indices: Tensor) -> dict[str, Tensor]:
        features, mask, inputs, _ = self._batch(indices)
        with autocast(inputs.device):
            taught = self.teacher.forward(features, inputs, mask)
            logits = self.model.forward(features, inputs, mask)
        return self._by_scale(self._divergence(taught, logits), self.draft_scales)

    def _divergence(self, taught: Tensor, logits: Tensor) -> Tensor:
        """Logits [B, L, V] of both -> [B, P], of the tokens that are refined."""
        start = self.model.schedule.borders[self.draft_scales]
        distribution, own = (x[:, start:].log_softmax(-1) for x in (taught, logits))
        return F.kl_div(own, distribution, reduction="none", log_target=True).sum(-1)


def train_var(
    model: VARTransformer,
    quantizer: MultiScaleQuantizer,
    token_ids: Tensor,
    condition: Condition,
    folder: Path,
    *,
    budget: Budget,
    recipe: VARRecipe | None = None,
    draft_scales: int | None = None,
    validation: int = 512,
    compile: bool = False,
    from_scratch: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> TrainingRun:
    """Train until the budget is spent; resumes a run found in `folder`.

    The log has `loss`, and from validation `validation_loss` and `validation_loss_scale0` and so on.

    Args:
        model: ends with the averaged weights.
        quantizer: of the image tokenizer that made the tokens; moved to the model's device, not changed.
        token_ids: [M, L] integers, the tokens of M images, scale after scale, on the CPU; the last `validation` of them
            are not trained on.
        condition: gives the condition of samples, on the model's device.
        draft_scales: train a specialised drafter, which learns and reads the first so many scales only.
        compile: compile the forward and backward pass (worth minutes of compilation on long runs).
        from_scratch: draw new weights when the run is new; otherwise go on from those that `model` has.
        settings: further facts that must not change between resumes, such as the tokenizer's fingerprint.

    Raises:
        InputError: too few samples, token ids or a quantiser that do not fit the model, or `draft_scales` out of range.
        CheckpointError: `folder` holds a different run.
    """
    recipe = recipe or VARRecipe()
    objective = VARObjective(model, quantizer, token_ids, condition, scales=draft_scales, compile=compile)
    if from_scratch:
        initialise(model, torch.Generator().manual_seed(recipe.seed))
    part = {} if draft_scales is None else {"draft_scales": draft_scales}
    return train_tokens(
        model,
        objective,
        optimizers(model, recipe),
        folder,
        budget=budget,
        recipe=recipe,
        settings={"model": model_settings(model.config), **part, **(settings or {})},
        validation=validation,
        title="training VAR",
    )


def train_refiner(
    student: VARTransformer,
    teacher: VARTransformer,
    quantizer: MultiScaleQuantizer,
    token_ids: Tensor,
    condition: Condition,
    folder: Path,
    *,
    draft_scales: int,
    budget: Budget,
    recipe: VARRecipe | None = None,
    validation: int = 512,
    compile: bool = False,
    from_scratch: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> TrainingRun:
    """Train CoDe's specialised refiner until the budget is spent; resumes a run found in `folder`.

    The log has the entries of `train_var`; losses are divergences from the teacher, of the refined scales.

    Args:
        student: ends with the averaged weights.
        teacher: a larger model of the same vocabulary, which drafts; moved to the student's device, not changed.
        draft_scales: the scales before this one are the drafter's; the student learns the others.
        quantizer, token_ids, condition, compile, from_scratch, settings: as in `train_var`.

    Raises:
        InputError: too few samples, token ids, quantiser or models that do not fit, or `draft_scales` out of range.
        CheckpointError: `folder` holds a different run.
    """
    recipe = recipe or VARRecipe()
    objective = RefinerObjective(
        student, teacher, quantizer, token_ids, condition, draft_scales=draft_scales, compile=compile
    )
    if from_scratch:
        initialise(student, torch.Generator().manual_seed(recipe.seed))
    with frozen(teacher):
        return train_tokens(
            student,
            objective,
            optimizers(student, recipe),
            folder,
            budget=budget,
            recipe=recipe,
            settings={
                "model": model_settings(student.config),
                "teacher": model_settings(teacher.config),
                "draft_scales": draft_scales,
                **(settings or {}),
            },
            validation=validation,
            title="training a refiner",
        )


def _check_token_ids(model: VARTransformer, quantizer: MultiScaleQuantizer, token_ids: Tensor) -> None:
    if quantizer.schedule != model.schedule:
        raise InputError(
            f"the quantiser has the scales {list(quantizer.schedule.sides)}, but the model has "
            f"{list(model.schedule.sides)}; use the image tokenizer that the model is made for."
        )
    own = (model.config.vocab_size, model.config.codebook_dim)
    if (shape := tuple(quantizer.embedding.weight.shape)) != own:
        raise InputError(
            f"the quantiser has {shape[0]} entries of width {shape[1]}, but the model is for {own[0]} of {own[1]}."
        )
    if token_ids.dim() != 2 or token_ids.shape[1] != model.num_tokens:
        raise InputError(
            f"the token ids have the shape {list(token_ids.shape)}, but the model makes images of "
            f"{model.num_tokens} tokens; encode the images with its own image tokenizer."
        )
    if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < own[0]:
        raise InputError(
            f"the token ids go from {int(token_ids.min())} to {int(token_ids.max())}, but the model knows "
            f"0 to {own[0] - 1}."
        )


def _check_scales(model: VARTransformer, draft_scales: int) -> None:
    most = len(model.schedule) - 1
    if not 1 <= draft_scales <= most:
        raise InputError(
            f"draft_scales must be from 1 to {most} for a model of {most + 1} scales, got {draft_scales}."
        )


def _check_pair(student: VARTransformer, teacher: VARTransformer) -> None:
    if student is teacher:
        raise InputError("student and teacher are one model; load it twice to start the one from the other.")
    names = ("scales", "vocab_size", "codebook_dim", "condition_type", "caption_dim", "num_classes")
    ours, theirs = student.config, teacher.config
    for name in names if ours.condition_type == "class" else names[:-1]:
        own, other = (list(v) if name == "scales" else v for v in (ours[name], theirs[name]))
        if own != other:
            raise InputError(f"the student has {name} {own}, the teacher {other}; they must be the same.")
