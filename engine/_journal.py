"""What long work has found out so far, in a file, so that it can be ended and go on."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Journal:
    """Values by key, one JSON object a line, each written when it is known. A line that was cut off doesn't count.

    Args:
        path: the file; None keeps nothing.
        identity: what must be the same for values to be of use again.
        what: begins an error's message, "engine.search" say.

    Raises:
        ValueError: the file is no journal, or has another identity.
    """

    def __init__(self, path: str | os.PathLike | None, identity: str, what: str) -> None:
        self.path = None if path is None else Path(path)
        self._found: dict[str, Any] = {}
        if self.path is None:
            return
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        whole = lines[:-1]  # after the last line's end there is nothing, or what was cut off
        try:
            entries = [json.loads(line) for line in whole]
            head = entries[0]["identity"] if entries else identity
            self._found = {entry["key"]: entry["value"] for entry in entries[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{what}: {path}: can't be read as what an earlier run left: {error}") from None
        if head != identity:
            raise ValueError(f"{what}: {path}: was left by a run on something else, or with other settings: remove it")
        if lines and lines[-1]:
            os.truncate(self.path, sum(len(line) + 1 for line in whole))
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

    def _append(self, entry: dict[str, Any]) -> None:
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
