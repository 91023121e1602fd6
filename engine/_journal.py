"""What long work has found out so far, in a file, so that it can be ended and go on."""

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


class Journal:
    """Values by key, one JSON object a line, each written when it is known. A line that was cut off doesn't count.

    While it is open nobody else can open it: two that work on the same would spoil each other's results.

    Args:
        path: the file; None keeps nothing.
        identity: what must be the same for values to be of use again.
        what: begins an error's message, "engine.search" say.

    Raises:
        ValueError: the file is no journal, has another identity, or is in use.
    """

    def __init__(self, path: str | os.PathLike | None, identity: str, what: str) -> None:
        self.path = None if path is None else Path(path)
        self._found: dict[str, Any] = {}
        self._file: BinaryIO | None = None
        if self.path is None:
            return
        self._file = self.path.open("a+b")
        try:
            self._read(identity, what)
        except BaseException:
            self.close()
            raise

    def _read(self, identity: str, what: str) -> None:
        assert self._file is not None
        path, taken = self.path, False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError:
            pass  # a file system without locks
        if taken or os.fstat(self._file.fileno()).st_nlink == 0:  # or another run ended meanwhile and removed it
            raise ValueError(f"{what}: {path}: another run works on this, or what one left behind does")
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        whole = lines[:-1]  # after the last line's end there is nothing, or what was cut off
        try:
            entries = [json.loads(line) for line in whole]
            head = entries[0]["identity"] if entries else identity
            self._found = {entry["key"]: entry["value"] for entry in entries[1:]}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{what}: {path}: can't be read as what an earlier run left: {error}") from None
        if head != identity:
            raise ValueError(f"{what}: {path}: was left by a run on something else, or with other settings: remove it")
        if lines and lines[-1]:
            self._file.truncate(sum(len(line) + 1 for line in whole))
        if not entries:
            self._append({"identity": identity})

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """The value of `key`: what was found before, or what `make` finds now."""
        if key not in self._found:
            self.put(key, make())
        return self._found[key]

    def put(self, key: str, value: Any) -> None:
        """Notes `value`, a plain one."""
        self._found[key] = value
        self._append({"key": key, "value": value})

    def remove(self) -> None:
        """Removes the file: the work is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Lets others open the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _append(self, entry: dict[str, Any]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
