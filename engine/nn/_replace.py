"""What replacing a layer in a model has to mind: its kind, autocast, PyTorch's fused paths, and hooks."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is Hugging Face's Conv1D: a linear layer whose weight is `[K, N]` (GPT-2 is made of such).

    By name, as importing transformers to compare classes takes seconds.
    """
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def in_autocast(x: Tensor) -> Tensor:
    """`x` in the dtype that autocast, where it is on, has nn.Linear and nn.Conv2d compute and answer in."""
    if not torch._C._is_any_autocast_enabled():  # a fifth of what asking for the device and its autocast takes
        return x
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


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


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks hang on `module` or its weight, which a replacement would lose."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    weight = module._parameters.get("weight")
    return any(getattr(module, name) for name in hooks) or (weight is not None and has_tensor_hooks(weight))


def has_tensor_hooks(parameter: Tensor) -> bool:
    """Whether hooks hang on a parameter."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def is_as_made(module: nn.Module) -> bool:
    """Whether a layer computes with a weight and a bias as its class does: no other forward, no parts of its own."""
    return "forward" not in vars(module) and not (
        module._modules or module._buffers or set(module._parameters) - {"weight", "bias"}
    )
