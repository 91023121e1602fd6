"""Trains a byte-level transformer on the standard library's sources by DDP, twice: plain, and with int8 gradients.

    torchrun --nproc_per_node 2 examples/ddp_byte_transformer.py [--steps N] [--out FOLDER]

Both start from the same weights and see the same data. Prints both losses and what each rank sent, and saves the
curves as a picture.
"""

import argparse
import logging
import os
import time
from pathlib import Path

# On one host gradients need no network. Here every process is to be a host of its own, so that what is sent counts.
os.environ.setdefault("ENGINE_SHARED_MEMORY", "0")

import torch
import torch.distributed as dist
from byte_model import ByteModel, batches, held_out_loss, loss_of, standard_library
from torch.nn.parallel import DistributedDataParallel

from engine.distributed import HookState, all_reduce, bytes_sent, ring_hook

BATCH, CONTEXT = 8, 64


def train(codec: str | None, steps: int) -> tuple[list[float], float, int, float]:
    """The losses over all ranks, the held-out loss, bytes that this rank sent for gradients, and seconds."""
    torch.manual_seed(0)
    model = ByteModel(width=96, layers=2, heads=4)
    ddp = DistributedDataParallel(model)
    if codec is not None:
        ddp.register_comm_hook(HookState(codec=codec), ring_hook)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    train_data, held_out = standard_library()
    data = batches(train_data, BATCH, CONTEXT, seed=dist.get_rank())
    losses = torch.zeros(steps)
    before, start = bytes_sent(), time.perf_counter()
    for step in range(steps):
        loss = loss_of(ddp, *next(data))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses[step] = loss.detach()
    seconds = time.perf_counter() - start
    if codec is not None:
        sent = bytes_sent() - before
    else:  # what gloo's ring sends by its algorithm; it doesn't count itself
        size, world = sum(p.numel() * p.element_size() for p in ddp.parameters()), dist.get_world_size()
        sent = steps * size * 2 * (world - 1) // world
    all_reduce(losses, "avg")
    return losses.tolist(), held_out_loss(model, held_out, CONTEXT), sent, seconds


def save_curves(curves: dict[str, list[float]], path: Path) -> None:
    """Draws both curves, and how far the second is from the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (whole, difference) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    smooth = {name: torch.tensor(losses).unfold(0, 10, 1).mean(1) for name, losses in curves.items()}
    for (name, losses), style in zip(smooth.items(), ("-", "--"), strict=True):
        whole.plot(losses, style, label=name)
    whole.set(xlabel="step", ylabel="loss, nats a byte (mean of 10)", title="Training loss")
    whole.legend()
    plain, ours = smooth.values()
    difference.plot((ours / plain - 1) * 100)
    difference.axhline(0, color="gray", linewidth=0.8)
    difference.set(xlabel="step", ylabel="%", title="int8 gradients against plain DDP")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Trains twice; the first rank prints and draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("ddp_out"))
    arguments = parser.parse_args()
    logging.getLogger("engine.distributed").setLevel(logging.ERROR)  # that shared memory is off is what we want
    dist.init_process_group("gloo")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
    results = {name: train(codec, arguments.steps) for name, codec in (("plain DDP", None), ("int8", "int8"))}
    if dist.get_rank() == 0:
        for name, (losses, held_out, sent, seconds) in results.items():
            last = sum(losses[-20:]) / len(losses[-20:])
            print(f"{name:<10} last 20 steps {last:.4f}  held out {held_out:.4f}  ", end="")
            print(f"{sent / 1e6:7.1f} MB sent  {seconds:.0f} s")
        plain, ours = results.values()
        print(f"int8 sends {plain[2] / ours[2]:.2f} times less; its held-out loss is {ours[1] / plain[1] - 1:+.2%} off")
        arguments.out.mkdir(parents=True, exist_ok=True)
        save_curves(
            {name: losses for name, (losses, *_) in results.items()}, arguments.out / "ddp_byte_transformer.png"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
