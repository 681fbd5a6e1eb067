"""The worked examples of the documents: docs/examples, and the numbers that pages take from them."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.pipelines import test_pipeline as owed
from tests.scripts import ROOT, load_script
from tests.tiny import GRID, PROMPTS, pipeline
from varaccel import InputError, Jacobi, LlamaGenPipeline, Speculative, ZipAR, make_accelerator
from varaccel.accelerators import ACCELERATORS, fitting
from varaccel.engine.canvas import Canvas
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.causal.schedule import Raster, StaggeredRows
from varaccel.nn import AttentionInputs, Condition, Grid
from varaccel.pipelines.causal import CausalPipeline

EXAMPLES = ROOT / "docs" / "examples"
NAME = "late-zipar"


@pytest.mark.parametrize("name", ["accelerator", "model"])
def test_a_worked_example_is_short(name: str) -> None:
    """Imports and docstrings count, blank lines do not."""
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 40


# -- an accelerator of one's own -----------------------------------------------------------------------


@pytest.fixture
def example() -> Iterator[ModuleType]:
    """The accelerator's file, registered for one test."""
    before = dict(ACCELERATORS)
    try:
        yield load_script("docs/examples/accelerator.py")
    finally:
        ACCELERATORS.clear()
        ACCELERATORS.update(before)


@pytest.mark.parametrize("host", owed.HOSTS)
@pytest.mark.parametrize(
    "owes",
    [
        owed.test_fills_the_canvas,
        owed.test_deterministic_under_a_seed,
        owed.test_independent_of_the_batch,
        owed.test_leaves_networks_and_global_randomness_alone,
        owed.test_static_shapes_equal_dynamic_ones,
    ],
)
def test_the_accelerator_gives_what_every_one_owes(example: ModuleType, owes: object, host: str) -> None:
    """The tests that run over everything registered; the options are such that the tiny grid is no special case."""
    example.LateZipAR.__init__.__defaults__ = (2, 1)  # rows, window
    assert make_accelerator(NAME) == example.LateZipAR(2, 1)
    owes(host, NAME)  # type: ignore[operator]


@pytest.mark.parametrize("rows", range(1, GRID + 2))
@pytest.mark.parametrize("window", range(1, GRID + 2))
def test_the_accelerator_decides_every_token_in_the_stated_passes(
    example: ModuleType, rows: int, window: int
) -> None:
    groups = example.LateStagger(GRID, window, rows=rows).groups(GRID**2)
    assert sorted(p for g in groups for p in g.positions) == list(range(GRID**2))
    when = {p: n for n, g in enumerate(groups) for p in g.positions}
    assert all(s == -1 or when[s] < n for n, g in enumerate(groups) for s in g.sources)
    late = min(rows, GRID - 1)
    assert len(groups) == (late + 1) * GRID + (GRID - late - 1) * min(window, GRID)


def test_the_accelerator_is_plain_decoding_or_zipar_at_its_ends(example: ModuleType) -> None:
    raster = [inputs.host for inputs in Raster().step_inputs(Canvas.empty(1, GRID**2))]
    assert example.LateStagger(GRID, GRID, rows=1).groups(GRID**2) == raster
    assert example.LateStagger(GRID, 1, rows=GRID).groups(GRID**2) == raster
    zipar = StaggeredRows(GRID, 2).groups(GRID**2)
    assert example.LateStagger(GRID, 2, rows=0).groups(GRID**2) == zipar

    def token_ids(accelerator: object) -> torch.Tensor:
        return pipeline("c2i")(PROMPTS["c2i"], seed=1, accelerator=accelerator, output_type="latent").images

    assert torch.equal(token_ids(example.LateZipAR(1, GRID)), token_ids("plain"))
    late = token_ids(example.LateZipAR(2, 1))
    assert torch.equal(late[:, :2], token_ids("plain")[:, :2]), "the first rows are those of plain decoding"
    assert not torch.equal(late, token_ids("plain"))


@pytest.mark.parametrize("option", ["rows", "window"])
def test_bad_options_of_the_accelerator_are_one_sentence(example: ModuleType, option: str) -> None:
    with pytest.raises(InputError, match=f"late-zipar {option} must be an integer of at least 1, got 0"):
        make_accelerator(NAME, {option: 0})


def test_the_accelerator_runs_as_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    before = dict(ACCELERATORS)
    try:
        runpy.run_path(str(EXAMPLES / "accelerator.py"), run_name="__main__")
    finally:
        ACCELERATORS.clear()
        ACCELERATORS.update(before)
    assert (
        "in 124 passes" in capsys.readouterr().out
    )  # 5 rows of 16 in raster order, 11 that begin 4 columns later each


# -- a model of one's own ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixels() -> CausalPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe: CausalPipeline = load_script("docs/examples/model.py").pipe
    with torch.no_grad():
        for network in (pipe.transformer, pipe.draft_transformer):
            network.logits.weight.mul_(4)  # distributions that are neither flat nor certain
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_model_is_a_family_of_its_own(pixels: CausalPipeline) -> None:
    assert pixels.family == "pixels"
    assert not isinstance(pixels, LlamaGenPipeline)
    with pytest.raises(InputError, match="'code' does not work on pixels models; what does: "):
        pixels("noon", accelerator="code")


@pytest.mark.parametrize("name", fitting(CausalJob))
def test_the_model_draws_with_every_causal_accelerator(pixels: CausalPipeline, name: str) -> None:
    out = pixels(["sunset", "noon"], seed=0, accelerator=name, output_type="latent")
    assert out.images.shape == (2, 16, 16)
    assert (out.written > 0).all()
    assert 0 <= int(out.images.min()) <= int(out.images.max()) < 64


def test_the_model_drafts_for_itself_in_any_causal_pipeline(pixels: CausalPipeline) -> None:
    """A drafter is whatever has the signature, also where the pipeline is that of another family."""
    pipe = LlamaGenPipeline(
        pixels.transformer,
        pixels.vq_model,
        class_names=("noon", "sunset", "night"),
        draft_transformer=pixels.draft_transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    matching = Speculative(drafter="small", verification="matching")
    plain, drafted = (pipe("night", seed=2, accelerator=a, output_type="latent") for a in (None, matching))
    assert torch.equal(plain.images, drafted.images)
    assert drafted.stats.draft_passes > 0
    own = pixels(
        "night", seed=2, accelerator=Speculative(drafter=pixels.transformer, tree=3), output_type="latent"
    )
    assert own.stats.passes == 65  # its own distributions are never rejected: 4 tokens a pass after the first


def test_the_models_images_do_not_depend_on_the_batch(pixels: CausalPipeline) -> None:
    names = ["sunset", "noon"]
    plain = pixels(names, seed=0, output_type="latent")
    assert plain.images.shape == (2, 16, 16)
    assert torch.equal(pixels("noon", seed=1, output_type="latent").images[0], plain.images[1])
    assert torch.equal(
        pixels(names, seed=0, accelerator=ZipAR(16), output_type="latent").images, plain.images
    )


def test_what_the_model_has_nothing_for_is_one_sentence(
    pixels: CausalPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="cannot draft with some of its own"):
        pixels("noon", seed=0, accelerator=Speculative(drafter="layers"))
    buffers = pixels.vq_model._buffers
    monkeypatch.setitem(buffers, "colors", buffers["codebook"])
    monkeypatch.delitem(buffers, "codebook")
    with pytest.raises(InputError, match="no codebook"):
        pixels("noon", seed=0, accelerator="lantern")


def test_the_models_jacobi_image_does_not_depend_on_the_window(pixels: CausalPipeline) -> None:
    first, second = (
        pixels("night", seed=3, accelerator=Jacobi(window=w), output_type="latent") for w in (1, 12)
    )
    assert torch.equal(first.images, second.images)
    assert second.stats.passes < first.stats.passes == 256


def test_the_models_cached_steps_are_a_full_pass(pixels: CausalPipeline) -> None:
    """Greedy tokens, decoded one by one with a cache, are the likeliest ones of a single pass over all of them."""
    token_ids = pixels([0, 2], guidance_scale=1.0, temperature=0.0, output_type="latent").images.flatten(1)
    network = pixels.transformer
    with torch.inference_mode():
        prefix = network.encode_condition(Condition(torch.tensor([0, 2])), (Grid(16, 16),), guided=False)
        x = torch.cat([prefix.embeddings, network.embed_tokens(token_ids[:, :-1], torch.arange(255))], 1)
        attention = AttentionInputs(prefix.positional[:, :256], causal=True)
        logits = network.logits(network.transform(x, attention))
    assert torch.equal(logits.argmax(-1), token_ids)


def test_the_models_images_are_made_of_its_palette(pixels: CausalPipeline) -> None:
    image = pixels("night", seed=0).images[0]
    assert image.size == (16, 16)
    assert {channel for pixel in image.getdata() for channel in pixel} <= {0, 85, 86, 170, 171, 255}


def test_the_model_survives_saving(pixels: CausalPipeline, tmp_path: Path) -> None:
    """Its parts are diffusers' models: they load in a fresh object."""
    pixels.save_pretrained(tmp_path / "pixels")
    again = type(pixels.transformer).from_pretrained(tmp_path / "pixels" / "transformer")
    for name, tensor in pixels.transformer.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


# -- memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "tables"),
    [
        ("llamagen", ("llamagen",)),
        ("var", ("var",)),
        ("mar", ("mar",)),
        ("janus", ("janus",)),
        ("glm-image", ("glm_image",)),
        ("emu3", ("emu3",)),
        ("chameleon", ("chameleon",)),
        ("imagegpt", ("imagegpt",)),
        ("index", ("others",)),
    ],
)
def test_pages_tell_the_memory_that_the_code_counts(page: str, tables: tuple[str, ...]) -> None:
    """Every row that `docs/examples/memory.py` prints stands on the page of its family, to the digit."""
    memory = load_script("docs/examples/memory.py")
    text = (ROOT / "docs" / "models" / f"{page}.md").read_text()
    with torch.device("meta"):
        rows = [row for table in tables for row in getattr(memory, table)()]
    assert len(rows) >= 3
    for row in rows:
        assert row in text.splitlines(), f"docs/models/{page}.md lacks: {row}"


def test_counted_caches_are_those_of_calls() -> None:
    """What the tables count is what the statistics of a call report, shown with the small models of the tests."""
    memory = load_script("docs/examples/memory.py")
    pipe = pipeline("c2i")
    assert pipe(0, seed=0).stats.cache_bytes == pipe.transformer.new_cache(2, 1 + GRID**2 + 1).nbytes
    pipe = pipeline("var-class")
    network = pipe.transformer
    assert pipe(0, seed=0).stats.cache_bytes == network.new_cache(2, network.schedule.borders[-2]).nbytes
    pipe = pipeline("mar-class")
    caches = sum(cache.nbytes for cache in pipe.transformer.new_caches(2))
    assert pipe(0, seed=0).stats.cache_bytes == 0
    assert pipe(0, seed=0, accelerator="feature_cache").stats.cache_bytes == caches
    assert memory.weights(pipe.transformer).startswith("0 M")
