"""The words in which an argument is refused: op (or `formats.Bitmap`), argument, what was expected, what came."""

from collections.abc import Sequence
from typing import Any

import torch

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def expect(condition: bool, op: str, argument: str, expected: str, got: object, error: type = ValueError) -> None:
    """Raises `error` unless `condition` holds."""
    if not condition:
        where = op if "." in op else f"ops.{op}"
        raise error(f"engine.{where}: {argument}: expected {expected}, got {got}")


def is_kind(op: str, argument: str, given: object, kinds: Any, expected: str) -> None:
    """Raises TypeError unless `given` is an instance of `kinds`."""
    expect(isinstance(given, kinds), op, argument, expected, type(given).__name__, TypeError)


def is_float(op: str, argument: str, t: torch.Tensor) -> None:
    """Raises TypeError unless `t` is a float32, float16 or bfloat16 tensor."""
    got = t.dtype if isinstance(t, torch.Tensor) else type(t).__name__
    expect(got in FLOAT_DTYPES, op, argument, "a float32, float16 or bfloat16 tensor", got, TypeError)
    is_strided(op, argument, t)


def is_dtype(op: str, argument: str, t: torch.Tensor, *dtypes: torch.dtype) -> None:
    """Raises TypeError unless `t` is a tensor of one of `dtypes`."""
    got = t.dtype if isinstance(t, torch.Tensor) else type(t).__name__
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    expect(got in dtypes, op, argument, f"a {names} tensor", got, TypeError)
    is_strided(op, argument, t)


def is_strided(op: str, argument: str, t: torch.Tensor) -> None:
    """Raises TypeError where a tensor is sparse, mkldnn's or nested: kernels read memory by strides."""
    fits = t.layout == torch.strided and not t.is_nested
    expect(fits, op, argument, "a dense tensor", "a nested one" if t.is_nested else t.layout, TypeError)


def is_integer(number: object) -> bool:
    """Whether an op takes `number` for an int: an int, one of NumPy, or a symbol for one."""
    return hasattr(type(number), "__index__") and not isinstance(number, torch.Tensor)


def is_size(op: str, argument: str, number: int) -> None:
    """Raises TypeError unless `number` is an integer, ValueError where it is negative."""
    expect(is_integer(number), op, argument, "an int", type(number).__name__, TypeError)
    expect(number >= 0, op, argument, "at least 0", number)


def has_shape(op: str, argument: str, t: torch.Tensor, shape: Sequence[int | str]) -> None:
    """Raises ValueError unless `t` has `shape`, where a word stands for any size: `("N", 64)`."""
    fits = t.dim() == len(shape) and all(
        isinstance(want, str) or have == want for have, want in zip(t.shape, shape, strict=True)
    )
    expect(fits, op, argument, f"shape [{', '.join(map(str, shape))}]", list(t.shape))


def is_float_dtype(op: str, dtype: object) -> None:
    """Raises TypeError unless the argument `dtype` is one that an op can give its output."""
    expect(dtype in FLOAT_DTYPES, op, "dtype", "torch.float32, torch.float16 or torch.bfloat16", dtype, TypeError)


def offsets_rise(op: str, argument: str, offsets: torch.Tensor, count: int, of: str) -> None:
    """Raises ValueError unless `offsets`, `[rows + 1]`, run from 0 to the `count` of what they are of, never back."""
    first, last = int(offsets[0]), int(offsets[-1])
    expect(first == 0, op, argument, "to begin with 0", first)
    back = offsets[1:] < offsets[:-1]
    if bool(back.any()):
        row = int(back.nonzero()[0])
        got = f"{int(offsets[row])} then {int(offsets[row + 1])} at row {row}"
        expect(False, op, argument, "never to decrease", got)
    expect(last == count, op, argument, f"to end with the number of {of}, {count}", last)
