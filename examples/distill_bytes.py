"""Trains a small GPT on the bytes of the standard library's sources, prunes it to 70 % and int8, and distils it.

    python examples/distill_bytes.py --seed 0

Bits per byte on files that nothing was trained on. The dense model is trained on for as many steps too, on the same
loss to the data, so that what more training alone brings can be told from what distillation does. Where the
machine gains by it, matrix products are in bfloat16 while training, of dense and student alike; every number is
measured in float32 or by the int8 kernels.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import seeds
import torch
from byte_model import ByteModel, batches, held_out_loss, loss_of, standard_library
from precision import training_dtype
from torch.nn import functional as F

import engine

CONTEXT = 256
RATE, RATE_ON = 2e-3, 1e-3  # the largest learning rate of a training, and of one that goes on from a trained model


class Windows:
    """Random windows of the sources, so many an epoch; drawn by torch's own generator, so that training can resume."""

    def __init__(self, data: torch.Tensor, batch: int) -> None:
        self.data, self.batch, self.window = data, batch, torch.arange(CONTEXT)

    def __iter__(self):
        """Yields int64 [batch, CONTEXT]."""
        for _ in range(1000):
            starts = torch.randint(self.data.numel() - CONTEXT, (self.batch, 1))
            yield self.data[starts + self.window].long()


def train(
    model: torch.nn.Module,
    data: torch.Tensor,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    dtype: torch.dtype | None,
) -> None:
    """AdamW, the rate warmed up and then falling to zero as a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step, (x, y) in zip(range(steps), batches(data, batch, CONTEXT, seed), strict=False):
        factor = min(1.0, (step + 1) / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            loss = loss_of(model, x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: {loss.item() / math.log(2):.3f} bits per byte", flush=True)


def teacher_and_data(output: torch.Tensor, target: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Half the divergence from the teacher at every place, half the cross-entropy to the byte that really follows."""
    got, want = (F.log_softmax(logits.float(), -1).flatten(0, 1) for logits in (output, target))
    taught = F.kl_div(got, want, reduction="batchmean", log_target=True)
    return 0.5 * taught + 0.5 * F.cross_entropy(output[:, :-1].float().flatten(0, 1), window[:, 1:].flatten())


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1200, help="of the dense model")
    parser.add_argument("--distill-steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bytes_out"))
    arguments = parser.parse_args()
    folder = arguments.out / f"seed-{arguments.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    data, held_out = standard_library()
    dtype = training_dtype()
    found: dict[str, dict[str, float]] = {}

    def measure(name: str, model: torch.nn.Module, **more: float) -> None:
        bits = held_out_loss(model, held_out, CONTEXT, windows=256) / math.log(2)
        found[name] = {
            "bits per byte": bits,
            "of the dense model's": bits / found.get("dense", {}).get("bits per byte", bits),
        }
        found[name] |= more
        print(name, found[name], flush=True)

    begun = time.process_time()
    dense = ByteModel()
    train(dense, data, arguments.steps, arguments.batch, RATE, arguments.seed, dtype)
    measure("dense", dense, steps=arguments.steps, **{"CPU seconds": time.process_time() - begun})
    dense.eval()
    windows = Windows(data, arguments.batch)
    calibration = engine.calibrate(dense, [x for x, _ in zip(windows, range(16), strict=False)], second_moment=True)
    recipes = {
        kind: engine.Recipe(engine.Prune(sparsity=arguments.sparsity, importance=kind), engine.Quantize(), guard="none")
        for kind in ("magnitude", "obs")
    }
    for kind, recipe in recipes.items():
        student = copy.deepcopy(dense)
        engine.compress_(student, recipe, calibration=calibration)
        measure(f"{kind}, not trained", student)
    student = copy.deepcopy(dense).train()
    begun = time.process_time()
    distillation = engine.distill(
        student,
        dense,
        windows,
        steps=arguments.distill_steps,
        recipe=recipes["obs"],
        calibration=calibration,
        loss=teacher_and_data,
        dtype=dtype,
        optimizer=lambda parameters: torch.optim.AdamW(
            parameters, RATE_ON, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
        checkpoint=folder / "distill.pt",
    )
    measure("distilled", student, steps=arguments.distill_steps, **{"CPU seconds": time.process_time() - begun})
    engine.save(student, folder / "bytes-distilled.safetensors")
    distillation.save(folder / "distillation.png")
    begun = time.process_time()
    train(dense.train(), data, arguments.distill_steps, arguments.batch, RATE_ON, arguments.seed + 1000, dtype)
    more = {"steps": arguments.distill_steps, "CPU seconds": time.process_time() - begun}
    measure("dense, trained on for as long", dense, **more)
    settings = {name: getattr(arguments, name) for name in ("steps", "distill_steps", "batch", "sparsity")}
    settings["parameters"] = sum(p.numel() for p in dense.parameters())
    settings["dtype"] = str(dtype or torch.float32)
    digits = {"bits per byte": 4, "of the dense model's": 4, "steps": 0, "CPU seconds": 0}
    path = arguments.out / "results.json"
    seeds.keep(path, f"bytes, {arguments.sparsity:.0%} + int8", digits, arguments.seed, settings, found)
    print("\n".join(seeds.table(path)), json.dumps(settings))


if __name__ == "__main__":
    main()
