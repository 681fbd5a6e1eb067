"""What transformers over growing scales have in common: VAR and Infinity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from varaccel.errors import InputError
from varaccel.models.next_scale_blocks import HeadModulation
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.kv_cache import KVCache
from varaccel.nn.residual import Residual, add
from varaccel.nn.scale_schedule import ScaleSchedule


@dataclass(frozen=True)
class Places:
    """What a next-scale network is told of the places of all tokens of an image.

    Attributes:
        added: [1, L, C], added to the inputs.
        positional: [L, ...] rows of a rotary table, or None, see `AttentionInputs`.
    """

    added: Tensor
    positional: Tensor | None = None


class NextScaleTransformer(ModelMixin, ConfigMixin):
    """Blocks over the tokens of several scales, with a head; what goes in and out is up to the subclass."""

    dim: int
    num_heads: int
    word_embed: nn.Linear
    blocks: nn.ModuleList
    head_nm: HeadModulation
    head: nn.Linear

    def new_cache(self, batch: int, slots: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `batch` rows of `slots` tokens, in the weights' number type by default."""
        return KVCache(
            layers=len(self.blocks),
            batch=batch,
            heads=self.num_heads,
            slots=slots,
            head_dim=self.dim // self.num_heads,
            dtype=dtype or self.dtype,
            device=self.device,
        )

    def embed(self, start: Tensor | None, seen: Tensor, positions: Tensor) -> Tensor:
        """Inputs of tokens.

        Args:
            start: [R, 1, C] of the condition if they begin with token 0, else None.
            seen: [R, P, D], what the (other) tokens see of the scales before theirs.
            positions: their part of `Places.added`, [1, P, C].
        """
        words = self.word_embed(seen.to(self.word_embed.weight.dtype))
        words = words if start is None else torch.cat([start.to(words.dtype), words], 1)
        return words + positions

    def transform(
        self,
        x: Tensor,
        modulation: Sequence[Any],
        attention: AttentionInputs,
        tail: int | None = None,
        residual: Residual = add,
    ) -> Tensor:
        """Run the blocks on embedded inputs [R, P, C].

        Args:
            modulation: what each block is told of the condition.
            tail: return the features of the last `tail` tokens only; the last block then does nothing else.
            residual: what blocks do with their sub-layers.
        """
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            x = block(x, modulation[layer], attention, layer, tail if layer == last else None, residual)
        return x

    def logits(self, features: Tensor) -> Tensor:
        """Modulated features [R, P, C] -> float32 logits [R, P, V]."""
        return self.head(features.to(self.head.weight.dtype)).float()

    def _teacher_forced(
        self,
        start: Tensor,
        blocks: Sequence[Any],
        head: Tensor,
        inputs: Tensor,
        schedule: ScaleSchedule,
        places: Places,
    ) -> Tensor:
        """Logits [R, P, V] of the leading scales in one masked pass.

        Args:
            start, blocks, head: what follows from the condition.
            inputs: [R, P - 1, D], what the tokens of scales 1, 2, ... see.

        Raises:
            InputError: P tokens are no whole scales.
        """
        length = inputs.shape[1] + 1
        if length not in schedule.borders[1:]:
            raise InputError(f"{length} tokens are no whole scales of {schedule.maps}.")
        scales = torch.tensor(schedule.scale_of_tokens()[:length], device=inputs.device)
        mask = scales.unsqueeze(1) >= scales  # [P, P]
        positional = None if places.positional is None else places.positional[:length]
        x = self.embed(start, inputs, places.added[:, :length])
        x = self.transform(x, blocks, AttentionInputs(positional, mask=mask))
        return self.logits(self.head_nm(x, head))
