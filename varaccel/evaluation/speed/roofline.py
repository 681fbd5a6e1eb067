"""What a call must at least take on a device, from the weights it reads and the arithmetic it does.

The model is the roofline of Williams et al. 2009: a call cannot be quicker than its weights can be read, nor quicker
than its operations can be done. Both are counted while the call runs, and both rates are measured on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from varaccel.accelerators import AnyAccelerator
from varaccel.engine.balance import best_seconds, measure_balance
from varaccel.errors import InputError
from varaccel.nn.devices import is_host
from varaccel.nn.packed_weights import MAX_ROWS, bytes_read

_HOST_MEGABYTES, _DEVICE_MEGABYTES = 256, 1024
"""Size of each of the two buffers of a copy: many times the largest cache."""

_COPIES = 5


@dataclass(frozen=True)
class Work:
    """What a call asks of a device in its token phase.

    Attributes:
        weight_bytes: bytes of weights that its matrix products and convolutions take, every time they do; those that
            `varaccel.nn.packed_weights` reads at two bytes a number count as such.
        operations: floating-point operations of these and of attention; a multiply-add is two.
        network_bytes: bytes of the weights among `weight_bytes` if each is counted once.
    """

    weight_bytes: int
    operations: int
    network_bytes: int


@dataclass(frozen=True)
class Floor:
    """The least time of a call's token phase (prefill and steps) on a device.

    It is max(weight_bytes / bandwidth, operations / rate). It leaves out
    - keys and values, activations, logits and embeddings: everything that is moved and is no weight of a product;
    - arithmetic other than matrix products, convolutions and attention, so norms, softmax and draws;
    - launches of kernels, Python, and whatever keeps a device from reading and calculating at the same time;
    - the text encoder and the image tokenizer's decoder, which run in other phases.

    Hence a call usually stays well above it. In two cases it can get below: a cache may hold the weights from one pass
    to the next, which `network_bytes` tells for a model that is smaller than the last cache; and reading alone can be
    quicker than copying, on processors by up to a half, since a copy also reads the lines that it writes.

    Attributes:
        weight_bytes, operations, network_bytes: see `Work`.
        bandwidth: bytes per second, read and written, of a large copy on the device.
        rate: floating-point operations per second of large matrix products in the model's number type.
    """

    weight_bytes: int
    operations: int
    bandwidth: float
    rate: float
    network_bytes: int = 0

    @property
    def memory_seconds(self) -> float:
        """Time to read the weights."""
        return self.weight_bytes / self.bandwidth

    @property
    def arithmetic_seconds(self) -> float:
        """Time to do the operations."""
        return self.operations / self.rate

    @property
    def seconds(self) -> float:
        return max(self.memory_seconds, self.arithmetic_seconds)

    @property
    def binds(self) -> Literal["memory", "arithmetic"]:
        """Which of the two takes longer."""
        return "memory" if self.memory_seconds >= self.arithmetic_seconds else "arithmetic"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with those that follow from the others."""
        return asdict(self) | {
            "memory_seconds": self.memory_seconds,
            "arithmetic_seconds": self.arithmetic_seconds,
            "seconds": self.seconds,
            "binds": self.binds,
        }


class WorkCounter(TorchDispatchMode):
    """Counts `Work` of everything that runs under it, whatever network it belongs to.

    A weight is what is or looks into the storage of an `nn.Parameter` that an operation was given. So networks that
    an accelerator brings or loads by name are seen like those of the pipeline, and a copy of a parameter in another
    number type is not. Buffers are no weights here: no network of this library multiplies by one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self._weight_bytes = 0
        self._operations = 0
        # storages are held, so that no other tensor can come to lie at the same address
        self._weights: dict[int, torch.UntypedStorage] = {}
        self._parameters: dict[int, nn.Parameter] = {}
        self._few_row_bytes: dict[int, int] = {}
        self._read: dict[tuple[int, int], int] = {}

    @property
    def work(self) -> Work:
        """What was counted so far."""
        return Work(self._weight_bytes, self._operations, sum(self._read.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            if isinstance(tensor, nn.Parameter):
                storage = tensor.untyped_storage()
                self._weights[storage.data_ptr()] = storage
                self._parameters[storage.data_ptr()] = tensor
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            # in inference mode composite operations arrive whole: a linear layer is not yet a product
            with self:
                parts = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if parts is NotImplemented else parts
        result = func(*args, **kwargs)
        self._operations += formula(*args, **kwargs, out_val=result)
        for tensor in tensors:
            self._note(tensor, result)
        return result

    def _note(self, tensor: Tensor, result: Any) -> None:
        """An operand of a product that gave `result` is read."""
        place = tensor.untyped_storage().data_ptr()
        if place in self._weights:
            # what is expanded lies there once
            sizes = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
            size = min(prod(sizes) * tensor.element_size(), self._packed_bytes(place, tensor, result))
            self._weight_bytes += size
            view = place, int(tensor.storage_offset())
            self._read[view] = max(size, self._read.get(view, 0))

    def _packed_bytes(self, place: int, tensor: Tensor, result: Any) -> int:
        """What is read of a weight in a product whose rows are few enough for packed ones."""
        weight = self._parameters[place]
        if weight.dim() != 2 or tensor.numel() != weight.numel() or not isinstance(result, Tensor):
            return tensor.nbytes
        if result.numel() // weight.shape[0] > MAX_ROWS:
            return tensor.nbytes
        if place not in self._few_row_bytes:  # looks at every number of the weight
            paused, self.paused = self.paused, True
            self._few_row_bytes[place] = bytes_read(weight, 1)
            self.paused = paused
        return self._few_row_bytes[place]


def count_work(
    pipe: Any,
    prompts: Sequence[str | int],
    accelerator: AnyAccelerator | None = None,
    *,
    seed: int = 0,
    **call: Any,
) -> Work:
    """Run one call and count what its token phase, prefill and steps, asks of the device.

    The text encoder is left out and the image tokenizer's decoder does not run. The step loop of a diffusion head,
    which a GPU is given as one CUDA graph, runs step by step here. Counting takes longer than the call.

    Args:
        pipe: a pipeline that is not compiled.
        prompts: one image of each.
        accelerator: what to run, None for plain decoding.
        seed, call: arguments of the pipeline call.

    Raises:
        InputError: the pipeline is compiled; arguments that cannot be used.
    """
    if pipe.is_compiled:
        raise InputError("a compiled network hides what it does; count on the pipeline before compile().")
    counter = WorkCounter()
    with _without_graphs(pipe), _not_counted(counter, getattr(pipe, "text_encoder", None)), counter:
        pipe(list(prompts), accelerator=accelerator, seed=seed, output_type="latent", **call)
    return counter.work


def mean_work(works: Sequence[Work]) -> Work:
    """The mean of several calls, rounded; the networks of the largest."""
    return Work(
        round(sum(work.weight_bytes for work in works) / len(works)),
        round(sum(work.operations for work in works) / len(works)),
        max(work.network_bytes for work in works),
    )


def floor_of(work: Work, device: torch.device, dtype: torch.dtype) -> Floor:
    """The least time of `work` on a device whose matrix products are of type `dtype`; measures both once."""
    return Floor(
        work.weight_bytes,
        work.operations,
        measure_bandwidth(device),
        measure_balance(device, dtype).rate,
        work.network_bytes,
    )


@lru_cache(maxsize=4)
def measure_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy far larger than the caches; once per process and device.

    Takes half a GB of memory on a CPU and two on a GPU while it measures, and well under a second or two. The best of
    several copies, because anything else that runs can only make them slower.
    """
    size = (_HOST_MEGABYTES if is_host(device) else _DEVICE_MEGABYTES) * 2**20
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source), device, _COPIES)


@contextmanager
def _without_graphs(pipe: Any) -> Iterator[None]:
    """Replaying a CUDA graph launches operations that nobody sees."""
    graphs = vars(pipe).get("_graphs")
    if graphs is None:
        yield
        return
    pipe._graphs = None
    try:
        yield
    finally:
        pipe._graphs = graphs


@contextmanager
def _not_counted(counter: WorkCounter, network: Any) -> Iterator[None]:
    """Pause a counter while `network` runs."""
    if not isinstance(network, nn.Module):
        yield
        return

    def pausing(paused: bool) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counter.paused = paused

        return hook

    hooks = [
        network.register_forward_pre_hook(pausing(True)),
        network.register_forward_hook(pausing(False), always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
