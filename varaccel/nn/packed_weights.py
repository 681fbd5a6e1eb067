"""Weights laid out for products over few rows on a processor.

A decoding pass multiplies every matrix of a network by a few rows: images, times the branches of guidance, times draft
tokens. Such a product takes as long as its weights take to be read, if they lie in the order in which they are needed.
A general matrix product does not have them so, and at 2 rows reads them at a half of the speed or less. Packed once,
they are read at the speed of memory; those that float16 can say without rounding, as files of float16 hold them, at two
bytes each, while all arithmetic stays in float32.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from itertools import count
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varaccel.nn.devices import is_host, lies_on_host

MAX_ROWS = 64
"""Rows up to which packed weights are used: from there on arithmetic decides, and both take as long."""

MIN_NUMBERS = 2**14
"""Numbers of the smallest weight that is packed: the caches of a processor hold smaller ones in any order."""

LARGEST_SHARE = 0.25
"""Share of this machine's memory up to which a network's packed weights may take room beside it."""

Product = Callable[[Tensor], Tensor]

_LOCK = threading.Lock()
_NUMBERS = count()
_OFF: ContextVar[bool] = ContextVar("packed weights are not used", default=False)


@contextmanager
def packed_weights(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Have the linear layers of networks read packed weights within the block, where that is quicker.

    Layers that are not usual ones (quantised, split, hooked to be offloaded), weights of other types than float32, and
    networks on other devices are left alone. Packed weights are made when a layer first has few rows, and kept until
    the layer goes; in each block they are held against the weights once, so that no change of these is overlooked.
    Blocks of several threads may overlap. Networks are as they were afterwards.
    """
    layers: list[tuple[nn.Linear, _Layer]] = []
    if not _OFF.get() and _on_processor():
        with _LOCK:
            for network in networks:
                layers += _installed(network)
    try:
        yield
    finally:
        with _LOCK:
            for module, layer in layers:
                layer.uses -= 1
                if not layer.uses:
                    vars(module).pop("forward", None)


@contextmanager
def usual_products() -> Iterator[None]:
    """Leave weights as they lie within the block, to measure what packing gains."""
    token = _OFF.set(True)
    try:
        yield
    finally:
        _OFF.reset(token)


def round_to_float16(network: nn.Module) -> int:
    """Round the weights of linear layers that can be packed to the nearest numbers of float16, for good.

    They stay in float32, and so does all arithmetic; only packed they take two bytes. A layer with numbers beyond
    float16 is left as it is.

    Returns:
        layers that hold numbers of float16 now.
    """
    layers = 0
    for module in network.modules():
        if type(module) is nn.Linear and _can_be_packed(module.weight):
            rounded = module.weight.detach().to(torch.float16)
            if bool(rounded.isfinite().all()):
                module.weight.data.copy_(rounded)
                layers += 1
    return layers


def bytes_read(weight: Tensor, rows: int) -> int:
    """Bytes of a weight matrix that a product over `rows` rows reads in `packed_weights`."""
    few = 0 < rows <= MAX_ROWS and _can_be_packed(weight) and weight.numel() >= MIN_NUMBERS
    if few and _has_float16_products() and _is_float16(weight):
        return weight.numel() * 2
    return weight.nbytes


class _Layer:
    """The packed weights of one linear layer.

    Attributes:
        number: by which compiled code finds it.
        uses: blocks under way.
        checked: whether a block under way has held them against the weights.
    """

    def __init__(self, module: nn.Linear) -> None:
        self.number = next(_NUMBERS)
        self.uses = 0
        self.checked = False
        self._module = ref(module)
        self._product: Product = self._unpacked
        self._seen: _Fingerprint | None = None
        self._lock = threading.Lock()

    def product(self, x: Tensor) -> Tensor:
        """The layer at few rows."""
        if not self.checked:
            with self._lock:
                if not self.checked:  # else another thread has done it meanwhile
                    self._check(self._layer)
        return self._product(x)

    @property
    def _layer(self) -> nn.Linear:
        module = self._module()
        assert module is not None, "a layer that runs is alive"
        return module

    def _check(self, module: nn.Linear) -> None:
        seen = _Fingerprint(module)
        if seen != self._seen:
            self._product = self._unpacked  # the memory of the old ones first
            self._product = _pack(module.weight, module.bias) or self._unpacked
            self._seen = seen
        self.checked = True

    def _unpacked(self, x: Tensor) -> Tensor:
        module = self._layer
        return F.linear(x, module.weight, module.bias)


class _Fingerprint:
    """What weights are recognised by.

    The counter of versions does not see what is written through `weight.data`, as averages of weights often are. So
    the numbers themselves are read: their sum as integers sees the smallest change of any, a product with a fixed
    vector sees numbers that changed places.
    """

    def __init__(self, module: nn.Linear) -> None:
        weight, bias = module.weight.detach(), module.bias
        size = weight.shape[1]
        self._place = weight.data_ptr(), weight.shape
        self._sum = int(weight.view(torch.int64 if size % 2 == 0 else torch.int32).sum())
        product = torch.mv(weight, _fixed_vector(size))
        self._numbers = product if bias is None else torch.cat([product, bias.detach()])

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Fingerprint)
            and (self._place, self._sum) == (other._place, other._sum)
            and torch.equal(self._numbers, other._numbers)
        )

    __hash__ = None  # type: ignore[assignment]


_LAYERS: WeakKeyDictionary[nn.Linear, _Layer] = WeakKeyDictionary()
_BY_NUMBER: WeakValueDictionary[int, _Layer] = WeakValueDictionary()


def _installed(network: nn.Module) -> list[tuple[nn.Linear, _Layer]]:
    """Put the layers of a network in place, under the lock; those that were."""
    modules = [m for m in network.modules() if type(m) is nn.Linear and m.weight.numel() >= MIN_NUMBERS]
    modules = [m for m in modules if _can_be_packed(m.weight)]
    if sum(module.weight.nbytes for module in modules) > LARGEST_SHARE * _memory():
        return []
    layers = []
    for module in modules:
        layer = _LAYERS.get(module)
        if layer is None:
            layer = _LAYERS[module] = _Layer(module)
            _BY_NUMBER[layer.number] = layer
        if not layer.uses:
            if "forward" in vars(module):
                continue  # hooked: its weights come and go
            module.forward = _Forward(module, layer)  # type: ignore[method-assign,assignment]
        layer.uses += 1
        layer.checked = False
        layers.append((module, layer))
    return layers


class _Forward:
    """`nn.Linear.forward`, with packed weights where there are few rows."""

    def __init__(self, module: nn.Linear, layer: _Layer) -> None:
        self.module, self.layer = module, layer
        self.number, self.most = layer.number, MAX_ROWS * module.in_features

    def __call__(self, x: Tensor) -> Tensor:
        module = self.module
        usual = x.dtype != torch.float32 or not lies_on_host(x) or not 0 < x.numel() <= self.most
        if usual or torch.is_grad_enabled():
            return F.linear(x, module.weight, module.bias)
        if torch.compiler.is_compiling():
            return torch.ops.varaccel.packed_linear(x, self.number, module.out_features)
        if torch._C._len_torch_dispatch_stack():  # somebody counts operations: usual ones are known
            return F.linear(x, module.weight, module.bias)
        return self.layer.product(x)

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy of the network that is made meanwhile has weights of its own
        return _own_forward, (self.module,)


def _own_forward(module: nn.Linear) -> Product:
    return MethodType(nn.Linear.forward, module)


def _packed_linear(x: Tensor, layer: int, width: int) -> Tensor:
    """A linear layer at few rows; packed weights are no tensors that a compiler could look into."""
    return _BY_NUMBER[layer].product(x)


# defined by hand: what `torch.library.custom_op` puts around a function takes longer than a small layer
_LIBRARY = torch.library.Library("varaccel", "FRAGMENT")
_LIBRARY.define("packed_linear(Tensor x, int layer, int width) -> Tensor")
_LIBRARY.impl("packed_linear", _packed_linear, "CPU")


@torch.library.register_fake("varaccel::packed_linear", lib=_LIBRARY)
def _(x: Tensor, layer: int, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


def _pack(weight: Tensor, bias: Tensor | None) -> Product | None:
    weight = weight.detach()
    if _has_float16_products() and _is_float16(weight):
        packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)
    if torch.backends.mkldnn.is_available():
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, ordered, bias, "none", [], "")
    return None


def _can_be_packed(weight: Tensor) -> bool:
    return (
        type(weight) is nn.Parameter
        and weight.dtype == torch.float32
        and is_host(weight.device)
        and weight.dim() == 2
        and weight.is_contiguous()
    )


def _is_float16(weight: Tensor) -> bool:
    """Whether float16 says every number without rounding."""
    return torch.equal(weight.to(torch.float16).to(torch.float32), weight)


@lru_cache(maxsize=1)
def _memory() -> int:
    """Bytes of this machine, asked for once and not in every call."""
    return psutil.virtual_memory().total


@lru_cache(maxsize=1)
def _on_processor() -> bool:
    """Whether this is a processor for which either kind of packed weights was found to be quicker."""
    return platform.machine().lower() in ("x86_64", "amd64")


@lru_cache(maxsize=1)
def _has_float16_products() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


@lru_cache(maxsize=64)
def _fixed_vector(size: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.linspace(1, 2, size, device="cpu", dtype=torch.float32)
