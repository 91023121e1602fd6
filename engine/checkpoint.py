"""save and load_: a model, compressed or not, to one safetensors file and back.

How the file looks is said in engine/_checkpoint_file.py.
"""

import contextlib
import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from engine._checkpoint_file import CheckpointFile, WeightInfo, header_metadata, read_weight, weight_parts, weights_in
from engine._match_names import Slots, match_names
from engine._safetensors import CheckpointError, Entry, TensorWriter
from engine.formats import DenseInt8, Format
from engine.formats._common import check_scales
from engine.nn import CompressedConv2d, CompressedEmbedding, CompressedLinear
from engine.nn._replace import (
    check_not_wrapped,
    give_attributes,
    given_attributes,
    hooks_of,
    is_conv1d,
    set_item,
    switches_of_fused_paths,
)
from engine.nn.attention import attention_unfused
from engine.nn.compressed import _Compressed
from engine.nn.conv2d import why_not

__all__ = ["CheckpointError", "CheckpointFile", "load_", "read_weight", "save"]

REPLACED = (nn.Linear, nn.Embedding, nn.Conv2d, CompressedLinear, CompressedEmbedding, CompressedConv2d)


def save(model: nn.Module, path: str | os.PathLike, recipe: Any = None) -> None:
    """Writes `model`, compressed or not, to a safetensors file that :func:`load_` reads.

    Memory that several names share (tied weights) is written once. The file appears whole or not at all.

    Args:
        model: the model.
        path: the file; one that exists is replaced.
        recipe: the Recipe that made the model, or a dict (its own, or each layer's by name): kept in the header for
            whoever asks later.

    Raises:
        CheckpointError: the state dict holds something that is no tensor, or a tensor that safetensors can't hold; a
            weight was not finite when it was quantised, which :func:`load_` would refuse; or torch.nn.utils.prune has
            taken over the values of one.
        OSError: the file can't be written.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, expected a file's name", str(path))
    tensors: dict[str, Tensor] = {}
    weights: dict[str, WeightInfo] = {}
    aliases: dict[str, str] = {}
    state = model.state_dict()
    seen: dict[Any, str] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, _Compressed):
            continue
        prefix = f"{module_name}." if module_name else ""
        name = f"{prefix}weight"
        format = module.format
        if taken := set(format.TENSORS) - module._parameters.keys():
            raise CheckpointError(f"{name}: {min(taken)} is made at each call: torch.nn.utils.prune.remove it first")
        kernel_size = getattr(module, "kernel_size", None)
        transposed = isinstance(module, CompressedLinear) and module.transposed
        key = (kernel_size, transposed, *(id(getattr(format, field)) for field in format.TENSORS))
        for field in format.TENSORS:
            state.pop(prefix + field, None)
        if seen.setdefault(key, name) != name:
            aliases[name] = seen[key]
            continue
        _expect_data(name, format.values)
        _expect_scales(name, format)
        weights[name] = WeightInfo.of(format, _dense_dtype(module), kernel_size, transposed)
        _add(tensors, weight_parts(name, format))
    for name, tensor in state.items():
        _expect_data(name, tensor)
        lazy = tensor.is_neg(), tensor.is_conj()
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), lazy)
        if tensor.numel() and seen.setdefault(memory, name) != name:
            aliases[name] = seen[memory]
        else:
            _add(tensors, {name: tensor})
    plain_recipe = recipe.to_dict() if hasattr(recipe, "to_dict") else recipe
    metadata = header_metadata(weights, aliases, plain_recipe)
    with TensorWriter(path, {name: Entry.of(tensor) for name, tensor in tensors.items()}, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def _expect_data(name: str, tensor: Any) -> None:
    """Raises CheckpointError unless it is a tensor whose data can be written."""
    fits = isinstance(tensor, Tensor) and tensor.layout == torch.strided
    if not fits or tensor.is_meta or is_traceable_wrapper_subclass(tensor):
        got = "one on the meta device" if fits and tensor.is_meta else type(tensor).__name__
        given = " from its module's get_extra_state" if name.rpartition(".")[2] == "_extra_state" else ""
        raise CheckpointError(f"{name}: only dense tensors with data can be saved, got {got}{given}")


def _expect_scales(name: str, format: Any) -> None:
    """Raises CheckpointError where a row was not finite when it was quantised, which `load_` would refuse."""
    if getattr(format, "scale", None) is not None:
        try:
            check_scales(f"formats.{type(format).__name__}", format.scale, format.input_scale, *format.shape)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{name}: {error}") from None


def _add(tensors: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for name, tensor in more.items():
        if tensors.setdefault(name, tensor) is not tensor:
            raise CheckpointError(f"{name}: two tensors would be stored under this name")


@torch.inference_mode(False)  # the layers that it makes stay, and are to be fit for training
def load_(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Loads a file written by :func:`save` or `engine compress`, or a plain safetensors file, into `model`.

    Every compressed weight replaces the nn.Linear, nn.Embedding, nn.Conv2d or Conv1D at its name; all other tensors
    are copied into the model's own. An nn.MultiheadAttention whose projections are stored as layers of their own
    becomes an :class:`engine.nn.MultiheadAttention`. What was tied when the file was written is tied again. Names
    that differ from the model's by one prefix ("bert."), or as transformers renames them, are taken as the same.
    The whole file is checked before the model changes at all, and after an error or an interrupt the model is as it
    was. The file is closed on return.

    Args:
        model: freshly constructed, or compressed in the same places.
        path: the file, or a folder with it as `model.safetensors`, as `engine compress` makes it of a folder.

    Returns:
        `model`.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        CheckpointError: the file is damaged, or not for this model; the message names the tensor. Or a folder's weights
            are in shards.
        ValueError: layers would be replaced in a model wrapped by DistributedDataParallel or FSDP.
    """
    file = CheckpointFile(weights_in(Path(path)) if Path(path).is_dir() else path)
    try:
        slots = Slots(model)
        names = match_names(file, slots)
    except CheckpointError as error:
        with attention_unfused(model) as unfused:
            if not unfused:
                raise
            check_not_wrapped(model, "load_")
            slots = Slots(model)
            try:
                names = match_names(file, slots)
            except CheckpointError:
                raise error from None  # the model's own names are what its user knows
            _load(model, file, slots, names)
    else:
        _load(model, file, slots, names)
    return model


def _load(model: nn.Module, file: CheckpointFile, slots: Slots, names: Mapping[str, str]) -> None:
    replacements = _replacements(file, slots, names)
    copies, ties = _copies(file, slots, names)
    if replacements or ties:
        check_not_wrapped(model, "load_")
    _commit(model, file, replacements, copies, ties)


def _replacements(file: CheckpointFile, slots: Slots, names: Mapping[str, str]) -> dict[str, nn.Module]:
    """The compressed modules by qualified name: read, checked, and fit for the modules that they replace."""
    homes: dict[str, list[str]] = {}
    for name, source in names.items():
        if source in file.weights and not _stays_dense(file, slots, name, source):
            _check_home(file, slots, name, source)
            homes.setdefault(source, []).append(name)
    found: dict[str, nn.Module] = {}
    for source, weight_names in homes.items():
        format = read_weight(file, source)
        twins: dict[int, nn.Module] = {}
        for name in weight_names:
            module, where = slots.modules[name], f"{file.path}: {source}"
            shape, expected = file.weights[source].dense_shape(format), _dense_shape(module)
            if shape != expected:
                raise CheckpointError(f"{where}: has shape {list(shape)}, the model {list(expected)}")
            if id(module) not in twins:
                twin = twins[id(module)] = _twin(where, module, format, file.weights[source].dtype)
                format = twin.format  # the next one shares these parameters
            found[name.removesuffix("weight").removesuffix(".")] = twins[id(module)]
    return found


def _stays_dense(file: CheckpointFile, slots: Slots, name: str, source: str) -> bool:
    """Whether a compressed weight is for a layer that can't be replaced, and so is loaded as the dense weight it means.

    A file that was compressed by the names of its tensors may hold such: the weight of a Conv1D that was taken for a
    Linear's, of a convolution with groups, of a subclass of Linear, of a pruned embedding.
    """
    module: Any = slots.modules.get(name)
    if isinstance(module, _Compressed) or not isinstance(slots.tensors.get(name), Tensor):
        return False
    if type(module) is nn.Embedding:
        return file.weights[source].format is not DenseInt8
    if type(module) is nn.Conv2d:
        return why_not(module) is not None
    transposed = file.weights[source].transposed
    return not (is_conv1d(module) if transposed else type(module) is nn.Linear)


def _check_home(file: CheckpointFile, slots: Slots, name: str, source: str) -> None:
    """Raises unless the module at `name` can be replaced by a compressed one of the file's dtype."""
    where, module = f"{file.path}: {source}", slots.modules.get(name)
    kind = type(module)
    if module is slots.model:
        raise CheckpointError(
            f"{where}: the model is this one layer, which can't be replaced in place: put it in a module"
        )
    if module is None or not (kind in REPLACED or is_conv1d(module)):
        raise CheckpointError(
            f"{where}: compressed, but the model has no Linear, Embedding, Conv2d or Conv1D there: {kind.__name__}"
        )
    if _is_transposed(module) != file.weights[source].transposed:
        kinds = ("a Conv1D", "no Conv1D") if _is_transposed(module) else ("no Conv1D", "a Conv1D")
        raise CheckpointError(f"{where}: is the weight of {kinds[1]}, the model has {kinds[0]} there")
    embeds = kind in (nn.Embedding, CompressedEmbedding)
    if embeds and file.weights[source].format is not DenseInt8:
        raise CheckpointError(f"{where}: is {file.weights[source].format.__name__}, an embedding takes DenseInt8")
    if getattr(module, "max_norm", None) is not None:
        raise CheckpointError(f"{where}: an embedding with max_norm can't be compressed")
    if hooks := hooks_of(module):
        raise CheckpointError(f"{where}: the model's layer has hooks ({hooks}), which a replacement would lose")
    _check_dtype(where, file.weights[source].dtype, _dense_dtype(module))


def _check_dtype(where: str, stored: torch.dtype | None, expected: torch.dtype) -> None:
    if stored != expected:
        hint = f": load into model.to({stored})" if stored is not None and stored.is_floating_point else ""
        raise CheckpointError(f"{where}: is {stored}, the model's is {expected}{hint}")


def _dense_dtype(module: Any) -> torch.dtype:
    marker: Any = module._dtype_marker if isinstance(module, _Compressed) else module.weight
    return marker.dtype


def _dense_shape(module: Any) -> tuple[int, ...]:
    if not isinstance(module, _Compressed):
        return tuple(module.weight.shape)
    rows, columns = module.format.shape
    if isinstance(module, CompressedConv2d):
        return (rows, module.in_channels, *module.kernel_size)
    return (columns, rows) if getattr(module, "transposed", False) else (rows, columns)


def _is_transposed(module: Any) -> bool:
    return module.transposed if isinstance(module, CompressedLinear) else is_conv1d(module)


def _twin(where: str, dense: Any, format: Format, dtype: torch.dtype) -> Any:
    """The compressed module over `format` that takes the place of `dense`, sharing its bias."""
    before = dense._parameters["values" if isinstance(dense, _Compressed) else "weight"]
    if not before.is_meta:
        moved: dict[str, Any] = {
            name: value.to(before.device) if type(value) is Tensor else value for name, value in vars(format).items()
        }
        format = type(format)(**moved)
    module: Any
    if isinstance(dense, (nn.Embedding, CompressedEmbedding)):
        if not isinstance(format, DenseInt8):
            raise CheckpointError(f"{where}: an embedding takes DenseInt8")
        module = CompressedEmbedding(format, dense.padding_idx, dtype)
    elif isinstance(dense, (nn.Conv2d, CompressedConv2d)):
        module = CompressedConv2d.over(format, dense, dtype)
    else:
        module = CompressedLinear(format, dense.bias, dtype, _is_transposed(dense))
    module._dtype_marker.data = module._dtype_marker.data.to(module.values.device)
    if module.values.is_floating_point():
        module.values.requires_grad_(before.requires_grad)
    if taken := give_attributes(module, given_attributes(dense)):
        raise CheckpointError(
            f"{where}: the model's layer has an attribute {taken[0]!r}, of which a replacement has another use"
        )
    return module.train(dense.training)


def _copies(
    file: CheckpointFile, slots: Slots, names: Mapping[str, str]
) -> tuple[list[tuple[Tensor, str]], list[tuple[str, Tensor]]]:
    """Checked: what of the file to copy into which tensor of the model, and which names to tie to which tensor."""
    copies: list[tuple[Tensor, str]] = []
    ties: list[tuple[str, Tensor]] = []
    sources: dict[int, str] = {}  # by the model's tensor, the one that is copied into it
    homes: dict[str, Tensor] = {}  # by name in the file, the first of the model's tensors for it
    for name, source in names.items():
        if source in file.weights and not _stays_dense(file, slots, name, source):
            continue
        tensor = slots.tensors.get(name)
        _check_tensor(file, slots, name, source)
        assert tensor is not None
        first = homes.setdefault(source, tensor)
        if first is not tensor and isinstance(first, nn.Parameter) == isinstance(tensor, nn.Parameter):
            ties.append((name, first))
            continue
        if id(tensor) not in sources:
            sources[id(tensor)] = source
            copies.append((tensor, source))
        elif (other := sources[id(tensor)]) != source and not _same_bits(file.read(other), file.read(source)):
            raise CheckpointError(f"{file.path}: {source}: differs from {other}, but the model ties them")
    return copies, ties


def _check_tensor(file: CheckpointFile, slots: Slots, name: str, source: str) -> None:
    """Raises unless the file's tensor can be copied to where the model has `name`."""
    where, tensor = f"{file.path}: {source}", slots.tensors.get(name)
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    if source in file.weights:
        info = file.weights[source]
        shape, dtype = info.dense_shape(read_weight(file, source)), info.dtype
    else:
        shape, dtype = file.entries[source].shape, file.entries[source].dtype
    if not isinstance(tensor, Tensor):
        compressed = isinstance(slots.modules.get(name), _Compressed)
        what = "a compressed weight there: load into a fresh model" if compressed else "no tensor there"
        raise CheckpointError(f"{where}: the model has {what}")
    if tensor.is_meta:
        raise CheckpointError(f"{where}: the model is on the meta device: call to_empty() first")
    if is_traceable_wrapper_subclass(tensor):
        raise CheckpointError(f"{where}: the model's is a {type(tensor).__name__}: load before that is made of it")
    if tuple(tensor.shape) != tuple(shape):
        raise CheckpointError(f"{where}: has shape {list(shape)}, the model {list(tensor.shape)}")
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise CheckpointError(f"{where}: the model's tensor is expanded, so that it can't be written to")
    _check_dtype(where, dtype, tensor.dtype)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _commit(
    model: nn.Module,
    file: CheckpointFile,
    replacements: Mapping[str, nn.Module],
    copies: list[tuple[Tensor, str]],
    ties: list[tuple[str, Tensor]],
) -> None:
    """Changes the model; on any exception everything is put back."""
    with contextlib.ExitStack() as undo:
        for tensor, source in copies:
            undo.callback(_copy, tensor, tensor.detach().clone())
            if source in file.weights:
                _copy(tensor, file.weights[source].dense(read_weight(file, source), tensor.dtype))
            else:
                file.read_into(source, tensor)
        for path, module in replacements.items():
            parent, child = _parent(model, path)
            set_item(parent._modules, child, module, undo)
            for attributes, key, value in switches_of_fused_paths(model, path):
                set_item(attributes, key, value, undo)
        for name, tensor in ties:  # after the replacements, which may hold biases that are tied
            parent, child = _parent(model, name)
            set_item(parent._parameters if isinstance(tensor, nn.Parameter) else parent._buffers, child, tensor, undo)
        undo.pop_all()


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, child = name.rpartition(".")
    return model.get_submodule(path), child


def _copy(tensor: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(values)
