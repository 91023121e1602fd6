"""Damages small valid checkpoints at random: load_ must refuse each by CheckpointError, or load a model that runs.

    python tests/fuzz_checkpoint.py --count 100000 --seed 0 [--seconds S]

A failure is told with its seed and number, and `--only NUMBER` repeats it. Best run over a native library that was
built with AddressSanitizer (make sanitize).
"""

import argparse
import collections
import json
import os
import random
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from engine.checkpoint import CheckpointError, load_, save
from engine.formats import Bitmap, Block, Csr, DenseInt8, SemiStructured
from engine.nn import CompressedConv2d, CompressedEmbedding, CompressedLinear

EXTREMES = (0, 1, -1, 2, 7, 8, 9, 127, 255, 2**15, 2**31 - 1, 2**31, -(2**31), 2**32, 2**62, 2**63 - 1, -(2**63), -2)
KEYS = (
    "dtype",
    "shape",
    "data_offsets",
    "format",
    "quantize_input",
    "kernel_size",
    "__metadata__",
    "engine_weights",
    "engine_aliases",
)
JSON_VALUES = (
    None,
    True,
    0,
    -1,
    2**63,
    1.5,
    "",
    "x",
    [],
    {},
    [0, 0],
    [1, 2],
    [2, 2],
    {"a": 1},
    "Bitmap",
    "Csr",
    "SemiStructured",
    "Block",
    "DenseInt8",
    "bfloat16",
)
DTYPES = ("F32", "F16", "BF16", "F64", "I64", "I32", "I8", "U8", "BOOL", "F4", "F8_E8M0", "X9")
PLACES = ("shape", "row_offsets", "crow_indices", "col_indices", "bitmask", "scale", "compressed", "values")


class Lm(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(19, 5))


def compressed_linear(format_type: type, **how) -> nn.Module:
    dense = nn.Linear(19, 5)
    return nn.Sequential(CompressedLinear(format_type.from_dense(dense.weight, **how), dense.bias))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 5, (2, 1)))


def tied() -> nn.Module:
    model = Lm()
    model.embed = CompressedEmbedding(DenseInt8.from_dense(model.embed.weight))
    model.head = CompressedLinear(model.embed.format)
    return model


def compressed_conv(format_type: type, **how) -> nn.Module:
    return nn.Sequential(CompressedConv2d.from_dense(conv()[0], format_type, **how))


def seeds() -> list[tuple[bytes, Callable[[], nn.Module], torch.Tensor]]:
    """Valid files, each with what it loads into and an input for that."""
    torch.manual_seed(0)
    x, tokens, image = torch.randn(3, 19), torch.arange(6), torch.randn(2, 4, 3, 3)
    models = [
        (compressed_linear(DenseInt8), linear, x),
        (compressed_linear(DenseInt8, activation="static", input_scale=0.1), linear, x),
        (compressed_linear(DenseInt8, activation="none"), linear, x),
        (compressed_linear(Bitmap, threshold=0.1), linear, x),
        (compressed_linear(Bitmap, threshold=0.1, values=torch.int8), linear, x),
        (compressed_linear(Bitmap, threshold=0.1, values=torch.int8, input_scale=0.1), linear, x),
        (compressed_linear(Csr, threshold=0.1), linear, x),
        (compressed_linear(SemiStructured), linear, x),
        (compressed_linear(SemiStructured, values=torch.int8), linear, x),
        (compressed_linear(Block, threshold=0.1), linear, x),
        (compressed_linear(Block, threshold=0.1, values=torch.int8), linear, x),
        (compressed_conv(DenseInt8), conv, image),
        (compressed_conv(Bitmap, threshold=0.1), conv, image),
        (tied(), Lm, tokens),
        (Lm(), Lm, tokens),
        (linear(), linear, x),
    ]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for model, build, inputs in models:
            save(model, Path(folder) / "seed", {"a": 1})
            found.append(((Path(folder) / "seed").read_bytes(), build, inputs))
    return found


def split(raw: bytes) -> tuple[dict, bytearray]:
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])


def join(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def flip_bits(rng: random.Random, raw: bytes) -> bytes:
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def flip_data_bits(rng: random.Random, raw: bytes) -> bytes:
    header, data = split(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return join(header, data)


def overwrite(rng: random.Random, raw: bytes) -> bytes:
    at, length = rng.randrange(len(raw)), rng.randrange(1, 17)
    filling = rng.choice((b"\x00" * length, b"\xff" * length, rng.randbytes(length)))
    return (raw[:at] + filling + raw[at + length :])[: len(raw)]


def cut_or_extend(rng: random.Random, raw: bytes) -> bytes:
    if rng.random() < 0.5:
        return raw[: rng.randrange(len(raw))]
    at = rng.choice((len(raw), rng.randrange(len(raw))))
    return raw[:at] + rng.randbytes(rng.randrange(1, 64)) + raw[at:]


def header_length(rng: random.Random, raw: bytes) -> bytes:
    (length,) = struct.unpack("<Q", raw[:8])
    value = rng.choice((*EXTREMES, length + rng.randrange(-9, 10), len(raw), len(raw) - 8, 100_000_001))
    return struct.pack("<Q", value % 2**64) + raw[8:]


def header_text(rng: random.Random, raw: bytes) -> bytes:
    """Damage to the JSON as text: digits, quotes, parts left out or repeated."""
    header, data = split(raw)
    text = bytearray(json.dumps(header).encode())
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(len(text))
        if rng.random() < 0.6:
            digits = [i for i, c in enumerate(text) if chr(c).isdigit()]
            text[rng.choice(digits)] = ord(rng.choice("0123456789-e."))
        elif rng.random() < 0.5:
            del text[at : at + rng.randrange(1, 9)]
        else:
            text[at:at] = text[at : at + rng.randrange(1, 30)]
    return join(bytes(text), data)


def header_values(rng: random.Random, raw: bytes) -> bytes:
    """Damage to the header's structure: types renamed, offsets swapped or overlapping, names removed or renamed."""
    header, data = split(raw)
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    entry = header[name]
    kind = rng.randrange(8)
    if kind == 0:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == 1:
        entry["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], entry["data_offsets"]
    elif kind == 2:
        entry["data_offsets"] = header[other]["data_offsets"]
    elif kind == 3:
        entry["data_offsets"][rng.randrange(2)] = rng.choice(EXTREMES)
    elif kind == 4:
        entry["shape"] = rng.choice(([], [0], [0, 2**62], [*entry["shape"], 1], entry["shape"][::-1], [2**31, 2**33]))
    elif kind == 5:
        del header[rng.choice((name, "__metadata__"))]
    elif kind == 6:
        header[rng.choice((other + "x", "0.weight.scale", "0.input_scale"))] = header.pop(name)
    else:
        entry[rng.choice(tuple(entry))] = rng.choice(JSON_VALUES)
    return join(header, data)


def repeat_key(rng: random.Random, raw: bytes) -> bytes:
    header, data = split(raw)
    name, other = rng.choice(list(header)), rng.choice(list(header))
    text = json.dumps(header)
    return join((text[:-1] + ", " + json.dumps(name) + ": " + json.dumps(header[other]) + "}").encode(), data)


def metadata_values(rng: random.Random, raw: bytes) -> bytes:
    """Damage inside the metadata's own JSON."""
    header, data = split(raw)
    metadata = header["__metadata__"]
    key = rng.choice(list(metadata))
    kind = rng.randrange(5)
    if kind == 0:
        del metadata[key]
    elif kind == 1:
        metadata[key] = rng.choice(
            ("", "{", "null", "[]", "1", "NaN", "[" * 5000, '{"a":' * 5000, "9" * 5000, "\u0000")
        )
    elif kind == 2:
        metadata[key] = json.dumps(rng.choice(JSON_VALUES))
    elif kind == 3:
        weights = json.loads(metadata["engine_weights"]) or {"0.weight": {"format": "Csr", "dtype": "float32"}}
        weight = rng.choice(list(weights))
        if rng.random() < 0.3:
            weights[rng.choice(("0.bias", "weight", "x.weight", "", "head.weight"))] = weights.pop(weight)
        elif rng.random() < 0.2:
            weights[weight] = rng.choice(JSON_VALUES)
        else:
            weights[weight][rng.choice(("format", "dtype", "quantize_input", "kernel_size", "x"))] = rng.choice(
                JSON_VALUES
            )
        metadata["engine_weights"] = json.dumps(weights)
    else:
        name = rng.choice(["0.weight", "0.bias", "head.weight", "embed.weight", "", *header])
        metadata["engine_aliases"] = json.dumps({name: rng.choice([*JSON_VALUES, *header])})
    return join(header, data)


def rewrite_elements(rng: random.Random, raw: bytes) -> bytes:
    """Extreme numbers in a tensor that says where others are."""
    header, data = split(raw)
    names = [name for name in header if name != "__metadata__"]
    wanted = [name for name in names if name.endswith(PLACES)] or names
    for name in rng.sample(wanted, rng.randrange(1, len(wanted) + 1)):
        begin, end = header[name]["data_offsets"]
        size = {"I64": 8, "I32": 4, "F32": 4, "BF16": 2, "F16": 2}.get(header[name]["dtype"], 1)
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = begin + size * rng.randrange(max(1, (end - begin) // size))
            old = int.from_bytes(data[at : at + size], "little")
            value = rng.choice((*EXTREMES, old + 1, old - 1, rng.getrandbits(64)))
            data[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
    return join(header, data)


def unharmed(rng: random.Random, raw: bytes) -> bytes:
    return raw


MUTATIONS = (
    *(flip_bits, flip_data_bits, flip_data_bits, overwrite, cut_or_extend, header_length, header_text, header_values),
    *(
        header_values,
        repeat_key,
        metadata_values,
        metadata_values,
        rewrite_elements,
        rewrite_elements,
        rewrite_elements,
    ),
    unharmed,
)


def fuzz(count: int, seed: int, seconds: float = float("inf"), only: int | None = None) -> collections.Counter:
    """Tries `count` damaged files; raises AssertionError at the first that makes load_ or the model misbehave."""
    files = seeds()
    counts: collections.Counter = collections.Counter()
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
    path = Path(folder) / f"fuzz-{os.getpid()}.safetensors"  # stays there when the process crashes
    end = time.monotonic() + seconds
    for number in range(count) if only is None else (only,):
        rng = random.Random(f"{seed}:{number}")
        raw, build, inputs = rng.choice(files)
        mutation = rng.choice(MUTATIONS)
        path.write_bytes(mutation(rng, raw))
        what = f"--seed {seed} --only {number}: {mutation.__name__}"
        try:
            model = load_(build(), path)
            with torch.no_grad():
                model(inputs)
            counts["loaded"] += 1
        except CheckpointError:
            counts["refused"] += 1
            assert mutation is not unharmed, what
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise AssertionError(f"{what}: {traceback.format_exc()}") from error
        counts[mutation.__name__] += 1
        if time.monotonic() > end:
            break
    path.unlink()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a dozen elements a tensor
    begun = time.monotonic()
    counts = fuzz(options.count, options.seed, options.seconds, options.only)
    total = counts["loaded"] + counts["refused"]
    print(f"{total} files, {total / (time.monotonic() - begun):.0f} a second: {dict(counts)}")


if __name__ == "__main__":
    sys.exit(main())
