"""How events of the page are set up: which are private, which wait for the device, and buttons that start and stop."""

from __future__ import annotations

import time
from typing import Any

import gradio as gr

from varaccel.app.studio import Studio, visitor

PRIVATE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Of an event that is done at once and no endpoint for programs."""


def device_event(studio: Studio) -> dict[str, Any]:
    """Of an event that needs the device: all of them share one queue."""
    return {
        "concurrency_id": "device",
        "concurrency_limit": studio.concurrency,
        "api_visibility": "private",
    }


def start_and_stop(
    studio: Studio, prompt: gr.Textbox, start: gr.Button, cancel: gr.Button, asked: gr.State
) -> Any:
    """Make two buttons start and stop what a visitor asks for; the event that work goes on from.

    Args:
        prompt: pressing enter in it starts as well.
        asked: gets the time of the start, see `Visits.was_stopped`.
    """

    def stop(request: gr.Request) -> None:
        studio.visits.stop(visitor(request))

    cancel.click(stop, None, None, **PRIVATE)
    return gr.on(
        [start.click, prompt.submit],
        lambda: (time.monotonic(), gr.update(interactive=False), gr.update(interactive=True)),
        None,
        [asked, start, cancel],
        **PRIVATE,
    )


def ready() -> tuple[Any, Any]:
    """The buttons of `start_and_stop` once the work has ended."""
    return gr.update(interactive=True), gr.update(interactive=False)
