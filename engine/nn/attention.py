"""MultiheadAttention with projections that are modules, so that they can be compressed as any linear layer."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.nn._replace import has_hooks, switches_of_fused_paths


class MultiheadAttention(nn.Module):
    """torch.nn.MultiheadAttention with `q_proj`, `k_proj`, `v_proj` and `out_proj` as nn.Linear.

    PyTorch's holds the first three in one parameter and reads the fourth's weight itself, so that no layer of it can be
    replaced. This one takes the same arguments, gives the same outputs, and loads the other's state dict.
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
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(
                f"engine.nn.MultiheadAttention: embed_dim: expected a multiple of {num_heads}, got {embed_dim}"
            )
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.dropout, self.batch_first = dropout, batch_first
        made = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, **made)
        self.k_proj = nn.Linear(self.kdim, embed_dim, **made)
        self.v_proj = nn.Linear(self.vdim, embed_dim, **made)
        self.out_proj = nn.Linear(embed_dim, embed_dim, **made)

    @classmethod
    def from_fused(cls, attention: nn.MultiheadAttention) -> "MultiheadAttention":
        """With copies of the weights of `attention`.

        Raises:
            ValueError: `attention` adds a bias or zeros to keys and values (`add_bias_kv`, `add_zero_attn`).
        """
        if reason := _why_not(attention):
            raise ValueError(f"engine.nn.MultiheadAttention: {reason}")
        weight = attention.out_proj.weight
        module = cls(
            attention.embed_dim,
            attention.num_heads,
            attention.dropout,
            attention.out_proj.bias is not None,
            attention.kdim,
            attention.vdim,
            attention.batch_first,
            "meta",
            weight.dtype,
        )
        state = {name: tensor.detach().clone() for name, tensor in attention.state_dict().items()}
        module.load_state_dict(state, assign=True)
        for parameter in module.parameters():
            parameter.requires_grad_(weight.requires_grad)
        return module.train(attention.training)

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
            ValueError: `is_causal` without `attn_mask`, or shapes that do not fit.
        """
        if is_causal and attn_mask is None:
            raise ValueError("engine.nn.MultiheadAttention: attn_mask: expected one, as is_causal is set; got None")
        batched = query.dim() == 3
        batch = 0 if self.batch_first or not batched else 1
        q, k, v = (
            self._heads(projection(t if batched else t.unsqueeze(0)), batch)
            for projection, t in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
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

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """What is added to the scores `[N, num_heads, L, S]`, as far as it differs along these."""
        (n, heads, length, _), size = q.shape, k.shape[2]
        total = None
        if attn_mask is not None:
            shape = (n, heads, length, size) if attn_mask.dim() == 3 else (1, 1, length, size)
            total = _additive("attn_mask", attn_mask, ((length, size), (n * heads, length, size)), q.dtype).view(shape)
        if key_padding_mask is not None:
            if n == 1 and key_padding_mask.dim() == 1:
                key_padding_mask = key_padding_mask.unsqueeze(0)
            padding = _additive("key_padding_mask", key_padding_mask, ((n, size),), q.dtype).view(n, 1, 1, size)
            total = padding if total is None else total + padding
        return total

    def extra_repr(self) -> str:
        """What `repr` shows between the parentheses."""
        return f"{self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def unfuse_attention_(model: nn.Module) -> list[str]:
    """Replaces each torch.nn.MultiheadAttention in `model` by :class:`MultiheadAttention`, in place.

    Call it before :func:`engine.compress_`; :func:`engine.load_` does the same by itself. Modules with hooks, with
    `add_bias_kv` or `add_zero_attn`, and of subclasses stay as they are. PyTorch's fused path for encoder layers, which
    reads weights past their modules, is switched off around those that are replaced.

    Returns:
        The names of what was replaced.
    """
    with attention_unfused(model, lambda name: True) as names:
        return names


@contextlib.contextmanager
def attention_unfused(model: nn.Module, chosen: Callable[[str], bool]) -> Iterator[list[str]]:
    """Replaces as `unfuse_attention_` those with a name that is `chosen`; after an exception they are put back."""
    found: dict[nn.MultiheadAttention, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.MultiheadAttention) or type(module) is not nn.MultiheadAttention:
            continue
        if name and not has_hooks(module) and not _why_not(module):
            found.setdefault(module, []).append(name)
    undo: list[tuple[dict[str, Any], str, Any]] = []

    def set_item(items: dict[str, Any], key: str, value: Any) -> None:
        undo.append((items, key, items[key]))
        items[key] = value

    replaced = []
    try:
        for module, names in found.items():
            if not any(map(chosen, names)):
                continue
            twin = MultiheadAttention.from_fused(module)
            for name in names:
                parent, _, child = name.rpartition(".")
                set_item(vars(model.get_submodule(parent))["_modules"], child, twin)
                for attributes, key, value in switches_of_fused_paths(model, name):
                    set_item(attributes, key, value)
            replaced += names
        yield replaced
    except BaseException:
        for items, key, value in reversed(undo):
            items[key] = value
        raise


def _additive(name: str, mask: Tensor, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> Tensor:
    """A mask of one of `shapes` as floats to add: minus infinity where a bool one is True."""
    if tuple(mask.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"engine.nn.MultiheadAttention: {name}: expected {expected}, got {list(mask.shape)}")
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
    return mask.to(dtype)


def _why_not(attention: nn.MultiheadAttention) -> str | None:
    """Why there is no twin of `attention`, if there is none."""
    if attention.bias_k is not None or attention.add_zero_attn:
        return "add_bias_kv and add_zero_attn are not supported"
    return None
