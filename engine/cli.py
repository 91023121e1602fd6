"""The command line: engine compress | search | distill | inspect | bench | doctor."""

import contextlib
import copy
import importlib
import importlib.metadata
import importlib.util
import io
import json
import platform
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from engine import backends
from engine._checkpoint_file import CheckpointFile, read_weight
from engine._compress_file import (
    WEIGHTS,
    Result,
    Source,
    choose,
    compress_file,
    copy_companions,
    journal_path,
    remove_stale_weights,
)
from engine._safetensors import CheckpointError, partial_path
from engine._task import load_task
from engine.compress.recipe import DEFAULT_TARGETS, Prune, Quantize, Recipe

app = typer.Typer(
    name="engine",
    help="Makes PyTorch models smaller and faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
BAD_OPTION, BAD_FILE = 2, 1
LEFT_ALONE_SHOWN = 20


def main() -> None:
    """Entry point of the `engine` command."""
    # Ended by a scheduler, a command still removes its temporary file.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that can't show a sign shows another
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app()


def _fail(message: object, code: int) -> NoReturn:
    text = _plain(" ".join(str(message).split()))
    typer.echo(f"engine: {text.removeprefix('engine.')}", err=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """What a bad file or folder raises, said in one line and without a traceback."""
    try:
        yield
    except FileNotFoundError as error:
        _fail(f"{error.filename or error}: no such file or folder", BAD_FILE)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error, BAD_FILE)
    except ValueError as error:  # CheckpointError is one
        _fail(error, BAD_FILE)


def _version() -> str:
    try:
        return importlib.metadata.version("compression-engine")
    except importlib.metadata.PackageNotFoundError:  # a checkout that isn't installed
        return "unknown"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"engine {_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
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
    with _one_line_errors():
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
        _fail("nothing to do: give --threshold or --sparsity, --int8, or both", BAD_OPTION)
    if threshold is not None and sparsity is not None:
        _fail("give --threshold or --sparsity, not both", BAD_OPTION)
    if guard == "speed":
        _fail(
            "--guard speed measures layers as they run, which needs the model's code and inputs: "
            "use engine.compress_ in Python, or --guard size",
            BAD_OPTION,
        )
    try:
        prunes = threshold is not None or sparsity is not None
        prune = Prune(sparsity, threshold, scope, pattern) if prunes else None
        return Recipe(prune, Quantize() if int8 else None, targets, ignore, guard)
    except (TypeError, ValueError) as error:
        _fail(error, BAD_OPTION)


def _check_patterns(source: Source, recipe: Recipe) -> None:
    """Ends the command where a pattern is none, or a target is not in the model: those are options too."""
    try:
        choose(source, recipe)
    except ValueError as error:
        _fail(error, BAD_OPTION)


def _check_out(model: Path, out: Path, force: bool, resume: bool) -> None:
    """Raises where writing `out` would touch the model itself, or something that is there already."""
    home, target = model.resolve(), out.resolve()
    if target == home or (model.is_dir() and home in target.parents) or (out.exists() and out.samefile(model)):
        raise ValueError(f"{out}: would be written into the model itself")
    if model.is_dir() and target in home.parents:
        raise ValueError(f"{out}: holds the model's own folder")
    if out.exists() and out.is_dir() != model.is_dir():
        kinds = ("a folder", "a file") if out.is_dir() else ("a file", "a folder")
        raise ValueError(f"{out}: is {kinds[0]}, but the model is {kinds[1]}")
    left = {partial_path(out / WEIGHTS).name, journal_path(out / WEIGHTS).name} if resume else set()
    if out.exists() and not force and (out.is_file() or any(path.name not in left for path in out.iterdir())):
        raise ValueError(f"{out}: exists; --force replaces it")
    if not out.parent.is_dir():
        raise FileNotFoundError(2, "", str(out.parent))


def _compress_folder(source: Source, out: Path, recipe: Recipe, resume: bool) -> Result:
    """The weights first, as only they take long; a folder that was made for nothing is removed again."""
    fresh = not out.exists()
    out.mkdir(exist_ok=True)
    try:
        result = _compress_with_progress(source, out / WEIGHTS, recipe, resume)
        remove_stale_weights(out)
        copy_companions(source.path, out)
        text = json.dumps({"recipe": recipe.to_dict(), **result.to_dict()}, indent=2, ensure_ascii=False)
        (out / "compression.json").write_text(text + "\n", encoding="utf-8")
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


def _console() -> Console:
    """Standard output, as wide as it is on a terminal and without a limit in a pipe or file."""
    # Names come from files: they are not markup.
    console = Console(highlight=False, markup=False, soft_wrap=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=240)


def _plain(name: str) -> str:
    """A name from a file without what would command the terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in name)


def _table(*columns: str, left: int = 2) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", overflow="fold")
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _print_result(result: Result, out: Path) -> None:
    console = _console()
    table = _table("tensor", "shape", "format", "sparsity", "bytes before", "after", "share", left=3)
    for row in result.compressed:
        share = f"{row.bytes_after / max(1, row.bytes_before):.1%}"
        bytes_before, bytes_after = f"{row.bytes_before:,}", f"{row.bytes_after:,}"
        table.add_row(
            _plain(row.name), _shape(row.shape), row.format, f"{row.sparsity:.2f}", bytes_before, bytes_after, share
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
            console.print(f"  {_plain(name)}: {_plain(reason)}")
        if len(result.left_alone) > LEFT_ALONE_SHOWN:
            console.print(f"  and {len(result.left_alone) - LEFT_ALONE_SHOWN} more")
    console.print("Load it by engine.load_(model, ...) into the model built from its configuration.")


ModelOption = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, or file.py:function that returns a dict (guide).")
]
FolderOption = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results; what is there goes on.")]
TextsOption = Annotated[Path | None, typer.Option(help="For a Hugging Face folder: real inputs, one a line.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Texts a batch.")]
TokensOption = Annotated[int, typer.Option(min=1, help="Longest text, in tokens.")]
MeasuredOption = Annotated[int, typer.Option(min=1, help="Batches that are only measured on.")]
IgnoreOption = Annotated[list[str] | None, typer.Option(help="Module to leave alone: its name, or re:PATTERN.")]


@app.command()
def search(
    model: ModelOption,
    out: FolderOption,
    loss_budget: Annotated[float | None, typer.Option(help="Largest loss; the fastest within it is sought.")] = None,
    time_budget: Annotated[float | None, typer.Option(help="Most milliseconds; the least loss is sought.")] = None,
    size_budget: Annotated[float | None, typer.Option(help="Most megabytes; the least loss is sought.")] = None,
    texts: TextsOption = None,
    batch: BatchOption = 32,
    tokens: TokensOption = 128,
    measured: MeasuredOption = 4,
    ignore: IgnoreOption = None,
) -> None:
    """Find a recipe for each layer by measuring, and write the model so compressed. Repeated, it goes on."""
    from engine import checkpoint, compress

    if sum(budget is not None for budget in (loss_budget, time_budget, size_budget)) != 1:
        _fail("give exactly one of --loss-budget, --time-budget and --size-budget", BAD_OPTION)
    with _one_line_errors():
        task = load_task(model, texts, batch, tokens, measured)
        out.mkdir(exist_ok=True)
        skip = tuple(ignore or ())
        calibration = compress.calibrate(task.model, task.batches, ignore=skip, second_moment=True)
        found = compress.search(
            task.model,
            task.measured or (),
            task.example_inputs,
            loss_budget=loss_budget,
            time_budget=None if time_budget is None else time_budget / 1e3,
            size_budget=None if size_budget is None else size_budget * 1e6,
            calibration=calibration,
            ignore=skip,
            checkpoint=out / "measurements.jsonl",
        )
        for suffix in (".json", ".html", ".png"):
            found.save(out / f"search{suffix}")
        if found.recipes:
            report = compress.compress_(task.model, found.recipes, calibration=calibration)
            checkpoint.save(task.model, out / WEIGHTS, report.recipe)
    typer.echo(str(found))
    written = f"search.json, .html, .png{f', {WEIGHTS}' if found.recipes else ''}"
    typer.echo(f"{out}: {written}")


@app.command()
def distill(
    model: ModelOption,
    out: FolderOption,
    steps: Annotated[int, typer.Option(min=1, help="Of the optimiser.")],
    sparsity: Annotated[float | None, typer.Option(help="Prune this fraction of each layer, from 0 to 1.")] = None,
    importance: Annotated[str, typer.Option(help="What decides which weights go: magnitude, wanda, obs.")] = "obs",
    int8: Annotated[bool, typer.Option(help="Store what is kept as int8.")] = False,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 2e-4,
    loss: Annotated[str, typer.Option(help="Between outputs: mse or kl. A task's own loss takes its place.")] = "mse",
    match_hidden: Annotated[list[str] | None, typer.Option(help="Module whose output is to agree too.")] = None,
    texts: TextsOption = None,
    batch: BatchOption = 32,
    tokens: TokensOption = 128,
    measured: MeasuredOption = 4,
    ignore: IgnoreOption = None,
) -> None:
    """Train a compressed copy of the model to do as the model does. Ended early, it goes on when repeated."""
    from engine import checkpoint, compress

    if sparsity is None and not int8:
        _fail("nothing to do: give --sparsity, --int8, or both", BAD_OPTION)
    with _one_line_errors():
        task = load_task(model, texts, batch, tokens, measured)
        try:
            prune = None if sparsity is None else Prune(sparsity=sparsity, importance=importance)
            recipe = Recipe(prune, Quantize() if int8 else None, ignore=tuple(ignore or ()), guard="none")
        except ValueError as error:
            _fail(error, BAD_OPTION)
        out.mkdir(exist_ok=True)
        moments = importance == "obs" and prune is not None
        calibration = compress.calibrate(task.model, task.batches, ignore=recipe.ignore, second_moment=moments)
        teacher = copy.deepcopy(task.model) if task.loss is None else None
        done = compress.distill(
            task.model,
            teacher,
            task.batches,
            steps=steps,
            recipe=recipe,
            calibration=calibration,
            loss=loss if teacher is not None else task.loss,
            match_hidden=match_hidden or (),
            learning_rate=rate,
            checkpoint=out / "distill.pt",
        )
        checkpoint.save(task.model, out / WEIGHTS, recipe)
        for suffix in (".json", ".png"):
            done.save(out / f"distillation{suffix}")
    last = done.losses[-max(1, steps // 20) :]
    typer.echo(f"{steps} steps, {done.resumed_from} of them before; loss at the end {sum(last) / len(last):.4g}")
    typer.echo(f"{out}: {WEIGHTS}, distillation.json, .png")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint, any safetensors file, or a folder with one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a checkpoint holds, after checking all of it."""
    with _one_line_errors():
        rows, checkpoint = _inspect(file)
    totals = {key: sum(row[key] for row in rows) for key in ("bytes", "dense_bytes")}
    if as_json:
        typer.echo(json.dumps({"file": str(file), "recipe": checkpoint.recipe, "tensors": rows, **totals}, indent=2))
        return
    console = _console()
    table = _table("name", "format", "shape", "dtype", "sparsity", "bytes", "of dense", left=4)
    for row in rows:
        sparsity = "–" if row["sparsity"] is None else f"{row['sparsity']:.2f}"
        share = f"{row['bytes'] / row['dense_bytes']:.1%}" if row["dense_bytes"] else "–"
        table.add_row(
            _plain(row["name"]), row["format"], _shape(row["shape"]), row["dtype"], sparsity, f"{row['bytes']:,}", share
        )
    console.print(table)
    for alias, name in checkpoint.aliases.items():
        console.print(_plain(f"{alias} = {name}"))
    share = f"{totals['bytes'] / totals['dense_bytes']:.1%}" if totals["dense_bytes"] else "–"
    console.print(
        f"{len(rows)} tensors, {len(checkpoint.weights)} compressed: {totals['bytes']:,} bytes, {share} of dense"
    )
    if checkpoint.recipe is not None:
        console.print(f"recipe: {json.dumps(checkpoint.recipe)}")


def _inspect(path: Path) -> tuple[list[dict[str, Any]], CheckpointFile]:
    """A row for each weight and each other tensor; every one of them is read and checked."""
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise CheckpointError(f"{path}: holds {len(found)} safetensors files: name one")
        path = found[0]
    file = CheckpointFile(path)
    rows: list[dict[str, Any]] = []
    for name, info in file.weights.items():
        format = read_weight(file, name)
        rows.append(
            {
                "name": name,
                "format": format.label,
                "shape": info.dense_shape(format),
                "dtype": str(info.dtype).removeprefix("torch."),
                "sparsity": format.sparsity,
                "bytes": format.nbytes,
                "dense_bytes": format.shape[0] * format.shape[1] * info.dtype.itemsize,
            }
        )
    for name in file.plain:
        file.read(name)
        entry = file.entries[name]
        dtype = str(entry.dtype).removeprefix("torch.")
        row = {"name": name, "format": "dense", "shape": entry.shape, "dtype": dtype, "sparsity": None}
        rows.append({**row, "bytes": entry.nbytes, "dense_bytes": entry.nbytes})
    return sorted(rows, key=lambda row: row["name"]), file


@app.command()
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
        _fail(f"bench: {error}", BAD_OPTION)
    except ImportError as error:
        _fail(f"bench: needs the native libraries, see `engine doctor`: {error}", BAD_FILE)


@app.command()
def doctor() -> None:
    """Show versions, the processor, and which backends serve and why others don't."""
    console = _console()
    facts = _table("", "")
    facts.show_header = False
    name, features = _processor()
    facts.add_row("engine", f"{_version()} at {Path(__file__).parent}")
    facts.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    facts.add_row("torch", torch.__version__)
    facts.add_row("processor", name)
    facts.add_row("features", features)
    facts.add_row("threads", str(torch.get_num_threads()))
    facts.add_row("in use", backends.cpu_variant())
    for module in ("triton", "transformers"):
        found = importlib.util.find_spec(module) is not None
        facts.add_row(module, importlib.metadata.version(module) if found else "not installed (optional)")
    facts.add_row("nvcc", shutil.which("nvcc") or "not on the path (needed only to build the CUDA kernels)")
    console.print(facts)
    console.print()
    table = _table("backend", "active", "detail", left=3)
    for status in backends.status():
        table.add_row(status.name, "yes" if status.active else "no", status.detail)
    console.print(table)


def _processor() -> tuple[str, str]:
    """Its name, and which of the instruction sets that kernels care about it has."""
    try:
        native: Any = importlib.import_module("engine._native")
    except ImportError:
        return platform.processor() or platform.machine(), "unknown: the native module is not built"
    features = native.cpu_features()
    have = [feature for feature, found in features.items() if found]
    lack = [feature for feature, found in features.items() if not found]
    return native.cpu_name() or platform.machine(), f"{' '.join(have) or 'none'} (without {' '.join(lack) or 'none'})"


if __name__ == "__main__":
    main()
