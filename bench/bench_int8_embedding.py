"""int8_embedding against the fp32 and bf16 embeddings that it replaces."""

import torch
from torch.nn.functional import embedding

from engine.bench.common import Row, print_rows, rotated, time_interleaved
from engine.ops.int8_embedding import int8_embedding

SHAPES = [(30522, 384, 128), (30522, 384, 8 * 512), (128256, 2048, 1), (128256, 2048, 512)]  # rows, dim, indices


def measure(rows: int, dim: int, n: int) -> Row:
    weight, scale = torch.randint(-127, 128, (rows, dim), dtype=torch.int8), torch.rand(rows)
    dense = weight * scale.unsqueeze(-1)
    half = dense.bfloat16()
    buffers = rotated(lambda: torch.randint(rows, (n,)), n * dim * 5)  # rows are read afresh each time
    seconds = time_interleaved(
        {
            "engine": lambda i: int8_embedding(buffers[i % len(buffers)], weight, scale),
            "fp32 embedding": lambda i: embedding(buffers[i % len(buffers)], dense),
            "bf16 embedding to fp32": lambda i: embedding(buffers[i % len(buffers)], half).float(),
            "int8 rows * scale": lambda i: (
                embedding(buffers[i % len(buffers)], weight) * scale[buffers[i % len(buffers)]].unsqueeze(-1)
            ),
        },
        repeats=31,
    )
    return Row(f"{rows}x{dim}, {n} indices", seconds, n * dim * 5, traffic="copy")


def main() -> None:
    print_rows("int8_embedding", [measure(*shape) for shape in SHAPES], "engine")


if __name__ == "__main__":
    main()
