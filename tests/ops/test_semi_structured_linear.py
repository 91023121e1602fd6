"""semi_structured_linear: metadata that lies; what all such ops must do is in test_float_linears.py."""

import pytest
import torch
from stored import FORMS

from engine.ops._check import FLOAT_DTYPES
from engine.ops.semi_structured_linear import semi_structured_linear


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("columns", [5, 200, 513])
def test_metadata_that_lies_stays_within_bounds(variant, columns, dtype):
    values, metadata = FORMS["semi_structured"].store(torch.randn(9, columns).to(dtype), None)
    # Two values at one place may be any bits together: it is AddressSanitizer that looks on.
    for m in (1, 5, 20, 70):
        y = semi_structured_linear(torch.randn(m, columns), values, torch.full_like(metadata, 255))
        assert y.shape == (m, 9)


def test_errors_of_the_metadata():
    x, (values, metadata) = torch.randn(3, 14), FORMS["semi_structured"].store(torch.randn(5, 14), None)
    for arguments, error, message in (
        ((x[:, :9], values, metadata), ValueError, r"values: expected shape \[N, 6\]"),
        ((x, values, metadata.char()), TypeError, "metadata: expected a uint8"),
        ((x, values, metadata[:, :1]), ValueError, "metadata: expected shape"),
        ((x, values, metadata[:2]), ValueError, "metadata: expected shape"),
    ):
        with pytest.raises(error, match=f"semi_structured_linear: {message}"):
            semi_structured_linear(*arguments)
