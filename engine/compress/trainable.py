"""TrainableLinear and TrainableConv2d: a compressed layer while it is trained, and the way into and out of it.

The weight is trained as a dense matrix under a mask, not as a bitmap's values, as int8 rounding by rows needs the rows.
It is exact all the same: what the mask drops is multiplied by zero in the forward pass, gets zero gradient, and is not
packed in the end, while what it keeps is packed even where training has made it zero. Where so little is kept that
products with the kept weights alone are faster than dense ones, forward and back, the layer multiplies by them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from engine import ops
from engine.compress.importance import thresholds
from engine.compress.recipe import Prune
from engine.formats import Bitmap, Block, Csr, DenseInt8, Format, SemiStructured
from engine.nn import CompressedConv2d, CompressedLinear
from engine.nn._replace import give_attributes, given_attributes
from engine.nn.conv2d import is_channels_last, patches
from engine.ops._bitmap import bitmap_mask
from engine.ops._semi_structured import spread
from engine.ops.bitmap_linear import training_pays


class TrainableLinear(nn.Module):
    """Computes as the compressed layer will, from a float weight under a mask; int8 is rounded to and trained through.

    Args:
        compressed: the layer as it is compressed now; its format, mask and static scale are kept.
        weight: where training starts, `[N, K]`; None: the weight that `compressed` holds.
        trained: whether the weight gets a gradient.
    """

    mask: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self, compressed: CompressedLinear | CompressedConv2d, weight: Tensor | None = None, trained: bool = True
    ) -> None:
        super().__init__()
        format = compressed.format
        self.format_type, self.values_dtype = type(format), format.values.dtype
        self.dense_dtype = compressed._dtype_marker.dtype
        self.rounds_weight = self.values_dtype == torch.int8
        self.rounds_input = self.rounds_weight and getattr(format, "quantize_input", True)
        mask = None
        if isinstance(format, Bitmap):
            mask = bitmap_mask(format.bitmask, format.columns)
        elif isinstance(format, Csr):
            ones = Csr(torch.ones_like(format.values), format.crow_indices, format.col_indices, format.columns)
            mask = ones.to_dense() != 0
        elif isinstance(format, SemiStructured):
            mask = spread(torch.ones_like(format.values), format.metadata)[:, : format.columns] != 0
        elif isinstance(format, Block):
            blocks = format.crow_indices, format.col_indices, torch.ones_like(format.values)
            mask = ops.block_to_dense(*blocks, *format.shape) != 0
            self.block_shape = (format.values.shape[1], format.values.shape[2])
        start = format.to_dense() if weight is None else weight.detach().float().clone()
        self.weight = nn.Parameter(start if mask is None else start * mask, requires_grad=trained)
        self.register_buffer("mask", mask)
        # The mask that places were last asked of, its version then, and they.
        self._kept: tuple[Tensor, int, tuple[Tensor, Tensor, int]] | None = None
        self._prune: Prune | None = None  # what gradual pruning ends at; no state, as it is given again before a resume
        scale = getattr(format, "input_scale", None)
        self.register_buffer("input_scale", None if scale is None else scale.detach().clone())
        self.bias = compressed.bias
        self.transposed = isinstance(compressed, CompressedLinear) and compressed.transposed
        # Attributes given under names that have another use in training; the compressed layer gets them back.
        self._aside: dict[str, Any] = {}
        given = given_attributes(compressed)
        self._aside |= {name: given[name] for name in give_attributes(self, given)}
        self.train(compressed.training)

    def forward(self, input: Tensor | None = None, *, x: Tensor | None = None) -> Tensor:
        """`input`, or `x` as Conv1D calls it, `[..., K]` to `[..., N]`."""
        x = x if input is None else input
        assert x is not None
        dtype = x.dtype
        weight = self.weight if self.mask is None else self.weight * self.mask
        scale = self.input_scale
        if scale is not None and scale.dim():  # one for each channel: x in units of them, and the weight times them
            weight = weight * scale
            x, scale = x.float() * (1 / scale), torch.ones_like(scale[0])
        if self.rounds_weight:
            weight = ops.int8_fake_quantize(weight)
        if self.rounds_input:
            x = ops.int8_fake_quantize(x, scale)
        bias = None if self.bias is None else self.bias.to(dtype)
        x, weight = x.to(dtype), weight.to(dtype)
        places = self._places_to_multiply(x, weight)
        if places is not None:
            bitmask, row_offsets, nnz = places
            values = torch.ops.engine.bitmap_gather(weight.contiguous(), bitmask, row_offsets, nnz)
            return ops.bitmap_linear(x, bitmask, row_offsets, values, bias)
        return nn.functional.linear(x, weight, bias)

    def _places_to_multiply(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, int] | None:
        """The mask as a bitmap's `bitmask` and `row_offsets`, and how many weights it keeps; None: to multiply by all.

        By a rule, not a timing, as a resumed run has to do the same.
        """
        mask = self.mask
        plain = (
            type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
        )
        if mask is None or not plain or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return None
        if torch.is_inference_mode_enabled() or mask.is_inference():  # such tensors can't be trained with
            return None
        rows = x.numel() // max(1, x.shape[-1])
        if not training_pays(rows, 0, mask.numel()):
            return None
        if self._kept is None or self._kept[0] is not mask or self._kept[1] != mask._version:
            bitmask, row_offsets, values = ops.prune_to_bitmap(mask.float(), 0.5)
            self._kept = mask, mask._version, (bitmask, row_offsets, values.numel())
        places = self._kept[2]
        return places if training_pays(rows, places[2], mask.numel()) else None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}  # a copy's mask counts its versions anew

    @property
    def sparsity(self) -> float:
        """Fraction that the mask drops."""
        return 0.0 if self.mask is None else 1 - self.mask.float().mean().item()

    @torch.no_grad()
    def begin_pruning(self, weight: Tensor, prune: Prune) -> None:
        """Begins gradual pruning towards `prune`: the mask keeps all of `weight`, until `prune_on`."""
        assert self.mask is not None
        self.mask.fill_(True)
        self.weight.copy_(weight)
        self._prune = prune

    @torch.no_grad()
    def prune_on(self, share: float) -> None:
        """Raises the mask's sparsity to a `share` of what pruning began towards, by magnitude.

        What was dropped stays dropped. Without `begin_pruning` before, nothing happens.
        """
        if self._prune is None or self.mask is None or share <= 0:
            return
        assert self._prune.sparsity is not None
        self.weight.mul_(self.mask)
        (limit,) = thresholds([self.weight], share * self._prune.sparsity, self._prune.scope == "row")
        self.mask.logical_and_(self.weight.abs() > limit)
        self.weight.mul_(self.mask)

    @torch.no_grad()
    def compressed(self) -> CompressedLinear | CompressedConv2d:
        """The layer compressed again, in the same format, with the mask's places kept."""
        weight = self.weight.detach().to(self.dense_dtype)
        format: Format
        if self.mask is None:
            activation = "none" if not self.rounds_input else "dynamic" if self.input_scale is None else "static"
            format = DenseInt8.from_dense(weight, activation, self.input_scale)
        else:
            # Nothing is at most -1, everything is at most infinity: a kept weight that became 0 is kept.
            threshold = torch.where(self.mask, -1.0, torch.inf)
            if self.format_type is Csr:
                format = Csr.from_dense(weight, threshold)
            elif self.format_type is SemiStructured:
                format = SemiStructured.from_dense(weight * self.mask, self.values_dtype, self.input_scale)
            elif self.format_type is Block:
                how: dict[str, Any] = {"input_scale": self.input_scale, "block_shape": self.block_shape}
                # A block of which training has made every weight 0 is dropped: its norm is at most 0.
                format = Block.from_dense(weight * self.mask, 0.0, self.values_dtype, **how)
            else:
                format = Bitmap.from_dense(weight, threshold, self.values_dtype, self.input_scale)
        module = self._over(format).train(self.training)
        taken = give_attributes(module, given_attributes(self) | self._aside)
        assert not taken, taken  # as the layer before had them
        if module.values.is_floating_point():
            module.values.requires_grad_(self.weight.requires_grad)
        return module

    def _over(self, format: Format) -> CompressedLinear | CompressedConv2d:
        return CompressedLinear(format, self.bias, self.dense_dtype, self.transposed)


class TrainableConv2d(TrainableLinear):
    """TrainableLinear over the patches of an image; all of a batch's are in memory at once."""

    def __init__(self, compressed: CompressedConv2d, weight: Tensor | None = None, trained: bool = True) -> None:
        super().__init__(compressed, weight, trained)
        for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode"):
            setattr(self, name, getattr(compressed, name))

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """`input` `[B, C, H, W]` or `[C, H, W]` as nn.Conv2d takes it."""
        x = input
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        y = super().forward(patches(x, self).flatten(3)).permute(0, 3, 1, 2)
        return y if is_channels_last(x) else y.contiguous()  # models take `view`s of it

    def _over(self, format: Format) -> CompressedConv2d:
        return CompressedConv2d.over(format, self, self.dense_dtype)


def trainable(compressed: Any, weight: Tensor | None = None, trained: bool = True) -> TrainableLinear:
    """The trainable twin of a compressed layer."""
    kind = TrainableConv2d if isinstance(compressed, CompressedConv2d) else TrainableLinear
    return kind(compressed, weight, trained)


def trainable_layers(model: nn.Module) -> dict[str, TrainableLinear]:
    """By qualified name; one that stands under several names, once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TrainableLinear)}


def twins(modules: dict[str, Any], make: Any) -> dict[str, Any]:
    """`make(name, module)` for every name, called once for each module."""
    made: dict[int, Any] = {}
    for name, module in modules.items():
        if id(module) not in made:
            made[id(module)] = make(name, module)
    return {name: made[id(module)] for name, module in modules.items()}
