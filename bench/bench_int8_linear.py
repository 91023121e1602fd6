"""int8_linear against torch: float32 F.linear and the dynamic int8 linears of each engine that this build has."""

import warnings

import torch
from common import print_rows, rotated, time_interleaved
from torch import nn

from engine.ops import int8_quantize
from engine.ops.int8_linear import int8_linear

SHAPES = [  # M, N, K
    *((1024, n, k) for n, k in ((384, 384), (1536, 384), (384, 1536), (4096, 4096))),
    *((m, n, n) for n in (384, 4096, 8192) for m in (1, 2, 4, 8, 16, 32)),
]


def dynamic_int8(linear: nn.Linear, engine: str) -> nn.Module:
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, torch.qint8)[0]


def measure(m: int, n: int, k: int, repeats: int) -> dict[str, float]:
    """Weights rotate beyond the caches where they are read once a call; for large M they are one copy."""
    x, count = torch.randn(m, k), len(rotated(lambda: None, n * k)) if m <= 32 else 1
    linears = [nn.Linear(k, n) for _ in range(min(count, 3 if n * k > 1 << 22 else 16))]
    own = [(*int8_quantize(linear.weight.detach()), linear.bias.detach()) for linear in linears]
    own = [tuple(t.clone() for t in own[i % len(own)]) for i in range(count)]
    functions = {"int8_linear": lambda i: int8_linear(x, *own[i % count])}
    engines = [e for e in ("fbgemm", "x86", "onednn") if e in torch.backends.quantized.supported_engines]
    for name in engines:
        peers = [dynamic_int8(linear, name) for linear in linears]
        peers = peers if len(peers) == count else [dynamic_int8(linears[i % len(linears)], name) for i in range(count)]

        def run(i: int, name: str = name, peers: list = peers) -> torch.Tensor:
            torch.backends.quantized.engine = name
            return peers[i % count](x)

        functions[name] = run
    functions["fp32"] = lambda i: linears[i % len(linears)](x)
    with torch.inference_mode():
        return time_interleaved(functions, repeats)


def main() -> None:
    torch.manual_seed(0)
    rows = []
    for m, n, k in SHAPES:
        repeats = max(11, min(201, int(3e9 / (m * n * k + 1e6))))
        rows.append((f"M {m}, N {n}, K {k}", measure(m, n, k, repeats), n * k + 4 * m * (n + k)))
    print_rows("int8_linear", rows, own="int8_linear")


if __name__ == "__main__":
    main()
