"""What `make bench-gpu` checks each op with: small and odd inputs, and their truth."""

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops._bitmap import pack_mask
from engine.ops._block import from_blocks
from engine.ops._library import REFERENCES
from engine.ops._semi_structured import spread
from engine.ops.ring_codec import wire_bytes

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 33, 384), (5, 19, 65), (16, 96, 512), (70, 50, 300), (200, 160, 256)]  # M, N, K


def bitmap(
    n: int, k: int, sparsity: float, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A random bitmap: bitmask, row_offsets, values."""
    mask = torch.rand(n, k, device=device) >= sparsity
    row_offsets = F.pad(mask.sum(1).cumsum(0), (1, 0))
    return pack_mask(mask), row_offsets, random_values((int(row_offsets[-1]),), dtype, device)


def blocks(n: int, k: int, size: int, sparsity: float, dtype: torch.dtype, device: torch.device) -> tuple:
    """A random block form: crow_indices, col_indices, values of `size` × `size`."""
    keep = torch.rand(-(-n // size), -(-k // size), device=device) >= sparsity
    return REFERENCES["prune_to_block"](random_values((n, k), dtype, device), keep, size, size)


def random_values(shape: tuple, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Standard normal floats, or any int8."""
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, dtype=torch.int8, device=device)
    return torch.randn(shape, device=device).to(dtype)


def _bitmap_dense(bitmask: Tensor, row_offsets: Tensor, values: Tensor, k: int) -> Tensor:
    return REFERENCES["bitmap_to_dense"](bitmask, row_offsets, values, k)


def check(op: str, device: torch.device, seconds: float = math.inf) -> tuple[int, int]:
    """Compares the op on `device` with its reference on small and odd inputs; returns how many, and of how many.

    They come in a random order, the same each time, until `seconds` are over. Integers, and what is only moved or
    rounded once, must be equal to the bit. A float product's error against float64 is at most twice PyTorch's own plus
    2 units in the last place.

    Raises:
        AssertionError: a result is another one.
        LookupError: there is nothing to check this op with.
    """
    began, inputs = time.monotonic(), list(_checks(op))
    random.Random(0).shuffle(inputs)
    for count, (args, dense) in enumerate(inputs):
        if time.monotonic() - began > seconds:
            return count, len(inputs)
        moved = [_moved(a, device) for a in args]
        got = getattr(torch.ops.engine, op)(*moved)
        where = f"{op} of {[list(a.shape) if isinstance(a, Tensor) else a for a in args if a is not None]}"
        if dense is None:
            want = REFERENCES[op](*args)
            if want is None:  # they write into their arguments
                got, want = (tuple(a for a in some if isinstance(a, Tensor)) for some in (moved, args))
            pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
            for have, expected in pairs:
                same = torch.equal(_bits(have.cpu()), _bits(expected))
                _expect(same, f"{where} is not equal to its reference to the bit")
        else:
            _check_product(where, got.cpu(), args[0], dense, args[-1])
    return len(inputs), len(inputs)


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:  # no assert statement, which python -O leaves out
        raise AssertionError(otherwise)


def _moved(argument: object, device: torch.device) -> object:
    if isinstance(argument, list):
        return [_moved(a, device) for a in argument]
    return argument.to(device, copy=True) if isinstance(argument, Tensor) else argument


def _bits(t: Tensor) -> Tensor:
    if not t.dtype.is_floating_point:
        return t
    t = torch.where(t.isnan(), torch.nan, t)  # a NaN equals any other
    return t.contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def _check_product(where: str, got: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None) -> None:
    truth = x.double() @ dense.double().t() + (0 if bias is None else bias.double())
    own = F.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
    truth = torch.where(x.isfinite().all(-1, keepdim=True), truth, torch.nan)
    _expect(torch.equal(got.isnan(), truth.isnan()), f"{where} has NaN in other places than it should")
    number = ~truth.isnan()
    if number.any():
        ulp = torch.finfo(x.dtype).eps * float(truth[number].abs().max())
        allowed = 2 * float((own.double() - truth)[number].abs().max()) + 2 * ulp
        error = float((got.double() - truth)[number].abs().max())
        _expect(error <= allowed, f"{where}: error {error:.3g}, allowed {allowed:.3g}")


def _checks(op: str) -> Iterator[tuple[tuple, Tensor | None]]:
    """Arguments of the op, on the CPU, and for float products the dense weight."""
    if op not in CHECKS:
        raise LookupError(f"nothing to check {op} with: add it to bench/gpu_checks.py")
    for (m, n, k), dtype in itertools.product(SHAPES, FLOATS):
        x = torch.randn(m, k).to(dtype)
        if m == 5:
            x[2, 3] = torch.nan
        yield from CHECKS[op](x, n)


def _int8_linear_checks(x: Tensor, n: int) -> Iterator:
    weight, scale, bias = random_values((n, x.shape[1]), torch.int8), torch.rand(n), torch.randn(n).bfloat16()
    yield (x, weight, scale, bias, None), None
    yield (x, weight, scale, None, torch.tensor(0.02)), None
    yield (x, weight, scale, None, _channels(x)), None


def _scaled_mm_checks(x: Tensor, n: int) -> Iterator:
    """With K as the kernel takes it: a multiple of 16."""
    q, token_scale = REFERENCES["int8_quantize"](F.pad(x, (0, -x.shape[1] % 16)))
    weight, scale = random_values((n, q.shape[1]), torch.int8), torch.rand(n)
    for bias in (None, torch.randn(n).bfloat16()):
        yield (q, token_scale, weight, scale, bias, x.dtype), None


def _channels(x: Tensor) -> Tensor:
    """A scale for each of its columns."""
    return torch.rand(x.shape[1]) / 20 + 1e-3


def _int8_weight_checks(x: Tensor, n: int) -> Iterator:
    weight, scale, bias = random_values((n, x.shape[1]), torch.int8), torch.rand(n) / 100, torch.randn(n)
    yield (x, weight, scale, bias), weight.double() * scale.double().unsqueeze(1)


def _bitmap_linear_checks(x: Tensor, n: int) -> Iterator:
    for sparsity in (0.0, 0.5, 1.0):
        kept = bitmap(n, x.shape[1], sparsity, x.dtype)
        yield (x, *kept, torch.randn(n)), _bitmap_dense(*kept, x.shape[1])


def _bitmap_int8_checks(x: Tensor, n: int) -> Iterator:
    for sparsity in (0.0, 0.5, 1.0):
        kept, channels = bitmap(n, x.shape[1], sparsity, torch.int8), _channels(x) if sparsity == 0.5 else None
        yield (x, *kept, torch.rand(n), torch.randn(n), channels), None


def _block_sizes(x: Tensor) -> tuple[int, ...]:
    """Each is a kernel to compile for: all for one dtype only."""
    return (16, 32, 128) if x.dtype == torch.bfloat16 else (32,)


def _block_checks(x: Tensor, n: int) -> Iterator:
    for size in _block_sizes(x):
        kept = blocks(n, x.shape[1], size, 0.5, x.dtype, x.device)
        yield (x, *kept, n, torch.randn(n)), from_blocks(*kept, n, x.shape[1])


def _block_int8_checks(x: Tensor, n: int) -> Iterator:
    for size in _block_sizes(x):
        channels = _channels(x) if size == 32 else None
        yield (x, *blocks(n, x.shape[1], size, 0.5, torch.int8, x.device), torch.rand(n), None, channels), None


def _semi_structured_checks(x: Tensor, n: int) -> Iterator:
    values, metadata = REFERENCES["prune_to_semi_structured"](torch.randn(n, x.shape[1]).to(x.dtype))
    yield (x, values, metadata, torch.randn(n)), spread(values, metadata)[:, : x.shape[1]]


def _semi_structured_int8_checks(x: Tensor, n: int) -> Iterator:
    values, metadata = REFERENCES["prune_to_semi_structured"](random_values((n, x.shape[1]), torch.int8).float())
    for channels in (None, _channels(x)):
        yield (x, values.to(torch.int8), metadata, torch.rand(n), torch.randn(n), channels), None


def _csr_checks(x: Tensor, n: int) -> Iterator:
    dense = torch.randn(n, x.shape[1]).where(torch.rand(n, x.shape[1]) < 0.05, 0.0).to(x.dtype)
    yield (x, *REFERENCES["prune_to_csr"](dense, torch.tensor(0.0)), torch.randn(n)), dense


def _to_dense_checks(x: Tensor) -> Iterator:
    for dtype in (x.dtype, torch.int8):
        yield (*bitmap(*x.shape, 0.5, dtype), x.shape[1]), None


def _block_to_dense_checks(x: Tensor) -> Iterator:
    for dtype in (x.dtype, torch.int8):
        yield (*blocks(*x.shape, 32, 0.5, dtype, x.device), *x.shape), None


def _semi_structured_to_dense_checks(x: Tensor) -> Iterator:
    values, metadata = REFERENCES["prune_to_semi_structured"](x.nan_to_num())
    yield (values, metadata, x.shape[1]), None
    yield (values.clamp(-100, 100).to(torch.int8), metadata, x.shape[1]), None


def _fake_quantize_checks(x: Tensor) -> Iterator:
    for scale in (None, torch.tensor(0.02)):
        yield (x, scale), None


def _encode_checks(x: Tensor) -> Iterator:
    flat = x.float().flatten()
    for codec, residual in itertools.product(("bf16", "int8"), (None, torch.randn(flat.shape))):
        wire = torch.empty(wire_bytes(codec, len(flat)), dtype=torch.uint8)
        yield (flat.clone(), residual, codec, wire), None


def _prune_encode_checks(x: Tensor) -> Iterator:
    flat = x.float().flatten()
    for residual in (None, torch.randn(flat.shape)):
        wire = torch.empty(wire_bytes("bitmap", len(flat)), dtype=torch.uint8)
        yield (flat.clone(), residual, 0.01, wire), None


def _decode_checks(x: Tensor, n: int) -> Iterator:
    for encodes in (_encode_checks, _prune_encode_checks):
        for (flat, residual, codec, wire), _ in encodes(x):
            op = "ring_encode" if isinstance(codec, str) else "ring_prune_encode"
            REFERENCES[op](flat, residual, codec, wire)
            yield (
                (wire, codec if isinstance(codec, str) else "bitmap", 1 / 3, n % 2 == 0, torch.randn(flat.shape)),
                None,
            )


def _gather_checks(x: Tensor) -> Iterator:
    bitmask, row_offsets, values = bitmap(*x.shape, 0.5, x.dtype)
    yield (x, bitmask, row_offsets, values.shape[0]), None


def _thresholds(x: Tensor) -> Iterator:
    for threshold in (torch.tensor(0.7), torch.rand(x.shape[0], 1), torch.rand(x.shape)):
        yield (x, threshold), None


CHECKS: dict[str, Callable[[Tensor, int], Iterator]] = {
    "bitmap_gather": lambda x, n: _gather_checks(x),
    "bitmap_int8_linear": _bitmap_int8_checks,
    "bitmap_linear": _bitmap_linear_checks,
    "bitmap_to_dense": lambda x, n: _to_dense_checks(x),
    "block_int8_linear": _block_int8_checks,
    "block_linear": _block_checks,
    "csr_linear": _csr_checks,
    "block_to_dense": lambda x, n: _block_to_dense_checks(x),
    "int8_dequantize": lambda x, n: (((*REFERENCES["int8_quantize"](x), d), None) for d in FLOATS),
    "int8_embedding": lambda x, n: (
        ((torch.randint(0, len(x), (n,)), random_values(x.shape, torch.int8), torch.rand(len(x)), d), None)
        for d in FLOATS
    ),
    "int8_fake_quantize": lambda x, n: _fake_quantize_checks(x),
    "int8_linear": _int8_linear_checks,
    "int8_quantize": lambda x, n: [((x,), None)],
    "int8_scaled_mm": _scaled_mm_checks,
    "int8_weight_linear": _int8_weight_checks,
    "magnitude_threshold": lambda x, n: (((x.nan_to_num(), s, w), None) for s in (0.3, 0.9) for w in ("tensor", "row")),
    "magnitude_threshold_of_list": lambda x, n: [(([x.nan_to_num(), torch.randn(n, 3)], 0.5), None)],
    "prune_quantize_to_bitmap": lambda x, n: _thresholds(x),
    "prune_to_bitmap": lambda x, n: _thresholds(x),
    "prune_to_block": lambda x, n: [((x, torch.rand(-(-x.shape[0] // 16), -(-x.shape[1] // 32)) < 0.5, 16, 32), None)],
    "prune_to_csr": lambda x, n: _thresholds(x),
    "prune_to_semi_structured": lambda x, n: [((x,), None)],
    "ring_decode": _decode_checks,
    "ring_encode": lambda x, n: _encode_checks(x),
    "ring_prune_encode": lambda x, n: _prune_encode_checks(x),
    "semi_structured_int8_linear": _semi_structured_int8_checks,
    "semi_structured_linear": _semi_structured_checks,
    "semi_structured_to_dense": lambda x, n: _semi_structured_to_dense_checks(x),
    "threshold_prune": lambda x, n: _thresholds(x),
}
