"""In-painting with models that can: paint over a part of an image and say what should be there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from varaccel.app.events import PRIVATE, device_event
from varaccel.app.notices import notice, shown_on_page
from varaccel.app.studio import MAX_IMAGES, MAX_SEED, Studio, checked_count, checked_seed
from varaccel.app.turns import Stopped
from varaccel.engine.accelerator import fitting
from varaccel.errors import InputError
from varaccel.hosts.causal.job import CausalJob
from varaccel.image_inputs import rgb_image

IMAGE_PROMPT = "a red cube"
PAINT_PROMPT = "a green sphere"
CANVAS = 512
"""Side of the drawing board in pixels, however small the model's images are."""


def paints(studio: Studio, model: str) -> bool:
    """Whether a model can paint into images."""
    return hasattr(studio.shelf.pipeline_type(model), "inpaint")


def painting_models(studio: Studio) -> list[str]:
    """The models that can paint into images; first those that see what is below and to the right, too."""
    shelf = studio.shelf
    models = [name for name in shelf.names if paints(studio, name)]
    return sorted(models, key=lambda name: issubclass(shelf.job_type(name), CausalJob))


@dataclass(frozen=True)
class _Controls:
    """What a visitor fills in, paints and presses, and where the result is shown."""

    model: gr.Dropdown
    first_prompt: gr.Textbox
    draw: gr.Button
    board: gr.ImageEditor
    prompt: gr.Textbox
    seed: gr.Number
    count: gr.Slider
    accelerator: gr.Dropdown
    paint: gr.Button
    result: gr.Gallery
    told: gr.Markdown


def inpaint_tab(studio: Studio) -> None:
    """The content of the tab, inside an open `gr.Blocks`."""
    models = painting_models(studio)
    if not models:
        gr.Markdown(
            "None of the models of this page can paint into images; models such as mini-var and mini-llamagen do."
        )
        return
    gr.Markdown(
        "Draw an image or upload one, paint over what should change, and say what should be there. The model was not "
        "trained for this: tokens outside of the mask are given, the others are drawn as always. Models that draw "
        "token by token know only what is above and to the left of what they paint."
    )
    _events(studio, _controls(models, fitting(studio.shelf.job_type(models[0]))))


def _controls(models: list[str], accelerators: Sequence[str]) -> _Controls:
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            model = gr.Dropdown(models, value=models[0], label="model")
            with gr.Row():
                first_prompt = gr.Textbox(IMAGE_PROMPT, label="image to start from", scale=3)
                draw = gr.Button("Draw it", elem_id="inpaint-draw", min_width=80)
            board = gr.ImageEditor(
                type="pil",
                image_mode="RGBA",
                format="png",
                label="image; paint over what should change",
                sources=("upload", "clipboard"),
                layers=False,
                transforms=(),
                brush=gr.Brush(default_size=60, colors=["#ffffff"], color_mode="fixed"),
                canvas_size=(CANVAS, CANVAS),
                height=CANVAS + 60,
                elem_id="board",
            )
        with gr.Column(min_width=300):
            prompt = gr.Textbox(
                PAINT_PROMPT, label="what should be there; empty for whatever fits", elem_id="paint-prompt"
            )
            with gr.Row():
                seed = gr.Number(0, label="seed", minimum=0, maximum=MAX_SEED)
                count = gr.Slider(1, MAX_IMAGES, 3, step=1, label="versions")
                accelerator = gr.Dropdown(accelerators, value=accelerators[0], label="accelerator")
            paint = gr.Button("Paint", variant="primary", elem_id="paint")
            result = gr.Gallery(
                label="versions",
                format="png",
                columns=2,
                height="auto",
                interactive=False,
                buttons=["download", "download_all", "fullscreen"],
                elem_id="painted",
            )
            told = gr.Markdown()
    return _Controls(model, first_prompt, draw, board, prompt, seed, count, accelerator, paint, result, told)


def _events(studio: Studio, form: _Controls) -> None:
    """What the buttons do."""

    def drawn(call: str, model: str, request: gr.Request, *arguments: Any, **options: Any) -> Any:
        """What a method of the pipeline makes, None if it took too long."""
        method = getattr(studio.shelf.pipeline(model), call)
        try:
            with studio.hold(request) as allowed:
                return method(*arguments, callback_on_step_end=lambda *_: allowed(), **options)
        except Stopped as stopped:
            gr.Warning(notice(stopped.reason))
            return None

    def start(model: str, prompt: str, seed: float | None, request: gr.Request) -> Any:
        with shown_on_page():
            out = drawn("__call__", model, request, prompt, seed=checked_seed(seed))
        return gr.skip() if out is None else on_board(out.images[0])

    def painted(
        model: str,
        board: dict[str, Any] | None,
        prompt: str,
        seed: float | None,
        count: float,
        accelerator: str,
        request: gr.Request,
    ) -> tuple[Any, str]:
        with shown_on_page():
            image, mask = image_and_mask(board)
            wanted, first = prompt.strip(), checked_seed(seed)
            out = drawn(
                "inpaint",
                model,
                request,
                image,
                mask,
                wanted or None,
                seed=first,
                num_images=checked_count(count),
                accelerator=studio.shelf.accelerator(accelerator, {}),
            )
        if out is None:
            return gr.skip(), ""
        captions = [f"{wanted or 'whatever fits'}, seed {first + i}" for i in range(len(out.images))]
        return list(zip(out.images, captions, strict=True)), f"`{out.stats}`"

    def changed_painter(name: str) -> Any:
        accelerators = fitting(studio.shelf.job_type(name))
        return gr.update(choices=accelerators, value=accelerators[0])

    form.model.change(changed_painter, form.model, form.accelerator, **PRIVATE)
    shared = device_event(studio)
    form.draw.click(start, [form.model, form.first_prompt, form.seed], form.board, **shared)
    gr.on(
        [form.paint.click, form.prompt.submit],
        painted,
        [form.model, form.board, form.prompt, form.seed, form.count, form.accelerator],
        [form.result, form.told],
        **shared,
    )


def on_board(image: Image.Image) -> Image.Image:
    """An image as large as the drawing board, so that a brush stroke is as fine as the screen."""
    return image.convert("RGB").resize((CANVAS, CANVAS), Image.Resampling.LANCZOS)


def image_and_mask(board: dict[str, Any] | None) -> tuple[Image.Image, Image.Image]:
    """What lies on the drawing board: the image, and white where it was painted over.

    Raises:
        InputError: there is no image, or nothing was painted.
    """
    background = None if board is None else board.get("background")
    if board is None or background is None:
        raise InputError("there is no image yet; draw one or upload one.")
    mask = np.zeros(background.size[::-1], bool)
    for layer in board.get("layers") or []:
        mask |= np.asarray(layer.convert("RGBA").resize(background.size))[..., 3] > 0
    if not mask.any():
        raise InputError("nothing is painted over; paint over the part of the image that should change.")
    return rgb_image(background), Image.fromarray(mask.astype(np.uint8) * 255)
