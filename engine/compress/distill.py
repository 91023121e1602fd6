"""distill: trains a compressed student, from a teacher or on the task's own loss, and ends with it compressed."""

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from engine._files import replacing, write_text
from engine.compress import measure
from engine.compress.calibrate import Calibration, calibrate
from engine.compress.candidates import make_candidates, needs_inputs
from engine.compress.fingerprint import fingerprint
from engine.compress.losses import Loss, make_loss
from engine.compress.recipe import Recipe, check_recipes, describe_recipes
from engine.compress.targets import patterns_of, targets_by_recipe
from engine.compress.trainable import TrainableLinear, trainable, trainable_layers, twins
from engine.nn import CompressedConv2d, CompressedLinear
from engine.nn.compressed import _Compressed

MASK_UPDATES = 50  # that gradual pruning takes, at most
FORMAT = 2

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
    _check(steps, accumulate, gradual, dtype, recipes, student)
    begun = time.perf_counter()
    stream = _Stream(batches)
    before = {id(t): (t, t.detach().clone()) for t in (*student.parameters(), *student.buffers())}
    if checkpoint is not None and not Path(checkpoint).absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder for the checkpoint isn't there", str(checkpoint))
    models = [] if checkpoint is None else [fingerprint(model) for model in (student, teacher) if model is not None]
    undo = None
    try:
        replacements = _prepare(student, recipe, recipes, calibration, stream, gradual)
        undo = measure.replace_(student, replacements)
        layers = trainable_layers(student)
        hidden = match_hidden if isinstance(match_hidden, Mapping) else list(match_hidden)
        compute = make_loss(student, teacher, loss, temperature, hidden, teacher_cache)
        described = None if recipe is None else describe_recipes(recipe)
        pairs = dict(hidden) if isinstance(hidden, Mapping) else hidden
        aim = [loss if isinstance(loss, str) else _name_of(loss), temperature, pairs]
        origin = {"recipe": described, "models": models, "loss": aim}
        run = _Run(student, compute, stream, layers, origin, steps, accumulate, dtype, gradual, clip_norm, warmup)
        run.start(wrap, optimizer, learning_rate)
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
    sparsity = {name: layer.sparsity for name, layer in layers.items()}
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
    expect(0 <= gradual <= steps, f"gradual: expected 0 to steps, got {gradual}")
    prunes = [each.prune for each in recipes if each.prune is not None]
    plain = all(p.sparsity is not None and p.pattern == "unstructured" and p.scope != "model" for p in prunes)
    expect(
        not gradual or (plain and len(prunes) > 0),
        "gradual: needs a recipe with an unstructured sparsity by row or layer",
    )
    compressed = any(isinstance(module, _Compressed) for module in student.modules())
    expect(compressed != bool(recipes), "give a recipe for a dense student, and none for a compressed one")


def _prepare(
    student: nn.Module,
    recipe: Recipe | Mapping[str, Recipe] | None,
    recipes: list[Recipe],
    calibration: Calibration | None,
    stream: "_Stream",
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


class _Stream:
    """The batches, over and over, and where in them training is."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches, self._iterator, self._taken = batches, None, 0
        self._epoch_rng = torch.get_rng_state()
        self._begun: list[Any] = []

    def first(self) -> Any:
        """The first batch, which will come again."""
        if not self._begun:
            self._begun.append(self.next())
        return self._begun[0]

    def next(self) -> Any:
        """The next batch."""
        if self._begun:  # taken already
            return self._begun.pop()
        if self._iterator is None:
            self._begin()
        try:
            batch = next(self._iterator)  # type: ignore[call-overload]
        except StopIteration:
            if self._taken == 0:
                raise ValueError("engine.distill: batches: ran out, and gave none when iterated anew") from None
            self._begin()
            return self.next()
        self._taken += 1
        return batch

    def _begin(self) -> None:
        self._epoch_rng = torch.get_rng_state()
        self._iterator, self._taken = iter(self._batches), 0  # type: ignore[assignment]

    def state(self) -> dict[str, Any]:
        return {"taken": self._taken, "epoch_rng": self._epoch_rng, "rng": torch.get_rng_state()}

    def restore(self, state: dict[str, Any]) -> None:
        self._begun.clear()
        torch.set_rng_state(state["epoch_rng"])
        self._begin()
        for _ in range(state["taken"]):
            next(self._iterator)  # type: ignore[call-overload]
        self._taken = state["taken"]
        torch.set_rng_state(state["rng"])


@dataclasses.dataclass
class _Run:
    """The loop and all of its state."""

    student: nn.Module
    compute: Any
    stream: _Stream
    layers: dict[str, TrainableLinear]
    origin: dict[str, Any]  # what it began with: must be the same for a checkpoint to go on
    steps: int
    accumulate: int
    dtype: torch.dtype | None
    gradual: int
    clip_norm: float | None
    warmup: float
    losses: list[float] = dataclasses.field(default_factory=list)
    saved: str = "none was saved"

    def start(self, wrap: Any, optimizer: Any, learning_rate: float) -> None:
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("engine.distill: no parameter of the student requires a gradient")
        self.device = self.parameters[0].device.type
        if optimizer is None:
            fused = self.device in ("cpu", "cuda")  # 2 to 5 times as fast there as a loop over parameters
            self.optimizer = torch.optim.AdamW(self.parameters, learning_rate, weight_decay=0.0, fused=fused)
        else:
            self.optimizer = optimizer(self.parameters)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.model = wrap(self.student) if wrap is not None else self.student

    def train(self, checkpoint: Any, every: int, progress: bool) -> None:
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
            task = bar.add_task("distilling", total=self.steps, completed=len(self.losses))
            while len(self.losses) < self.steps:
                self.losses.append(self._step(len(self.losses)))
                bar.advance(task)
                done = len(self.losses)
                if checkpoint is not None and (done % every == 0 or done == self.steps):
                    self._save(_own_file(checkpoint))

    def _step(self, step: int) -> float:
        self._update_masks(step)
        warm = max(1, round(self.warmup * self.steps))
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, self.steps - warm)))
        factor = min(1.0, (step + 1) / warm) * cosine
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for i in range(self.accumulate):
            batch = self.stream.next()
            last = i == self.accumulate - 1
            no_sync = getattr(self.model, "no_sync", None)
            with contextlib.nullcontext() if last or no_sync is None else no_sync():
                with torch.autocast(self.device, self.dtype, enabled=self.dtype is not None):
                    loss = self.compute(self.model, batch) / self.accumulate
                self._expect_finite(loss.detach(), "loss", step)
                loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm if self.clip_norm is not None else math.inf)
        self._expect_finite(norm, "gradient's norm", step)
        self.optimizer.step()
        return total

    def _expect_finite(self, value: Tensor, what: str, step: int) -> None:
        """Raises in every process when `value` is not finite in one of them."""
        bad = (~value.isfinite()).float()
        if self.model is not self.student and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        if bad.item():
            raise FloatingPointError(
                f"engine.distill: step {step + 1}: the {what} is {value.item()}; the last good checkpoint: {self.saved}"
            )

    def _update_masks(self, step: int) -> None:
        if not self.gradual:
            return
        last = min(self.gradual, self.steps - 1)
        if step > last or (step % max(1, self.gradual // MASK_UPDATES) and step != last):
            return
        share = 1.0 if step == last else 1 - (1 - step / self.gradual) ** 3
        for layer in self.layers.values():
            layer.prune_on(share)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to go on."""
        shapes = {name: list(p.shape) for name, p in self.student.named_parameters()}
        settings = [self.steps, self.accumulate, str(self.dtype), self.gradual, self.clip_norm, self.warmup]
        rates = [*self.rates, type(self.optimizer).__name__]
        return {"format": FORMAT, **self.origin, "settings": settings, "rates": rates, "shapes": shapes}

    def _save(self, path: Path) -> None:
        state = {
            "identity": json.dumps(self._identity(), sort_keys=True),
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stream": self.stream.state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "losses": self.losses,
        }
        with replacing(path) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # what PyTorch makes of a full disk
                raise OSError(errno.EIO, str(error).splitlines()[0], str(path)) from error
        self.saved = f"{path}, of step {len(self.losses)}"

    def resume(self, checkpoint: Any) -> int:
        """Takes the checkpoint's state, if there is one; returns its step."""
        if checkpoint is None or not _own_file(checkpoint).exists():
            return 0
        path = _own_file(checkpoint)
        try:
            state = torch.load(path, map_location=self.parameters[0].device, weights_only=True)
            same = state["identity"] == json.dumps(self._identity(), sort_keys=True)
        except (RuntimeError, KeyError, TypeError, EOFError, OSError) as error:
            raise ValueError(f"engine.distill: {path}: is no checkpoint of a distillation: {error}") from error
        if not same:
            raise ValueError(
                f"engine.distill: {path}: is of another run (recipe, steps, settings, loss or models): remove it"
            )
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = list(state["losses"])
        self.stream.restore({name: v.cpu() if isinstance(v, Tensor) else v for name, v in state["stream"].items()})
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([rng.cpu() for rng in state["cuda_rng"]])
        self.saved = f"{path}, of step {len(self.losses)}"
        return len(self.losses)


def _own_file(checkpoint: str | os.PathLike) -> Path:
    """The checkpoint's file of this process: after the first, the rank is in the name."""
    path = Path(checkpoint)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return path.with_name(f"{path.name}.rank{torch.distributed.get_rank()}")
    return path
