"""`make bench-gpu`: every op that has a kernel for CUDA, first checked, then timed beside its peers.

Results go to `bench/results/<device>.json` and, as a table, `.md` beside it, and are written anew after every line: a
machine that is taken away has given what it had. All work on the card is done by other processes (`gpu_worker.py`):
many at once check and thereby compile, then one alone measures. If it dies, hangs or finds an error, the op at which
it was is reported and another process goes on with the next. `--only OP` takes some ops alone.

Calls are captured into CUDA graphs where they can be, so that what is measured is the device and not Python; the
buffers rotate beyond the L2 cache; peers take turns in one loop; the median counts.
"""

import argparse
import concurrent.futures
import datetime
import importlib.metadata
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import engine
from engine import backends
from engine.bench import gpu_cases, gpu_checks, gpu_worker
from engine.ops._library import REFERENCES

RESULTS = Path(__file__).parent / "results"
SECONDS = 450.0  # for everything; what is not begun by then is left out
CHECK_SECONDS = 150.0  # of these for the checks, most of which is compiling
STALL_SECONDS = 100.0  # without a line: the process hangs


def line(result: dict) -> str:
    """One row as text."""
    by_bytes = result["gops"] < 1000 or result["gbps"] > result["gops"]
    speed = f"{result['gbps']:7.0f} GB/s " if by_bytes else f"{result['gops'] / 1000:7.1f} TOP/s"
    peers = []
    for name, ratio in result["times_as_fast_as"].items():
        goal = result["goals"].get(name)
        verdict = "" if goal is None else f" ({'meets' if goal['met'] else 'misses'} {goal['goal']:.2f})"
        peers.append(f"{ratio:.2f}× {name}{', eager' if name in result['eager'] else ''}{verdict}")
    fraction = f"{result['fraction_of_limit']:4.0%} of limit"
    return f"{result['case']:<36} {result['median_us']:10.1f} µs  {speed} {fraction}  {', '.join(peers)}"


def owned_ops() -> list[str]:
    """The ops that have a kernel for CUDA."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return sorted(name for name in REFERENCES if has(f"engine::{name}", "CUDA"))


def worker(*arguments: str) -> list[str]:
    """The command that starts this program as a worker: installed as a module, or from a checkout."""
    installed = Path(engine.__file__).parent / "bench" == Path(__file__).parent
    launcher = ["-m", "engine.bench.gpu"] if installed else [str(Path(__file__).with_name("from_checkout.py"))]
    return [sys.executable, *launcher, "--worker", *arguments]


def message(text: str) -> dict | None:
    """What a worker's line says."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def check_one(op: str, until: float) -> dict:
    """Has an op checked by a process of its own: {"checked", "of"} or {"error"}."""
    left = until - time.monotonic()
    if left < 5:
        return {"error": "not checked: no time left"}
    try:
        done = subprocess.run(worker("check", f"{left:.0f}", op), capture_output=True, text=True, timeout=left + 30)
        text, code, errors = done.stdout, done.returncode, done.stderr
    except subprocess.TimeoutExpired as stopped:
        parts = (stopped.stdout or b"", stopped.stderr or b"")
        text, errors, code = parts[0].decode(), parts[1].decode(), None
    found = next((m for m in map(message, text.splitlines()) if m), None)
    if found is None:
        found = {"error": "the check took too long" if code is None else f"the process ended with {code}"}
    if "error" in found:
        sys.stderr.write(errors[-4000:])
    return found


def check_all(ops: list[str], report: dict, until: float) -> list[str]:
    """Checks the ops, many at once; returns those that are right."""
    right = []
    with concurrent.futures.ThreadPoolExecutor(max(1, min(12, (os.cpu_count() or 2) * 3 // 4))) as pool:
        began = {pool.submit(check_one, op, until): op for op in ops}
        for future in concurrent.futures.as_completed(began):
            op, found = began[future], future.result()
            if "error" in found:
                report["errors"][op] = found["error"]
                print(f"{op}: {found['error']}", flush=True)
                continue
            right.append(op)
            report["checked"][op] = found
            print(f"{op}: {found['checked']} of {found['of']} inputs checked against the reference", flush=True)
    return [op for op in ops if op in right]


def messages(process: subprocess.Popen, until: float) -> Iterator[dict]:
    """A process's lines, as they come; ends it where none comes for long, or no time is left."""
    lines: queue.Queue = queue.Queue()

    def read() -> None:
        for text in process.stdout or ():
            lines.put(text)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            text = lines.get(timeout=max(0.1, min(STALL_SECONDS, until - time.monotonic())))
            if text is None:
                process.wait(timeout=30)
                return
            if (found := message(text)) is not None:
                yield found
    except (queue.Empty, subprocess.TimeoutExpired):
        yield {"error": "stopped: no time left" if time.monotonic() >= until else "stopped: it hangs"}
    finally:
        process.kill()
        process.wait()


def time_all(ops: list[str], report: dict, until: float, keep: Callable[[], None]) -> None:
    """Times the ops in their order; `keep()` is called after every line."""
    left = list(ops)
    while left and time.monotonic() < until:
        first = left[0]
        command = worker("time", *left)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for found in messages(process, until):
                if "limits" in found:
                    report.setdefault("limits", found["limits"])
                elif "begins" in found:
                    print(f"\n{found['begins']}", flush=True)
                    left = left[left.index(found["begins"]) :]
                elif "row" in found:
                    report["rows"].append(found["row"])
                    print(f"  {line(found['row'])}", flush=True)
                elif "ends" in found:
                    left.remove(found["ends"])
                elif "error" in found:
                    report["errors"][left.pop(0)] = found["error"]
                    break
                keep()
            else:
                if left:  # it has died without a word
                    report["errors"][left.pop(0)] = f"the process ended with {process.returncode}"
        keep()
        if left and left[0] == first:
            break
    report["errors"].update(dict.fromkeys(left, "not timed: no time left"))


def describe(device: torch.device) -> dict[str, object]:
    """What the numbers hold for."""
    versions: dict[str, object] = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
    versions["python"] = sys.version.split()[0]
    for package in ("triton", "torchao", "bitsandbytes"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    if device.type == "cuda":
        versions["device"] = torch.cuda.get_device_name(device)
        versions["cuda"] = torch.version.cuda
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
        try:
            versions["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            versions["driver"] = None
    versions["backends"] = {s.name: s.detail for s in backends.status()}
    return versions


def save(report: dict, path: Path) -> None:
    """Writes `path` (.json) and the same as a table (.md)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lines = [
        f"# {report['device']}, {report['date']}",
        "",
        "| op | case | µs | of limit | times as fast as |",
        "|" + "---|" * 5,
    ]
    for r in report["rows"]:
        peers = ", ".join(f"{ratio:.2f} {name}" for name, ratio in r["times_as_fast_as"].items())
        lines.append(f"| {r['op']} | {r['case']} | {r['median_us']:.1f} | {r['fraction_of_limit']:.0%} | {peers} |")
    lines += [f"\n{op}: {error}" for op, error in report["errors"].items()]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status: 1 if anything was wrong or missing."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--worker"]:
        return gpu_worker.main(arguments[1:])
    parser = argparse.ArgumentParser(prog="bench-gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="OP", help="these ops alone; written only where --out says")
    parser.add_argument("--out", type=Path, metavar="JSON", help="a file or folder in place of bench/results")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench-gpu: no GPU is visible to torch", file=sys.stderr)
        return 1
    began, owned = time.monotonic(), owned_ops()
    expected = [*gpu_cases.CASES, *sorted(gpu_checks.CHECKS.keys() - gpu_cases.CASES.keys())]
    expected += [op for op in owned if op not in expected]
    unknown = set(given.only or ()) - set(expected)
    if unknown:
        print(f"bench-gpu: no such op: {', '.join(sorted(unknown))}; there are {', '.join(expected)}", file=sys.stderr)
        return 1
    ops = [op for op in expected if op in (given.only or expected)]
    report: dict = {**describe(torch.device("cuda")), "checked": {}, "rows": [], "errors": {}}
    report["errors"].update({op: "no kernel for CUDA is loaded" for op in ops if op not in owned})
    name = re.sub(r"[^a-z0-9]+", "-", str(report["device"]).lower()).strip("-")
    path = given.out or (None if given.only else RESULTS)
    if path is not None and path.suffix != ".json":
        path = path / f"{name}.json"

    def keep() -> None:
        report["seconds"] = round(time.monotonic() - began, 1)
        if path is not None:
            save(report, path)

    right = check_all([op for op in ops if op in owned], report, began + CHECK_SECONDS)
    keep()
    time_all([op for op in right if op in gpu_cases.CASES], report, began + SECONDS, keep)
    keep()
    print(f"\n{path or 'not written'}, {report['seconds']} s")
    for op, error in report["errors"].items():
        print(f"{op}: {error}", file=sys.stderr)
    return 1 if report["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
