"""MultiheadAttention with projections that are modules, so that they can be compressed as any linear layer."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from engine.nn._replace import (
    check_not_wrapped,
    has_tensor_hooks,
    hooks_of,
    is_as_made,
    set_item,
    switches_of_fused_paths,
)

SEPARATE_WEIGHTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
PARAMETERS = {"in_proj_weight", "in_proj_bias", "bias_k", "bias_v", *SEPARATE_WEIGHTS}


class MultiheadAttention(nn.Module):
    """torch.nn.MultiheadAttention with `q_proj`, `k_proj`, `v_proj` and `out_proj` as nn.Linear.

    PyTorch's holds the first three in one parameter and reads the fourth's weight itself, so that no layer of it can be
    replaced. This one takes the same arguments and gives the same outputs, but that with the fused inference path of
    PyTorch a query whose keys are all masked is NaN. Its `load_state_dict` takes the other's, and it begins with as
    large weights. `add_bias_kv` and `add_zero_attn` are refused.
    """

    # What nn.TransformerEncoder and its layers look at before they take a fused path past this module.
    in_proj_weight = in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if add_bias_kv or add_zero_attn:
            raise ValueError("engine.nn.MultiheadAttention: add_bias_kv and add_zero_attn are not supported")
        if num_heads <= 0 or embed_dim <= 0 or embed_dim % num_heads:
            expected = f"a positive multiple of num_heads, {num_heads}"
            raise ValueError(f"engine.nn.MultiheadAttention: embed_dim: expected {expected}, got {embed_dim}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = (embed_dim if size is None else size for size in (kdim, vdim))
        self.dropout, self.batch_first = dropout, batch_first
        made = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, **made)
        self.k_proj = nn.Linear(self.kdim, embed_dim, **made)
        self.v_proj = nn.Linear(self.vdim, embed_dim, **made)
        self.out_proj = nn.Linear(embed_dim, embed_dim, **made)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """As torch.nn.MultiheadAttention begins, whose three projections of one width are one matrix."""
        together = 3 if self.kdim == self.vdim == self.embed_dim else 1
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            bound = math.sqrt(6 / (together * self.embed_dim + layer.in_features))
            nn.init.uniform_(layer.weight, -bound, bound)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    @classmethod
    def from_fused(cls, attention: nn.MultiheadAttention) -> "MultiheadAttention":
        """With `attention`'s own output projection, and copies of the others.

        Raises:
            ValueError: `attention` isn't plainly what PyTorch makes (`add_bias_kv`, `add_zero_attn`, hooks, a
                parametrised or replaced part).
        """
        if reason := why_not_unfused(attention):
            raise ValueError(f"engine.nn.MultiheadAttention: {reason}")
        return _twin(attention, {})

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        """Takes the names of torch.nn.MultiheadAttention too."""
        fused = {kind: state_dict.pop(f"{prefix}in_proj_{kind}", None) for kind in ("weight", "bias")}
        for i, name in enumerate(("q", "k", "v")):
            separate = state_dict.pop(f"{prefix}{name}_proj_weight", None)
            if separate is not None:
                state_dict[f"{prefix}{name}_proj.weight"] = separate
            for kind, tensor in fused.items():
                if tensor is not None:
                    state_dict[f"{prefix}{name}_proj.{kind}"] = tensor.tensor_split(3)[i].clone()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and results are those of torch.nn.MultiheadAttention.

        Args:
            query: `[L, N, E]`, `[N, L, E]` with `batch_first`, or `[L, E]` for one sequence.
            key: likewise, S in place of L and `kdim` of E.
            value: likewise, S in place of L and `vdim` of E.
            key_padding_mask: `[N, S]` (`[S]` for one sequence), True where a key is left out, or floats to be added.
            need_weights: whether to return the weights; without them attention is PyTorch's fused one.
            attn_mask: `[L, S]` or `[N * num_heads, L, S]`, True where attention is not allowed, or floats to be added.
            average_attn_weights: the weights' mean over the heads, or those of each head.
            is_causal: a hint that `attn_mask` is causal.

        Returns:
            The output, of the shape of `query`; the weights `[N, L, S]` or `[N, num_heads, L, S]` (without N for one
            sequence), or None.

        Raises:
            TypeError: a mask that is neither bool nor float.
            ValueError: `is_causal` without `attn_mask`, or shapes that do not fit.
        """
        if is_causal and attn_mask is None:
            raise ValueError("engine.nn.MultiheadAttention: attn_mask: expected one, as is_causal is set; got None")
        batched = query.dim() == 3
        batch = 0 if self.batch_first or not batched else 1
        self._check(query, key, value, batch)
        q, k, v = (
            self._heads(projection(t if batched else t.unsqueeze(0)), batch)
            for projection, t in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1).to(v.dtype)
            weights = F.dropout(weights, dropout) if dropout else weights
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        elif is_causal and key_padding_mask is None:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(y.transpose(1, 2).flatten(2))  # [N, L, E]
        return (y.transpose(0, batch) if batched else y.squeeze(0)), weights

    def _heads(self, t: Tensor, batch: int) -> Tensor:
        """`[N, num_heads, T, head_dim]` of what a projection gave."""
        return t.transpose(0, batch).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _check(self, query: Tensor, key: Tensor, value: Tensor, batch: int) -> None:
        """Raises ValueError unless the shapes fit together."""
        dim = query.dim()
        for name, t, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            alike = dim == 2 or (t.dim() == 3 and t.shape[batch] == query.shape[batch])
            alike = alike and (name != "value" or value.shape[:-1] == key.shape[:-1])
            if dim not in (2, 3) or t.dim() != dim or t.shape[-1] != width or not alike:
                shapes = ", ".join(str(list(each.shape)) for each in (query, key, value))
                expected = f"a width of {width}, and batches and lengths that fit"
                raise ValueError(f"engine.nn.MultiheadAttention: {name}: expected {expected}, got {shapes}")

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """What is added to the scores `[N, num_heads, L, S]`, as far as it differs along these."""
        (n, heads, length, _), size = q.shape, k.shape[2]
        total = None
        if attn_mask is not None:
            each = attn_mask.dim() == 3
            shape = (n, heads, length, size) if each else (1, 1, length, size)
            own = (n * heads, length, size) if each else (length, size)
            total = _additive("attn_mask", attn_mask, own, q.dtype).view(shape)
        if key_padding_mask is not None:
            if n == 1 and key_padding_mask.dim() == 1:
                key_padding_mask = key_padding_mask.unsqueeze(0)
            padding = _additive("key_padding_mask", key_padding_mask, (n, size), q.dtype).view(n, 1, 1, size)
            total = padding if total is None else total + padding
        return total

    def extra_repr(self) -> str:
        """What `repr` shows between the parentheses."""
        return f"{self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def unfuse_attention_(model: nn.Module) -> list[str]:
    """Replaces each torch.nn.MultiheadAttention in `model` by :class:`MultiheadAttention`, in place.

    Call it before :func:`engine.compress_`, and before an optimizer is made; :func:`engine.load_` does so by itself.
    Modules of subclasses, with hooks, `add_bias_kv` or `add_zero_attn`, or with parts that PyTorch did not make stay as
    they are. What is tied stays tied. PyTorch's fused path for encoder layers, which reads weights past their modules,
    is switched off around those that are replaced: positions that it leaves out as padding are then no zeros.

    Returns:
        The names of what was replaced.

    Raises:
        ValueError: `model` is itself a torch.nn.MultiheadAttention, which can't be replaced in place, or is wrapped by
            DistributedDataParallel or FSDP.
    """
    if isinstance(model, nn.MultiheadAttention):
        raise ValueError(
            "engine.nn.unfuse_attention_: the model is itself a MultiheadAttention, which can't be replaced in place: "
            "use engine.nn.MultiheadAttention.from_fused"
        )
    check_not_wrapped(model, "nn.unfuse_attention_")
    with attention_unfused(model) as names:
        return names


@contextlib.contextmanager
def attention_unfused(model: nn.Module) -> Iterator[list[str]]:
    """Replaces as `unfuse_attention_`; after an exception everything is put back."""
    found: dict[nn.MultiheadAttention, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and isinstance(module, nn.MultiheadAttention) and not why_not_unfused(module):
            found.setdefault(module, []).append(name)
    split: dict[Tensor, list[nn.Parameter]] = {}
    with contextlib.ExitStack() as undo:
        for module, names in found.items():
            twin = _twin(module, split)
            for name in names:
                parent, _, child = name.rpartition(".")
                set_item(vars(model.get_submodule(parent))["_modules"], child, twin, undo)
                for attributes, key, value in switches_of_fused_paths(model, name):
                    set_item(attributes, key, value, undo)
        yield [name for names in found.values() for name in names]
        undo.pop_all()


def why_not_unfused(attention: nn.MultiheadAttention) -> str | None:
    """Why there is no twin of `attention`, if there is none."""
    if type(attention) is not nn.MultiheadAttention or "forward" in vars(attention):
        return "a subclass or another forward may compute something else"
    if attention.bias_k is not None or attention.bias_v is not None or attention.add_zero_attn:
        return "add_bias_kv and add_zero_attn are not supported"
    out = attention.out_proj
    parts = set(attention._modules) == {"out_proj"} and set(attention._parameters) <= PARAMETERS
    parts = parts and type(out) in (NonDynamicallyQuantizableLinear, nn.Linear) and is_as_made(out)
    if not parts or attention._buffers:
        return "it has parts that PyTorch did not make"
    hooks = hooks_of(attention) or hooks_of(out)
    if hooks or any(map(has_tensor_hooks, attention.parameters())):
        return f"it has hooks ({hooks or 'on a parameter'}), which a replacement would lose"
    return None


def _twin(attention: nn.MultiheadAttention, split: dict[Tensor, list[nn.Parameter]]) -> MultiheadAttention:
    """The same attention. `split` holds what parameters were split into, so that tied ones stay tied."""
    out = attention.out_proj
    sizes = attention.kdim, attention.vdim, attention.batch_first
    with torch.device("meta"):
        twin = MultiheadAttention(
            attention.embed_dim, attention.num_heads, attention.dropout, out.bias is not None, False, False, *sizes
        )

    def parts(parameter: nn.Parameter) -> list[nn.Parameter]:
        if parameter not in split:
            pieces = parameter.detach().chunk(3)
            split[parameter] = [nn.Parameter(piece.clone(), parameter.requires_grad) for piece in pieces]
        return split[parameter]

    layers = twin.q_proj, twin.k_proj, twin.v_proj
    if attention.in_proj_weight is None:
        weights = [getattr(attention, name) for name in SEPARATE_WEIGHTS]
    else:
        weights = parts(attention.in_proj_weight)
    biases = [None] * 3 if attention.in_proj_bias is None else parts(attention.in_proj_bias)
    for layer, weight, bias in zip(layers, weights, biases, strict=True):
        layer.weight, layer.bias = weight, bias
    twin.out_proj.weight, twin.out_proj.bias = out.weight, out.bias
    return twin.train(attention.training)


def _additive(name: str, mask: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A mask as floats to add: minus infinity where a bool one is True, else its own, in `dtype` if that is finer."""
    if tuple(mask.shape) != shape:
        raise ValueError(f"engine.nn.MultiheadAttention: {name}: expected {list(shape)}, got {list(mask.shape)}")
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
    if not mask.is_floating_point():
        raise TypeError(f"engine.nn.MultiheadAttention: {name}: expected bool or floats, got {mask.dtype}")
    return mask.to(torch.promote_types(mask.dtype, dtype))
