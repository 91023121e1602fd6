"""What `make bench-gpu` times: for each op the shapes and the peers."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import ops
from engine.bench.common import rotated
from engine.bench.gpu_checks import bitmap, blocks, random_values
from engine.bench.peers import first_line, say_absent
from engine.ops._library import REFERENCES
from engine.ops._semi_structured import spread
from engine.ops.ring_codec import wire_bytes

BEYOND = 192 << 20  # bytes that rotated buffers take together: an H200's L2 cache has 50 MiB
LARGE = 8192
Functions = dict[str, Callable[[int], object]]
EAGER = frozenset(("kthvalue", "torch 2:4, its pattern given", "CSR matmul fp32", "cuSPARSELt"))
EAGER |= {"torchao int8 weight", "bitsandbytes"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of one op.

    Attributes:
        words: the shape in words.
        functions: by name; our own is the first. Each takes the number of its call, to pick a rotated buffer.
        moved: bytes that have to be read and written.
        operations: multiplications and additions.
        arithmetic: whose rate bounds those, "int8" or "bf16".
        goals: how many times as fast as which peer it should be.
        capture: whether it goes into a CUDA graph; an op that waits to know its result's size can't.
        eager: peers that no graph can hold, or may: their calls are made one by one.
    """

    words: str
    functions: Functions
    moved: int
    operations: int = 0
    arithmetic: str = "int8"
    goals: dict[str, float] = dataclasses.field(default_factory=dict)
    capture: bool = True
    eager: frozenset[str] = EAGER


def cases(op: str, device: torch.device, small: bool = False) -> Iterator[Case]:
    """The shapes at which the op is timed; `small` ones to try the code out. None for ops that only gradients need."""
    return CASES[op](op, device, 256 if small else LARGE) if op in CASES else iter(())


def _turn(items: list) -> Callable[[int], Tensor]:
    return lambda i: items[i % len(items)]


def _weights(n: int, k: int, dtype: torch.dtype, device: torch.device) -> Callable[[int], Tensor]:
    return _turn(rotated(lambda: random_values((n, k), dtype, device), n * k * dtype.itemsize, BEYOND))


def _packing(op: str, device: torch.device, n: int) -> Iterator[Case]:
    """Ops that read a bf16 weight once."""
    w, half = _weights(n, n, torch.bfloat16, device), 0.6745  # the median of |w|
    threshold, read, kept = torch.tensor(half, device=device), 2 * n * n, n * n // 2
    peers: Functions = {"clone": lambda i: w(i).clone()}
    dense_csr = "where + to_sparse_csr"
    own: Callable[[int], object] = lambda i: getattr(torch.ops.engine, op)(w(i), threshold)  # noqa: E731
    goals, written, capture = {"clone": 1 / 1.5}, 0, False
    if op == "prune_to_bitmap":
        goals, written = {"clone": 1 / 0.95, dense_csr: 20.0}, n * n // 8 + 2 * kept
    elif op == "prune_to_csr":
        written = 6 * kept
    elif op == "prune_quantize_to_bitmap":
        goals, written = {}, n * n // 8 + kept
    elif op == "threshold_prune":
        goals, written, capture = {}, 2 * n * n, True
        peers["where"] = lambda i: torch.where(w(i).abs() > half, w(i), 0)
    elif op == "magnitude_threshold":
        goals, capture = {}, True
        own = lambda i: torch.ops.engine.magnitude_threshold(w(i), 0.5, "tensor")  # noqa: E731
        peers["kthvalue"] = lambda i: w(i).abs().flatten().kthvalue(kept)
    elif op == "prune_to_semi_structured":
        goals, written, capture = {}, n * n + n * n // 8, True
        own = lambda i: ops.prune_to_semi_structured(w(i))  # noqa: E731
        peers["torch 2:4, its pattern given"] = lambda i: torch.sparse.to_sparse_semi_structured(w(i))
    elif op == "prune_to_block":
        keep = torch.rand(n // 128, n // 128, device=device) < 0.5
        goals, written = {}, n * n
        own = lambda i: torch.ops.engine.prune_to_block(w(i), keep, 128, 128)  # noqa: E731
    if op in ("prune_to_bitmap", "prune_to_csr"):
        peers[dense_csr] = lambda i: torch.where(w(i).abs() > half, w(i), 0).to_sparse_csr()
    yield Case(f"bf16 {n}²", {op: own, **peers}, read + written, goals=goals, capture=capture)


def _rows(op: str, device: torch.device, n: int) -> Iterator[Case]:
    """Ops that go over rows once: what they read and write is what they cost."""
    x = _weights(n, n, torch.bfloat16, device)
    clone: Functions = {"clone": lambda i: x(i).clone()}
    if op == "int8_quantize":
        yield Case(f"bf16 {n}²", {op: lambda i: ops.int8_quantize(x(i)), **clone}, 3 * n * n, goals={"clone": 1 / 0.85})
    elif op == "int8_fake_quantize":
        yield Case(f"bf16 {n}²", {op: lambda i: ops.int8_fake_quantize(x(i)), **clone}, 4 * n * n)
    else:
        q, scale = _weights(n, n, torch.int8, device), torch.rand(n, device=device)
        own = lambda i: ops.int8_dequantize(q(i), scale, torch.bfloat16)  # noqa: E731
        yield Case(f"to bf16, {n}²", {op: own, **clone}, 3 * n * n)


def _to_dense(op: str, device: torch.device, n: int) -> Iterator[Case]:
    """A bf16 weight of which half is kept, spread. They wait for the word that it was consistent."""
    x = _weights(n, n, torch.bfloat16, device)
    if op == "bitmap_to_dense":
        kept = bitmap(n, n, 0.5, torch.bfloat16, device)
        own: Callable[[int], object] = lambda i: ops.bitmap_to_dense(*kept, n)  # noqa: E731
    elif op == "block_to_dense":
        kept = blocks(n, n, 32, 0.5, torch.bfloat16, device)
        own = lambda i: ops.block_to_dense(*kept, n, n)  # noqa: E731
    else:
        kept = REFERENCES["prune_to_semi_structured"](x(0))
        own = lambda i: ops.semi_structured_to_dense(*kept, n)  # noqa: E731
    moved = 2 * n * n + sum(t.numel() * t.itemsize for t in kept)
    yield Case(f"bf16 {n}², 50 % pruned", {op: own, "clone": lambda i: x(i).clone()}, moved, capture=False)


def _embedding(op: str, device: torch.device, n: int) -> Iterator[Case]:
    rows, dim, count = 4 * n, n // 2, n
    table, half = random_values((rows, dim), torch.int8, device), torch.randn(rows, dim, device=device).bfloat16()
    scale, indices = torch.rand(rows, device=device), torch.randint(0, rows, (8, count), device=device)
    functions: Functions = {
        op: lambda i: ops.int8_embedding(indices[i % 8], table, scale, torch.bfloat16),
        "F.embedding bf16": lambda i: F.embedding(indices[i % 8], half),
    }
    yield Case(f"{count} of {rows} rows of {dim}", functions, 3 * count * dim)


def _csr(op: str, device: torch.device, n: int) -> Iterator[Case]:
    """At 97 %, beside cuSPARSE, which takes x as columns and must be of one dtype."""
    mask = torch.rand(n, n, device=device) < 0.03
    dense = torch.randn(n, n, device=device).where(mask, 0.0)
    crow, col, values = REFERENCES["prune_to_csr"](dense, torch.tensor(0.0, device=device))
    csr, half = torch.sparse_csr_tensor(crow, col, values, dense.shape), values.bfloat16()
    size = half.numel() * (half.itemsize + col.itemsize)
    for m in (1, 16, 256):
        x, peers = _bf16(m, n, n, device)
        own = lambda i, x=x: ops.csr_linear(x, crow, col, half)  # noqa: E731
        peers["CSR matmul fp32"] = lambda i, x=x: csr @ x.t().float()
        yield Case(f"M {m}, {n}², 97 % pruned", {op: own, **peers}, size + 4 * m * n, 2 * m * half.numel(), "bf16")


def _codec(op: str, device: torch.device, n: int) -> Iterator[Case]:
    """A gradient of n² float32; "bitmap" sends one element in a hundred."""
    size = n * n
    x, residual, out = (torch.randn(size, device=device) for _ in range(3))
    for codec in ("bitmap",) if op == "ring_prune_encode" else ("bf16", "int8"):
        wire = torch.empty(wire_bytes(codec, size), dtype=torch.uint8, device=device)
        if op == "ring_decode":
            ops.ring_encode(x, None, codec, wire)
            own: Callable[[int], object] = lambda i, w=wire, c=codec: ops.ring_decode(w, c, out)  # noqa: E731
            moved = 4 * size + wire.numel()
        elif op == "ring_encode":
            own = lambda i, w=wire, c=codec: ops.ring_encode(x, residual, c, w)  # noqa: E731
            moved = 12 * size + wire.numel()
        else:
            own = lambda i, w=wire: ops.ring_prune_encode(x, residual, 0.01, w)  # noqa: E731
            moved = 16 * size + wire.numel()
        yield Case(f"{codec}, {size}", {op: own, "copy": lambda i: out.copy_(x)}, moved)


def _bf16(m: int, n: int, k: int, device: torch.device) -> tuple[Tensor, Functions]:
    """Activations, and cuBLAS's product with a dense bf16 weight."""
    x, weight = torch.randn(m, k, device=device).bfloat16(), _weights(n, k, torch.bfloat16, device)
    return x, {"cuBLAS bf16": lambda i: F.linear(x, weight(i))}


def _int8_peers(x: Tensor, weight: Callable[[int], Tensor], scale: Tensor) -> Functions:
    """The integer and 8-bit float products of PyTorch, quantisation of the rows included as in our own."""
    found: Functions = {}

    def int_mm(i: int) -> Tensor:
        q, s = ops.int8_quantize(x)
        return (torch._int_mm(q, weight(i).t()).float() * (s.unsqueeze(1) * scale)).to(x.dtype)

    def scaled_mm(i: int) -> Tensor:
        amax = x.abs().amax(1, keepdim=True).float()
        q = (x * (448 / amax)).to(torch.float8_e4m3fn)
        return eight_bit(q, i, amax / 448)

    def eight_bit(q: Tensor, i: int, s: Tensor) -> Tensor:
        how = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        return torch._scaled_mm(q, eights(i).t(), s, scale.unsqueeze(0), **how)

    if x.device.type == "cuda":
        n, k = weight(0).shape
        make = lambda: torch.randn(n, k, device=x.device).to(torch.float8_e4m3fn)  # noqa: E731
        eights = _turn(rotated(make, n * k, BEYOND))
        q8, ones = x.to(torch.float8_e4m3fn), torch.ones(x.shape[0], 1, device=x.device)
        found["FP8 _scaled_mm alone"] = lambda i: eight_bit(q8, i, ones)
        found["FP8 with quantisation, not fused"] = scaled_mm
    found["_int_mm + scale"] = int_mm
    return found


def _int8_linear(op: str, device: torch.device, n: int) -> Iterator[Case]:
    shapes = [(n, n, n), (1, n, n), (16, n, n)]
    if n == LARGE:
        shapes += [(m, 5120, 13824) for m in (64, 128, 256)] + [(4096, 4096, 4096)]
    for m, outputs, k in shapes:
        x, peers = _bf16(m, outputs, k, device)
        weight, scale = _weights(outputs, k, torch.int8, device), torch.rand(outputs, device=device)
        own = lambda i, x=x, w=weight, s=scale: ops.int8_linear(x, w(i), s)  # noqa: E731
        goals = {"cuBLAS bf16": 1.6, "_int_mm + scale": 1.1, "FP8 _scaled_mm alone": 0.95} if m == LARGE else {}
        if 64 <= m <= 256:
            goals = {"cuBLAS bf16": 1.5, "_int_mm + scale": 1.8}
        functions = {op: own, **peers, **_int8_peers(x, weight, scale)}
        moved = outputs * k + 2 * m * (k + outputs)
        yield Case(f"M {m}, N {outputs}, K {k}", functions, moved, 2 * m * outputs * k, goals=goals)


def _int8_weight_linear(op: str, device: torch.device, n: int) -> Iterator[Case]:
    for m in (1, 2, 4, 8, 16, 512):
        x, peers = _bf16(m, n, n, device)
        weight, scale = _weights(n, n, torch.int8, device), torch.rand(n, device=device)
        own = lambda i, x=x, w=weight, s=scale: ops.int8_weight_linear(x, w(i), s)  # noqa: E731
        functions = {op: own, **peers, **_torchao(n, device, x), **_bitsandbytes(n, device, x)}
        goals = {"cuBLAS bf16": 1.85} if m <= 16 else {}
        yield Case(f"M {m}, {n}²", functions, n * n + 4 * m * n, 2 * m * n * n, "bf16", goals)


def _torchao(n: int, device: torch.device, x: Tensor) -> Functions:
    try:  # not only an ImportError: of another version it may fail anywhere
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        linear = torch.nn.Sequential(torch.nn.Linear(n, n, bias=False, device=device, dtype=torch.bfloat16))
        quantize_(linear, Int8WeightOnlyConfig())
    except Exception as error:
        say_absent("torchao int8 weight", first_line(error))
        return {}
    return {"torchao int8 weight": lambda i: linear(x)}


def _bitsandbytes(n: int, device: torch.device, x: Tensor) -> Functions:
    try:
        import bitsandbytes

        linear = bitsandbytes.nn.Linear8bitLt(n, n, bias=False, has_fp16_weights=False).to(device)
    except Exception as error:
        say_absent("bitsandbytes", first_line(error))
        return {}
    half = x.half()
    return {"bitsandbytes": lambda i: linear(half)}


def _bitmap_linear(op: str, device: torch.device, n: int) -> Iterator[Case]:
    dtype = torch.int8 if op == "bitmap_int8_linear" else torch.bfloat16
    goals = {0.5: 1.5, 0.7: 2.2, 0.8: 2.8} if dtype != torch.int8 else {0.5: 2.5, 0.8: 4.0}
    scale = (torch.rand(n, device=device),) if dtype == torch.int8 else ()
    for sparsity in (0.5, 0.7, 0.8):
        kept = bitmap(n, n, sparsity, dtype, device)
        size = sum(t.numel() * t.itemsize for t in kept)
        maps = _turn(rotated(lambda kept=kept: [t.clone() for t in kept], size, BEYOND))
        for m in (1, 4, 16, 1024):
            x, peers = _bf16(m, n, n, device)
            own = lambda i, x=x, maps=maps: getattr(ops, op)(x, *maps(i), *scale)  # noqa: E731
            if sparsity == 0.8 and m == 16:
                bits, offsets, values = kept
                csr = ops.bitmap_to_dense(bits, offsets, values.to(torch.float32), n).to_sparse_csr()
                peers["CSR matmul fp32"] = lambda i, csr=csr, x=x: csr @ x.t().float()
            goal = {"cuBLAS bf16": goals[sparsity]} if m <= 16 and sparsity in goals else {}
            if m == 1024:
                goal = {"cuBLAS bf16": 0.9}
            arithmetic = "int8" if dtype == torch.int8 else "bf16"
            words = f"M {m}, {n}², {sparsity:.0%} pruned"
            yield Case(words, {op: own, **peers}, size + 4 * m * n, 2 * m * n * n, arithmetic, goal)


def _block_linear(op: str, device: torch.device, n: int) -> Iterator[Case]:
    dtype = torch.int8 if op == "block_int8_linear" else torch.bfloat16
    scale, weight = torch.rand(n, device=device), _weights(n, n, dtype, device)
    size = 128 if n % 128 == 0 else 32
    for sparsity, m in itertools.product((0.5, 0.75), (n, 16)):
        x, peers = _bf16(m, n, n, device)
        kept = blocks(n, n, size, sparsity, dtype, device)
        share = kept[2].numel() / (n * n)
        if dtype == torch.int8:
            own = lambda i, x=x, kept=kept: ops.block_int8_linear(x, *kept, scale)  # noqa: E731
            peers["own int8_linear"] = lambda i, x=x: ops.int8_linear(x, weight(i), scale)
        else:
            own = lambda i, x=x, kept=kept: ops.block_linear(x, *kept, n)  # noqa: E731
        goals = {"own int8_linear": 0.85 / (1 - sparsity)} if m == n else {}
        moved, operations = int(share * n * n * dtype.itemsize) + 4 * m * n, int(share * 2 * m * n * n)
        words = f"M {m}, {n}², {sparsity:.0%} of {size}×{size} pruned"
        yield Case(words, {op: own, **peers}, moved, operations, "int8" if dtype == torch.int8 else "bf16", goals)


def _semi_structured(op: str, device: torch.device, n: int) -> Iterator[Case]:
    int8 = op == "semi_structured_int8_linear"
    for k in sorted({n // 2, n}):
        x, peers = _bf16(k, k, k, device)
        scale, weight = torch.rand(k, device=device), _weights(k, k, torch.int8, device)
        values, metadata = REFERENCES["prune_to_semi_structured"](torch.randn(k, k, device=device).bfloat16())
        half = spread(values, metadata)
        if int8:
            values = random_values(tuple(values.shape), torch.int8, device)
            own = lambda i, x=x, v=values, d=metadata, s=scale: ops.semi_structured_int8_linear(x, v, d, s)  # noqa: E731
            peers["own int8_linear"] = lambda i, x=x, w=weight, s=scale: ops.int8_linear(x, w(i), s)
        else:
            own = lambda i, x=x, v=values, d=metadata: ops.semi_structured_linear(x, v, d)  # noqa: E731
        peers.update(_cusparselt(x, half, int8))
        goals = {"own int8_linear": 1.4, "cuSPARSELt": 0.95} if int8 else {"cuSPARSELt": 0.95}
        moved = values.numel() * values.itemsize + metadata.numel() + 4 * k * k
        operations = k**3  # the half of them that is left
        yield Case(f"{k}³", {op: own, **peers}, moved, operations, "int8" if int8 else "bf16", goals)


def _cusparselt(x: Tensor, dense: Tensor, int8: bool) -> Functions:
    """PyTorch's 2:4 product; for int8 of quantised activations and without the scales, in its favour."""
    try:
        if int8:
            q = (dense * 20).clamp(-127, 127).to(torch.int8)
            sparse, activations = torch.sparse.to_sparse_semi_structured(q), (x * 20).to(torch.int8)
        else:
            sparse, activations = torch.sparse.to_sparse_semi_structured(dense), x
        with contextlib.suppress(Exception):  # the fastest of its algorithms, where it can be asked for
            sparse.alg_id_cusparselt = torch._cslt_sparse_mm_search(sparse.packed, activations.t())
    except Exception as error:
        say_absent("cuSPARSELt", first_line(error))
        return {}
    return {"cuSPARSELt": lambda i: torch.mm(sparse, activations.t())}


CASES: dict[str, Callable[[str, torch.device, int], Iterator[Case]]] = {  # in the order in which they are timed
    "int8_linear": _int8_linear,
    **dict.fromkeys(("bitmap_int8_linear", "bitmap_linear"), _bitmap_linear),
    **dict.fromkeys(("semi_structured_int8_linear", "semi_structured_linear"), _semi_structured),
    **dict.fromkeys(("block_int8_linear", "block_linear"), _block_linear),
    "int8_weight_linear": _int8_weight_linear,
    **dict.fromkeys(("int8_quantize", "int8_fake_quantize", "int8_dequantize"), _rows),
    **dict.fromkeys(("prune_to_bitmap", "prune_quantize_to_bitmap", "prune_to_csr", "threshold_prune"), _packing),
    **dict.fromkeys(("magnitude_threshold", "prune_to_semi_structured", "prune_to_block"), _packing),
    "int8_embedding": _embedding,
    "csr_linear": _csr,
    **dict.fromkeys(("ring_encode", "ring_decode", "ring_prune_encode"), _codec),
    **dict.fromkeys(("bitmap_to_dense", "block_to_dense", "semi_structured_to_dense"), _to_dense),
}
