"""engine bench: ops beside their peers."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from engine.cli._output import BAD_FILE, BAD_OPTION, fail


def bench(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="[OP]...", help="Which ops; all where none is named.")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write every row with the machine's description.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw them (.png).")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; by default torch's own number.")] = None,
) -> None:
    """Time ops beside their peers, in one loop, against this machine's own limits."""
    from engine.bench.run import run

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        run(ops or [], json, plot)
    except ValueError as error:
        fail(f"bench: {error}", BAD_OPTION)
    except ImportError as error:
        fail(f"bench: needs the native libraries, see `engine doctor`: {error}", BAD_FILE)
