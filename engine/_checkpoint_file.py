"""A checkpoint file: which tensors hold which weight, and the checks between the file and a kernel.

One safetensors file. A weight `<m>.weight` is stored under the names that the compressed-tensors library uses:

- DenseInt8: `<m>.weight` (int8) and `<m>.weight_scale`;
- Bitmap: `<m>.weight.shape`, `.compressed`, `.bitmask`, `.row_offsets`, and `.scale` where the values are int8;
- Csr: `<m>.weight.shape`, `.values`, `.crow_indices`, `.col_indices`;
- SemiStructured: `<m>.weight.shape`, `.compressed`, `.metadata`, and `.scale` where the values are int8;
- Block: `<m>.weight.shape`, `.values`, `.crow_indices`, `.col_indices`, and `.scale` where the values are int8;
- a convolution's weight `[O, C, kh, kw]` as the matrix `[O, kh * kw * C]` (its columns by kernel row, kernel column and
  channel), with its kernel's size in the metadata;
- the weight `[K, N]` of Hugging Face's Conv1D as the matrix `[N, K]`, which the metadata tells;
- `<m>.input_scale` where activations are quantised by a fixed scale (one number) or one for each channel (K of them).

Everything else has its name in `model.state_dict()`. The header's metadata says which weight has which format.
"""

import dataclasses
import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine._safetensors import CheckpointError, TensorFile, explained
from engine.formats import Bitmap, Block, Csr, DenseInt8, Format, SemiStructured
from engine.nn.conv2d import as_weight
from engine.ops._check import FLOAT_DTYPES

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # of a folder, and of one with shards
FORMAT_VERSION = "1"
FORMATS: dict[str, type[Format]] = {kind.__name__: kind for kind in (DenseInt8, Bitmap, Csr, SemiStructured, Block)}
WITH_OPTIONAL_SCALE = (Bitmap, SemiStructured, Block)  # there where values are int8
DENSE_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
INT8_OR_FLOAT = (torch.int8, *FLOAT_DTYPES)
INDICES = (torch.int32, torch.int64)


def weights_in(folder: Path) -> Path:
    """The one file of a folder's weights.

    Raises:
        FileNotFoundError: there are none, not of another kind either.
        CheckpointError: they lie in shards, or are no safetensors.
    """
    path = folder / WEIGHTS
    if path.exists():
        return path
    if (folder / INDEX).exists():
        raise CheckpointError(f"{folder}: has no {WEIGHTS}, but shards, which {INDEX} names: expected one file")
    others = sorted(each.name for each in folder.glob("*.bin"))
    if others:
        raise CheckpointError(f"{folder}: has no {WEIGHTS}, only {others[0]}: save the model as safetensors first")
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


@dataclasses.dataclass(frozen=True)
class Part:
    """One tensor of a format on disk: what follows the weight's name, its types, its number of dimensions."""

    suffix: str
    dtypes: tuple[torch.dtype, ...]
    dims: int


PARTS: dict[type[Format], dict[str, Part]] = {
    DenseInt8: {"values": Part("", (torch.int8,), 2), "scale": Part("_scale", (torch.float32,), 1)},
    Bitmap: {
        "shape": Part(".shape", (torch.int64,), 1),
        "values": Part(".compressed", INT8_OR_FLOAT, 1),
        "bitmask": Part(".bitmask", (torch.uint8,), 2),
        "row_offsets": Part(".row_offsets", (torch.int64,), 1),
        "scale": Part(".scale", (torch.float32,), 1),
    },
    Csr: {
        "shape": Part(".shape", (torch.int64,), 1),
        "values": Part(".values", FLOAT_DTYPES, 1),
        "crow_indices": Part(".crow_indices", INDICES, 1),
        "col_indices": Part(".col_indices", INDICES, 1),
    },
    SemiStructured: {
        "shape": Part(".shape", (torch.int64,), 1),
        "values": Part(".compressed", INT8_OR_FLOAT, 2),
        "metadata": Part(".metadata", (torch.uint8,), 2),
        "scale": Part(".scale", (torch.float32,), 1),
    },
    Block: {
        "shape": Part(".shape", (torch.int64,), 1),
        "values": Part(".values", INT8_OR_FLOAT, 3),
        "crow_indices": Part(".crow_indices", (torch.int32,), 1),
        "col_indices": Part(".col_indices", (torch.int32,), 1),
        "scale": Part(".scale", (torch.float32,), 1),
    },
}


@dataclasses.dataclass(frozen=True)
class WeightInfo:
    """What the metadata says of a compressed weight: its format, the dtype that the dense weight has, the kernel's size
    where it is a convolution's, and whether the dense weight is the matrix `[N, K]` transposed (Conv1D's).
    """

    format: type[Format]
    dtype: torch.dtype = torch.float32
    quantize_input: bool = True
    kernel_size: tuple[int, ...] | None = None
    transposed: bool = False

    @classmethod
    def of(
        cls, format: Format, dtype: torch.dtype, kernel_size: tuple[int, ...] | None = None, transposed: bool = False
    ) -> "WeightInfo":
        """The description of `format`."""
        return cls(type(format), dtype, getattr(format, "quantize_input", True), kernel_size, transposed)

    def dense_shape(self, format: Format) -> tuple[int, ...]:
        """The shape of the dense weight that `format` stands for."""
        rows, columns = format.shape
        if self.kernel_size is None:
            return (columns, rows) if self.transposed else (rows, columns)
        return (rows, columns // math.prod(self.kernel_size), *self.kernel_size)

    def dense(self, format: Format, dtype: torch.dtype) -> Tensor:
        """The dense weight that `format` stands for."""
        return as_weight(format.to_dense(dtype), self.kernel_size, self.transposed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the header."""
        values: dict[str, Any] = {"format": self.format.__name__, "dtype": str(self.dtype).removeprefix("torch.")}
        if self.kernel_size is not None:
            values["kernel_size"] = list(self.kernel_size)
        if self.transposed:
            values["transposed"] = True
        return {**values, "quantize_input": self.quantize_input} if self.format is DenseInt8 else values

    @classmethod
    def from_dict(cls, values: Any) -> "WeightInfo":
        """The inverse of `to_dict`. ValueError where a value is missing, unknown or of the wrong type."""
        if not isinstance(values, dict):
            raise ValueError(f"expected an object, got {values!r:.80}")
        kind, dtype, quantize_input = (values.get(key) for key in ("format", "dtype", "quantize_input"))
        if not isinstance(kind, str) or kind not in FORMATS:
            raise ValueError(f"unknown format {kind!r:.80}")
        if not isinstance(dtype, str) or dtype not in DENSE_DTYPES:
            raise ValueError(f"unknown dtype {dtype!r:.80}")
        if FORMATS[kind] is DenseInt8 and not isinstance(quantize_input, bool):
            raise ValueError(f"quantize_input: expected true or false, got {quantize_input!r:.80}")
        kernel_size, transposed = _kernel_size(values), values.get("transposed", False)
        if not isinstance(transposed, bool) or (transposed and kernel_size is not None):
            raise ValueError(f"transposed: expected true or false, and true for no convolution, got {transposed!r:.80}")
        return cls(FORMATS[kind], DENSE_DTYPES[dtype], quantize_input is not False, kernel_size, transposed)


def _kernel_size(values: dict[str, Any]) -> tuple[int, ...] | None:
    found = values.get("kernel_size")
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != 2 or not all(type(k) is int and 0 < k < 2**31 for k in found):
        raise ValueError(f"kernel_size: expected two numbers above 0, got {found!r:.80}")
    return tuple(found)


class CheckpointFile(TensorFile):
    """A checkpoint whose header, metadata included, has been checked; a plain safetensors file is one without weights.

    Attributes:
        weights: the compressed weights by name.
        parts: for each of them, the name on disk of each of its tensors.
        plain: names of all other tensors.
        aliases: name to name of the weight or tensor that it shares its memory with.
        recipe: the recipe as a dict, or None.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        super().__init__(path)
        self.weights: dict[str, WeightInfo] = {}
        self.parts: dict[str, dict[str, str]] = {}
        self.aliases: dict[str, str] = {}
        self.recipe: dict[str, Any] | None = None
        if "engine_format_version" in self.metadata:
            self._read_metadata()
        claimed = {name for parts in self.parts.values() for name in parts.values()}
        if len(claimed) != sum(map(len, self.parts.values())):
            raise CheckpointError(f"{self.path}: two compressed weights share a tensor's name")
        self.plain = [name for name in self.entries if name not in claimed]
        self._check_aliases()

    def _read_metadata(self) -> None:
        version = self.metadata["engine_format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{self.path}: format version {version!r:.40}, this engine reads {FORMAT_VERSION}")
        self.recipe = self._json("engine_recipe") if self.metadata.get("engine_recipe", "null") != "null" else None
        for name, values in self._json("engine_weights").items():
            where = f"{self.path}: {name}"
            with explained(where):
                info = self.weights[name] = WeightInfo.from_dict(values)
            if name.rpartition(".")[2] != "weight":
                raise CheckpointError(f"{where}: the name of a compressed weight ends in 'weight'")
            self.parts[name] = self._find_parts(where, name, info)
        self.aliases = self._json("engine_aliases")

    def _json(self, key: str) -> dict[str, Any]:
        with explained(f"{self.path}: metadata {key}"):
            found = json.loads(self.metadata.get(key, "{}"))
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.path}: metadata {key}: expected a JSON object, got {found!r:.80}")
        return found

    def _find_parts(self, where: str, name: str, info: WeightInfo) -> dict[str, str]:
        """The name of each tensor of a weight, its type and number of dimensions checked."""
        found: dict[str, str] = {}
        for field, part in PARTS[info.format].items():
            entry = self.entries.get(name + part.suffix)
            if entry is None and info.format in WITH_OPTIONAL_SCALE and field == "scale":
                continue
            if entry is None:
                raise CheckpointError(f"{where}: {name + part.suffix} is missing")
            if entry.dtype not in part.dtypes or len(entry.shape) != part.dims:
                raise CheckpointError(f"{where}: {name + part.suffix}: unexpected {entry}")
            found[field] = name + part.suffix
        if "shape" in found and self.entries[found["shape"]].shape != (2,):
            raise CheckpointError(f"{where}: {found['shape']}: expected 2 numbers")
        input_scale = name.removesuffix("weight") + "input_scale"
        if input_scale in self.entries and "scale" in found and info.quantize_input:
            found_scale = self.entries[input_scale]
            if found_scale.dtype != torch.float32 or len(found_scale.shape) != 1:
                raise CheckpointError(f"{where}: {input_scale}: expected one float32, or one for each channel")
            found["input_scale"] = input_scale
        return found

    def _check_aliases(self) -> None:
        stored = self.weights.keys() | set(self.plain)
        for alias, name in self.aliases.items():
            if not isinstance(name, str) or name not in stored:
                raise CheckpointError(f"{self.path}: {alias}: an alias of {name!r:.200}, which is not in the file")
            if alias in stored or alias in self.entries:
                raise CheckpointError(f"{self.path}: {alias}: an alias of {name}, but stored as well")
            if name in self.weights and alias.rpartition(".")[2] != "weight":
                raise CheckpointError(f"{self.path}: {alias}: an alias of a compressed weight must end in 'weight'")


def read_weight(file: CheckpointFile, name: str) -> Format:
    """Reads one compressed weight and checks it so far that whatever comes back is fit for a kernel.

    Raises:
        CheckpointError: its tensors don't fit together; the message names it.
    """
    info, where = file.weights[name], f"{file.path}: {name}"
    fields: dict[str, Any] = {field: file.read(part) for field, part in file.parts[name].items()}
    if "input_scale" in fields and fields["input_scale"].numel() == 1:
        fields["input_scale"] = fields["input_scale"].reshape(())
    if info.format is DenseInt8:
        fields["quantize_input"] = info.quantize_input
    else:
        rows, columns = fields.pop("shape").tolist()
        fields["columns"] = columns
        if info.format is Block:
            fields["rows"] = rows
        if rows < 0 or columns < 0:
            raise CheckpointError(f"{where}: shape: negative: [{rows}, {columns}]")
        if info.format is SemiStructured and fields["values"].shape[0] != rows:
            raise CheckpointError(f"{where}: shape: {rows} rows, but {fields['values'].shape[0]} of values")
        if info.format in (Bitmap, Csr):
            _check_shapes(where, rows, columns, fields)
    with explained(where):
        format = info.format(**fields)
        format.check()
        if info.kernel_size is not None and format.shape[1] % math.prod(info.kernel_size):
            raise ValueError(f"{format.shape[1]} columns are not of kernels {list(info.kernel_size)}")
    return format


def _check_shapes(where: str, rows: int, columns: int, fields: dict[str, Any]) -> None:
    """Checks a sparse weight's shape against the shapes of its tensors."""
    offsets = fields["row_offsets" if "row_offsets" in fields else "crow_indices"]
    if offsets.shape[0] != rows + 1:
        raise CheckpointError(f"{where}: shape: {rows} rows, but {offsets.shape[0]} row offsets")
    if "bitmask" in fields:
        if tuple(fields["bitmask"].shape) != (rows, (columns + 7) // 8):
            raise CheckpointError(f"{where}: bitmask: {list(fields['bitmask'].shape)} is not for [{rows}, {columns}]")
        return
    if bool((offsets[1:] < offsets[:-1]).any()) or offsets[0] != 0 or offsets[-1] != fields["values"].shape[0]:
        raise CheckpointError(f"{where}: crow_indices: must rise from 0 to the number of values")


def weight_parts(name: str, format: Format) -> dict[str, Tensor]:
    """The tensors of a compressed weight under their names on disk."""
    shape = torch.tensor(format.shape, dtype=torch.int64, device="cpu")
    found = {}
    for field, part in PARTS[type(format)].items():
        tensor = shape if field == "shape" else getattr(format, field)
        if tensor is not None:
            found[name + part.suffix] = tensor.detach()
    if getattr(format, "input_scale", None) is not None:
        found[name.removesuffix("weight") + "input_scale"] = format.input_scale.detach().reshape(-1)  # type: ignore
    return found


def header_metadata(
    weights: Mapping[str, WeightInfo], aliases: Mapping[str, str], recipe: Mapping[str, Any] | None
) -> dict[str, str]:
    """The header's strings for these weights, aliases and recipe."""
    return {
        "format": "pt",
        "engine_format_version": FORMAT_VERSION,
        "engine_recipe": json.dumps(recipe),
        "engine_weights": json.dumps({name: info.to_dict() for name, info in weights.items()}),
        "engine_aliases": json.dumps(dict(aliases)),
    }
