"""semi_structured_int8_linear: what is its own; what all int8 linear ops must do is in test_int8_linears.py."""

import pytest
import torch
from stored import FORMS, int8_values

from engine.ops.semi_structured_int8_linear import semi_structured_int8_linear


def weights(n, k):
    return *FORMS["semi_structured"].store(int8_values(n, k), None), torch.rand(n) / 100 + 1e-3


def test_errors():
    x, (values, metadata, scale) = torch.randn(3, 14), weights(5, 14)
    for arguments, error, message in (
        ((x.double(), values, metadata, scale), TypeError, "x: expected a float32"),
        ((x[:, :9], values, metadata, scale), ValueError, r"values: expected shape \[N, 6\]"),
        ((x, values.float(), metadata, scale), TypeError, "values: expected a int8"),
        ((x, values, metadata[:, :1], scale), ValueError, "metadata: expected shape"),
        ((x, values, metadata[:2], scale), ValueError, "metadata: expected shape"),
        ((x, values, metadata, scale[:2]), ValueError, "scale: expected shape"),
        ((x, values, metadata, scale, torch.randn(3)), ValueError, "bias: expected shape"),
    ):
        with pytest.raises(error, match=message):
            semi_structured_int8_linear(*arguments)


def test_metadata_that_lies_stays_within_bounds(variant):
    values, metadata, scale = weights(9, 200)
    for m in (1, 5, 20):  # whatever it gives: AddressSanitizer looks on
        assert (
            semi_structured_int8_linear(torch.randn(m, 200), values, torch.full_like(metadata, 255), scale)
            .isfinite()
            .all()
        )
