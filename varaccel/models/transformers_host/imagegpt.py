"""ImageGPT (Chen et al. 2020, "Generative Pretraining from Pixels")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from varaccel.errors import InputError
from varaccel.models.transformers_host.decoder_view import with_layers, with_open_triangle
from varaccel.models.transformers_host.host import TransformersHost
from varaccel.nn.attention_inputs import AttentionInputs


class ImageGPTHost(TransformersHost):
    """`ImageGPTForCausalImageModeling`: a square of pixels, a token each, after one token that begins the image.

    Its forward pass takes no mask of draft tokens, so its blocks are run here, as `with_open_triangle` shows them.
    """

    layers_name = "h"

    @property
    def decoder(self) -> Any:
        return self.model.transformer

    @property
    def vocab_size(self) -> int:
        return int(self.model.lm_head.out_features)

    @property
    def layout(self) -> tuple[int, ...]:
        return (math.isqrt(self.decoder.config.n_positions),)

    @property
    def begin_of_image(self) -> int:
        """Id of the token before the first pixel."""
        return int(self.decoder.config.vocab_size) - 1

    def unconditional(self, values: Tensor) -> Tensor:
        raise InputError("ImageGPT reads no prompt, so there is nothing to guide to; leave guidance out.")

    def embed_tokens(self, tokens: Tensor, positions: Tensor) -> Tensor:
        embeddings: Tensor = self.prompt_embedding(tokens)
        return embeddings

    def head(self, features: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(features)
        return logits

    def transform(self, x: Tensor, attention: AttentionInputs, layers: Sequence[int] | None = None) -> Tensor:
        chosen = tuple(range(self.num_layers) if layers is None else layers)
        assert attention.positional is not None
        # the last pixel has no place of its own in the table; nothing comes after it that would read it
        places = attention.positional[..., 0].clamp(max=self.decoder.config.n_positions - 1)
        x = x + self.decoder.wpe(places).to(x.device)
        cache, mask = self._slot_cache(attention, chosen), self._mask(attention, x)
        for block in self._view(chosen).h:
            x = block(x, layer_past=cache, attention_mask=mask)[0]
        features: Tensor = self.decoder.ln_f(x)
        return features

    def _view(self, chosen: tuple[int, ...]) -> Any:
        view: Any = self._views.get(chosen)
        if view is None or view.h[0].attn.bias.device != self.layers[chosen[0]].attn.bias.device:
            layers = [with_open_triangle(self.layers[number]) for number in chosen]
            view = self._views[chosen] = with_layers(self.decoder, self.layers_name, layers)
        return view
