"""Where an op's parts are registered with PyTorch: schema, reference, fake, gradient.

A native kernel needs no word here: a library that registers one for `CPU` or `CUDA` takes over from the reference,
which stays as the default for every other device and for :func:`engine.reference_mode`.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from engine.ops import _check


class _Library(torch.library.Library):
    """One whose autograd kernels refuse forward-mode derivatives: those that PyTorch makes leave them zero."""

    def impl(self, op_name, fn, dispatch_key="", **how):
        if dispatch_key == "Autograd":
            fn = _without_tangents(op_name, fn)
        super().impl(op_name, fn, dispatch_key, **how)


def _without_tangents(name: str, kernel: Callable) -> Callable:
    def checked(keyset, *args, **kwargs):
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        return kernel(keyset, *args, **kwargs)

    return checked


LIBRARY = _Library("engine", "DEF")
REFERENCES: dict[str, Callable] = {}


class DevicesDiffer(RuntimeError):
    """Some tensors are on the meta device and others are not: no check can look at their data to say more."""


def define(
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    check: Callable | None = None,
) -> Callable:
    """Defines `engine::<schema>` and returns what calls it.

    Without `backward` the op refuses gradients: asking for one raises, naming the op. `check` says why a kernel
    refuses, as by :func:`explained_by`, which costs a Python frame more.
    """
    name = schema[: schema.index("(")]
    qualified = f"engine::{name}"
    reference = _contiguous(reference)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    REFERENCES[name] = reference
    torch.library.register_fake(qualified, _all_or_none_meta(schema, fake), lib=LIBRARY)

    def refuse(ctx: object, *grads: object) -> None:
        if "_backward_" in name:
            raise RuntimeError(f"engine.ops.{_public(name)} has no second derivative: its gradients have no gradient")
        raise RuntimeError(f"engine.ops.{name} has no gradient; call it under torch.no_grad() or on detached tensors")

    torch.library.register_autograd(qualified, backward or refuse, setup_context=setup_context, lib=LIBRARY)
    packet, _, overload = name.partition(".")
    return _without_autograd_overhead(getattr(getattr(torch.ops.engine, packet), overload or "default"), check)


def define_mutating(schema: str, *, reference: Callable, fake: Callable) -> Callable:
    """Defines an op that writes into its arguments and returns nothing; it knows no gradients (call it on data)."""
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    REFERENCES[name] = reference
    torch.library.register_fake(f"engine::{name}", _all_or_none_meta(schema, fake), lib=LIBRARY)
    return getattr(torch.ops.engine, name).default


def _contiguous(reference: Callable) -> Callable:
    """What elementwise PyTorch makes of a transposed input is transposed too; fakes and kernels answer row by row."""

    @functools.wraps(reference)
    def contiguous(*args, **kwargs):
        result = reference(*args, **kwargs)
        return tuple(t.contiguous() for t in result) if isinstance(result, tuple) else result.contiguous()

    return contiguous


def _all_or_none_meta(schema: str, fake: Callable) -> Callable:
    """`fake`, unless some tensors are on the meta device and others are not.

    PyTorch then calls it for the whole call, and its result would be memory that nothing was written to.
    """

    @functools.wraps(fake)
    def checked(*args, **kwargs):
        on = [(place, t.device.type) for place, t in _tensors((*args, *kwargs.values()))]
        devices = {device for _, device in on}
        if "meta" in devices and len(devices) > 1:
            names = [argument.name for argument in torch._C.parse_schema(f"engine::{schema}").arguments]
            names = [*names[: len(args)], *kwargs]
            (first, device), (place, other) = on[0], next(each for each in on if each[1] != on[0][1])
            expected = f"a tensor on {device}, as {names[first]} is"
            op = _public(schema[: schema.index("(")])
            _check.expect(False, op, names[place], expected, f"one on {other}", DevicesDiffer)
        return fake(*args, **kwargs)

    return checked


def _without_autograd_overhead(op: torch._ops.OpOverload, check: Callable | None) -> Callable:
    """Calls `op`, past its autograd kernel where no gradient can be wanted.

    That kernel is Python in PyTorch and costs 8 µs a call under `torch.no_grad()`, more than a small layer; inference
    mode skips it by itself.
    """
    name = op.name().partition("::")[2]
    direct = op._op  # what `op` itself calls, a Python frame later
    is_tracing = torch._C._is_tracing

    def call(*args):
        try:
            # torch.jit.trace traces twice, once without gradients, and wants the call in the same line.
            if torch.compiler.is_dynamo_compiling() or is_tracing():
                return op(*args)
            if forward_ad._current_level >= 0:
                _refuse_tangents(name, args)
            if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
                return direct(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return direct(*args)
        except DevicesDiffer:
            raise
        except RuntimeError:
            if check is not None:
                check(*args)
            raise

    return call


def _refuse_tangents(name: str, args: tuple) -> None:
    if any(forward_ad.unpack_dual(t).tangent is not None for _, t in _tensors(args)):
        raise RuntimeError(f"engine.ops.{_public(name)} has no forward-mode derivative (jvp)")


def _tensors(args: Iterable[Any]) -> Iterator[tuple[int, torch.Tensor]]:
    """The tensors among `args`, those of lists too, each with the place of its argument."""
    for place, arg in enumerate(args):
        for each in arg if isinstance(arg, list | tuple) else (arg,):
            if isinstance(each, torch.Tensor):
                yield place, each


def _public(name: str) -> str:
    """What a user calls the op by: without the overload, and of a gradient's op the op itself."""
    return re.split(r"\.|_backward_|_of_list", name)[0]


def explained_by(check: Callable) -> Callable:
    """Decorates an op's public function: when its kernel refuses, `check` says why, with its type.

    `check` takes all of the function's arguments, by position.

    Kernels check for safety alone, tersely, as the call must stay short; what a user reads is written once, in `check`.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except DevicesDiffer:
                raise
            except (AttributeError, RuntimeError):  # the former where the function itself asks what is no tensor
                given = inspect.signature(function).bind(*args, **kwargs)
                given.apply_defaults()
                check(*given.args)
                raise

        return call

    return decorate


class reference_mode(TorchDispatchMode):
    """Context manager in which every engine op runs by its plain PyTorch reference, on any device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "engine":
            return REFERENCES[str(func).removeprefix("engine.").removesuffix(".default")](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
