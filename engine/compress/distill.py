"""distill: trains a compressed student, from a teacher or on the task's own loss, and ends with it compressed."""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine._files import write_text
from engine.compress import measure
from engine.compress.calibrate import Calibration, calibrate, check_batches, check_calibration
from engine.compress.candidates import make_candidates, needs_inputs
from engine.compress.fingerprint import fingerprint
from engine.compress.losses import Loss, make_loss
from engine.compress.recipe import Recipe, check_recipes, describe_recipes
from engine.compress.targets import patterns_of, targets_by_recipe
from engine.compress.trainable import TrainableLinear, trainable, twins
from engine.compress.training_run import BatchStream, Settings, TrainingRun
from engine.nn import CompressedConv2d, CompressedLinear
from engine.nn._replace import check_not_wrapped
from engine.nn.compressed import _Compressed

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Distillation:
    """What :func:`distill` did.

    Attributes:
        losses: of every step, those before a resume too.
        sparsity: by layer that was trained compressed.
        resumed_from: the step at which the checkpoint went on, 0 without one.
        seconds: of this call.
    """

    losses: list[float]
    sparsity: dict[str, float]
    resumed_from: int = 0
    seconds: float = 0.0

    def save(self, path: str | os.PathLike) -> None:
        """Writes `.json`, or the loss curve as `.png`."""
        path = Path(path)
        if path.suffix == ".json":
            write_text(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        elif path.suffix == ".png":
            from matplotlib.figure import Figure  # takes a second to import, and only this needs it

            figure = Figure(figsize=(8, 4.5), layout="constrained")
            axes = figure.subplots()
            axes.semilogy(range(1, len(self.losses) + 1), self.losses, color="#0072B2", linewidth=1)
            axes.set(xlabel="step", ylabel="loss")
            axes.spines[["top", "right"]].set_visible(False)
            figure.savefig(path, dpi=110)
        else:
            raise ValueError(f"engine.Distillation.save: expected a name ending in .json or .png, got {path.name!r}")


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: Iterable[Any],
    *,
    steps: int,
    recipe: Recipe | Mapping[str, Recipe] | None = None,
    calibration: Calibration | None = None,
    loss: Loss = "mse",
    temperature: float = 1.0,
    match_hidden: Mapping[str, str] | Iterable[str] = (),
    teacher_cache: int = 0,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    learning_rate: float = 2e-4,
    warmup: float = 0.05,
    clip_norm: float | None = 1.0,
    accumulate: int = 1,
    dtype: torch.dtype | None = None,
    gradual: int = 0,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 100,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    progress: bool = True,
) -> Distillation:
    """Trains `student` in place, its Linear and Conv2d layers computing as they will when compressed, and leaves it so.

    What a mask drops stays dropped, and nothing else is. int8 is trained through by rounding in the forward pass
    (:func:`engine.ops.int8_fake_quantize`). Embeddings, and what is tied to one, are quantised at once and not trained.
    The recipe's guard is not asked: what pays is found out before training. The student trains in the mode that it
    is in (train or eval). On any error or interrupt it is what it was before; the checkpoint stays.

    Args:
        student: dense, with a `recipe` that says how to compress it; or compressed already, to be trained as it is.
        recipe: as :func:`engine.compress_` takes it: one for all layers that it targets, or one for each layer by its
            qualified name (of :func:`engine.search`, say), all others being left alone.
        teacher: in eval mode without gradients meanwhile; None: `loss` is the task's own.
        batches: tensors, tuples of arguments or mappings of keyword arguments; iterated anew as often as needed.
        steps: of the optimiser, in all.
        calibration: for recipes that look at inputs; without it the first batch is calibrated on.
        loss: with a teacher "mse" or "kl" between outputs (logits, last hidden state, or the first tensor; padding
            tokens left out where a batch has an attention mask), or a callable `(student's output, teacher's output,
            batch)`. Without one a callable `(output, batch)`. It returns a scalar.
        temperature: of "kl", which is scaled by its square.
        match_hidden: names of modules whose outputs are to agree too (relative mean square), the same in both models,
            or a mapping from the student's names to the teacher's.
        teacher_cache: bytes. What the teacher says of a batch is kept, while there is room, and taken when the same
            object comes again, in a later epoch: for `batches` that are a list, or draw from one. A batch is never
            to be changed in place.
        optimizer: makes one from a list of parameters; AdamW without weight decay by default. Its learning rate is
            warmed up over the share `warmup` of the steps, then falls to zero as a cosine.
        learning_rate: of the default optimiser.
        clip_norm: the largest norm of the gradient, or None.
        accumulate: batches a step.
        dtype: torch.bfloat16 for mixed precision by autocast; None: none. float16 would need loss scaling: ValueError.
        gradual: steps over which sparsity rises from 0 to the recipe's, as a cubic (Zhu and Gupta, 2017), by
            magnitude.
        checkpoint: a file, written every `checkpoint_every` steps and at the end; where it exists, training goes on
            from it and ends in the same bits as without the break (on one machine, with deterministic kernels, and
            batches that are drawn by torch's generator or by none). With several processes, each has its own.
        wrap: what to put around the student for training, DistributedDataParallel say (and a communication hook).
        progress: show a bar on standard error, if that is a terminal.

    Raises:
        TypeError: `recipe` is no Recipe and no mapping of names to such.
        ValueError: bad arguments, a checkpoint of another run, or no batches.
        FloatingPointError: the loss or gradient is not finite; names the step and the last good checkpoint.
    """
    recipes = [] if recipe is None else check_recipes(recipe, "distill")
    if recipe is not None and not recipes:
        raise ValueError("engine.distill: recipe: names no layer, so that there is nothing to train compressed")
    check_calibration("distill", calibration)
    if checkpoint_every < 1:
        raise ValueError(f"engine.distill: checkpoint_every: expected at least 1, got {checkpoint_every}")
    _check(steps, accumulate, gradual, dtype, recipes, student)
    trained = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    if teacher is not None and (teacher is student or any(id(p) in trained for p in teacher.parameters())):
        raise ValueError("engine.distill: the student shares parameters with the teacher: give a copy.deepcopy of it")
    begun = time.perf_counter()
    check_batches("distill", batches)
    stream = BatchStream(batches)
    before = {id(t): (t, t.detach().clone()) for t in (*student.parameters(), *student.buffers())}
    if checkpoint is not None and not Path(checkpoint).absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder for the checkpoint isn't there", str(checkpoint))
    models = [] if checkpoint is None else [fingerprint(model) for model in (student, teacher) if model is not None]
    undo = None
    try:
        replacements = _prepare(student, recipe, recipes, calibration, stream, gradual)
        undo = measure.replace_(student, replacements)
        hidden = match_hidden if isinstance(match_hidden, Mapping) else list(match_hidden)
        compute = make_loss(student, teacher, loss, temperature, hidden, teacher_cache)
        described = None if recipe is None else describe_recipes(recipe)
        pairs = dict(hidden) if isinstance(hidden, Mapping) else hidden
        aim = [loss if isinstance(loss, str) else _name_of(loss), temperature, pairs]
        origin = {"recipe": described, "models": models, "loss": aim}
        settings = Settings(steps, accumulate, dtype, gradual, clip_norm, warmup)
        run = TrainingRun(student, compute, stream, settings, origin, wrap, optimizer, learning_rate)
        resumed = run.resume(checkpoint)
        with _teaching(teacher), compute:
            run.train(checkpoint, checkpoint_every, progress)
        measure.replace_(student, twins(dict(_every_name(student)), lambda name, layer: layer.compressed()))
    except BaseException:
        if undo is not None:
            undo()
        with torch.no_grad():
            for tensor, values in before.values():
                tensor.copy_(values)
        raise
    finally:
        for parameter in student.parameters():
            parameter.grad = None
    sparsity = {name: layer.sparsity for name, layer in run.layers.items()}
    return Distillation(run.losses, sparsity, resumed, time.perf_counter() - begun)


def _name_of(function: Any) -> str:
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{kind.__module__}.{kind.__qualname__}"


def _check(
    steps: int, accumulate: int, gradual: int, dtype: torch.dtype | None, recipes: list[Recipe], student: nn.Module
) -> None:
    def expect(good: bool, message: str) -> None:
        if not good:
            raise ValueError(f"engine.distill: {message}")

    expect(steps >= 1 and accumulate >= 1, "steps and accumulate: expected at least 1")
    expect(dtype in (None, torch.bfloat16), f"dtype: expected None or torch.bfloat16, got {dtype}")
    expect(not isinstance(student, nn.parallel.DistributedDataParallel), "give the bare student and wrap=")
    check_not_wrapped(student, "distill")
    expect(0 <= gradual <= steps, f"gradual: expected 0 to steps, got {gradual}")
    prunes = [each.prune for each in recipes if each.prune is not None]
    plain = all(p.sparsity is not None and p.pattern == "unstructured" and p.scope != "model" for p in prunes)
    expect(
        not gradual or (plain and len(prunes) > 0),
        "gradual: needs a recipe with an unstructured sparsity by row or layer",
    )
    clipped = any(each.quantize is not None and each.quantize.weight_clip is not None for each in recipes)
    expect(not clipped, "weight_clip: int8 is trained through by each row's largest magnitude: leave it None")
    compressed = any(isinstance(module, _Compressed) for module in student.modules())
    expect(compressed != bool(recipes), "give a recipe for a dense student, and none for a compressed one")


def _prepare(
    student: nn.Module,
    recipe: Recipe | Mapping[str, Recipe] | None,
    recipes: list[Recipe],
    calibration: Calibration | None,
    stream: BatchStream,
    gradual: int,
) -> dict[str, nn.Module]:
    """What stands in the student's layers while it trains, by qualified name."""
    if recipe is None:
        modules = dict(student.named_modules(remove_duplicate=False))
        multiplied = (CompressedLinear, CompressedConv2d)
        compressed = {name: module for name, module in modules.items() if isinstance(module, multiplied)}
        tied = _tied_values(student)
        compressed = {name: module for name, module in compressed.items() if id(module.values) not in tied}
        return twins(compressed, lambda name, module: trainable(module))
    groups, left = targets_by_recipe(student, recipe, "distill")
    if any(map(needs_inputs, recipes)) and calibration is None:
        moments = any(each.prune is not None and each.prune.importance == "obs" for each in recipes)
        patterns, ignore = patterns_of(recipe)
        how: dict[str, Any] = {"targets": patterns, "ignore": ignore, "second_moment": moments}
        calibration = calibrate(student, [stream.first()], progress=False, **how)
    made: dict[str, nn.Module] = {}
    for each, targets in groups:
        candidates: dict[str, Any] = dict(make_candidates(targets, each, calibration, left))
        corrected = each.prune is not None and each.prune.importance == "obs" and not gradual
        for target in targets:
            names = {name: candidates[name] for name in target.names if name in candidates}
            if not target.prunable:
                made |= names
                continue
            start = None if corrected else target.matrix
            trained = target.weight.requires_grad
            made |= twins(names, lambda name, module, s=start, t=trained: trainable(module, s, t))
            for name in names if gradual else ():
                layer = made[name]
                if isinstance(layer, TrainableLinear) and each.prune is not None:
                    layer.begin_pruning(target.matrix, each.prune)
    for name, reason in left.items():
        logger.info("%s: left alone: %s", name, reason)
    return made


def _tied_values(model: nn.Module) -> set[int]:
    """Compressed values that several modules share: they are int8, tied to an embedding, and not trained."""
    counts: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, _Compressed):
            counts[id(module.values)] = counts.get(id(module.values), 0) + 1
    return {key for key, count in counts.items() if count > 1}


def _every_name(model: nn.Module) -> Iterator[tuple[str, TrainableLinear]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, TrainableLinear):
            yield name, module


@contextlib.contextmanager
def _teaching(teacher: nn.Module | None) -> Iterator[None]:
    """The teacher in eval mode, and each of its modules as it was afterwards."""
    training = [module for module in teacher.modules() if module.training] if teacher is not None else []
    try:
        if teacher is not None:
            teacher.eval()
        yield
    finally:
        for module in training:
            module.training = True
