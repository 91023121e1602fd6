"""ring_encode, ring_prune_encode and ring_decode, in the pieces that a collective sends, against a plain copy."""

import torch

from engine.bench.common import Row, print_rows, rotated, time_interleaved
from engine.ops import ring_decode, ring_encode, ring_prune_encode
from engine.ops.ring_codec import wire_bytes

N = 1 << 22  # elements of a call; rotated, so that they come from memory
DENSITY = 0.01


def measure() -> list[Row]:
    buffers = rotated(lambda: (torch.randn(N), torch.randn(N), torch.empty(N)), 12 * N, 192 << 20)
    wires = {
        codec: torch.zeros(wire_bytes(codec, N, DENSITY), dtype=torch.uint8) for codec in ("bf16", "int8", "bitmap")
    }
    rows = []

    def add(case: str, moved: int, function) -> None:
        def ours(i: int) -> None:
            function(*buffers[i % len(buffers)])

        def copy(i: int) -> None:
            x, _, out = buffers[i % len(buffers)]
            out.copy_(x)

        timings = time_interleaved({"engine": ours, "copy of x": copy}, 9)
        rows.append(Row(case, timings, moved, traffic="copy"))

    for codec in ("bf16", "int8"):
        size = wires[codec].numel()
        add(f"{codec} encode", 4 * N + size, lambda x, r, o, c=codec: ring_encode(x, None, c, wires[c]))
        add(f"{codec} encode, residual", 12 * N + size, lambda x, r, o, c=codec: ring_encode(x, r, c, wires[c]))
        add(f"{codec} decode", 4 * N + size, lambda x, r, o, c=codec: ring_decode(wires[c], c, o))
        add(f"{codec} decode and add", 8 * N + size, lambda x, r, o, c=codec: ring_decode(wires[c], c, o, 1.0, True))
    size = wires["bitmap"].numel()
    for x, residual, _ in buffers:
        residual.copy_(x)

    def prune(x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> None:
        ring_prune_encode(x, residual, DENSITY, wires["bitmap"])

    add("bitmap prune, residual", 16 * N + size, prune)
    add("bitmap decode and add", size, lambda x, r, o: ring_decode(wires["bitmap"], "bitmap", o, 1.0, True))
    return rows


def main() -> None:
    print_rows("ring_codec", measure(), "engine", f"{N >> 20} Mi elements, density {DENSITY}")


if __name__ == "__main__":
    main()
