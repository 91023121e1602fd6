"""One rank of a test: `python parallel_worker.py GROUPS RANK WORLD_SIZE FOLDER`.

GROUPS, "3:one,two;2:one", are so many ranks that run these functions: starting processes is what takes the time.
"""

import copy
import sys
import weakref
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import engine
from engine.distributed import FsdpReduceScatter, tensor_parallel_
from engine.distributed._parallel_linear import bounds, gather
from engine.formats import Bitmap, Csr, DenseInt8
from engine.nn import CompressedLinear

rank, world_size, folder = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
group = None  # of the first world_size ranks, set below

INTEGER = {
    "int8": (DenseInt8, {}),
    "int8 static": (DenseInt8, {"activation": "static", "input_scale": 0.02}),
    "int8 smoothed": (
        DenseInt8,
        {"activation": "static", "input_scale": lambda columns: 0.01 + 0.03 * torch.rand(columns)},
    ),
    "bitmap int8": (Bitmap, {"threshold": 0.03, "values": torch.int8}),
    "bitmap int8 static": (Bitmap, {"threshold": 0.03, "values": torch.int8, "input_scale": 0.02}),
}
FLOAT = {
    "int8 weights only": (DenseInt8, {"activation": "none"}),
    "bitmap": (Bitmap, {"threshold": 0.03}),
    "bitmap bfloat16": (Bitmap, {"threshold": 0.03, "values": torch.bfloat16}),
    "csr": (Csr, {"threshold": 0.05}),
    "dense": (None, {}),
}


def layer(name, rows, columns, bias=True):
    linear = nn.Linear(columns, rows, bias=bias)
    format_type, how = {**INTEGER, **FLOAT}[name]
    how = {key: value(columns) if callable(value) else value for key, value in how.items()}
    return linear if format_type is None else CompressedLinear.from_dense(linear, format_type, **how)


def sharded(whole, style, **how):
    return tensor_parallel_(nn.Sequential(copy.deepcopy(whole)), group, {"0": style}, **how)[0]


def part(t):
    return t[..., slice(*bounds(t.shape[-1], world_size, rank))]


def same_bits(a, b):
    """NaN is NaN, whatever its payload: a kernel's and PyTorch's conversions to bfloat16 differ in it."""
    nan = a.isnan()
    a, b = (t.masked_fill(nan, 0).view(torch.uint8) for t in (a, b)) if torch.equal(nan, b.isnan()) else (a, a + 1)
    return torch.equal(a, b)


def refused(error, text, function, *arguments):
    try:
        function(*arguments)
    except error as raised:
        assert text in str(raised), (text, str(raised))
    else:
        raise AssertionError(f"no error: {text}")


def integer_layers():
    """Every style keeps the bits of the layer in one piece, whatever the activations are."""
    for name in INTEGER:
        for rows, columns, bias in [(40, 96, True), (17, 65, False), (5, 1500, True)]:
            whole = layer(name, rows, columns, bias)
            mine = {style: sharded(whole, style) for style in ("colwise", "colwise_rep", "rowwise", "rowwise_rep")}
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = torch.randn(2, 5, columns).to(dtype)
                x[0, 0], x[0, 1, 3], x[0, 2, -1], x[1, 1] = 0, torch.nan, torch.inf, 60000
                want = whole(x)
                assert want[0, 1].isnan().all() and not want[0, 0].isnan().any()
                assert same_bits(mine["rowwise"](part(x).contiguous()), want), (name, dtype)
                assert same_bits(mine["rowwise_rep"](x), want), (name, dtype)
                assert same_bits(mine["colwise"](x), part(want)), (name, dtype)
                assert same_bits(mine["colwise_rep"](x), want), (name, dtype)
            x = torch.randn(3, columns)
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                want, got = whole(x), mine["rowwise_rep"](leaf)
                assert same_bits(got, want) and got.dtype == torch.bfloat16, name
                assert same_bits(mine["rowwise"](part(x).contiguous()), want), name
            got.sum().backward()
            assert leaf.grad.dtype == torch.float32
    x, whole = torch.randn(5, 96), layer("int8", 40, 96)
    truth = F.linear(x, whole.weight, whole.bias)
    got = sharded(whole, "rowwise_rep", exact=False)(x)
    assert (got - truth).norm() < 0.02 * truth.norm()
    assert same_bits(got, whole(x)) == (world_size == 1)
    one = torch.randn(96)
    assert same_bits(sharded(whole, "rowwise_rep")(one), whole(one))
    assert sharded(whole, "rowwise_rep")(torch.randn(0, 96)).shape == (0, 40)


def large_sums():
    """Sums beyond 2**24, which float32 rounds, and beyond 2**31."""
    for columns in (7001, 150001):
        values = torch.randint(120, 128, (3, columns), dtype=torch.int8)
        values[1] = torch.randint(-128, -120, (columns,), dtype=torch.int8)
        whole = CompressedLinear(DenseInt8(values, torch.rand(3) + 0.5), torch.randn(3))
        x = torch.rand(4, columns) * 0.1 + 0.9
        want = whole(x)
        assert want.abs().max() > columns
        assert same_bits(sharded(whole, "rowwise_rep")(x), want)


def float_layers():
    for name in FLOAT:
        whole = layer(name, 40, 97)
        for dtype in (torch.float32, torch.bfloat16):
            if dtype == torch.bfloat16:
                whole = whole.to(dtype)
            x = torch.randn(6, 97).to(dtype)
            truth = F.linear(x.double(), whole.weight.double(), whole.bias.double())
            size = x.double().abs() @ whole.weight.double().abs().T + 1  # the terms that were rounded
            for style, given in (("rowwise", part(x).contiguous()), ("rowwise_rep", x), ("colwise_rep", x)):
                y = sharded(whole, style)(given)
                bound = (1 if dtype == torch.bfloat16 else 4) * torch.finfo(dtype).eps
                assert ((y.double() - truth).abs() <= bound * size).all(), (name, style, dtype)


def gradients():
    for name in {**INTEGER, **FLOAT}:
        whole = layer(name, 40, 97)
        for style in ("colwise", "colwise_rep", "rowwise", "rowwise_rep"):
            mine = sharded(whole, style)
            x = torch.randn(3, 97, requires_grad=True)
            grad = torch.randn(3, 40)
            whole.zero_grad()
            whole(x).backward(grad)
            given = part(x.detach()).contiguous() if style == "rowwise" else x.detach().clone()
            given.requires_grad_()
            mine(given).backward(part(grad).contiguous() if style == "colwise" else grad)
            want = part(x.grad) if style == "rowwise" else x.grad
            torch.testing.assert_close(given.grad, want, rtol=1e-4, atol=1e-4)
            by_rows = style.startswith("colwise")
            torch.testing.assert_close(mine.bias.grad, part(whole.bias.grad) if by_rows else whole.bias.grad)
            if name == "dense":
                dim = 0 if by_rows else 1
                begin, end = bounds(whole.weight.shape[dim], world_size, rank)
                grad_weight = whole.weight.grad.narrow(dim, begin, end - begin)
                torch.testing.assert_close(mine.shard.weight.grad, grad_weight)
            if name == "bitmap":
                assert mine.shard.values.grad.shape == mine.shard.values.shape


class Block(nn.Module):
    """Attention of six heads and a feed-forward net, as transformers spells them."""

    def __init__(self, width=48, heads=6):
        super().__init__()
        self.head = width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = (m(x).view(*x.shape[:-1], -1, self.head).transpose(1, 2) for m in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(x)))


PLAN = {
    "blocks.*.query": "colwise",
    "re:blocks\\.\\d\\.(key|value|up)": "colwise",
    "blocks.*.out": "rowwise",
    "blocks.*.down": "rowwise",
    "head": "colwise_rep",
}


def model():
    torch.manual_seed(7)
    model = nn.Module()
    model.blocks, model.head = nn.Sequential(Block(), Block()), nn.Linear(48, 11, bias=False)
    model.forward = lambda x: model.head(model.blocks(x))
    return model


def compressed_model():
    made = model()
    engine.compress_(made, engine.Recipe(engine.Prune(sparsity=0.5), engine.Quantize(), guard="none"))
    return made


def models():
    whole, mine = compressed_model(), compressed_model()
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    assert tensor_parallel_(mine, mesh, PLAN) is mine
    x = torch.randn(2, 9, 48)
    with torch.no_grad():
        want, got = whole(x), mine(x)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # attention is cut by heads, which may round otherwise
    bytes_of = lambda m: sum(p.numel() * p.element_size() for p in m.parameters())  # noqa: E731
    assert bytes_of(mine) < bytes_of(whole) * (1 / world_size + 0.2)
    assert f"rank {rank} of {world_size}" in repr(mine) and mine.blocks[0].down.in_features == 192
    # PyTorch's own encoder layer reads its linears' weights past them where it can
    layer = nn.TransformerEncoderLayer(48, 6, 96, batch_first=True).eval()
    whole = copy.deepcopy(layer)
    tensor_parallel_(layer, group, {"linear1": "colwise", "linear2": "rowwise"})
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), whole(x), rtol=1e-5, atol=1e-5)
    # one layer at two names
    shared = nn.ModuleDict({"a": nn.Linear(8, 8)})
    shared["b"] = shared["a"]
    tensor_parallel_(shared, group, {"*": "rowwise_rep"})
    assert shared["a"] is shared["b"]


def files():
    """A checkpoint of the whole model is loaded, then sharded; a part is saved and loaded into the same part."""
    path, own = f"{folder}/whole.safetensors", f"{folder}/part{rank}.safetensors"
    whole = compressed_model()
    if rank == 0:
        engine.save(whole, path)
    dist.barrier(group)
    mine = engine.load_(model(), path)
    tensor_parallel_(mine, group, PLAN)
    x = torch.randn(2, 9, 48)
    with torch.no_grad():
        want = mine(x)
        torch.testing.assert_close(want, whole(x), rtol=1e-6, atol=1e-6)
        engine.save(mine, own)
        again = tensor_parallel_(model(), group, PLAN)
        engine.load_(again, own)
        assert torch.equal(again(x), want)
    refused(engine.CheckpointError, "not for this", engine.load_, again, path)
    # weights that each rank has quantised by itself have other scales: then floats are added up
    mine = sharded(nn.Linear(96, 40), "rowwise_rep")
    want = mine(x := torch.randn(5, 96))
    mine.shard = CompressedLinear.from_dense(mine.shard, DenseInt8)
    got = mine(x)
    assert 0 < (got - want).norm() < 0.02 * want.norm()


def pipeline():
    """Compressed layers as the two stages of a pipeline."""
    whole = compressed_model()
    stages = [whole.blocks[0], nn.Sequential(whole.blocks[1], whole.head)]
    x = torch.randn(6, 9, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = torch.cat([whole(part) for part in x.chunk(3)])
        schedule = ScheduleGPipe(PipelineStage(stages[rank], rank, 2, torch.device("cpu"), group=group), 3)
        got = schedule.step() if rank else schedule.step(x)
    assert rank == 0 or torch.equal(got, want)


def fsdp():
    """FSDP2's gradients are the averages over the ranks, through the engine's reduce-scatter."""
    torch.manual_seed(3)
    whole = nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 5))
    mine = copy.deepcopy(whole)
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("dp",))
    calls = []

    class Counted(FsdpReduceScatter):
        def __call__(self, *arguments, **named):
            calls.append(named["input_tensor"].numel())
            return super().__call__(*arguments, **named)

    for module in (mine[0], mine[2], mine):
        fully_shard(module, mesh=mesh).set_custom_reduce_scatter(Counted())
    x = torch.randn(world_size, 4, 12)
    for i in range(2):
        mine.zero_grad()
        mine(x[rank] + i).square().mean().backward()
        whole.zero_grad()
        (whole(x + i).square().mean()).backward()
        for parameter, want in zip(mine.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad.full_tensor(), want.grad, rtol=1e-5, atol=1e-6)
    assert len(calls) == 4, calls
    mine[0].reshard()
    refused(ValueError, "the model is sharded, 0.weight is a DTensor", engine.quantize_, mine)
    refused(
        engine.CheckpointError, "0.weight: only dense tensors with data", engine.save, mine, f"{folder}/x.safetensors"
    )
    engine.save(whole, f"{folder}/whole{rank}.safetensors")
    refused(engine.CheckpointError, "the model's is a DTensor", engine.load_, mine, f"{folder}/whole{rank}.safetensors")
    t = torch.ones(4)
    refused(ValueError, "expected SUM or AVG", FsdpReduceScatter(), t[:2], t, group, dist.ReduceOp.MAX)


def copies():
    mine = sharded(layer("bitmap int8", 40, 96), "rowwise_rep")
    x = torch.randn(3, 96)
    twin = copy.deepcopy(mine)
    assert torch.equal(twin(x), mine(x)) and twin.shard.values is not mine.shard.values and twin.group is mine.group
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for size in (7, 8):
            whole = torch.randn(3, size).to(dtype)
            whole[0, 0], whole[1, 1], whole[2, -1] = -0.0, torch.nan, torch.inf
            assert same_bits(gather(part(whole), size, group), whole)


def codec():
    refused(ValueError, "codec: expected", lambda: sharded(nn.Linear(8, 8), "rowwise", codec="int5"))
    for name in ("int8", "bitmap", "dense"):
        whole, x = layer(name, 40, 512), torch.randn(16, 512)
        y, want = sharded(whole, "rowwise_rep", codec="int8")(x), whole(x)
        assert (y - want).norm() < 0.03 * want.norm()


def frees_layer_by_layer():
    """While a layer is sharded, those before it are gone already."""
    chain = nn.Sequential(*(layer("int8", 64, 64) for _ in range(4)))
    alive = [weakref.ref(module.values) for module in chain]
    seen, shard = [], DenseInt8.shard
    DenseInt8.shard = lambda *arguments: (seen.append(sum(r() is not None for r in alive)), shard(*arguments))[1]
    try:
        tensor_parallel_(chain, group, {"*": "rowwise_rep"})
    finally:
        DenseInt8.shard = shard
    assert seen == [4, 4, 4, 4, 4, 3, 2, 1], seen  # once to see whether each can be cut


def refusals():
    mlp = nn.ModuleDict(
        {
            "first": layer("int8", 8, 8),
            "norm": nn.LayerNorm(8),
            "narrow": nn.Linear(8, 2),
            "hooked": nn.Linear(8, 8),
            "tied": nn.Linear(8, 8),
            "other": nn.Linear(8, 8),
            "meta": nn.Linear(8, 8, device="meta"),
            "fine": nn.Linear(8, 8),
            "own": nn.Linear(8, 8),
            "named": nn.Linear(8, 8),
        }
    )
    mlp["own"].forward = lambda x: x
    mlp["named"].group, mlp["named"].note = "queries", "kept"
    mlp["hooked"].register_forward_hook(lambda *_: None)
    mlp["tied"].weight = mlp["other"].weight
    mlp["again"] = mlp["fine"]
    before = dict(mlp.named_modules(remove_duplicate=False))

    def call(plan, mesh=group, model=mlp):
        tensor_parallel_(model, mesh, plan)

    for plan, text in [
        ({}, "plan: is empty"),
        ({3: "colwise"}, "plan: expected styles by name"),
        ({"first": "diagonal"}, "'first': expected one of colwise"),
        ({"first": "colwise", "second": "rowwise"}, "'second' matches no module"),
        ({"re:(": "colwise"}, "is no regular expression"),
        ({"first": "colwise", "re:f.*t": "rowwise"}, "first: is colwise by 'first', but rowwise by 're:f.*t'"),
        ({"first": "colwise", "norm": "rowwise"}, "norm: is a LayerNorm"),
        ({"": "rowwise"}, "the model: is a ModuleDict"),
        ({"first": "colwise", "narrow": "colwise"}, "narrow: 2 outputs for 3 ranks"),
        ({"hooked": "colwise"}, "hooked: has hooks"),
        ({"tied": "colwise"}, "tied: shares a parameter with other.weight"),
        ({"own": "rowwise"}, "own: has a forward, parts or methods of its own"),
        ({"named": "rowwise"}, "named: has an attribute 'group', of which a replacement has another use"),
        ({"meta": "colwise"}, "meta: is on the meta device"),
        ({"fine": "colwise"}, "fine: the same layer is also again"),
        ({"fine": "colwise", "again": "rowwise"}, "the same layer is colwise as fine"),
    ]:
        refused(ValueError, text, call, plan)
        assert dict(mlp.named_modules(remove_duplicate=False)) == before
    refused(ValueError, "the model is this one layer", call, {"": "rowwise"}, group, mlp["first"])
    refused(ValueError, "mesh: expected a DeviceMesh", call, {"first": "rowwise"}, None)
    refused(ValueError, "model: expected a torch.nn.Module", call, {"first": "rowwise"}, group, 3)
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "tp"))
    refused(ValueError, "mesh: expected one dimension, got 2", call, {"first": "rowwise"}, mesh)
    # one rank refuses, or has something else
    plan = {"first": "colwise"} if rank != 1 else {"nothing": "colwise"}
    refused(ValueError, "matches no module" if rank == 1 else "rank 1 refused: ", call, plan)
    plan = {"first": "colwise"} if rank != 1 else ["first"]
    refused(ValueError, "plan: expected styles by name" if rank == 1 else "rank 1 refused: ", call, plan)
    plan = {"first": "colwise" if rank != 2 else "rowwise"}
    refused(ValueError, "rank 2 has another plan", call, plan)
    assert dict(mlp.named_modules(remove_duplicate=False)) == before
    del mlp["named"].group
    call({"named": "colwise"})
    assert mlp["named"].note == "kept"
    mine = sharded(layer("int8", 8, 9), "rowwise")
    refused(ValueError, "x: expected shape [..., 3], this rank's of the 9 inputs, got [2, 9]", mine, torch.randn(2, 9))


if __name__ == "__main__":
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, store=store, timeout=timedelta(seconds=20))
    for part_of_world in sys.argv[1].split(";"):
        size, names = part_of_world.split(":")
        world_size = int(size)
        group = dist.new_group(range(world_size))
        for name in names.split(",") if rank < world_size else ():
            torch.manual_seed(len(name))
            globals()[name]()
    dist.barrier()
    print("done", flush=True)
    dist.destroy_process_group()
