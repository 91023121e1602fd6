"""How commands speak: one-line errors with an exit code, tables, and nothing from a file that commands the terminal."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from rich.table import Table

BAD_OPTION, BAD_FILE, INTERRUPTED = 2, 1, 130


def fail(message: object, code: int) -> NoReturn:
    text = plain(" ".join(str(message).split()))
    typer.echo(f"engine: {text.removeprefix('engine.')}", err=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What a bad file or folder raises, said in one line and without a traceback."""
    try:
        yield
    except FileNotFoundError as error:
        fail(f"{error.filename or error}: no such file or folder", BAD_FILE)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error, BAD_FILE)
    except (ValueError, FloatingPointError) as error:  # CheckpointError is one; a loss that is no number
        fail(error, BAD_FILE)


@contextlib.contextmanager
def goes_on_from(kept: Path | None) -> Iterator[None]:
    """Says after an interrupt whether the same command goes on from what is done, which the file `kept` holds."""
    try:
        yield
    except KeyboardInterrupt:
        if kept is None or not kept.exists():
            fail("interrupted: there is nothing yet to go on from", INTERRUPTED)
        fail(f"interrupted: what is done is in {kept}; the same command goes on from there", INTERRUPTED)


def output_console() -> Console:
    """Standard output, as wide as it is on a terminal and without a limit in a pipe or file."""
    # Names come from files: they are not markup.
    console = Console(highlight=False, markup=False, soft_wrap=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=240)


def plain(name: str) -> str:
    """A name from a file without what would command the terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in name)


def plain_table(*columns: str, left: int = 2) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", overflow="fold")
    return table


def shape_text(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"
