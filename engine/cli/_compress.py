"""engine compress: a model on disk, without its code."""

import json
import re
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from engine._compress_file import Result, compress_file, journal_path
from engine._files import write_text
from engine._safetensors import partial_path
from engine._source import (
    WEIGHTS,
    Source,
    check_apart,
    check_parent,
    choose,
    copy_companions,
    ignored_in_vain,
    remove_stale_weights,
)
from engine.cli._output import (
    BAD_OPTION,
    fail,
    goes_on_from,
    one_line_errors,
    output_console,
    plain,
    plain_table,
    shape_text,
)
from engine.compress.recipe import DEFAULT_TARGETS, Prune, Quantize, Recipe

LEFT_ALONE_SHOWN = 20
EXPERT = re.compile(r"(^|\.)experts\.\d+\.")


def compress(
    model: Annotated[Path, typer.Argument(help="A .safetensors file, or a Hugging Face model folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="What to write: a file for a file, a folder for a folder.")],
    threshold: Annotated[float | None, typer.Option(help="Prune weights whose magnitude is at most this.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Prune this fraction of the weights, from 0 to 1.")] = None,
    scope: Annotated[
        str, typer.Option(help="Where sparsity is reached: in each row, in each layer, or in the whole model.")
    ] = "layer",
    pattern: Annotated[
        str, typer.Option(help="unstructured: any may go; 2:4: two of every four; block: blocks of 32x32.")
    ] = "unstructured",
    int8: Annotated[bool, typer.Option(help="Store what is kept as int8.")] = False,
    ignore: Annotated[list[str] | None, typer.Option(help="Module to leave alone: its name, or re:PATTERN.")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Module to compress: Linear, Embedding, Conv2d, its name, or re:PATTERN.")
    ] = None,
    guard: Annotated[
        str, typer.Option(help="size: leave alone what wouldn't get smaller. none: compress all.")
    ] = "size",
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what is done if it ends early, and go on from what was kept.")
    ] = False,
) -> None:
    """Compress a model on disk, without its code, one tensor in memory at a time."""
    recipe = _recipe(
        threshold, sparsity, scope, pattern, int8, tuple(target or DEFAULT_TARGETS), tuple(ignore or ()), guard
    )
    weights = out / WEIGHTS if model.is_dir() else out
    with one_line_errors(), goes_on_from(journal_path(weights) if resume else None):
        source = Source(model)
        _check_out(model, out, force, resume)
        _check_patterns(source, recipe)
        if source.is_folder:
            result = _compress_folder(source, out, recipe, resume)
        else:
            result = _compress_with_progress(source, out, recipe, resume)
    _print_result(result, out)


def _recipe(
    threshold: float | None,
    sparsity: float | None,
    scope: str,
    pattern: str,
    int8: bool,
    targets: tuple[str, ...],
    ignore: tuple[str, ...],
    guard: str,
) -> Recipe:
    """The recipe that the options mean; anything wrong with them ends the command."""
    if threshold is None and sparsity is None and not int8:
        fail("nothing to do: give --threshold or --sparsity, --int8, or both", BAD_OPTION)
    if threshold is not None and sparsity is not None:
        fail("give --threshold or --sparsity, not both", BAD_OPTION)
    if threshold is None and sparsity is None and (scope, pattern) != ("layer", "unstructured"):
        fail("--scope and --pattern say how to prune: give --threshold or --sparsity with them", BAD_OPTION)
    if guard == "speed":
        fail(
            "--guard speed measures layers as they run, which needs the model's code and inputs: "
            "use engine.compress_ in Python, or --guard size",
            BAD_OPTION,
        )
    try:
        prunes = threshold is not None or sparsity is not None
        prune = Prune(sparsity, threshold, scope, pattern) if prunes else None
        return Recipe(prune, Quantize() if int8 else None, targets, ignore, guard)
    except (TypeError, ValueError) as error:
        fail(error, BAD_OPTION)


def _check_patterns(source: Source, recipe: Recipe) -> None:
    """Ends the command where a pattern is none, or a target is not in the model: those are options too. Says what is
    ignored in vain.
    """
    try:
        choose(source, recipe)
    except ValueError as error:
        fail(error, BAD_OPTION)
    for pattern in ignored_in_vain(source, recipe):
        typer.echo(plain(f"engine: --ignore {pattern} matches nothing in the model"), err=True)


def _check_out(model: Path, out: Path, force: bool, resume: bool) -> None:
    """Raises where writing `out` would touch the model itself, or something that is there already."""
    check_apart(model, out)
    check_parent(out)
    if out.exists() and out.is_dir() != model.is_dir():
        kinds = ("a folder", "a file") if out.is_dir() else ("a file", "a folder")
        raise ValueError(f"{out}: is {kinds[0]}, but the model is {kinds[1]}")
    if model.is_dir() and not out.exists() and out.suffix == ".safetensors":
        raise ValueError(f"{out}: is a file's name, but the model is a folder, and a folder is written for it")
    left = {partial_path(out / WEIGHTS).name, journal_path(out / WEIGHTS).name} if resume else set()
    if out.exists() and not force and (out.is_file() or any(path.name not in left for path in out.iterdir())):
        raise ValueError(f"{out}: exists; --force replaces it")


def _compress_folder(source: Source, out: Path, recipe: Recipe, resume: bool) -> Result:
    """The weights first, as only they take long; a folder that was made for nothing is removed again."""
    fresh = not out.exists()
    out.mkdir(exist_ok=True)
    try:
        result = _compress_with_progress(source, out / WEIGHTS, recipe, resume)
        remove_stale_weights(out)
        copy_companions(source.path, out)
        text = json.dumps({"recipe": recipe.to_dict(), **result.to_dict()}, indent=2, ensure_ascii=False)
        write_text(out / "compression.json", text + "\n")
    except BaseException:
        if fresh and not resume:
            shutil.rmtree(out, ignore_errors=True)
        raise
    return result


def _compress_with_progress(source: Source, out: Path, recipe: Recipe, resume: bool) -> Result:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("compressing", total=2 * source.nbytes)
        return compress_file(source, out, recipe, lambda name, count: progress.advance(task, count), resume)


def _print_result(result: Result, out: Path) -> None:
    console = output_console()
    table = plain_table("tensor", "shape", "format", "sparsity", "bytes before", "after", "share", left=3)
    for row in result.compressed:
        share = f"{row.bytes_after / max(1, row.bytes_before):.1%}"
        bytes_before, bytes_after = f"{row.bytes_before:,}", f"{row.bytes_after:,}"
        table.add_row(
            plain(row.name), shape_text(row.shape), row.format, f"{row.sparsity:.2f}", bytes_before, bytes_after, share
        )
    if result.compressed:
        console.print(table)
    total = f"{result.bytes_before:,} → {result.bytes_after:,} bytes"
    ratio = result.bytes_before / max(1, result.bytes_after)
    counts = f"{len(result.compressed)} weights compressed, {len(result.left_alone)} left alone"
    console.print(f"{out}: {total} ({ratio:.2f}x smaller); {counts}, {len(result.copied)} other tensors copied")
    if result.left_alone:
        console.print("left alone:")
        for name, reason in list(result.left_alone.items())[:LEFT_ALONE_SHOWN]:
            console.print(f"  {plain(name)}: {plain(reason)}")
        if len(result.left_alone) > LEFT_ALONE_SHOWN:
            console.print(f"  and {len(result.left_alone) - LEFT_ALONE_SHOWN} more")
    console.print("Load it by engine.load_(model, ...) into the model built from its configuration.")
    names = [*(row.name for row in result.compressed), *result.left_alone, *result.copied]
    if expert := next(filter(EXPERT.search, names), None):
        console.print(
            f"It can't be loaded, however, where the model's code puts its experts together, as transformers 5 does, "
            f"and {plain(expert)} has no place of its own: then compress the model in Python."
        )
