"""A model on disk without its code: where each tensor is, and what each weight is of, by name and shape."""

import json
import math
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from engine._checkpoint_file import INDEX, WEIGHTS, CheckpointFile, weights_in
from engine._safetensors import CheckpointError, Entry, explained
from engine.compress.recipe import DEFAULT_TARGETS, Recipe
from engine.compress.targets import check_patterns, matches
from engine.ops._check import FLOAT_DTYPES

# What other tools keep weights in: never copied beside the compressed ones.
WEIGHT_SUFFIXES = {
    ".bin",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
    ".pt",
    ".pth",
    ".safetensors",
    ".tflite",
}
PIPELINE_MODULE = re.compile(r"\d+_\w+")  # sentence-transformers keeps further layers of its pipeline in such folders
EMBEDDING = re.compile(r"embed|(^|[._])emb($|[._])|(^|\.)(wte|wpe|shared|relative_attention_bias)$", re.IGNORECASE)
ROUTER = re.compile(r"((?:.*\.)?)(?:gate|router)")  # beside a mixture's experts: of a class with no compressed twin
CONV1D = "Conv1D"


class Source:
    """A safetensors file, or a Hugging Face folder with one or several: where each tensor is.

    Raises:
        FileNotFoundError: there is no such file or folder, or no weights in it.
        CheckpointError: the index or a file is damaged, or compressed already.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.is_folder = path, path.is_dir()
        self.files: dict[str, CheckpointFile] = {}
        self.aliases: dict[str, str] = {}  # of tied weights, in a file by engine.save
        for name, file in _files_by_tensor(path) if self.is_folder else _all_of(CheckpointFile(path)):
            if file.weights:
                raise CheckpointError(f"{file.path}: compressed already")
            self.files[name] = file
            self.aliases |= file.aliases

    def entry(self, name: str) -> Entry:
        """Type and shape of a tensor."""
        return self.files[name].entries[name]

    def read(self, name: str) -> Tensor:
        """A tensor."""
        return self.files[name].read(name)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.entry(name).nbytes for name in self.files)

    @property
    def metadata(self) -> dict[str, str]:
        """Header strings of all files."""
        return {key: value for file in self.files.values() for key, value in file.metadata.items()}


def _all_of(file: CheckpointFile) -> Iterable[tuple[str, CheckpointFile]]:
    return [(name, file) for name in file.entries]


def _files_by_tensor(folder: Path) -> Iterable[tuple[str, CheckpointFile]]:
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return _all_of(CheckpointFile(weights_in(folder)))
    where = f"{folder / INDEX}"
    with explained(where):
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(places, dict):
            raise ValueError("weight_map: expected an object")
    shards: dict[str, CheckpointFile] = {}
    found = []
    for name, shard in places.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{where}: {name}: expected a file's name, got {shard!r:.200}")
        if shard not in shards:
            shards[shard] = CheckpointFile(folder / shard)
        if name not in shards[shard].entries:
            raise CheckpointError(f"{where}: {name}: is not in {shard}")
        found.append((name, shards[shard]))
    return found


def choose(source: Source, recipe: Recipe) -> tuple[dict[str, str], dict[str, str]]:
    """The weights to compress, each with the class its name speaks for, and those left alone with the reason."""
    check_patterns("compress", (*recipe.targets, *recipe.ignore))
    chosen: dict[str, str] = {}
    left: dict[str, str] = {}
    used: set[str] = set()
    transposed = _transposed(source)
    mixtures = {name[: name.index("experts.")] for name in source.files if "experts." in name}
    for name in source.files:
        module, _, last = name.rpartition(".")
        entry = source.entry(name)
        if last != "weight" or len(entry.shape) not in (2, 4):
            continue
        aliases = [alias for alias, stored in source.aliases.items() if stored == name]
        homes = [module, *(alias.rpartition(".")[0] for alias in aliases)]
        embeds = any(map(EMBEDDING.search, homes)) and f"{module}.bias" not in source.files  # no embedding has one
        kind = "Conv2d" if len(entry.shape) == 4 else "Embedding" if embeds else "Linear"
        if name in transposed and not embeds:
            kind = CONV1D
        hits = [pattern for pattern in recipe.targets if any(_means(pattern, home, kind) for home in homes)]
        used.update(hits)
        ignored = next((p for p in recipe.ignore if any(_means(p, home, kind) for home in homes)), None)
        if not hits:
            left[name] = "not a target"
        elif ignored is not None:
            left[name] = f"ignored by {ignored!r}"
        elif entry.dtype not in FLOAT_DTYPES:
            left[name] = f"its dtype is {str(entry.dtype).removeprefix('torch.')}"
        elif math.prod(entry.shape) == 0:
            left[name] = "empty"
        elif (router := ROUTER.fullmatch(module)) and router[1] in mixtures and {*hits} <= {*DEFAULT_TARGETS}:
            left[name] = "a mixture's router, which is no layer"
        elif other := next((alias for alias in aliases if alias.rpartition(".")[2] != "weight"), None):
            left[name] = f"tied to {other}, which is no layer's weight"
        elif kind == "Conv2d" and entry.shape[1] == 1 and entry.shape[0] > 1:
            left[name] = "of one input channel: it may be depthwise, and such stay dense"
        elif kind == "Embedding" and recipe.quantize is None:
            left[name] = "embeddings are quantised but never pruned"
        else:
            chosen[name] = kind
    unused = [pattern for pattern in recipe.targets if pattern not in used]
    if unused and (len(unused) == len(recipe.targets) or set(unused) - set(DEFAULT_TARGETS)):
        raise ValueError(f"target {unused[0]!r} matches no weight")
    return chosen, left


def ignored_in_vain(source: Source, recipe: Recipe) -> list[str]:
    """The patterns to ignore that mean nothing in the model."""
    names = [*source.files, *source.aliases]
    homes = {name.rpartition(".")[0] for name in names}
    kinds = {*DEFAULT_TARGETS}  # what a class's name may say of a weight
    return [
        pattern for pattern in recipe.ignore if pattern not in kinds and not any(_means(pattern, h, "") for h in homes)
    ]


def _transposed(source: Source) -> set[str]:
    """Weights `[K, N]` of Hugging Face's Conv1D, told by biases as long as they are wide.

    A square one is what most of the others are that have the last part of its name, or stand beside it.
    """
    certain: dict[str, bool] = {}
    square: list[str] = []
    for name in source.files:
        module, _, last = name.rpartition(".")
        shape = source.entry(name).shape
        if last != "weight" or len(shape) != 2 or f"{module}.bias" not in source.files:
            continue
        bias = source.entry(f"{module}.bias").shape
        if bias in ((shape[0],), (shape[1],)):
            if shape[0] == shape[1]:
                square.append(module)
            else:
                certain[module] = bias == (shape[1],)
    votes: dict[str, list[bool]] = {}
    for module, found in certain.items():
        for key in _kin(module):
            votes.setdefault(key, []).append(found)
    for module in square:
        answers = [vote for key in _kin(module) for vote in votes.get(key, ())]
        certain[module] = 2 * sum(answers) > len(answers)
    return {f"{module}.weight" for module, found in certain.items() if found}


def _kin(module: str) -> tuple[str, str]:
    """The last part of a module's name, and where it stands."""
    around, _, last = module.rpartition(".")
    return f"*.{last}", f"{around}."


def _means(pattern: str, module: str, kind: str) -> bool:
    """As `matches`; a block's name also stands for the layers inside it."""
    return matches(pattern, module, kind) or (not pattern.startswith("re:") and module.startswith(f"{pattern}."))


def check_apart(model: Path, out: Path) -> None:
    """Raises ValueError where writing to `out` would touch the model."""
    home, target = model.resolve(), out.resolve()
    if target == home or (model.is_dir() and home in target.parents) or (out.exists() and out.samefile(model)):
        raise ValueError(f"{out}: would be written into the model itself")
    if model.is_dir() and target in home.parents:
        raise ValueError(f"{out}: holds the model's own folder")


def check_parent(out: Path) -> None:
    """Raises unless there is a folder to write `out` into."""
    if out.parent.exists() and not out.parent.is_dir():
        raise ValueError(f"{out.parent}: is a file, not a folder to write into")
    if not out.parent.is_dir():
        raise FileNotFoundError(2, "", str(out.parent))


def copy_companions(folder: Path, out: Path) -> None:
    """Copies configuration, tokenizer and the like from one model folder to another, but no weights."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(root).relative_to(folder)
        pipeline = bool(inside.parts) and PIPELINE_MODULE.fullmatch(inside.parts[0]) is not None
        for name in files:
            weights = Path(name).suffix in WEIGHT_SUFFIXES or name.endswith(".index.json")
            if name.startswith(".") or (weights and not pipeline):
                continue
            (out / inside).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(root) / name, out / inside / name)


def remove_stale_weights(out: Path) -> None:
    """Removes the shards and index of a model that was in this folder before: a reader would take them for current."""
    for path in (*out.glob("model-*-of-*.safetensors"), out / INDEX):
        path.unlink(missing_ok=True)
