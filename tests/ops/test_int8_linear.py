"""int8_linear: what is its own; what all int8 linear ops must do is in test_int8_linears.py."""

import pytest
import torch
from stored import activations, assert_same, int8_values

from engine.ops._library import REFERENCES
from engine.ops.int8_linear import int8_linear

reference = REFERENCES["int8_linear"]


def weights(n, k):
    return int8_values(n, k), torch.rand(n) / 100 + 1e-3


def test_activations_beyond_the_second_cache(variant):
    x, (weight, scale) = activations(1450, 300), weights(70, 300)
    assert_same(int8_linear(x, weight, scale), reference(x, weight, scale))


def test_activations_beyond_one_chunk(variant):
    x, (weight, scale) = torch.randn(500, 11000), weights(9, 11000)
    assert_same(int8_linear(x, weight, scale), reference(x, weight, scale))


def test_errors():
    x, (weight, scale), bias = torch.randn(3, 5), weights(4, 5), torch.randn(4)
    wrong = {
        r"x: expected a float32.*got torch.float64": (TypeError, (x.double(), weight, scale)),
        r"x: expected shape \[\.\.\., 5\], got \[3, 4\]": (ValueError, (x[:, 1:], weight, scale)),
        r"x: expected at least one dimension, got \[\]": (ValueError, (torch.tensor(1.0), weight, scale)),
        r"weight: expected a int8 tensor, got torch.uint8": (TypeError, (x, weight.to(torch.uint8), scale)),
        r"weight: expected shape \[N, K\], got \[5\]": (ValueError, (x, weight[0], scale)),
        r"scale: expected a float32 tensor, got torch.float16": (TypeError, (x, weight, scale.half())),
        r"scale: expected shape \[4\], got \[3\]": (ValueError, (x, weight, scale[1:])),
        r"bias: expected a float32.*got torch.int64": (TypeError, (x, weight, scale, bias.long())),
        r"bias: expected shape \[4\], got \[5\]": (ValueError, (x, weight, scale, torch.randn(5))),
        r"input_scale: expected one element or shape \[5\], got \[2\]": (
            ValueError,
            (x, weight, scale, bias, torch.ones(2)),
        ),
        r"input_scale: expected a float32 tensor": (TypeError, (x, weight, scale, bias, torch.tensor(1))),
    }
    for message, (error, arguments) in wrong.items():
        with pytest.raises(error, match="int8_linear: " + message):
            int8_linear(*arguments)
