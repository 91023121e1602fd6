"""The one tolerance for float results."""

import torch
from torch import Tensor


def assert_as_good_as_torch(got: Tensor, truth: Tensor, torch_result: Tensor) -> None:
    """Asserts that `got` is about as close to the float64 `truth` as PyTorch's own `torch_result` of the same dtype.

    Its largest error may be twice PyTorch's own, plus 2 units in the last place at the largest result's scale. NaN must
    stand in the same places as in `truth`.
    """
    assert truth.dtype == torch.float64
    assert got.dtype == torch_result.dtype, f"{got.dtype}, expected {torch_result.dtype}"
    assert got.shape == truth.shape == torch_result.shape, f"{list(got.shape)}, expected {list(truth.shape)}"
    assert torch.equal(got.isnan(), truth.isnan()), "NaN in other places than the truth has it"
    number = ~truth.isnan()
    if not number.any():
        return
    errors = (got.double() - truth).abs()[number]
    own = (torch_result.double() - truth).abs()[number]
    own = own.nan_to_num(0.0).max()  # its bf16 product for CPUs with AMX spreads a row's NaN to others
    _, exponent = torch.frexp(truth[number].abs().max())
    finfo = torch.finfo(got.dtype)
    ulp = max(2.0 ** (int(exponent) - 1) * finfo.eps, finfo.smallest_normal * finfo.eps)
    allowed = 2 * own + 2 * ulp
    if not errors.max() <= allowed:
        worst = int(errors.argmax())
        index = number.nonzero()[worst].tolist()
        raise AssertionError(
            f"error {errors[worst]:.3g} at {index}, allowed {allowed:.3g} (PyTorch's own is {own:.3g}):"
            f" got {got[tuple(index)]}, truth {truth[tuple(index)]}, shape {list(got.shape)}"
        )
