"""Every op on more than 2^31 elements, compared with its reference on the rows about that border.

Run with `-m slow`, one at a time: each takes up to 16 GB. What is compared are the first and the last rows, and those
where an index of 32 bits runs over.
"""

import pytest
import torch

import engine
from engine.ops import _transpose
from engine.ops._library import REFERENCES

pytestmark = pytest.mark.slow

ROWS, COLUMNS = 2**18 + 8, 8200
BORDER = 2**31 // COLUMNS
SAMPLE = torch.tensor([0, 1, BORDER // 2, BORDER - 1, BORDER, BORDER + 1, ROWS - 2, ROWS - 1])
assert ROWS * COLUMNS > 2**31 and int(SAMPLE.max()) < ROWS


def repeated(rows, columns, dtype, period=1021):
    """Random rows over and over: a wrapped index reads another column."""
    base = torch.randint(-127, 128, (period, columns), dtype=dtype) if dtype == torch.int8 else None
    base = torch.randn(period, columns).to(dtype) if base is None else base
    out = torch.empty(rows, columns, dtype=dtype)
    for begin in range(0, rows, period):
        out[begin : begin + period] = base[: rows - begin]
    return out


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


# ---- element by element -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["int8_quantize", "int8_fake_quantize", "threshold_prune", "magnitude_threshold"])
def test_by_row(op):
    arguments = {"threshold_prune": (0.5,), "magnitude_threshold": (0.5, "row")}.get(op, ())
    weight = repeated(ROWS, COLUMNS, torch.bfloat16)
    got, want = getattr(engine.ops, op)(weight, *arguments), getattr(engine.ops, op)(weight[SAMPLE], *arguments)
    with engine.reference_mode():
        assert_same(want, getattr(engine.ops, op)(weight[SAMPLE], *arguments))
    for g, w in zip(*((t if isinstance(t, tuple) else (t,)) for t in (got, want)), strict=True):
        assert_same(g[SAMPLE], w)


def test_int8_dequantize():
    q, scale = repeated(ROWS, COLUMNS, torch.int8), torch.rand(ROWS)
    got = engine.ops.int8_dequantize(q, scale, torch.bfloat16)
    assert_same(got[SAMPLE], REFERENCES["int8_dequantize"](q[SAMPLE], scale[SAMPLE], torch.bfloat16))


def test_int8_embedding():
    weight, scale = repeated(ROWS, COLUMNS, torch.int8), torch.rand(ROWS)
    want = REFERENCES["int8_embedding"](SAMPLE, weight, scale, torch.bfloat16)
    assert_same(engine.ops.int8_embedding(SAMPLE, weight, scale, torch.bfloat16), want)
    indices = SAMPLE.repeat(ROWS // len(SAMPLE))
    got = engine.ops.int8_embedding(indices, weight, scale, torch.bfloat16)
    assert_same(got[-len(SAMPLE) :], want)
    assert_same(got[BORDER : BORDER + 8], want[torch.arange(BORDER, BORDER + 8) % len(SAMPLE)])


def test_transpose():
    x = repeated(ROWS, COLUMNS, torch.bfloat16)
    assert_same(_transpose.transpose(x.unsqueeze(0))[0, :, SAMPLE], x[SAMPLE].t())


# ---- packing, and back ------------------------------------------------------------------------------------------


def bitmap_rows(rows, bitmask, row_offsets, values, *more):
    kept = [values[row_offsets[row] : row_offsets[row + 1]] for row in rows]
    offsets = torch.tensor([0, *(len(k) for k in kept)]).cumsum(0)
    return bitmask[rows], offsets, torch.cat(kept), *(t[rows] for t in more)


def csr_rows(rows, crow_indices, col_indices, values):
    _, offsets, kept = bitmap_rows(rows, crow_indices, crow_indices, values)
    return offsets, bitmap_rows(rows, crow_indices, crow_indices, col_indices)[2], kept


@pytest.mark.parametrize("op", ["prune_to_bitmap", "prune_quantize_to_bitmap"])
def test_bitmap(op):
    weight = repeated(ROWS, COLUMNS, torch.bfloat16)
    packed = getattr(engine.ops, op)(weight, 1e-4)
    assert packed[2].numel() > 2**31
    want = REFERENCES[op](weight[SAMPLE], torch.tensor(1e-4))
    for got, w in zip(bitmap_rows(SAMPLE, *packed), want, strict=True):
        assert_same(got, w)
    del weight
    dense = engine.ops.bitmap_to_dense(*packed[:3], COLUMNS)
    assert_same(dense[SAMPLE], REFERENCES["bitmap_to_dense"](*want[:3], COLUMNS))


def test_prune_to_csr():
    weight = repeated(ROWS, COLUMNS, torch.bfloat16)
    got = csr_rows(SAMPLE, *engine.ops.prune_to_csr(weight, 1.5))
    for g, w in zip(got, REFERENCES["prune_to_csr"](weight[SAMPLE], torch.tensor(1.5)), strict=True):
        assert_same(g, w.to(g.dtype))


def test_blocks():
    weight = repeated(ROWS, COLUMNS, torch.int8)
    keep = torch.ones(-(-ROWS // 32), -(-COLUMNS // 32), dtype=torch.bool)
    keep[3, 5] = False
    crow_indices, col_indices, values = engine.ops.prune_to_block(weight, keep=keep)
    assert values.numel() > 2**31
    assert_same(crow_indices, torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)).int())
    assert_same(col_indices, keep.nonzero()[:, 1].int())
    for row in SAMPLE.tolist():
        blocks = values[int(crow_indices[row // 32]) : int(crow_indices[row // 32 + 1]), row % 32]
        assert_same(blocks.reshape(-1)[: COLUMNS - 32 * (row // 32 == 3)], weight[row])
    dense = engine.ops.block_to_dense(crow_indices, col_indices, values, ROWS, COLUMNS)
    assert_same(dense[SAMPLE], weight[SAMPLE])
    assert not dense[96:128, 160:192].any()


def test_semi_structured():
    weight = repeated(ROWS, COLUMNS, torch.bfloat16)
    values, metadata = engine.ops.prune_to_semi_structured(weight)
    want = REFERENCES["prune_to_semi_structured"](weight[SAMPLE])
    assert_same(values[SAMPLE], want[0])
    assert_same(metadata[SAMPLE], want[1])
    del weight
    dense = engine.ops.semi_structured_to_dense(values, metadata, COLUMNS)
    assert_same(dense[SAMPLE], REFERENCES["semi_structured_to_dense"](*want, COLUMNS))


# ---- linear layers ----------------------------------------------------------------------------------------------

HALF_BYTES = torch.tensor([0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110], dtype=torch.uint8)


def dense_int8(n, k):
    return repeated(n, k, torch.int8), torch.rand(n)


def bitmap(n, k):
    return engine.ops.prune_to_bitmap(repeated(n, k, torch.bfloat16), 1e-4)


def bitmap_int8(n, k):
    return engine.ops.prune_quantize_to_bitmap(repeated(n, k, torch.bfloat16), 1e-4)


def csr(n, k):
    return engine.ops.prune_to_csr(repeated(n, k, torch.bfloat16), 1.5)


def blocks(n, k, dtype=torch.bfloat16):
    high, wide = -(-n // 32), -(-k // 32)
    crow_indices = torch.arange(0, high * wide + 1, wide, dtype=torch.int32)
    values = repeated(high * wide, 1024, dtype).view(-1, 32, 32)
    return crow_indices, torch.arange(wide, dtype=torch.int32).repeat(high), values


def semi_structured(n, k, dtype=torch.bfloat16):
    n = n if n * k < 2**31 else 2 * n  # values, too, are more than 2^31
    halves = HALF_BYTES[torch.randint(0, 6, (1021, -(-k // 8), 2))]
    metadata = (halves[..., 0] | halves[..., 1] << 4).repeat(-(-n // 1021), 1)[:n].contiguous()
    return repeated(n, 2 * (-(-k // 4)), dtype), metadata


def block_rows(lines, crow_indices, col_indices, values):
    wide = int(crow_indices[1])
    kept = torch.cat([values[line * wide : line * wide + wide] for line in lines])
    return torch.arange(len(lines) + 1, dtype=torch.int32) * wide, col_indices[: len(lines) * wide], kept


def chosen(rows, *tensors):
    return tuple(t[rows] for t in tensors)


# op: the weight's tensors, the same of some rows, and whether results are exact.
LINEARS = {
    "int8_linear": (dense_int8, chosen, True),
    "int8_weight_linear": (dense_int8, chosen, False),
    "bitmap_linear": (bitmap, bitmap_rows, False),
    "bitmap_int8_linear": (bitmap_int8, bitmap_rows, True),
    "csr_linear": (csr, csr_rows, False),
    "block_linear": (blocks, block_rows, False),
    "block_int8_linear": (lambda n, k: (*blocks(n, k, torch.int8), torch.rand(n)), None, True),
    "semi_structured_linear": (semi_structured, chosen, False),
    "semi_structured_int8_linear": (
        lambda n, k: (*(packed := semi_structured(n, k, torch.int8)), torch.rand(len(packed[0]))),
        chosen,
        True,
    ),
}


def call(op, x, tensors, rows):
    extra = (rows,) if op == "block_linear" else ()
    return getattr(engine.ops, op)(x, *tensors, *extra)


def some_outputs(op, tensors, n):
    """Numbers of outputs about the borders, and the weight of them alone."""
    border = 2**31 // COLUMNS
    rows = torch.tensor([0, 1, border - 1, border, border + 1, 2 * border - 1, 2 * border, n - 2, n - 1])
    rows = rows[(rows < n).nonzero()[:, 0]].unique()
    if not op.startswith("block"):
        return rows, LINEARS[op][1](rows, *tensors)
    lines = (rows // 32).unique()
    lines = lines[lines < n // 32]
    outputs = (lines.unsqueeze(1) * 32 + torch.arange(32)).flatten()
    return outputs, (*block_rows(lines, *tensors[:3]), *(t[outputs] for t in tensors[3:]))


def compare(op, got, want):
    if LINEARS[op][2]:
        return assert_same(got, want)
    torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-2 * float(want.float().abs().max()))


@pytest.mark.parametrize("op", LINEARS)
def test_large_weight(op):
    tensors = LINEARS[op][0](ROWS, COLUMNS)
    n = ROWS * (2 if op.startswith("semi") else 1)
    outputs, few = some_outputs(op, tensors, n)
    for m in (1, 5, 20, 80):
        x = torch.randn(m, COLUMNS)
        got = call(op, x, tensors, n)
        with engine.reference_mode():
            want = call(op, x, few, len(outputs))
        compare(op, got[:, outputs], want)


@pytest.mark.parametrize("op", LINEARS)
def test_large_input(op):
    tensors = LINEARS[op][0](32, COLUMNS)
    x = repeated(ROWS, COLUMNS, torch.bfloat16)
    got = call(op, x, tensors, 32)
    with engine.reference_mode():
        want = call(op, x[SAMPLE], tensors, 32)
    compare(op, got[SAMPLE], want)


@pytest.mark.parametrize("op", LINEARS)
def test_large_output(op):
    m, n, k = 2**16 + 8, 2**15 + 8, 40
    tensors = LINEARS[op][0](n, k)
    x = repeated(m, k, torch.bfloat16)
    got = call(op, x, tensors, n)
    border = 2**31 // n
    rows = torch.tensor([0, border - 1, border, border + 1, m - 1])
    with engine.reference_mode():
        want = call(op, x[rows], tensors, n)
    compare(op, got[rows], want)
