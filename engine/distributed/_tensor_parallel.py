"""tensor_parallel_: shards a model's linear layers over the ranks of a group, by a plan of names."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from engine.distributed._all_reduce import all_reduce
from engine.distributed._parallel_linear import ColumnParallelLinear, RowParallelLinear, bounds
from engine.formats._common import own
from engine.nn import CompressedLinear
from engine.nn._replace import (
    check_not_wrapped,
    give_attributes,
    given_attributes,
    hooks_of,
    is_as_made,
    switches_of_fused_paths,
)

STYLES = ("colwise", "rowwise", "colwise_rep", "rowwise_rep")
WHERE = "engine.distributed.tensor_parallel_"


def tensor_parallel_(
    model: nn.Module,
    mesh: DeviceMesh | dist.ProcessGroup,
    plan: Mapping[str, str],
    codec: str | None = None,
    exact: bool = True,
) -> nn.Module:
    """Keeps of every layer that `plan` names only this rank's part, in place. Every rank of `mesh` calls it alike.

    ========== ======================================= ==================================
    style      the layer takes                         and gives
    ========== ======================================= ==================================
    colwise    the whole input                         this rank's part of the outputs
    rowwise    this rank's part of the inputs          the whole output
    ========== ======================================= ==================================

    "colwise_rep" gives the whole output to every rank, "rowwise_rep" takes the whole input: for layers that stand
    alone. Elsewhere a colwise layer's outputs go, through what treats each of them by itself (an activation, attention
    heads), into a rowwise one. The styles are those of `torch.distributed.tensor.parallel` and of transformers'
    `tp_plan`. Sizes that the ranks can't share evenly give the first ranks one more; attention heads can't be cut, and
    the model's own reshaping refuses that.

    What changes in the numbers: nothing for int8 weights with int8 activations: each layer keeps its bits. The
    ranks agree on the scale of each row of activations before they round, and add up integers. Float layers add up the
    same products in another order, and in float16 and bfloat16 each rank's sum is rounded before. With a `codec` all
    layers add up float parts as the codec transmits them, and each rank scales its activations by its own part.

    Gradients go through all styles, once: that of a colwise layer's input is summed over the ranks. Weights' gradients
    are this rank's part; the bias of a rowwise layer has the same gradient everywhere. Make the optimizer afterwards.

    To load a checkpoint: `engine.load_` it into the whole model, then shard. Layers are replaced one by one and their
    whole weights freed, so that a rank needs the checkpoint's memory and a layer more. `engine.save` of the sharded
    model writes this rank's part, which `engine.load_` reads into a model sharded in the same way.

    Args:
        model: the same on every rank.
        mesh: a DeviceMesh of one dimension, or a process group.
        plan: by qualified name, in which `*` stands for one part ("layer.*.output.dense"), or by "re:" and a regular
            expression for the whole name: one of the styles. Only nn.Linear and CompressedLinear can be sharded.
        codec: what rowwise layers send, see :func:`engine.distributed.all_reduce`.
        exact: keep the bits of int8 rowwise layers, at the price of an exchange more. False: each rank scales its
            activations by its own part; faster where layers or batches are small, but the number of ranks then shows.

    Returns:
        `model`.

    Raises:
        ValueError: a pattern matches nothing or what can't be sharded, two patterns disagree, a layer is too small,
            shares its weight with another or has hooks, the model is wrapped by DDP or FSDP, or another rank refused or
            has another plan or model. Nothing is changed then.
    """
    group = _group(mesh)
    found: list[_Target] = []
    problem = ""
    try:
        found = _targets(model, plan, group)
    except ValueError as error:  # told once the others have heard of it, who would wait for this rank otherwise
        problem = str(error)
    _agree(found, (codec, exact), problem, group)
    if codec is not None:  # an unknown one is refused here, on every rank alike
        all_reduce(torch.zeros(1, dtype=torch.float32, device=next(model.parameters()).device), "sum", group, codec)
    switches = [switch for target in found for name in target.names for switch in switches_of_fused_paths(model, name)]
    while found:  # not a for loop: it would keep every whole weight alive to the end
        _replace(model, found.pop(0), group, codec, exact)
    for attributes, key, value in switches:
        attributes[key] = value
    return model


@dataclasses.dataclass
class _Target:
    """A layer to shard: all of its names, the style, and which part of which dimension this rank keeps."""

    names: list[str]
    module: Any
    style: str
    dim: int
    begin: int
    end: int


def _group(mesh: Any) -> dist.ProcessGroup:
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(
                f'{WHERE}: mesh: expected one dimension, got {mesh.ndim}: take one of them, as in mesh["tp"]'
            )
        return mesh.get_group()
    if not isinstance(mesh, dist.ProcessGroup):
        got = type(mesh).__name__
        raise ValueError(f"{WHERE}: mesh: expected a DeviceMesh or a process group that this rank is in, got {got}")
    return mesh


def _targets(model: nn.Module, plan: Mapping[str, str], group: dist.ProcessGroup) -> list[_Target]:
    """What to shard and how, once everything has been checked."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"{WHERE}: model: expected a torch.nn.Module, got {type(model).__name__}")
    check_not_wrapped(model, "distributed.tensor_parallel_")
    modules = dict(model.named_modules(remove_duplicate=False))
    styles = _styles(modules, plan)
    by_module: dict[int, _Target] = {}
    for name, style in styles.items():
        module = modules[name]
        dim = 0 if style.startswith("colwise") else 1
        target = by_module.setdefault(id(module), _Target([], module, style, dim, 0, 0))
        target.names.append(name)
        if target.style != style:
            raise ValueError(f"{WHERE}: {name}: is {style}, but the same layer is {target.style} as {target.names[0]}")
    for target in by_module.values():
        everywhere = [name for name, module in modules.items() if module is target.module]
        if missed := [name for name in everywhere if name not in styles]:
            raise ValueError(
                f"{WHERE}: {target.names[0]}: the same layer is also {missed[0]}, which the plan leaves out"
            )
        _check_target(model, target, group)
    return list(by_module.values())


def _styles(modules: Mapping[str, nn.Module], plan: Mapping[str, str]) -> dict[str, str]:
    """The style of each module that a pattern matches."""
    if not isinstance(plan, Mapping) or not all(isinstance(pattern, str) for pattern in plan):
        raise ValueError(f"{WHERE}: plan: expected styles by name, got {plan!r}")
    if not plan:
        raise ValueError(f"{WHERE}: plan: is empty")
    found: dict[str, tuple[str, str]] = {}
    for pattern, style in plan.items():
        if style not in STYLES:
            raise ValueError(f"{WHERE}: {pattern!r}: expected one of {', '.join(STYLES)}, got {style!r}")
        matched = [name for name in modules if _compiled(pattern).fullmatch(name)]
        if not matched:
            raise ValueError(f"{WHERE}: {pattern!r} matches no module")
        for name in matched:
            other, before = found.setdefault(name, (style, pattern))
            if other != style:
                raise ValueError(f"{WHERE}: {name}: is {other} by {before!r}, but {style} by {pattern!r}")
    return {name: style for name, (style, _) in found.items()}


def _compiled(pattern: str) -> re.Pattern[str]:
    if not pattern.startswith("re:"):
        return re.compile(r"[^.]+".join(map(re.escape, pattern.split("*"))))
    try:
        return re.compile(pattern[3:])
    except re.error as error:
        raise ValueError(f"{WHERE}: {pattern!r} is no regular expression: {error}") from error


def _check_target(model: nn.Module, target: _Target, group: dist.ProcessGroup) -> None:
    """Raises ValueError unless the layer can be sharded; says which part this rank keeps."""
    module, name = target.module, target.names[0]
    where = f"{WHERE}: {name or 'the model'}"
    if type(module) not in (nn.Linear, CompressedLinear):
        kind = type(module).__name__
        raise ValueError(f"{where}: is a {kind}, and only nn.Linear and CompressedLinear can be sharded")
    if module is model:
        raise ValueError(f"{where}: the model is this one layer, which can't be replaced in place: put it in a module")
    if hooks := hooks_of(module):
        raise ValueError(f"{where}: has hooks ({hooks}), which a replacement would lose")
    if type(module) is nn.Linear and not is_as_made(module):
        raise ValueError(f"{where}: has a forward, parts or methods of its own, which a replacement would lose")
    if taken := give_attributes(_over(target, module, None, group), given_attributes(module)):
        raise ValueError(f"{where}: has an attribute {taken[0]!r}, of which a replacement has another use")
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(f"{where}: is on the meta device: load the checkpoint first")
    mine = {id(parameter) for parameter in module.parameters()}
    inside = {f"{own_name}." for own_name in target.names}
    for other, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in mine and not any(other.startswith(prefix) for prefix in inside):
            raise ValueError(f"{where}: shares a parameter with {other}, which would be whole")
    shape = (module.out_features, module.in_features)
    size = shape[target.dim]
    if size < group.size():
        what = ("outputs", "inputs")[target.dim]
        raise ValueError(f"{where}: {size} {what} for {group.size()} ranks")
    target.begin, target.end = bounds(size, group.size(), dist.get_rank(group))
    if isinstance(module, CompressedLinear):
        try:
            module.format.shard(target.dim, target.begin, target.end)  # a format may have places where it can't be cut
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def _agree(found: list[_Target], options: tuple, problem: str, group: dist.ProcessGroup) -> None:
    """Raises ValueError on every rank unless all of them found the same to do, and no problem."""
    mine = [(t.names, t.style, t.module.out_features, t.module.in_features, _label(t.module)) for t in found]
    every: list[Any] = [None] * group.size()
    dist.all_gather_object(every, (problem, repr((mine, options))), group=group)
    if problem:
        raise ValueError(problem)
    for rank, (theirs, layers) in enumerate(every):
        if theirs:
            raise ValueError(f"{WHERE}: rank {rank} refused: {theirs}")
        if layers != every[0][1]:
            raise ValueError(f"{WHERE}: rank {rank} has another plan or model than rank 0")


def _label(module: Any) -> str:
    kind = module.format.label if isinstance(module, CompressedLinear) else str(module.weight.dtype)
    return f"{kind}, bias {module.bias is not None}"


def _replace(model: nn.Module, target: _Target, group: dist.ProcessGroup, codec: str | None, exact: bool) -> None:
    layer = _parallel(target, group, codec, exact).train(target.module.training)
    give_attributes(layer, given_attributes(target.module))
    for name in target.names:
        path, _, child = name.rpartition(".")
        model.get_submodule(path)._modules[child] = layer


def _parallel(target: _Target, group: dist.ProcessGroup, codec: str | None, exact: bool) -> nn.Module:
    """The module that takes the place of `target.module`."""
    whole: Any = target.module
    by_rows = target.dim == 0
    bias: nn.Parameter | None = whole.bias
    if by_rows and bias is not None:
        bias = nn.Parameter(own(bias[target.begin : target.end]), bias.requires_grad)
    shard_bias = bias if by_rows else None
    shard: nn.Module
    if isinstance(whole, CompressedLinear):
        shard = CompressedLinear(
            whole.format.shard(target.dim, target.begin, target.end), shard_bias, whole._dtype_marker.dtype
        )
        shard._dtype_marker.data = shard._dtype_marker.data.to(shard.values.device)
        if shard.values.is_floating_point():
            shard.values.requires_grad_(whole.values.requires_grad)
    else:
        weight = own(whole.weight.narrow(target.dim, target.begin, target.end - target.begin))
        shard = nn.Linear(weight.shape[1], weight.shape[0], shard_bias is not None, device="meta")
        shard.weight, shard.bias = nn.Parameter(weight, whole.weight.requires_grad), shard_bias  # type: ignore[assignment]
    return _over(target, shard, bias, group, codec, exact)


def _over(
    target: _Target,
    shard: nn.Module,
    bias: nn.Parameter | None,
    group: dist.ProcessGroup,
    codec: str | None = None,
    exact: bool = True,
) -> nn.Module:
    whole, replicated = target.module, target.style.endswith("_rep")
    if target.dim == 0:
        return ColumnParallelLinear(shard, whole.in_features, whole.out_features, group, replicated)
    return RowParallelLinear(shard, bias, whole.in_features, whole.out_features, group, replicated, codec, exact)
