"""A decoder-only model of transformers with image tokens, as a causal network.

Cache slots, masks and positions travel through three arguments that every such decoder has: a `Cache`, a 4-D
attention mask and `position_ids`. So draft slots, staggered rows and trees work on code that was written to append one
token after the other, and the model stays as it is.
"""

from __future__ import annotations

import inspect
import operator
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from varaccel.errors import InputError
from varaccel.models.transformers_host.decoder_view import with_attention, with_layers
from varaccel.models.transformers_host.grouped_attention import GROUPED, has_groups
from varaccel.models.transformers_host.offloading import execution_device, is_hooked, running_device
from varaccel.models.transformers_host.slot_cache import SlotCache
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.condition import Condition
from varaccel.nn.devices import HOST
from varaccel.nn.grid import Grid
from varaccel.nn.kv_cache import KVCache
from varaccel.nn.prefix import Prefix, PrefixConditioned
from varaccel.nn.processes import num_parts
from varaccel.nn.signature import Signature
from varaccel.nn.spread_cache import SpreadCache

ATTENTION = ("sdpa", "eager")
"""Attention implementations that take a mask of any shape."""


def cache_argument(decoder: nn.Module) -> str:
    """The argument by which a decoder takes keys and values: renamed in transformers 5.24."""
    # the old name works until 5.40
    takes = inspect.signature(type(decoder).forward).parameters
    return "cache" if "cache" in takes else "past_key_values"


class TransformersHost(PrefixConditioned):
    """A view of a transformers model as a `CausalNetwork`; it owns no weights and changes nothing.

    The condition is a prompt: token ids [B, T], padded on the left, in the text vocabulary of the model. Image tokens
    have ids of their own, 0 to V - 1. A model's subclass says where its parts are.

    Args:
        model: in eval mode while it is called.

    Raises:
        InputError: an attention implementation that does not take masks of trees.
    """

    layers_name = "layers"
    """Of the list of layers in the decoder."""

    def __init__(self, model: Any) -> None:
        self.model = model
        implementation = getattr(self.decoder.config, "_attn_implementation", "eager")
        if implementation not in ATTENTION:
            raise InputError(
                f"attention implementation {implementation!r} takes no masks of draft tokens; load the model with "
                "attn_implementation='sdpa', or 'eager'."
            )
        self._cache_argument = cache_argument(self.decoder)
        self._views: dict[tuple[int, ...], nn.Module] = {}
        self._state: list[tuple[int, bool]] = []

    # -- what a model brings ---------------------------------------------------------------------------

    @property
    @abstractmethod
    def decoder(self) -> Any:
        """The stack of layers with its final norm: takes inputs_embeds, attention_mask, position_ids and a cache."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of image token ids V, ends of line included."""

    @abstractmethod
    def embed_tokens(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Inputs [B, P, D] for image token ids [B, P]."""

    @abstractmethod
    def head(self, features: Tensor) -> Tensor:
        """Features [R, P, D] -> logits [R, P, V] over image token ids."""

    @property
    def layout(self) -> tuple[int, ...] | None:
        """Sides of the grids; None if the call decides them."""
        return None

    def place_ids(self, grids: Sequence[Grid]) -> Tensor:
        """[N, A] position ids of image tokens on A axes, counted from the end of the prompt."""
        return torch.arange(sum(grid.num_positions for grid in grids), device=HOST).unsqueeze(1)

    # -- CausalNetwork ---------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the inputs go; weights may lie elsewhere until they are needed."""
        found = execution_device(self.model)
        return torch.device(self.model.device) if found is None else found

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.decoder.dtype
        return dtype

    def parameters(self) -> Iterator[nn.Parameter]:
        parameters: Iterator[nn.Parameter] = self.decoder.parameters()
        return parameters

    def signature(self) -> Signature:
        return Signature(
            condition="prompt",
            condition_size=self.prompt_embedding.num_embeddings,
            vocab_size=self.vocab_size,
            layout=self.layout,
        )

    @property
    def layers(self) -> Any:
        return getattr(self.decoder, self.layers_name)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def feature_size(self) -> int:
        """Width D of inputs and features."""
        return int(self.decoder.config.hidden_size)

    @property
    def prompt_embedding(self) -> Any:
        """The table of text tokens."""
        return self.model.get_input_embeddings()

    def encode_condition(self, condition: Condition, grids: Sequence[Grid], *, guided: bool) -> Prefix:
        self._refresh_views()
        return super().encode_condition(condition, grids, guided=guided)

    def embed_condition(self, values: Tensor) -> Tensor:
        embeddings: Tensor = self.prompt_embedding(values)
        return embeddings

    def positional(self, prefix: int, grids: Sequence[Grid], mask: Tensor | None) -> Tensor:
        """[1 or R, prefix + N, A] position ids; those of a padded prompt count from its first token."""
        image = self.place_ids(grids)
        used = torch.ones(1, prefix, dtype=torch.int64, device=HOST) if mask is None else mask.long().cpu()
        prompt = (used.cumsum(1) - 1).clamp(min=0)  # [R, T]
        axes = image.shape[1]
        return torch.cat(
            [
                prompt.unsqueeze(-1).expand(-1, -1, axes),
                image + (prompt[:, -1:] + 1).unsqueeze(-1),
            ],
            dim=1,
        )

    def new_cache(self, rows: int, slots: int, layers: Sequence[int] | None = None) -> KVCache:
        """An empty cache for the layers with these numbers, all if None; keys and values lie where their layer runs."""
        attention = self.decoder.config
        heads = getattr(attention, "num_key_value_heads", None) or attention.num_attention_heads
        width = getattr(attention, "head_dim", None) or attention.hidden_size // attention.num_attention_heads
        home, chosen = self.device, self._chosen(layers)
        sizes: dict[str, Any] = {
            "batch": rows,
            "heads": heads // self._num_processes(),
            "slots": slots,
            "head_dim": width,
            "dtype": self.dtype,
        }
        devices = [running_device(layer, home) for layer in map(self.layers.__getitem__, chosen)]
        if all(device == home for device in devices):
            return KVCache(layers=len(chosen), device=home, **sizes)
        return SpreadCache(devices=devices, home=home, **sizes)

    def _chosen(self, layers: Sequence[int] | None) -> tuple[int, ...]:
        return tuple(range(self.num_layers) if layers is None else layers)

    def _num_processes(self) -> int:
        """Among how many processes the heads are shared out."""
        projection = getattr(getattr(self.layers[0], "self_attn", None), "k_proj", None)
        weight = getattr(projection, "weight", None)
        return 1 if weight is None else num_parts(weight)

    def transform(self, x: Tensor, attention: AttentionInputs, layers: Sequence[int] | None = None) -> Tensor:
        """Run the decoder on embedded inputs [R, P, D] -> features [R, P, D].

        Args:
            layers: numbers of the layers to run, all if None; the i-th of them uses layer i of the cache.
        """
        chosen = self._chosen(layers)
        decoder = self._view(chosen)
        assert attention.positional is not None
        # [1 or R, P, A] -> [R, P], or [A, R, P] with several axes
        places = attention.positional.expand(x.shape[0], -1, -1).permute(2, 0, 1)
        cache = self._slot_cache(attention, chosen)
        options: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            options[self._cache_argument] = cache
        features: Tensor = decoder(
            inputs_embeds=x,
            attention_mask=self._mask(attention, x),
            position_ids=places[0] if places.shape[0] == 1 else places,
            **options,
        ).last_hidden_state
        return features.to(places.device)  # the last layer may run elsewhere

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features).float().to(features.device)

    @staticmethod
    def _slot_cache(attention: AttentionInputs, chosen: Sequence[int]) -> SlotCache | None:
        """The cache of a pass as the layers of these numbers see it."""
        if attention.cache is None:
            return None
        assert attention.slots is not None
        ranks = {number: rank for rank, number in enumerate(chosen)}
        return SlotCache(attention.cache, attention.slots, attention.length, ranks)

    def _mask(self, attention: AttentionInputs, x: Tensor) -> Tensor:
        """The 4-D mask [R, 1, P, K] of a pass, additive for eager attention."""
        rows, count, _ = x.shape
        mask = attention.mask
        if mask is None:
            assert attention.positional is not None
            place = attention.positional.device
            keys = count if attention.cache is None else attention.length or attention.cache.slots
            mask = torch.ones(count, keys, dtype=torch.bool, device=place)
            mask = (mask.tril() if attention.causal else mask)[None, None]
        mask = mask.expand(rows, 1, -1, -1)
        if self.decoder.config._attn_implementation != "eager":
            return mask
        # eager attention adds what it is given: True would be a score of 1
        return torch.zeros(mask.shape, dtype=x.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(x.dtype).min
        )

    def _view(self, chosen: tuple[int, ...]) -> nn.Module:
        """The decoder as it is run: with these layers, and without copies of keys and values where heads share them."""
        view = self._views.get(chosen)
        if view is None:
            layers = [self.layers[number] for number in chosen]
            if not is_hooked(self.decoder):  # hooks belong to the layers that they were made for
                layers = [with_attention(x, GROUPED) if has_groups(x) else x for x in layers]
            same = len(chosen) == self.num_layers and all(map(operator.is_, layers, self.layers))
            view = self.decoder if same else with_layers(self.decoder, self.layers_name, layers)
            self._views[chosen] = view
        return view

    def _refresh_views(self) -> None:
        """Forget views of modules that were exchanged or got hooks since the last call."""
        state = [(id(part), hasattr(part, "_hf_hook")) for part in self.decoder.modules()]
        if state != self._state:
            self._views, self._state = {}, state
