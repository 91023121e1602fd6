"""Whether a model is the one that a file speaks of."""

import hashlib

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """A hash of all parameters and buffers: names, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()
