"""Where an op's parts are registered with PyTorch: schema, reference, fake, gradient.

A native kernel needs no word here: a library that registers one for `CPU` or `CUDA` takes over from the reference,
which stays as the default for every other device and for :func:`engine.reference_mode`.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from engine.ops import _check
from engine.ops._call import DevicesDiffer, caller_of, public_name, refuse_tangents, tensors_in


class _Library(torch.library.Library):
    """One whose autograd kernels refuse forward-mode derivatives: those that PyTorch makes leave them zero."""

    def impl(self, op_name, fn, dispatch_key="", **how):
        if dispatch_key == "Autograd":
            fn = _without_tangents(op_name, fn)
        super().impl(op_name, fn, dispatch_key, **how)


def _without_tangents(name: str, kernel: Callable) -> Callable:
    def checked(keyset, *args, **kwargs):
        if forward_ad._current_level >= 0:
            refuse_tangents(name, args)
        return kernel(keyset, *args, **kwargs)

    return checked


LIBRARY = _Library("engine", "DEF")
REFERENCES: dict[str, Callable] = {}


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
            raise RuntimeError(
                f"engine.ops.{public_name(name)} has no second derivative: its gradients have no gradient"
            )
        raise RuntimeError(f"engine.ops.{name} has no gradient; call it under torch.no_grad() or on detached tensors")

    torch.library.register_autograd(qualified, backward or refuse, setup_context=setup_context, lib=LIBRARY)
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.engine, packet), overload or "default")
    return caller_of(op, check, setup_context, backward or refuse)


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
        on = [(place, t.device.type) for place, t in tensors_in((*args, *kwargs.values()))]
        devices = {device for _, device in on}
        if "meta" in devices and len(devices) > 1:
            names = [argument.name for argument in torch._C.parse_schema(f"engine::{schema}").arguments]
            names = [*names[: len(args)], *kwargs]
            (first, device), (place, other) = on[0], next(each for each in on if each[1] != on[0][1])
            expected = f"a tensor on {device}, as {names[first]} is"
            op = public_name(schema[: schema.index("(")])
            _check.expect(False, op, names[place], expected, f"one on {other}", DevicesDiffer)
        return fake(*args, **kwargs)

    return checked


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
