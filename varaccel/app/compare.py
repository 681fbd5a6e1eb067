"""The tab that draws one prompt with several settings and shows them below each other with what they cost."""

from __future__ import annotations

import json
import re
import tempfile
import textwrap
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageDraw, ImageFont

from varaccel.accelerators import Accelerator, resolve_accelerator
from varaccel.accelerators.plain import Plain
from varaccel.app.markup import data_uri, distribution_badge
from varaccel.app.models import fitting_prompt
from varaccel.app.notices import shown_on_page
from varaccel.app.option_controls import MODELS_OWN
from varaccel.app.race import unpaused, warm_up
from varaccel.app.race_tab import PROMPTS
from varaccel.app.snippet import DrawRequest, given_options, reproduce_command
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
from varaccel.engine.statistics import Statistics, call_label
from varaccel.errors import InputError
from varaccel.evaluation.bench.figures import Samples
from varaccel.evaluation.bench.run import RELEASE_GRIDS, Row, parse_accelerator
from varaccel.evaluation.speed.call_speed import naming
from varaccel.evaluation.speed.machine import describe_machine
from varaccel.pipelines.output import ImageOutput

MAX_SETTINGS = 12
TIMED_ONCE = (
    "Speed-ups are ratios to plain decoding in the same comparison. Every setting was warmed up and timed once, on "
    "this machine, so small differences mean nothing; `varaccel bench` repeats the measurement and judges the "
    "images."
)

_SHOWN = 256
"""Longer side of an image on the page in pixels, at most: dozens of them go through it at once."""

_PROMPT_ON_SHEET = 200
"""Letters of a prompt on a sheet."""


# -- settings ------------------------------------------------------------------------------------------


def settings_lines(text: str, family: str) -> list[Accelerator]:
    """The accelerators of a text, one per line as typed on a command line, such as `zipar:window=4`.

    Empty lines do not count, nor does what follows a # at the start of a line or after a space.

    Args:
        family: of the model that they have to fit.

    Raises:
        InputError: a line that cannot be used, with its number; no setting, or more than `MAX_SETTINGS`.
    """
    settings = []
    for number, line in enumerate(text.splitlines(), start=1):
        typed = re.sub(r"(^|\s)#.*", "", line).strip()
        if not typed:
            continue
        try:
            settings.append(resolve_accelerator(parse_accelerator(typed), family))
        except InputError as error:
            raise InputError(f"line {number}: {error}") from error
    if not settings:
        raise InputError("there is no setting to compare; type one per line, such as `zipar:window=4`.")
    if len(settings) > MAX_SETTINGS:
        raise InputError(
            f"the page compares up to {MAX_SETTINGS} settings, got {len(settings)}; remove some."
        )
    return settings


def default_lines(family: str) -> str:
    """What the page proposes to compare: plain decoding and the settings of the release's report."""
    return "\n".join((Plain.name, *RELEASE_GRIDS.get(family, ())))


def proposed_lines(model: str, family: str, models: Sequence[str], own: Collection[str] = ()) -> str:
    """`default_lines` without the settings for which a model has no second network.

    Args:
        model, family: the model.
        models: names that the page offers.
        own: drafters that came with the model.
    """
    lines = default_lines(family).splitlines()
    if smaller_model(model) not in models:
        # the report's settings name the small shipped model, which fits only the one that it was made for
        lines = [re.sub(r"[:,]refiner=[\w-]+", "", line) for line in lines]
        if not own:
            lines = [line for line in lines if line.split(":")[0] not in ("code", "refiner", "cspd")]
    return "\n".join(lines)


# -- the comparison ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ComparedRow:
    """What one setting drew, and how fast.

    Attributes:
        accelerator: as it was asked for.
        output: the images and their cost; its token time leaves out what the call waited for others.
        speedup: token time of plain decoding in the same comparison over that of this row.
        seed: of the first image.
    """

    accelerator: Accelerator
    output: ImageOutput
    speedup: float
    seed: int

    @property
    def label(self) -> str:
        return setting_label(self.accelerator)

    @property
    def stats(self) -> Statistics:
        return self.output.stats

    @property
    def distribution(self) -> str:
        return "lossless" if self.stats.lossless else "approximate"

    @property
    def chosen(self) -> str | None:
        """What a setting that chooses by the call, such as `auto`, has chosen; None for the others."""
        return None if self.stats.accelerator == self.accelerator.name else self.stats.label


def setting_label(accelerator: Accelerator) -> str:
    """An accelerator with its telling options."""
    return call_label(accelerator.name, accelerator.options())


def with_plain(accelerators: Sequence[Accelerator]) -> list[Accelerator]:
    """Plain decoding, then the others, each once."""
    return list({Row.of(one).key: one for one in (Plain(), *accelerators)}.values())


def compare(
    pipe: Any,
    prompt: str,
    accelerators: Sequence[Accelerator],
    *,
    seed: int,
    count: int,
    guidance_scale: float | None,
    allowed: Callable[[], None],
) -> Iterator[ComparedRow]:
    """Draw a prompt plainly and with every accelerator, and yield each row as it is finished.

    Every row is warmed up, then timed in one call. All draw the same seeds.

    Args:
        pipe: a pipeline with its progress bar switched off.
        accelerators: to be compared; plain decoding is added in front, repetitions are dropped.
        seed: of the first image; image i has seed `seed` + i.
        count: images per row, drawn in one call.
        guidance_scale: None for the model's own.
        allowed: called after every pass; may raise to stop the call. What it takes is not on the clock. If it has an
            attribute `paused`, that is how long it has waited in all; else all of its time counts as waiting.

    Raises:
        VaraccelError: an argument that the pipeline refuses, or no memory; names the accelerator.
    """
    call: dict[str, Any] = {
        "prompt": prompt,
        "seed": seed,
        "num_images_per_prompt": count,
        **({} if guidance_scale is None else {"guidance_scale": guidance_scale}),
    }
    plain_seconds: float | None = None
    for accelerator in with_plain(accelerators):
        with naming(accelerator):
            warm_up(pipe, accelerator, allowed, **call)
            output = _timed(pipe, accelerator, allowed, call)
        seconds = output.stats.seconds["tokens"]
        plain_seconds = seconds if plain_seconds is None else plain_seconds
        yield ComparedRow(accelerator, output, plain_seconds / seconds, seed)


def _timed(
    pipe: Any, accelerator: Accelerator, allowed: Callable[[], None], call: dict[str, Any]
) -> ImageOutput:
    """One call, with a clock that stands still while others have the device."""
    own = 0.0
    waited_before = getattr(allowed, "paused", None)

    def after_pass(*_: Any) -> None:
        nonlocal own
        before = time.perf_counter()
        allowed()
        own += time.perf_counter() - before

    output: ImageOutput = pipe(accelerator=accelerator, callback_on_step_end=after_pass, **call)
    waited = own if waited_before is None else allowed.paused - waited_before  # type: ignore[attr-defined]
    return ImageOutput(output.images, unpaused(output.stats, waited), output.written)


def sheet(rows: Sequence[ComparedRow], prompt: str) -> Image.Image:
    """All rows as one labelled image, with distributions and speed-ups below."""
    count = len(rows[0].output.images)
    text = textwrap.shorten(prompt, _PROMPT_ON_SHEET, placeholder=" …")
    prompts = tuple(f"{text}, seed {rows[0].seed + index}" for index in range(count))
    images = Samples(prompts, tuple((row.accelerator, row.output) for row in rows)).sheet()
    font, height, margin = ImageFont.load_default(12), 16, 6
    lines = [
        line
        for told in (*map(_cost, rows), TIMED_ONCE.replace("`", ""))
        for line in textwrap.wrap(told, images.width // 7, subsequent_indent="   ")
    ]
    whole = Image.new("RGB", (images.width, images.height + len(lines) * height + 2 * margin), "white")
    whole.paste(images)
    draw = ImageDraw.Draw(whole)
    for index, line in enumerate(lines):
        draw.text((margin, images.height + margin + index * height), line, "black", font)
    return whole


def _cost(row: ComparedRow) -> str:
    distribution = "exact" if row.stats.lossless else "approximate"
    return (
        f"{row.label}: {distribution}, {row.stats.seconds['tokens']:.2f} s, {row.speedup:.2f}x plain decoding"
    )


# -- the page ------------------------------------------------------------------------------------------


def compare_tab(studio: Studio) -> None:
    """Fill the open tab of a page."""
    shelf = studio.shelf
    first = shelf.names[0]
    asked = gr.State(0.0)
    with gr.Row():
        with gr.Column(scale=3, min_width=280):
            prompt = gr.Textbox(PROMPTS[0], label="prompt, or a class of a class-conditional model")
            model = gr.Dropdown(
                list(shelf.names), value=first, label="model", allow_custom_value=shelf.any_model
            )
            with gr.Row():
                count = gr.Slider(1, MAX_IMAGES, 2, step=1, label="images of each", min_width=140)
                seed = gr.Number(0, label="seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=110)
                # a number field that is left empty sends 0
                guidance = gr.Textbox("", label="guidance", placeholder=MODELS_OWN, min_width=140)
        with gr.Column(scale=2, min_width=280):
            settings = gr.Textbox(
                proposed_lines(first, shelf.family(first), shelf.names),
                label="settings, one per line",
                info=f"as on the command line, up to {MAX_SETTINGS}; plain decoding always comes first",
                lines=7,
                max_lines=MAX_SETTINGS + 1,
            )
            with gr.Row():
                start = gr.Button("Compare", variant="primary", min_width=100)
                cancel = gr.Button("Cancel", variant="stop", interactive=False, min_width=100)
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
            chosen = with_plain(settings_lines(text, shelf.family(model)))
            for accelerator in chosen:
                shelf.check_accelerator(accelerator)
            wanted = DrawRequest(model, prompt, Plain.name, {}, number, checked_guidance(guidance), images)
            yield from _shown(studio, wanted, chosen, asked_at, request)

    def propose(model: str, text: str, prompt: str) -> tuple[str, str]:
        """Settings and a prompt for a model; those that are there if they fit."""
        with shown_on_page():
            pipe, family = shelf.pipeline(model), shelf.family(model)
        prompt = fitting_prompt(pipe, prompt, PROMPTS[0])
        try:
            settings_lines(text, family)
        except InputError:
            text = proposed_lines(model, family, shelf.names, pipe.drafters)
        return text, prompt

    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    begun = gr.on(
        [start.click, prompt.submit],
        lambda: (time.monotonic(), gr.update(interactive=False), gr.update(interactive=True)),
        None,
        [asked, start, cancel],
        **quiet,
    )
    drawn = begun.then(
        draw,
        [asked, model, prompt, settings, seed, count, guidance],
        [table, download],
        concurrency_id="device",
        concurrency_limit=studio.concurrency,
        show_progress="hidden",
        api_visibility="private",
    )
    for ended in (drawn.success, drawn.failure):
        ended(
            lambda: (gr.update(interactive=True), gr.update(interactive=False)),
            None,
            [start, cancel],
            **quiet,
        )

    def stop(request: gr.Request) -> None:
        studio.visits.stop(visitor(request))

    cancel.click(stop, None, None, **quiet)
    model.change(
        propose,
        [model, settings, prompt],
        [settings, prompt],
        show_progress_on=[model],
        api_visibility="private",
    )


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
    chosen: Sequence[Accelerator],
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
    except Exception as error:  # raised again below, after what there is has been shown
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


HEADER = ("setting", "images", "passes", "tokens per pass", "seconds", "speed-up")


def compared_html(rows: Sequence[str], wanted: DrawRequest, note: str, machine: str) -> str:
    """The comparison as it stands.

    Args:
        rows: of `row_html`.
        wanted: what is drawn.
        note: what is going on, empty when all is done.
        machine: where it runs.
    """
    titles = "".join(f'<th scope="col">{title}</th>' for title in HEADER)
    body = f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table>" if rows else ""
    first, last = wanted.seed, wanted.seed + wanted.count - 1
    seeds = f"seed {first}" if first == last else f"seeds {first} to {last}"
    said = [f"<p>{escape(wanted.model)}: {escape(wanted.prompt)} ({seeds})</p>"]
    if note:
        said.append(f'<p class="note" role="status">{escape(note)}</p>')
    if rows:
        told = escape(TIMED_ONCE).replace("`varaccel bench`", "<code>varaccel bench</code>")
        body += f'<p class="small">{told} Seconds are those of decoding tokens, of {escape(machine)}.</p>'
    return f'<div class="va-compare">{"".join(said)}{body}</div>'


def row_html(row: ComparedRow, wanted: DrawRequest) -> str:
    """A row of the table; on a phone its cells stand below each other under their titles."""
    stats = row.stats
    images = "".join(
        f'<img alt="{escape(f"{wanted.prompt}, seed {row.seed + index}: {row.label}")}" '
        f'width="{image.width}" height="{image.height}" src="{data_uri(image)}">'
        for index, image in enumerate(map(_reduced, row.output.images))
    )
    options = "".join(f"<small>{escape(told)}</small>" for told in _options(row.accelerator))
    chose = "" if row.chosen is None else f"<small>chose {escape(row.chosen)}</small>"
    figures = (
        f"{stats.passes}",
        f"{stats.tokens_per_pass:.2f}",
        f"{stats.seconds['tokens']:.2f}",
        f"<b>{row.speedup:.2f}x</b> {distribution_badge(row.distribution)}",
    )
    cells = "".join(
        f'<td data-title="{title}">{figure}</td>' for title, figure in zip(HEADER[2:], figures, strict=True)
    )
    return (
        f'<tr><th scope="row">{escape(row.accelerator.name)}{options}{chose}{_command(row, wanted)}</th>'
        f'<td class="images"><div>{images}</div></td>{cells}</tr>'
    )


def _options(accelerator: Accelerator) -> Iterator[str]:
    """The options that tell a setting from others: the first one if it has a value, and those that were given."""
    given = given_options(accelerator)
    for item in fields(accelerator):  # type: ignore[arg-type]
        value = getattr(accelerator, item.name)
        if item.name in given or (item.name == fields(accelerator)[0].name and value is not None):  # type: ignore[arg-type]
            yield f"{item.name}={value if isinstance(value, str) else json.dumps(value, default=str)}"


def _command(row: ComparedRow, wanted: DrawRequest) -> str:
    """How to draw the row again, folded."""
    try:
        told = reproduce_command(
            replace(wanted, accelerator=row.accelerator.name, options=given_options(row.accelerator))
        )
    except InputError as error:
        told = str(error)
    return f"<details><summary>reproduce</summary><code>{escape(told)}</code></details>"


def _reduced(image: Image.Image) -> Image.Image:
    """An image as it is, or smaller if it is large."""
    if max(image.size) <= _SHOWN:
        return image
    smaller = image.copy()
    smaller.thumbnail((_SHOWN, _SHOWN), Image.Resampling.LANCZOS)
    return smaller


CSS = """
.va-compare{color:var(--body-text-color);font-size:var(--text-md);line-height:1.5;overflow-wrap:anywhere}
.va-compare p{margin:.3rem 0}
.va-compare .note{padding:.4rem .9rem;border-left:4px solid var(--color-accent);
background:var(--background-fill-secondary)}
.va-compare small,.va-compare .small,.va-compare summary{font-size:var(--text-sm);
color:color-mix(in srgb,var(--body-text-color) 72%,var(--background-fill-primary))}
.va-compare table{border-collapse:collapse;width:100%;margin:.5rem 0;font-variant-numeric:tabular-nums}
.va-compare th,.va-compare td{padding:.5rem .6rem;text-align:right;vertical-align:top;
border-top:1px solid var(--border-color-primary)}
.va-compare thead th{border-top:0;font-size:var(--text-sm);font-weight:600}
.va-compare th:first-child,.va-compare th:nth-child(2),.va-compare .images{text-align:left}
.va-compare tbody th{font-weight:600;width:14rem}
.va-compare small{display:block;font-weight:400}
.va-compare .images div{display:flex;flex-wrap:wrap;gap:6px}
.va-compare img{display:block;margin:0;border-radius:6px;max-width:100%;height:auto}
.va-compare details{font-weight:400}
.va-compare summary{cursor:pointer}
.va-compare details code{display:block;font-size:var(--text-xs);user-select:all;white-space:pre-wrap;
background:var(--background-fill-secondary);padding:.3rem .5rem;border-radius:6px}
@media (max-width:48rem){
.va-compare thead{display:none}
.va-compare table,.va-compare tbody{display:block}
.va-compare tr{display:grid;grid-template-columns:repeat(4,auto);gap:.15rem .8rem;padding:.6rem 0;
border-top:1px solid var(--border-color-primary)}
.va-compare tbody th,.va-compare .images{grid-column:1/-1;width:auto}
.va-compare tr th,.va-compare tr td{border:0;padding:.15rem 0;text-align:left}
.va-compare td[data-title]::before{content:attr(data-title);display:block;font-size:var(--text-xs);
color:color-mix(in srgb,var(--body-text-color) 72%,var(--background-fill-primary))}
.va-compare .images div{display:grid;grid-template-columns:repeat(auto-fit,minmax(7.5rem,1fr))}
.va-compare .images img{width:100%}
}
"""
"""Styles of the tab; those of the labels of distributions are in `varaccel.app.explore.CSS`."""
