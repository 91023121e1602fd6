"""A model with data to run it on, for the command line: from a Python file, or a Hugging Face folder and texts."""

import dataclasses
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from engine._source import INDEX, WEIGHTS, Source


@dataclasses.dataclass
class Task:
    """What search and distill need.

    Attributes:
        model: dense.
        batches: to calibrate and train on.
        measured: to measure losses on, other ones; `batches` where there are none.
        example_inputs: of the shape that the model is to be fast for; the first batch where none are given.
        loss: the task's own, for training without a teacher; None: the dense model teaches.
    """

    model: nn.Module
    batches: Iterable[Any]
    measured: Iterable[Any] | None = None
    example_inputs: Any = None
    loss: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ValueError(f"model: expected a torch.nn.Module, got {type(self.model).__name__}")
        for name in ("batches", "measured"):
            if isinstance(getattr(self, name), Iterator):
                raise ValueError(
                    f"{name}: expected batches that can be gone through again, got an iterator: use a list"
                )
        if self.measured is None:
            self.measured = self.batches
        if self.example_inputs is None:
            self.example_inputs = next(iter(self.batches), None)
        if self.example_inputs is None:
            raise ValueError("batches: expected at least one, got none")


def load_task(source: str, texts: Path | None, batch: int, tokens: int, measured: int) -> Task:
    """`file.py:function`, which returns a mapping of Task's fields; or a Hugging Face folder, run on `texts`, by line.

    Of the texts' batches the first `measured` are those to measure on.

    Raises:
        ValueError: the source is neither, or gives something else.
        FileNotFoundError: there is no such file or folder.
    """
    path, colon, function = source.rpartition(":")
    if colon and path.endswith(".py"):
        return _from_function(Path(path), function)
    folder = Path(source)
    if not folder.exists():
        raise FileNotFoundError(2, "", source)
    if not folder.is_dir():
        raise ValueError(f"{source}: expected a Hugging Face folder, or file.py:function that makes the model")
    if texts is None:
        raise ValueError("a Hugging Face folder needs --texts FILE: real inputs, one a line")
    return _from_folder(folder, texts, batch, tokens, measured)


def _from_function(path: Path, name: str) -> Task:
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(2, "", str(path))
    sys.path.insert(0, str(path.resolve().parent))  # so that it can import its neighbours, as when it is run
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path}: has no function {name!r}")
    made = function()
    known = {field.name for field in dataclasses.fields(Task)}
    needed = {"model", "batches"}
    if not isinstance(made, Mapping) or not needed <= made.keys() <= known:
        others = ", ".join(sorted(known - needed))
        got = f"the keys {', '.join(map(str, made))}" if isinstance(made, Mapping) else type(made).__name__
        raise ValueError(f"{path}:{name}: expected a dict with model and batches, and perhaps {others}; got {got}")
    return Task(**made)


def _from_folder(folder: Path, texts: Path, batch: int, tokens: int, measured: int) -> Task:
    try:
        import transformers
    except ImportError:
        raise ValueError("a Hugging Face folder needs the package transformers: pip install transformers") from None
    if (folder / WEIGHTS).exists() or (folder / INDEX).exists():
        Source(folder)  # raises where it is compressed already: `from_pretrained` would take int8 for floats
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.is_encoder_decoder:
        raise ValueError(f"{folder}: is an encoder with a decoder, which needs inputs for both: use file.py:function")
    # With the head that it was saved with, if it is one of the package's own.
    names = [name for name in config.architectures or () if hasattr(transformers, name)]
    kind = getattr(transformers, names[0]) if names else transformers.AutoModel
    try:
        lines = [line for line in texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{texts}: expected text in UTF-8: {error.reason} at byte {error.start}") from None
    groups = [lines[i : i + batch] for i in range(0, len(lines), batch)]
    if len(groups) <= measured:
        raise ValueError(f"{texts}: {len(lines)} texts are too few: {measured} batches of {batch} are only measured on")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    how = {"padding": True, "truncation": True, "max_length": tokens, "return_tensors": "pt"}
    batches = [dict(tokenizer(group, **how)) for group in groups]
    model = kind.from_pretrained(folder, local_files_only=True).eval()
    return Task(model, batches[measured:], batches[:measured], batches[0])
