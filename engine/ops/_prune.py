"""What the pruning ops share: thresholds, and the one rule by which a weight is kept."""

import torch
from torch import Tensor

from engine.ops import _check


def check_threshold(op: str, weight: Tensor, threshold: float | Tensor) -> None:
    """Raises unless `threshold` is a number, or a real tensor that broadcasts against `weight`."""
    if not isinstance(threshold, Tensor):
        number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        _check.expect(number, op, "threshold", "a number or a tensor", type(threshold).__name__, TypeError)
        return
    holds_data = threshold.device.type != "meta" or weight.device.type == "meta"
    _check.expect(holds_data, op, "threshold", "a tensor that holds data, as weight does", "one on meta", RuntimeError)
    _check.expect(not threshold.is_complex(), op, "threshold", "a real tensor", threshold.dtype, TypeError)
    fits = threshold.dim() <= weight.dim() and all(
        have in (1, want) for have, want in zip(reversed(threshold.shape), reversed(weight.shape), strict=False)
    )
    broadcasts = f"a shape that broadcasts against {list(weight.shape)}"
    _check.expect(fits, op, "threshold", broadcasts, list(threshold.shape))


def as_threshold(op: str, weight: Tensor, threshold: float | Tensor) -> Tensor:
    """The threshold as the float32 tensor on the weight's device that the schemas take. Errors as `check_threshold`."""
    check_threshold(op, weight, threshold)
    if isinstance(threshold, Tensor):
        return threshold.detach().to(device=weight.device, dtype=torch.float32)
    # One beyond float32's range becomes infinity.
    return torch.full((), threshold, dtype=torch.float64, device=weight.device).float()


def keep_mask(weight: Tensor, threshold: Tensor) -> Tensor:
    """Where a weight is kept: not `|w| <= threshold`, in float32. A NaN weight is kept; a NaN threshold keeps all."""
    return ~(weight.float().abs() <= threshold)
