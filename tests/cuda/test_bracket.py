"""The sample by which magnitude_threshold finds its result in one pass, emulated: columns may differ in their scale."""

import shutil

import pytest
import torch
from build_tools import CXX, LINK, ROOT, cached, headers_text, run
from device import EMULATED

SOURCE = ROOT / "tests/cuda/bracket.cu"
pytestmark = [
    pytest.mark.skipif(EMULATED, reason="the process that runs over emulated CUDA has another library"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]


@pytest.fixture(scope="module")
def bracket_of():
    command = [*CXX, "-Wno-unknown-pragmas", "-I", ROOT / "tests/cuda/emulated", "-I", ROOT / "csrc"]
    command += ["-x", "c++", SOURCE, "-shared"]
    depends_on = [*command, SOURCE.read_text(), headers_text("csrc/cuda", "csrc/common", "tests/cuda")]
    library = torch.library.Library("engine_bracket", "FRAGMENT")
    library.define("bracket_of(Tensor weight, int rank) -> (int, int)")
    torch.ops.load_library(str(cached("bracket.so", depends_on, lambda path: run([*command, "-o", path, *LINK]))))
    yield torch.ops.engine_bracket.bracket_of
    library._destroy()


@pytest.mark.parametrize("columns", [64, 512, 520, 1536, 4096])
def test_brackets_a_weight_with_scaled_columns(bracket_of, columns):
    weight = (torch.randn((1 << 22) // columns, columns) * torch.randn(columns).mul(0.5).exp()).half()
    magnitudes = weight.view(torch.int16).bitwise_and(0x7FFF).reshape(-1).sort().values
    for sparsity in (0.3, 0.5, 0.9):
        rank = round(sparsity * weight.numel())
        low, high = bracket_of(weight, rank)
        assert low <= magnitudes[rank - 1] < high and high - low <= 1024
