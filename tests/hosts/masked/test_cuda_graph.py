"""The bookkeeping of recorded loops: what is kept, and who may use it when. Recordings are played by the CPU."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import mar_transformer
from varaccel.hosts.masked import cuda_graph
from varaccel.hosts.masked.cuda_graph import GraphedLoop
from varaccel.hosts.masked.denoising import Denoised, HeadSampling, Process


class Played:
    """What a CUDA graph does: the recorded loop on the static inputs, into the static output; not at once."""

    def __init__(self, process: Process, inputs: tuple[Any, ...], path: Any, output: Denoised) -> None:
        self._process, self._inputs, self._path, self._output = process, inputs, path, output

    def replay(self) -> None:
        time.sleep(0.002)  # what another thread fills in meanwhile would be read
        result = self._process.run_eagerly(*self._inputs, *self._path)
        for name in ("value", "mean", "log_std", "log_std_sum"):
            getattr(self._output, name).copy_(getattr(result, name))


class Done:
    """An event of a device that is always ready."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class Stream:
    def wait_event(self, event: object) -> None: ...


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets `GraphedLoop` record without a GPU; the numbers of tokens that were recorded."""
    found: list[int] = []

    def capture(process: Process, inputs: tuple[Tensor | None, ...], path: Any) -> Any:
        static = tuple(None if v is None else v.clone() for v in inputs)
        assert static[1] is not None
        found.append(len(static[1]))
        output = process.run_eagerly(*static, *path)  # type: ignore[arg-type]
        graph: Any = Played(process, static, path, output)
        return cuda_graph._Captured(process, graph, static, output, Done())  # type: ignore[arg-type]

    monkeypatch.setattr(GraphedLoop, "_capture", staticmethod(capture))
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    return found


def arguments(process: Process, count: int, seed: int) -> tuple[Any, ...]:
    """Conditions, values, noise and guidance of `count` tokens, and the whole path."""
    generator = torch.Generator().manual_seed(seed)
    width, channels = process.head.cond_embed.in_features, 4
    return (
        torch.randn(2 * count, width, generator=generator),
        torch.randn(count, channels, generator=generator),
        torch.randn(process.steps, count, channels, generator=generator),
        torch.full((count, 1), 2.0),
        process.steps - 1,
        0,
        True,
    )


def process_of(**sampling: Any) -> Process:
    network = mar_transformer("class")
    return Process.of(network.head, "linear", HeadSampling(**{"steps": 3, **sampling}))


def close(ours: Denoised, theirs: Denoised) -> bool:
    names = ("value", "mean", "log_std", "log_std_sum")
    return all(torch.allclose(getattr(ours, n), getattr(theirs, n), atol=1e-5) for n in names)


@torch.no_grad()
def test_equals_the_loop_that_it_replaces(recordings: list[int]) -> None:
    process, loop = process_of(), GraphedLoop()
    for count in (3, 4, 1, 7, 3):
        given = arguments(process, count, seed=count)
        assert close(loop(process, *given), process.run_eagerly(*given))
    assert recordings == [4, 1, 8], "rounded up to a power of two, each once"


@torch.no_grad()
def test_keeps_as_many_as_its_limit_and_those_used_last(
    recordings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GraphedLoop, "limit", 3)
    loop, processes = GraphedLoop(), [process_of(temperature=1 + i / 10) for i in range(5)]
    network = processes[0].head
    processes = [Process.of(network, "linear", process.sampling) for process in processes]

    def use(index: int) -> int:
        """How many recordings a use makes."""
        before = len(recordings)
        given = arguments(processes[index], 2, seed=index)
        assert close(loop(processes[index], *given), processes[index].run_eagerly(*given))
        assert len(loop._graphs) <= 3
        return len(recordings) - before

    assert [use(i) for i in (0, 1, 2)] == [1, 1, 1]
    assert use(0) == 0
    assert use(3) == 1, "takes the place of 1, which was used before all others"
    assert [use(i) for i in (0, 2, 3)] == [0, 0, 0]
    assert use(1) == 1


@torch.no_grad()
def test_threads_do_not_read_each_others_inputs(recordings: list[int]) -> None:
    process, loop = process_of(), GraphedLoop()

    def draw(seed: int) -> bool:
        with torch.no_grad():
            given = arguments(process, 4, seed)
            return close(loop(process, *given), process.run_eagerly(*given))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(draw, range(40)))
    assert recordings == [4], "and nobody records what is there"
