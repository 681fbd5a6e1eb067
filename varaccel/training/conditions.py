"""The conditions of training images, as the pipeline will make them when it draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from varaccel.errors import InputError
from varaccel.nn.condition import Condition as EncodedCondition
from varaccel.tokenizers.captions import clean_prompt
from varaccel.tokenizers.text import TextFeatures
from varaccel.training.precision import autocast
from varaccel.training.tokens import Condition


def caption_condition(
    captions: Sequence[str],
    tokenizer: Any,
    text_encoder: Any,
    prefix_length: int,
    device: torch.device | str,
) -> Condition:
    """Sample indices [B] -> frozen text features [B, T, C] float32 and mask [B, T] of their captions.

    Args:
        captions: of all images; entry i belongs to image i. What is longer than the prefix is cut.
        tokenizer, text_encoder: of the pipeline; the encoder runs where it is, in bfloat16
            if that is quick there.
        prefix_length: caption slots T of the transformer.
        device: of the result.
    """
    text_encoder.eval()
    preprocess: Callable[[str], str] = getattr(tokenizer, "preprocess_prompt", clean_prompt)
    source = text_encoder.device

    parts = [
        tokenizer(
            [preprocess(caption) for caption in captions[start : start + 1024]],
            max_length=prefix_length,
            padding="max_length",
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        for start in range(0, len(captions), 1024)
    ]
    # once, not in every step: a step on a GPU is over before a tokenizer has read its captions
    ids = torch.cat([part["input_ids"] for part in parts]).to(source)
    masks = torch.cat([part["attention_mask"] for part in parts]).to(source)

    @torch.no_grad()
    def condition(indices: Tensor) -> tuple[Tensor, Tensor | None]:
        chosen = indices.to(source)
        mask = masks[chosen]
        with autocast(source):
            hidden = text_encoder(input_ids=ids[chosen], attention_mask=mask).last_hidden_state
        text = TextFeatures.from_hidden_states(hidden.float(), mask).to(device)
        return text.features, text.mask

    return condition


def prompt_condition(
    captions: Sequence[str], pipe: Any, device: torch.device | str
) -> Callable[[Tensor], EncodedCondition]:
    """Sample indices [B] -> the condition that a pipeline makes of their captions.

    Args:
        captions: of all images; entry i belongs to image i.
        pipe: of a network that reads the words itself.
        device: of the result.
    """

    def on_device(given: EncodedCondition) -> EncodedCondition:
        return EncodedCondition(
            given.values.to(device),
            None if given.mask is None else given.mask.to(device),
            tuple(on_device(branch) for branch in given.negatives) or None,
        )

    return lambda indices: on_device(pipe._condition([captions[i] for i in indices.tolist()]))


def label_condition(labels: Tensor, num_classes: int, device: torch.device | str) -> Condition:
    """Sample indices [B] -> class labels [B] int64, without a mask.

    Args:
        labels: [M] integers, entry i belongs to image i.
        num_classes: of the transformer, without the unconditional one.

    Raises:
        InputError: labels that the transformer does not have.
    """
    if labels.dim() != 1 or labels.is_floating_point():
        raise InputError(
            f"labels must be one whole number per image, got {labels.dtype} {list(labels.shape)}."
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise InputError(
            f"the labels go from {int(labels.min())} to {int(labels.max())}, but the model knows "
            f"0 to {num_classes - 1}."
        )
    wide = labels.to(torch.int64)
    return lambda indices: (wide[indices].to(device), None)
