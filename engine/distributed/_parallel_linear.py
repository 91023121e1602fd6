"""Linear layers of which every rank of a group holds a part of the rows (column-parallel) or of the columns.

By the names of Megatron (Shoeybi et al., 2019): split "by column" means by column of the transposed weight, that is by
output. In pairs a column-parallel layer hands its part of the outputs to a row-parallel one, and only the latter
communicates. What a collective does going forward, its twin undoes in the gradient.
"""

import copy
import dataclasses
import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from engine.distributed._all_reduce import all_reduce
from engine.nn import CompressedLinear
from engine.nn._replace import in_autocast
from engine.ops.int8_quantize import SMALLEST_AMAX

Group = dist.ProcessGroup

# So many products of int8 activations (at most 127) and weights (at most 128) add up exactly in each type.
MOST_IN_FLOAT32 = 2**24 // (127 * 128)
MOST_IN_INT32 = (2**31 - 1) // (127 * 128)


def _around(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.compiler.disable`, but only once something may be compiled.

    It loads torch._dynamo, and that torch.distributed.nn, whose default arguments hold the default group as it is then:
    if there is one already, `destroy_process_group` no longer ends its threads, and one of gloo's may abort the process
    as the interpreter goes. It would also more than double the time of `import engine`.
    """
    disabled: list[Callable[..., Tensor]] = []

    @functools.wraps(forward)
    def call(*arguments: Any) -> Tensor:
        dynamo: Any = sys.modules.get("torch._dynamo")
        if dynamo is None:
            return forward(*arguments)
        dynamo.skip_frame("this frame isn't compiled either")
        if not disabled:
            disabled.append(torch.compiler.disable(forward))
        return disabled[0](*arguments)

    setattr(call, "_torchdynamo_disable", True)  # noqa: B010  # callers end their graph before the call
    setattr(call, "_torchdynamo_disable_msg", "it communicates: torch.compile goes around it")  # noqa: B010
    return call


def bounds(size: int, world_size: int, rank: int) -> tuple[int, int]:
    """The part [begin, end) of `size` that belongs to `rank`; the first ranks have one more where it doesn't divide."""
    each, more = divmod(size, world_size)
    begin = rank * each + min(rank, more)
    return begin, begin + each + (rank < more)


def gather(part: Tensor, size: int, group: Group) -> Tensor:
    """Every rank's part of the last dimension, put together to `[..., size]`: the same bits on every rank.

    The parts may differ in size. They are added up as integers, to which all other ranks contribute zeros.
    """
    begin, end = bounds(size, group.size(), dist.get_rank(group))
    shape = (*part.shape[:-1], size)
    count, each = part.numel() // part.shape[-1] * size, part.element_size()
    padded = part.new_zeros(-(-count * each // 4) * 4 // each)  # whole int32s
    whole = padded[:count].view(shape)
    whole[..., begin:end] = part
    all_reduce(padded.view(torch.int32), "sum", group)
    return whole


class _Copy(torch.autograd.Function):
    """The same input on every rank; its gradient is the sum of what each rank's part of the outputs contributes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may use it elsewhere too
        all_reduce(grad, "sum", ctx.group)
        return grad, None


class _Reduce(torch.autograd.Function):
    """The sum over all ranks, in place; every rank's term has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Group, codec: str | None) -> Tensor:
        all_reduce(y, "sum", group, codec)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        return grad, None, None


class _Gather(torch.autograd.Function):
    """All parts of the last dimension; the gradient of each rank's part is that part of the gradient."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, size: int, group: Group) -> Tensor:
        ctx.bounds = bounds(size, group.size(), dist.get_rank(group))
        return gather(part, size, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        return grad[..., slice(*ctx.bounds)], None, None


class _Split(torch.autograd.Function):
    """This rank's part of the last dimension; the gradients of all parts are put together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.size, ctx.group = x.shape[-1], group
        return x[..., slice(*bounds(x.shape[-1], group.size(), dist.get_rank(group)))].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        return gather(grad.contiguous(), ctx.size, ctx.group), None


class _Parallel(nn.Module):
    """What both share. `shard` is an nn.Linear or CompressedLinear over this rank's part of the weight."""

    def __init__(self, shard: nn.Module, in_features: int, out_features: int, group: Group) -> None:
        super().__init__()
        self.shard = shard
        self.in_features, self.out_features = in_features, out_features  # of the whole layer
        self.group = group

    @property
    def weight(self) -> Tensor:
        """This rank's part of the weight; of a compressed layer made dense at each access."""
        return self.shard.weight  # type: ignore[return-value]

    def __deepcopy__(self, memo: dict) -> "_Parallel":
        memo[id(self.group)] = self.group  # a copy talks to the same ranks
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def extra_repr(self) -> str:
        """What `repr` shows between the parentheses."""
        where = f"rank {dist.get_rank(self.group)} of {self.group.size()}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {where}"


class ColumnParallelLinear(_Parallel):
    """A linear layer whose outputs are shared out: `[..., in_features]` to this rank's part of `[..., out_features]`.

    The input must be the same on every rank. `gather_output` gives the whole output to every rank.
    """

    def __init__(
        self, shard: nn.Module, in_features: int, out_features: int, group: Group, gather_output: bool
    ) -> None:
        super().__init__(shard, in_features, out_features, group)
        self.gather_output = gather_output

    @property
    def bias(self) -> Tensor | None:
        """This rank's part of the bias."""
        return self.shard.bias  # type: ignore[return-value]

    @_around
    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in_features]` to `[..., this rank's out_features]`, or to all of them."""
        if x.requires_grad and torch.is_grad_enabled():
            x = _Copy.apply(x, self.group)  # type: ignore[assignment]
        y = self.shard(x)
        return _Gather.apply(y, self.out_features, self.group) if self.gather_output else y  # type: ignore[return-value]


class RowParallelLinear(_Parallel):
    """A linear layer whose inputs are shared out: this rank's part of `[..., in_features]` to `[..., out_features]`.

    The parts' products are added up over the ranks, and the bias once. Where int8 weights meet int8 activations and
    there is no codec, `exact` has the ranks share each activation row's scale and add up integers: the result has the
    bits of the layer in one piece. `split_input` takes the whole input, the same on every rank, and cuts this rank's
    part out.
    """

    def __init__(
        self,
        shard: nn.Module,
        bias: nn.Parameter | None,
        in_features: int,
        out_features: int,
        group: Group,
        split_input: bool,
        codec: str | None,
        exact: bool = True,
    ) -> None:
        super().__init__(shard, in_features, out_features, group)
        self.register_parameter("bias", bias)
        self.split_input, self.codec, self.exact = split_input, codec, exact
        self._compared: tuple[Any, bool] = (None, False)  # whose scales, and whether they are the same on every rank

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        super()._load_from_state_dict(*arguments, **named)
        self._compared = (None, False)

    def _adds_integers(self) -> bool:
        """Whether all ranks multiply int8 by int8 and have the same scales, as the parts of one weight have."""
        if not self.exact or self.codec is not None or not _multiplies_integers(self.shard):
            return False
        of, same = self._compared
        if of is None or of() is not self.shard:  # the first time; or a file was loaded, or each rank quantised its own
            format: Any = self.shard.format
            one = format.input_scale is not None and format.input_scale.dim() == 0
            static = format.input_scale.detach().reshape(1) if one else torch.zeros(1, dtype=torch.float32)
            scales = torch.cat([format.scale.detach(), static.to(format.scale.device)])
            largest = torch.cat([scales, -scales])
            all_reduce(largest, "max", self.group)
            same = torch.equal(largest[: len(scales)], -largest[len(scales) :])
            self._compared = (weakref.ref(self.shard), same)
        return same

    @_around
    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., this rank's in_features]`, or all of them where `split_input`, to `[..., out_features]`."""
        begin, end = bounds(self.in_features, self.group.size(), dist.get_rank(self.group))
        expected = self.in_features if self.split_input else end - begin
        if x.dim() == 0 or x.shape[-1] != expected:
            what = "all" if self.split_input else "this rank's"
            raise ValueError(
                f"engine.distributed: row-parallel linear: x: expected shape [..., {expected}], {what} of the "
                f"{self.in_features} inputs, got {list(x.shape)}"
            )
        if self.split_input:
            x = _Split.apply(x, self.group)  # type: ignore[assignment]
        if self._adds_integers():
            return _IntegerRow.apply(in_autocast(x), self.bias, self)  # type: ignore[return-value]
        y = _Reduce.apply(self.shard(x), self.group, self.codec)
        return y if self.bias is None else y + self.bias.to(y.dtype)  # type: ignore[return-value, attr-defined]


def _multiplies_integers(shard: nn.Module) -> bool:
    """Whether a layer multiplies int8 by int8, as `ops.int8_linear` says it."""
    if not isinstance(shard, CompressedLinear):
        return False
    format = shard.format
    return format.values.dtype == torch.int8 and getattr(format, "quantize_input", True)


class _IntegerRow(torch.autograd.Function):
    """Row-parallel int8: `ops.int8_linear` of the whole weight, each rank knowing only a part of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: RowParallelLinear) -> Tensor:
        ctx.layer, ctx.dtype, ctx.bias_dtype = layer, x.dtype, None if bias is None else bias.dtype
        format: Any = layer.shard.format
        row_scale, scaled = _shared_quantization(x, format.input_scale, layer.group)
        one = torch.ones((), dtype=torch.float32, device=x.device)
        # Scales of one give the sums themselves, and the activations are rounded as they would be by their scale.
        unit = dataclasses.replace(format, scale=one.expand_as(format.scale).contiguous(), input_scale=one)
        sums = _exact_sums(unit, scaled, layer.in_features)
        all_reduce(sums, "sum", layer.group)
        y = sums * (row_scale.unsqueeze(-1) * format.scale)
        if bias is not None:
            y += bias.float()
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        """Straight through the quantisation, as the op itself; every rank has the whole `grad`, and its part of `x`."""
        grad = grad.float()
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ ctx.layer.shard.format.to_dense(torch.float32)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_bias, None


def _shared_quantization(x: Tensor, input_scale: Tensor | None, group: Group) -> tuple[Tensor, Tensor]:
    """The scale that each whole row has, NaN where any rank holds a NaN or an infinity of it, and `x` over it, float32.

    As `ops.int8_quantize` and a static `ops.int8_linear` have it, to the bit.
    """
    amax = torch.maximum(x.amax(-1), -x.amin(-1)).float()  # an infinity norm or aminmax is ten times slower here
    amax = torch.where(amax.isfinite(), amax, torch.inf)  # not every backend's max keeps a NaN
    all_reduce(amax, "max", group)
    finite = amax.isfinite()
    if input_scale is None:
        full, zero = torch.full_like(amax, 127), amax < SMALLEST_AMAX
        inverse = torch.where(finite & ~zero, full / amax, 0.0).unsqueeze(-1)
        scale = torch.where(zero, 1.0, amax / full)
    else:
        inverse = torch.full_like(input_scale, 1) / input_scale
        usable = ((input_scale > 0) & input_scale.isfinite() & inverse.isfinite()).all()
        finite = finite & usable
        scale = input_scale.expand_as(amax) if input_scale.dim() == 0 else torch.ones_like(amax)
    if not bool(finite.all()):
        x = torch.where(finite.unsqueeze(-1), x, 0.0)
        inverse = torch.where(finite.unsqueeze(-1), inverse, 0.0)
    return torch.where(finite, scale, torch.nan), x.float() * inverse


def _exact_sums(unit: Any, x: Tensor, whole_columns: int) -> Tensor:
    """The integer sums of the products of weights and rounded `x`, in a type that holds those of all ranks exactly."""
    sums = unit.linear(x)  # float32, each sum rounded once
    if whole_columns <= MOST_IN_FLOAT32:
        return sums
    wire = torch.int32 if whole_columns <= MOST_IN_INT32 else torch.int64
    columns = x.shape[-1]
    if columns <= MOST_IN_FLOAT32 or not bool((sums.abs() >= 2**24).any()):
        return sums.to(wire)
    total = torch.zeros_like(
        sums, dtype=wire
    )  # sums this large are rare: once more, by so few columns that all is exact
    for begin in range(0, columns, MOST_IN_FLOAT32):
        piece = torch.zeros_like(x)
        piece[..., begin : begin + MOST_IN_FLOAT32] = x[..., begin : begin + MOST_IN_FLOAT32]
        total += unit.linear(piece).to(wire)
    return total
