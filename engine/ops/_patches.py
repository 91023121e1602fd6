"""Linear ops over the patches of an image: the overload `patches` of an op, made of the op's own parts.

Its `x` is a view `[B, Ho, Wo, kh, kw, C]` of an image, and K is the last three together. The kernels read each patch
where it lies, so that nobody has to write them all side by side; everything else is the op's.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from engine.ops import _check
from engine.ops._library import define


def define_with_patches(
    schema: str, *, check: Callable, reference: Callable, fake: Callable, backward: Callable, setup_context: Callable
) -> tuple[Callable, Callable]:
    """Defines `engine::<op>` and `engine::<op>.patches`; returns the op, and what calls the overload, `x` first."""
    name = schema[: schema.index("(")]

    def check_dimensions(x: Tensor) -> None:
        _check.expect(x.dim() == 6, name, "x", "patches [B, Ho, Wo, kh, kw, C]", list(x.shape))

    def rows(x: Tensor) -> Tensor:
        check_dimensions(x)
        return x.flatten(3)

    def over_rows(function: Callable) -> Callable:
        return lambda x, *rest: function(rows(x), *rest)

    def sizes_alone(x: Tensor, *rest: Any) -> Tensor:  # to flatten what has symbols for strides would guard on them
        check_dimensions(x)
        return fake(x.new_empty((*x.shape[:3], x.shape[3:].numel())), *rest)

    def setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, *rest = inputs
        ctx.kernel = x.shape[3:]
        setup_context(ctx, (x.new_empty((0, ctx.kernel.numel())), *rest), output)  # rows without the copy

    def back(ctx: Any, grad: Tensor) -> tuple:
        grad_x, *rest = backward(ctx, grad)
        return (None if grad_x is None else grad_x.unflatten(-1, ctx.kernel), *rest)

    op = define(schema, reference=reference, fake=fake, backward=backward, setup_context=setup_context, check=check)
    of_patches = define(
        schema.replace("(", ".patches(", 1),
        reference=over_rows(reference),
        fake=sizes_alone,
        backward=back,
        setup_context=setup,
        check=over_rows(check),
    )
    return op, of_patches
