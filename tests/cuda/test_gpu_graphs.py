"""On a GPU: the linear ops never wait for it, run on the current stream, and replay from a captured graph."""

import pytest
import torch
from bitmaps import int8_bitmap, mask_of

from engine.ops import (
    bitmap_int8_linear,
    bitmap_linear,
    int8_linear,
    int8_weight_linear,
    prune_to_semi_structured,
    semi_structured_int8_linear,
    semi_structured_linear,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def bitmaps(m):
    bitmask, offsets, values, scale = (t.cuda() for t in int8_bitmap(mask_of(300, 520)))
    floats, x = values.bfloat16(), torch.randn(m, 520, device="cuda", dtype=torch.bfloat16)
    return x, lambda: (
        bitmap_int8_linear(x, bitmask, offsets, values, scale),
        bitmap_linear(x, bitmask, offsets, floats),
    )


def semi_structured(m):
    values, metadata = prune_to_semi_structured(torch.randn(300, 512, device="cuda", dtype=torch.bfloat16))
    x, scale = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16), torch.rand(300, device="cuda")
    integers = (values * 20).to(torch.int8)
    return x, lambda: (
        semi_structured_int8_linear(x, integers, metadata, scale),
        semi_structured_linear(x, values, metadata),
    )


def dense(m):
    weight = torch.randint(-127, 128, (5120, 528), device="cuda", dtype=torch.int8)
    x, scale = torch.randn(m, 528, device="cuda", dtype=torch.bfloat16), torch.rand(5120, device="cuda")
    return x, lambda: (int8_linear(x, weight, scale), int8_weight_linear(x, weight, scale))


@pytest.mark.parametrize("m", [1, 16, 40, 200])
@pytest.mark.parametrize("case", [bitmaps, semi_structured, dense])
def test_captured_graphs_replay(case, m):
    x, both = case(m)
    torch.cuda.set_sync_debug_mode("error")
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            both()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    x.copy_(torch.randn_like(x))
    graph.replay()
    for got, want in zip(captured, both(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_its_tensors_device():
    bitmap = [t.to("cuda:1") for t in int8_bitmap(mask_of(30, 70))]
    x = torch.randn(3, 70)
    want = bitmap_int8_linear(x, *(t.cpu() for t in bitmap))
    assert torch.cuda.current_device() == 0
    assert torch.equal(bitmap_int8_linear(x.to("cuda:1"), *bitmap).cpu(), want)
    assert torch.cuda.current_device() == 0
