"""Compiled networks that any number of shapes and threads may use."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from varaccel.errors import InputError, unknown_name
from varaccel.nn.devices import is_gpu, is_host

logger = logging.getLogger(__name__)

VERSIONS = 1 << 20
"""Versions of one function at most: that many are never made, and a network that had too many would refuse a call."""

# modes of `torch.compile` that record CUDA graphs, and what they are without that
_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
CUDA_GRAPH_MODES = tuple(_WITHOUT_GRAPHS)
_LAUNCH = threading.Lock()


@dataclass(frozen=True)
class Size:
    """A size of an argument that differs from pass to pass or from call to call.

    Attributes:
        tensor: the argument.
        axis: which of its sizes.
        usual: whether the first number that is seen gets a version of its own. All further numbers share theirs.
    """

    tensor: Tensor
    axis: int
    usual: bool = False


Sizes = Callable[..., Iterator[Size]]
"""The sizes of a function's arguments that vary."""


@dataclass(frozen=True)
class CompiledPass:
    """What a family compiles of a network.

    Attributes:
        function: (network, *arguments) -> outputs. The network is an argument so that what was compiled belongs to no
            weights: a network that was exchanged, copied or given with a call is never answered by another one.
        sizes: of the arguments, without the network.
        written: the buffers among the arguments that the pass writes to.
        fullgraph: whether a graph break is an error.
        graphs: whether CUDA graphs are recorded on a GPU unless a mode is asked for.
        recordable: whether they may be; not where the caller records a graph around it.
    """

    function: Callable[..., Any]
    sizes: Sizes
    written: Callable[..., Iterable[Tensor]] = lambda *_, **__: ()
    fullgraph: bool = True
    graphs: bool = True
    recordable: bool = True


class Compiled:
    """A function under `torch.compile` that makes versions for new shapes without end, and few of them.

    The compiler gives up on a function with more than 8 versions, under `fullgraph` with an error. A version per scale,
    or several networks of one class in a process, already need more.

    Sizes that vary are named, so that nothing is left to the compiler's guess from what it saw first: one version
    serves all of their numbers but 1 (which the compiler treats apart) and `Size.usual` ones.

    Args:
        function: to be compiled.
        sizes: of its arguments, those that vary.
        written: of its arguments, the buffers that it writes to. A CUDA graph can only write where it was recorded to;
            if a buffer has moved, another graph is recorded.
        options: of `torch.compile`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        sizes: Sizes | None = None,
        written: Callable[..., Iterable[Tensor]] | None = None,
        **options: Any,
    ) -> None:
        self._function = torch.compile(function, **options)
        self._sizes, self._written = sizes, written
        # these write every result to the same place, and threads would find each other's there
        self._recorded = options.get("mode") in CUDA_GRAPH_MODES
        self._usual: int | None = None  # the first number of rows

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self._sizes is not None:
            self._mark(self._sizes(*arguments, **options))
        # settings of the compiler belong to the thread that runs the function
        with torch._dynamo.config.patch(recompile_limit=VERSIONS, accumulated_recompile_limit=VERSIONS):
            if not self._recorded:
                return self._function(*arguments, **options)
            for buffer in () if self._written is None else self._written(*arguments, **options):
                torch._dynamo.mark_static_address(buffer)
            with _LAUNCH:
                return tree_map_only(Tensor, torch.clone, self._function(*arguments, **options))

    def _mark(self, sizes: Iterable[Size]) -> None:
        for size in sizes:
            count = size.tensor.shape[size.axis]
            if size.usual and self._usual is None:
                self._usual = count
            if count > 1 and not (size.usual and count == self._usual):
                torch._dynamo.maybe_mark_dynamic(size.tensor, size.axis)


class Compilation:
    """How the networks of a pipeline are compiled, and what was compiled so far.

    Args:
        mode: of `torch.compile`; None for CUDA graphs on a GPU where the pass can be recorded, else the default.
        backend: of `torch.compile`.
        options: further arguments of `torch.compile`.

    Raises:
        InputError: a mode that there is not, or one together with `options`.
    """

    def __init__(self, mode: str | None, backend: str | Callable[..., Any], **options: Any) -> None:
        if mode is not None:
            known = list(torch._inductor.list_mode_options())
            if mode not in known:
                raise unknown_name("mode of compile()", str(mode), known)
            if options.get("options") is not None:
                raise InputError("compile() takes a mode or options of the compiler, not both.")
        self.mode, self.backend, self.options = mode, backend, options
        self._compiled: dict[tuple[int, str | None], Compiled] = {}
        self._passes: dict[int, CompiledPass] = {}  # keeps the identities in use
        self._usable: dict[str, bool] = {}

    @property
    def settings(self) -> tuple[Any, ...]:
        """What two compilations must share to be the same."""
        return self.mode, self.backend, self.options

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # it belongs to no weights

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.mode, self.backend, self.options)

    def of(self, network: Any, compiled_pass: CompiledPass) -> Callable[..., Any] | None:
        """The compiled pass of a network, None where its device has no compiler."""
        function = self.function(network.device, compiled_pass)
        return None if function is None else partial(function, network)

    def function(self, device: torch.device, compiled_pass: CompiledPass) -> Compiled | None:
        """The compiled function of a pass, to be called with a network on this device."""
        if not self.usable(device):
            return None
        mode = self._mode(device, compiled_pass)
        key = (id(compiled_pass), mode)
        if key not in self._compiled:
            self._passes[id(compiled_pass)] = compiled_pass
            options: dict[str, Any] = {"fullgraph": compiled_pass.fullgraph, "dynamic": False, **self.options}
            if mode is not None:
                options["mode"] = mode
            self._compiled[key] = Compiled(
                compiled_pass.function,
                sizes=partial(_without_network, compiled_pass.sizes),
                written=partial(_without_network, compiled_pass.written),
                backend=self.backend,
                **options,
            )
        return self._compiled[key]

    def usable(self, device: torch.device) -> bool:
        """Whether there is what the backend needs to compile for a device; warns once per kind of device if not."""
        if device.type not in self._usable:
            lack = None if self.backend != "inductor" else missing_compiler(device)
            if lack is not None:
                logger.warning(
                    "Nothing is compiled: %s. The pipeline goes on without, with the same images.", lack
                )
            self._usable[device.type] = lack is None
        return self._usable[device.type]

    def _mode(self, device: torch.device, compiled_pass: CompiledPass) -> str | None:
        mode = self.mode
        if mode is None and self.backend == "inductor" and self.options.get("options") is None:
            mode = "reduce-overhead" if compiled_pass.graphs and is_gpu(device) else None
        if mode is not None and not compiled_pass.recordable:
            mode = _WITHOUT_GRAPHS.get(mode, mode)
        return mode


def _without_network(function: Callable[..., Any], network: Any, *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **options)


def _restored(mode: str | None, backend: Any, options: dict[str, Any]) -> Compilation:
    return Compilation(mode, backend, **options)


def missing_compiler(device: torch.device) -> str | None:
    """What torch's own backend lacks to compile for a device, as a clause; None if nothing is known to be missing."""
    if is_host(device):
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, RuntimeError, OSError):
            return (
                "torch.compile needs a C++ compiler on a CPU and found none; install g++ or clang, or set CXX"
            )
    elif device.type in ("cuda", "xpu"):
        from torch.utils._triton import has_triton

        if not has_triton():
            return (
                f"torch.compile needs Triton on {device.type} and found none that works; pip install triton"
            )
    return None
