"""The shapes that tests and benchmarks share, each with why it is there."""

import torch

# rows, columns
MATRICES = {
    (0, 8): "no rows",
    (3, 0): "no columns",
    (1, 1): "one element",
    (1, 7): "less than a vector, odd",
    (7, 1): "one column",
    (5, 31): "one less than an AVX2 vector of bytes",
    (4, 64): "exactly one AVX-512 vector of bytes",
    (3, 65): "one more than it",
    (17, 200): "odd rows, a tail of 8",
    (33, 384): "MiniLM's width",
    (130, 1027): "more rows than two tiles, a prime-like tail",
}

# M (rows of activations), N (outputs), K (inputs)
LINEARS = {
    (0, 5, 8): "an empty batch",
    (3, 0, 8): "no outputs",
    (3, 5, 0): "no inputs: bias alone",
    (1, 1, 1): "one of each",
    (1, 7, 31): "one token, odd sizes below a vector",
    (1, 33, 384): "one token",
    (2, 16, 64): "exact vectors",
    (5, 19, 65): "one over a vector",
    (16, 24, 200): "the largest M of some dot-product kernels",
    (17, 31, 129): "the smallest M of some panel kernels, all odd",
    (70, 50, 300): "several row blocks with tails",
    (128, 65, 1027): "a long odd row",
}


def few_outputs(count: int) -> list[tuple[int, int, int]]:
    """Random M, N, K for which MKL adds up a sum in the most chains, and so with the least error for their length."""
    return [
        (int(torch.randint(17, 97, ())), int(torch.randint(1, 9, ())), int(torch.randint(90, 330, ())))
        for _ in range(count)
    ]
