"""Which lane holds what: each instruction of ptx.cuh, wgmma.cuh, tma.cuh against layouts that others published.

Emulated, and on a GPU where there is one. The layouts are no reading of our own kernels. They are CuTe's
(NVIDIA/cutlass, `include/cute/atom/`), written as there: a shape and strides for the lane and for the lane's values,
the first index fastest, giving `row + rows * column`. Of the sparse products, int8 is `mma_traits_sm120_sparse.hpp`,
whose 8-bit floats lie as int8 does; 16-bit floats are as LLVM's integration test has them that runs on sm_80
(`mlir/test/Integration/Dialect/SparseTensor/GPU/CUDA/sparse-mma-2-4-f16.mlir`). The metadata of both is what PyTorch
makes for CUTLASS, which loads it by ldmatrix, lane l getting word l, and takes selector 0 for the first 16 rows
(`mma_tensor_op_tile_iterator_sparse.h`). PTX wants places that ascend of `mma.sp::ordered_metadata`, and so do our
checks of metadata. The warpgroup's products are `mma_traits_sm90_gmma.hpp` (`CLayout_64xN`, `ALayout_64x32`,
`ALayout_64x16`) and `mma_traits_sm90_gmma_sparse.hpp` (`ELayout_64x64`, `ELayout_64x32`), their tiles
`Layout_K_SW128_Atom` and `Layout_K_SW64_Atom`.
"""

import math
import shutil

import pytest
import torch
from build_tools import CXX, LINK, ROOT, STABLE_ABI, TORCH_INCLUDES, cached, headers_text, run
from device import EMULATED
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

SOURCE = ROOT / "tests/cuda/lanes.cu"
# A: (T32, V) -> (M16, K); B: -> (N8, K); D: -> (M16, N8).
D = (((4, 8), (32, 1)), ((2, 2), (16, 8)))
DENSE = {
    torch.int8: (32, (((4, 8), (64, 1)), ((4, 2, 2), (16, 8, 256))), (((4, 8), (32, 1)), ((4, 2), (8, 128)))),
    torch.float16: (16, (((4, 8), (32, 1)), ((2, 2, 2), (16, 8, 128))), (((4, 8), (16, 1)), ((2, 2), (8, 64)))),
}
DENSE[torch.bfloat16] = DENSE[torch.float16]
SPARSE = {  # A as it is stored: half the columns
    torch.int8: (64, DENSE[torch.int8][1], (((4, 8), (32, 1)), ((4, 4), (8, 128)))),
    torch.float16: (32, DENSE[torch.float16][1], (((4, 8), (16, 1)), ((2, 4), (8, 64)))),
}
SPARSE[torch.bfloat16] = SPARSE[torch.float16]
# The same of int8 over all 64 columns, as CuTe gives it: a lane's pairs of stored values, and its 32 bits of metadata.
CUTE_A = (((4, 8), (128, 1)), ((8, 2, 2), (16, 8, 512)))
CUTE_E = (((2, 2, 8), (8, 512, 1)), ((32,), (16,)))
# Of a warpgroup, over 64 rows: A's registers for 32 bytes a row, and the bits of metadata for 64.
WARPGROUP_A = {
    torch.int8: (((4, 8, 4), (256, 1, 16)), ((4, 2, 2), (64, 8, 1024))),
    torch.float16: (((4, 8, 4), (128, 1, 16)), ((2, 2, 2), (64, 8, 512))),
}
WARPGROUP_E = {
    torch.int8: (((2, 2, 8, 4), (8, 2048, 1, 16)), ((32,), (64,))),
    torch.float16: (((2, 2, 8, 4), (1024, 0, 1, 16)), ((16, 2), (64, 8))),
}
for of_halfs in (WARPGROUP_A, WARPGROUP_E):
    of_halfs[torch.bfloat16] = of_halfs[torch.float16]

pytestmark = pytest.mark.skipif(EMULATED, reason="the process that runs over emulated CUDA has another library")


def offsets(mode):
    shape, strides = mode
    found = [0]
    for size, stride in zip(shape, strides, strict=True):
        found = [at + i * stride for i in range(size) for at in found]
    return torch.tensor(found)


def places(layout):
    """[32, values of a lane], `row + rows * column`."""
    lane, value = layout
    assert math.prod(lane[0]) in (32, 128)
    return offsets(lane).unsqueeze(1) + offsets(value)


def registers(matrix, layout):
    """What each lane holds of `matrix`, as int32 [32, registers]."""
    return matrix.t().reshape(-1)[places(layout)].contiguous().view(torch.int32)


def build(on_gpu):
    name = "lanes_gpu.so" if on_gpu else "lanes_emulated.so"
    major, minor = torch.cuda.get_device_capability() if on_gpu else (0, 0)
    architecture = f"-arch=sm_{major}{minor}" + ("a" if major == 9 else "")
    command = ["nvcc", architecture, "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC", *STABLE_ABI, *TORCH_INCLUDES]
    if not on_gpu:
        command = [*CXX, "-Wno-unknown-pragmas", "-I", ROOT / "tests/cuda/emulated", "-x", "c++"]
    command += ["-I", ROOT / "csrc", SOURCE, "-shared"]
    text = [SOURCE.read_text(), headers_text("csrc/cuda", "csrc/common", "tests/cuda")]

    def make(path):
        link = LINK
        if on_gpu:
            link = [*(part.replace("-Wl,", "-Xlinker=") for part in LINK), "-Xlinker=--no-as-needed", "-ltorch_cuda"]
        run([*command, "-o", path, *link])

    return cached(name, [*command, *text], make)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def lanes(request):
    """The ops of lanes.cu, on tensors of the device named."""
    on_gpu = request.param == "cuda"
    if on_gpu and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if shutil.which("nvcc" if on_gpu else "g++") is None:
        pytest.skip("no compiler")
    library = torch.library.Library("engine_lanes", "FRAGMENT")
    if not hasattr(torch.ops.engine_lanes, "multiply"):
        library.define("multiply(Tensor a, Tensor? metadata, Tensor b, Tensor of) -> Tensor")
        library.define("warpgroup(Tensor a, Tensor? metadata, Tensor b, Tensor of) -> Tensor")
        library.define("matrices(Tensor memory, Tensor rows) -> Tensor")
        library.define("transposed(Tensor registers, Tensor rows) -> Tensor")
        library.define("bytes(Tensor a, Tensor b, Tensor c) -> Tensor")
    torch.ops.load_library(str(build(on_gpu)))

    def call(name, *arguments):
        moved = [a if a is None else a.to(request.param) for a in arguments]
        return getattr(torch.ops.engine_lanes, name)(*moved).cpu()

    yield call
    library._destroy()


def operand(rows, columns, dtype):
    """Whole numbers, all that int8 has; of floats so small that every sum is exact."""
    return torch.randint(-128, 128, (rows, columns)).to(dtype)


def assert_product(d, a, b):
    want = (a.double() @ b.double().t()).t().reshape(-1)[places(D)]
    assert torch.equal(d.double(), want)


@pytest.mark.parametrize("dtype", DENSE, ids=str)
def test_products(lanes, dtype):
    k, layout_a, layout_b = DENSE[dtype]
    a, b = operand(16, k, dtype), operand(8, k, dtype)
    d = lanes("multiply", registers(a, layout_a), None, registers(b, layout_b), torch.empty(0, dtype=dtype))
    assert_product(d, a, b)


@pytest.mark.parametrize("dtype", SPARSE, ids=str)
def test_sparse_products(lanes, dtype):
    k, layout_a, layout_b = SPARSE[dtype]
    kept = torch.rand(32, k // 4, 4).argsort(-1) < 2  # 32 rows, as PyTorch wants; the product takes 16
    w = torch.where(kept.reshape(32, k), operand(32, k, torch.float32).abs().clamp(1, 127), 0).to(dtype)
    values, metadata = sparse_semi_structured_from_dense_cutlass(w)
    words = metadata.reshape(-1).contiguous().view(torch.int32)[:32]
    b = operand(8, k, dtype)
    of = torch.empty(0, dtype=dtype)
    d = lanes("multiply", registers(values[:16], layout_a), words, registers(b, layout_b), of)
    assert_product(d, w[:16], b)
    if dtype == torch.int8:
        columns = places(CUTE_A) // 16
        assert torch.equal(columns[:, ::2] // 2 * 16 + places(CUTE_A)[:, ::2] % 16, places(layout_a))
        bits = torch.stack([words >> i & 1 for i in range(32)], -1)
        by_cute = torch.empty(16 * k, dtype=torch.int32)
        by_cute[places(CUTE_E)] = bits
        groups = by_cute.reshape(k, 16).t().reshape(16, k // 4, 4)
        first, second = groups[..., 0] + 2 * groups[..., 1], groups[..., 2] + 2 * groups[..., 3]
        want = torch.sort(kept[:16].int(), descending=True, stable=True).indices
        assert torch.equal(first.long(), want[..., 0]) and torch.equal(second.long(), want[..., 1])


def shared_image(matrix):
    """[rows, 64 or 128 bytes], as Swizzle<2, 4, 3> or Swizzle<3, 4, 3> lays its bytes into shared memory."""
    of_bytes = matrix.contiguous().view(torch.uint8)
    at = torch.arange(of_bytes.numel())
    bits = {64: 3, 128: 7}[of_bytes.shape[1]]
    image = torch.empty_like(of_bytes).reshape(-1)
    image[at ^ (at >> 7 & bits) << 4] = of_bytes.reshape(-1)
    return image.reshape(of_bytes.shape)


def assert_warpgroup_product(d, a, b):
    layout = (((4, 8, 4), (128, 1, 16)), ((2, 2, b.shape[0] // 8), (64, 8, 512)))
    want = (a.double() @ b.double().t()).t().reshape(-1)[places(layout)]
    assert torch.equal(d.double(), want)


@pytest.fixture
def lanes_of_sm90(lanes, request):
    if request.node.callspec.params["lanes"] == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("compiled for sm_90a alone")
    return lanes


@pytest.mark.parametrize("n", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", DENSE, ids=str)
def test_warpgroup_products(lanes_of_sm90, dtype, n):
    k = 4 * DENSE[dtype][0]
    a, b, of = operand(64, k, dtype), operand(n, k, dtype), torch.empty(0, dtype=dtype)
    assert_warpgroup_product(lanes_of_sm90("warpgroup", shared_image(a), None, shared_image(b), of), a, b)
    parts = torch.stack([registers(part.contiguous(), WARPGROUP_A[dtype]) for part in a.chunk(4, 1)], 1)
    assert_warpgroup_product(
        lanes_of_sm90("warpgroup", parts.reshape(128, 16).view(torch.uint8), None, shared_image(b), of), a, b
    )


@pytest.mark.parametrize("n", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", SPARSE, ids=str)
def test_sparse_warpgroup_products(lanes_of_sm90, dtype, n):
    k = SPARSE[dtype][0]
    kept = torch.rand(64, 2 * k // 4, 4).argsort(-1)[..., :2].sort(-1).values
    values, b = operand(64, k, dtype), operand(n, 2 * k, dtype)
    a = torch.zeros(64, 2 * k // 4, 4, dtype=dtype).scatter_(-1, kept, values.reshape(64, -1, 2)).reshape(64, 2 * k)
    bits = (kept[..., :1] | kept[..., 1:] << 2) >> torch.arange(4) & 1
    words = []
    for part in bits.reshape(64, 2, k).unbind(1):
        of_lane = part.t().reshape(-1)[places(WARPGROUP_E[dtype])]
        words.append((of_lane << torch.arange(32)).sum(-1))
    metadata = torch.stack(words, 1).to(torch.uint32).view(torch.int32)
    of = torch.empty(0, dtype=dtype)
    d = lanes_of_sm90("warpgroup", shared_image(values), metadata, shared_image(b), of)
    assert_warpgroup_product(d, a, b)


def test_matrices(lanes):
    """PTX: lanes 8 i to 8 i + 7 give the rows of matrix i; lane l gets elements 2 (l % 4) and + 1 of its row l / 4."""
    memory = torch.randint(-(2**31), 2**31 - 1, (32, 4), dtype=torch.int32)
    rows = torch.randperm(32, dtype=torch.int32)
    got = lanes("matrices", memory, rows)
    lane = torch.arange(32)
    want = torch.stack([memory[rows[8 * i + lane // 4].long(), lane % 4] for i in range(4)], 1)
    assert torch.equal(got, want)


def test_transposed_matrices(lanes_of_sm90):
    """PTX: stmatrix.trans takes what ldmatrix.trans gives: lane l has rows 2 (l % 4) and + 1 of column l / 4."""
    matrices = torch.randint(-(2**15), 2**15 - 1, (4, 8, 8), dtype=torch.int16)
    given = matrices.transpose(1, 2).contiguous().view(torch.int32).reshape(4, 32).t().contiguous()
    rows = torch.randperm(32, dtype=torch.int32)
    got = lanes_of_sm90("transposed", given, rows)[rows.long()].contiguous().view(torch.int16)
    assert torch.equal(got.reshape(4, 8, 8), matrices)


def test_bytes(lanes):
    """PTX: digit i of prmt's selector names byte i's source among b3..b0 a3..a0; shf.r.wrap shifts by c % 32."""
    a, b, c = torch.randint(-(2**31), 2**31 - 1, (3, 32), dtype=torch.int32)
    both = torch.stack([a, b], 1).view(torch.uint8)
    which = torch.stack([c >> 4 * i & 7 for i in range(4)], 1).long()
    assert torch.equal(lanes("bytes", a, b, c)[:, 0], both.gather(1, which).view(torch.int32)[:, 0])
    wide = [(int(high) % 2**32 << 32 | int(low) % 2**32) >> int(by) % 32 for low, high, by in zip(a, b, c, strict=True)]
    assert [int(v) % 2**32 for v in lanes("bytes", a, b, c)[:, 1]] == [v % 2**32 for v in wide]
