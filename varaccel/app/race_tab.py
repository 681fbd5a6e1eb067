"""The race: plain and accelerated decoding of the same images, as they come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from varaccel.accelerators import ACCELERATORS
from varaccel.accelerators.plain import Plain
from varaccel.app.cost import quality_cost
from varaccel.app.events import PRIVATE, device_event, ready, start_and_stop
from varaccel.app.models import ModelShelf, fitting_prompt, takes_models
from varaccel.app.notices import notice, shown_on_page
from varaccel.app.option_controls import MODELS_OWN, chosen_options, control, options_of
from varaccel.app.race import Race, Side
from varaccel.app.race_view import NOTHING_YET, race_html
from varaccel.app.snippet import DrawRequest, reproduce_command, reproduce_python
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
from varaccel.engine.accelerator import fitting
from varaccel.engine.job import Job
from varaccel.evaluation.bench.grids import APP_OPTIONS, defaults_of
from varaccel.evaluation.call_text import quality_label
from varaccel.shipped import smaller_model

PROMPTS = (
    "a yellow cylinder on a blue floor",
    "a shiny blue cylinder on a wood floor",
    "a red sphere left of a blue cube at sunset",
)

SHOWN_OPTIONS = 3
"""Options of an accelerator that are always in sight; the others are folded away."""

GALLERY_LIMIT = 24
"""Images of a visit that are kept."""

Gallery = list[tuple[Image.Image, str]]


@dataclass(frozen=True)
class _Form:
    """What a visitor fills in and presses.

    Attributes:
        groups: the controls of every accelerator's options, of which one group is in sight.
        options: these controls by accelerator and option.
    """

    prompt: gr.Textbox
    start: gr.Button
    stop: gr.Button
    model: gr.Dropdown
    accelerator: gr.Dropdown
    groups: Mapping[str, gr.Column]
    options: Mapping[tuple[str, str], gr.components.Component]
    seed: gr.Number
    guidance: gr.Textbox
    count: gr.Slider


@dataclass(frozen=True)
class _Results:
    """Where a race and what comes of it are shown."""

    panel: gr.HTML
    gallery: gr.Gallery
    python: gr.Code
    command: gr.Code


def race_tab(studio: Studio) -> None:
    """The content of the tab, inside an open `gr.Blocks`."""
    kept: gr.State = gr.State([], time_to_live=3600)
    asked = gr.State(0.0)
    with gr.Row(equal_height=False):
        form = _form(studio.shelf)
        results = _results()
    _race_events(studio, form, results, kept, asked)
    _form_events(studio.shelf, form)


def _form(shelf: ModelShelf) -> _Form:
    first_model = shelf.names[0]
    job_type = shelf.job_type(first_model)
    with gr.Column(scale=1, min_width=280):
        prompt = gr.Textbox(
            PROMPTS[0],
            label="prompt, or a class of a class-conditional model",
            lines=2,
            max_lines=4,
            submit_btn=False,
            elem_id="prompt",
        )
        with gr.Row():
            start = gr.Button("Race", variant="primary", elem_id="race", min_width=80)
            stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", min_width=80)
        model = gr.Dropdown(
            list(shelf.names),
            value=first_model,
            label="model",
            allow_custom_value=shelf.any_model,
            elem_id="model",
        )
        accelerator = gr.Dropdown(
            _choices(job_type), value=_first_choice(job_type), label="accelerator", elem_id="accelerator"
        )
        groups, controls = _option_groups(shelf.names, _first_choice(job_type))
        with gr.Accordion("Seed, guidance, number of images", open=False):
            seed = gr.Number(0, label="seed", minimum=0, maximum=MAX_SEED, elem_id="seed")
            guidance = gr.Textbox(
                "",
                label="guidance",
                info="how strictly to follow the prompt",
                placeholder=MODELS_OWN,
                max_lines=1,
                elem_id="guidance",
            )
            count = gr.Slider(1, MAX_IMAGES, 1, step=1, label="images", elem_id="count")
        gr.Examples([[text] for text in PROMPTS], [prompt], label="prompts", cache_examples=False)
    return _Form(prompt, start, stop, model, accelerator, groups, controls, seed, guidance, count)


def _results() -> _Results:
    with gr.Column(scale=3, min_width=300, elem_id="race-view"):
        panel = gr.HTML(NOTHING_YET, elem_id="race-panel")
        # styles look at it, so that it works while a race is under way
        gr.Checkbox(False, label="show which pass wrote each token, dark to bright", elem_id="passes")
        gallery = gr.Gallery(
            label="images of this visit",
            format="png",
            columns=6,
            fit_columns=False,
            height=240,
            object_fit="contain",
            interactive=False,
            buttons=["download", "download_all", "fullscreen"],
            elem_id="gallery",
        )
        with gr.Accordion("Reproduce the accelerated image", open=False):
            python = gr.Code(language="python", label="Python", interactive=False, elem_id="python")
            command = gr.Code(
                language="shell", label="command line", interactive=False, lines=2, wrap_lines=True
            )
    return _Results(panel, gallery, python, command)


def _race_events(studio: Studio, form: _Form, results: _Results, kept: gr.State, asked: gr.State) -> None:
    """What the buttons do.

    Args:
        kept: images of the visit.
        asked: when the visitor asked for the race.
    """
    names = list(form.options)

    def race(
        request: gr.Request,
        asked_at: float,
        images: Gallery,
        model: str,
        prompt: str,
        accelerator: str,
        seed: float | None,
        guidance: str,
        count: float,
        *values: Any,
    ) -> Iterator[tuple[Any, ...]]:
        with shown_on_page():
            if studio.visits.was_stopped(visitor(request), asked_at):
                return
            given = {
                option: value
                for (owner, option), value in zip(names, values, strict=True)
                if owner == accelerator
            }
            studio.shelf.check(model)  # before its name leads to a file of a report
            drawn = DrawRequest(
                model,
                prompt,
                accelerator,
                chosen_options(accelerator, given),
                checked_seed(seed),
                checked_guidance(guidance),
                checked_count(count),
            )
            cost = quality_cost(studio.reports, drawn)
            for sides in running(studio, drawn, request):
                yield race_html(sides, prompt, cost), *([gr.skip()] * 4)
            if all(side.phase == "finished" for side in sides):
                images = [*_captioned(drawn, sides), *images][:GALLERY_LIMIT]
                snippets = reproduce_python(drawn), reproduce_command(drawn)
                yield gr.skip(), images, images, *snippets

    begun = start_and_stop(studio, form.prompt, form.start, form.stop, asked)
    call = [form.model, form.prompt, form.accelerator, form.seed, form.guidance, form.count]
    run = begun.then(
        race,
        [asked, kept, *call, *form.options.values()],
        [results.panel, results.gallery, kept, results.python, results.command],
        show_progress="hidden",
        scroll_to_output=True,
        **device_event(studio),
    )
    run.success(ready, None, [form.start, form.stop], **PRIVATE)
    # what there was stands for a race that did not come about; the notice says why
    run.failure(lambda: (*ready(), NOTHING_YET), None, [form.start, form.stop, results.panel], **PRIVATE)


def _form_events(shelf: ModelShelf, form: _Form) -> None:
    """What changes with the model and with the accelerator."""
    second = {key: c for key, c in form.options.items() if takes_models(*key)}

    def changed_model(name: str, prompt: str) -> tuple[Any, ...]:
        with shown_on_page():
            job_type, pipe = shelf.job_type(name), shelf.pipeline(name)
        relatives = [other for other in shelf.names if shelf.job_type(other) is job_type]
        small = smaller_model(name)
        network = gr.update(choices=[(MODELS_OWN, ""), *relatives], value=small if small in relatives else "")
        chosen = _first_choice(job_type)
        return (
            gr.update(choices=_choices(job_type), value=chosen),
            fitting_prompt(pipe, prompt, PROMPTS[0]),
            *_visible(form.groups, chosen),
            *[network] * len(second),
        )

    form.model.change(
        changed_model,
        [form.model, form.prompt],
        [form.accelerator, form.prompt, *form.groups.values(), *second.values()],
        show_progress_on=[form.model],
        api_visibility="private",
    )
    form.accelerator.input(
        lambda name: _visible(form.groups, name), form.accelerator, list(form.groups.values()), **PRIVATE
    )


def running(studio: Studio, drawn: DrawRequest, request: gr.Request | None) -> Iterator[list[Side]]:
    """The sides of a race of plain decoding and what is asked for, as it goes on.

    Raises:
        VaraccelError: a request that cannot be carried out, or no memory.
    """
    accelerator = drawn.accelerator_object()
    studio.shelf.check_accelerator(accelerator)
    call = {name: value for name, value in drawn.pipeline_call().items() if name != "accelerator"}
    race = Race(
        studio.shelf.pipeline(drawn.model),
        call,
        [Plain(), accelerator],
        studio.turns,
        seconds_limit=studio.seconds_limit,
    )
    with studio.visits.running(visitor(request), race.stop):
        try:
            yield from race.frames()
        except Stopped as stopped:  # out of time
            gr.Warning(notice(stopped.reason))


def _choices(job_type: type[Job]) -> list[tuple[str, str]]:
    """The accelerators that fit, as entries of a list."""
    names = [name for name in fitting(job_type) if name != Plain.name]
    return [(f"{name} ({quality_label(ACCELERATORS[name]().lossless)})", name) for name in names]


def _first_choice(job_type: type[Job]) -> str:
    names = [name for name in fitting(job_type) if name != Plain.name]
    return defaults_of(job_type).first_choice or (names or [Plain.name])[0]


def _option_groups(
    models: Sequence[str], shown: str
) -> tuple[dict[str, gr.Column], dict[tuple[str, str], gr.components.Component]]:
    """A group of controls for every accelerator, of which one is in sight; the controls by accelerator and option."""
    groups: dict[str, gr.Column] = {}
    controls: dict[tuple[str, str], gr.components.Component] = {}
    for name, cls in ACCELERATORS.items():
        options = options_of(cls, models)
        with gr.Column(visible=name == shown, elem_classes="options") as groups[name]:
            gr.Markdown(f"*{cls.summary}*")
            for option in options[:SHOWN_OPTIONS]:
                start = APP_OPTIONS.get((name, option.name))
                known = option.kind != "choice" or start in option.choices
                controls[name, option.name] = control(option, start if known else None)
            if options[SHOWN_OPTIONS:]:
                with gr.Accordion("More options", open=False):
                    for option in options[SHOWN_OPTIONS:]:
                        controls[name, option.name] = control(option)
    return groups, controls


def _visible(groups: Mapping[str, Any], chosen: str) -> list[Any]:
    return [gr.update(visible=name == chosen) for name in groups]


def _captioned(drawn: DrawRequest, sides: Sequence[Side]) -> Gallery:
    """The images of a race for the gallery: of each seed, one after the other, plain and accelerated."""
    return [
        (image, f"{drawn.prompt}, seed {drawn.seed + index}: {side.label}")
        for index in range(drawn.count)
        for side, image in ((side, side.images[index]) for side in reversed(sides))
    ]
