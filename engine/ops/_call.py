"""How an op is called: as directly as what goes on around the call allows."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.autograd import forward_ad


class DevicesDiffer(RuntimeError):
    """Some tensors are on the meta device and others are not: no check can look at their data to say more."""


def caller_of(
    op: torch._ops.OpOverload, check: Callable | None, setup_context: Callable | None, backward: Callable
) -> Callable:
    """Calls `op`, past its autograd kernel where no gradient can be wanted.

    That kernel is Python in PyTorch and costs 8 µs a call under `torch.no_grad()`, more than a small layer; inference
    mode skips it by itself. The transforms of torch.func refuse it, and get one that they take.
    """
    name = op.name().partition("::")[2]
    direct = op._op  # what `op` itself calls, a Python frame later
    is_tracing = torch._C._is_tracing
    transforms_active = torch._C._are_functorch_transforms_active
    transformed = _for_transforms(op, setup_context, backward)

    def call(*args):
        try:
            # torch.jit.trace traces twice, once without gradients, and wants the call in the same line.
            if torch.compiler.is_dynamo_compiling() or is_tracing():
                return op(*args)
            if forward_ad._current_level >= 0:
                refuse_tangents(name, args)
            if torch.is_inference_mode_enabled():
                return direct(*args)
            if torch.is_grad_enabled():
                return transformed(*args) if transforms_active() and not functionalizes() else direct(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return direct(*args)
        except DevicesDiffer:
            raise
        except RuntimeError:
            if check is not None:
                check(*args)
            raise

    return call


def functionalizes() -> bool:
    """Whether the innermost transform is `functionalize`, which takes ops as they are."""
    innermost = torch._C._functorch.peek_interpreter_stack()
    return innermost is not None and innermost.key() == torch._C._functorch.TransformType.Functionalize


def _for_transforms(op: torch._ops.OpOverload, setup_context: Callable | None, backward: Callable) -> Callable:
    """What calls `op` inside torch.func.grad and the like."""
    if any(str(argument.type) == "List[Tensor]" for argument in op._schema.arguments):  # they don't look into lists
        return op

    def refuse(ctx: object, *tangents: object) -> None:
        raise RuntimeError(_no_tangents(op._opname))

    methods = {
        "forward": lambda *args: op(*args),
        "setup_context": setup_context or (lambda ctx, inputs, output: None),
        "backward": backward,
        "jvp": refuse,
    }
    members: dict[str, Any] = {name: staticmethod(method) for name, method in methods.items()}
    function: Any = type(
        f"{op._opname}_transformed", (torch.autograd.Function,), members | {"generate_vmap_rule": True}
    )
    defaults = [argument.default_value for argument in op._schema.arguments]
    return lambda *args: function.apply(*args, *defaults[len(args) :])


def refuse_tangents(name: str, args: tuple) -> None:
    if any(forward_ad.unpack_dual(t).tangent is not None for _, t in tensors_in(args)):
        raise RuntimeError(_no_tangents(name))


def _no_tangents(name: str) -> str:
    return f"engine.ops.{public_name(name)} has no forward-mode derivative (jvp)"


def tensors_in(args: Iterable[Any]) -> Iterator[tuple[int, torch.Tensor]]:
    """The tensors among `args`, those of lists too, each with the place of its argument."""
    for place, arg in enumerate(args):
        for each in arg if isinstance(arg, list | tuple) else (arg,):
            if isinstance(each, torch.Tensor):
                yield place, each


def public_name(name: str) -> str:
    """What a user calls the op by: without the overload, and of a gradient's op the op itself."""
    return re.split(r"\.|_backward_|_of_list", name)[0]
