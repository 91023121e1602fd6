"""CompressedLinear and CompressedEmbedding: the compressed twins of nn.Linear and nn.Embedding."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from engine import ops
from engine.formats import DenseInt8, Format
from engine.nn._replace import in_autocast, is_conv1d, of_nested
from engine.ops import _check

RESIZED_BY_LOADING = ("values", "col_indices")  # their length is the number of kept weights or blocks
ALWAYS_FLOAT32 = ("scale", "input_scale")
MARKER = "_dtype_marker"  # a parameter that no file holds

_watched: list[set[int]] = []  # by weights_read


class _Marker(nn.Parameter):
    """A parameter that never requires a gradient: it would get none, and DistributedDataParallel would wait for it."""

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """False."""
        return False

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        pass

    def requires_grad_(self, requires_grad: bool = True) -> "_Marker":
        """Changes nothing."""
        return self


@contextlib.contextmanager
def weights_read() -> Iterator[set[int]]:
    """Gathers the ids of the compressed modules whose dense `weight` is made while it lasts."""
    seen: set[int] = set()
    _watched.append(seen)
    try:
        yield seen
    finally:
        _watched[:] = [each for each in _watched if each is not seen]


class _Compressed(nn.Module):
    """A module whose weight is a format's tensors, each held as a parameter under the format's own name for it.

    Parameters rather than buffers, so that tied weights stay tied when the module moves to another device, and
    DistributedDataParallel doesn't broadcast them at every step. Only float values can require a gradient.
    """

    values: nn.Parameter
    scale: nn.Parameter
    input_scale: nn.Parameter | None
    _dtype_marker: nn.Parameter

    def __init__(self, format: Format, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        _check.is_kind(f"nn.{type(self).__name__}", "format", format, Format, "a format of engine.formats")
        if dtype is None:
            dtype = format.values.dtype if format.values.is_floating_point() else torch.float32
        # Without elements: it follows .to(dtype) as any float parameter does, so that the dtype of the dense weight is
        # known, and stands first, so that whoever asks a model's first parameter for a dtype is told that one.
        self.register_parameter(MARKER, _Marker(torch.empty(0, dtype=dtype), requires_grad=False))
        self._format_type: type[Format] = type(format)
        fields = dict(vars(format))
        for name in format.TENSORS:
            tensor = fields.pop(name)
            if tensor is not None and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, tensor)
        self._settings: dict[str, Any] = fields

    @property
    def format(self) -> Format:
        """The format over this module's tensors, without a copy."""
        kind, parameters = self._format_type, self._parameters
        if torch.compiler.is_dynamo_compiling():  # which can't follow the rest
            tensors: dict[str, Any] = {name: getattr(self, name) for name in kind.TENSORS}
            return kind(**tensors, **self._settings)
        format = object.__new__(kind)  # a dataclass's __init__ would cost 0.3 µs more
        fields = vars(format)
        fields.update(self._settings)
        try:
            for name in kind.TENSORS:
                fields[name] = parameters[name]
        except KeyError:  # an attribute now: torch.nn.utils.prune and weight_norm make it anew at each call
            fields.update({name: getattr(self, name) for name in kind.TENSORS})
        return format

    @property
    def weight(self) -> Tensor:
        """The dense weight that this module computes with, in the dense layer's shape; made anew at each access."""
        for seen in _watched:
            seen.add(id(self))
        return self._as_weight(self.format.to_dense(self._dtype_marker.dtype))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"engine.nn.{type(self).__name__}: weight: can't be set, it is made of the compressed tensors: "
                "replace the module, or tie and resize weights before the model is compressed"
            )
        super().__setattr__(name, value)

    def _as_weight(self, matrix: Tensor) -> Tensor:
        """The matrix `[N, K]` in the shape that the dense layer has its weight."""
        return matrix

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + MARKER, None)
        versions = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if versions is not None:  # what the tensors alone don't tell
            versions["format"] = (self._format_type.__name__, dict(self._settings))

    def _apply(self, fn, recurse=True):
        parameters: dict[str, Any] = self._parameters
        before = {name: parameters[name].data for name in ALWAYS_FLOAT32 if parameters.get(name) is not None}
        super()._apply(fn, recurse)
        for name, data in before.items():  # a scale in half precision would change every weight
            if parameters[name].dtype != torch.float32:
                parameters[name].data = data.to(parameters[name].device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        own, theirs = (self._format_type.__name__, self._settings), metadata.get("format")
        if theirs is not None and tuple(theirs) != own:
            described = [" ".join([kind, *(f"{k}={v}" for k, v in how.items())]) for kind, how in (theirs, own)]
            errors.append(f"{prefix.removesuffix('.') or 'the layer'}: is {described[0]}, the model's {described[1]}")
            return
        wrong_before = len(errors)  # the lists are the whole model's
        parameters: dict[str, Any] = dict(self._parameters)
        before = {name: (each.data, each.data.clone()) for name, each in parameters.items() if each is not None}
        found = {name: state_dict.get(prefix + name) for name in self._format_type.TENSORS}
        for name, tensor in found.items():
            if not isinstance(tensor, Tensor):  # torch names what is missing, and what is no tensor
                continue
            mine: Any = self._parameters.get(name)
            resized = name in RESIZED_BY_LOADING and mine is not None
            alike = mine is not None and tensor.shape[1:] == mine.shape[1:]
            if resized and alike and mine.shape != tensor.shape and mine.dim() in (1, 3):  # 3: blocks
                mine.data = torch.empty(
                    tensor.shape, dtype=mine.dtype, device=mine.device
                )  # ties and optimizers keep it
            if name == "input_scale" and (mine is None or mine.shape != tensor.shape):
                fresh = torch.empty(tensor.shape, dtype=torch.float32, device=self.values.device)
                self._parameters[name] = nn.Parameter(fresh, requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if prefix + MARKER in missing:
            missing.remove(prefix + MARKER)
        lacking = [name for name, tensor in found.items() if tensor is None and self._parameters.get(name) is not None]
        if lacking and any(tensor is not None for tensor in found.values()):
            errors.append(f"{prefix.removesuffix('.') or 'the layer'}: of its weight {', '.join(lacking)} is missing")
        if not lacking and len(errors) == wrong_before and not self.values.is_meta:
            try:
                self.format.check()
            except (TypeError, ValueError) as error:
                errors.append(f"{prefix.removesuffix('.')}: {error}")
        marker = self._dtype_marker
        if marker.is_meta and not self.values.is_meta:  # by assign=True
            self._parameters[MARKER] = _Marker(torch.empty_like(marker, device=self.values.device), requires_grad=False)
        if len(errors) > wrong_before:  # tensors of two weights make no weight, and may even fit together
            self._parameters.update(parameters)
            for name, (data, values) in before.items():
                parameters[name].data = data.copy_(values)

    def _describe_format(self) -> str:
        format = self.format
        dense = format.shape[0] * format.shape[1] * self._dtype_marker.element_size()
        share = f" ({format.nbytes / dense:.1%} of dense)" if dense else ""
        return f"format={format.label}, sparsity={format.sparsity:.2f}, bytes={format.nbytes:,}{share}"


class CompressedLinear(_Compressed):
    """`y = x @ weight.T + bias` over a compressed weight; attributes are those of nn.Linear.

    Args:
        format: the compressed weight, `[out_features, in_features]`.
        bias: `[out_features]`, or None.
        dtype: of the dense weight that `weight` gives back; by default that of the format's values, float32 for int8.
        transposed: whether it stands for Hugging Face's Conv1D: then `weight` is `[in_features, out_features]`, as
            there and in a checkpoint of such a model.
    """

    bias: nn.Parameter | None
    transposed = False

    def __init__(
        self, format: Format, bias: Tensor | None = None, dtype: torch.dtype | None = None, transposed: bool = False
    ) -> None:
        super().__init__(format, dtype)
        if transposed:
            self.transposed = True
        self.out_features, self.in_features = format.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(
                f"engine.nn.CompressedLinear: bias: expected [{self.out_features}], got {list(bias.shape)}"
            )
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)

    @classmethod
    def from_dense(cls, linear: Any, format_type: type[Format], **how: Any) -> "CompressedLinear":
        """Compresses the weight of `linear` (nn.Linear, or Hugging Face's Conv1D) by
        `format_type.from_dense(weight, **how)` and shares its bias.

        Float values take over the weight's `requires_grad`, so that a pruned layer can be trained on as it is.
        Another layer may compute something else with its weight: TypeError.
        """
        transposed = is_conv1d(linear)
        if not transposed:
            where, expected = "nn.CompressedLinear.from_dense", "nn.Linear or Hugging Face's Conv1D"
            _check.is_kind(where, "linear", linear, nn.Linear, expected)
        matrix = linear.weight.t().contiguous() if transposed else linear.weight
        module = cls(format_type.from_dense(matrix, **how), linear.bias, linear.weight.dtype, transposed)
        if module.values.is_floating_point():
            module.values.requires_grad_(linear.weight.requires_grad)
        return module.train(linear.training)

    def forward(self, input: Tensor | None = None, *, x: Tensor | None = None) -> Tensor:
        """`input` `[..., in_features]` to `[..., out_features]`, in its dtype (under autocast, in autocast's).

        Where it stands for a Conv1D, whose argument is called `x`, that name does too.
        """
        if input is not None:
            x = input
        elif x is None or not self.transposed:
            raise TypeError(f"engine.nn.CompressedLinear: {'x' if self.transposed else 'input'}: is missing")
        # Of a bitmap's columns an op knows only how many bytes they are. What is no tensor may be torch.fx's stand-in.
        if isinstance(x, Tensor):
            if x.is_nested:
                return of_nested(self, x)
            shape = x.shape
            if not shape or shape[-1] != self.in_features:
                expected = f"[..., {self.in_features}]"
                raise ValueError(f"engine.nn.CompressedLinear: input: expected {expected}, got {list(shape)}")
        if torch._C._is_any_autocast_enabled():
            x = in_autocast(x)
        # The bias as an attribute would cost 0.5 µs more.
        return self.format.linear(x, self._parameters["bias"])

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.t() if self.transposed else matrix

    def extra_repr(self) -> str:
        """What `repr` shows between the parentheses."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {self._describe_format()}"


class CompressedEmbedding(_Compressed):
    """Rows of an int8 weight by index; attributes are those of nn.Embedding.

    Args:
        format: the weight, `[num_embeddings, embedding_dim]`.
        padding_idx: kept for callers that ask for it; the row itself is what it was.
        dtype: of the rows given out.
    """

    def __init__(self, format: DenseInt8, padding_idx: int | None = None, dtype: torch.dtype | None = None) -> None:
        _check.is_kind("nn.CompressedEmbedding", "format", format, DenseInt8, "a DenseInt8")
        super().__init__(format, dtype)
        self.num_embeddings, self.embedding_dim = format.shape
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.padding_idx = padding_idx

    @classmethod
    def from_dense(cls, embedding: nn.Embedding, format_type: type[DenseInt8] = DenseInt8) -> "CompressedEmbedding":
        """Compresses `embedding`'s weight. An embedding with `max_norm` changes its weight as it runs: ValueError.

        What is no nn.Embedding is a TypeError.
        """
        where = "nn.CompressedEmbedding.from_dense"
        _check.is_kind(where, "embedding", embedding, nn.Embedding, "nn.Embedding")
        if embedding.max_norm is not None:
            raise ValueError("engine.nn.CompressedEmbedding: an embedding with max_norm can't be compressed")
        format = format_type.from_dense(embedding.weight)
        return cls(format, embedding.padding_idx, embedding.weight.dtype).train(embedding.training)

    def forward(self, input: Tensor) -> Tensor:
        """Indices `[...]` to rows `[..., embedding_dim]`."""
        if isinstance(input, Tensor) and input.is_nested:
            return of_nested(self, input)
        dtype, input_scale = self._dtype_marker.dtype, self.input_scale
        if input_scale is None or input_scale.dim() == 0:
            return ops.int8_embedding(input, self.values, self.scale, dtype)
        # Tied to a smoothed linear layer: the values have taken over its channels' scales.
        return (ops.int8_embedding(input, self.values, self.scale, torch.float32) / input_scale).to(dtype)

    def extra_repr(self) -> str:
        """What `repr` shows between the parentheses."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._describe_format()}"
