"""What replacing a layer in a model has to mind: its kind, autocast, PyTorch's fused paths, and hooks."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.ops import _check

GIVEN = "_given_attributes"  # of a replacement: the names that it has from the layer before
REGISTRIES = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))
WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel"}
SIZES: dict[type[nn.Module], tuple[int, ...]] = {nn.Linear: (1, 1), nn.Embedding: (1, 1), nn.Conv2d: (1, 1, 1)}


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is Hugging Face's Conv1D: a linear layer whose weight is `[K, N]` (GPT-2 is made of such).

    By name, as importing transformers to compare classes takes seconds.
    """
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def check_not_wrapped(model: nn.Module, owner: str) -> None:
    """Raises ValueError where something around layers has taken down their parameters, to average gradients.

    Those of a replacement it wouldn't know, and each process would train its own. By name, as importing FSDP takes a
    second.
    """
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("torch.")}
        if found := kinds & WRAPPERS:
            raise ValueError(
                f"engine.{owner}: {name or 'the model'} is a {min(found)}, which would not average the gradients of "
                "layers that are replaced: wrap the model afterwards"
            )


def in_autocast(x: Tensor) -> Tensor:
    """`x` in the dtype that autocast, where it is on, has nn.Linear and nn.Conv2d compute and answer in."""
    if not torch._C._is_any_autocast_enabled():  # a fifth of what asking for the device and its autocast takes
        return x
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def of_nested(layer: nn.Module, x: Any) -> Tensor:
    """What `layer` makes of each part of a nested tensor; of layout torch.jagged, the one that lies in one piece."""
    where, layout = f"nn.{type(layer).__name__}", "a dense tensor or a nested one of layout torch.jagged"
    _check.expect(x.layout == torch.jagged, where, "input", layout, f"a nested one of layout {x.layout}", TypeError)
    ragged: int = x._ragged_idx
    if hasattr(layer, "in_features"):
        _check.expect(ragged < x.dim() - 1, where, "input", "another ragged dimension than the last", "the last")
    y = layer.forward(x.values())  # its hooks run around the whole
    lengths = x._maybe_min_seqlen, x._maybe_max_seqlen
    return torch.nested.nested_tensor_from_jagged(y, x.offsets(), x.lengths(), ragged, *lengths)


def set_item(items: dict[str, Any], key: str, value: Any, undo: contextlib.ExitStack) -> None:
    """Sets an item that is there; `undo` sets it back."""
    undo.callback(items.__setitem__, key, items[key])
    items[key] = value


def switches_of_fused_paths(model: nn.Module, name: str) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """What to set, `(attributes, key, value)`, so that the module at qualified `name` is called after its replacement.

    PyTorch's fused transformer paths take dense weights out of layers instead of calling them.
    """
    parts = name.split(".")[:-1]
    for depth in range(len(parts) + 1):
        around = model.get_submodule(".".join(parts[:depth]))
        if isinstance(around, nn.TransformerEncoderLayer):
            yield vars(around), "activation_relu_or_gelu", 0
        # Else it hands its layers a tensor that only the fused path takes. Old pickles lack the attribute.
        if isinstance(around, nn.TransformerEncoder) and "use_nested_tensor" in vars(around):
            yield vars(around), "use_nested_tensor", False


def hooks_of(module: nn.Module) -> str | None:
    """Where hooks hang on `module` or its weight, which a replacement would lose; None: nowhere."""
    for name in REGISTRIES:
        for hook in vars(module).get(name, {}).values():
            # Removing a weight or spectral norm leaves some of its state-dict hooks behind, which do nothing of use.
            made_by = str(getattr(getattr(hook, "hook", hook), "__module__", None))  # copies forget all but `hook`
            if "state_dict" not in name or not made_by.startswith("torch.nn.utils."):
                return name
    weight = module._parameters.get("weight")
    return "on its weight" if weight is not None and has_tensor_hooks(weight) else None


def has_tensor_hooks(parameter: Tensor) -> bool:
    """Whether hooks hang on a parameter."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def is_as_made(module: nn.Module) -> bool:
    """Whether a layer computes with a weight and a bias as its class does: no other forward, no parts of its own, no
    methods bound to it.
    """
    parts = module._modules or module._buffers or set(module._parameters) - {"weight", "bias"}
    bound = any(getattr(value, "__self__", None) is module for value in vars(module).values())
    return not (parts or bound or vars(module).keys() & {"forward", "_compiled_call_impl"})


def given_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes that somebody gave a layer, dense or replaced, besides those of its class."""
    names = vars(module).get(GIVEN, ())
    if type(module) in SIZES or is_conv1d(module):
        names = sorted(vars(module).keys() - _names_as_made(type(module)))
    return {name: vars(module)[name] for name in names if name in vars(module)}


def give_attributes(module: nn.Module, attributes: Mapping[str, Any]) -> list[str]:
    """Sets what `given_attributes` found on the layer's replacement; returns the names that this has other uses for."""
    taken = [name for name in attributes if hasattr(module, name)]
    given = {name: value for name, value in attributes.items() if name not in taken}
    if given:
        vars(module).update(given | {GIVEN: tuple(given)})
    return taken


def _names_as_made(kind: type[nn.Module]) -> set[str]:
    """The attributes of a dense layer of this class as it is made."""
    if kind in SIZES:
        return set(vars(kind(*SIZES[kind], device="meta")))
    return {*vars(nn.Module()), "nf", "nx"}
