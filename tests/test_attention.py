"""engine.nn.MultiheadAttention beside torch.nn.MultiheadAttention: outputs, masks, state dicts, and compressed."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import engine
from engine.checkpoint import CheckpointError
from engine.nn import CompressedLinear, MultiheadAttention, unfuse_attention_

INT8 = engine.Recipe(quantize=engine.Quantize(), guard="none")


def masks(n, heads, length, size, kind):
    """`attn_mask` and `key_padding_mask`, of which no row masks all keys."""
    causal = torch.ones(length, size, dtype=torch.bool).triu(1)
    padding = torch.zeros(n, size, dtype=torch.bool)
    padding[0, -2:] = True
    return {
        "none": (None, None),
        "causal": (causal, None),
        "padding": (None, padding),
        "both": (causal, padding),
        "floats": (torch.randn(length, size), torch.randn(n, size)),
        "each head": (torch.randn(n * heads, length, size), None),
    }[kind]


@pytest.mark.parametrize("kind", ["none", "causal", "padding", "both", "floats", "each head"])
@pytest.mark.parametrize("cross", ["no", "keys as wide", "other widths"])
@pytest.mark.parametrize("batch_first, bias", list(itertools.product([False, True], repeat=2)))
def test_gives_what_the_fused_one_gives(kind, batch_first, bias, cross):
    n, length, size, width, heads = 3, 7, 7 if cross == "no" else 5, 24, 4
    kdim, vdim = (10, 14) if cross == "other widths" else (width, width)
    fused = nn.MultiheadAttention(width, heads, 0.0, bias, kdim=kdim, vdim=vdim, batch_first=batch_first).eval()
    for parameter in fused.parameters():
        nn.init.normal_(parameter, std=0.3)
    own = MultiheadAttention.from_fused(fused)
    attn_mask, padding = masks(n, heads, length, size, kind)
    query = torch.randn(n, length, width)
    key, value = (query, query) if cross == "no" else (torch.randn(n, size, kdim), torch.randn(n, size, vdim))
    if not batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    for need_weights, average in ((True, True), (True, False), (False, True)):
        how = {"need_weights": need_weights, "average_attn_weights": average}
        want, want_weights = fused(query, key, value, padding, attn_mask=attn_mask, **how)
        got, weights = own(query, key, value, padding, attn_mask=attn_mask, **how)
        torch.testing.assert_close(got, want)
        assert (weights is None) == (want_weights is None)
        if weights is not None:
            torch.testing.assert_close(weights, want_weights)


@pytest.mark.parametrize("batch_first", [False, True])
def test_one_sequence_and_a_causal_hint(batch_first):
    fused = nn.MultiheadAttention(16, 2, batch_first=batch_first).eval()
    own, x = MultiheadAttention.from_fused(fused), torch.randn(6, 16)
    causal, padding = torch.ones(6, 6, dtype=torch.bool).triu(1), torch.tensor([False] * 5 + [True])
    for how in ({}, {"key_padding_mask": padding}, {"attn_mask": causal, "is_causal": True, "need_weights": False}):
        (want, want_weights), (got, weights) = fused(x, x, x, **how), own(x, x, x, **how)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(weights, want_weights)
    batch = torch.randn(3, 6, 16) if batch_first else torch.randn(6, 3, 16)
    how = {"attn_mask": causal, "is_causal": True, "need_weights": False}
    torch.testing.assert_close(own(batch, batch, batch, **how)[0], fused(batch, batch, batch, **how)[0])


def test_gradients_and_dropout():
    fused = nn.MultiheadAttention(16, 2)
    own, x = MultiheadAttention.from_fused(fused), torch.randn(6, 3, 16)
    fused(x, x, x)[0].square().sum().backward()
    own(x, x, x)[0].square().sum().backward()
    got = torch.cat([layer.weight.grad for layer in (own.q_proj, own.k_proj, own.v_proj)])
    torch.testing.assert_close(got, fused.in_proj_weight.grad)
    got = torch.cat([layer.bias.grad for layer in (own.q_proj, own.k_proj, own.v_proj)])
    torch.testing.assert_close(got, fused.in_proj_bias.grad, rtol=1e-4, atol=1e-5)
    assert own.out_proj.weight is fused.out_proj.weight
    want = own(x, x, x)[0]
    own.dropout = 0.5
    assert not torch.equal(own(x, x, x)[0], own(x, x, x)[0])
    assert not torch.equal(own(x, x, x, need_weights=False)[0], own(x, x, x, need_weights=False)[0])
    own.eval()
    assert torch.equal(own(x, x, x)[0], want)


@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 10}])
def test_state_dicts_of_both_kinds_load(sizes):
    fused, own = nn.MultiheadAttention(16, 2, **sizes), MultiheadAttention(16, 2, **sizes)
    own.load_state_dict(fused.state_dict())
    again = MultiheadAttention(16, 2, **sizes)
    again.load_state_dict(own.state_dict())
    for one, other in zip(MultiheadAttention.from_fused(fused).parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="Missing key"):
        own.load_state_dict({})


def encoder(**how):
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, **how)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.parametrize("padded", [False, True])
def test_inside_pytorchs_transformer(padded):
    model = encoder()
    unfused = copy.deepcopy(model)
    assert unfuse_attention_(unfused) == ["layers.0.self_attn", "layers.1.self_attn"]
    x, mask = torch.randn(3, 9, 64), torch.zeros(3, 9, dtype=torch.bool)
    mask[1, 6:] = padded
    with torch.no_grad():
        want, got = (m(x, src_key_padding_mask=mask if padded else None) for m in (model, unfused))
    torch.testing.assert_close(got[~mask], want[~mask])
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(64, 4, 128, dropout=0.0, batch_first=True), 1).eval()
    other = copy.deepcopy(decoder)
    assert len(unfuse_attention_(other)) == 2
    causal = nn.Transformer.generate_square_subsequent_mask(9)
    torch.testing.assert_close(other(x, want, tgt_mask=causal), decoder(x, want, tgt_mask=causal))


def test_compressed_saved_and_loaded(tmp_path):
    model, x = encoder(), torch.randn(3, 9, 64)
    fused = copy.deepcopy(model)
    assert "unfuse_attention_" in str(engine.compress_(fused, INT8))
    with torch.no_grad():
        want = model(x)
        unfuse_attention_(model)
        report = engine.compress_(model, INT8)
        assert isinstance(model.layers[1].self_attn.v_proj, CompressedLinear) and "unfuse" not in str(report)
        assert report.bytes_after < 0.35 * report.bytes_before
        got = model(x)
        assert torch.cosine_similarity(got.flatten(), want.flatten(), 0) > 0.999
        engine.save(model, tmp_path / "m.safetensors")
        fresh = engine.load_(encoder(), tmp_path / "m.safetensors")
        assert torch.equal(fresh(x), got)
        other = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 99, dropout=0.0, batch_first=True), 2).eval()
        before, want = list(other.modules()), other(x)
        with pytest.raises(CheckpointError, match="has shape"):
            engine.load_(other, tmp_path / "m.safetensors")
        assert all(one is same for one, same in zip(before, other.modules(), strict=True))
        assert torch.equal(other(x), want)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), got)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype, need_weights):
    fused = nn.MultiheadAttention(16, 2, batch_first=True).to(dtype)
    own, x = MultiheadAttention.from_fused(fused), torch.randn(3, 5, 16, dtype=dtype)
    mask = torch.zeros(3, 5).index_fill(0, torch.tensor(1), torch.finfo(torch.float32).min)  # one row pads everything
    for padding in (None, mask.to(dtype), *([] if need_weights else [mask])):  # PyTorch's takes no other with weights
        want, _ = fused(x, x, x, padding, need_weights=need_weights)
        got, _ = own(x, x, x, padding, need_weights=need_weights)
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.02, equal_nan=True)
    own(x, x, x, mask, need_weights=need_weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert own.float()(x.float(), x.float(), x.float())[0].dtype == torch.bfloat16


def test_begins_as_large_as_the_fused_one():
    torch.manual_seed(0)
    for sizes in ({}, {"kdim": 128, "vdim": 300}):
        fused, own = nn.MultiheadAttention(256, 4, **sizes), MultiheadAttention(256, 4, **sizes)
        for one, other in zip(MultiheadAttention.from_fused(fused).parameters(), own.parameters(), strict=True):
            assert other.abs().max() <= one.abs().max() * 1.01 + 1e-9
            torch.testing.assert_close(other.std(), one.std(), rtol=0.03, atol=1e-9)


def test_ties_and_frozen_parameters_stay():
    model = nn.ModuleDict(
        {"a": nn.MultiheadAttention(16, 2), "b": nn.MultiheadAttention(16, 2), "l": nn.Linear(16, 16)}
    )
    model["b"].in_proj_weight, model["b"].out_proj.weight = model["a"].in_proj_weight, model["a"].out_proj.weight
    model["l"].weight = model["a"].out_proj.weight
    model["a"].in_proj_bias.requires_grad_(False)
    count = sum(parameter.numel() for parameter in model.parameters())
    unfuse_attention_(model)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    a, b = model["a"], model["b"]
    assert a.v_proj.weight is b.v_proj.weight and a.out_proj.weight is model["l"].weight
    assert a.q_proj.weight.requires_grad and not a.q_proj.bias.requires_grad and b.q_proj.bias.requires_grad


def test_loads_below_and_above_a_prefix(tmp_path):
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(16, 16)

    def make():  # whose second name ends as the first, and holds a `q_proj` of its own
        return nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2), "block": nn.ModuleDict({"attn": Apart()})})

    model, fresh = make(), make()
    engine.save(model, tmp_path / "fused.safetensors")
    engine.load_(fresh, tmp_path / "fused.safetensors")
    assert torch.equal(fresh["attn"].in_proj_weight, model["attn"].in_proj_weight)

    inner = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2), "l": nn.Linear(16, 16)})
    fresh = nn.ModuleDict({"x": copy.deepcopy(inner)})
    unfuse_attention_(inner)
    engine.compress_(inner, INT8)
    engine.save(inner, tmp_path / "small.safetensors")
    engine.load_(fresh, tmp_path / "small.safetensors")
    assert isinstance(fresh["x"]["attn"].k_proj, CompressedLinear)


def what_others_changed():
    attention = nn.MultiheadAttention(16, 2)
    attention.in_proj_weight.register_hook(lambda grad: grad)
    yield attention
    attention = nn.MultiheadAttention(16, 2)
    attention.out_proj.register_forward_hook(lambda *_: None)
    yield attention
    attention = nn.MultiheadAttention(16, 2)
    nn.utils.parametrizations.weight_norm(attention.out_proj)
    yield attention
    attention = nn.MultiheadAttention(16, 2)
    prune.l1_unstructured(attention.out_proj, "weight", 0.5)
    yield attention
    attention = nn.MultiheadAttention(16, 2)
    attention.register_buffer("x", torch.zeros(1))
    yield attention
    attention = nn.MultiheadAttention(16, 2)
    attention.forward = lambda *_: None
    yield attention
    yield type("Mine", (nn.MultiheadAttention,), {})(16, 2)


@pytest.mark.parametrize("attention", list(what_others_changed()), ids=range(7))
def test_what_others_changed_stays(attention):
    model = nn.ModuleDict({"a": attention, "b": nn.MultiheadAttention(16, 2)})
    assert unfuse_attention_(model) == ["b"] and model["a"] is attention


def test_old_pickles_without_an_attribute():
    model = encoder()
    del model.use_nested_tensor
    assert len(unfuse_attention_(model)) == 2


def test_what_stays_as_it_is():
    shared = nn.MultiheadAttention(16, 2)
    hooked = nn.MultiheadAttention(16, 2)
    hooked.register_forward_hook(lambda *_: None)
    parts = {"one": shared, "two": shared, "zero": nn.MultiheadAttention(16, 2, add_zero_attn=True), "hooked": hooked}
    model = nn.ModuleDict({**parts, "biased": nn.MultiheadAttention(16, 2, add_bias_kv=True)})
    assert unfuse_attention_(model) == ["one", "two"]
    assert model["one"] is model["two"] and isinstance(model["one"], MultiheadAttention)
    assert model["hooked"] is hooked and model["zero"] is parts["zero"]
    assert unfuse_attention_(model) == []
    with pytest.raises(ValueError, match="add_zero_attn"):
        MultiheadAttention.from_fused(parts["zero"])


def test_errors():
    own, x = MultiheadAttention(16, 2, batch_first=True), torch.randn(3, 5, 16)
    with pytest.raises(ValueError, match=r"attn_mask: expected one"):
        own(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match=r"attn_mask: expected \[5, 5\], got \[5, 4\]"):
        own(x, x, x, attn_mask=torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"key_padding_mask: expected \[3, 5\], got \[5\]"):
        own(x, x, x, key_padding_mask=torch.zeros(5))
    for mask in (torch.ones(5, 5, dtype=torch.uint8), torch.ones(5, 5, dtype=torch.int64)):
        with pytest.raises(TypeError, match="attn_mask: expected bool or floats"):
            own(x, x, x, attn_mask=mask)
    for query, key, value in ((x, x[:1], x[:1]), (x[:1], x, x), (x, x, x[:, 1:]), (x[..., 1:], x, x), (x[0], x, x)):
        with pytest.raises(ValueError, match="and batches and lengths that fit"):
            own(query, key, value)
    with pytest.raises(ValueError, match="and batches and lengths that fit"):
        own(x[None], x[None], x[None])
    for heads in (3, 0):
        with pytest.raises(ValueError, match="embed_dim: expected a positive multiple of num_heads"):
            MultiheadAttention(16, heads)
    with pytest.raises(ValueError, match="add_zero_attn"):
        MultiheadAttention(16, 2, 0.0, True, False, True)
