"""The page: its tabs, its limits, and how it is served."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from varaccel.app import compare_view, race_view, report_view
from varaccel.app.api import draw_endpoint
from varaccel.app.compare_tab import compare_tab
from varaccel.app.explore_tab import explore_tab
from varaccel.app.inpaint_tab import inpaint_tab
from varaccel.app.models import ModelShelf
from varaccel.app.race_tab import race_tab
from varaccel.app.reports import report_folders
from varaccel.app.studio import Studio, visitor
from varaccel.app.turns import Turns
from varaccel.errors import InputError

HEADING = """# varaccel
Visual autoregressive models draw an image token by token. An **accelerator** decides several tokens in one pass of the
network. *Lossless* ones keep the distribution of the images; *approximate* ones trade some quality for speed.
"""
CSS = """
.gradio-container {max-width: 1400px !important}
.options {gap: 8px}
footer {opacity: .7}
"""
UPLOAD_LIMIT = "10mb"
WAITING_LIMIT = 32
"""Visitors that may wait; the next one is told that the queue is full."""

_CALL_BYTES = 2 * 2**30
"""Memory that a call is counted with; what it really takes depends on the model and the number of images."""


@dataclass(frozen=True)
class PageSettings:
    """How a page is served.

    Attributes:
        models: what visitors may choose, the first one at first; the shipped ones if empty.
        published: offer the published models as well, which are downloaded when they are chosen.
        any_model: let visitors type folders and hub ids.
        device, dtype: where models run and in which precision, see `varaccel.pipelines.placement.move`.
        concurrency: calls under way at a time; as many as fit into the free memory, up to 4, if None.
        seconds_limit: of a call.
        host: address to listen on; this machine alone if None, unless GRADIO_SERVER_NAME says otherwise.
        port: the first free one from 7860 if None.
    """

    models: tuple[str, ...] = ()
    published: bool = False
    any_model: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    concurrency: int | None = None
    seconds_limit: float = 300.0
    host: str | None = None
    port: int | None = None


def new_studio(settings: PageSettings) -> Studio:
    """What the page needs, models not yet loaded.

    Raises:
        InputError: settings that cannot be used.
    """
    from varaccel.pipelines.catalog import PUBLISHED
    from varaccel.pipelines.placement import check_place, open_pipeline
    from varaccel.shipped import shipped_models

    check_place(settings.device, settings.dtype)
    if settings.seconds_limit <= 0:
        raise InputError(f"the time limit must be more than 0 seconds, got {settings.seconds_limit}.")
    shipped = list(shipped_models())
    names = list(settings.models) or shipped
    if settings.published:
        names += [name for name in PUBLISHED if name not in names]

    def load(name: str) -> Any:
        return open_pipeline(name, settings.device, settings.dtype, quiet=True)

    concurrency = calls_in_memory(settings.device) if settings.concurrency is None else settings.concurrency
    if concurrency < 1:
        raise InputError(f"at least one call must be under way at a time, got {concurrency}.")
    return Studio(
        ModelShelf(names, load, kept=shipped, any_model=settings.any_model),
        Turns(_waiter(settings.device)),
        settings.seconds_limit,
        concurrency,
        report_folders(),
    )


def _waiter(device: str) -> Callable[[], None]:
    """Waits until the device has done what it was given; a CPU does it at once."""
    from varaccel.nn.devices import wait_for

    return lambda: wait_for(device)


def calls_in_memory(device: str) -> int:
    """How many calls the free memory of a device holds, 1 to 4."""
    import psutil
    import torch

    from varaccel.nn.devices import is_gpu

    free = torch.cuda.mem_get_info(device)[0] if is_gpu(device) else psutil.virtual_memory().available
    return max(1, min(4, free // _CALL_BYTES))


def build(studio: Studio) -> gr.Blocks:
    """The page.

    Raises:
        VaraccelError: the first model is none that can be loaded.
    """
    with gr.Blocks(title="varaccel", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(HEADING)
        draw_endpoint(studio)  # first, so that no event of a tab is called as it is
        with gr.Tab("Race"):
            race_tab(studio)
        with gr.Tab("Compare"):
            compare_tab(studio)
        with gr.Tab("Paint"):
            inpaint_tab(studio)
        with gr.Tab("Explore"):
            explore_tab(studio.reports)

        def leave(request: gr.Request) -> None:
            studio.visits.leave(visitor(request))

        page.unload(leave)
    return page.queue(default_concurrency_limit=studio.concurrency, max_size=WAITING_LIMIT)


def serve(page: gr.Blocks, host: str | None = None, port: int | None = None, **options: Any) -> str:
    """Serve a page; its address.

    Args:
        host, port: see `PageSettings`.
        options: of `gradio.Blocks.launch`.

    Raises:
        InputError: the port is taken, or the address is none of this machine.
    """
    # fonts of the system: the default theme fetches its own from the network
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        launched = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            max_file_size=UPLOAD_LIMIT,
            footer_links=["api"],
            quiet=True,
            theme=theme,
            css=CSS + race_view.CSS + compare_view.CSS + report_view.CSS,
            **options,
        )
    except OSError as error:
        raise InputError(f"the page cannot be served on port {port or 'any'}: {error}") from error
    return launched[1]


def run(settings: PageSettings) -> None:
    """Build and serve the page until it is interrupted.

    Raises:
        VaraccelError: settings that cannot be used.
    """
    studio = new_studio(settings)
    _leave_a_core()
    page = build(studio)
    # while the visitor reads, so that the first image does not wait for it
    threading.Thread(target=_load_first, args=(studio,), daemon=True).start()
    address = serve(page, settings.host, settings.port, prevent_thread_lock=True)
    print(f"varaccel: {address} (Ctrl+C ends it)", flush=True)
    page.block_thread()


def _leave_a_core() -> None:
    """Keep torch off one core, which the page and the visitor's browser need, unless OMP_NUM_THREADS says otherwise."""
    import torch

    cores = os.cpu_count() or 1
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() >= cores:
        torch.set_num_threads(max(1, cores - 1))


def _load_first(studio: Studio) -> None:
    try:
        studio.shelf.pipeline(studio.shelf.names[0])
    except Exception:  # the visitor who asks for it is told
        return
