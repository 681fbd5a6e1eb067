"""The whole step loop of a diffusion head as one launch on a GPU."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from varaccel.hosts.masked.denoising import Denoised, Process

# one recording or replay at a time, in all loops: a recording must not see what another thread launches, and what is
# replayed reads and writes the same buffers every time. Not in the loop: pipelines are copied, and locks are not.
_LAUNCH = threading.Lock()


@dataclass
class _Captured:
    """A recorded loop: its inputs are filled, it is replayed, its output is read."""

    process: Process  # its tables must live as long as the graph that reads them
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor | None, ...]
    output: Denoised
    read: torch.cuda.Event  # when the last output was read, for threads with streams of their own

    def replay(self, inputs: tuple[Tensor | None, ...], count: int) -> Denoised:
        """The output of `count` tokens, in tensors of its own."""
        torch.cuda.current_stream().wait_event(self.read)
        for place, value in zip(self.inputs, inputs, strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        self.graph.replay()
        out = self.output
        parts = (out.value, out.mean, out.log_std, out.log_std_sum)
        result = Denoised(*(part[:count].clone() for part in parts))
        self.read.record()
        return result


class GraphedLoop:
    """Records the loop once per number of tokens, rounded up to a power of two, and replays it.

    A hundred steps of a few tiny kernels wait for their launches, not for the device. Replaying a CUDA graph launches
    all of them at once. A graph reads the weights where they were when it was recorded: they may change there, and
    where they have moved the loop is recorded anew. Threads take turns.

    Attributes:
        limit: recorded loops that are kept, each with up to about a gigabyte for large models; those that were used
            last. A call needs about one for every doubling of the tokens of a pass, CSpD four times as many.
    """

    limit = 32

    def __init__(self) -> None:
        self._graphs: OrderedDict[tuple[object, ...], _Captured] = OrderedDict()

    def __call__(
        self,
        process: Process,
        conditions: Tensor,
        x: Tensor,
        noise: Tensor | None,
        scale: Tensor | None,
        first: int,
        last: int,
        record: bool,
    ) -> Denoised:
        """As `Process.run_eagerly`."""
        count = x.shape[0]
        rows = 1 << (count - 1).bit_length()
        halves = conditions.unflatten(0, (-1, count))  # [1 or 2, M, D]
        inputs = (
            F.pad(halves, (0, 0, 0, rows - count)).flatten(0, 1),
            F.pad(x, (0, 0, 0, rows - count)),
            None if noise is None else F.pad(noise, (0, 0, 0, rows - count)),
            None if scale is None else F.pad(scale, (0, 0, 0, rows - count), value=1.0),
        )
        path = (first, last, record)
        kinds = (conditions.dtype, x.dtype, None if noise is None else noise.dtype)
        places = tuple(parameter.data_ptr() for parameter in process.head.parameters())
        key = (places, process.step, process.sampling, rows, scale is None, kinds, path)
        with _LAUNCH:
            captured = self._graphs.get(key)
            if captured is None:
                while len(self._graphs) >= self.limit:  # before the recording, which needs the memory
                    _, oldest = self._graphs.popitem(last=False)
                    oldest.read.synchronize()  # it may still run
                captured = self._graphs[key] = self._capture(process, inputs, path)
            self._graphs.move_to_end(key)
            return captured.replay(inputs, count)

    @staticmethod
    def _capture(
        process: Process, inputs: tuple[Tensor | None, ...], path: tuple[int, int, bool]
    ) -> _Captured:
        conditions, x, noise, scale = static = tuple(None if v is None else v.clone() for v in inputs)
        assert conditions is not None
        assert x is not None
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compilation and allocations happen before the recording
            process.run_eagerly(conditions, x, noise, scale, *path)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads may go on: what they launch is no part of the recording
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = process.run_eagerly(conditions, x, noise, scale, *path)
        return _Captured(process, graph, static, output, torch.cuda.Event())
