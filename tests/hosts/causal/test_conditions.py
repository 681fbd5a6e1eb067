"""Hosts with conditions of their own: causal accelerators work on them untouched, lossless ones by enumeration."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.enumeration import IMAGES, LIMIT, exact_distribution, misfit
from tests.toys import HOSTS, PROMPTS, host, toy_logits, toy_pipeline
from varaccel import CoDe, InputError, Jacobi, Lantern, LayerSkip, Plain, Speculative, ZipAR
from varaccel.accelerators import ACCELERATORS, AnyAccelerator, fitting
from varaccel.engine.canvas import Canvas
from varaccel.hosts.causal.guidance import Guidance
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.causal.sampling import Sampling
from varaccel.hosts.causal.schedule import Raster
from varaccel.hosts.causal.session import CausalSession
from varaccel.nn.grid import Grid
from varaccel.speculation.tree import DynamicTree

BUSHY = [[0], [1], [0, 0], [0, 1], [0, 0, 0]]
DYNAMIC = DynamicTree(top_k=2, depth=2, total=7)
LOSSLESS: dict[str, AnyAccelerator] = {
    "plain": Plain(),
    "jacobi none": Jacobi(4, coupling="none", fill="random"),
    "jacobi maximal": Jacobi(3, coupling="maximal", fill="above"),
    "jacobi gumbel": Jacobi(6, coupling="gumbel", fill="left"),
    "chain": Speculative("small", tree=3),
    "layers": Speculative(LayerSkip((0,)), tree=BUSHY),
    "k_sequential": Speculative("small", tree=BUSHY, verification="k_sequential"),
    "dynamic recursive": Speculative("small", tree=DYNAMIC, verification="recursive"),
    "matching": Speculative("small", tree=DYNAMIC),
    "gumbel": Speculative("layers", tree=4, verification="gumbel", adaptive=True),
    "lantern": Lantern(k=0, drafter="small", tree=BUSHY),
    "eagle": Speculative("eagle", tree=BUSHY),
    "eagle dynamic": Speculative("eagle", tree=DYNAMIC, verification="recursive"),
}
APPROXIMATE: dict[str, AnyAccelerator] = {
    "zipar": ZipAR(1),
    "zipar published": ZipAR(1, mode="published"),
    "jacobi in rows": Jacobi(3, row_window=1),
    "speculative in rows": Speculative("small", tree=BUSHY, row_window=1),
    "lantern": Lantern(k=1, delta=0.3, drafter="small", tree=BUSHY),
    "eagle in rows": Speculative("eagle", tree=BUSHY, row_window=1),
    "lantern in rows": Lantern(k=1, delta=0.3, drafter="layers", tree=DYNAMIC, row_window=1),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "free": {"guidance_scale": 1.0},
    "guided": {"guidance_scale": 2.0},
    "filtered": {"guidance_scale": 2.0, "temperature": 0.9, "top_k": 2},
}


@cache
def distribution(name: str, setting: str) -> Tensor:
    call = SETTINGS[setting]
    logits = toy_logits(name, PROMPTS[name][0], call["guidance_scale"])
    transformer = toy_pipeline(name).transformer
    positions = sum(grid.num_positions for grid in toy_pipeline(name)._grids(None))  # type: ignore[arg-type]
    sampling = Sampling(call.get("temperature", 1.0), call.get("top_k", 0))
    return exact_distribution(logits, transformer.config.vocab_size, positions, sampling)


def groups(name: str) -> tuple[tuple[int, ...], ...]:
    """Positions whose joint distribution is looked at; ends of line are certain and no test of anything."""
    return ((0, 1, 3), (1, 3, 4), (0, 4)) if name == "lined" else ((0, 1, 2), (2, 3, 5), (0, 4, 8), (6, 7, 8))


def draw(name: str, accelerator: AnyAccelerator | str, prompts: Any, **options: Any) -> Any:
    return toy_pipeline(name)(prompts, accelerator=accelerator, output_type="latent", **options)


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=pytest.mark.slow) if name == "eagle dynamic" else name for name in LOSSLESS],
)
@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize(
    "setting", ["guided", *(pytest.param(name, marks=pytest.mark.slow) for name in ("free", "filtered"))]
)
def test_lossless(name: str, setting: str, method: str) -> None:
    """Thousands of images follow the enumerated distribution."""
    prompt = PROMPTS[name][0]
    out = draw(name, LOSSLESS[method], prompt, seed=0, num_images_per_prompt=IMAGES, **SETTINGS[setting])
    assert out.stats.lossless
    assert misfit(out.images, distribution(name, setting), groups(name)) < LIMIT


@pytest.mark.parametrize("method", [*LOSSLESS, *(f"approximate {name}" for name in APPROXIMATE)])
@pytest.mark.parametrize("name", HOSTS)
def test_three_together_are_three_alone(name: str, method: str) -> None:
    """Prompts of different length, each image the one of a call of its own; the same again; every place decided."""
    accelerator = LOSSLESS.get(method) or APPROXIMATE[method.removeprefix("approximate ")]
    for guidance in (1.0, 2.0):
        together = draw(name, accelerator, PROMPTS[name], seed=5, guidance_scale=guidance)
        again = draw(name, accelerator, PROMPTS[name], seed=5, guidance_scale=guidance)
        assert torch.equal(together.images, again.images)
        assert (together.written > 0).all()
        for row, prompt in enumerate(PROMPTS[name]):
            alone = draw(name, accelerator, prompt, seed=5 + row, guidance_scale=guidance)
            assert torch.equal(alone.images[0], together.images[row])
            assert torch.equal(alone.written[0], together.written[row])


@pytest.mark.parametrize("name", HOSTS)
def test_every_accelerator_by_name(name: str) -> None:
    """Whatever is registered for causal jobs works with its defaults."""
    for accelerator in fitting(CausalJob):
        options = {"k": 1} if accelerator == "lantern" else {}
        out = draw(name, ACCELERATORS[accelerator](**options), PROMPTS[name], seed=0)
        assert (out.written > 0).all()
    with pytest.raises(InputError, match="'code' does not work on"):
        draw(name, CoDe(), PROMPTS[name])


@pytest.mark.parametrize("name", HOSTS)
def test_greedy(name: str) -> None:
    plain = draw(name, "plain", PROMPTS[name], temperature=0.0)
    for method, accelerator in LOSSLESS.items():
        assert torch.equal(draw(name, accelerator, PROMPTS[name], temperature=0.0).images, plain.images), (
            method
        )


@pytest.mark.parametrize("name", HOSTS)
def test_a_wrong_oracle_is_seen(name: str) -> None:
    """The measure tells guidance of 2 from 1.6, and the branches from each other."""
    drawn = draw(
        name, "plain", PROMPTS[name][0], seed=0, num_images_per_prompt=2 * IMAGES, guidance_scale=2.0
    )
    assert misfit(drawn.images, distribution(name, "guided"), groups(name)) < LIMIT
    vocab_size, positions = toy_pipeline(name).transformer.config.vocab_size, drawn.images.flatten(1).shape[1]
    weaker = exact_distribution(toy_logits(name, PROMPTS[name][0], 1.6), vocab_size, positions)
    assert misfit(drawn.images, weaker, groups(name)) > LIMIT


def test_ends_of_line_stand_where_lines_end() -> None:
    for accelerator in ("plain", "jacobi", ZipAR(1), Jacobi(3, row_window=1)):
        images = draw("lined", accelerator, PROMPTS["lined"], seed=3).images
        ends = torch.zeros(6, dtype=torch.bool)
        ends[[2, 5]] = True
        assert torch.equal(images == 3, ends.expand(3, -1)), accelerator
        assert not (images[:, :2] == 2).any(), "impossible in the first row"


@pytest.mark.parametrize("row_window", [None, 1])
@pytest.mark.parametrize("accelerator", [Jacobi, Speculative])
def test_rows_with_ends_of_line_need_no_stand_in(accelerator: Any, row_window: int | None) -> None:
    """Passes fall where rows may run side by side."""
    options = {} if accelerator is Jacobi else {"drafter": "small"}
    out = draw("lined", accelerator(row_window=row_window, **options), PROMPTS["lined"], seed=0)
    assert out.stats.passes <= 6


def test_several_grids_in_one_image() -> None:
    """A preview and then the image, in one call: raster order, speculation and ZipAR work, lanes do not."""
    network = host("modulated")
    grids = (Grid(1, 2), Grid(2, 3))
    given = toy_pipeline("modulated")._condition([1, 2])
    assert given is not None

    def job(canvas: Canvas) -> CausalJob:
        from varaccel.engine.randomness import Randomness, image_generators

        return CausalJob(
            network=network,
            canvas=canvas,
            rows=4,
            condition=given,
            grids=grids,
            guidance=Guidance(2.0),
            sampling=Sampling(0.0),
            randomness=Randomness.draw(image_generators(2, seed=1), 8),
            drafters=toy_pipeline("modulated").drafters,
        )

    plain = Canvas.empty(2, 8)
    assert Plain().run(job(plain)) == 8
    for accelerator in (Jacobi(4, fill="above"), Speculative("layers", tree=3), Speculative("eagle", tree=3)):
        canvas = Canvas.empty(2, 8)
        accelerator.run(job(canvas))
        assert torch.equal(canvas.tokens, plain.tokens)
    rows = Canvas.empty(2, 8)
    assert ZipAR(1).run(job(rows)) == 2 + 4, "the preview, then two rows of the image, one token apart"
    assert (rows.written > 0).all()
    with pytest.raises(InputError, match="2 grids"):
        Jacobi(4, row_window=1).run(job(Canvas.empty(2, 8)))


@pytest.mark.slow
@pytest.mark.parametrize("method", LOSSLESS)
def test_given_tokens_stay_and_what_follows_knows_them(method: str) -> None:
    """Tokens that are given are read by what comes after them, in plain decoding and under speculation alike."""
    name, network = "modulated", toy_pipeline("modulated").transformer
    wanted, fixed = torch.tensor([[2, 0, 0, 0, 1, 0, 0, 0, 0]]), torch.zeros(1, 9, dtype=torch.bool)
    fixed[:, [0, 4]] = True
    count = IMAGES
    pipe = toy_pipeline(name)
    original = type(pipe)._new_canvas
    try:
        type(pipe)._new_canvas = lambda self, run: Canvas.given(  # type: ignore[method-assign]
            wanted.expand(run.call.images, -1).clone(), fixed.expand(run.call.images, -1)
        )
        drawn = draw(
            name, LOSSLESS[method], 1, seed=0, num_images_per_prompt=count, guidance_scale=2.0
        ).images.flatten(1)
    finally:
        type(pipe)._new_canvas = original  # type: ignore[method-assign]
    assert (drawn[:, 0] == 2).all()
    assert (drawn[:, 4] == 1).all()
    logits = toy_logits(name, 1, 2.0)

    def restricted(tokens: Tensor) -> Tensor:
        out = logits(tokens)
        for place in (0, 4):
            only = torch.full_like(out[:, place], -torch.inf)
            only[:, wanted[0, place]] = 0
            out[:, place] = only
        return out

    expected = exact_distribution(restricted, network.config.vocab_size, 9)
    assert misfit(drawn, expected, ((1, 2, 3), (3, 5, 6), (6, 7, 8))) < LIMIT


def test_sessions_pad_the_shorter_branch() -> None:
    """Guided rows are [conditional; negative], left-padded to the longer prompt; padding is never looked at."""
    pipe = toy_pipeline("prompted")
    given = pipe._condition(["3", "1412", "22"])
    assert given is not None
    session = CausalSession(pipe.transformer, given, (Grid(3, 3),), guidance=Guidance(2.0))
    assert session.rows_per_pass == 6
    assert session.prefix == 4
    canvas = Canvas.empty(3, 9)
    first = session.predict(canvas, Raster().step_inputs(canvas)[0]).logits[:, 0]
    for row, prompt in enumerate(("3", "1412", "22")):
        expected = toy_logits("prompted", prompt, 2.0)(torch.zeros(1, 9, dtype=torch.int64))[:, 0]
        torch.testing.assert_close(first[row : row + 1], expected, atol=1e-5, rtol=1e-4)
