"""Trains a byte-level transformer under Ray Train, its gradients exchanged as int8 by the engine's hook.

    pip install "compression-engine[ray]"
    python examples/ray_train.py [--workers N] [--steps N] [--codec int8|bf16|none]

Ray starts the workers, on one machine or on many, and their process group; the hook is all that the engine adds. Among
workers of one host gradients go through shared memory, uncompressed.
"""

import argparse
import os
import tempfile
from pathlib import Path

import ray.train
import ray.train.torch
import torch
from byte_model import ByteModel, batches, held_out_loss, loss_of, standard_library
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

import engine
from engine.distributed import HookState, ring_hook

BATCH, CONTEXT = 8, 64
REPORT_EVERY = 50


def train(config: dict) -> None:
    """What each worker runs."""
    torch.manual_seed(0)  # the same weights everywhere, and in every run
    rank = ray.train.get_context().get_world_rank()
    model = ByteModel(width=96, layers=2, heads=4)
    ddp = ray.train.torch.prepare_model(model)  # DistributedDataParallel where there are several workers
    if config["codec"] is not None and isinstance(ddp, torch.nn.parallel.DistributedDataParallel):
        ddp.register_comm_hook(HookState(codec=config["codec"]), ring_hook)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=config["steps"])
    train_data, held_out = standard_library()
    data = batches(train_data, BATCH, CONTEXT, seed=rank)
    for step in range(1, config["steps"] + 1):
        loss = loss_of(ddp, *next(data))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % REPORT_EVERY == 0 or step == config["steps"]:
            metrics = {"step": step, "loss": loss.item(), "held_out": held_out_loss(model, held_out, CONTEXT)}
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = None
                if rank == 0:
                    engine.save(model, Path(folder) / "model.safetensors")
                    checkpoint = ray.train.Checkpoint.from_directory(folder)
                ray.train.report(metrics, checkpoint=checkpoint)


def main() -> None:
    """Trains once and prints the last report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--codec", default="int8", choices=("int8", "bf16", "none"))
    parser.add_argument("--out", default="ray_out", help="where Ray keeps its results")
    arguments = parser.parse_args()
    trainer = TorchTrainer(
        train,
        train_loop_config={
            "steps": arguments.steps,
            "codec": None if arguments.codec == "none" else arguments.codec,
        },
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=arguments.workers),
        run_config=RunConfig(name="byte_transformer", storage_path=os.path.abspath(arguments.out)),
    )
    result = trainer.fit()
    metrics = result.metrics
    print(f"{metrics['step']} steps: loss {metrics['loss']:.4f}, held out {metrics['held_out']:.4f} nats a byte")
    print(f"the model is in {result.checkpoint.path}")


if __name__ == "__main__":
    main()
