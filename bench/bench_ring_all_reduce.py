"""engine.distributed.all_reduce against gloo, in the same two processes, in the columns of nccl-tests.

Times are the slowest rank's medians. busbw is what every rank has to send at least, over the time.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

WORLD_SIZE = 2
SIZES = [4 << 10, 64 << 10, 1 << 20, 16 << 20]
CALLS = 4  # timed together


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen([sys.executable, __file__, str(rank), str(Path(folder) / "store")])
            for rank in range(WORLD_SIZE)
        ]
        try:
            codes = [process.wait(timeout=120) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
    if any(codes):
        raise RuntimeError(f"ring_all_reduce: the ranks ended with {codes}")


def measure(rank: int) -> None:
    from engine.distributed import all_reduce

    functions = {"engine": all_reduce, "gloo": dist.all_reduce}
    if rank == 0:
        print(f"\nring_all_reduce  ({WORLD_SIZE} ranks on one host)")
        print(f"  {'size':>10} {'count':>9} type  redop {'time':>9} {'algbw':>7} {'busbw':>7} #wrong  × gloo")
        print(f"  {'B':>10} {'elements':>9} {'':11} {'µs':>9} {'GB/s':>7} {'GB/s':>7}")
    for size in SIZES:
        count = size // 4
        t, times = torch.empty(count), {name: [] for name in functions}
        for i in range(max(7, min(60, (64 << 20) // size))):
            for name, function in functions.items():
                t.fill_(rank + 1)
                function(t)  # not timed: the ranks come here at different moments
                start = time.perf_counter()
                for _ in range(CALLS):
                    function(t)
                if i:  # the first is a warm-up
                    times[name].append((time.perf_counter() - start) / CALLS)
                if name == "engine":
                    expected = WORLD_SIZE * (WORLD_SIZE + 1) / 2 * WORLD_SIZE**CALLS
                    wrong = int((t != expected).sum())
        medians = torch.tensor([statistics.median(times[name]) for name in functions])
        dist.all_reduce(medians, dist.ReduceOp.MAX)
        ours, gloo = medians.tolist()
        if rank == 0:
            algbw = size / ours / 1e9
            busbw = algbw * 2 * (WORLD_SIZE - 1) / WORLD_SIZE
            cells = f"{size:>10} {count:>9} float sum   {ours * 1e6:>9.1f} {algbw:>7.2f} {busbw:>7.2f} {wrong:>6}"
            print(f"  {cells}  {gloo / ours:.1f}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        torch.set_num_threads(1)
        own = int(sys.argv[1])
        store = dist.FileStore(sys.argv[2], WORLD_SIZE)
        dist.init_process_group("gloo", rank=own, world_size=WORLD_SIZE, store=store)
        measure(own)
        dist.destroy_process_group()
