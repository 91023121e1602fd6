"""What the Triton kernels share on the host: the card they run on, their registration, their arguments' checks."""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a kernel's configuration depends on."""

    multiprocessors: int
    shared_memory: int  # bytes that one block may have
    capability: int  # 80, 90, …

    @property
    def has_tensor_maps(self) -> bool:
        """Whether it copies tiles by descriptor (TMA)."""
        return self.capability >= 90


A100 = Device(multiprocessors=108, shared_memory=163 << 10, capability=80)
H200 = Device(multiprocessors=132, shared_memory=227 << 10, capability=90)
# Stands for the CPU in interpreter mode: few multiprocessors, so that a small product has several tiles for each.
INTERPRETER = Device(multiprocessors=3, shared_memory=227 << 10, capability=90)


@functools.lru_cache
def describe(device: torch.device) -> Device:
    """The card behind `device`."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin, capability)


def expect(condition: bool, op: str, message: str) -> None:
    """Raises RuntimeError unless `condition` holds; the op's own check then finds the words and the type."""
    if not condition:
        raise RuntimeError(f"{op}: {message}")


def same_device(op: str, *tensors: Tensor | None) -> None:
    """Raises RuntimeError unless all the tensors are on one device."""
    devices = {t.device for t in tensors if t is not None}
    expect(len(devices) <= 1, op, f"expected one device, got {', '.join(sorted(map(str, devices)))}")


_registered: dict[str, torch.library.Library] = {}  # a registration lasts as long as its library object


def own_cuda(op: str, function: Callable) -> None:
    """Makes `function` the owner of `engine::<op>` for CUDA; once, however often it is called."""
    if op not in _registered:
        library = torch.library.Library("engine", "IMPL")
        library.impl(op, function, "CUDA")
        _registered[op] = library
