"""The words in which an argument is refused: op (or `formats.Bitmap`), argument, what was expected, what came."""

from collections.abc import Sequence

import torch

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def expect(condition: bool, op: str, argument: str, expected: str, got: object, error: type = ValueError) -> None:
    """Raises `error` unless `condition` holds."""
    if not condition:
        where = op if "." in op else f"ops.{op}"
        raise error(f"engine.{where}: {argument}: expected {expected}, got {got}")


def is_float(op: str, argument: str, t: torch.Tensor) -> None:
    """Raises TypeError unless `t` is a float32, float16 or bfloat16 tensor."""
    got = t.dtype if isinstance(t, torch.Tensor) else type(t).__name__
    expect(got in FLOAT_DTYPES, op, argument, "a float32, float16 or bfloat16 tensor", got, TypeError)


def is_dtype(op: str, argument: str, t: torch.Tensor, *dtypes: torch.dtype) -> None:
    """Raises TypeError unless `t` is a tensor of one of `dtypes`."""
    got = t.dtype if isinstance(t, torch.Tensor) else type(t).__name__
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    expect(got in dtypes, op, argument, f"a {names} tensor", got, TypeError)


def has_shape(op: str, argument: str, t: torch.Tensor, shape: Sequence[int | str]) -> None:
    """Raises ValueError unless `t` has `shape`, where a word stands for any size: `("N", 64)`."""
    fits = t.dim() == len(shape) and all(
        isinstance(want, str) or have == want for have, want in zip(t.shape, shape, strict=True)
    )
    expect(fits, op, argument, f"shape [{', '.join(map(str, shape))}]", list(t.shape))
