"""Compresses a model on disk without its code: one tensor in memory at a time, told apart by name and shape.

Two passes. The first finds thresholds, counts what is kept and so knows every size; the second compresses and writes.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine._checkpoint_file import FORMAT_VERSION, WeightInfo, header_metadata, weight_parts
from engine._journal import Journal
from engine._safetensors import CheckpointError, Entry, TensorWriter, partial_path
from engine._source import CONV1D, Source, choose
from engine.compress.importance import Cut, among_ties, blocks_cut, limit_and_ties, most_beyond
from engine.compress.recipe import Recipe
from engine.formats import Bitmap, Block, DenseInt8, Format, SemiStructured
from engine.nn.conv2d import as_matrix
from engine.ops._block import BLOCK_SHAPE, block_areas, block_norms

CHUNK_ELEMENTS = 1 << 22
JOURNAL_VERSION = 2  # of what the first pass finds
SYNC_BYTES = 64 << 20  # of tensors that may have to be compressed again after an interruption
HALF = 16  # bits of a float32

Tick = Callable[[str, int], object]  # called with a tensor's name and its bytes when a pass has dealt with it


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One compressed tensor."""

    name: str
    shape: tuple[int, ...]
    format: str
    sparsity: float
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass
class Result:
    """What became of a model: compressed tensors, the reason for each one left alone, names that were only copied."""

    compressed: list[Outcome]
    left_alone: dict[str, str]
    copied: list[str]
    bytes_before: int
    bytes_after: int

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass
class _Plan:
    """What the first pass found for one weight: where to cut, None where nothing is asked; the form it will have."""

    cut: Cut | None
    format: Format  # on the meta device
    share: float | None = None  # that is pruned, where the format can't tell without data

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that is pruned."""
        return self.format.sparsity if self.share is None else self.share


def compress_file(
    source: Source, out: Path, recipe: Recipe, tick: Tick = lambda name, count: None, resume: bool = False
) -> Result:
    """Writes `source`, compressed as `recipe` says, to the safetensors file `out`.

    Two-dimensional float tensors named `<module>.weight` count as Linear, as Embedding where the name says so, or as
    Conv1D where the bias does, and four-dimensional ones as Conv2d. What turns out to be of a transposed convolution,
    or of one with groups, is loaded as the dense weight that it stands for.
    With `resume`, what is done when the work ends early stays beside `out`, and another call goes on from there to the
    same file, bit by bit.

    Raises:
        ValueError: a target matches nothing, a weight holds a NaN or an infinity, or what lies there to be resumed is
            of another model or recipe.
        CheckpointError: the source is damaged, or names a tensor as a compressed one would be named.
        OSError: reading or writing failed.
    """
    chosen, left = choose(source, recipe)
    with Journal(journal_path(out) if resume else None, _identity(source, recipe), "engine.compress") as journal:
        return _compress_all(source, out, recipe, tick, resume, chosen, left, journal)


def _compress_all(
    source: Source,
    out: Path,
    recipe: Recipe,
    tick: Tick,
    resume: bool,
    chosen: dict[str, str],
    left: dict[str, str],
    journal: Journal,
) -> Result:
    cut = _tensors(journal.get("cut of the model", lambda: _plain(_model_cut(source, chosen, recipe))))
    plans: dict[str, _Plan] = {}
    outcomes: list[Outcome] = []
    for name in source.files:
        if name in chosen:
            plan = _plan(name, source, chosen[name], recipe, cut, journal)
            before, after = source.entry(name).nbytes, plan.format.nbytes
            if recipe.guard == "size" and after >= before:
                left[name] = f"not smaller: {before:,} → {after:,} bytes as {plan.format.label}"
            else:
                shape, label, sparsity = source.entry(name).shape, plan.format.label, plan.sparsity
                plans[name] = plan
                outcomes.append(Outcome(name, shape, label, sparsity, before, after))
        tick(name, source.entry(name).nbytes)
    entries: dict[str, Entry] = {}
    for name in source.files:
        parts = weight_parts(name, plans[name].format) if name in plans else {}
        described = {part: Entry.of(tensor) for part, tensor in parts.items()} or {name: source.entry(name)}
        if taken := entries.keys() & described.keys():
            raise CheckpointError(f"{source.path}: {min(taken)}: a compressed weight's tensor would have the same name")
        entries |= described
    weights = {
        name: WeightInfo.of(
            plan.format, _dtype(source, name), tuple(source.entry(name).shape[2:]) or None, chosen[name] == CONV1D
        )
        for name, plan in plans.items()
    }
    metadata = {**source.metadata, **header_metadata(weights, source.aliases, recipe.to_dict())}
    there = {name for name in source.files if f"written {name}" in journal and partial_path(out).exists()}
    parts_there: list[str] = []
    for name in there:
        parts_there += weight_parts(name, plans[name].format) if name in plans else [name]
    with TensorWriter(out, entries, metadata, parts_there if resume else None) as writer:
        unsaid, unsynced = [], 0  # what is written counts once it is sure to stay
        for name in source.files:
            if name not in there:
                weight = source.read(name)
                written = {name: weight}
                if name in plans:
                    written = weight_parts(name, _compress(_matrix(weight, chosen[name]), plans[name]))
                for part, tensor in written.items():
                    writer.write(part, tensor)
                unsaid.append(name)
                unsynced += source.entry(name).nbytes
            if resume and unsynced >= SYNC_BYTES:
                writer.sync()
                for done in unsaid:
                    journal.put(f"written {done}", True)
                unsaid, unsynced = [], 0
            tick(name, source.entry(name).nbytes)
    journal.remove()
    copied = [name for name in source.files if name not in plans and name not in left]
    return Result(outcomes, left, copied, source.nbytes, sum(entry.nbytes for entry in entries.values()))


def _matrix(weight: Tensor, kind: str) -> Tensor:
    """A weight as the matrix `[N, K]` to compress."""
    return as_matrix(weight, transposed=kind == CONV1D)


def _dtype(source: Source, name: str) -> torch.dtype:
    dtype = source.entry(name).dtype
    assert dtype is not None
    return dtype


def _model_cut(source: Source, chosen: Mapping[str, str], recipe: Recipe) -> Cut | None:
    """Where all weights are cut, or None where each has a cut of its own.

    For scope "model" that is what `limit_and_ties` gives for all of them together, but with one in memory at a time.
    Magnitudes in float32 are ordered as their bits are, so two rounds of counting find the k-th smallest: by the upper
    half of the bits, then, within the half where it lies, by the lower.
    """
    prune = recipe.prune
    if prune is not None and prune.threshold is not None:
        return _tensors((prune.threshold, None))
    if prune is None or prune.sparsity is None or prune.scope != "model":
        return None
    names = [name for name, kind in chosen.items() if kind != "Embedding"]
    if prune.pattern == "block":
        norms, shapes = [], []
        for name in names:
            weight = _matrix(source.read(name), chosen[name])
            norms.append(block_norms(weight))
            shapes.append((weight.shape[0], weight.shape[1]))
        return blocks_cut(norms, shapes, prune.sparsity)
    count = sum(math.prod(source.entry(name).shape) for name in names)
    wanted = rank = round(prune.sparsity * count)
    if rank == 0:
        return _tensors((0.0, None))
    prefix = 0
    for level in (0, 1):
        counts = torch.zeros(1 << HALF, dtype=torch.int64)
        for name in names:
            for chunk in _chunks(_matrix(source.read(name), chosen[name])):
                bits = chunk.float().abs().reshape(-1).view(torch.int32)
                digits = bits >> HALF if level == 0 else bits[bits >> HALF == prefix] & ((1 << HALF) - 1)
                counts += torch.bincount(digits, minlength=1 << HALF)
        below = counts.cumsum(0)
        digit = int((below >= rank).nonzero()[0])
        rank -= int(below[digit] - counts[digit])
        prefix = prefix << HALF | digit
        equal = int(counts[digit])
    excess = equal - rank  # beyond what is wanted; as limit_and_ties
    stays = excess / equal if prefix > 0 and excess > most_beyond(count, wanted) else None
    return _tensors((torch.tensor(prefix, dtype=torch.int32).view(torch.float32).item(), stays))


def journal_path(out: Path) -> Path:
    """Where it is noted how far a run that can be resumed has come."""
    partial = partial_path(out)
    return partial.with_name(f"{partial.name}.jsonl")


def _identity(source: Source, recipe: Recipe) -> str:
    """Model and recipe: what must be the same to go on."""
    files = sorted({file.path for file in source.files.values()})
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return json.dumps([FORMAT_VERSION, JOURNAL_VERSION, states, recipe.to_dict()], sort_keys=True)


def _plain(cut: Cut | None) -> Any:
    return None if cut is None else [None if part is None else part.tolist() for part in cut]


def _tensors(cut: Any) -> Cut | None:
    """The inverse of `_plain`: floats of either width come back as they were."""
    if cut is None:
        return None
    limit, stays = cut
    return torch.tensor(limit, dtype=torch.float32), None if stays is None else torch.tensor(stays, dtype=torch.float64)


def _plan(name: str, source: Source, kind: str, recipe: Recipe, cut: Cut | None, journal: Journal) -> _Plan:
    """What will become of a weight."""
    found = journal.get(f"look at {name}", lambda: _look(name, _matrix(source.read(name), kind), kind, recipe, cut))
    rows, columns = source.entry(name).shape[0], math.prod(source.entry(name).shape[1:])
    if kind == CONV1D:
        rows, columns = columns, rows
    scale = torch.empty(rows, dtype=torch.float32, device="meta")
    if found is None:
        return _Plan(None, DenseInt8(torch.empty(rows, columns, dtype=torch.int8, device="meta"), scale))
    assert recipe.prune is not None
    dtype = torch.int8 if recipe.quantize else _dtype(source, name)
    scales = scale if recipe.quantize else None
    if recipe.prune.pattern == "2:4":
        values = torch.empty(rows, 2 * -(-columns // 4), dtype=dtype, device="meta")
        metadata = torch.empty(rows, -(-columns // 8), dtype=torch.uint8, device="meta")
        return _Plan(None, SemiStructured(values, metadata, columns, scales))
    own, kept = _tensors(found["cut"]), found["kept"]
    if recipe.prune.pattern == "block":
        values = torch.empty(kept, *BLOCK_SHAPE, dtype=dtype, device="meta")
        crow_indices = torch.empty(-(-rows // BLOCK_SHAPE[0]) + 1, dtype=torch.int32, device="meta")
        col_indices = torch.empty(kept, dtype=torch.int32, device="meta")
        return _Plan(own, Block(values, crow_indices, col_indices, rows, columns, scales), found["sparsity"])
    values = torch.empty(kept, dtype=dtype, device="meta")
    bitmask = torch.empty(rows, (columns + 7) // 8, dtype=torch.uint8, device="meta")
    row_offsets = torch.empty(rows + 1, dtype=torch.int64, device="meta")
    return _Plan(own, Bitmap(values, bitmask, row_offsets, columns, scales))


def _look(name: str, weight: Tensor, kind: str, recipe: Recipe, cut: Cut | None) -> dict[str, Any] | None:
    """Where a weight to be pruned is cut and how much it keeps; None for one that is only quantised."""
    if not all(bool(chunk.isfinite().all()) for chunk in _chunks(weight)):
        raise ValueError(f"{name}: holds a NaN or an infinity")
    if kind == "Embedding" or recipe.prune is None:
        assert recipe.quantize is not None
        return None
    if recipe.prune.pattern == "2:4":  # what is kept follows from the shape
        return {"cut": None, "kept": None}
    sparsity, by_row = recipe.prune.sparsity, recipe.prune.scope == "row"
    if recipe.prune.pattern == "block":
        norms, shape = block_norms(weight), (weight.shape[0], weight.shape[1])
        if cut is None:
            assert sparsity is not None
            cut = blocks_cut([norms], [shape], sparsity, by_row)
        keep = norms > among_ties(norms, *cut)
        share = (block_areas(*shape) * keep).sum().item() / max(1, weight.numel())
        return {"cut": _plain(cut), "kept": int(keep.sum()), "sparsity": 1 - share}
    if cut is None:
        assert sparsity is not None
        cut = limit_and_ties([weight], sparsity, by_row)
    return {"cut": _plain(cut), "kept": _count_kept(weight, among_ties(weight, *cut))}


def _compress(weight: Tensor, plan: _Plan) -> Format:
    if isinstance(plan.format, DenseInt8):
        return DenseInt8.from_dense(weight)
    values = torch.int8 if plan.format.values.dtype == torch.int8 else None
    if isinstance(plan.format, SemiStructured):
        return SemiStructured.from_dense(weight, values)
    assert plan.cut is not None
    if isinstance(plan.format, Block):
        return Block.from_dense(weight, among_ties(block_norms(weight), *plan.cut), values)
    return Bitmap.from_dense(weight, among_ties(weight, *plan.cut), values)


def _chunks(weight: Tensor) -> Iterable[Tensor]:
    return weight.split(max(1, CHUNK_ELEMENTS // max(1, weight.shape[1])))


def _count_kept(weight: Tensor, threshold: Tensor) -> int:
    """How many weights lie above the threshold, `[]`, `[N, 1]` or `[N, K]`."""
    limits = threshold.expand(weight.shape[0], 1) if threshold.dim() < 2 else threshold
    pairs = zip(_chunks(weight), limits.split(max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))), strict=True)
    return sum(int((chunk.float().abs() > limit).sum()) for chunk, limit in pairs)
