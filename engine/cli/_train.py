"""engine search and engine distill: what needs the model's code and data to run it on."""

import copy
from pathlib import Path
from typing import Annotated

import typer

from engine import checkpoint, compress
from engine._source import WEIGHTS, check_apart, check_parent, copy_companions
from engine._task import load_task
from engine.cli._output import BAD_OPTION, fail, goes_on_from, one_line_errors
from engine.compress.recipe import Prune, Quantize, Recipe, check_recipes, describe_recipes
from engine.compress.targets import patterns_of

ModelOption = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, or file.py:function that returns a dict (guide).")
]
FolderOption = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results; what is there goes on.")]
TextsOption = Annotated[Path | None, typer.Option(help="For a Hugging Face folder: real inputs, one a line.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Texts a batch.")]
TokensOption = Annotated[int, typer.Option(min=1, help="Longest text, in tokens.")]
MeasuredOption = Annotated[int, typer.Option(min=1, help="Batches that are only measured on.")]
IgnoreOption = Annotated[list[str] | None, typer.Option(help="Module to leave alone: its name, or re:PATTERN.")]


MEASUREMENTS, CHECKPOINT = "measurements.jsonl", "distill.pt"  # by which a search, a distillation goes on
RESULTS = (WEIGHTS, "search.json", "search.html", "search.png", "distillation.json", "distillation.png")


def _check_out(model: str, out: Path, command: str, progress: str) -> None:
    """Raises where results would take the place of the model itself, or of what another command or user put there."""
    folder = Path(model)
    if folder.is_dir():
        check_apart(folder, out)
    check_parent(out)
    there = [name for name in RESULTS if (out / name).exists()]
    if there and not (out / progress).exists():
        raise ValueError(f"{out}: holds a {there[0]} that is not of this {command}: give another folder")


def _copy_companions(model: str, out: Path) -> None:
    """Configuration and tokenizer of a Hugging Face folder, without which what is written can't be built again."""
    if Path(model).is_dir():
        copy_companions(Path(model), out)


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
    if sum(budget is not None for budget in (loss_budget, time_budget, size_budget)) != 1:
        fail("give exactly one of --loss-budget, --time-budget and --size-budget", BAD_OPTION)
    with one_line_errors(), goes_on_from(out / MEASUREMENTS):
        _check_out(model, out, "search", MEASUREMENTS)
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
            checkpoint=out / MEASUREMENTS,
        )
        (out / WEIGHTS).unlink(missing_ok=True)  # of a search for another budget
        for suffix in (".json", ".html", ".png"):
            found.save(out / f"search{suffix}")
        if found.recipes:
            report = compress.compress_(task.model, found.recipes, calibration=calibration)
            checkpoint.save(task.model, out / WEIGHTS, report.recipe)
        _copy_companions(model, out)
    typer.echo(str(found))
    written = f", {WEIGHTS}" if found.recipes else "; no layer is compressed, so that there is no model to write"
    typer.echo(f"{out}: search.json, .html, .png{written}")


def distill(
    model: ModelOption,
    out: FolderOption,
    steps: Annotated[int, typer.Option(min=1, help="Of the optimiser.")],
    sparsity: Annotated[float | None, typer.Option(help="Prune this fraction of each layer, from 0 to 1.")] = None,
    importance: Annotated[
        str | None, typer.Option(help="What decides which weights go: magnitude, wanda, obs (the default).")
    ] = None,
    int8: Annotated[bool, typer.Option(help="Store what is kept as int8.")] = False,
    recipes: Annotated[Path | None, typer.Option(help="A search.json of engine search: compress as it found.")] = None,
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
    if recipes is not None and (sparsity is not None or importance is not None or int8 or ignore):
        fail("--recipes says all of it: give no --sparsity, --importance, --int8 or --ignore with it", BAD_OPTION)
    if importance is not None and recipes is None and sparsity is None:
        fail("--importance says which weights go: give --sparsity with it", BAD_OPTION)
    if recipes is None and sparsity is None and not int8:
        fail("nothing to do: give --sparsity, --int8, or both, or --recipes", BAD_OPTION)
    with one_line_errors(), goes_on_from(out / CHECKPOINT):
        _check_out(model, out, "distill", CHECKPOINT)
        task = load_task(model, texts, batch, tokens, measured)
        recipe: Recipe | dict[str, Recipe]
        if recipes is not None:
            recipe = compress.Search.load(recipes).recipes
        else:
            try:
                prune = None if sparsity is None else Prune(sparsity=sparsity, importance=importance or "obs")
                recipe = Recipe(prune, Quantize() if int8 else None, ignore=tuple(ignore or ()), guard="none")
            except ValueError as error:
                fail(error, BAD_OPTION)
        prunes = [each.prune for each in check_recipes(recipe, "distill") if each.prune is not None]
        moments = any(prune.importance == "obs" for prune in prunes)
        out.mkdir(exist_ok=True)
        targets, skip = patterns_of(recipe)
        calibration = compress.calibrate(task.model, task.batches, targets=targets, ignore=skip, second_moment=moments)
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
            checkpoint=out / CHECKPOINT,
        )
        checkpoint.save(task.model, out / WEIGHTS, describe_recipes(recipe))
        for suffix in (".json", ".png"):
            done.save(out / f"distillation{suffix}")
        _copy_companions(model, out)
    last = done.losses[-max(1, steps // 20) :]
    typer.echo(f"{steps} steps, {done.resumed_from} of them before; loss at the end {sum(last) / len(last):.4g}")
    typer.echo(f"{out}: {WEIGHTS}, distillation.json, .png")
