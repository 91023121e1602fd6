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

LIBRARY = torch.library.Library("engine", "DEF")
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
    torch.library.register_fake(qualified, _all_or_none_meta(qualified, fake), lib=LIBRARY)

    def refuse(ctx: object, *grads: object) -> None:
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
    torch.library.register_fake(f"engine::{name}", _all_or_none_meta(f"engine::{name}", fake), lib=LIBRARY)
    return getattr(torch.ops.engine, name).default


def _contiguous(reference: Callable) -> Callable:
    """What elementwise PyTorch makes of a transposed input is transposed too; fakes and kernels answer row by row."""

    @functools.wraps(reference)
    def contiguous(*args, **kwargs):
        result = reference(*args, **kwargs)
        return tuple(t.contiguous() for t in result) if isinstance(result, tuple) else result.contiguous()

    return contiguous


def _all_or_none_meta(qualified: str, fake: Callable) -> Callable:
    """`fake`, unless some tensors are on the meta device and others are not.

    PyTorch then calls it for the whole call, and its result would be memory that nothing was written to.
    """

    @functools.wraps(fake)
    def checked(*args, **kwargs):
        devices = {a.device.type for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)}
        if "meta" in devices and len(devices) > 1:
            raise DevicesDiffer(f"{qualified}: expected all tensors on one device, got {' and '.join(sorted(devices))}")
        return fake(*args, **kwargs)

    return checked


def _without_autograd_overhead(op: torch._ops.OpOverload, check: Callable | None) -> Callable:
    """Calls `op`, past its autograd kernel where no gradient can be wanted.

    That kernel is Python in PyTorch and costs 8 µs a call under `torch.no_grad()`, more than a small layer; inference
    mode skips it by itself.
    """
    direct = op._op  # what `op` itself calls, a Python frame later

    def call(*args):
        try:
            if torch.compiler.is_dynamo_compiling():
                return op(*args)
            if forward_ad._current_level >= 0:
                _refuse_tangents(op, args)
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


def _refuse_tangents(op: torch._ops.OpOverload, args: tuple) -> None:
    """Forward-mode derivatives would silently be zero."""
    if any(isinstance(arg, torch.Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args):
        raise RuntimeError(f"{op.name().replace('::', '.ops.')} has no forward-mode derivative (jvp)")


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
            except RuntimeError:
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
