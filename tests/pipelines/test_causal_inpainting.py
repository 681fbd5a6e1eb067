"""In-painting and out-painting with models that decide one token after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.enumeration import IMAGES, LIMIT, PROMPT, exact_distribution, misfit, teacher_forced
from tests.tiny import GRID, PROMPTS, VOCAB_SIZE, drafting_pipeline, new_pipeline, pipeline, vq_model
from tests.tiny_transformers import janus, janus_processor
from tests.toys import LinedHost, LinedPipeline, toy_pipeline
from varaccel import InputError, Jacobi, Plain, Speculative, ZipAR
from varaccel.accelerators import ACCELERATORS, fitting
from varaccel.engine.accelerator import AnyAccelerator
from varaccel.hosts.causal.guidance import Guidance
from varaccel.hosts.causal.job import CausalJob
from varaccel.nn.grid import Grid
from varaccel.pipelines.inpainting import checked_mask, image_tensor, kept_cells, mask_tensor, placed
from varaccel.pipelines.janus import JanusPipeline

SIZE = 2 * GRID
KINDS = ("c2i", "t2i")
METHODS: dict[str, AnyAccelerator] = {name: ACCELERATORS[name]() for name in fitting(CausalJob)}
IN_ROWS: dict[str, AnyAccelerator] = {
    "zipar of 1": ZipAR(1),
    "zipar published": ZipAR(1, mode="published"),
    "jacobi in rows": Jacobi(3, row_window=1),
    "speculative in rows": Speculative("small", tree=3, row_window=2),
}


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def middle(height: int = SIZE, width: int = SIZE) -> Tensor:
    """A mask of the middle that touches the cells around it on the left only."""
    mask = torch.zeros(height, width)
    mask[height // 4 : 3 * height // 4, width // 4 - 1 : 3 * width // 4] = 1
    return mask


FREE = torch.zeros(GRID, GRID, dtype=torch.bool)
FREE[1:3, :3] = True
"""What `middle` paints on the tiny grid."""


def encoded(pipe: Any, image: Image.Image) -> Tensor:
    """Token ids [h, w] of an image that has the model's size."""
    with torch.no_grad():
        return pipe.vq_model.encode(image_tensor(image, image.size[::-1])).indices[0]


# -- pixels to cells -----------------------------------------------------------------------------------


def test_cells_that_the_mask_touches_are_painted() -> None:
    mask = torch.zeros(6, 12)
    mask[3, 5] = 1
    painted = torch.zeros(2, 3, dtype=torch.bool)
    painted[1, 1] = True
    assert torch.equal(kept_cells(mask, 2, 3), ~painted)


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (30, 90)], ids=str)
@pytest.mark.parametrize("shape", [(128, 256), (256, 128), (96, 96), (70, 200)], ids=str)
def test_masks_are_cropped_to_any_aspect_as_images_are(shape: tuple[int, int], size: tuple[int, int]) -> None:
    marked = np.zeros(shape, bool)
    marked[shape[0] // 2 - 8 : shape[0] // 2 + 9, shape[1] // 2 - 12 : shape[1] // 2 + 3] = True
    image = np.full((*shape, 3), 255, np.uint8)
    image[marked] = (255, 0, 0)
    red = image_tensor(image, size)[0, 1] < 0
    painted = mask_tensor(marked, size) > 0
    assert red.shape == painted.shape == size
    assert painted[red].all()
    assert painted.sum() <= (red.any(1).sum() + 2) * (red.any(0).sum() + 2)
    assert mask_tensor(np.ones(shape, bool), size).all()


def test_what_is_cut_off_to_an_aspect_cannot_be_painted() -> None:
    mask = np.zeros((60, 60), bool)
    mask[:14] = True
    with pytest.raises(InputError, match="part of aspect 64 : 32"):
        mask_tensor(mask, (32, 64))
    mask[:16] = True
    assert mask_tensor(mask, (32, 64))[0].all()


def test_an_image_is_placed_in_a_larger_one_of_any_aspect() -> None:
    larger, mask = placed(noise(4, 4), (2, 1, 6, 3), (6, 10))
    assert larger.size == (10, 6)
    assert mask.shape == (6, 10)
    assert torch.equal(mask == 0, torch.nn.functional.pad(torch.ones(2, 4), (2, 4, 1, 3)) > 0)
    with pytest.raises(InputError, match="0 to 10 across and 0 to 6 down"):
        placed(noise(4, 4), (0, 0, 6, 10), (6, 10))


# -- what stays, and what is drawn ---------------------------------------------------------------------


@pytest.mark.parametrize("prompted", [True, False], ids=["prompt", "no prompt"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [*METHODS, *IN_ROWS])
def test_tokens_outside_the_mask_stay(method: str, kind: str, prompted: bool) -> None:
    pipe, image = drafting_pipeline(kind), noise(SIZE, SIZE)
    expected = encoded(pipe, image)
    options: dict[str, Any] = {"accelerator": METHODS.get(method) or IN_ROWS[method], "output_type": "latent"}
    prompt = PROMPTS[kind][1] if prompted else None
    out = pipe.inpaint(image, middle(), prompt, seed=1, num_images=3, **options)
    assert out.images.shape == (3, GRID, GRID)
    assert torch.equal(out.images[:, ~FREE], expected[~FREE].expand(3, -1))
    assert not torch.equal(out.images[0, FREE], out.images[1, FREE])
    assert not torch.equal(out.images[:, FREE], expected[FREE].expand(3, -1))
    assert (out.written > 0).all()
    assert (out.stats.rows, out.stats.tokens) == (6 if prompted else 3, GRID**2)
    for version in range(3):
        alone = pipe.inpaint(image, middle(), prompt, seed=1 + version, **options)
        assert torch.equal(alone.images[0], out.images[version])
        if method != "auto":  # which drafts as much as the batch leaves free
            assert torch.equal(alone.written[0], out.written[version])


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_the_tokens(kind: str) -> None:
    pipe, image = pipeline(kind), noise(2 * SIZE, 3 * SIZE)
    mask = middle(2 * SIZE, 3 * SIZE)
    tokens = pipe.inpaint(image, mask, PROMPTS[kind][0], seed=0, output_type="latent").images
    out = pipe.inpaint(image, mask, PROMPTS[kind][0], seed=0, output_type="raw")
    with torch.no_grad():
        assert torch.equal(out.images, pipe.vq_model.decode_tokens(tokens))
    assert pipe.inpaint(image, mask, PROMPTS[kind][0], seed=0).images[0].size == (SIZE, SIZE)


def test_greedy_painting_is_what_the_network_finds_likeliest() -> None:
    """Of one full pass that reads the tokens that stay, those of the image."""
    pipe, image = drafting_pipeline("c2i"), noise(SIZE, SIZE)
    for prompt, guidance in ((1, 2.0), (None, 1.0)):
        out = pipe.inpaint(image, middle(), prompt, seed=0, temperature=0.0, output_type="latent")
        label = pipe.transformer.signature().condition_size if prompt is None else prompt
        tokens = out.images.flatten(1)
        with torch.no_grad():
            branches = [
                pipe.transformer(torch.tensor([branch]), tokens[:, :-1])
                for branch in (label, pipe.transformer.signature().condition_size)
            ]
        likeliest = Guidance(guidance).combine(*branches).argmax(-1)
        assert torch.equal(likeliest[:, FREE.flatten()], tokens[:, FREE.flatten()])


def test_without_a_prompt_nothing_is_guided() -> None:
    pipe, image = pipeline("t2i"), noise(SIZE, SIZE)
    options = {"seed": 0, "output_type": "latent"}
    out = pipe.inpaint(image, middle(), guidance_scale=10.0, **options)
    assert out.stats.rows == 1
    assert torch.equal(out.images, pipe.inpaint(image, middle(), **options).images)
    prompted = [pipe.inpaint(image, middle(), p, **options).images for p in PROMPTS["t2i"][:2]]
    assert not torch.equal(*prompted)
    assert not torch.equal(prompted[0], out.images)


@pytest.mark.parametrize("method", METHODS)
def test_outpainting(method: str) -> None:
    pipe, box = drafting_pipeline("t2i"), (0, 2, 5, 8)
    options: dict[str, Any] = {"seed": 1, "accelerator": METHODS[method], "output_type": "latent"}
    tokens = pipe.outpaint(noise(9, 9), box, "a red sphere", **options).images
    larger, mask = placed(noise(9, 9), box, (SIZE, SIZE))
    kept = torch.zeros(GRID, GRID, dtype=torch.bool)
    kept[1:, :2] = True  # the third column is half in the box
    assert torch.equal(tokens[0, kept], encoded(pipe, larger)[kept])
    assert torch.equal(tokens, pipe.inpaint(larger, mask, "a red sphere", **options).images)


def test_painting_is_watched_and_stopped_like_a_call() -> None:
    pipe, image, kept = pipeline("c2i"), noise(SIZE, SIZE), encoded(pipeline("c2i"), noise(SIZE, SIZE))
    seen = []

    def watch(pipe: Any, step: int, tokens: int, state: dict[str, Any]) -> None:
        assert torch.equal(state["canvas"].tokens.view(GRID, GRID)[~FREE], kept[~FREE]), (
            "in sight from the start"
        )
        seen.append((step, tokens))
        if step == 5:
            state["stop"]()

    out = pipe.inpaint(image, middle(), 0, seed=1, callback_on_step_end=watch, output_type="latent")
    assert seen == [(step, 1) for step in range(6)]
    assert out.stats.interrupted
    assert out.stats.tokens == 6


def test_looking_on_changes_nothing() -> None:
    def look(pipe: Any, step: int, tokens: int, state: dict[str, Any]) -> None:
        assert state["preview"]()[0].size == (SIZE, SIZE)

    pipe, image = pipeline("c2i"), noise(SIZE, SIZE)
    watched = pipe.inpaint(image, middle(), 0, seed=1, callback_on_step_end=look).images[0]
    assert watched.tobytes() == pipe.inpaint(image, middle(), 0, seed=1).images[0].tobytes()


# -- the distribution ----------------------------------------------------------------------------------

EXACT: dict[str, AnyAccelerator] = {name: method for name, method in METHODS.items() if method.lossless} | {
    "jacobi without coupling": Jacobi(3, coupling="none", fill="random"),
    "jacobi with maximal coupling": Jacobi(3, coupling="maximal", fill="above"),
    "eagle": Speculative("eagle", tree=3),
    "tree": Speculative("small", tree=[[0], [1], [0, 0], [1, 0]]),
}
PAINTED = {"below": [2, 3], "corners": [0, 3], "left": [0, 2]}
"""Positions of a grid of two by two that are drawn anew."""


@pytest.mark.parametrize(
    "painted", ["corners", *(pytest.param(name, marks=pytest.mark.slow) for name in ("below", "left"))]
)
@pytest.mark.parametrize("method", EXACT)
def test_what_is_drawn_follows_the_distribution(method: str, painted: str) -> None:
    """Of each token given what is before it, stays or not; where all that stays comes first, of the rest given it."""
    pipe, free = drafting_pipeline("c2i", 3, 2, 0.8), PAINTED[painted]
    image = noise(4, 4, seed=3)
    mask = torch.zeros(2, 2)
    mask.view(-1)[free] = 1
    drawn = pipe.inpaint(
        image,
        mask,
        PROMPT["c2i"],
        seed=0,
        num_images=IMAGES,
        guidance_scale=2.0,
        accelerator=EXACT[method],
        output_type="latent",
    )
    assert drawn.stats.lossless
    kept = encoded(pipe, image).flatten()
    fixed = [position for position in range(4) if position not in free]
    logits = teacher_forced(pipe, PROMPT["c2i"], Guidance(2.0))

    def restricted(tokens: Tensor) -> Tensor:
        out = logits(tokens).clone()
        for position in fixed:
            out[:, position] = -torch.inf
            out[:, position, kept[position]] = 0
        return out

    expected = exact_distribution(restricted, 3, 4)
    if painted == "below":
        whole = exact_distribution(logits, 3, 4)
        beside = torch.zeros_like(whole)
        beside[kept[0], kept[1]] = whole[kept[0], kept[1]] / whole[kept[0], kept[1]].sum()
        torch.testing.assert_close(expected, beside, atol=1e-6, rtol=0)
    assert misfit(drawn.images, expected, (tuple(free), (free[0],), (free[1],))) < LIMIT


# -- grids of other kinds ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_lines_end_where_they_do_in_images_that_are_not_square(method: str) -> None:
    network = LinedHost(vocab_size=6, height=2, width=3).eval()
    pipe = LinedPipeline(network, vq_model(codebook_size=6), draft_transformer=LinedHost(6, 2, 3, layers=1))
    pipe.set_progress_bar_config(disable=True)
    image = noise(4, 6, seed=1)
    mask = torch.zeros(4, 6)
    mask[:2, 2:4] = mask[3, 5] = 1
    accelerator: AnyAccelerator = Speculative("small") if method == "speculative" else METHODS[method]
    if method == "lantern":
        accelerator = ACCELERATORS["lantern"](k=1, drafter="small")
    tokens = pipe.inpaint(image, mask, 1, seed=0, accelerator=accelerator, output_type="latent").images
    rows = tokens[0].view(2, 4)
    assert (rows[:, 3] == 5).all()
    kept = torch.tensor([[True, False, True], [True, True, False]])
    assert torch.equal(rows[:, :3][kept], encoded(pipe, image)[kept])
    assert (rows[:, :3][~kept] < 5).all()
    assert pipe.inpaint(image, mask, 1, seed=0, accelerator=accelerator).images[0].size == (6, 4)


def test_zipar_counts_what_it_has_passed() -> None:
    """Ends of line are read ahead, tokens that stay are not."""
    pipe = toy_pipeline("lined")
    passes: list[Tensor] = []

    def watch(pipe: Any, step: int, tokens: int, state: dict[str, Any]) -> None:
        passes.append(state["canvas"].written.clone())

    mask = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    pipe.inpaint(noise(4, 4), mask, 0, seed=0, accelerator=ZipAR(1), callback_on_step_end=watch)
    assert passes[0].tolist() == [[1, 0, 1, 0, 0, 1]]


def test_of_several_grids_the_last_is_painted(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, grids = toy_pipeline("modulated"), (Grid(1, 2), Grid(2, 3))
    monkeypatch.setattr(pipe, "_grids", lambda run: grids)
    canvases = []

    def watch(pipe: Any, step: int, tokens: int, state: dict[str, Any]) -> None:
        canvases.append(state["canvas"])

    image, mask = noise(4, 6), torch.zeros(4, 6)
    mask[:, 2:4] = 1
    out = pipe.inpaint(image, mask, 1, seed=0, num_images=2, output_type="latent", callback_on_step_end=watch)
    kept = torch.tensor([[True, False, True]] * 2)
    assert torch.equal(out.images[:, kept], encoded(pipe, image)[kept].expand(2, -1))
    assert torch.equal(canvases[0].fixed[0], torch.cat([torch.zeros(2, dtype=torch.bool), kept.flatten()]))


@pytest.mark.parametrize("prompt", ["a red cube", None], ids=["prompt", "no prompt"])
def test_a_model_of_transformers_paints(prompt: str | None) -> None:
    pipe = JanusPipeline(janus(), janus_processor())
    pipe.set_progress_bar_config(disable=True)
    image = noise(16 * GRID, 16 * GRID)
    expected = pipe.vq_model.encode_tokens(image_tensor(image, (16 * GRID, 16 * GRID)))[0]
    options: dict[str, Any] = {"seed": 0, "num_images": 2, "output_type": "latent"}
    out = pipe.inpaint(image, middle(), prompt, **options)
    assert torch.equal(out.images[:, ~FREE], expected[~FREE].expand(2, -1))
    assert not torch.equal(out.images[0], out.images[1])
    assert out.stats.rows == (2 if prompt is None else 4)
    negative = pipe.inpaint(image, middle(), prompt, negative_prompt="blue blue", **options)
    assert torch.equal(negative.images, out.images) == (prompt is None)


# -- what cannot be painted ----------------------------------------------------------------------------


def refused(words: str) -> Any:
    return pytest.raises(InputError, match=rf"^[^\n]*{words}[^\n]*$")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": "cat.png"}, "the image must be"),
        ({"image": torch.rand(5, SIZE, SIZE)}, "the image must be"),
        ({"mask": None}, r"\[H, W\]"),
        ({"mask": torch.zeros(SIZE, SIZE)}, "black everywhere"),
        ({"mask": torch.ones(SIZE, 2 * SIZE)}, "the mask is 16 × 8 pixels but the image 8 × 8"),
        ({"num_images": 0}, "num_images"),
        ({"prompt": "zebra crossing"}, "zebra"),
        ({"prompt": 99}, "from 0 to"),
        ({"accelerator": "code"}, "code"),
        ({"top_k": -1}, "top_k"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"height": 3 * SIZE}, "leave height and width out"),
        ({"output_type": "png"}, "output_type"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else None,
)
def test_what_cannot_be_used_is_a_sentence(changes: dict[str, Any], words: str) -> None:
    arguments = {"image": noise(SIZE, SIZE), "mask": middle(), "prompt": 0, "seed": 0, **changes}
    with refused(words):
        pipeline("c2i").inpaint(**arguments)


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ((0, 0, SIZE + 1, SIZE), "within 0 to"),
        ((0, 0, SIZE, SIZE), "covers the whole"),
        ((0, 0, 4), "left, top, right, bottom"),
        (None, "left, top, right, bottom"),
        (4, "left, top, right, bottom"),
    ],
)
def test_bad_boxes(box: Any, words: str) -> None:
    with refused(words):
        pipeline("c2i").outpaint(noise(SIZE, SIZE), box, 0)


def test_a_tokenizer_that_only_decodes_cannot_paint() -> None:
    class Decoder(torch.nn.Module):
        codebook_size, downsample_factor = VOCAB_SIZE, 2
        device, dtype = torch.device("cpu"), torch.float32

        def decode_tokens(self, token_ids: Tensor) -> Tensor:
            return torch.zeros(len(token_ids), 3, SIZE, SIZE)

    pipe = new_pipeline("c2i")
    pipe.vq_model = Decoder()
    pipe(0, seed=0, accelerator=Plain())
    with refused("a Decoder cannot make tokens of an image"):
        pipe.inpaint(noise(SIZE, SIZE), middle(), 0)


def test_a_model_without_a_word_for_none_needs_a_prompt() -> None:
    pipe = toy_pipeline("prompted")
    with refused("without a prompt"):
        pipe.inpaint(noise(6, 6), middle(6, 6))
    assert pipe.inpaint(noise(6, 6), middle(6, 6), "3", seed=0).images[0].size == (6, 6)


def test_the_mask_is_checked_alone() -> None:
    assert checked_mask(torch.ones(4, 8), (16, 8)).all()
