"""`varaccel app`: the command that opens the demo in the browser."""

from __future__ import annotations

from typing import Annotated

import typer

from varaccel.errors import InputError


def serve_app(
    model: Annotated[
        list[str] | None,
        typer.Option(help="What visitors may choose; repeatable.", show_default="the shipped models"),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Offer published models too; choosing one downloads it.")
    ] = False,
    any_model: Annotated[
        bool, typer.Option("--any-model", help="Let visitors type folders and hub ids.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where to run: cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="Precision of the networks that decide tokens: float32 or bfloat16.")
    ] = "float32",
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Calls under way at a time.", show_default="what fits into memory, up to 4"),
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds that a call may take.")] = 300.0,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1: this machine alone")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on.", show_default="the first free one from 7860")
    ] = None,
) -> None:
    """Open the demo in the browser: plain and accelerated side by side."""
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise InputError("the page needs gradio; install it with `pip install varaccel[app]`.")
    from varaccel.app.page import PageSettings, run

    run(
        PageSettings(
            tuple(model or ()), published, any_model, device, dtype, concurrency, time_limit, host, port
        )
    )
