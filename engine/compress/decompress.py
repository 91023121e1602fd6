"""decompress_: a compressed model as one of dense layers, for what knows no compressed ones."""

from typing import Any

import torch
from torch import nn

from engine.compress import measure
from engine.nn import CompressedConv2d, CompressedEmbedding
from engine.nn._replace import check_not_wrapped, give_attributes, given_attributes, has_tensor_hooks, hooks_of
from engine.nn.compressed import _Compressed


@torch.inference_mode(False)  # the layers that it makes stay, and are to be fit for training
def decompress_(model: nn.Module) -> nn.Module:
    """Replaces every compressed layer of `model` by the dense one that it stands for, in place.

    For `torch.onnx.export`, `save_pretrained`, and whatever else knows dense layers alone. A weight is what the kernels
    multiply by: what was pruned is zero, what was rounded stays so. One that was int8 can be trained, another
    where its values could. Activations are quantised no more. Weights that are tied stay tied, and biases are the same
    parameters. What :func:`engine.nn.unfuse_attention_` or :func:`engine.load_` made of an nn.MultiheadAttention stays.
    Both weights are in memory until the end, so that an error leaves the model as it was.

    Returns:
        `model`.

    Raises:
        ValueError: `model` has no compressed layer, is itself one, has one with hooks, or is wrapped by
            DistributedDataParallel or FSDP.
    """
    check_not_wrapped(model, "decompress_")
    modules = dict(model.named_modules(remove_duplicate=False))
    compressed = {name: module for name, module in modules.items() if isinstance(module, _Compressed)}
    if not compressed:
        raise ValueError("engine.decompress_: the model has no compressed layer")
    if "" in compressed:
        kind = type(model).__name__
        raise ValueError(f"engine.decompress_: the model is itself a {kind}, which can't be replaced in place")
    weights: dict[Any, nn.Parameter] = {}
    dense: dict[_Compressed, nn.Module] = {}
    for name, module in compressed.items():
        if module not in dense:
            if hooks := hooks_of(module) or ("on its values" if has_tensor_hooks(module.values) else None):
                raise ValueError(f"engine.decompress_: {name}: has hooks ({hooks}), which a replacement would lose")
            dense[module] = _dense(module, weights)
    measure.replace_(model, {name: dense[module] for name, module in compressed.items()})
    return model


def _dense(module: Any, weights: dict[Any, nn.Parameter]) -> nn.Module:
    """The dense twin; `weights` has those made before, by what is tied."""
    transposed, bias = getattr(module, "transposed", False), getattr(module, "bias", None)
    key = id(module.values), tuple(getattr(module, "kernel_size", ())), transposed
    if key not in weights:
        trained = module.values.requires_grad or not module.values.is_floating_point()
        weights[key] = nn.Parameter(module.weight.detach().contiguous(), trained)
    twin: Any
    with torch.device("meta"):
        if isinstance(module, CompressedEmbedding):
            twin = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx)
        elif isinstance(module, CompressedConv2d):
            sizes = module.in_channels, module.out_channels, module.kernel_size, module.stride
            rest: Any = module.padding, module.dilation, 1, False, module.padding_mode
            twin = nn.Conv2d(*sizes, *rest)
        elif transposed:
            from transformers.pytorch_utils import Conv1D  # takes seconds, but the model is one of that library's

            twin = Conv1D(module.out_features, module.in_features)
        else:
            twin = nn.Linear(module.in_features, module.out_features, bias=False)
    twin.weight = weights[key]
    if not isinstance(twin, nn.Embedding):
        twin.bias = bias
    give_attributes(twin, given_attributes(module))
    return twin.train(module.training)
