"""One masked network with a diffusion head reading one canvas for one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from varaccel.engine.canvas import Canvas
from varaccel.hosts.masked.denoising import HeadSampling, Loop, Process, Step, denoising_step
from varaccel.hosts.masked.distribution import DiffusionDistribution
from varaccel.hosts.masked.guidance import MaskedGuidance
from varaccel.hosts.masked.schedule import MaskedInputs
from varaccel.models.mar import MARTransformer
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.condition import Condition
from varaccel.nn.gather import rows_of
from varaccel.nn.kv_cache import KVCache
from varaccel.nn.number_check import NumberCheck

Transform = Callable[..., Tensor]
"""`MARTransformer.forward`, or a compiled version of it."""


class MaskedSession:
    """A masked network, its guidance and its head for one call.

    Every pass reads all that is known. What follows from the condition alone is worked out once per call, only the
    positions that are asked for go through the last layer, and the head gets everything about them at once.

    Rows of a guided call are [conditional; unconditional].

    Args:
        network: the model, in eval mode; it is not changed.
        condition: of the B images; None for no condition.
        batch: B.
        transform: replaces `network.forward`, for a compiled version of it.
        step, loop: replace `denoising_step`, likewise, and the loop around it.
    """

    def __init__(
        self,
        network: MARTransformer,
        condition: Condition | None,
        *,
        batch: int,
        guidance: MaskedGuidance | None = None,
        sampling: HeadSampling | None = None,
        transform: Transform | None = None,
        step: Step = denoising_step,
        loop: Loop | None = None,
    ) -> None:
        self.network, self.batch = network, batch
        self.guidance = (guidance or MaskedGuidance()) if condition is not None else MaskedGuidance()
        self.sampling = sampling or HeadSampling()
        self._transform = transform or network.forward
        self.reads = 0  # forward passes of the network
        self.number_check = NumberCheck.of(network)
        self._head_check = NumberCheck.of(network.head)
        self.number_checks = (self.number_check, self._head_check)
        with torch.inference_mode():
            null = network.embed_slots(network.null_condition().expand(-1, network.buffer, -1))
            null = null.expand(batch, -1, -1)
            if condition is None:
                self._slots = null
            else:
                self._slots = network.embed_slots(network.embed_condition(condition.values, condition.mask))
                if self.guidance.enabled:
                    self._slots = torch.cat([self._slots, null])
            self.process = Process.of(network.head, network.config.noise_schedule, self.sampling, step, loop)

    @property
    def rows_per_pass(self) -> int:
        """Network rows of a pass."""
        return self._slots.shape[0]

    @property
    def cache_bytes(self) -> int:
        """Size of the caches: a masked network that reads everything needs none."""
        return 0

    def _see_tokens(self, tokens: Tensor) -> None:
        self._head_check.values(tokens, self.reads)

    @torch.inference_mode()
    def predict(self, canvas: Canvas, inputs: MaskedInputs) -> DiffusionDistribution:
        """The distribution of the tokens at `inputs.positions`, [B, P]. All that is known must be on the canvas."""
        conditions = self.conditions(canvas, inputs)
        self.number_check.values(conditions, self.reads)
        return self.distribution(conditions, inputs)

    def distribution(self, conditions: Tensor, inputs: MaskedInputs) -> DiffusionDistribution:
        """The distribution of tokens under the conditions [R, P, D] of the head, guided as the iteration says."""
        if not self.guidance.enabled:
            return DiffusionDistribution(self.process, conditions, None, self._see_tokens)
        scale = torch.as_tensor(
            self.guidance.at(inputs.share(self.network.num_tokens)),
            dtype=torch.float32,
            device=conditions.device,
        )
        scale = scale.expand(inputs.positions.shape).reshape(-1, 1)
        return DiffusionDistribution(self.process, conditions, scale, self._see_tokens)

    def conditions(self, canvas: Canvas, inputs: MaskedInputs) -> Tensor:
        """What the head is told about the positions, [R, P, D]."""
        self.reads += 1
        times = self.rows_per_pass // self.batch
        known, asked = (index.repeat(times, 1) for index in (inputs.known, inputs.positions))
        tokens = rows_of(canvas.tokens, inputs.known).repeat(times, 1, 1)
        return self._transform(self._slots, tokens, known, asked, embedded=True, padded=inputs.padded)


class FeatureCacheSession(MaskedSession):
    """A masked session that reads most of what it knows only every few passes.

    Keys and values of all slots are kept, in encoder and decoder. A full pass renews all of them. Between full passes
    only what changed is read, tokens that were just decided and positions that are asked for, and looks at what is
    kept of the others: features of unchanged tokens hardly move from one iteration to the next (LazyMAR, Yan et al.
    2025, arXiv 2503.12450, section 3, keeps them in the same spirit). Approximate.

    Unconditional rows may be left out of these passes: the condition of the head then is that of the conditional row
    plus their difference at the last full pass (LazyMAR's condition cache).

    Args:
        refresh: number of passes from one full pass to the next; 1 reads everything in every pass.
        keep_unconditional: leave the unconditional rows out of the other passes.
        network, condition, batch, guidance, sampling, step, loop: as in `MaskedSession`.
    """

    def __init__(
        self,
        network: MARTransformer,
        condition: Condition | None,
        *,
        batch: int,
        refresh: int = 4,
        keep_unconditional: bool = True,
        guidance: MaskedGuidance | None = None,
        sampling: HeadSampling | None = None,
        step: Step = denoising_step,
        loop: Loop | None = None,
    ) -> None:
        super().__init__(
            network,
            condition,
            batch=batch,
            guidance=guidance,
            sampling=sampling,
            step=step,
            loop=loop,
        )
        self.refresh, self.keep_unconditional = refresh, keep_unconditional
        rows = self.rows_per_pass
        self._caches = network.new_caches(rows)
        self._since = refresh  # passes since the last full one, which counts as 1
        self._read = 0  # tokens per image that the encoder has read
        # which encoder slots hold something; the last one is spare
        slots = network.buffer + network.num_tokens + 1
        self._usable = torch.zeros(rows, slots, dtype=torch.bool, device=self._slots.device)
        self._difference: Tensor | None = None  # [B, N, D], unconditional minus conditional

    @property
    def cache_bytes(self) -> int:
        return sum(cache.nbytes for cache in self._caches)

    def conditions(self, canvas: Canvas, inputs: MaskedInputs) -> Tensor:
        self.reads += 1
        if self._since < self.refresh:
            self._since += 1
            result = self._partial(canvas, inputs)
        else:
            self._since = 1
            result = self._full(canvas, inputs)
        self._read = inputs.known.shape[1]
        return result

    def _full(self, canvas: Canvas, inputs: MaskedInputs) -> Tensor:
        network, times = self.network, self.rows_per_pass // self.batch
        encoder, decoder = self._caches
        known = inputs.known.repeat(times, 1)
        tokens = network.embed_tokens(rows_of(canvas.tokens, inputs.known).repeat(times, 1, 1), known)
        front = torch.arange(network.buffer, device=known.device).expand(len(known), -1)
        slots = torch.cat([front, known + network.buffer], 1)
        self._usable[:] = False
        self._usable.scatter_(1, slots, True)
        x = network.encode(
            torch.cat([self._slots, tokens], 1), self._attention_inputs(encoder, slots, len(known))
        )
        every = torch.arange(network.buffer + network.num_tokens, device=known.device)
        x = network.spread(x, known)
        attention = AttentionInputs(cache=decoder, slots=every, length=len(every))
        if times == 1 or not self.keep_unconditional or self.refresh == 1:
            asked = inputs.positions.repeat(times, 1)
            return network.conditions(network.decode(x, attention, asked + network.buffer), asked)
        # all positions, since later passes need the difference of the rows there
        features = network.decode(x, attention)[:, network.buffer :]
        conditional, unconditional = features.chunk(2)
        self._difference = unconditional - conditional
        asked = inputs.positions.repeat(times, 1)
        return network.conditions(rows_of(features, asked), asked)

    def _partial(self, canvas: Canvas, inputs: MaskedInputs) -> Tensor:
        """Read what was decided since the last pass, and what is asked for."""
        network = self.network
        alone = self._difference is not None
        times = 1 if alone else self.rows_per_pass // self.batch
        encoder, decoder = self._caches
        # both are ends of the image's order: the newest come first
        fresh = inputs.known[:, : inputs.known.shape[1] - self._read]
        new, asked = (index.repeat(times, 1) for index in (fresh, inputs.positions))
        slots = new + network.buffer
        self._usable.scatter_(1, (fresh + network.buffer).repeat(len(self._usable) // self.batch, 1), True)
        tokens = network.embed_tokens(rows_of(canvas.tokens, fresh).repeat(times, 1, 1), new)
        encoded = network.encode(tokens, self._attention_inputs(encoder, slots, len(new)))
        places = asked + network.buffer
        x = torch.cat([network.decoder_inputs(encoded, slots), network.decoder_inputs(None, places)], 1)
        attention = AttentionInputs(
            cache=decoder,
            slots=torch.cat([slots, places], 1),
            length=network.buffer + network.num_tokens,
        )
        index = torch.arange(new.shape[1], x.shape[1], device=x.device).expand(len(x), -1)
        features = network.decode(x, attention, index)
        if self._difference is not None:
            features = torch.cat([features, features + rows_of(self._difference, inputs.positions)])
            asked = asked.repeat(2, 1)
        return network.conditions(features, asked)

    def _attention_inputs(self, cache: KVCache, slots: Tensor, rows: int) -> AttentionInputs:
        return AttentionInputs(cache=cache, slots=slots, mask=self._usable[:rows, None, None, :])
