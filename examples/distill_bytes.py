"""Trains a small GPT on the bytes of the standard library's sources, prunes it to 70 % and int8, and distils it.

    python examples/distill_bytes.py --out bytes_out

Bits per byte on files that nothing was trained on. The dense model is trained on for as many steps too, so that what
more training alone brings can be told from what distillation does.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
from byte_model import ByteModel, batches, held_out_loss, loss_of, standard_library

import engine

CONTEXT = 256


class Windows:
    """Random windows of the sources, so many an epoch; drawn by torch's own generator, so that training can resume."""

    def __init__(self, data: torch.Tensor, batch: int) -> None:
        self.data, self.batch, self.window = data, batch, torch.arange(CONTEXT)

    def __iter__(self):
        """Yields int64 [batch, CONTEXT]."""
        for _ in range(1000):
            starts = torch.randint(self.data.numel() - CONTEXT, (self.batch, 1))
            yield self.data[starts + self.window].long()


def train(model: torch.nn.Module, data: torch.Tensor, steps: int, batch: int, rate: float, seed: int) -> None:
    """AdamW, the rate warmed up and then falling to zero as a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1)
    for step, (x, y) in zip(range(steps), batches(data, batch, CONTEXT, seed), strict=False):
        factor = min(1.0, (step + 1) / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: {loss.item() / math.log(2):.3f} bits per byte", flush=True)


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=900, help="of the dense model")
    parser.add_argument("--distill-steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bytes_out"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    data, held_out = standard_library()
    results: dict[str, float] = {}

    def measure(name: str, model: torch.nn.Module) -> None:
        results[name] = held_out_loss(model, held_out, CONTEXT, windows=128) / math.log(2)
        print(f"{name}: {results[name]:.4f} bits per byte", flush=True)

    begun = time.perf_counter()
    dense = ByteModel(context=CONTEXT)
    train(dense, data, arguments.steps, arguments.batch, 2e-3, arguments.seed)
    measure("dense", dense)
    dense.eval()
    windows = Windows(data, arguments.batch)
    calibration = engine.calibrate(dense, [x for x, _ in zip(windows, range(8), strict=False)], second_moment=True)
    recipes = {
        kind: engine.Recipe(engine.Prune(sparsity=arguments.sparsity, importance=kind), engine.Quantize(), guard="none")
        for kind in ("magnitude", "obs")
    }
    for kind, recipe in recipes.items():
        student = copy.deepcopy(dense)
        engine.compress_(student, recipe, calibration=calibration)
        measure(f"{kind}, not trained", student)
    student = copy.deepcopy(dense).train()
    distillation = engine.distill(
        student,
        dense,
        windows,
        steps=arguments.distill_steps,
        recipe=recipes["obs"],
        calibration=calibration,
        loss="kl",
        learning_rate=1e-3,
        checkpoint=arguments.out / "distill.pt",
        checkpoint_every=25,
    )
    measure("distilled", student)
    engine.save(student, arguments.out / "bytes-distilled.safetensors")
    distillation.save(arguments.out / "distillation.png")
    distillation.save(arguments.out / "distillation.json")
    train(dense.train(), data, arguments.distill_steps, arguments.batch, 1e-3, arguments.seed + 1)
    measure("dense, trained on for as long", dense)
    results |= {"parameters": sum(p.numel() for p in dense.parameters()), "seconds": time.perf_counter() - begun}
    results |= {"distilled / dense": results["distilled"] / results["dense"], "seed": arguments.seed}
    (arguments.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
