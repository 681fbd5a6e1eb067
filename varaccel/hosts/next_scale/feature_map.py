"""The running feature map of a next-scale call: what the decided scales add up to."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol, Self, cast

import torch
from torch import Tensor

from varaccel.engine.canvas import Canvas
from varaccel.nn.scale_schedule import ScaleSchedule
from varaccel.tokenizers.multiscale_vq import MultiScaleQuantizer, has_tokens


class Noise(Protocol):
    """Gumbel noise by position, such as `GumbelNoise`."""

    def at(self, positions: Tensor) -> Tensor: ...

    def part(self, images: Sequence[int]) -> Self: ...


class ScaleQuantizer(Protocol):
    """What the scales of an image add up to, and what the next one sees of it: of the image tokenizer.

    Attributes:
        schedule: the scales.
    """

    @property
    def schedule(self) -> ScaleSchedule: ...

    def start(self, batch: int) -> Tensor:
        """The feature map before the first scale: zeros [B, D, h, w] float32."""
        ...

    def lookup(self, indices: Tensor) -> Tensor:
        """Token ids [B, P] of a scale as vectors [B, P, D] float32; zeros for -1, which is no token."""
        ...

    def spread(self, vectors: Tensor, scale: int) -> Tensor:
        """What a scale's vectors add to the feature map: [B, D, h, w] float32."""
        ...

    def look(self, feature_map: Tensor, scale: int) -> Tensor:
        """What a scale sees of the scales before it, [B, P, D]."""
        ...


class FeatureMap:
    """Follows a canvas scale by scale; every network of a call reads the same one.

    A hand-over between networks needs nothing else: neither hidden states nor keys cross over.

    Args:
        quantizer: of the image tokenizer.
        batch: number of images.
        smooth: noise for softened code vectors: a mean of all code vectors under a perturbed distribution instead of
            the code that was drawn (VAR's "more smooth" sampling, for looks, not for figures); None for the
            drawn ones themselves.

    Attributes:
        value: [B, D, n, n] float32, the sum so far; replaced, never changed in place.
        scales: number of scales in it.
    """

    def __init__(self, quantizer: ScaleQuantizer, batch: int, smooth: Noise | None = None) -> None:
        self.quantizer = quantizer
        self.value = quantizer.start(batch)
        self.scales = 0
        self._smooth = smooth
        self._logits: Tensor | None = None
        self._seen: list[Tensor] = []  # entry s - 1: what scale s sees

    def part(self, images: Sequence[int]) -> FeatureMap:
        """An empty map for some of the images."""
        smooth = None if self._smooth is None else self._smooth.part(images)
        return FeatureMap(self.quantizer, len(images), smooth)

    def copy(self) -> FeatureMap:
        """The map as it is now; following a canvas further with one of the two leaves the other as it is."""
        twin = copy.copy(self)
        twin._seen = list(self._seen)
        return twin

    def seen(self, canvas: Canvas, first: int, last: int) -> Tensor:
        """What the tokens of scales `first` to `last` see of the scales before theirs, [B, P, D] float32.

        Scale 0 sees nothing and has no entries. All scales before `last` must be decided.
        """
        self.follow(canvas, last)
        parts = self._seen[max(first, 1) - 1 : last]
        # the quantiser knows how wide an entry is: with patches of cells, wider than the map
        return torch.cat(parts, 1) if parts else self.quantizer.look(self.value, 0)[:, :0]

    def ahead(self, scale: int) -> Tensor:
        """What the tokens of a scale would see if all scales that are not in the map added nothing, [B, P, D]."""
        return self.quantizer.look(self.value, scale)

    def expect(self, logits: Tensor) -> None:
        """Note the filtered logits [B, P, V] that the next scale is about to be drawn from."""
        self._logits = logits if self._smooth is not None else None

    @torch.inference_mode()
    def follow(self, canvas: Canvas, scales: int) -> None:
        """Take in what the canvas holds of the scales before number `scales`."""
        schedule = self.quantizer.schedule
        while self.scales < scales:
            scale = self.scales
            added = self.quantizer.spread(self._vectors(canvas, scale), scale)
            self.value = self.value + added * has_tokens(canvas.tokens[:, schedule.span(scale)])
            self.scales += 1
            if self.scales < len(schedule):
                self._seen.append(self.quantizer.look(self.value, self.scales))

    def _vectors(self, canvas: Canvas, scale: int) -> Tensor:
        """Code vectors of a decided scale, [B, p * p, D]."""
        schedule = self.quantizer.schedule
        span = schedule.span(scale)
        vectors = self.quantizer.lookup(canvas.tokens[:, span])
        if self._smooth is None or self._logits is None:
            return vectors
        positions = torch.arange(span.start, span.stop, device=canvas.tokens.device)
        noise = self._smooth.at(positions.expand(canvas.batch, -1))
        progress = schedule.progress(scale)
        temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
        weights = ((self._logits * (1 + progress) + noise) / temperature).softmax(dim=-1)
        soft = weights @ cast("MultiScaleQuantizer", self.quantizer).embedding.weight.float()
        self._logits = None
        if canvas.fixed is None:
            return soft
        return torch.where(canvas.fixed[:, span].unsqueeze(-1), vectors, soft)
