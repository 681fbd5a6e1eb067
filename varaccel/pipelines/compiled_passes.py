"""What is compiled of the networks of each family, and which of its sizes vary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from varaccel.hosts.masked.denoising import Coefficients, denoising_step
from varaccel.models.infinity import BlockCondition
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.kv_cache import KVCache
from varaccel.pipelines.compiled import CompiledPass, Size


def _transform(network: Any, *arguments: Any, **options: Any) -> Tensor:
    return network.transform(*arguments, **options)


def _forward(network: Any, *arguments: Any, **options: Any) -> Tensor:
    return network.forward(*arguments, **options)


def _buffers(cache: KVCache | None) -> Iterator[Tensor]:
    """Keys and values [L, R, H, S, D]; none where they lie on several devices, in buffers of their own."""
    if cache is not None and "keys" in vars(cache):
        yield cache.keys
        yield cache.values


def _causal_sizes(
    x: Tensor, attention: AttentionInputs, layers: Sequence[int] | None = None
) -> Iterator[Size]:
    """Rows, entries and slots: drafts, trees, batches and guidance all change them."""
    yield from (Size(x, axis) for axis in (0, 1))
    for each in (attention.positional, attention.modulation):  # [1 or R, 1 or P, ...]
        if each is not None:
            yield from (Size(each, axis) for axis in (0, 1))
    if attention.mask is not None:  # [R, 1, P, K]
        yield from (Size(attention.mask, axis) for axis in (0, 2, 3))
    if attention.slots is not None:  # [P] or [R, P]
        yield from (Size(attention.slots, axis) for axis in range(attention.slots.dim()))
    for buffer in _buffers(attention.cache):
        yield from (Size(buffer, axis) for axis in (1, 3))


def _causal_buffers(
    x: Tensor, attention: AttentionInputs, layers: Sequence[int] | None = None
) -> Iterator[Tensor]:
    return _buffers(attention.cache)


def _scale_sizes(
    x: Tensor, told: Sequence[Any], attention: AttentionInputs, tail: int | None = None
) -> Iterator[Size]:
    """Rows, and the length of a text: the scales are always the same, so each gets a version of its own."""
    yield Size(x, 0, usual=True)
    for block in told:
        if isinstance(block, BlockCondition):
            yield from _text_sizes(block)
        else:
            yield Size(block, 1, usual=True)
    for buffer in _buffers(attention.cache):
        yield Size(buffer, 1, usual=True)


def _text_sizes(block: BlockCondition) -> Iterator[Size]:
    yield Size(block.modulation, 1, usual=True)
    for each in (block.keys, block.values):  # [R, H, m, c]
        yield Size(each, 0, usual=True)
        yield Size(each, 2)
    if block.mask is not None:  # [R, 1, 1, m]
        yield Size(block.mask, 0, usual=True)
        yield Size(block.mask, 3)


def _scale_buffers(
    x: Tensor, told: Sequence[Any], attention: AttentionInputs, tail: int | None = None
) -> Iterator[Tensor]:
    return _buffers(attention.cache)


def _masked_sizes(
    slots: Tensor, tokens: Tensor, known: Tensor, asked: Tensor | None = None, **_: bool
) -> Iterator[Size]:
    """Rows, known tokens and those that are asked for: both change from pass to pass."""
    yield Size(slots, 0)
    for each in (tokens, known, asked):
        if each is not None:
            yield from (Size(each, axis) for axis in (0, 1))


def _denoising_sizes(
    x: Tensor,
    modulations: Sequence[Tensor],
    row: Coefficients,
    scale: Tensor | None,
    before: Tensor | None,
    keep: bool = False,
) -> Iterator[Size]:
    """Tokens of a pass."""
    for each in (x, *modulations, scale, before):
        if each is not None:
            yield Size(each, 0)


CAUSAL_PASS = CompiledPass(_transform, _causal_sizes, _causal_buffers)
"""`transform` of a causal network or an EAGLE head. Its pass over the condition is not compiled: it is one of many."""

SCALE_PASS = CompiledPass(_transform, _scale_sizes, _scale_buffers)
"""`transform` of a next-scale network."""

MASKED_PASS = CompiledPass(_forward, _masked_sizes, fullgraph=False, graphs=False)
"""`forward` of a masked network. Its lengths are never the same twice in a call, so it is not recorded unless asked."""

DENOISING_STEP = CompiledPass(
    denoising_step,
    _denoising_sizes,
    fullgraph=False,
    graphs=False,
    recordable=False,
)
"""The step of a diffusion head; the loop around it is recorded on a GPU, see `GraphedLoop`."""
