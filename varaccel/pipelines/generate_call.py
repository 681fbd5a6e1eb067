"""What a call of `model.generate` says, in the terms of a job of this library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import (
    LogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from varaccel.errors import InputError
from varaccel.hosts.causal.guidance import Guidance
from varaccel.hosts.causal.sampling import Sampling
from varaccel.nn.condition import Condition
from varaccel.nn.grid import Grid

# what the images consist of is the host's to say, and the others are options of `Sampling` and `Guidance`
_UNDERSTOOD = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    SuppressTokensLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)


@dataclass(frozen=True)
class GenerateArguments:
    """What transformers hands to the decoding method of a `generate` call.

    Attributes:
        input_ids: [B, T] prompts, padded on the left.
        config: the call's generation config, completed.
        processors: of logits.
        inputs: further inputs of the model: attention_mask, image_grid_thw, ...
    """

    input_ids: Tensor
    config: Any
    processors: Sequence[LogitsProcessor] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mask(self) -> Tensor | None:
        """[B, T], nonzero at used tokens; None if all are."""
        mask: Tensor | None = self.inputs.get("attention_mask")
        return mask

    def sampling(self) -> Sampling:
        """Temperature and filters of the call."""
        config = self.config
        if not config.do_sample:
            return Sampling(0.0)
        return Sampling(
            1.0 if config.temperature is None else config.temperature,
            config.top_k or 0,
            1.0 if config.top_p is None else config.top_p,
        )

    def check(self) -> None:
        """Refuse what would change the images in a way that this library does not know.

        Raises:
            InputError: names it.
        """
        if self.config.num_beams not in (None, 1):
            raise InputError("accelerated images are sampled or greedy; leave num_beams out.")
        if self.config.return_dict_in_generate:
            raise InputError("accelerated generation returns token ids; leave return_dict_in_generate out.")
        unknown = next((type(p).__name__ for p in self.processors if not isinstance(p, _UNDERSTOOD)), None)
        if unknown is not None:
            raise InputError(
                f"accelerated generation does not know {unknown}; leave the option that adds it out, or use the "
                "model's own generate()."
            )

    @staticmethod
    def check_one_size(same: Iterable[bool]) -> None:
        """Refuse images of several sizes in one call.

        Args:
            same: whether each image has the size of the first.

        Raises:
            InputError: one has not.
        """
        if not all(same):
            raise InputError("images of one accelerated generate() have one size; call it for each size.")

    def most_tokens(self, needed: int) -> int | None:
        """How many new tokens the call may return; None if it does not say.

        Raises:
            InputError: fewer than an image has, which is `needed`.
        """
        most: int | None = self.config.max_new_tokens
        if most is not None and most < needed:
            raise InputError(f"an image of this size has {needed} tokens, got max_new_tokens={most}.")
        return most

    def negative(self) -> tuple[float, Condition | None]:
        """Scale and prompts of the unconditional branch, for models that transformers guides row by row."""
        for processor in self.processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                context = processor.unconditional_context
                ids, mask = context["input_ids"], context["attention_mask"]
                return processor.guidance_scale, None if ids is None else Condition(ids, mask)
        return 1.0, None


@dataclass(frozen=True)
class ImageCall:
    """A `generate` call for images.

    Attributes:
        condition: of the B images.
        grids: that their tokens stand in.
        guidance, sampling: of the call.
        finish: token ids of the canvas [B, N] -> what `generate` returns.
    """

    condition: Condition
    grids: tuple[Grid, ...]
    guidance: Guidance
    sampling: Sampling
    finish: Callable[[Tensor], Tensor]
