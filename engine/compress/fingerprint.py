"""Whether a model is the one that a file speaks of."""

import hashlib

import torch
from torch import Tensor, nn

from engine._safetensors import bytes_of


def fingerprint(model: nn.Module) -> str:
    """A hash of what the model saves: names, dtypes, shapes and bits. Of sparse and lazy tensors names alone."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        lazy = (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)
        if not isinstance(tensor, Tensor) or isinstance(tensor, lazy) or tensor.layout != torch.strided:
            continue
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(bytes_of(tensor))
    return digest.hexdigest()
