"""The endpoint for programs: one call of a pipeline, by gradio_client or plain HTTP."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

from varaccel.accelerators import ACCELERATORS
from varaccel.accelerators.plain import Plain
from varaccel.app.notices import shown_on_page
from varaccel.app.snippet import DrawRequest
from varaccel.app.studio import Studio, checked_count, checked_seed
from varaccel.app.turns import Stopped

DESCRIPTION = (
    "Draw images of a prompt, plainly or with an accelerator. `options` are the accelerator's, such as "
    '{"window": 4}; the model\'s own guidance if `guidance_scale` is null; image i uses seed + i. Returns the '
    "images and what they cost (passes, tokens per pass, seconds by phase)."
)


def draw_endpoint(studio: Studio) -> None:
    """Add `/draw` to an open page; nothing of it is in sight."""
    shelf = studio.shelf

    def draw(
        prompt: str,
        model: str,
        accelerator: str,
        options: dict[str, Any] | None,
        seed: float,
        guidance_scale: float | None,
        count: float,
        request: gr.Request,
    ) -> tuple[list[Image.Image], dict[str, Any]]:
        with shown_on_page(str):
            drawn = DrawRequest(
                model,
                prompt,
                accelerator,
                options or {},
                checked_seed(seed),
                guidance_scale,
                checked_count(count),
            )
            shelf.check_accelerator(drawn.accelerator_object())
            pipe = shelf.pipeline(model)
            try:
                with studio.hold(request) as allowed:
                    out = pipe(callback_on_step_end=lambda *_: allowed(), **drawn.pipeline_call())
            except Stopped as stopped:
                raise gr.Error(stopped.reason or "stopped.", print_exception=False) from stopped
        return out.images, out.stats.to_dict()

    with gr.Row(visible=False):
        inputs: list[Any] = [
            gr.Textbox(label="prompt"),
            gr.Dropdown(
                list(shelf.names), value=shelf.names[0], label="model", allow_custom_value=shelf.any_model
            ),
            gr.Dropdown(list(ACCELERATORS), value=Plain.name, label="accelerator"),
            gr.JSON({}, label="options"),
            gr.Number(0, label="seed"),
            gr.Number(None, label="guidance_scale"),
            gr.Number(1, label="count"),
        ]
        outputs = [gr.Gallery(label="images", format="png"), gr.JSON(label="cost")]
        gr.Button("Draw").click(
            draw,
            inputs,
            outputs,
            api_name="draw",
            api_description=DESCRIPTION,
            concurrency_id="device",
            concurrency_limit=studio.concurrency,
        )
