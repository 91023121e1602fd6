"""engine.distributed.all_reduce between hosts, against gloo in the same processes, over links of 1 Gbit/s.

    sudo python bench/netbench.py [CASE ...] [--rate 1gbit]

Every host is a network and process namespace of its own on this machine, on a bridge, its link shaped by tc's token
bucket in both directions. Delay isn't shaped. All namespaces are without a name and end with their processes, which end
with this one, even when it is killed: nothing is left behind. Without root or the tools it says so and does nothing.

Times are the slowest rank's medians.
"""

import argparse
import ctypes
import dataclasses
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
TOOLS = ("ip", "tc", "unshare", "nsenter")
NETWORK = "10.77.0"
UNSHARE = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
LABELS = {"gloo": "gloo float32", None: "engine float32", "bf16": "engine bf16", "int8": "engine int8"}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured: MiB of float32 over hosts * ranks processes, by gloo and by these codecs."""

    hosts: int
    ranks: int  # a host
    mebibytes: int
    codecs: tuple[str | None, ...]
    rounds: int


CASES = {
    "1": Case(2, 1, 1, (None, "int8"), 20),
    "64": Case(2, 1, 64, (None, "bf16", "int8"), 5),
    "256": Case(2, 1, 256, (None, "int8"), 3),
    "bitmap": Case(2, 1, 64, ("bitmap",), 7),
    "4hosts": Case(4, 1, 64, (None, "int8"), 5),
    "2x2": Case(2, 2, 64, (None, "int8"), 5),
    "ddp": Case(2, 1, 64, ("hook",), 5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cases", nargs="*", help=f"some of {', '.join(CASES)}; all where none is named")
    parser.add_argument("--rate", default="1gbit", help="of every link, in tc's words")
    parser.add_argument("--role", choices=["hub", "host", "rank"], help=argparse.SUPPRESS)
    parser.add_argument("--index", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if arguments.role == "hub":
        for name in arguments.cases or CASES:
            run_case(name, arguments.rate)
    elif arguments.role == "host":
        run_host(CASES[arguments.cases[0]], arguments.index, arguments.cases[0])
    elif arguments.role == "rank":
        run_rank(CASES[arguments.cases[0]], arguments.index)
    else:
        reason = why_not()
        if reason:
            print(f"netbench skipped: {reason}")
            return
        hub = [*UNSHARE, *myself("hub", *arguments.cases), "--rate", arguments.rate]
        sys.exit(subprocess.run(hub, preexec_fn=die_with_parent).returncode)


def why_not() -> str:
    """Why this can't run here; empty where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)}"
    probe = "ip link add bridge0 type bridge && ip link add veth0 type veth peer name veth1 && "
    probe += "tc qdisc add dev veth0 root tbf rate 1gbit burst 256k latency 50ms"
    tried = subprocess.run(["unshare", "--net", "--pid", "--fork", "sh", "-c", probe], capture_output=True, text=True)
    return tried.stderr.strip() if tried.returncode else ""


def myself(role: str, *words: str) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--role", role, *words]


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run_case(name: str, rate: str) -> None:
    """In the hub, a namespace that holds nothing but the bridge: starts the hosts and wires them up."""
    case = CASES[name]
    shell("ip link del hub", check=False)
    shell("ip link add hub type bridge && ip link set hub up")
    hosts = []
    try:
        for index in range(case.hosts):
            command = [*UNSHARE, *myself("host", name, "--index", str(index))]
            hosts.append(subprocess.Popen(command, stdin=subprocess.PIPE, text=True, preexec_fn=die_with_parent))
            wire(index, hosts[-1].pid, rate)
        for host in hosts:
            assert host.stdin is not None
            host.stdin.close()  # go
        codes = [host.wait(timeout=600) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
            host.wait()
    if any(codes):
        raise RuntimeError(f"netbench: {name}: the hosts ended with {codes}")


def wire(index: int, pid: int, rate: str) -> None:
    """A shaped cable between the bridge and the host whose namespace the process is in."""
    deadline = time.monotonic() + 10
    own = os.readlink("/proc/self/ns/net")
    while os.readlink(f"/proc/{pid}/ns/net") == own:  # `unshare` has not got so far yet
        if time.monotonic() > deadline:
            raise RuntimeError("netbench: a host's namespace does not appear")
        time.sleep(0.01)
    inside = f"nsenter -t {pid} -n"
    shape = f"root tbf rate {rate} burst 256k latency 50ms"
    shell(f"ip link del port{index}", check=False)  # the last case's: the kernel ends a dead host's in its own time
    shell(
        f"ip link add port{index} type veth peer name eth0 netns {pid}",
        f"ip link set port{index} master hub up && tc qdisc add dev port{index} {shape}",
        f"{inside} ip addr add {NETWORK}.{index + 1}/24 dev eth0",
        f"{inside} ip link set lo up && {inside} ip link set eth0 up && {inside} tc qdisc add dev eth0 {shape}",
    )


def shell(*lines: str, check: bool = True) -> None:
    for line in lines:
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
        if check and done.returncode:
            raise RuntimeError(f"netbench: {line}: {done.stderr.strip()}")


def run_host(case: Case, index: int, name: str) -> None:
    """One host: waits until it is wired, then runs its ranks."""
    sys.stdin.read()
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(myself("rank", name, "--index", str(index * case.ranks + local)), env=environment)
        for local in range(case.ranks)
    ]
    sys.exit(max(abs(rank.wait()) for rank in ranks))


def run_rank(case: Case, rank: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://{NETWORK}.1:29500", rank=rank, world_size=case.hosts * case.ranks
    )
    if case.codecs == ("hook",):
        measure_ddp(case, rank)
    else:
        measure(case, rank)
    dist.destroy_process_group()


def measure(case: Case, rank: int) -> None:
    import torch
    import torch.distributed as dist

    from engine.distributed import all_reduce

    count, world = case.mebibytes << 18, dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    source = torch.randn(count, generator=generator)
    truth = source.clone()
    dist.all_reduce(truth)
    t, residual, times = torch.empty(count), torch.zeros(count), {}
    errors = {}
    for i in range(case.rounds + 1):  # the first is a warm-up
        for codec in ("gloo", *case.codecs):
            t.copy_(source)
            dist.barrier()
            start = time.perf_counter()
            if codec == "gloo":
                dist.all_reduce(t)
            else:
                all_reduce(t, codec=codec, residual=residual if codec == "bitmap" else None, density=0.01)
            if i:
                times.setdefault(codec, []).append(time.perf_counter() - start)
            if i == 1:
                errors[codec] = ((t - truth).norm() / truth.norm()).item()
    medians = torch.tensor([statistics.median(times[codec]) for codec in times])
    dist.all_reduce(medians, dist.ReduceOp.MAX)
    if rank == 0:
        print(f"\nnetbench: {case.hosts} hosts x {case.ranks} ranks, {case.mebibytes} MiB of float32")
        print(f"  {'':<24} {'ms':>8} {'algbw':>7} {'busbw':>7} {'x gloo':>7}  relative L2 error")
        for codec, seconds in zip(times, medians.tolist(), strict=True):
            size = 4 * count
            algbw = size / seconds / 1e6
            label = LABELS.get(codec, "engine bitmap, 1 % + feedback")
            cells = f"{seconds * 1e3:>8.1f} {algbw:>7.0f} {algbw * 2 * (world - 1) / world:>7.0f}"
            print(f"  {label:<24} {cells} {medians[0].item() / seconds:>7.2f}  {errors[codec]:.2%}", flush=True)


def measure_ddp(case: Case, rank: int) -> None:
    """Milliseconds of a backward pass with so many MiB of gradients: no hook, torch's fp16 hook, ours."""
    import torch
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
    from torch.nn.parallel import DistributedDataParallel

    from engine.distributed import HookState, ring_hook

    def model(hook, state):
        layers = [torch.nn.Linear(1024, 1024, bias=False) for _ in range(case.mebibytes // 4)]
        ddp = DistributedDataParallel(torch.nn.Sequential(*layers))
        if hook is not None:
            ddp.register_comm_hook(state, hook)
        return ddp

    hooks = {"no hook": (None, None), "fp16_compress_hook": (fp16_compress_hook, None)}
    hooks["ring_hook, int8"] = (ring_hook, HookState(codec="int8"))
    models = {name: model(*hook) for name, hook in hooks.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    x = torch.randn(1, 1024)
    for i in range(case.rounds + 2):  # DDP rebuilds its buckets after the first pass
        for name, ddp in models.items():
            loss = ddp(x).sum()
            dist.barrier()
            start = time.perf_counter()
            loss.backward()
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    medians = torch.tensor([statistics.median(seconds) for seconds in times.values()])
    dist.all_reduce(medians, dist.ReduceOp.MAX)
    if rank == 0:
        print(f"\nnetbench: DDP backward, {case.hosts} hosts, {case.mebibytes} MiB of gradients")
        for name, seconds in zip(times, medians.tolist(), strict=True):
            print(f"  {name:<20} {seconds * 1e3:>8.1f} ms {medians[0].item() / seconds:>6.2f} x no hook", flush=True)


if __name__ == "__main__":
    main()
