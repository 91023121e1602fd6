"""Formats: dense and back, linear against the dense formula, what they count, what they refuse."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.formats import Bitmap, Block, Csr, DenseInt8, SemiStructured
from engine.ops._block import block_norms
from engine.ops._library import reference_mode

MAKERS = {
    "dense int8": lambda w: DenseInt8.from_dense(w),
    "dense int8 static": lambda w: DenseInt8.from_dense(w, "static", 0.03),
    "dense int8 weights only": lambda w: DenseInt8.from_dense(w, "none"),
    "bitmap": lambda w: Bitmap.from_dense(w, 0.5),
    "bitmap bfloat16": lambda w: Bitmap.from_dense(w, 0.5, torch.bfloat16),
    "bitmap int8": lambda w: Bitmap.from_dense(w, 0.5, torch.int8),
    "bitmap int8 static": lambda w: Bitmap.from_dense(w, 0.5, torch.int8, input_scale=0.03),
    "csr": lambda w: Csr.from_dense(w, 0.5),
    "dense int8 by channel": lambda w: DenseInt8.from_dense(w, "static", torch.linspace(0.02, 0.05, w.shape[1])),
    "bitmap int8 by channel": lambda w: Bitmap.from_dense(w, 0.5, torch.int8, torch.linspace(0.02, 0.05, w.shape[1])),
    "2:4": lambda w: SemiStructured.from_dense(w),
    "2:4 bfloat16": lambda w: SemiStructured.from_dense(w, torch.bfloat16),
    "2:4 int8": lambda w: SemiStructured.from_dense(w, torch.int8),
    "2:4 int8 by channel": lambda w: SemiStructured.from_dense(w, torch.int8, torch.linspace(0.02, 0.05, w.shape[1])),
    "block int8 by channel": lambda w: Block.from_dense(w, 1.0, torch.int8, torch.linspace(0.02, 0.05, w.shape[1])),
    "2:4 int8 static": lambda w: SemiStructured.from_dense(w, torch.int8, input_scale=0.03),
    "block": lambda w: Block.from_dense(w, 1.0),
    "block bfloat16": lambda w: Block.from_dense(w, 1.0, torch.bfloat16, block_shape=(16, 48)),
    "block int8": lambda w: Block.from_dense(w, 1.0, torch.int8),
    "block int8 static": lambda w: Block.from_dense(w, 1.0, torch.int8, input_scale=0.03),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("shape", [(40, 65), (33, 384), (1, 1)])
def test_linear_multiplies_by_the_dense_weight(make, shape):
    format = make(torch.randn(shape))
    dense = format.to_dense()
    x, bias = torch.randn(3, 2, shape[1]), torch.randn(shape[0])
    truth = F.linear(x.double(), dense.double(), bias.double())
    error = (format.linear(x, bias).double() - truth).norm() / truth.norm()
    quantised = getattr(format, "scale", None) is not None and getattr(format, "quantize_input", True)
    assert error < (0.03 if quantised else 1e-5)  # activations to int8 cost under a hundredth, static a little more
    assert format.linear(x).shape == (3, 2, shape[0])


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_sum_of_nothing_is_no_negative_zero(make, rows):
    format = make(torch.tensor([[2.0], [0.0], [-0.0], [-2.0]]))
    x = torch.linspace(-1, 1, rows).unsqueeze(1)
    y = format.linear(x)
    with reference_mode():
        assert torch.equal(y.signbit() & (y == 0), torch.zeros_like(y, dtype=torch.bool))
        assert torch.equal(format.linear(x).signbit(), y.signbit())


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_shapes_go_through_without_data(make):
    format = make(torch.randn(40, 65))
    mode = FakeTensorMode()
    for convert in (lambda t: t.to("meta"), mode.from_tensor):
        tensors = {
            name: convert(value) if isinstance(value, torch.Tensor) else value for name, value in vars(format).items()
        }
        shapes = type(format)(**tensors)
        dense = shapes.to_dense(torch.bfloat16)
        assert dense.shape == (40, 65) and dense.dtype == torch.bfloat16 and dense.device == shapes.values.device
        y = shapes.linear(convert(torch.randn(3, 65)), convert(torch.randn(40)))
        assert y.shape == (3, 40) and y.device == shapes.values.device


def test_lossless_formats_give_the_weight_back():
    weight = torch.randn(31, 77)
    pruned = torch.where(weight.abs() > 0.5, weight, 0.0)
    assert torch.equal(Bitmap.from_dense(weight, 0.5).to_dense(), pruned)
    assert torch.equal(Csr.from_dense(weight, 0.5).to_dense(), pruned)
    assert torch.equal(Bitmap.from_dense(weight, 0.5, torch.bfloat16).to_dense(), pruned.bfloat16().float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scale", [None, torch.tensor([0.1, 0.2, 0.1])])
@pytest.mark.parametrize(
    "make",
    [
        lambda w, scale: DenseInt8.from_dense(w, scale=scale),
        lambda w, scale: Bitmap.from_dense(w, 0.5, torch.int8, scale=scale),
        lambda w, scale: SemiStructured.from_dense(w, torch.int8, scale=scale),
        lambda w, scale: Block.from_dense(w, 0.5, torch.int8, scale=scale),
    ],
)
def test_what_is_not_a_number_makes_its_row_none(make, scale, bad):
    weight = torch.randn(3, 40) + 5
    clean = make(weight.clone(), scale)
    weight[1, 4] = bad
    format = make(weight, scale)
    assert format.scale.isnan().tolist() == [False, True, False]
    assert torch.equal(format.to_dense()[::2], clean.to_dense()[::2])
    with pytest.raises(ValueError, match="scale: expected finite numbers above 0"):
        format.check()


@pytest.mark.parametrize("values", [torch.int32, torch.float64, torch.uint8, "int8"])
def test_values_of_other_dtypes_are_refused(values):
    for make in (
        lambda: Bitmap.from_dense(torch.randn(4, 64), 0.5, values),
        lambda: SemiStructured.from_dense(torch.randn(4, 64), values),
        lambda: Block.from_dense(torch.randn(4, 64), 0.5, values),
    ):
        with pytest.raises(TypeError, match="values: expected a float32, float16, bfloat16 or int8 dtype, got"):
            make()


def test_int8_is_within_half_a_step():
    weight = torch.randn(31, 77)
    half_step = weight.abs().amax(-1, keepdim=True) / 127 / 2 * 1.0001
    assert ((DenseInt8.from_dense(weight).to_dense() - weight).abs() <= half_step).all()
    kept = weight.abs() > 0.5
    bitmap = Bitmap.from_dense(weight, 0.5, torch.int8).to_dense()
    assert ((bitmap - weight).abs() <= half_step)[kept].all() and not bitmap[~kept].any()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_shape_bytes_sparsity(make):
    weight = torch.randn(64, 200)
    format = make(weight)
    tensors = [getattr(format, name) for name in format.TENSORS]
    assert format.shape == (64, 200)
    assert format.nbytes == sum(t.untyped_storage().nbytes() for t in tensors if t is not None)
    if isinstance(format, SemiStructured):
        assert format.sparsity == 0.5
    elif isinstance(format, Block):
        high, wide = format.values.shape[1:]
        pruned = (block_norms(weight, (high, wide)) <= 1.0).repeat_interleave(high, 0).repeat_interleave(wide, 1)
        assert format.sparsity == pytest.approx(pruned[:64, :200].float().mean().item())
    else:
        pruned = not isinstance(format, DenseInt8)
        assert format.sparsity == pytest.approx((weight.abs() <= 0.5).float().mean().item() if pruned else 0.0)
    format.check()


def test_csr_is_torch_csr():
    weight = torch.where(torch.rand(20, 30) < 0.1, torch.randn(20, 30), 0.0)
    ours, theirs = Csr.from_dense(weight, 0.0), weight.to_sparse_csr()
    assert torch.equal(ours.to_sparse_csr().to_dense(), weight)
    assert torch.equal(ours.col_indices, theirs.col_indices().to(ours.col_indices.dtype))
    again = Csr.from_sparse_csr(theirs)
    again.check()
    assert torch.equal(again.to_dense(), weight)


def damaged_bitmaps():
    fresh = lambda: Bitmap.from_dense(torch.randn(9, 21), 0.5, torch.int8)  # noqa: E731

    def change(field, function):
        format = fresh()
        setattr(format, field, function(getattr(format, field).clone()))
        return format

    def flip(mask):
        mask[3, 1] ^= 4
        return mask

    def padding(mask):
        mask[3, 2] |= 128
        return mask

    def offset(offsets):
        offsets[4] += 1
        return offsets

    yield "bit flipped", change("bitmask", flip)
    yield "padding bit set", change("bitmask", padding)
    yield "offset moved", change("row_offsets", offset)
    yield "offsets short", change("row_offsets", lambda t: t[:-1])
    yield "offsets negative", change("row_offsets", lambda t: -t)
    yield "values short", change("values", lambda t: t[:-1])
    yield "values long", change("values", lambda t: torch.cat([t, t[:1]]))
    yield "scale NaN", change("scale", lambda t: t * torch.nan)
    yield "scale missing", change("scale", lambda t: None)
    yield "scale of another length", change("scale", lambda t: t[:-1])
    yield "bitmask narrow", change("bitmask", lambda t: t[:, :-1].contiguous())
    yield "values of another dtype", change("values", lambda t: t.int())


@pytest.mark.parametrize(("what", "format"), list(damaged_bitmaps()), ids=lambda p: p if isinstance(p, str) else "")
def test_check_refuses_damage(what, format):
    with pytest.raises((ValueError, TypeError), match=r"engine\.formats\.Bitmap: "):
        format.check()


def test_semi_structured_keeps_the_two_largest_and_loses_nothing_of_them():
    weight = torch.randn(31, 77)
    groups = torch.nn.functional.pad(weight, (0, 3)).reshape(31, 20, 4)
    keep = groups.abs() >= groups.abs().topk(2).values[..., 1:]
    pruned = torch.where(keep, groups, 0.0).reshape(31, 80)[:, :77]
    format = SemiStructured.from_dense(weight)
    assert torch.equal(format.to_dense(), pruned)
    assert torch.equal(SemiStructured.from_dense(pruned).to_dense(), pruned)
    half_step = pruned.abs().amax(-1, keepdim=True) / 127 / 2 * 1.0001
    assert ((SemiStructured.from_dense(weight, torch.int8).to_dense() - pruned).abs() <= half_step).all()


def test_block_keeps_whole_blocks():
    weight = torch.randn(70, 130)
    keep = block_norms(weight) > 1.0
    inside = keep.repeat_interleave(32, 0).repeat_interleave(32, 1)[:70, :130]
    pruned = torch.where(inside, weight, 0.0)
    assert torch.equal(Block.from_dense(weight, 1.0).to_dense(), pruned)
    half_step = pruned.abs().amax(-1, keepdim=True) / 127 / 2 * 1.0001
    assert ((Block.from_dense(weight, 1.0, torch.int8).to_dense() - pruned).abs() <= half_step).all()
    whole = Block.from_dense(weight[:64, :128], 1.0)
    bsr = torch.sparse_bsr_tensor(whole.crow_indices, whole.col_indices, whole.values, (64, 128))
    assert torch.equal(bsr.to_dense(), whole.to_dense())


DAMAGED = {
    "2:4 places": (SemiStructured, "metadata", (3, 1), 0),
    "2:4 padding": (SemiStructured, "metadata", (3, 2), 0xE4),
    "2:4 value beyond K": (SemiStructured, "values", (3, -1), 5),
    "2:4 scale": (SemiStructured, "scale", 2, torch.inf),
    "block column": (Block, "col_indices", 0, 7),
    "block column negative": (Block, "col_indices", 0, -1),
    "block columns descend": (Block, "col_indices", 1, 0),
    "block offset": (Block, "crow_indices", 1, 99),
    "block first offset": (Block, "crow_indices", 0, 1),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_check_refuses_other_damage(case):
    kind, field, index, value = DAMAGED[case]
    weight = torch.randn(40, 65 if kind is Block else 17)
    how = {"threshold": 0.0} if kind is Block else {}
    format = kind.from_dense(weight, values=torch.int8, **how)
    damaged = getattr(format, field).clone()
    damaged[index] = value
    setattr(format, field, damaged)
    with pytest.raises(ValueError, match=rf"engine\.formats\.{kind.__name__}: {field}"):
        format.check()


def test_check_refuses_damaged_csr():
    format = Csr.from_dense(torch.randn(9, 21), 0.5)
    for field, value in (("col_indices", 21), ("col_indices", -1), ("crow_indices", 10**6)):
        tensor = getattr(format, field).clone()
        tensor[2] = value
        damaged = Csr(**{**vars(format), field: tensor})
        with pytest.raises(ValueError, match=f"{field}: expected"):
            damaged.check()


def test_bad_arguments():
    weight = torch.randn(4, 8)
    with pytest.raises(ValueError, match="input_scale goes with activation='static'"):
        DenseInt8.from_dense(weight, "static")
    with pytest.raises(ValueError, match="activation: expected one of"):
        DenseInt8.from_dense(weight, "sometimes")
    with pytest.raises(ValueError, match=r"input_scale goes with values=torch\.int8"):
        Bitmap.from_dense(weight, 0.5, input_scale=0.1)
    with pytest.raises(TypeError, match=r"Block: block_shape: expected two ints, got 32"):
        Block.from_dense(weight, 0.5, torch.int8, block_shape=32)
    for shape in ((8,), (2, 4, 8)):
        with pytest.raises(ValueError, match=r"DenseInt8: weight: expected shape \[N, K\]"):
            DenseInt8.from_dense(torch.randn(shape))


@pytest.mark.parametrize("scale", [0.0, -1.0, torch.nan, torch.inf, 1e39, 1e-45, torch.tensor([1.0] * 7 + [0.0])])
@pytest.mark.parametrize(
    "make",
    [
        lambda w, scale: DenseInt8.from_dense(w, "static", scale),
        lambda w, scale: Bitmap.from_dense(w, 0.5, torch.int8, scale),
        lambda w, scale: SemiStructured.from_dense(w, torch.int8, scale),
        lambda w, scale: Block.from_dense(w, 0.5, torch.int8, scale),
    ],
)
def test_input_scales_that_would_make_all_nan_are_refused(make, scale):
    with pytest.raises(ValueError, match=r"input_scale: expected numbers above 0"):
        make(torch.randn(4, 8), scale)


def test_indices_of_csr_that_do_not_fit_are_refused():
    good = torch.tensor([1.0, 2.0]), torch.tensor([0, 2, 2]), torch.tensor([1, 3])
    for i, other, message in (
        (1, [0, 1, 1], "crow_indices: expected to end with the number of values, 2"),
        (2, [1, 4], r"col_indices: expected columns in \[0, 4\), got 4"),
        (2, [-1, 1], r"col_indices: expected columns in \[0, 4\), got -1"),
    ):
        values, crow, col = (*good[:i], torch.tensor(other), *good[i + 1 :])
        with pytest.raises(ValueError, match=message):
            Csr(values, crow, col, 4).to_dense()
        with pytest.raises(ValueError, match=message):
            Csr.from_sparse_csr(torch.sparse_csr_tensor(crow, col, values, (2, 4), check_invariants=False))
    for other, error in (
        (torch.randn(2, 4), TypeError),
        (torch.randn(2, 4).to_sparse(), TypeError),
        (torch.randn(2, 4).double().to_sparse_csr(), TypeError),
        (torch.randn(3, 2, 4).to_sparse_csr(), ValueError),
    ):
        with pytest.raises(error, match=r"engine.formats.Csr"):
            Csr.from_sparse_csr(other)


def places(format, dim):
    """Multiples of what a shard may begin at, and end at."""
    if isinstance(format, Block):
        return (format.values.shape[1 + dim],) * 2
    return (8, 4) if isinstance(format, SemiStructured) and dim == 1 else (1, 1)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("shape", [(40, 65), (7, 384), (1, 1), (3, 16), (96, 160), (5, 24)])
def test_a_shard_is_the_slice_of_the_weight(make, shape):
    format = make(torch.randn(shape))
    dense = format.to_dense()
    for dim in (0, 1):
        size = shape[dim]
        for begin, end in {(0, size), (0, size // 2), (size // 2, size), (size // 3, size // 3 + size // 2), (1, 1)}:
            first, last = places(format, dim)
            if begin % first or (end % last and end != size):
                with pytest.raises(ValueError, match="begin, end: expected multiples of"):
                    format.shard(dim, begin, end)
                continue
            shard = format.shard(dim, begin, end)
            shard.check()
            assert type(shard) is type(format) and shard.label == format.label
            assert torch.equal(shard.to_dense(), dense.narrow(dim, begin, end - begin))
            for name in format.TENSORS:
                whole, part = getattr(format, name), getattr(shard, name)
                assert (whole is None) == (part is None)
                if part is not None:
                    assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
                    assert part.numel() == 0 or part.data_ptr() != whole.data_ptr()
            x = torch.randn(2, shard.shape[1])
            y, expected = shard.linear(x), x @ shard.to_dense().t()
            assert y.shape == (2, shard.shape[0])
            static = getattr(format, "input_scale", None) is not None  # for inputs of another size: most are clipped
            assert static or (y - expected).norm() <= 0.03 * expected.norm() + 1e-6
    with pytest.raises(ValueError, match=r"dim: expected 0 \(rows\) or 1"):
        format.shard(2, 0, 1)
    with pytest.raises(ValueError, match="begin, end: expected a range"):
        format.shard(0, 0, shape[0] + 1)


@pytest.mark.parametrize("kind", [DenseInt8, Bitmap, SemiStructured, Block])
@pytest.mark.parametrize("columns", [2, 3, 16, 40])
def test_column_shards_of_a_smoothed_weight_add_up(kind, columns):
    """Also of one column, whose scale for its channel is one number, as a scale for all of the input is."""
    size = {SemiStructured: 8, Block: 32}.get(kind, 1)
    torch.manual_seed(columns)
    weight, x = torch.randn(16, columns), torch.randn(5, columns)
    input_scale = x.abs().amax(0) / 127
    if kind is DenseInt8:
        format = DenseInt8.from_dense(weight, "static", input_scale)
    else:
        threshold = () if kind is SemiStructured else (0.0,)
        format = kind.from_dense(weight, *threshold, values=torch.int8, input_scale=input_scale)
    total = torch.zeros(5, 16)
    for begin in range(0, columns, size):
        shard = format.shard(1, begin, min(columns, begin + size))
        shard.check()
        part = x[:, begin : begin + size]
        expected = part @ shard.to_dense().t()
        assert (shard.linear(part) - expected).norm() <= 0.02 * expected.norm() + 1e-6
        total += shard.linear(part)
    assert (total - format.linear(x)).norm() <= 1e-5 * total.norm()


def test_a_shard_of_unsorted_csr():
    format = Csr(torch.tensor([1.0, 2, 3, 4]), torch.tensor([0, 3, 4]), torch.tensor([4, 0, 4, 1]), 5)
    assert torch.equal(format.shard(1, 1, 5).to_dense(), format.to_dense()[:, 1:5])


def test_sparsity_of_blocks_that_nobody_has_checked():
    block = Block.from_dense(torch.randn(70, 100), 0.0)
    assert block.sparsity == 0
    block.col_indices += 100
    assert block.sparsity == 0
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(t) for t in (block.values, block.crow_indices, block.col_indices)]
        assert Block(*tensors, 70, 100).sparsity == 0
