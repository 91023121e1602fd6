"""LazyWeight: the dense weight of a compressed layer, made only when something asks for more than its description.

Model code asks a layer's weight for its dtype or device in every forward pass (T5 twice for each feed-forward block),
which must not cost a dense matrix each time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# What can be said without the values. `__get__` of a property is what PyTorch passes for it.
DESCRIPTIONS = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "is_cuda", "is_meta")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.element_size),
}


class LazyWeight(Tensor):
    """A tensor without memory that becomes an ordinary one, in place, at the first use that needs its values.

    Until then it holds what it will be made of. Those tensors are the layer's own, so one that is written to in the
    meantime makes the values unknowable: RuntimeError, never the new ones.
    """

    _sources: tuple[Tensor, ...]
    _versions: tuple[int, ...]
    _make: Callable[..., Tensor]
    _made: Tensor | None

    @staticmethod
    def __new__(cls, make: Callable[..., Tensor], sources: tuple[Tensor, ...], like: Tensor) -> "LazyWeight":
        """`make(*sources)`, which must be as `like` (of which only the description is looked at)."""
        how: dict[str, Any] = {"strides": like.stride(), "dtype": like.dtype, "device": sources[0].device}
        lazy: Any = Tensor._make_wrapper_subclass(cls, like.shape, **how)
        lazy._make, lazy._made = make, None
        lazy._sources = tuple(source.detach() for source in sources)  # as they lie in memory now, should they move
        lazy._versions = tuple(source._version for source in sources)
        return lazy

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answers what the description tells; for all else makes the values first."""
        if func in DESCRIPTIONS and args[0].__dict__.get("_made", 0) is None:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_ordinary, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """For callers that go past `__torch_function__`."""
        args, kwargs = tree_map(_ordinary, (args, kwargs or {}))
        return func(*args, **kwargs)


def may_be_lazy(sources: tuple[Tensor, ...]) -> bool:
    """Whether a weight made of these can as well be made later: none is being traced, or wants a gradient."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return all(
        type(source) in (Tensor, torch.nn.Parameter)
        and not (source.requires_grad and torch.is_grad_enabled())
        and not (source.is_meta or source.is_inference())
        and not torch._C._functorch.is_functorch_wrapped_tensor(source)
        for source in sources
    )


def _ordinary(value: Any) -> Any:
    """`value` itself, by now with values where it is a LazyWeight."""
    if type(value) is not LazyWeight:
        return value
    if value._made is not None:
        return value._made
    with torch._C.DisableTorchFunctionSubclass():
        if tuple(source._version for source in value._sources) != value._versions:
            raise RuntimeError(
                "engine.nn: the layer has been written to since this weight was read: read it again, "
                "or clone what you read before"
            )
        with torch.no_grad():
            made = value._make(*value._sources)
        try:
            torch.utils.swap_tensors(value, made)
            return value
        except RuntimeError:  # something refers to it weakly, and so it stays what it is and keeps its values
            value._made = made
            return made
