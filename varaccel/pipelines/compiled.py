"""Compiled networks that any number of shapes and threads may use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

VERSIONS = 1 << 20
"""Versions of one function at most: that many are never made, and a network that had too many would refuse a call."""


CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
_LAUNCH = threading.Lock()


class Compiled:
    """A function under `torch.compile` that makes versions for new shapes without end.

    The compiler gives up on a function with more than 8 versions, under `fullgraph` with an error. A version per scale,
    or several networks of one class in a process, already need more.

    Args:
        function: to be compiled.
        rows: of its arguments, the tensors that have a row per image and the axis where. The first number of rows gets
            versions of its own, further ones share theirs. None to leave that to the compiler.
        options: of `torch.compile`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        rows: Callable[..., Iterable[tuple[Tensor, int]]] | None = None,
        **options: Any,
    ) -> None:
        self._function = torch.compile(function, **options)
        self._rows = rows
        # these write every result to the same place, and threads would find each other's there
        self._recorded = options.get("mode") in CUDA_GRAPH_MODES
        self._usual: int | None = None  # the first number of rows

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self._rows is not None:
            self._mark(self._rows(*arguments, **options))
        # settings of the compiler belong to the thread that runs the function
        with torch._dynamo.config.patch(recompile_limit=VERSIONS, accumulated_recompile_limit=VERSIONS):
            if not self._recorded:
                return self._function(*arguments, **options)
            with _LAUNCH:
                return tree_map_only(Tensor, torch.clone, self._function(*arguments, **options))

    def _mark(self, tensors: Iterable[tuple[Tensor, int]]) -> None:
        for tensor, axis in tensors:
            count = tensor.shape[axis]
            if self._usual is None:
                self._usual = count
            if count not in (1, self._usual):  # the compiler makes versions of their own for 1
                torch._dynamo.maybe_mark_dynamic(tensor, axis)
