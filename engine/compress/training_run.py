"""The loop that distill trains in, with all of its state, which a checkpoint holds."""

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from engine._files import replacing
from engine.compress.trainable import trainable_layers

MASK_UPDATES = 50  # that gradual pruning takes, at most
FORMAT = 3


class BatchStream:
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
        """Where it is, with the state of torch's generator, for `restore`."""
        return {"taken": self._taken, "epoch_rng": self._epoch_rng, "rng": torch.get_rng_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where another stream was, by drawing what that one drew."""
        self._begun.clear()
        torch.set_rng_state(state["epoch_rng"])
        self._begin()
        for _ in range(state["taken"]):
            next(self._iterator)  # type: ignore[call-overload]
        self._taken = state["taken"]
        torch.set_rng_state(state["rng"])


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a run, as :func:`engine.distill` takes them."""

    steps: int
    accumulate: int
    dtype: torch.dtype | None
    gradual: int
    clip_norm: float | None
    warmup: float


class TrainingRun:
    """The student, its optimiser and batches, and how far they are.

    Args:
        student: its layers trainable already.
        compute: `(model, batch)` to the loss.
        stream: of the batches.
        settings: of the loop.
        origin: what the run began with, as plain values. A checkpoint is only taken up where it is the same.
        wrap: as :func:`engine.distill` takes it, like the two that follow.
        optimizer: what makes one, or None.
        learning_rate: of the default optimiser.
    """

    def __init__(
        self,
        student: nn.Module,
        compute: Callable[[nn.Module, Any], Tensor],
        stream: BatchStream,
        settings: Settings,
        origin: dict[str, Any],
        wrap: Callable[[nn.Module], nn.Module] | None,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None,
        learning_rate: float,
    ) -> None:
        self.student, self.compute, self.stream = student, compute, stream
        self.settings, self.origin = settings, origin
        self.losses: list[float] = []
        self.layers = trainable_layers(student)
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("engine.distill: no parameter of the student requires a gradient")
        self.device = self.parameters[0].device.type
        if optimizer is None:
            fused = self.device in ("cpu", "cuda")  # 2 to 5 times as fast there as a loop over parameters
            optimizer = functools.partial(torch.optim.AdamW, lr=learning_rate, weight_decay=0.0, fused=fused)
        self.optimizer = optimizer(self.parameters)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.model = student if wrap is None else wrap(student)
        self._last_checkpoint = "none was saved"

    def train(self, checkpoint: str | os.PathLike | None, every: int, progress: bool) -> None:
        """Takes the steps that are left, and writes the checkpoint every so many."""
        console = Console(stderr=True)
        steps = self.settings.steps
        with Progress(console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
            task = bar.add_task("distilling", total=steps, completed=len(self.losses))
            while len(self.losses) < steps:
                self.losses.append(self._step(len(self.losses)))
                bar.advance(task)
                done = len(self.losses)
                if checkpoint is not None and (done % every == 0 or done == steps):
                    self._save(_own_file(checkpoint))

    def _step(self, step: int) -> float:
        settings = self.settings
        self._update_masks(step)
        warm = max(1, round(settings.warmup * settings.steps))
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, settings.steps - warm)))
        factor = min(1.0, (step + 1) / warm) * cosine
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for i in range(settings.accumulate):
            batch = self.stream.next()
            last = i == settings.accumulate - 1
            no_sync = getattr(self.model, "no_sync", None)
            with contextlib.nullcontext() if last or no_sync is None else no_sync():
                with torch.autocast(self.device, settings.dtype, enabled=settings.dtype is not None):
                    loss = self.compute(self.model, batch) / settings.accumulate
                self._expect_finite(loss.detach(), "loss", step)
                loss.backward()
            total += loss.item()
        limit = math.inf if settings.clip_norm is None else settings.clip_norm
        norm = nn.utils.clip_grad_norm_(self.parameters, limit)
        self._expect_finite(norm, "gradient's norm", step)
        self.optimizer.step()
        return total

    def _expect_finite(self, value: Tensor, what: str, step: int) -> None:
        """Raises in every process that trains together when `value` is not finite in one of them."""
        bad = (~value.isfinite()).float()
        if self.model is not self.student and torch.distributed.is_available() and torch.distributed.is_initialized():
            group = getattr(self.model, "process_group", None)  # DDP's; others may train something else, or not at all
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX, group)
        if bad.item():
            raise FloatingPointError(
                f"engine.distill: step {step + 1}: the {what} is {value.item()}; "
                f"the last good checkpoint: {self._last_checkpoint}"
            )

    def _update_masks(self, step: int) -> None:
        gradual = self.settings.gradual
        if not gradual:
            return
        last = min(gradual, self.settings.steps - 1)
        if step > last or (step % max(1, gradual // MASK_UPDATES) and step != last):
            return
        share = 1.0 if step == last else 1 - (1 - step / gradual) ** 3
        for layer in self.layers.values():
            layer.prune_on(share)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to go on."""
        shapes = {name: list(p.shape) for name, p in self.student.named_parameters()}
        settings = {name: str(value) for name, value in dataclasses.asdict(self.settings).items()}
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
        self._last_checkpoint = f"{path}, of step {len(self.losses)}"

    def resume(self, checkpoint: str | os.PathLike | None) -> int:
        """Takes the checkpoint's state, if there is one; returns its step."""
        if checkpoint is None or not _own_file(checkpoint).exists():
            return 0
        path = _own_file(checkpoint)
        try:
            state = torch.load(path, map_location=self.parameters[0].device, weights_only=True)
            same = state["identity"] == json.dumps(self._identity(), sort_keys=True)
        except (RuntimeError, KeyError, TypeError, EOFError, OSError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]  # of PyTorch's page about what pickles may do
            raise ValueError(f"engine.distill: {path}: is no checkpoint of a distillation: {reason}") from error
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
        self._last_checkpoint = f"{path}, of step {len(self.losses)}"
        return len(self.losses)


def _own_file(checkpoint: str | os.PathLike) -> Path:
    """The checkpoint's file of this process: after the first, the rank is in the name."""
    path = Path(checkpoint)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return path.with_name(f"{path.name}.rank{torch.distributed.get_rank()}")
    return path
