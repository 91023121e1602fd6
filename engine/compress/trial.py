"""Trials: candidates measured inside the model, and the guard that decides which of them stay."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.compress import measure
from engine.compress.calibrate import Calibration
from engine.compress.candidates import Compressed, make_candidates
from engine.compress.recipe import Recipe
from engine.compress.report import Layer, Report
from engine.compress.targets import Target
from engine.nn.compressed import weights_read

# A layer that costs this share of a forward pass more than before, or less, can't be told from one that costs the same:
# then its bytes decide. Without it an embedding, whose look-up takes microseconds, would never be compressed.
SAME_TIME = 0.001
READ = "the model reads its weight itself"
NOT_FASTER = "not faster"  # how the reason begins for a layer that loses time


def try_recipe(
    model: nn.Module,
    inputs: Any,
    calibration: Calibration | None,
    chosen: dict[str, Compressed],
    report: Report,
    recipe: Recipe,
    targets: list[Target],
) -> None:
    """Compresses each target on trial: what passes the guard goes to `chosen` and `report.layers`, the rest, with the
    reason, to `report.left_alone`.
    """
    candidates = make_candidates(targets, recipe, calibration, report.left_alone)
    rows = [describe(target, candidates[target.name]) for target in targets if target.name in candidates]
    if inputs is None:
        by_name = {target.name: target for target in targets}
        for row in rows:
            row.error = _weight_error(by_name[row.name], candidates[row.name])
    else:
        _measure_errors(model, inputs, candidates, rows)
    passed = _guard(model, recipe, inputs, candidates, rows, chosen, report)
    chosen |= {name: candidates[name] for row in passed for name in row.names}
    report.layers += passed


def try_unpruned(
    attempt: Callable[[Recipe, list[Target]], None], recipe: Recipe, targets: list[Target], report: Report
) -> None:
    """Quantises without pruning what was left alone because, pruned, it wasn't faster: there sparsity buys nothing."""
    mine = {name for target in targets for name in target.names}
    lost = {name: why for name, why in report.left_alone.items() if name in mine and why.startswith(NOT_FASTER)}
    again = [target for target in targets if target.name in lost and target.prunable]
    if not again:
        return
    for target in again:
        for name in target.names:
            del report.left_alone[name]
    attempt(dataclasses.replace(recipe, prune=None), again)
    for row in report.layers:
        if row.name in lost:
            row.note = f"not pruned: {lost[row.name]}"
    for name in lost.keys() & report.left_alone.keys():
        report.left_alone[name] = f"{lost[name]}; {report.left_alone[name]}"
    order = {target.name: i for i, target in enumerate(targets)}
    report.layers.sort(key=lambda row: order.get(row.name, -1))  # what another recipe compressed stays before


def _guard(
    model: nn.Module,
    recipe: Recipe,
    inputs: Any,
    candidates: Mapping[str, Compressed],
    rows: list[Layer],
    chosen: Mapping[str, Compressed],
    report: Report,
) -> list[Layer]:
    """The rows that win by themselves, timed where there are inputs; the reasons of the others go to the report.

    What is chosen already is in place while the rest is timed.
    """
    passed = list(rows)

    def leave(row: Layer, reason: str) -> None:
        passed.remove(row)
        report.left_alone |= dict.fromkeys(row.names, reason)

    if recipe.guard != "none":
        for row in rows:
            if row.bytes_after >= row.bytes_before:
                leave(row, f"not smaller: {row.bytes_before:,} → {row.bytes_after:,} bytes as {row.format}")
    if inputs is None or not passed:
        return passed
    with measure.replaced(model, chosen):
        timed = {name: candidates[name] for row in passed for name in row.names}
        layers, (whole, _) = measure.time_layers(model, inputs, timed)
    for row in list(passed):
        times = [layers[name] for name in row.names if name in layers]
        row.seconds_before, row.seconds_after = (sum(side) for side in zip(*times, strict=True))
        if recipe.guard != "speed":
            continue
        if row.seconds_before == 0:
            leave(row, "the example inputs never reach it, so it can't be measured")
        elif row.seconds_after > row.seconds_before + SAME_TIME * whole:
            before, after = row.seconds_before * 1e6, row.seconds_after * 1e6
            leave(row, f"{NOT_FASTER}: {before:.0f} → {after:.0f} µs as {row.format}")
    return passed


def guard_whole(model: nn.Module, guard: str, inputs: Any, chosen: dict[str, Compressed], report: Report) -> None:
    """Times the model with all that is chosen, and notes of which layers it reads the weight itself: that is made anew
    at each pass, outside of any call that was timed. Under the speed guard leaves those alone, if it is the faster
    without them, and gives everything up where the whole isn't faster.
    """
    report.seconds_before, report.seconds_after = measure.time_model(model, inputs, chosen)
    with measure.replaced(model, chosen), measure.evaluating(model), weights_read() as seen:
        measure.run(model, inputs)
    read = [row for row in report.layers if any(id(chosen[name]) in seen for name in row.names)]
    if guard == "speed" and 0 < len(read) < len(report.layers):
        _leave_if_faster(model, inputs, read, chosen, report)
    for row in read:
        row.note = "; ".join(filter(None, [row.note, f"{READ}, which is made anew at each pass"]))
    if guard == "speed" and report.seconds_after > report.seconds_before:
        before, after = report.seconds_before * 1e3, report.seconds_after * 1e3
        reason = f"faster alone, but the whole model is not: {before:.2f} → {after:.2f} ms"
        report.left_alone |= dict.fromkeys(chosen, reason)
        report.seconds_before = report.seconds_after = None
        report.layers.clear()
        chosen.clear()


def _leave_if_faster(
    model: nn.Module, inputs: Any, read: list[Layer], chosen: dict[str, Compressed], report: Report
) -> None:
    """Leaves alone the layers `read`, if the model is the faster without them."""
    names = {name for row in read for name in row.names}
    rest = {name: module for name, module in chosen.items() if name not in names}
    before, after = measure.time_model(model, inputs, rest)
    assert report.seconds_before is not None and report.seconds_after is not None
    if after / before >= report.seconds_after / report.seconds_before:
        return
    report.seconds_before, report.seconds_after = before, after
    report.left_alone |= dict.fromkeys(names, f"{READ}, which would be made anew at each pass")
    report.layers[:] = [row for row in report.layers if row not in read]
    for name in names:
        del chosen[name]


def describe(target: Target, module: Compressed) -> Layer:
    """The row of the report for a target and its compressed twin."""
    format = module.format
    return Layer(
        name=target.name,
        names=target.names,
        shape=tuple(target.weight.shape),
        format=format.label,
        sparsity=format.sparsity,
        bytes_before=target.weight.numel() * target.weight.element_size(),
        bytes_after=format.nbytes,
    )


def _weight_error(target: Target, module: Compressed) -> float:
    """Relative error of the weight, Frobenius."""
    exact = target.matrix.float()
    return _relative(module.format.to_dense().float() - exact, exact)


def _measure_errors(model: nn.Module, inputs: Any, candidates: Mapping[str, Compressed], rows: list[Layer]) -> None:
    """Relative output error of each layer on the inputs it meets in the dense model; None where none reach it."""
    errors: dict[str, list[float]] = {}

    def see(name: str, args: tuple, kwargs: dict, output: Any) -> None:
        got = candidates[name](*args, **kwargs)
        errors.setdefault(name, []).append(_relative(got.float() - output.float(), output.float()))

    measure.observe(model, inputs, {name: model.get_submodule(name) for name in candidates}, see)
    for row in rows:
        seen = [error for name in row.names for error in errors.get(name, ())]
        row.error = sum(seen) / len(seen) if seen else None


def _relative(difference: Tensor, exact: Tensor) -> float:
    if exact.is_nested:
        difference, exact = torch.cat(difference.unbind()), torch.cat(exact.unbind())
    size = exact.norm().item()
    return difference.norm().item() / size if size else difference.norm().item()


def model_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers, tied ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    lazy = (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)
    return sum(t.numel() * t.element_size() for t in tensors.values() if not isinstance(t, lazy))
