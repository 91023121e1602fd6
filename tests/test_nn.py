"""Compressed modules live through everything that a module lives through."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import engine
from engine.formats import Bitmap, Block, Csr, DenseInt8, SemiStructured
from engine.nn import CompressedConv2d, CompressedEmbedding, CompressedLinear

HOW = {
    "int8": (DenseInt8, {}),
    "int8 static": (DenseInt8, {"activation": "static", "input_scale": 0.03}),
    "int8 by channel": (DenseInt8, {"activation": "static", "input_scale": torch.linspace(0.02, 0.05, 96)}),
    "int8 weights only": (DenseInt8, {"activation": "none"}),
    "bitmap": (Bitmap, {"threshold": 0.03}),
    "bitmap int8": (Bitmap, {"threshold": 0.03, "values": torch.int8}),
    "csr": (Csr, {"threshold": 0.05}),
    "2:4": (SemiStructured, {}),
    "2:4 int8": (SemiStructured, {"values": torch.int8}),
    "block": (Block, {"threshold": 0.059}),
    "block int8": (Block, {"threshold": 0.059, "values": torch.int8}),
}


@pytest.fixture(params=HOW)
def linear(request):
    format_type, how = HOW[request.param]
    return CompressedLinear.from_dense(nn.Linear(96, 40), format_type, **how)


def another(linear):
    """A module of the same format over another weight: other values, another number of them."""
    if isinstance(linear.format, DenseInt8):
        how = {"activation": "dynamic" if linear.format.quantize_input else "none"}
        if linear.input_scale is not None:
            how = {"activation": "static", "input_scale": 0.5}
    else:
        how = {} if isinstance(linear.format, SemiStructured) else {"threshold": 0.04}
        if linear.values.dtype == torch.int8:
            how["values"] = torch.int8
    return CompressedLinear.from_dense(nn.Linear(96, 40), type(linear.format), **how)


def test_forward_is_the_format(linear):
    x = torch.randn(2, 3, 96)
    assert torch.equal(linear(x), linear.format.linear(x, linear.bias))
    assert (linear.in_features, linear.out_features) == (96, 40)
    assert linear.weight.shape == (40, 96) and linear.weight.dtype == torch.float32


def test_state_dict(linear):
    x, other = torch.randn(5, 96), another(linear)
    assert not torch.equal(other(x), linear(x))
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other(x), linear(x))
    buffer = io.BytesIO()
    torch.save(linear.state_dict(), buffer)
    buffer.seek(0)
    again = another(linear)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(again(x), linear(x))


def test_loading_damage_is_an_error():
    linear = CompressedLinear.from_dense(nn.Linear(96, 40), Bitmap, threshold=0.03)
    state = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    state["bitmask"][3, 2] ^= 1
    with pytest.raises(RuntimeError, match="row 3"):
        linear.load_state_dict(state)


def test_a_refused_load_leaves_the_layer_as_it_was(linear):
    twin = copy.deepcopy(linear)
    memory = {name: parameter.data_ptr() for name, parameter in linear.named_parameters()}
    good = another(linear).state_dict()
    for name in good:
        state = dict(good) | {name: torch.cat([good[name].flatten()] * 2)}
        for damaged in (state, state | {"input_scale": torch.tensor(torch.nan)}):
            with pytest.raises(RuntimeError):
                linear.load_state_dict(damaged)
            assert linear.state_dict().keys() == twin.state_dict().keys()
            for now, then in zip(linear.parameters(), twin.parameters(), strict=True):
                assert torch.equal(now, then)
            assert memory == {name: parameter.data_ptr() for name, parameter in linear.named_parameters()}


def test_damage_is_found_whatever_else_the_model_lacks():
    """A new head has no weights in the file: that turns off no check of the layers behind it."""
    body = CompressedLinear(SemiStructured.from_dense(torch.randn(8, 16), torch.int8))
    model = nn.Sequential(nn.Linear(2, 2), body)
    state = {f"1.{name}": tensor for name, tensor in body.state_dict().items()}
    model.load_state_dict(state, strict=False)
    state["1.metadata"] = torch.full_like(state["1.metadata"], 255)
    with pytest.raises(RuntimeError, match="metadata"):
        model.load_state_dict(state, strict=False)


def test_loading_into_a_model_without_memory():
    model = nn.Sequential(CompressedLinear(DenseInt8.from_dense(torch.randn(8, 16))))
    state = model.state_dict()
    with pytest.warns(UserWarning, match="no-op"):
        model.to("meta").load_state_dict(state)
    model.load_state_dict(state, assign=True)
    assert model[0].values.device.type == "cpu"


def test_deepcopy_and_pickle(linear):
    x = torch.randn(5, 96)
    for twin in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert torch.equal(twin(x), linear(x))
        assert repr(twin) == repr(linear)
        assert all(a is not b for a, b in zip(twin.parameters(), linear.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_to_dtype(linear, dtype):
    before = linear.weight
    linear.to(dtype)
    if linear._parameters.get("scale") is not None:
        assert linear.scale.dtype == torch.float32
    assert linear.weight.dtype == dtype and linear.bias.dtype == dtype
    torch.testing.assert_close(linear.weight.float(), before, rtol=2**-8, atol=0)
    assert linear(torch.randn(5, 96, dtype=dtype)).dtype == dtype
    linear.to(torch.float32)
    assert linear.weight.dtype == torch.float32


def test_to_meta_device(linear):
    linear.to("meta")
    assert linear(torch.empty(5, 96, device="meta")).shape == (5, 40)


def test_compile_and_export(linear):
    x = torch.randn(5, 96)
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), linear(x), rtol=1e-6, atol=1e-6)
        exported = torch.export.export(linear, (x,))
        torch.testing.assert_close(exported.module()(x), linear(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["int8", "bitmap int8"])
def test_compile_with_inductor(name):
    format_type, how = HOW[name]
    model = nn.Sequential(CompressedLinear.from_dense(nn.Linear(96, 40), format_type, **how), nn.GELU())
    x = torch.randn(5, 96)
    torch._dynamo.reset()
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-5, atol=1e-5)


def test_export_with_a_dynamic_batch(linear):
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(linear, (torch.randn(5, 96),), dynamic_shapes=({0: batch},))
    x = torch.randn(17, 96)
    torch.testing.assert_close(exported.module()(x), linear(x), rtol=1e-6, atol=1e-6)


def test_gradient_goes_through_frozen_layers(linear):
    x = torch.randn(5, 96, requires_grad=True)
    grad = torch.randn(5, 40)
    linear(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ linear.weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear.bias.grad, grad.sum(0))


def test_sparse_fine_tuning_keeps_the_pattern():
    torch.manual_seed(0)
    linear = CompressedLinear.from_dense(nn.Linear(96, 40), Bitmap, threshold=0.05)
    assert linear.values.requires_grad
    mask, x, goal = linear.weight != 0, torch.randn(64, 96), torch.randn(64, 40)
    optimizer = torch.optim.Adam(linear.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (linear(x) - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(linear.weight != 0, mask)


def test_repr_tells_format_shape_sparsity_bytes():
    linear = CompressedLinear.from_dense(nn.Linear(96, 40), Bitmap, threshold=0.05, values=torch.int8)
    text = repr(linear)
    assert "in_features=96, out_features=40, bias=True, format=bitmap int8, sparsity=0." in text
    assert f"bytes={linear.format.nbytes:,}" in text


def test_embedding():
    embedding = nn.Embedding(50, 24, padding_idx=3)
    module = CompressedEmbedding.from_dense(embedding)
    indices = torch.randint(0, 50, (4, 7))
    assert torch.equal(module(indices), module.weight[indices])
    torch.testing.assert_close(module(indices), embedding(indices), atol=0.02, rtol=0)
    assert module.padding_idx == 3 and not module(torch.tensor(3)).any()
    assert (module.num_embeddings, module.embedding_dim) == (50, 24)
    assert module.to(torch.bfloat16)(indices).dtype == torch.bfloat16
    with pytest.raises(IndexError):
        module(torch.tensor([50]))
    with torch.no_grad():
        exported = torch.export.export(module, (indices,))
        assert torch.equal(exported.module()(indices), module(indices))


def test_bad_modules():
    format = DenseInt8.from_dense(torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"bias: expected \[4\], got \[5\]"):
        CompressedLinear(format, torch.zeros(5))
    with pytest.raises(TypeError, match=r"CompressedLinear: format: expected a format of .*, got Tensor"):
        CompressedLinear(torch.randn(4, 8))
    with pytest.raises(TypeError, match="expected a DenseInt8, got Bitmap"):
        CompressedEmbedding(Bitmap.from_dense(torch.randn(4, 8), 0.5))
    with pytest.raises(ValueError, match="max_norm"):
        CompressedEmbedding.from_dense(nn.Embedding(4, 8, max_norm=1.0))


OTHER_LAYERS = {
    CompressedLinear: (nn.Bilinear(4, 5, 6), nn.Conv1d(4, 6, 1), nn.Conv2d(4, 6, 1), nn.Embedding(4, 5), torch.ones(4)),
    CompressedConv2d: (nn.ConvTranspose2d(4, 4, 3), nn.Conv1d(4, 4, 3), nn.Linear(4, 5)),
    CompressedEmbedding: (nn.Linear(4, 5), nn.EmbeddingBag(4, 5)),
}


@pytest.mark.parametrize("kind", OTHER_LAYERS)
def test_a_layer_that_computes_something_else_is_refused(kind):
    for other in OTHER_LAYERS[kind]:
        with pytest.raises(TypeError, match=rf"{kind.__name__}.from_dense: .*, got {type(other).__name__}"):
            kind.from_dense(other, DenseInt8)


def test_a_subclass_of_a_layer_is_one():
    class Linear(nn.Linear):
        pass

    assert CompressedLinear.from_dense(Linear(8, 4), DenseInt8)(torch.randn(2, 8)).shape == (2, 4)


def test_reference_mode_is_the_same_layer(linear):
    x = torch.randn(5, 96)
    with engine.reference_mode():
        want = linear(x)
    torch.testing.assert_close(linear(x), want, rtol=1e-5, atol=1e-5)


def test_loading_another_number_of_kept_weights_keeps_ties_and_optimizers():
    dense = nn.Linear(32, 16)
    first = CompressedLinear.from_dense(dense, Bitmap, threshold=0.05)
    tied = nn.Sequential(first, CompressedLinear(first.format, None))
    other = CompressedLinear.from_dense(dense, Bitmap, threshold=0.1)
    pair = nn.Sequential(other, CompressedLinear(other.format, None))
    parameters = {id(p) for p in tied.parameters()}
    tied.load_state_dict(pair.state_dict())
    assert tied[0].values is tied[1].values and {id(p) for p in tied.parameters()} == parameters
    assert torch.equal(tied[0].weight, other.weight)


def test_forward_mode_derivatives_are_refused(linear):
    x = torch.randn(3, linear.in_features)
    for context in (torch.enable_grad, torch.no_grad):
        with context(), pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            torch.func.jvp(linear, (x,), (torch.ones_like(x),))
    want = linear(x)
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(linear(x), want)  # without a tangent it is as ever


@pytest.mark.parametrize("wrong", [((1.0, 2.0),), [1.0], None])
def test_loading_what_is_no_tensor_is_an_error(linear, wrong):
    x = torch.randn(2, 96)
    want = linear(x)
    for name in ("values", "bias"):
        with pytest.raises(RuntimeError, match=f'"{name}", expected torch.Tensor'):
            linear.load_state_dict({**linear.state_dict(), name: wrong})
    assert torch.equal(linear(x), want)


@pytest.mark.parametrize("kind, how", [HOW["bitmap"], HOW["csr"], HOW["2:4"], HOW["block"]])
def test_values_may_be_pruned_further_by_torch(kind, how):
    dense = nn.Linear(96, 40)
    linear = CompressedLinear.from_dense(dense, kind, **how)
    x, before = torch.randn(3, 96), linear.weight.detach()
    prune.l1_unstructured(linear, "values", 0.5)
    smallest = linear.values_mask == 0
    linear(x).sum().backward()
    assert linear.values_orig.grad.shape == smallest.shape and not linear.values_orig.grad[smallest].any()
    fewer = linear.weight.detach()
    assert linear.values.count_nonzero() < 0.51 * linear.values.numel() and fewer.any()
    assert torch.equal(fewer, torch.where(fewer == 0, 0, before))
    assert torch.equal(linear(x), linear.format.linear(x, linear.bias)) and "format=" in repr(linear)
    twin = prune.identity(CompressedLinear.from_dense(dense, kind, **how), "values")
    twin.load_state_dict(linear.state_dict())
    assert torch.equal(twin(x), linear(x))
    torch.testing.assert_close(torch.compile(linear, fullgraph=True, backend="aot_eager")(x), linear(x))
    with pytest.raises(engine.CheckpointError, match="weight: values is made at each call"):
        engine.save(linear, "never.safetensors")
    prune.remove(linear, "values")
    assert torch.equal(linear.weight, fewer) and isinstance(linear.values, nn.Parameter)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_traced(linear):
    traced = torch.jit.trace(linear, torch.randn(3, 96))
    x = torch.randn(2, 5, 96)
    assert torch.equal(traced(x), linear(x))


def test_a_state_dict_of_another_format_is_refused():
    cases = [
        (
            Bitmap,
            {"threshold": 0.1},
            9,
            Bitmap,
            {"threshold": 0.1},
            16,
            "Bitmap columns=9, the model's Bitmap columns=16",
        ),
        (DenseInt8, {}, 8, DenseInt8, {"activation": "none"}, 8, "quantize_input=True, the model's DenseInt8"),
        (Bitmap, {"threshold": 0.1}, 8, DenseInt8, {}, 8, "columns=8, the model's DenseInt8"),
    ]
    for kind, how, k, other_kind, other_how, other_k, message in cases:
        state = nn.Sequential(CompressedLinear.from_dense(nn.Linear(k, 4), kind, **how)).state_dict()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        model = nn.Sequential(CompressedLinear.from_dense(nn.Linear(other_k, 4), other_kind, **other_how))
        with pytest.raises(RuntimeError, match=f"0: is .*{message}"):
            model.load_state_dict(torch.load(buffer))


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_with_a_part_of_a_weight_is_refused(linear, strict):
    other, before = copy.deepcopy(linear), {name: t.clone() for name, t in linear.state_dict().items()}
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.flatten().roll(1).view_as(parameter))
    for name in set(before) - {"bias"} if len(before) > 2 else ():
        state = {key: tensor for key, tensor in other.state_dict().items() if key != name}
        with pytest.raises(RuntimeError, match=f"{name} is missing"):
            linear.load_state_dict(state, strict=strict)
        assert all(torch.equal(tensor, before[key]) for key, tensor in linear.state_dict().items())


def test_loading_by_assignment_leaves_nothing_on_meta(linear):
    state = linear.state_dict()
    empty = copy.deepcopy(linear).to("meta")
    empty.load_state_dict(state, assign=True)
    assert {parameter.device.type for parameter in empty.parameters()} == {"cpu"}
    assert torch.equal(empty.to("cpu").weight, linear.weight)


def test_functionalize_takes_the_ops_as_they_are(linear):
    x = torch.randn(3, 96)
    assert torch.equal(torch.func.functionalize(linear)(x), linear(x))


def test_inputs_of_another_width_are_refused(linear):
    with pytest.raises(ValueError, match=r"CompressedLinear: input: expected \[..., 96\], got \[2, 95\]"):
        linear(torch.randn(2, 95))
    with pytest.raises(TypeError, match="x: expected a float32, float16 or bfloat16 tensor, got list"):
        linear([1.0])


def test_transforms_of_torch_func(linear):
    x, func = torch.randn(3, 96), torch.func
    floats = {name: p for name, p in linear.named_parameters() if name in ("values", "bias") and p.is_floating_point()}
    for parameter in floats.values():
        parameter.requires_grad_()

    def loss(floats, x):
        return func.functional_call(linear, floats, (x,)).square().sum()

    detached = {name: parameter.detach() for name, parameter in floats.items()}
    (got, got_x), leaf = func.grad(loss, argnums=(0, 1))(detached, x), x.clone().requires_grad_()
    *want, want_x = torch.autograd.grad(loss(floats, leaf), [*floats.values(), leaf])
    assert torch.equal(got_x, want_x)
    assert all(torch.equal(a, b) for a, b in zip(got.values(), want, strict=True))
    each = func.vmap(func.grad(loss), (None, 0))(detached, x)  # the gradient of each row
    assert all(torch.allclose(a.sum(0), b, rtol=1e-4, atol=1e-4) for a, b in zip(each.values(), want, strict=True))
    assert torch.allclose(func.jacrev(linear)(x[0]).T @ linear(x[0]) * 2, want_x[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match=r"linear has no forward-mode derivative \(jvp\)"):
        func.hessian(lambda x: loss(detached, x))(x[0])
    with pytest.raises(TypeError, match="x: expected a float32"):  # explained as anywhere
        func.grad(lambda bias: linear.format.linear(x.double(), bias).sum())(torch.randn(40))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(linear):
    parts = [torch.randn(2, 96), torch.randn(5, 96), torch.randn(0, 96)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    y = linear(x)
    assert torch.equal(y.values(), linear(x.values())) and y.shape[1] == x.shape[1]
    y.values().sum().backward()
    assert x.grad.shape == x.shape
    rows = torch.nested.narrow(torch.randn(3, 7, 96), 1, torch.tensor([1, 0, 2]), torch.tensor([3, 7, 2]), torch.jagged)
    got = linear(rows)
    assert [t.shape[0] for t in got.unbind()] == [3, 7, 2] and torch.equal(got.values(), linear(rows.values()))
    with pytest.raises(TypeError, match=r"CompressedLinear: input: expected .*torch.jagged, got .*torch.strided"):
        linear(torch.nested.nested_tensor(parts, layout=torch.strided))
    with pytest.raises(ValueError, match=r"input: expected \[\.\.\., 96\], got"):
        linear(torch.nested.nested_tensor([torch.randn(2, 95)], layout=torch.jagged))
    with pytest.raises(ValueError, match="another ragged dimension than the last"):
        linear(
            torch.nested.nested_tensor([torch.randn(3, 96), torch.randn(3, 96)], layout=torch.jagged).transpose(1, 2)
        )
    torch._dynamo.reset()
    assert torch.compile(linear, fullgraph=True, backend="aot_eager")(x).shape == y.shape
    calls = []
    with linear.register_forward_hook(lambda *_: calls.append("hook")):
        linear(x)
    assert calls == ["hook"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_indices():
    embedding = CompressedEmbedding.from_dense(nn.Embedding(8, 4))
    indices = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3])], layout=torch.jagged)
    assert torch.equal(embedding(indices).unbind()[1], embedding(torch.tensor([3])))


def test_symbolic_tracing(linear):
    x = torch.randn(3, 96)
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(linear))(x), linear(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_answers_as_for_a_dense_layer(linear, dtype):
    x = torch.randn(2, 96)
    with torch.autocast("cpu", dtype):
        y = linear(x)
    assert y.dtype == dtype and torch.equal(y, linear(x.to(dtype)))
    assert linear(x).dtype == torch.float32


def test_the_weight_cannot_be_set(linear):
    with pytest.raises(AttributeError, match="CompressedLinear: weight: can't be set"):
        linear.weight = nn.Parameter(torch.zeros(40, 96))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_parameter_tells_the_dense_dtype(dtype):
    dense = nn.Sequential(nn.Linear(8, 8)).to(dtype)
    linear = CompressedLinear.from_dense(dense[0], DenseInt8)
    assert next(linear.parameters()).dtype == dtype and next(linear.half().parameters()).dtype == torch.float16
    assert set(linear.state_dict()) == {"values", "scale", "bias"}
    fresh = CompressedLinear.from_dense(nn.Linear(8, 8), DenseInt8)
    fresh.load_state_dict(linear.state_dict())


def test_arguments_have_the_names_of_the_dense_layers():
    x = torch.randn(2, 8)
    linear = CompressedLinear.from_dense(nn.Linear(8, 8), DenseInt8)
    assert torch.equal(linear(input=x), linear(x))
    embedding = CompressedEmbedding.from_dense(nn.Embedding(8, 4))
    assert torch.equal(embedding(input=torch.tensor([3])), embedding(torch.tensor([3])))


@pytest.mark.parametrize("scale", [None, 0.1, torch.full((8,), 0.1)])
def test_checkpointing_without_reentry(scale):
    x = torch.randn(3, 8, requires_grad=True)
    linear = CompressedLinear.from_dense(
        nn.Linear(8, 8), DenseInt8, activation="dynamic" if scale is None else "static", input_scale=scale
    )
    checkpoint(linear, x, use_reentrant=False).sum().backward()
    got, x.grad = x.grad, None
    linear(x).sum().backward()
    assert torch.equal(got, x.grad)


def test_the_marker_never_requires_a_gradient():
    linear = CompressedLinear.from_dense(nn.Linear(8, 8), Bitmap, threshold=0.1)
    for parameter in linear.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
        parameter.requires_grad = parameter.is_floating_point()
    assert {name for name, p in linear.named_parameters() if p.requires_grad} == {"values", "bias"}
    again = pickle.loads(pickle.dumps(copy.deepcopy(linear)))
    assert not again._dtype_marker.requires_grad and next(again.half().parameters()).dtype == torch.float16
