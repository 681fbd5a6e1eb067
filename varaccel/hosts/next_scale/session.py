"""One next-scale network reading one canvas for one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from varaccel.engine.canvas import Canvas
from varaccel.engine.distribution import Categorical
from varaccel.hosts.next_scale.feature_map import FeatureMap
from varaccel.hosts.next_scale.growing_cache import Budget, GrowingCache
from varaccel.hosts.next_scale.importance import ReceivedAttention
from varaccel.hosts.next_scale.network import NextScaleNetwork
from varaccel.hosts.next_scale.plan import SessionPlan
from varaccel.hosts.next_scale.pruning import TokenPruning
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

    Rows of a guided call are [conditional; unconditional]. Those of images that a plan ends, or no longer guides, leave
    the cache with their next scale.

    Args:
        network: the model, in eval mode; it is not changed.
        features: what the decided scales add up to, shared by all sessions of a call.
        condition: of the B images; None for no condition.
        until: number of scales that will be asked for; nothing is kept for those beyond. All if None.
        cache_dtype: number type of stored keys and values, the network's own if None.
        transform: replaces `network.transform`, for a compiled version of it.
        plan: what passes leave out; nothing if None.

    Attributes:
        images: numbers of the images that are still decided.
        guided: those among them that have an unconditional row.
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
        plan: SessionPlan | None = None,
    ) -> None:
        self.network, self.features = network, features
        self.guidance = (guidance or ScaleGuidance()) if condition is not None else ScaleGuidance()
        self.sampling = sampling or ScaleSampling()
        self.schedule = features.quantizer.schedule
        self.until = len(self.schedule) if until is None else until
        self.plan = plan or SessionPlan()
        self.batch = len(features.value)
        self.images = list(range(self.batch))
        self.guided = list(self.images) if self.guidance.enabled else []
        self._transform = transform or network.transform
        self._compiled = transform is not None
        self._cache_dtype = cache_dtype
        self.cache: KVCache | None = None
        self._encoded = 0  # leading scales whose keys are stored
        self._skipped = False  # whether the plan has said which images end
        self._drawn_ahead: dict[int, Tensor] = {}  # logits of scales that a pass decided with an earlier one
        self.reads = 0  # forward passes of the network
        self.cache_bytes = 0  # size of the cache, also after it was freed
        self.number_check = NumberCheck.of(network)
        self.number_checks = (self.number_check,)
        with torch.inference_mode():
            # once per call: built from numbers of the host, which a pass should not wait for
            self._scales = torch.tensor(self.schedule.scale_of_tokens(), device=features.value.device)
            self._places = network.places(self.schedule)
            self._rows = network.condition_rows(condition, self.batch, self.guidance.enabled)
        pruning, depth = self.plan.pruning, len(self._rows.blocks)
        self._pruning = None if pruning is None else TokenPruning(pruning, self.schedule, depth)

    @property
    def rows_per_pass(self) -> int:
        """Network rows of a pass."""
        return self._rows.rows

    @torch.inference_mode()
    def predict(self, canvas: Canvas, inputs: ScaleInputs) -> Categorical:
        """The distribution of a scale, [B, p * p, V], after guidance and filters. All scales before it must
        be decided, but for those of the same pass."""
        logits = self.logits(canvas, inputs.scale)
        self.number_check.logits(logits, self.reads)
        logits = self.sampling.keep(logits, inputs.scale)
        self.features.expect(logits)
        return self.sampling.distribution(logits, inputs.scale)

    @torch.inference_mode()
    def logits(self, canvas: Canvas, scale: int) -> Tensor:
        """Guided logits of a scale before any filter, [B, p * p, V] float32; 0 for images that have ended."""
        if scale in self._drawn_ahead:
            return self._drawn_ahead.pop(scale)
        self.leave_out(canvas, scale)
        first, last = self._encoded, self._end_of_pass(scale)
        borders = self.schedule.borders
        span = slice(borders[first], borders[last + 1])
        x = self._read(
            self._seen(canvas, first, scale, last), first, last, borders[last + 1] - borders[scale]
        )
        self.reads += 1
        start = span.stop - x.shape[1]
        for each in range(scale, last + 1):
            part = self.schedule.span(each)
            decided = self._decided(x[:, part.start - start : part.stop - start], each)
            self._drawn_ahead[each] = self._of_all_images(decided)
        return self._drawn_ahead.pop(scale)

    def leave_out(self, canvas: Canvas, scale: int) -> None:
        """Drop the rows that the plan needs no more from a scale on."""
        plan = self.plan
        if plan.guided is not None and scale >= plan.guided:
            self._keep(self.images, [])
        if plan.skip is not None and scale == plan.skip.scale + 1 and not self._skipped:
            self._skipped = True
            self.features.follow(canvas, scale)
            going, guided = plan.skip.split(
                self.features.ahead(plan.skip.scale), self.schedule.grids[plan.skip.scale]
            )
            self._keep(
                [image for image in self.images if image in going],
                [image for image in self.guided if image in guided],
            )

    def close(self) -> None:
        """Free the cache; the session cannot be asked again."""
        self.cache = self._pruning = None
        self._encoded = 0

    # -- a pass ----------------------------------------------------------------------------------------

    def _end_of_pass(self, scale: int) -> int:
        """The last scale of the pass that decides a scale."""
        return self.until - 1 if scale >= self.until - self.plan.together else scale

    def _seen(self, canvas: Canvas, first: int, scale: int, last: int) -> Tensor:
        """What the tokens of a pass see, [R, P, D]; those of scales after `scale` see no more than that one."""
        seen = self.features.seen(canvas, first, scale)
        if last > scale:
            seen = torch.cat([seen, *map(self.features.ahead, range(scale + 1, last + 1))], 1)
        if len(self.images) == self.batch and len(self.guided) in (0, self.batch):
            return seen.repeat(self.rows_per_pass // self.batch, 1, 1)
        return seen[[*self.images, *self.guided]]

    def _read(self, seen: Tensor, first: int, last: int, asked: int) -> Tensor:
        """Run the network on scales `first` to `last`: the features of the last `asked` tokens, [R, asked, C]."""
        network, given = self.network, self._rows
        span = slice(self.schedule.borders[first], self.schedule.borders[last + 1])
        x = network.embed(given.start if first == 0 else None, seen, self._places.added[:, span])
        attention = self._attention_inputs(first, last)
        residual = self._residual(first, last)
        if residual is None:
            tail = asked if asked < span.stop - span.start else None
            x = self._transform(x, given.blocks, attention, tail)
        else:
            x = network.transform(x, given.blocks, attention, residual=residual)[:, -asked:]
        if isinstance(self.cache, GrowingCache):
            self.cache_bytes = self.cache.peak_bytes
        return x

    def _residual(self, first: int, last: int) -> Residual | None:
        """What sub-layers are replaced by in a pass; None if they are not."""
        rule: Residual = add
        if self._pruning is not None and first == last:
            rule = self._pruning.rule(last)
        elif first < last and self._encoded and isinstance(self.cache, GrowingCache):
            rule = _beside_all(self.cache, self.schedule.borders[first])
        if self.guided and self.guidance.inside:
            rule = self._guided_inside(first, last, rule)
        return None if rule is add else rule

    def _decided(self, x: Tensor, scale: int) -> Tensor:
        """Guided logits of a scale [n, p * p, V] from its features [R, p * p, C]."""
        network, head, images = self.network, self._rows.head, len(self.images)
        strength = self.guidance.strength(self.schedule, scale)
        if not strength or not self.guidance.on_logits or not self.guided:
            return network.logits(network.head_nm(x[:images], head[:, :images]))
        # guidance and the output layer are both linear: mixing features first halves the output layer
        features = network.head_nm(x, head).float()
        return network.logits(self._mixed(features, strength))

    def _mixed(self, x: Tensor, strength: float | Tensor) -> Tensor:
        """Features of guided images [n, P, C] from those of all rows [R, P, C]."""
        conditional, unconditional = x.split([len(self.images), len(self.guided)])
        if len(self.images) == len(self.guided):
            return (1 + strength) * conditional - strength * unconditional
        places = [self.images.index(image) for image in self.guided]
        guided = (1 + strength) * conditional[places] - strength * unconditional
        return conditional.index_copy(0, torch.tensor(places, device=x.device), guided)

    def _guided_inside(self, first: int, last: int, inner: Residual) -> Residual:
        """Guidance of the stream between blocks, of every token with the strength of its scale."""
        borders, depth = self.schedule.borders, len(self._rows.blocks)
        strengths = [self.guidance.strength(self.schedule, s) for s in range(last + 1)]
        scales = self._scales[borders[first] : borders[last + 1]]
        strength = self.features.value.new_tensor(strengths)[scales].unsqueeze(1)  # [P, 1]
        after = {depth - k for k in self.guidance.inside}
        places = [*range(len(self.images)), *(self.images.index(image) for image in self.guided)]

        def rule(x: Tensor, update: Update, attention: AttentionInputs, layer: int, part: Part) -> Tensor:
            x = inner(x, update, attention, layer, part)
            if part != "ffn" or layer not in after:
                return x
            guided = self._mixed(x, strength).to(x.dtype)[places]
            return torch.where((strength == 0).expand_as(x), x, guided)

        return rule

    def _attention_inputs(self, first: int, last: int) -> AttentionInputs:
        borders = self.schedule.borders
        stored, stop = borders[first], borders[last + 1]
        device = self.features.value.device
        positional = self._places.positional
        if positional is not None:
            positional = positional[stored:stop]
        mask = None
        if last > first:  # several scales in one pass: none may look ahead
            scales = self._scales[:stop]
            mask = scales[stored:].unsqueeze(1) >= scales  # [P, K]
        if last == self.until - 1:
            if self.cache is None:
                return AttentionInputs(positional, mask=mask)
            return AttentionInputs(positional, mask=mask, cache=self.cache, length=stored)
        if self.cache is None:
            self.cache = self._new_cache()
        self._encoded = last + 1
        slots = torch.arange(stored, stop, device=device)
        observe = None if self._pruning is None else self._pruning.observer(last)
        if isinstance(self.cache, GrowingCache):
            self.cache.budgets = self._budgets(first, last)
            if self.cache.budgets and self.plan.criterion == "attention":
                observe = observe or ReceivedAttention()
                self.cache.scores = observe.scores
        return AttentionInputs(
            positional, mask=mask, cache=self.cache, slots=slots, length=stop, observe=observe
        )

    # -- rows and the cache ----------------------------------------------------------------------------

    def _new_cache(self) -> KVCache:
        if self.plan.uneven or (self.plan.drops_rows and not self._compiled):
            return GrowingCache(len(self._rows.blocks), self._cache_dtype)
        slots = self.schedule.borders[self.until - self.plan.together]
        cache = self.network.new_cache(self.rows_per_pass, slots, self._cache_dtype)
        self.cache_bytes = cache.nbytes
        return cache

    def _budgets(self, first: int, last: int) -> list[Budget]:
        """How many keys of the scales of a pass stay."""
        start, budgets = self.schedule.borders[first], []
        for scale in range(first, last + 1):
            span = self.schedule.span(scale)
            counts = self.plan.counts(scale, span.stop - span.start, len(self._rows.blocks))
            if counts is not None:
                budgets.append(Budget(span.start - start, span.stop - start, counts))
        return budgets

    def _keep(self, images: Sequence[int], guided: Sequence[int]) -> None:
        """Go on with some images, and with unconditional rows of some of them."""
        rows = [self.images.index(image) for image in images]
        rows += [len(self.images) + self.guided.index(image) for image in guided]
        if len(rows) == self.rows_per_pass:
            return
        self.images, self.guided = list(images), list(guided)
        if not rows:
            self.close()
            return
        device = self.features.value.device
        leading = rows == list(range(len(rows)))
        self._rows = self._rows.part(slice(0, len(rows)) if leading else torch.tensor(rows, device=device))
        if self.cache is not None:
            self.cache.keep_rows(rows)
        if self._pruning is not None:
            self._pruning.keep_rows(rows)

    def _of_all_images(self, logits: Tensor) -> Tensor:
        """Logits [n, ...] of the images that are decided in their places among all, [B, ...]."""
        if len(self.images) == self.batch:
            return logits
        every = logits.new_zeros(self.batch, *logits.shape[1:])
        every[self.images] = logits
        return every


def _beside_all(cache: GrowingCache, stored: int) -> Residual:
    """Attention under a mask where layers hold different numbers of tokens, of which each is seen by all of the pass.

    Args:
        stored: tokens of the scales before the pass, which the mask counts.
    """

    def rule(x: Tensor, update: Update, attention: AttentionInputs, layer: int, part: Part) -> Tensor:
        if part == "attention" and attention.mask is not None:
            among = attention.mask[:, stored:]
            before = among.new_ones(len(among), cache.length(layer))
            attention = replace(attention, mask=torch.cat([before, among], 1))
        return x + update(x, attention)

    return rule
