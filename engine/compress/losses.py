"""What a distillation minimises: outputs and hidden states of the student against the teacher's, or a task's loss."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.compress import measure

Loss = str | Callable[..., Tensor]
OUTPUTS = ("logits", "last_hidden_state")


def output_tensor(output: Any) -> Tensor:
    """The tensor that counts of a model's output: itself, its logits or last hidden state, or the first one in it."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for name in OUTPUTS:
            if isinstance(output.get(name), Tensor):
                return output[name]
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        for item in output:
            if isinstance(item, Tensor):
                return item
    raise ValueError(
        f"engine.distill: the model's output holds no tensor: {type(output).__name__}: give a callable loss"
    )


def real_rows(tensor: Tensor, batch: Any) -> Tensor:
    """`tensor` `[B, T, ...]` without padding, `[rows, ...]`, where the batch has an attention mask `[B, T]`."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and tensor.dim() > 2 and tensor.shape[:2] == mask.shape:
        return tensor[mask.bool()]
    return tensor


def _tensors(output: Any) -> Iterator[Tensor]:
    """All tensors in a model's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for item in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(item)


class make_loss:
    """Callable `(model, batch) -> scalar`; a context manager, inside which hidden states are seen.

    `model` may be the student or what wraps it.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        loss: Loss,
        temperature: float,
        match_hidden: Mapping[str, str] | Iterable[str],
        teacher_cache: int = 0,
    ) -> None:
        if isinstance(loss, str) and (teacher is None or loss not in ("mse", "kl")):
            what = "a callable, as there is no teacher" if teacher is None else "'mse', 'kl' or a callable"
            raise ValueError(f"engine.distill: loss: expected {what}, got {loss!r}")
        if not temperature > 0:
            raise ValueError(f"engine.distill: temperature: expected a number above 0, got {temperature!r}")
        if teacher_cache < 0:
            raise ValueError(f"engine.distill: teacher_cache: expected bytes, at least 0, got {teacher_cache!r}")
        self._teacher, self._loss, self._temperature = teacher, loss, temperature
        self._room = teacher_cache
        # By the batch's id, which stays its own as long as the batch is kept beside what was said of it.
        self._said: dict[int, tuple[Any, Any, list[Tensor]]] = {}
        names = match_hidden if isinstance(match_hidden, Mapping) else {name: name for name in match_hidden}
        if names and teacher is None:
            raise ValueError("engine.distill: match_hidden: there is no teacher to match")
        self._pairs = []
        for mine, theirs in names.items():
            try:
                pair = (student.get_submodule(mine), teacher.get_submodule(theirs))  # type: ignore[union-attr]
            except AttributeError as error:
                raise ValueError(f"engine.distill: match_hidden: {error}") from None
            self._pairs.append(pair)
        self._seen: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "make_loss":
        for pair in self._pairs:
            for module in pair:
                self._handles.append(module.register_forward_hook(self._see))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _see(self, module: nn.Module, args: Any, output: Any) -> None:
        self._seen[id(module)] = output_tensor(output)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of `model` on `batch`."""
        output = measure.run(model, batch)
        if self._teacher is None:
            return self._loss(output, batch)  # type: ignore[operator]
        target, inner = self._ask_teacher(batch)
        if callable(self._loss):
            total = self._loss(output, target, batch)
        else:
            got, want = (real_rows(output_tensor(o), batch).float() for o in (output, target))
            total = nn.functional.mse_loss(got, want) if self._loss == "mse" else self._divergence(got, want)
        for (mine, _), theirs in zip(self._pairs, inner, strict=True):
            got, want = (real_rows(hidden, batch).float() for hidden in (self._seen.pop(id(mine)), theirs))
            total = total + nn.functional.mse_loss(got, want) / want.square().mean().clamp_min(1e-12)
        return total

    def _ask_teacher(self, batch: Any) -> tuple[Any, list[Tensor]]:
        """The teacher's output, or the tensor that counts of it, and its inner outputs that are matched."""
        if id(batch) in self._said:
            return self._said[id(batch)][1:]
        with torch.no_grad():
            output = measure.run(self._teacher, batch)  # type: ignore[arg-type]
        target = output if callable(self._loss) else output_tensor(output)
        inner = [self._seen.pop(id(theirs)) for _, theirs in self._pairs]
        size = sum(tensor.nbytes for tensor in (*_tensors(target), *inner))
        if size <= self._room:
            self._room -= size
            self._said[id(batch)] = (batch, target, inner)
        return target, inner

    def _divergence(self, got: Tensor, want: Tensor) -> Tensor:
        t, classes = self._temperature, got.shape[-1]
        got, want = (nn.functional.log_softmax(x.reshape(-1, classes) / t, -1) for x in (got, want))
        return nn.functional.kl_div(got, want, reduction="batchmean", log_target=True) * (t * t)
