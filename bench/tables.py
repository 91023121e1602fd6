"""Tables from what `engine bench --json` wrote: every row into docs/measured.md, a few into the README.

    python bench/tables.py bench/results/*.json

Nothing in them is written by hand.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from engine.bench.common import coarse

ROOT = Path(__file__).resolve().parents[1]
DENSE = ("fp32", "F.linear fp32")
NOT_INT8_OF_OTHERS = ("int8", "bitmap", "block", "fp32", "onnxruntime fp32", "F.linear", "clone")  # how names begin
# For the README: an op with the beginnings of the cases that say most about it.
CHOSEN = {
    "bitmap_int8_linear": ("M 1, 8192x8192", "M 4, 8192x8192", "M 16, 8192x8192"),
    "int8_linear": ("M 1, N 8192", "M 16, N 4096", "M 1024, N 4096", "M 1024, N 1536"),
    "minilm": ("1 x 16", "8 x 128"),
}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table, line by line."""
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]


def peers_of(row: dict) -> dict[str, float]:
    """How many times as fast as each peer the op is."""
    own = row["timings"][row["own"]]["median"]
    return {name: timing["median"] / own for name, timing in row["timings"].items() if name != row["own"]}


def fastest_int8(row: dict) -> tuple[str, float] | None:
    """The fastest int8 linear, or model, of others: its name, and how many times as fast as it the op is."""
    others = {name: ratio for name, ratio in peers_of(row).items() if not name.startswith(NOT_INT8_OF_OTHERS)}
    return min(others.items(), key=lambda item: item[1]) if others else None


def machine(results: dict) -> str:
    """The machine in a line."""
    limits = results["limits"]
    threads, torch = f"{results['threads']} threads", f"torch {results['torch']}"
    words = (results["processor"], results["instruction_set"], threads, torch)
    bf16 = f", {limits['bf16_gops']:.0f} bf16" if limits.get("bf16_gops") else ""
    return (
        f"{', '.join(words)}, {results['date']}; measured limits: {limits['read_gbps']:.0f} GB/s read, "
        f"{limits['int8_gops']:.0f} GOP/s int8, {limits['fp32_gops']:.0f} GFLOP/s fp32{bf16}"
    )


def every_row(results: dict) -> list[str]:
    """Every op's rows beside every peer."""
    lines, groups = [f"## {machine(results)}", ""], {}
    for row in results["rows"]:
        groups.setdefault((row["op"], row["note"]), []).append(row)
    for (op, note), rows in groups.items():
        names = list(dict.fromkeys(name for row in rows for name in peers_of(row)))
        table = []
        for row in rows:
            own, peers = row["timings"][row["own"]], peers_of(row)
            spread = f"{own['median'] * 1e6:.0f} ({own['p10'] * 1e6:.0f} to {own['p90'] * 1e6:.0f})"
            ratios = [f"{peers[name]:.2f}" if name in peers else "" for name in names]
            table.append([row["case"], spread, f"{row['fraction_of_limit']:.0%}", *ratios])
        lines += [f"### {op}{f', {note}' if note else ''}", ""]
        worst: dict[str, float] = {}
        for row in rows:
            for name, error in (row.get("errors") or {}).items():
                worst[name] = max(worst.get(name, 0.0), error)
        if worst:
            said = ", ".join(f"{name} {error:.1%}" for name, error in worst.items() if name != "fp32")
            lines += [f"Errors relative to float64, the largest of the table: {said}.", ""]
        lines += [*markdown(["case", "µs (p10 to p90)", "of the limit", *(f"× {name}" for name in names)], table), ""]
    return lines


def chosen_rows(results: dict) -> list[str]:
    """The README's table."""
    rows = []
    for op, beginnings in CHOSEN.items():
        for row in (row for row in results["rows"] if row["op"] == op and row["case"].startswith(beginnings)):
            peers, best = peers_of(row), fastest_int8(row)
            if best and (error := coarse(row.get("errors"), best[0], row["own"])):
                best = (f"{best[0]}, {error}", best[1])
            dense = next((peers[name] for name in DENSE if name in peers), None)
            rows.append(
                [
                    f"`{op}`, {re.sub(' ?x ?', ' × ', row['case'])}",
                    f"{row['timings'][row['own']]['median'] * 1e6:.0f}",
                    f"{row['fraction_of_limit']:.0%}",
                    f"{best[1]:.2f} ({best[0]})" if best else "",
                    f"{dense:.1f}" if dense else "",
                ]
            )
    header = [
        "op, rows of activations M, weight; or model",
        "µs",
        "of the machine's limit",
        "× fastest int8 peer",
        "× float32",
    ]
    return [*markdown(header, rows), "", f"On {machine(results)}."]


def main() -> None:
    """Writes docs/measured.md; from the first file its picture and the README's table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path)
    files = [json.loads(path.read_text(encoding="utf-8")) for path in parser.parse_args().results]
    files = [results for results in files if "cuda" not in results]  # a GPU's are tables of their own
    head = [
        "# Measured",
        "",
        "Made by `bench/tables.py` from the files under `bench/results/`; `engine bench` measures your own machine.",
        "Peers ran in the same loop, each round in another order; times are medians, and `×` says how many times as",
        "fast as the peer the op is. The limit is what the machine's bandwidth and arithmetic rate, measured in the",
        "same run, allow for the op's own bytes and operations. Where others use the machine too it varies, and a row",
        "may exceed it.",
        "",
        "![Speed-up over sparsity, whole models, the roofline, and every row as a fraction of the limit](measured.png)",
        "",
    ]
    lines = [*head, *(line for results in files for line in every_row(results))]
    (ROOT / "docs/measured.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    from engine.bench.plot import save_plot  # which needs this module

    save_plot(files[0]["rows"], files[0]["limits"], ROOT / "docs/measured.png")
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition("<!-- bench -->")
    _, mark, after = rest.partition("<!-- /bench -->")
    if not mark:
        raise SystemExit("README.md has no place marked <!-- bench --> ... <!-- /bench -->")
    table = "\n".join(("<!-- bench -->", *chosen_rows(files[0]), "<!-- /bench -->"))
    readme.write_text(before + table + after, encoding="utf-8")


if __name__ == "__main__":
    main()
