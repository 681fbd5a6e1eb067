"""`varaccel` and `python -m varaccel`: the commands of the command line and the one that opens the app."""

from __future__ import annotations

import sys

import typer

from varaccel.app.command import serve_app
from varaccel.cli.commands import new_command_line
from varaccel.console import tolerant_console
from varaccel.errors import VaraccelError

command_line = new_command_line()
command_line.command(name="app")(serve_app)


def main() -> None:
    """Run the command line: an error raised by the library is one sentence on stderr and exit code 2."""
    tolerant_console()
    try:
        command_line()
    except VaraccelError as error:
        typer.echo(f"varaccel: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
