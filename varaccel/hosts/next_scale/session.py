"""One next-scale network reading one canvas for one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from varaccel.engine.canvas import Canvas
from varaccel.engine.distribution import Categorical
from varaccel.hosts.next_scale.feature_map import FeatureMap
from varaccel.hosts.next_scale.network import NextScaleNetwork
from varaccel.hosts.next_scale.sampling import Sampling, ScaleGuidance, ScaleSampling
from varaccel.hosts.next_scale.schedule import ScaleInputs
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.condition import Condition
from varaccel.nn.kv_cache import KVCache
from varaccel.nn.number_check import NumberCheck
from varaccel.nn.residual import Part, Residual, Update, add

Transform = Callable[..., Tensor]
"""`NextScaleNetwork.transform`, or a compiled version of it."""


class ScaleSession:
    """A next-scale network, its cache and guidance for one call.

    Scales that it has not read yet are read together with the one that is asked for, in one pass under a mask: a
    network that takes over from another encodes what is there by itself. Keys of the last scale are never stored,
    since nobody looks at them, and what depends on the condition alone is worked out once.

    Rows of a guided call are [conditional; unconditional].

    Args:
        network: the model, in eval mode; it is not changed.
        features: what the decided scales add up to, shared by all sessions of a call.
        condition: of the B images; None for no condition.
        until: number of scales that will be asked for; nothing is kept for those beyond. All if None.
        cache_dtype: number type of stored keys and values, the network's own if None.
        transform: replaces `network.transform`, for a compiled version of it.
    """

    def __init__(
        self,
        network: NextScaleNetwork,
        features: FeatureMap,
        condition: Condition | None,
        *,
        guidance: ScaleGuidance | None = None,
        sampling: Sampling | None = None,
        until: int | None = None,
        cache_dtype: torch.dtype | None = None,
        transform: Transform | None = None,
    ) -> None:
        self.network, self.features = network, features
        self.guidance = (guidance or ScaleGuidance()) if condition is not None else ScaleGuidance()
        self.sampling = sampling or ScaleSampling()
        self.schedule = features.quantizer.schedule
        self.until = len(self.schedule) if until is None else until
        self.batch = len(features.value)
        self._transform = transform or network.transform
        self._cache_dtype = cache_dtype
        self.cache: KVCache | None = None
        self._encoded = 0  # leading scales whose keys are stored
        self.reads = 0  # forward passes of the network
        self.cache_bytes = 0  # size of the cache, also after it was freed
        self.number_check = NumberCheck.of(network)
        self.number_checks = (self.number_check,)
        with torch.inference_mode():
            # once per call: built from numbers of the host, which a pass should not wait for
            self._scales = torch.tensor(self.schedule.scale_of_tokens(), device=features.value.device)
            self._places = network.places(self.schedule)
            self._rows = network.condition_rows(condition, self.batch, self.guidance.enabled)

    @property
    def rows_per_pass(self) -> int:
        """Network rows of a pass."""
        return self._rows.rows

    @torch.inference_mode()
    def predict(self, canvas: Canvas, inputs: ScaleInputs) -> Categorical:
        """The distribution of a scale, [B, p * p, V], after guidance and filters. All scales before it must
        be decided."""
        logits = self.logits(canvas, inputs.scale)
        self.number_check.logits(logits, self.reads)
        logits = self.sampling.keep(logits, inputs.scale)
        self.features.expect(logits)
        return self.sampling.distribution(logits, inputs.scale)

    @torch.inference_mode()
    def logits(self, canvas: Canvas, scale: int) -> Tensor:
        """Guided logits of a scale before any filter, [B, p * p, V] float32."""
        network, given = self.network, self._rows
        first, rows = self._encoded, self.rows_per_pass
        span = slice(self.schedule.borders[first], self.schedule.borders[scale + 1])
        seen = self.features.seen(canvas, first, scale).repeat(rows // self.batch, 1, 1)
        x = network.embed(given.start if first == 0 else None, seen, self._places.added[:, span])
        asked = span.stop - self.schedule.borders[scale]
        tail = asked if asked < span.stop - span.start else None
        attention = self._attention_inputs(first, scale)
        if self.guidance.enabled and self.guidance.inside:
            x = network.transform(x, given.blocks, attention, residual=self._guided_inside(first, scale))
            x = x[:, -asked:]
        else:
            x = self._transform(x, given.blocks, attention, tail)
        self.reads += 1
        strength = self.guidance.strength(self.schedule, scale)
        if not strength or not self.guidance.on_logits:
            return network.logits(network.head_nm(x[: self.batch], given.head[:, : self.batch]))
        # guidance and the output layer are both linear: mixing features first halves the output layer
        conditional, unconditional = network.head_nm(x, given.head).float().split(self.batch)
        return network.logits((1 + strength) * conditional - strength * unconditional)

    def _guided_inside(self, first: int, last: int) -> Residual:
        """Guidance of the stream between blocks, of every token with the strength of its scale."""
        depth, span = (
            len(self._rows.blocks),
            slice(self.schedule.borders[first], self.schedule.borders[last + 1]),
        )
        strengths = [self.guidance.strength(self.schedule, s) for s in range(last + 1)]
        strength = self.features.value.new_tensor(strengths)[self._scales[span]].unsqueeze(1)  # [P, 1]
        after = {depth - k for k in self.guidance.inside}

        def rule(x: Tensor, update: Update, attention: AttentionInputs, layer: int, part: Part) -> Tensor:
            x = add(x, update, attention, layer, part)
            if part != "ffn" or layer not in after:
                return x
            conditional, unconditional = x.split(self.batch)
            guided = (1 + strength) * conditional - strength * unconditional
            unguided = (strength == 0).expand_as(x)
            return torch.where(unguided, x, guided.to(x.dtype).repeat(2, 1, 1))

        return rule

    def close(self) -> None:
        """Free the cache; the session cannot be asked again."""
        self.cache = None
        self._encoded = 0

    def _attention_inputs(self, first: int, scale: int) -> AttentionInputs:
        borders = self.schedule.borders
        stored, stop = borders[first], borders[scale + 1]
        device = self.features.value.device
        positional = self._places.positional
        if positional is not None:
            positional = positional[stored:stop]
        mask = None
        if scale > first:  # several scales in one pass: none may look ahead
            scales = self._scales[:stop]
            mask = scales[stored:].unsqueeze(1) >= scales  # [P, K]
        if scale == self.until - 1:
            if self.cache is None:
                return AttentionInputs(positional, mask=mask)
            return AttentionInputs(positional, mask=mask, cache=self.cache, length=stored)
        if self.cache is None:
            count = borders[self.until - 1]
            self.cache = self.network.new_cache(self.rows_per_pass, count, self._cache_dtype)
            self.cache_bytes = self.cache.nbytes
        self._encoded = scale + 1
        slots = torch.arange(stored, stop, device=device)
        return AttentionInputs(positional, mask=mask, cache=self.cache, slots=slots, length=stop)
