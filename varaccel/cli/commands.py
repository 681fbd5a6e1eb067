"""The commands `varaccel generate`, `inpaint`, `models`, `demo`, `bench` and `train`."""

from __future__ import annotations

import typer

from varaccel.cli.bench import bench
from varaccel.cli.demo import demo
from varaccel.cli.generate import generate
from varaccel.cli.inpaint import inpaint
from varaccel.cli.models import models
from varaccel.cli.train import train_app


def new_command_line() -> typer.Typer:
    """A command line with the commands of this package, to which others can be added."""
    command_line = typer.Typer(
        help="Fast decoding for visual autoregressive image models.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    for command in (generate, inpaint, models, demo, bench):
        command_line.command()(command)
    command_line.add_typer(train_app, name="train")
    return command_line
