"""Training a one-layer EAGLE drafter for a frozen causal target (arXiv 2401.15077, 2410.03355).

The target reads real images teacher-forced; the drafter learns to predict its features one slot ahead:
smooth L1 on the features plus the cross-entropy between the target's distribution and the distribution that
the target's head reads off the prediction. With `guidance_scale` > 1 the target reads every image with and without its
condition, as in guided decoding, and the second term compares the guided distributions, which are what speculation
verifies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from varaccel.errors import InputError
from varaccel.hosts.causal.guidance import Guidance
from varaccel.hosts.causal.network import CausalNetwork
from varaccel.models.eagle import EagleHead
from varaccel.nn.attention_inputs import AttentionInputs, prefix_mask
from varaccel.nn.condition import Condition
from varaccel.nn.grid import Grid
from varaccel.nn.kv_cache import KVCache
from varaccel.training.feature_pairs import (
    Conditions,
    Pairs,
    checked_token_ids,
    grids_of,
    make_pairs,
    vocab_size_of,
)
from varaccel.training.precision import autocast
from varaccel.training.run import Budget, Schedule, TrainingRun, model_settings
from varaccel.training.tokens import CourseRecipe, Scheduled, frozen, train_tokens

MEASURED_DEPTH = 3
"""How many draft tokens in a row validation looks at."""

VALIDATE_EVERY = 250
"""Steps between measurements on held-out images: runs are short."""

_DISTRIBUTION_ENTRIES = 1 << 24  # probabilities held at a time; 64 MB in float32


@dataclass(frozen=True)
class DrafterRecipe(CourseRecipe):
    """Everything that decides what is learnt; a resumed run must have the same. See `CourseRecipe` for the rest.

    Attributes:
        accumulate: number of equal parts a batch is computed in, to save memory; the step is the same.
        lr: peak learning rate of AdamW (betas 0.9 and 0.95). The default suits short runs for small targets;
            published drafters of the XL size take 20 epochs at 1e-4.
        weight_decay: decoupled, on matrices only.
        feature_weight, distribution_weight: of the smooth L1 and the cross-entropy term, as published. More of the
            second helps the first draft token and harms those after it, whose input it lets drift.
        guidance_scale: 1 or less: one branch, whose condition is dropped for a share of the images. More:
            both branches of every image, and the cross-entropy of their guided distributions; the dropout of
            conditions then has no meaning. Several for conditions of more branches, see `Guidance`.
        temperature: of the distributions in the cross-entropy.
        noise: half-width of uniform noise on the features that the drafter reads, 0 for none. EAGLE's
            formula for a sequence of L slots is 0.1 * 512 / L.
        unroll: draft tokens in a row that are trained: the second reads the feature that the first predicted, as
            in drafting (HASS, arXiv 2408.15766; EAGLE-3, arXiv 2503.01840). 1 as published; 2 costs another
            pass of the drafter and makes the second and later ones much better.
        mask_first_pair: leave out the pair of the first image token, as the published mask does by accident.
        precision: of the matrix products, "bfloat16" or "float32"; the target's distributions are always computed
            from its features in its own precision.

    Raises:
        InputError: a value out of range.
    """

    batch_size: int = 8
    warmup_steps: int = 50
    accumulate: int = 1
    lr: float = 2e-3
    weight_decay: float = 0.01
    feature_weight: float = 1.0
    distribution_weight: float = 0.1
    guidance_scale: float | Sequence[float] = 1.0
    temperature: float = 1.0
    noise: float = 0.0
    unroll: int = 1
    mask_first_pair: bool = False
    precision: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.accumulate < 1 or self.batch_size < 1 or self.batch_size % self.accumulate:
            raise InputError(
                f"a batch of {self.batch_size} cannot be computed in {self.accumulate} equal parts; "
                "choose a batch_size that is a multiple of accumulate."
            )
        if not self.temperature > 0:
            raise InputError(
                f"the temperature of a trained distribution must be above 0, got {self.temperature}."
            )
        if self.unroll < 1:
            raise InputError(f"unroll must be at least 1, got {self.unroll}.")
        if self.precision not in ("bfloat16", "float32"):
            raise InputError(f"precision must be bfloat16 or float32, got {self.precision!r}.")

    @property
    def guidance(self) -> Guidance:
        return Guidance(self.guidance_scale)


class _Trail(KVCache):
    """Keys and values of passes one after another, kept apart so that gradients flow through them."""

    def __init__(self) -> None:
        self._past: list[tuple[Tensor, Tensor]] = []

    def update(
        self, layer: int, slots: Tensor, keys: Tensor, values: Tensor, length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        self._past.append((keys, values))
        all_keys, all_values = zip(*self._past, strict=True)
        return torch.cat(all_keys, dim=2), torch.cat(all_values, dim=2)


def chain_mask(prefix_pairs: int, tokens: int, depth: int, device: torch.device) -> Tensor:
    """Whom the pairs of the `depth`-th draft token see among the pairs of all draft tokens so far, [tokens - depth, K].

    The draft token at pair n, `depth` steps after the last committed token, reads true features up to pair
    n - depth + 1, then one pair of each draft token in between, then itself.
    """
    n = torch.arange(depth - 1, tokens - 1, device=device).unsqueeze(1)
    true_pairs = torch.arange(-prefix_pairs, tokens - 1, device=device)
    predicted = (
        torch.arange(draft_token - 1, tokens - 1, device=device) == n - (depth - draft_token)
        for draft_token in range(2, depth + 1)
    )
    return torch.cat([true_pairs <= n - (depth - 1), *predicted], dim=1)


def predictions(
    head: EagleHead,
    transform: Callable[[Tensor, AttentionInputs], Tensor],
    pairs: Pairs,
    depth: int = 1,
    noise: Tensor | None = None,
) -> list[Tensor]:
    """Predicted features of `depth` draft tokens in a row, each from the true tokens and the features predicted before.

    Every position of an image is a start, and what a draft token attends to is exactly what it would in drafting
    (`chain_mask`). Entry d - 1 is [G, B, N - d, dim], in line with the last N - d features of `pairs.wanted`.

    Args:
        transform: the drafter's own or a compiled one.
        noise: added to the true features, in their shape.
    """
    branches = pairs.tokens.shape[0]
    tokens = pairs.tokens.flatten(0, 1)
    features = pairs.features if noise is None else pairs.features + noise
    prefix, length = pairs.prefix, tokens.shape[1]
    count = length - prefix + 1  # image tokens N
    rotary = head.rotary_table(length, tokens.device)
    slots = torch.arange(length, device=tokens.device)
    used = None if pairs.mask is None or not head.masks_padding else pairs.mask.flatten(0, 1).bool()
    trail = _Trail() if depth > 1 else None
    first = AttentionInputs(
        rotary,
        mask=None if used is None else prefix_mask(used, length),
        causal=used is None,
        cache=trail,
        slots=slots,
    )
    draft_token = transform(head.fuse(tokens, features.flatten(0, 1)), first)[:, prefix:]
    drafts = [draft_token]
    for number in range(2, depth + 1):
        here = slice(prefix + number - 1, None)
        mask = chain_mask(prefix, count, number, tokens.device)
        if used is not None:
            mask = (mask & F.pad(used, (0, mask.shape[1] - prefix), value=True).unsqueeze(1)).unsqueeze(1)
        attention = AttentionInputs(rotary[here], mask=mask, cache=trail, slots=slots[here])
        draft_token = transform(head.fuse(tokens[:, here], draft_token[:, :-1]), attention)
        drafts.append(draft_token)
    return [g.unflatten(0, (branches, -1)) for g in drafts]


def distribution_logits(
    target: CausalNetwork, features: Tensor, recipe: DrafterRecipe, possible: Tensor | None = None
) -> Tensor:
    """Features [G, ..., P, dim] -> logits [..., P, V] of the distribution that is verified: guided and tempered.

    Args:
        possible: [N, V] bool, which tokens may stand at the last N >= P positions of an image; None if all may.
    """
    # Guidance and a low temperature multiply the rounding of logits, so bfloat16 would blur the distributions.
    with torch.autocast(features.device.type, enabled=False):
        logits = target.logits(features.to(target.dtype).flatten(0, -3)).unflatten(0, features.shape[:-2])
    combined = recipe.guidance.combine(*logits) if len(logits) > 1 else logits[0]
    combined = combined / recipe.temperature
    if possible is None:
        return combined
    # finite, for 0 times the logarithm of an impossible token to be 0
    return combined.masked_fill(~possible[-combined.shape[-2] :], torch.finfo(combined.dtype).min)


def _by_images(
    function: Callable[..., Tensor], vocab_size: int, wanted: Tensor, drafts: list[Tensor]
) -> Tensor:
    """Sum of `function(wanted, *drafts)` over groups of images, so that V-wide tensors stay small.

    With several groups, those of the backward pass are computed again instead of being kept.
    """
    group = max(1, _DISTRIBUTION_ENTRIES // (wanted.shape[2] * vocab_size))
    parts = list(zip(*(t.split(group, dim=1) for t in (wanted, *drafts)), strict=True))
    if len(parts) == 1:
        return function(*parts[0])
    return torch.stack([checkpoint(function, *part, use_reentrant=False) for part in parts]).sum(0)


def distribution_losses(
    target: CausalNetwork,
    wanted: Tensor,
    drafts: list[Tensor],
    recipe: DrafterRecipe,
    possible: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the target's distribution against that of each draft token, mean over positions: [depth]."""

    def summed(wanted: Tensor, *drafts: Tensor) -> Tensor:
        with torch.no_grad():
            distribution = distribution_logits(target, wanted, recipe, possible).softmax(-1)
        return torch.stack(
            [
                -(
                    distribution[:, -g.shape[2] :]
                    * distribution_logits(target, g, recipe, possible).log_softmax(-1)
                ).sum()
                for g in drafts
            ]
        )

    counts = torch.tensor([g.shape[1] * g.shape[2] for g in drafts], device=wanted.device)
    return _by_images(summed, vocab_size_of(target), wanted, drafts) / counts


@torch.no_grad()
def acceptance(
    target: CausalNetwork,
    wanted: Tensor,
    drafts: list[Tensor],
    recipe: DrafterRecipe,
    possible: Tensor | None = None,
) -> Tensor:
    """Chance that a token drawn from each draft distribution is accepted, given that those before were: [depth].

    It is sum_x min(p(x), q(x)), one minus the total variation between target and draft, averaged over
    positions (speculative sampling, arXiv 2211.17192).
    """

    def summed(wanted: Tensor, *drafts: Tensor) -> Tensor:
        distribution = distribution_logits(target, wanted, recipe, possible).softmax(-1)
        return torch.stack(
            [
                torch.minimum(
                    distribution[:, -g.shape[2] :],
                    distribution_logits(target, g, recipe, possible).softmax(-1),
                ).sum()
                for g in drafts
            ]
        )

    counts = torch.tensor([g.shape[1] * g.shape[2] for g in drafts], device=wanted.device)
    return _by_images(summed, vocab_size_of(target), wanted, drafts) / counts


def drafter_losses(
    target: CausalNetwork,
    wanted: Tensor,
    drafts: list[Tensor],
    recipe: DrafterRecipe,
    possible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Feature and distribution loss, each the mean over the draft tokens."""
    if recipe.mask_first_pair:
        wanted = wanted[:, :, 1:]
        drafts = [g[:, :, -wanted.shape[2] :] for g in drafts]  # later ones have no such pair
    feature = [F.smooth_l1_loss(g.float(), wanted[:, :, -g.shape[2] :].float()) for g in drafts]
    return torch.stack(feature).mean(), distribution_losses(target, wanted, drafts, recipe, possible).mean()


class DrafterObjective:
    """Features and distributions of the target, as a drafter predicts them; see `train_drafter` for the arguments.

    Raises:
        InputError: token ids of another grid or codebook, or a drafter of another target.
    """

    def __init__(
        self,
        head: EagleHead,
        target: CausalNetwork,
        token_ids: Tensor,
        condition: Conditions,
        recipe: DrafterRecipe,
        *,
        grids: Sequence[Grid] | None = None,
        compile: bool = False,
    ) -> None:
        head.check_fits(target)
        self.grids = grids_of(target) if grids is None else tuple(grids)
        self.token_ids = checked_token_ids(token_ids, target, self.grids)
        self.head, self.target, self.condition, self.recipe = head, target, condition, recipe
        self._trained = [p for p in head.parameters() if p.requires_grad]
        predicted = torch.arange(1, self.token_ids.shape[1], device=target.device)
        self._possible = target.possible_tokens(predicted, self.grids)
        self._read_target = torch.compile(target.transform) if compile else target.transform
        self._read_pairs = torch.compile(head.transform) if compile else head.transform

    @property
    def samples(self) -> int:
        return len(self.token_ids)

    def backward(self, step: int, indices: Tensor, dropped: Tensor) -> dict[str, Tensor]:
        recipe, device = self.recipe, self.target.device
        losses = torch.zeros(2, device=device)
        # The parts' losses are summed to that of the whole batch before the one step is taken.
        for part in torch.arange(recipe.batch_size).chunk(recipe.accumulate):
            with self._autocast():
                pairs = self._pairs(indices[part], dropped[part])
                noise = self._noise(step, part, pairs)
                drafts = predictions(self.head, self._read_pairs, pairs, recipe.unroll, noise)
                feature, distribution = self._losses(pairs, drafts)
            loss = self._weighted(feature, distribution) / recipe.accumulate
            loss.backward(inputs=self._trained)
            losses += torch.stack([feature, distribution]).detach() / recipe.accumulate
        feature, distribution = losses
        return {
            "loss": self._weighted(feature, distribution),
            "feature_loss": feature,
            "distribution_loss": distribution,
        }

    @torch.no_grad()
    def validate(self, indices: Tensor) -> dict[str, Tensor]:
        recipe = self.recipe
        sums = torch.zeros(MEASURED_DEPTH + 1, dtype=torch.float64)
        for part in indices.split(recipe.batch_size // recipe.accumulate):
            with self._autocast():
                pairs = self._pairs(part)
                drafts = predictions(self.head, self.head.transform, pairs, MEASURED_DEPTH)
                losses = self._losses(pairs, drafts[:1])
                chances = acceptance(self.target, pairs.wanted, drafts, recipe, self._possible)
            sums += len(part) * torch.cat([self._weighted(*losses).view(1), chances]).double().cpu()
        loss, *chances_of_depths = sums / len(indices)
        measured = {f"acceptance_{depth}": mean for depth, mean in enumerate(chances_of_depths, start=1)}
        return {"loss": loss, **measured}

    def _weighted(self, feature: Tensor, distribution: Tensor) -> Tensor:
        return self.recipe.feature_weight * feature + self.recipe.distribution_weight * distribution

    def _autocast(self) -> torch.autocast:
        return autocast(self.target.device, self.recipe.precision == "bfloat16")

    def _losses(self, pairs: Pairs, drafts: list[Tensor]) -> tuple[Tensor, Tensor]:
        return drafter_losses(self.target, pairs.wanted, drafts, self.recipe, self._possible)

    def _pairs(self, indices: Tensor, dropped: Tensor | None = None) -> Pairs:
        given = self.condition(indices)
        condition = given if isinstance(given, Condition) else Condition(*given)
        self.recipe.guidance.check_branches(condition.branches)
        return make_pairs(
            self.target,
            self._read_target,
            condition,
            self.token_ids[indices].to(self.target.device, torch.int64),
            self.recipe.guidance.enabled,
            grids=self.grids,
            dropped=dropped,
        )

    def _noise(self, step: int, part: Tensor, pairs: Pairs) -> Tensor | None:
        """Noise for the features of the samples `part` of a batch, the same however the batch is split."""
        recipe, device = self.recipe, self.target.device
        if recipe.noise == 0:
            return None
        branches, _, length, dim = pairs.features.shape
        drawn = []
        for row in part.tolist():
            seed = (recipe.seed * 5_915_587 + step) * recipe.batch_size + row
            generator = torch.Generator(device).manual_seed(seed)
            # from the last pair to the first: the prefix is as long as the longest prompt of the part
            drawn.append(torch.rand((length, branches, dim), device=device, generator=generator).flip(0))
        return (2 * torch.stack(drawn).permute(2, 0, 1, 3) - 1) * recipe.noise


def optimizers(head: EagleHead, recipe: DrafterRecipe) -> list[Scheduled]:
    """AdamW with weight decay for what is trained of the matrices."""
    parameters = [p for p in head.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=recipe.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    return [(adam, Schedule(recipe.lr, recipe.warmup_steps, recipe.decay))]


def train_drafter(
    head: EagleHead,
    target: CausalNetwork,
    token_ids: Tensor,
    condition: Conditions,
    folder: Path,
    *,
    budget: Budget,
    recipe: DrafterRecipe | None = None,
    grids: Sequence[Grid] | None = None,
    validation: int = 256,
    compile: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> TrainingRun:
    """Train until the budget is spent; resumes a run found in `folder`.

    The log has `loss`, `feature_loss` and `distribution_loss`, and from validation `validation_acceptance_1` to
    `validation_acceptance_3`, the chance of the first, second and third draft token in a row (see `acceptance`).

    Args:
        head: moved to the target's device; ends with the averaged weights. Its embedding is not trained.
        target: what it drafts for, any causal network; not changed. One that is no `nn.Module` must be in eval mode.
        token_ids: [M, N] integers, the tokens of M images in the order of decoding, with or without ends of line, on
            the CPU; the last `validation` of them are not trained on.
        condition: gives the condition of samples, on the target's device.
        grids: that the tokens stand in; None where the target's signature tells.
        compile: compile the passes of both networks (worth minutes of compilation on long runs).
        settings: further facts that must not change between resumes, such as the tokenizer's fingerprint.

    Raises:
        InputError: too few samples, token ids of another grid or codebook, a drafter of another target, or `grids` left
            out where the call decides them.
        CheckpointError: `folder` holds a different run.
    """
    recipe = recipe or DrafterRecipe()
    objective = DrafterObjective(head, target, token_ids, condition, recipe, grids=grids, compile=compile)
    head.to(target.device)
    config = getattr(target, "config", None)
    theirs = model_settings(config) if isinstance(config, Mapping) else asdict(target.signature())
    facts = {"drafter": model_settings(head.config), "target": theirs}
    with frozen(target) if isinstance(target, nn.Module) else nullcontext():
        return train_tokens(
            head,
            objective,
            optimizers(head, recipe),
            folder,
            budget=budget,
            recipe=recipe,
            settings={**facts, **(settings or {})},
            validation=validation,
            title="training a drafter",
            validate_every=VALIDATE_EVERY,
        )
