"""engine.distributed.all_reduce against gloo, in the same processes, in the columns of nccl-tests.

Times are the slowest rank's medians. busbw is what every rank has to send at least, over the time, whatever a codec
makes of it. #wrong counts elements further from the sum than the dtype, or the codec, explains.

    python bench/bench_ring_all_reduce.py [RANKS [CODEC]]     2 ranks, no codec
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

SIZES = [4 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20]
CALLS = 4  # timed together
# Of elements that are all alike: int8 and bf16 round them twice by half a unit.
TOLERANCE = {"none": 1e-6, "bf16": 2**-7, "int8": 2**-7, "bitmap": 2**-7}


def main(world_size: int = 2, codec: str = "none") -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(world_size), codec, str(Path(folder) / "store")]
        ranks = [subprocess.Popen([sys.executable, __file__, *arguments, str(rank)]) for rank in range(world_size)]
        try:
            codes = [process.wait(timeout=120) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
    if any(codes):
        raise RuntimeError(f"ring_all_reduce: the ranks ended with {codes}")


def measure(rank: int, world_size: int, codec: str) -> None:
    from engine.distributed import all_reduce

    how = {"codec": None if codec == "none" else codec, "density": 1.0}
    functions = {"engine": lambda t: all_reduce(t, **how), "gloo": dist.all_reduce}
    if rank == 0:
        print(f"\nring_all_reduce  ({world_size} ranks on one host, codec {codec})")
        print(f"  {'size':>10} {'count':>9} type  redop {'time':>9} {'algbw':>7} {'busbw':>7} #wrong  × gloo")
        print(f"  {'B':>10} {'elements':>9} {'':11} {'µs':>9} {'GB/s':>7} {'GB/s':>7}")
    for size in SIZES:
        count = size // 4
        t, times, wrong = torch.empty(count), {name: [] for name in functions}, 0
        for i in range(max(7, min(60, (64 << 20) // size) * 2 // world_size)):
            for name, function in functions.items():
                t.fill_(rank + 1)
                function(t)
                expected = world_size * (world_size + 1) / 2
                if i == 0 and name == "engine":
                    wrong = int(((t - expected).abs() > TOLERANCE[codec] * expected).sum())
                function(t)  # not timed: the ranks come here at different moments
                start = time.perf_counter()
                for _ in range(CALLS):
                    function(t)
                if i:  # the first is a warm-up
                    times[name].append((time.perf_counter() - start) / CALLS)
        medians = torch.tensor([statistics.median(times[name]) for name in functions])
        dist.all_reduce(medians, dist.ReduceOp.MAX)
        ours, gloo = medians.tolist()
        if rank == 0:
            algbw = size / ours / 1e9
            busbw = algbw * 2 * (world_size - 1) / world_size
            cells = f"{size:>10} {count:>9} float sum   {ours * 1e6:>9.1f} {algbw:>7.2f} {busbw:>7.2f} {wrong:>6}"
            print(f"  {cells}  {gloo / ours:.1f}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 5:
        main(*(int(word) if word.isdigit() else word for word in sys.argv[1:]))
    else:
        torch.set_num_threads(1)
        ranks, own = int(sys.argv[1]), int(sys.argv[4])
        store = dist.FileStore(sys.argv[3], ranks)
        dist.init_process_group("gloo", rank=own, world_size=ranks, store=store)
        measure(own, ranks, sys.argv[2])
        dist.destroy_process_group()
