"""A page in the browser: the same pictures drawn plainly and with an accelerator, and what each cost.

    python app/app.py [--model NAME] [--port PORT]

The page is served to this machine alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from varaccel.decoding.accelerator import ACCELERATORS, Accelerator, make_accelerator
from varaccel.decoding.plain import Plain
from varaccel.decoding.zipar import ZipAR
from varaccel.errors import InputError, VaraccelError

if TYPE_CHECKING:
    import gradio as gr

    from varaccel.decoding.statistics import Statistics

HOST = "127.0.0.1"
MAX_PICTURES = 4
MAX_SEED = 2**31 - 1
WARM_UP_PASSES = 4
PROMPT = "a red sphere left of a blue cube at sunset"
COLUMNS = ("decoding", "law", "passes", "tokens per pass", "token time (s)", "speed")
EXPLANATION = (
    "The same prompt, seeds and model, drawn token by token (left) and with an accelerator (right). Token time "
    "leaves out text encoding and the way from tokens to pixels. Both were warmed up; each was timed once, on "
    "this machine: `varaccel bench` repeats the measurement and judges the pictures."
)


def load_gradio() -> Any:
    """Gradio without telemetry; the switch counts only if it is set before the import."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    return gradio


@lru_cache(maxsize=1)  # one model at a time: published ones fill a machine
def load_pipeline(name: str) -> Any:
    from varaccel.pipelines.auto import AutoPipeline

    pipe = AutoPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def options_for(name: str, window: int) -> dict[str, Any]:
    """The page's options that this accelerator has."""
    has_window = "window" in {f.name for f in dataclasses.fields(ACCELERATORS[name])}  # type: ignore[arg-type]
    return {"window": window} if has_window else {}


def warm_up(pipe: Any, accelerator: Accelerator, **call: Any) -> None:
    """The first passes of the call, so that no measured call pays for allocations of its shapes."""

    def stop(pipe: Any, step: int, tokens: int, state: dict[str, Any]) -> None:
        pipe._interrupt = step + 1 >= WARM_UP_PASSES

    pipe(accelerator=accelerator, output_type="latent", callback_on_step_end=stop, **call)


def compare(
    pipe: Any, prompt: str, accelerator: Accelerator, *, seed: int, guidance_scale: float, count: int
) -> tuple[Any, Any]:
    """Outputs of plain and of accelerated decoding for the same prompt and seeds.

    Raises:
        VaraccelError: an argument that the pipeline refuses, or no memory.
    """
    if not 1 <= count <= MAX_PICTURES:
        raise InputError(f"the page draws 1 to {MAX_PICTURES} pictures at once, got {count}.")
    call = {"prompt": prompt, "seed": seed, "guidance_scale": guidance_scale, "num_images_per_prompt": count}
    candidates = (Plain(), accelerator)
    for candidate in candidates:
        warm_up(pipe, candidate, **call)
    plain, fast = (pipe(accelerator=candidate, **call) for candidate in candidates)
    return plain, fast


def table(plain: Statistics, fast: Statistics) -> list[list[str | int]]:
    """A row of `COLUMNS` for each decoding; speeds are ratios to plain decoding."""
    return [
        [
            stats.label,
            "lossless" if stats.lossless else "approximate",
            stats.passes,
            f"{stats.tokens_per_pass:.2f}",
            f"{stats.seconds['tokens']:.2f}",
            f"{plain.seconds['tokens'] / stats.seconds['tokens']:.2f}x",
        ]
        for stats in (plain, fast)
    ]


class WarningList(logging.Handler):
    """Keeps the library's warnings, each once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.messages[record.getMessage()] = None


@contextmanager
def shown_on_page(gradio: Any) -> Iterator[None]:
    """Errors and warnings of the library as notices of the page."""
    warnings, logger = WarningList(), logging.getLogger("varaccel")
    logger.addHandler(warnings)
    try:
        yield
    except VaraccelError as error:
        # notices are rendered as HTML, and messages quote what the visitor typed
        raise gradio.Error(html.escape(str(error), quote=False), print_exception=False) from error
    finally:
        logger.removeHandler(warnings)
        for message in warnings.messages:
            gradio.Warning(html.escape(message, quote=False))


def build(pipe_loader: Callable[[str], Any], models: Sequence[str]) -> gr.Blocks:
    """The page.

    Args:
        pipe_loader: a pipeline by name; called at once for the first model, whose defaults the page shows.
        models: names to choose from, at least one.

    Raises:
        VaraccelError: there is no model, or the first cannot be loaded.
    """
    if not models:
        raise InputError("no model ships with this copy of varaccel; name one with --model.")
    gr = load_gradio()
    guidance_default = pipe_loader(models[0]).config.guidance_scale
    choices = [(cls.summary, name) for name, cls in ACCELERATORS.items() if name != Plain.name]

    def generate(
        prompt: str,
        model: str,
        accelerator: str,
        window: float,
        seed: int | None,
        guidance_scale: float,
        count: float,
    ) -> tuple[list[Any], list[Any], list[list[str | int]]]:
        with shown_on_page(gr):
            if seed is None:
                raise InputError("there is no seed; give a number, so that both sides draw the same.")
            chosen = make_accelerator(accelerator, options_for(accelerator, int(window)))
            plain, fast = compare(
                pipe_loader(model), prompt, chosen, seed=seed, guidance_scale=guidance_scale, count=int(count)
            )
        return plain.images, fast.images, table(plain.stats, fast.stats)

    def default_guidance(model: str) -> float:
        with shown_on_page(gr):
            return pipe_loader(model).config.guidance_scale

    with gr.Blocks(title="varaccel", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("# varaccel\n" + EXPLANATION)
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(PROMPT, label="prompt, or a class of a class-conditional model", scale=4)
            draw = gr.Button("Draw", variant="primary", scale=1)
        with gr.Row():
            model = gr.Dropdown(list(models), value=models[0], label="model")
            accelerator = gr.Dropdown(choices, value=ZipAR.name, label="accelerator")
            window = gr.Slider(1, 32, ZipAR.window, step=1, label="window (smaller = faster, further off)")
        with gr.Row():
            seed = gr.Number(0, label="seed", precision=0, minimum=0, maximum=MAX_SEED)
            guidance = gr.Slider(1, 15, guidance_default, step=0.1, label="guidance (1 = off)")
            count = gr.Slider(1, MAX_PICTURES, 2, step=1, label="pictures")
        with gr.Row():
            galleries = [
                gr.Gallery(label=label, format="png", columns=2, interactive=False)
                for label in ("plain", "accelerated")
            ]
        costs = gr.Dataframe(headers=list(COLUMNS), label="what it cost", interactive=False)
        gr.on(
            [draw.click, prompt.submit],
            generate,
            [prompt, model, accelerator, window, seed, guidance, count],
            [*galleries, costs],
            api_name="generate",
            concurrency_id="model",
            concurrency_limit=1,
        )
        model.change(default_guidance, model, guidance, api_visibility="private", concurrency_id="model")
        accelerator.change(
            lambda name: gr.update(visible=bool(options_for(name, 1))),
            accelerator,
            window,
            api_visibility="private",
        )
    return page.queue(default_concurrency_limit=1, max_size=16)


def serve(page: gr.Blocks, port: int | None = None, **options: Any) -> str:
    """Serve the page to this machine; the address.

    Args:
        port: the first free one from 7860 if None.
        options: of `gradio.Blocks.launch`.

    Raises:
        InputError: the port is taken.
    """
    # fonts of the system: the default theme fetches its own from the network
    theme = load_gradio().themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        launched = page.launch(server_name=HOST, server_port=port, share=False, theme=theme, **options)
    except OSError as error:
        raise InputError(f"the page cannot be served on port {port or 'any'}: {error}") from error
    return launched[1]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Plain and accelerated pictures side by side, in a browser.")
    parser.add_argument(
        "--model", help="a shipped or published model, folder or hub id; the shipped ones by default"
    )
    parser.add_argument("--port", type=int, help="the first free one from 7860 by default")
    options = parser.parse_args(arguments)
    try:
        from varaccel.pipelines.catalog import shipped_models

        models = [options.model] if options.model else list(shipped_models())
        serve(build(load_pipeline, models), options.port)
    except VaraccelError as error:
        print(f"varaccel: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
