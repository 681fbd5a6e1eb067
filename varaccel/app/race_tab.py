"""The race: plain and accelerated decoding of the same images, as they come."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gradio as gr
from PIL import Image

from varaccel.accelerators import ACCELERATORS
from varaccel.accelerators.plain import Plain
from varaccel.app.cost import quality_cost
from varaccel.app.models import accelerators_of, fitting_prompt
from varaccel.app.notices import notice, shown_on_page
from varaccel.app.option_controls import MODELS_OWN, chosen_options, control, options_of, takes_models
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
from varaccel.cli.commands import smaller_model

PROMPTS = (
    "a yellow cylinder on a blue floor",
    "a shiny blue cylinder on a wood floor",
    "a red sphere left of a blue cube at sunset",
)
FIRST_CHOICE = {"llamagen": "zipar", "var": "code", "mar": "fewer_steps"}
"""What the page proposes for a family."""

FIRST_OPTIONS: Mapping[tuple[str, str], Any] = {
    ("zipar", "window"): 4,
    ("code", "draft_scales"): 4,
    ("code", "refiner"): "mini-var-small",
    ("fewer_steps", "iterations"): 32,
    ("fewer_steps", "head_steps"): 20,
    ("fewer_steps", "head_sampler"): "dpm++",
}
"""Where the page starts from another value than the default: settings of the release's report that show something."""

SHOWN_OPTIONS = 3
"""Options of an accelerator that are always in sight; the others are folded away."""

GALLERY_LIMIT = 24
"""Images of a visit that are kept."""

Gallery = list[tuple[Image.Image, str]]


def race_tab(studio: Studio) -> None:
    """The content of the tab, inside an open `gr.Blocks`."""
    shelf = studio.shelf
    first_model = shelf.names[0]
    family = shelf.family(first_model)
    kept: gr.State = gr.State([], time_to_live=3600)
    asked = gr.State(0.0)
    with gr.Row(equal_height=False):
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
                _choices(family), value=_first_choice(family), label="accelerator", elem_id="accelerator"
            )
            groups, controls = _option_groups(shelf.names, _first_choice(family))
            with gr.Accordion("Seed, guidance, number of images", open=False):
                seed = gr.Number(0, label="seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed")
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

    names = list(controls)

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
            shelf.check(model)  # before its name leads to a file of a report
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

    def stop_all(request: gr.Request) -> None:
        studio.visits.stop(visitor(request))

    begun = gr.on(
        [start.click, prompt.submit],
        lambda: (time.monotonic(), gr.update(interactive=False), gr.update(interactive=True)),
        None,
        [asked, start, stop],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    run = begun.then(
        race,
        [asked, kept, model, prompt, accelerator, seed, guidance, count, *controls.values()],
        [panel, gallery, kept, python, command],
        concurrency_id="device",
        concurrency_limit=studio.concurrency,
        show_progress="hidden",
        scroll_to_output=True,
        api_visibility="private",
    )
    ready = gr.update(interactive=True), gr.update(interactive=False)
    after: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    run.success(lambda: ready, None, [start, stop], **after)
    # what there was stands for a race that did not come about; the notice says why
    run.failure(lambda: (*ready, NOTHING_YET), None, [start, stop, panel], **after)
    stop.click(
        stop_all,
        None,
        None,
        queue=False,
        api_visibility="private",
    )

    second = {key: c for key, c in controls.items() if takes_models(*key)}

    def changed_model(name: str, prompt: str) -> tuple[Any, ...]:
        with shown_on_page():
            family, pipe = shelf.family(name), shelf.pipeline(name)
        relatives = [other for other in shelf.names if shelf.family(other) == family]
        small = smaller_model(name)
        network = gr.update(choices=[(MODELS_OWN, ""), *relatives], value=small if small in relatives else "")
        chosen = _first_choice(family)
        return (
            gr.update(choices=_choices(family), value=chosen),
            fitting_prompt(pipe, prompt, PROMPTS[0]),
            *_visible(groups, chosen),
            *[network] * len(second),
        )

    model.change(
        changed_model,
        [model, prompt],
        [accelerator, prompt, *groups.values(), *second.values()],
        show_progress_on=[model],
        api_visibility="private",
    )
    accelerator.input(
        lambda name: _visible(groups, name),
        accelerator,
        list(groups.values()),
        queue=False,
        show_progress="hidden",
        api_visibility="private",
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


def _choices(family: str) -> list[tuple[str, str]]:
    """What a family offers, said for a list."""
    names = [name for name in accelerators_of(family) if name != Plain.name]
    return [(f"{name} ({_distribution(name)})", name) for name in names]


def _distribution(accelerator: str) -> str:
    return "exact" if ACCELERATORS[accelerator]().lossless else "approximate"


def _first_choice(family: str) -> str:
    names = [name for name in accelerators_of(family) if name != Plain.name]
    return FIRST_CHOICE.get(family, (names or [Plain.name])[0])


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
                start = FIRST_OPTIONS.get((name, option.name))
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
