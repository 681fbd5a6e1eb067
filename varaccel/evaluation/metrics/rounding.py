"""How often rounding alone changes an image when it is drawn in another batch.

Every image has its own random numbers, so it does not depend on its batch but for one thing: matrix products of
other shapes add up in another order. Where two tokens are nearly as likely as the drawn number says, the last digit
decides, and all tokens after it may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from varaccel.accelerators import AnyAccelerator
from varaccel.errors import InputError
from varaccel.evaluation.metrics.adherence import Rate

CONTINUOUS_TOLERANCE = 1e-3
"""Continuous tokens always differ in their last digits; more than this, in units of a token's standard deviation, is
another token."""


@dataclass(frozen=True)
class RoundingReport:
    """Images of the same seeds drawn in two batch sizes.

    Attributes:
        batch_sizes: the two.
        changed: rate of images of which any token differs.
        tokens: share of all tokens that differ.
        largest: largest difference of a continuous token's numbers; None for token ids.
    """

    batch_sizes: tuple[int, int]
    changed: Rate
    tokens: float
    largest: float | None

    def __str__(self) -> str:
        rate = self.changed
        largest = "" if self.largest is None else f", largest difference {self.largest:.2g}"
        return (
            f"batch {self.batch_sizes[0]} against {self.batch_sizes[1]}: {rate.successes} of {rate.total} images "
            f"differ ({100 * rate.share:.2f} %, 95 % interval {100 * rate.low:.2f} to {100 * rate.high:.2f}), "
            f"{100 * self.tokens:.3f} % of the tokens{largest}"
        )


def compare_batch_sizes(
    pipe: Any,
    prompts: Sequence[str | int],
    batch_sizes: tuple[int, int],
    *,
    accelerator: AnyAccelerator | None = None,
    seed: int = 0,
    progress: bool = True,
    **call: Any,
) -> RoundingReport:
    """Draw the tokens of the same prompts and seeds in two batch sizes and compare them.

    Args:
        prompts: one per image; image i has seed `seed` + i.
        batch_sizes: images per call.
        call: further arguments of the pipeline call.

    Raises:
        InputError: no prompts, or a batch size below 1.
    """
    if not prompts or min(batch_sizes) < 1:
        raise InputError("name at least one prompt, and batch sizes of at least 1.")
    drawn: list[Tensor] = []
    with tqdm(total=2 * len(prompts), desc="drawing", unit="image", disable=not progress or None) as bar:
        for size in batch_sizes:
            parts = []
            for start in range(0, len(prompts), size):
                part = list(prompts[start : start + size])
                output = pipe(part, accelerator=accelerator, seed=seed + start, output_type="latent", **call)
                parts.append(output.images.flatten(1).cpu())
                bar.update(len(part))
            drawn.append(torch.cat(parts))
    first, second = drawn
    if first.is_floating_point():
        distance = (first.double() - second.double()).abs() / first.double().std()
        differs, largest = distance > CONTINUOUS_TOLERANCE, float(distance.max())
    else:
        differs, largest = first != second, None
    rate = Rate.of(differs.any(1).tolist())
    assert rate is not None
    return RoundingReport(batch_sizes, rate, float(differs.double().mean()), largest)
