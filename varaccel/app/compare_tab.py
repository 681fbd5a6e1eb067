"""The tab that draws one prompt with several settings and shows them below each other with what they cost."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from varaccel.accelerators import AnyAccelerator
from varaccel.accelerators.plain import Plain
from varaccel.app.compare_settings import MAX_SETTINGS, proposed_lines, settings_lines
from varaccel.app.compare_view import compared_html, row_html
from varaccel.app.comparison import ComparedRow, compare, setting_label, sheet
from varaccel.app.events import PRIVATE, device_event, ready, start_and_stop
from varaccel.app.models import ModelShelf, fitting_prompt
from varaccel.app.notices import shown_on_page
from varaccel.app.option_controls import MODELS_OWN
from varaccel.app.race_tab import PROMPTS
from varaccel.app.snippet import DrawRequest
from varaccel.app.studio import (
    MAX_IMAGES,
    MAX_SEED,
    Studio,
    checked_count,
    checked_guidance,
    checked_seed,
    visitor,
)
from varaccel.app.turns import Stopped
from varaccel.errors import InputError
from varaccel.evaluation.bench.report import with_plain
from varaccel.evaluation.speed.machine import describe_machine


@dataclass(frozen=True)
class _Controls:
    """What a visitor fills in and presses."""

    prompt: gr.Textbox
    model: gr.Dropdown
    count: gr.Slider
    seed: gr.Number
    guidance: gr.Textbox
    settings: gr.Textbox
    start: gr.Button
    cancel: gr.Button


def compare_tab(studio: Studio) -> None:
    """Fill the open tab of a page."""
    shelf = studio.shelf
    asked = gr.State(0.0)
    controls = _controls(shelf)
    table = gr.HTML(apply_default_css=False)
    download = gr.DownloadButton("Download as one image", visible=False, size="sm")

    def draw(
        asked_at: float,
        model: str,
        prompt: str,
        text: str,
        seed: float | None,
        count: float,
        guidance: str,
        request: gr.Request,
    ) -> Iterator[tuple[Any, Any]]:
        with shown_on_page():
            if studio.visits.was_stopped(visitor(request), asked_at):
                return
            number, images = checked_seed(seed), checked_count(count)
            if not prompt.strip():
                raise InputError("there is no prompt; type what to draw.")
            shelf.check(model)
            chosen = with_plain(settings_lines(text, shelf.job_type(model), model))
            for accelerator in chosen:
                shelf.check_accelerator(accelerator)
            wanted = DrawRequest(model, prompt, Plain.name, {}, number, checked_guidance(guidance), images)
            yield from _shown(studio, wanted, chosen, asked_at, request)

    def propose(model: str, text: str, prompt: str) -> tuple[str, str]:
        """Settings and a prompt for a model; those that are there if they fit."""
        with shown_on_page():
            pipe, job_type = shelf.pipeline(model), shelf.job_type(model)
        prompt = fitting_prompt(pipe, prompt, PROMPTS[0])
        try:
            settings_lines(text, job_type)
        except InputError:
            text = proposed_lines(model, job_type, shelf.names, pipe.drafters)
        return text, prompt

    begun = start_and_stop(studio, controls.prompt, controls.start, controls.cancel, asked)
    one = controls
    drawn = begun.then(
        draw,
        [asked, one.model, one.prompt, one.settings, one.seed, one.count, one.guidance],
        [table, download],
        show_progress="hidden",
        **device_event(studio),
    )
    for ended in (drawn.success, drawn.failure):
        ended(ready, None, [controls.start, controls.cancel], **PRIVATE)
    controls.model.change(
        propose,
        [controls.model, controls.settings, controls.prompt],
        [controls.settings, controls.prompt],
        show_progress_on=[controls.model],
        api_visibility="private",
    )


def _controls(shelf: ModelShelf) -> _Controls:
    first = shelf.names[0]
    with gr.Row():
        with gr.Column(scale=3, min_width=280):
            prompt = gr.Textbox(PROMPTS[0], label="prompt, or a class of a class-conditional model")
            model = gr.Dropdown(
                list(shelf.names), value=first, label="model", allow_custom_value=shelf.any_model
            )
            with gr.Row():
                count = gr.Slider(1, MAX_IMAGES, 2, step=1, label="images of each", min_width=140)
                seed = gr.Number(0, label="seed", minimum=0, maximum=MAX_SEED, min_width=110)
                # a number field that is left empty sends 0
                guidance = gr.Textbox("", label="guidance", placeholder=MODELS_OWN, min_width=140)
        with gr.Column(scale=2, min_width=280):
            settings = gr.Textbox(
                proposed_lines(first, shelf.job_type(first), shelf.names),
                label="settings, one per line",
                info=f"as on the command line, up to {MAX_SETTINGS}; plain decoding always comes first",
                lines=7,
                max_lines=MAX_SETTINGS + 1,
            )
            with gr.Row():
                start = gr.Button("Compare", variant="primary", min_width=100)
                cancel = gr.Button("Cancel", variant="stop", interactive=False, min_width=100)
    return _Controls(prompt, model, count, seed, guidance, settings, start, cancel)


class _Permit:
    """What the call asks after every pass: whichever hold of the device is in force."""

    def __init__(self) -> None:
        self.allowed: Callable[[], None] = lambda: None

    def __call__(self) -> None:
        self.allowed()

    @property
    def paused(self) -> float:
        """Of the hold, if it tells."""
        paused: float = self.allowed.paused  # type: ignore[attr-defined]
        return paused


def _shown(
    studio: Studio,
    wanted: DrawRequest,
    chosen: Sequence[AnyAccelerator],
    asked_at: float,
    request: gr.Request | None,
) -> Iterator[tuple[Any, Any]]:
    """The table after every row, and at the end a file with all rows, for as many as were drawn.

    The device is held for a row at a time, so others do not wait while the page is shown, and the time limit of the
    page is one of a row.

    Args:
        wanted: what every row draws; of it the plain one.
        chosen: plain decoding first.
        asked_at: when the visitor did.
    """
    rows: list[ComparedRow] = []
    shown: list[str] = []
    failure: Exception | None = None
    told = machine = ""
    try:
        yield compared_html(shown, wanted, f"loading {wanted.model}", machine), gr.update(visible=False)
        pipe = studio.shelf.pipeline(wanted.model)
        machine = describe_machine(pipe.transformer.device)
        permit = _Permit()
        drawing = compare(
            pipe,
            wanted.prompt,
            chosen,
            seed=wanted.seed,
            count=wanted.count,
            guidance_scale=wanted.guidance_scale,
            allowed=permit,
        )
        for number, accelerator in enumerate(chosen, start=1):
            note = f"drawing {number} of {len(chosen)}: {setting_label(accelerator)}"
            yield compared_html(shown, wanted, note, machine), gr.skip()
            if studio.visits.was_stopped(visitor(request), asked_at):
                raise Stopped
            with studio.hold(request) as permit.allowed:
                rows.append(next(drawing))
            shown.append(row_html(rows[-1], wanted))
    except Stopped as stopped:
        told = stopped.reason or f"stopped after {len(rows)} of {len(chosen)} settings."
    except Exception as error:  # raised again below, after the images so far have been shown
        failure, told = error, f"ended after {len(rows)} of {len(chosen)} settings."
    finished = compared_html(shown, wanted, f"{told[:1].upper()}{told[1:]}", machine)
    if rows:
        # gradio takes a copy of the file before it asks for more
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "comparison.png"
            sheet(rows, wanted.prompt).save(path)
            yield finished, gr.update(value=str(path), visible=True)
    else:
        yield finished, gr.skip()
    if failure is not None:
        raise failure
