"""Compiled pipelines at any sequence of batch sizes, settings and threads; mostly without the slow backend."""

from __future__ import annotations

import copy
import logging
import pickle
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pipelines.test_beside_each_other import half_image
from tests.tiny import SCALES, eagle_head, new_pipeline, pipeline, told, transformer
from varaccel import CoDe, FewerSteps, Jacobi, Speculative, ZipAR
from varaccel.errors import InputError
from varaccel.pipelines import compiled
from varaccel.pipelines.compiled import Compilation, Compiled, CompiledPass, missing_compiler
from varaccel.pipelines.compiled_passes import CAUSAL_PASS, DENOISING_STEP, MASKED_PASS, SCALE_PASS

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
    return pipe(
        told(pipe, 1), seed=batch, num_images_per_prompt=batch, output_type="latent", **options
    ).images


def check(kind: str, pipe: Any, batch: int, **options: Any) -> None:
    """Compilation changes nothing but rounding."""
    torch.testing.assert_close(
        drawn(pipe, batch, **options), drawn(pipeline(kind), batch, **options), atol=1e-4, rtol=1e-4
    )


def versions() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


FEW = {"head_steps": 3}
CALLS: dict[str, list[dict[str, Any]]] = {
    "c2i": [
        {},
        {"guidance_interval": 3},
        {"accelerator": Jacobi(window=4)},
        {"accelerator": Speculative("eagle")},
        {"accelerator": Speculative("small", tree=2)},
        {"accelerator": Speculative("layers", tree={"top_k": 2, "depth": 2, "total": 5})},
        {"accelerator": ZipAR(2)},
    ],
    "var-class": [{}, {"accelerator": CoDe(draft_scales=1)}],
    "mar-class": [FEW, {"accelerator": FewerSteps(iterations=5), **FEW}],
}
"""Calls of each family that read rows, draft tokens and slots of many numbers."""


def with_drafters(kind: str) -> Any:
    """A pipeline of its own, with the networks that draft and refine in `CALLS`."""
    pipe: Any = new_pipeline(kind)
    if kind == "c2i":
        drafters = {"eagle_head": eagle_head(pipe.transformer), "draft_transformer": transformer("c2i", 1)}
        pipe.register_modules(**drafters)
    elif kind == "var-class":
        pipe.register_modules(refiner=new_pipeline(kind).transformer)
    return pipe


pytestmark = pytest.mark.timeout(900)  # compilers take their time on a machine with other work


@pytest.mark.slow
@pytest.mark.parametrize("kind", CALLS)
def test_any_sequence_of_batch_sizes_equals_eager_and_a_second_round_compiles_nothing(kind: str) -> None:
    """Nor does any call once batch 1 and one larger batch were seen."""
    pipe = with_drafters(kind)
    expected = {
        (number, batch): drawn(pipe, batch, **options)
        for number, options in enumerate(CALLS[kind])
        for batch in (1, 3, 8)
    }
    pipe.compile(backend="eager")

    def round_trip(batches: Sequence[int]) -> int:
        before = versions()
        for number, options in enumerate(CALLS[kind]):
            for batch in batches:
                image = drawn(pipe, batch, **options)
                torch.testing.assert_close(image, expected[number, batch], atol=1e-4, rtol=1e-4)
        return versions() - before

    assert round_trip((1, 3)) > 0
    with torch.compiler.set_stance("fail_on_recompile"):
        assert round_trip((8, 1)) == 0


@pytest.mark.slow
def test_drafters_are_compiled_too() -> None:
    pipe = with_drafters("c2i")
    pipe.compile(backend="eager")
    for drafter in ("eagle", "small", "layers"):
        before = versions()
        drawn(pipe, 2, accelerator=Speculative(drafter))
        assert versions() > before, drafter


@pytest.mark.slow
def test_one_version_serves_what_follows() -> None:
    """Of a causal network: one for raster steps, one for draft tokens; one more each for a single row."""
    pipe, before = with_drafters("c2i"), versions()
    pipe.compile(backend="eager")
    for batch in (1, 2, 5):
        for options in ({}, {"accelerator": Jacobi(window=4)}, {"accelerator": Jacobi(window=7)}):
            drawn(pipe, batch, **options)
    assert versions() - before == 2
    drawn(pipe, 1, guidance_interval=3)
    assert versions() - before == 3


def test_another_network_is_not_answered_by_the_compiled_one() -> None:
    """Not after it took the place of the first, and not in a copy whose weights were changed."""
    pipe: Any = new_pipeline("c2i")
    pipe.compile(backend="eager")
    drawn(pipe, 1)
    twin = copy.deepcopy(pipe)
    other = transformer("c2i", 5)
    pipe.register_modules(transformer=other)
    twin.transformer.load_state_dict(other.state_dict())
    eager: Any = new_pipeline("c2i")
    eager.register_modules(transformer=other)
    for changed in (pipe, twin):
        assert changed.is_compiled
        torch.testing.assert_close(drawn(changed, 1), drawn(eager, 1))


def test_a_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: made.append(function) or function)
    for kind in (*CALLS, "infinity"):
        pipe, options = new_pipeline(kind), FEW if kind == "mar-class" else {}
        assert not pipe.is_compiled
        made.clear()
        pipe.compile(backend="eager")
        assert pipe.is_compiled
        drawn(pipe, 1, **options)
        count = len(made)
        assert count > 0
        pipe.uncompile()
        assert not pipe.is_compiled
        assert pipe._transforms(pipe.transformer) is None
        pipe.compile(backend="eager")  # what was made is still there
        drawn(pipe, 1, **options)
        assert len(made) == count
        pipe.compile("max-autotune", backend="inductor")
        drawn(pipe, 1, **options)
        assert len(made) > count
        assert pickle.loads(pickle.dumps(pipe)).is_compiled


def test_modes() -> None:
    pipe = new_pipeline("c2i")
    with pytest.raises(InputError, match="did you mean 'reduce-overhead'"):
        pipe.compile("reduce_overhead")
    with pytest.raises(InputError, match="not both"):
        pipe.compile("default", options={"trace.enabled": False})
    assert not pipe.is_compiled


@pytest.mark.parametrize(
    ("compiled_pass", "asked", "mode"),
    [
        (CAUSAL_PASS, None, "reduce-overhead"),
        (SCALE_PASS, None, "reduce-overhead"),
        (SCALE_PASS, "default", "default"),
        (MASKED_PASS, None, None),
        (MASKED_PASS, "reduce-overhead", "reduce-overhead"),
        # a graph is recorded around it
        (DENOISING_STEP, None, None),
        (DENOISING_STEP, "reduce-overhead", "default"),
        (DENOISING_STEP, "max-autotune", "max-autotune-no-cudagraphs"),
    ],
)
def test_graphs_are_recorded_on_a_gpu(
    compiled_pass: CompiledPass, asked: str | None, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.append(options))
    monkeypatch.setattr(compiled, "missing_compiler", lambda device: None)
    compilation = Compilation(asked, "inductor")
    compilation.function(torch.device("cuda"), compiled_pass)
    compilation.function(torch.device("cpu"), compiled_pass)
    assert seen[0].get("mode") == mode
    if len(seen) == 2:  # one function serves both devices where their modes are the same
        assert "mode" not in seen[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["c2i", "var-class"])
def test_graphs_may_write_to_the_caches(kind: str) -> None:
    """A CUDA graph is recorded only if every buffer that is written to is marked as lying still."""
    marked: list[bool] = []

    def backend(graph: Any, inputs: Any) -> Any:
        for node in graph.graph.find_nodes(op="placeholder"):
            value = node.meta["example_value"]
            if isinstance(value, Tensor) and value.dim() == 5:  # keys and values
                marked.append(node.meta["tensor_dict"].get("_dynamo_static_input_type") == "unguarded")
        return graph.forward

    pipe: Any = new_pipeline(kind)
    pipe.compile(backend=backend)
    function = pipe._compilation.function(pipe.transformer.device, pipe.compiled_pass)
    function._recorded = True  # as with mode="reduce-overhead", which other backends do not know
    drawn(pipe, 2)
    assert len(marked) >= 2
    assert all(marked)


@pytest.mark.parametrize("kind", CALLS)
def test_without_a_compiler_a_warning_says_so(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    from torch._inductor import config

    pipe, options = new_pipeline(kind), FEW if kind == "mar-class" else {}
    expected = drawn(pipe, 1, **options)
    hidden = config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with hidden, caplog.at_level(logging.WARNING, logger="varaccel"):
        pipe.compile()
        pipe.compile()
    assert [record.message for record in caplog.records] == [
        "Nothing is compiled: torch.compile needs a C++ compiler on a CPU and found none; install g++ or clang, or set "
        "CXX. The pipeline goes on without, with the same images."
    ]
    assert not pipe.is_compiled
    assert torch.equal(drawn(pipe, 1, **options), expected)


def test_without_triton_nothing_is_compiled_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert "needs Triton on cuda" in str(missing_compiler(torch.device("cuda")))
    assert Compilation(None, "inductor").function(torch.device("cuda"), CAUSAL_PASS) is None
    assert missing_compiler(torch.device("mps")) is None


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


def test_texts_of_any_length_share_versions() -> None:
    """One with padding and one without; guidance inside of the network is not compiled, and stays right."""
    pipe, counts = new_pipeline("infinity"), []
    pipe.compile(backend="eager")
    texts = (["cube", "red cube"], ["a cube", "a blue cube of a"], ["cube", "of"], ["a red cube"] * 2)
    for prompt in texts:
        before = versions()
        found = pipe(prompt, seed=3, output_type="latent").images
        assert torch.equal(found, pipeline("infinity")(prompt, seed=3, output_type="latent").images)
        counts.append(versions() - before)
    assert counts == [len(SCALES), 0, len(SCALES), 0]
    inside = {"prompt": texts[0], "seed": 3, "guidance_layers": (0, -1), "output_type": "latent"}
    assert torch.equal(pipe(**inside).images, pipeline("infinity")(**inside).images)


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
        check("var-class", pipe, 2, **options)
    assert versions() - before > DEFAULT_LIMIT


@pytest.mark.slow
def test_several_networks_of_one_class() -> None:
    pipes = [new_pipeline("c2i") for _ in range(DEFAULT_LIMIT + 2)]
    for pipe in pipes:
        pipe.compile(backend="eager")
        check("c2i", pipe, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["c2i", "var-class"])
def test_threads_share_a_compiled_pipeline(kind: str) -> None:
    pipe = new_pipeline(kind)
    pipe.compile(backend="eager")
    settings = [(1 + i % 3, {"guidance_scale": 1.0} if i % 2 else {}) for i in range(4)]
    with ThreadPoolExecutor(4) as threads:
        images = list(threads.map(lambda s: drawn(pipe, s[0], **s[1]), settings))
    for image, (batch, options) in zip(images, settings, strict=True):
        expected = drawn(pipeline(kind), batch, **options)
        torch.testing.assert_close(image, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_further_batch_sizes_of_the_usual_backend() -> None:
    pipe = new_pipeline("c2i")
    pipe.compile()
    for batch in (1, 3, 8, 1):
        check("c2i", pipe, batch)


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
