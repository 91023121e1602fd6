"""ring_hook: DistributedDataParallel's gradients through all_reduce, with a codec and error feedback."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.distributed._all_reduce import all_reduce
from engine.ops.ring_codec import CODECS


class HookState:
    """What :func:`ring_hook` keeps from step to step: `ddp.register_comm_hook(HookState(codec="int8"), ring_hook)`.

    The residuals belong to the parameters, not to the buckets, so that they survive when DDP rebuilds its buckets. The
    state can be pickled into a checkpoint, with all of it but the group: after loading, the default group is meant
    unless `group` is set again. Save every rank's own, as residuals differ between ranks, and register the loaded one
    with the restored model.

    Args:
        group: the group of the DDP model, the default one where it is None.
        codec: None, "bf16", "int8" or "bitmap", as for :func:`engine.distributed.all_reduce`: between hosts alone.
        error_feedback: keep what could not be sent, and add it to the next step's gradients.
        warmup_steps: so many steps go without the codec first.
        density: of "bitmap".

    Attributes:
        step: steps begun.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        codec: str | None = "int8",
        error_feedback: bool = True,
        warmup_steps: int = 0,
        density: float = 0.01,
    ) -> None:
        if codec is not None and codec not in CODECS:
            raise ValueError(f"HookState: codec: expected None or one of {', '.join(CODECS)}, got {codec!r}")
        if warmup_steps < 0 or not 0 < density <= 1:
            raise ValueError("HookState: expected warmup_steps of 0 or more, and a density in (0, 1]")
        self.group, self.codec, self.error_feedback = group, codec, error_feedback
        self.warmup_steps, self.density, self.step = warmup_steps, density, 0
        self._residuals: dict[int, Tensor] = {}  # by a parameter's number; views of what the buckets hold
        self._numbers: dict[int, int] = {}  # by id: parameters in the order in which DDP first showed them
        self._buckets: dict[tuple[int, ...], Tensor] = {}  # by the numbers of a bucket's parameters

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "group": None,
            "_residuals": {number: residual.clone() for number, residual in self._residuals.items()},
            "_numbers": {},
            "_buckets": {},
        }

    def _residual(self, bucket: dist.GradBucket) -> Tensor:
        """One flat residual for a bucket; where its parameters were in other buckets before, theirs move here.

        Before DDP rebuilds its buckets they hold the parameters in the model's reverse order, so that a parameter has
        the same number after a restart.
        """
        parameters = bucket.parameters()
        numbers = tuple(self._numbers.setdefault(id(p), len(self._numbers)) for p in parameters)
        if numbers not in self._buckets:
            flat = torch.zeros(bucket.buffer().numel(), dtype=torch.float32)
            offset = 0
            for number, parameter in zip(numbers, parameters, strict=True):
                view = flat[offset : offset + parameter.numel()]
                offset += parameter.numel()
                before = self._residuals.get(number)
                if before is not None and before.numel() != view.numel():
                    raise ValueError("HookState: its residuals are those of another model")
                if before is not None:
                    view.copy_(before)
                self._residuals[number] = view
            moved = set(numbers)
            self._buckets = {key: kept for key, kept in self._buckets.items() if not moved & set(key)}
            self._buckets[numbers] = flat
        return self._buckets[numbers]


def ring_hook(state: HookState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The average of a bucket of gradients over all ranks, for `ddp.register_comm_hook(state, ring_hook)`.

    The backward pass goes on meanwhile, and raises what :func:`engine.distributed.all_reduce` raises.
    """
    t = bucket.buffer()
    codec = state.codec if state.step >= state.warmup_steps else None
    residual = state._residual(bucket) if state.error_feedback and codec is not None else None
    if bucket.is_last():
        state.step += 1

    work = all_reduce(t, "avg", state.group, codec, async_op=True, residual=residual, density=state.density)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])
