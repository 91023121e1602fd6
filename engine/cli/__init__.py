"""The command line: engine compress | search | distill | inspect | bench | doctor, a module for each."""

import io
import signal
import sys
from typing import Annotated

import typer

from engine.cli._bench import bench
from engine.cli._compress import compress
from engine.cli._doctor import doctor, engine_version
from engine.cli._inspect import inspect
from engine.cli._train import distill, search

app = typer.Typer(
    name="engine",
    help="Makes PyTorch models smaller and faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the `engine` command."""
    # Ended by a scheduler, a command still removes its temporary file.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that can't show a sign shows another
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"engine {engine_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


for command in (compress, search, distill, inspect, bench, doctor):
    app.command()(command)
