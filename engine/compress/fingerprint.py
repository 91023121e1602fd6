"""Whether a model is the one that a file speaks of."""

import hashlib

from torch import nn

from engine._safetensors import bytes_of


def fingerprint(model: nn.Module) -> str:
    """A hash of all parameters and buffers: names, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(bytes_of(tensor))
    return digest.hexdigest()
