"""Tables from what `engine bench --json` wrote: every row into docs/measured.md, a summary into the README.

    python bench/tables.py bench/results/*.json

Nothing in them is written by hand.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from engine.bench.common import coarse, exceeds

ROOT = Path(__file__).resolve().parents[1]
DENSE = ("fp32", "F.linear fp32")
NOT_INT8_OF_OTHERS = ("int8", "bitmap", "block", "fp32", "onnxruntime fp32", "F.linear", "clone")  # how names begin
DENSE_INT8 = "int8_linear"  # the engine's own, which a compressed form has to beat
# The README has every row of these ops, summed up by how many rows the activations have.
TRAINING = "forward and back"  # in the note of rows that time gradients too: in docs/measured.md alone
SUMMED_UP = ("int8_linear", "bitmap_int8_linear", "semi_structured_int8_linear", "block_int8_linear", "minilm")
BANDS = (1, 4, 128, math.inf)  # the most of M: one token, a few, some, many


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


def of_limit(row: dict, limits: Mapping[str, float]) -> str:
    """The fraction of the limit; where it would be above 1, the speed alone, in the unit of what bounds the row."""
    if not exceeds(row["fraction_of_limit"]):
        return f"{row['fraction_of_limit']:.0%}"
    limits, own = row.get("limits", limits), row["timings"][row["own"]]["median"]
    bandwidth, rate = limits[f"{row['traffic']}_gbps"], limits.get(f"{row['arithmetic']}_gops")
    if rate and row["operations"] / rate > row["moved"] / bandwidth:
        return f"{row['operations'] / own / 1e9:.0f} GOP/s"
    return f"{row['moved'] / own / 1e9:.0f} GB/s"


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
            table.append([row["case"], spread, of_limit(row, results["limits"]), *ratios])
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


def summary(results: dict) -> list[str]:
    """The README's table: all rows of an op with about as many rows of activations in a line."""
    table: list[list[str]] = []
    fastest: dict[str, list[dict]] = {}
    for rows in _groups(results["rows"]):
        peers, best = [peers_of(row) for row in rows], [(row, found) for row in rows if (found := fastest_int8(row))]
        for row, (name, _) in best:
            fastest.setdefault(name, []).append(row)
        table.append(
            [
                f"`{rows[0]['op']}`",
                _rows_in_words(rows),
                str(len(rows)),
                _spread([row["fraction_of_limit"] for row in rows], _percent),
                _spread([of[DENSE_INT8] for of in peers if DENSE_INT8 in of]),
                _spread([ratio for _, (_, ratio) in best]),
                _spread([of[name] for of in peers for name in DENSE if name in of]),
            ]
        )
    header = ["op", "rows of activations M, or input", "shapes", "of the machine's limit"]
    header += ["× own dense `int8_linear`", "× fastest int8 of others", "× float32"]
    names = ", ".join(f"{name}{_error_of(name, rows)}" for name, rows in sorted(fastest.items()))
    return [
        "Every shape without gradients is in it: the median over a line's shapes, then the least and the most.",
        "`≈100%` is what came out above the limit as measured, which others' use of the machine lowers.",
        "",
        *markdown(header, table),
        "",
        f"On {machine(results)}. Fastest of others, by shape: {names}.",
    ]


def _groups(rows: Sequence[dict]) -> list[list[dict]]:
    """The rows of each line: of one op, and with M in one band; a model's by themselves."""
    groups: dict[tuple, list[dict]] = {}
    of = [row for row in rows if row["op"] in SUMMED_UP and TRAINING not in row["note"]]
    for row in sorted(of, key=lambda row: (SUMMED_UP.index(row["op"]), _rows_of_activations(row) or 0)):
        m = _rows_of_activations(row)
        band = row["case"] if m is None else next(most for most in BANDS if m <= most)
        groups.setdefault((row["op"], band), []).append(row)
    return list(groups.values())


def _error_of(name: str, rows: Sequence[dict]) -> str:
    """The largest error of a peer that computes with fewer bits than the op, in brackets."""
    worst = max(rows, key=lambda row: (row.get("errors") or {}).get(name, 0.0))
    error = coarse(worst.get("errors"), name, worst["own"])
    return f" ({error})" if error else ""


def _rows_of_activations(row: dict) -> int | None:
    found = re.match(r"M[ =](\d+)", row["case"])
    return int(found[1]) if found else None


def _rows_in_words(rows: Sequence[dict]) -> str:
    counts = sorted({m for row in rows if (m := _rows_of_activations(row)) is not None})
    return ", ".join(map(str, counts)) if counts else rows[0]["case"].replace(" x ", " × ")


def _percent(fraction: float) -> str:
    return "≈100%" if exceeds(fraction) else f"{fraction:.0%}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def _spread(values: Sequence[float], words: Callable[[float], str] = _ratio) -> str:
    if len(values) < 2:
        return "".join(map(words, values))
    return f"{words(statistics.median(values))} ({words(min(values))} to {words(max(values))})"


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
        "same run, allow for the op's own bytes and operations: bandwidth at the start and, in files that hold limits",
        "for each row, again just before and just after an op's rows; the best counts. A row that is faster all the",
        "same shows a limit that was measured too low (others use the machine too, or its caches hold more than was",
        "reckoned with): it has no fraction, but its GB/s of the bytes that it has to move.",
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
    table = "\n".join(("<!-- bench -->", *summary(files[0]), "<!-- /bench -->"))
    readme.write_text(before + table + after, encoding="utf-8")


if __name__ == "__main__":
    main()
