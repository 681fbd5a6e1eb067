"""Compiled pipelines at any sequence of batch sizes, settings and threads; mostly without the slow backend."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pipelines.test_beside_each_other import half_image
from tests.tiny import SCALES, new_pipeline, pipeline
from varaccel import CoDe
from varaccel.pipelines.compiled import Compiled

DEFAULT_LIMIT = 8


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Versions are counted per function, whatever network it belongs to."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def drawn(pipe: Any, batch: int, **options: Any) -> Tensor:
    if options.pop("inpaint", False):
        images = half_image(pipe.image_size)
        return pipe.inpaint(*images, seed=batch, num_images=batch, output_type="latent", **options).images
    return pipe(1, seed=batch, num_images_per_prompt=batch, output_type="latent", **options).images


def check(kind: str, compiled: Any, batch: int, **options: Any) -> None:
    """Compilation changes nothing but rounding."""
    torch.testing.assert_close(
        drawn(compiled, batch, **options), drawn(pipeline(kind), batch, **options), atol=1e-4, rtol=1e-4
    )


def versions() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["c2i", "var-class", "mar-class"])
def test_any_sequence_of_batch_sizes(kind: str) -> None:
    pipe = new_pipeline(kind)
    pipe.compile(backend="eager")
    for batch in (3, 1, 2, 8, 4, 5, 6, 7, 3):
        check(kind, pipe, batch)


@pytest.mark.slow
def test_further_batch_sizes_share_versions() -> None:
    """Otherwise a server would compile for hours, and search a long list of versions in every pass."""
    pipe = new_pipeline("var-class")
    pipe.compile(backend="eager")
    counts = []
    for batch in (1, 2, 3, 4, 9):
        before = versions()
        check("var-class", pipe, batch)
        counts.append(versions() - before)
    assert counts == [len(SCALES), len(SCALES), 0, 0, 0]


@pytest.mark.slow
def test_any_sequence_of_settings() -> None:
    """More shapes, strides and number types than the compiler allows a function by itself."""
    pipe = new_pipeline("var-class")
    pipe.compile(backend="eager")
    before = versions()
    for options in (
        {},
        {"guidance_scale": 1.0},
        {"inpaint": True},
        {"cache_dtype": torch.bfloat16},
        {"accelerator": CoDe(draft_scales=1)},
    ):
        for batch in (2, 4):
            check("var-class", pipe, batch, **options)
    assert versions() - before > DEFAULT_LIMIT


@pytest.mark.slow
def test_several_networks_of_one_class() -> None:
    pipes = [new_pipeline("c2i") for _ in range(DEFAULT_LIMIT + 2)]
    for pipe in pipes:
        pipe.compile(backend="eager")
        check("c2i", pipe, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["c2i", "var-class", "mar-class"])
def test_threads_share_a_compiled_pipeline(kind: str) -> None:
    pipe = new_pipeline(kind)
    pipe.compile(backend="eager")
    settings = [(1 + i % 3, {"guidance_scale": 1.0} if i % 2 else {}) for i in range(8)]
    with ThreadPoolExecutor(4) as threads:
        images = list(threads.map(lambda s: drawn(pipe, s[0], **s[1]), settings))
    for image, (batch, options) in zip(images, settings, strict=True):
        expected = drawn(pipeline(kind), batch, **options)
        torch.testing.assert_close(image, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_further_batch_sizes_of_the_usual_backend() -> None:
    pipe = new_pipeline("var-class")
    pipe.compile()
    for batch in (1, 2, 5):
        check("var-class", pipe, batch)


def test_limits_of_the_compiler_are_left_alone_elsewhere() -> None:
    from torch._dynamo import config

    before = (config.recompile_limit, config.accumulated_recompile_limit)
    twice = Compiled(lambda x: 2 * x, backend="eager", dynamic=False, fullgraph=True)
    for size in range(1, DEFAULT_LIMIT + 4):
        assert twice(torch.ones(size)).sum() == 2 * size
    assert (config.recompile_limit, config.accumulated_recompile_limit) == before


def test_results_of_recorded_graphs_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph writes every result to the same place, which the next call, of any thread, overwrites."""
    place = torch.zeros(2)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for mode, shared in (
        ("reduce-overhead", False),
        ("max-autotune", False),
        ("default", True),
        (None, True),
    ):
        add = Compiled(lambda x: (place.add_(x), None), mode=mode)
        result, nothing = add(1)
        assert (result.data_ptr() == place.data_ptr()) is shared
        assert nothing is None
