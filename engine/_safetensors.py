"""Safetensors files one tensor at a time: read lazily, written beside their target and renamed into place."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import secrets
import stat
import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes; the safetensors library reads no longer one
REOPEN_BYTES = 64 << 20  # mapped pages that were read count as this process's memory until the file is closed
WRITE_BYTES = 64 << 20  # a single write takes no more than 2 GiB on Linux
TORCH_SAVE = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")  # how its files begin, of today and of before PyTorch 1.6
LONGEST_NAME = 200  # bytes of a file's name, of the 255 that most file systems take: temporary ones add to it


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or not for this model; the message names the file and the tensor."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a header says of a tensor. `dtype` is None where PyTorch or this engine has no such type as `stored`."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    stored: str = dataclasses.field(default="", compare=False)

    @classmethod
    def of(cls, tensor: Tensor) -> "Entry":
        """The entry that describes `tensor`."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of the data, 0 for an unknown type."""
        return math.prod(self.shape) * self.dtype.itemsize if self.dtype else 0

    def __str__(self) -> str:
        return f"{self.type_name} {list(self.shape)}"

    @property
    def type_name(self) -> str:
        """PyTorch's name of the type, or the file's."""
        return self.stored if self.dtype is None else str(self.dtype).removeprefix("torch.")


@contextlib.contextmanager
def explained(where: str) -> Iterator[None]:
    """Turns what a bad file makes safetensors, json and PyTorch raise into CheckpointError, beginning with `where`."""
    try:
        yield
    except (CheckpointError, OSError):
        raise
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OverflowError, RecursionError) as error:
        lines = str(error).splitlines()  # PyTorch appends a stack trace to some
        raise CheckpointError(f"{where}: {lines[0] if lines else type(error).__name__}") from error


class TensorFile:
    """A safetensors file whose header has been read and checked; its tensors are read when asked for.

    Attributes:
        path: the file.
        entries: type and shape of each tensor, by name.
        metadata: the header's strings.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no file, or its header is damaged.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        status = self.path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{self.path}: not a file")
        if status.st_size < 10:
            raise CheckpointError(f"{self.path}: too short for a safetensors file: {status.st_size} bytes")
        with self.path.open("rb") as raw:
            if raw.read(4) in TORCH_SAVE:
                raise CheckpointError(f"{self.path}: a file of torch.save: write its tensors by safetensors first")
        self._bytes_read = 0
        with explained(f"{self.path}"):
            file = safe_open(self.path, "pt")
            # Sorted, as the library gives them in another order each time: what is written from them is to be the same.
            self.metadata: dict[str, str] = dict(sorted((file.metadata() or {}).items()))
            self.entries = {name: self._entry(file, name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        self._file: Any = file

    @staticmethod
    def _entry(file: Any, name: str) -> Entry:
        part = file.get_slice(name)
        return Entry(DTYPES.get(part.get_dtype()), tuple(part.get_shape()), part.get_dtype())

    def read(self, name: str) -> Tensor:
        """A copy of a tensor in memory of its own, on the CPU. CheckpointError where that fails."""
        with self._mapped(name) as tensor:
            return tensor.clone()

    def read_into(self, name: str, target: Tensor) -> None:
        """Copies a tensor into one of the same type and shape, without another copy on the way."""
        with self._mapped(name) as tensor, torch.no_grad():
            target.copy_(tensor)

    @contextlib.contextmanager
    def _mapped(self, name: str) -> Iterator[Tensor]:
        """A tensor over the file's own pages."""
        where, entry = f"{self.path}: {name}", self.entries[name]
        if entry.dtype is None:
            raise CheckpointError(f"{where}: its data type, {entry.type_name}, is not supported")
        with explained(where):
            self._file = self._file or safe_open(self.path, "pt")
            tensor = self._file.get_tensor(name)
        if Entry.of(tensor) != entry:  # only where the file was replaced in the meantime
            raise CheckpointError(f"{where}: the file changed while it was read: {entry}, then {Entry.of(tensor)}")
        try:
            yield tensor
        finally:
            self._bytes_read += entry.nbytes
            if self._bytes_read >= REOPEN_BYTES:
                self._file, self._bytes_read = None, 0


def bytes_of(tensor: Tensor) -> memoryview:
    """The elements of a tensor that has some, row by row; without a copy where they lie so on the CPU."""
    data = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    if data.stride(0) != 1:  # a single element may have any
        data = torch.empty(1, dtype=data.dtype).copy_(data)
    return memoryview(data.view(torch.uint8).numpy().data)


class TensorWriter:
    """Writes a safetensors file whose tensors are known by type and shape, each written when its data is there.

    As every size is known, the header comes first, needs no rewriting, and gives each tensor its place from the start;
    wider types come first, so that every tensor is aligned. All of it goes to a temporary file in the same folder, that
    takes the target's name when the `with` block ends well, and is removed when it doesn't; or, with `resume`, stays
    for another try.

    Args:
        path: the target, replaced if it exists, with the permissions that it had; of a link what it points to.
        entries: type and shape of every tensor, by name.
        metadata: strings for the header.
        resume: names that an earlier try wrote to the temporary file, if it is there; None: nothing is kept.

    Raises:
        CheckpointError: a data type that safetensors doesn't have, more names than a header holds, the target is there
            and no file, or with `resume` the temporary file is of something else.
        OSError: the file can't be written; a full disk is noticed before the first tensor.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        entries: Mapping[str, Entry],
        metadata: Mapping[str, str],
        resume: Collection[str] | None = None,
    ) -> None:
        self.path = Path(path)
        if self.path.is_symlink():
            self.path = self.path.resolve()
        self._entries = dict(entries)
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        self._offsets: dict[str, int] = {}
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: -_item_size(*item)):
            self._offsets[name], end = end, end + entry.nbytes
            assert entry.dtype is not None
            header[name] = {
                "dtype": _DTYPE_NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [self._offsets[name], end],
            }
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > HEADER_LIMIT:
            raise CheckpointError(f"{self.path}: the header would take {len(text)} bytes, the limit is {HEADER_LIMIT}")
        self._header = struct.pack("<Q", len(text)) + text
        self._missing = set(entries)
        self.nbytes = len(self._header) + end
        self._fd = -1
        self._temporary = beside(self.path, f"{secrets.token_hex(6)}.tmp")
        self._keep = resume is not None
        if resume is not None:
            self._temporary = partial_path(self.path)
        self._goes_on = bool(resume) and self._temporary.exists()
        if resume is not None and self._goes_on:
            self._missing -= set(resume)

    def __enter__(self) -> "TensorWriter":
        if self.path.is_dir():
            raise IsADirectoryError(f"{self.path} is a folder")
        if self.path.exists() and not self.path.is_file():
            raise CheckpointError(f"{self.path}: not a file")
        if self._goes_on:
            self._open_partial()
            return self
        if self._keep:  # begun, but with nothing in it that counts
            self._temporary.unlink(missing_ok=True)
        try:
            self._fd = os.open(self._temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            os.posix_fallocate(self._fd, 0, self.nbytes)
            self._write_at(0, memoryview(self._header))
        except OSError as error:  # about the file that was asked for, not the temporary one
            self._discard()
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        except BaseException:
            self._discard()
            raise
        return self

    def _open_partial(self) -> None:
        """Opens what an earlier try left, after a look at its header."""
        self._fd = os.open(self._temporary, os.O_RDWR)
        header = os.read(self._fd, len(self._header))
        if header != self._header or os.fstat(self._fd).st_size > self.nbytes:
            os.close(self._fd)
            self._fd = -1
            raise CheckpointError(f"{self._temporary}: was left by a run on something else: remove it")

    def sync(self) -> None:
        """Makes what was written so far last through a power cut."""
        os.fsync(self._fd)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor's data in its place. ValueError unless type and shape are those that were announced."""
        if Entry.of(tensor) != self._entries[name]:
            raise ValueError(f"{name}: announced as {self._entries[name]}, got {Entry.of(tensor)}")
        if tensor.numel():
            self._write_at(len(self._header) + self._offsets[name], bytes_of(tensor))
        self._missing.discard(name)

    def _write_at(self, offset: int, data: memoryview) -> None:
        os.lseek(self._fd, offset, os.SEEK_SET)
        done = 0
        while done < len(data):
            done += os.write(self._fd, data[done : done + WRITE_BYTES])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._missing:
                    raise ValueError(f"{min(self._missing)}: announced, but never written")
                os.fsync(self._fd)
                if self.path.exists():
                    os.chmod(self._fd, stat.S_IMODE(self.path.stat().st_mode))
                os.close(self._fd)
                self._fd = -1
                os.replace(self._temporary, self.path)
                _sync_folder(self.path.parent)
        finally:
            self._discard()

    def _discard(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if not self._keep and self._temporary.parent.is_dir():  # where it was renamed it is gone by now
            self._temporary.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """Where a file is written that an interrupted run may go on with."""
    return beside(path.resolve() if path.is_symlink() else path, "partial")


def beside(path: Path, ending: str) -> Path:
    """A hidden name beside `path`, shortened where it would be longer than a file system takes."""
    name = path.name
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = f"{name[:40]}~{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return path.with_name(f".{name}.{ending}")


def _item_size(name: str, entry: Entry) -> int:
    if entry.dtype not in _DTYPE_NAMES:
        raise CheckpointError(f"{name}: {entry.dtype} can't be stored in a safetensors file")
    assert entry.dtype is not None
    return entry.dtype.itemsize


def _sync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut, where folders can be synced at all."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
