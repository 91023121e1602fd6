"""Pictures of what `engine bench` measured."""

import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.bench.tables import DENSE, fastest_int8

# Okabe and Ito's palette, told apart by every kind of colour vision.
OWN, PEERS, LIMIT = "#D55E00", ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999"), "#222222"
MARKERS = "os^Dv"
MOST_ROWS = 24


def save_plot(results: Sequence[dict], limits: Mapping[str, float], path: Path) -> None:
    """One picture (PNG) of all rows, with the machine's limits drawn in.

    First, where they were measured, speed-up over sparsity and whole models end to end; then the roofline; then a panel
    an op: every shape and every peer as a fraction of the limit.
    """
    from matplotlib.figure import Figure  # takes a second to import, and only this needs it

    groups: dict[str, list[dict]] = {}
    for row in results:
        title = row["op"] + (f"\n{row['note']}" if row["note"] else "")
        groups.setdefault(title, []).append(row)
    shown = {title: rows[:MOST_ROWS] for title, rows in groups.items()}
    above = [
        (panel, rows)
        for panel, rows in (
            (_sparsity_panel, [row for row in results if row.get("sparsity") is not None and fastest_int8(row)]),
            (_models_panel, [row for row in results if row["op"] == "minilm"]),
            (functools.partial(_roofline_panel, limits), [row for row in results if row["operations"]]),
        )
        if rows
    ]
    heights = [4.2 for _ in above] + [1.1 + 0.32 * len(rows) for rows in shown.values()]
    figure = Figure(figsize=(10, sum(heights) + 0.4), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (panel, rows) in zip(axes, above, strict=False):
        panel(axis, rows)
        axis.spines[["top", "right"]].set_visible(False)
    for axis, (title, rows) in zip(axes[len(above) :], shown.items(), strict=True):
        _op_panel(axis, title, rows)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    path.write_bytes(buffer.getvalue())


def _legend(axis) -> None:
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _sparsity_panel(axis, rows: list[dict]) -> None:
    """How many times as fast as the fastest int8 linear of others, and what the bytes and operations would allow."""
    curves: dict[str, list[dict]] = {}
    for row in rows:
        curves.setdefault(row["case"].rsplit(", ", 1)[0], []).append(row)
    curves = {name: sorted(of, key=lambda row: row["sparsity"]) for name, of in curves.items() if len(of) > 1}
    for i, (name, of) in enumerate(curves.items()):
        colour, marker = (OWN, *PEERS)[i % (1 + len(PEERS))], MARKERS[i % len(MARKERS)]
        sparsity, speed = [row["sparsity"] for row in of], [fastest_int8(row)[1] for row in of]  # type: ignore[index]
        allowed = [s / min(1.0, row["fraction_of_limit"]) for s, row in zip(speed, of, strict=True)]
        axis.plot(sparsity, speed, marker + "-", color=colour, label=name)
        axis.plot(sparsity, allowed, ":", color=colour, linewidth=1)
    axis.axhline(1, color=LIMIT, linewidth=1)
    axis.plot([], [], ":", color=LIMIT, linewidth=1, label="what the machine allows")
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.set_xlabel("sparsity of the weight", fontsize=8)
    axis.set_ylabel("times as fast", fontsize=8)
    axis.set_title(f"{rows[0]['op']} beside the fastest dense int8 linear of others (line: 1)", fontsize=10, loc="left")
    _legend(axis)


def _models_panel(axis, rows: list[dict]) -> None:
    """How many times as fast as float32 whole models are."""
    names = list(dict.fromkeys(name for row in rows for name in row["timings"]))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        ours = name.startswith(("int8", "bitmap"))
        for x, row in enumerate(rows):
            if name in row["timings"]:
                dense = next(row["timings"][dense]["median"] for dense in DENSE if dense in row["timings"])
                speed = dense / row["timings"][name]["median"]
                at = x + (i - len(names) / 2 + 0.5) * width
                axis.bar(at, speed, 0.9 * width, color=OWN if ours else PEERS[i % len(PEERS)], alpha=0.85)
                axis.text(at, speed, f" {name}", rotation=90, fontsize=6, ha="center", va="bottom")
    axis.axhline(1, color=LIMIT, linewidth=1)
    axis.set_ylim(0, 1.6 * axis.get_ylim()[1])  # the names stand above the bars
    axis.set_xticks(range(len(rows)), [row["case"] for row in rows], fontsize=8)
    axis.set_ylabel("times as fast as fp32", fontsize=8)
    axis.set_title(f"{rows[0]['op']}, end to end", fontsize=10, loc="left")


def _roofline_panel(limits: Mapping[str, float], axis, rows: list[dict]) -> None:
    """Operations a second over operations a byte, under the machine's bandwidths and its arithmetic rates."""
    ops = list(dict.fromkeys(row["op"] for row in rows))
    intensity = [row["operations"] / max(1, row["moved"]) for row in rows]
    low, high = min(intensity) / 2, max(intensity) * 2
    rates = {kind: limits[f"{kind}_gops"] for kind in ("int8", "bf16", "fp32") if limits.get(f"{kind}_gops")}
    top = max([*rates.values(), high * limits["read_gbps"] if not rates else 0])
    for bandwidth, style in (("read_gbps", "-"), ("cache_gbps", "--")):
        x = [low, min(high, top / limits[bandwidth])]
        name = {"read_gbps": "from memory", "cache_gbps": "from cache"}[bandwidth]
        axis.plot(x, [limits[bandwidth] * at for at in x], style, color=LIMIT, linewidth=1, label=name)
    for kind, rate in rates.items():
        axis.plot([rate / limits["cache_gbps"], high], [rate, rate], color=LIMIT, linewidth=1)
        axis.text(high, rate, f"{kind} ", fontsize=7, ha="right", va="bottom")
    for i, op in enumerate(ops):
        of = [(at, row) for at, row in zip(intensity, rows, strict=True) if row["op"] == op]
        speed = [row["operations"] / row["timings"][row["own"]]["median"] / 1e9 for _, row in of]
        colour, marker = (OWN, *PEERS)[i % (1 + len(PEERS))], MARKERS[i % len(MARKERS)]
        axis.plot([at for at, _ in of], speed, marker, color=colour, markersize=5, alpha=0.8, label=op)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations for each byte that has to be moved", fontsize=8)
    axis.set_ylabel("10⁹ operations a second", fontsize=8)
    axis.set_title("roofline", fontsize=10, loc="left")
    _legend(axis)


def _op_panel(axis, title: str, rows: list[dict]) -> None:
    peers = sorted({name for row in rows for name in row["timings"]} - {row["own"] for row in rows})
    for y, row in enumerate(rows):
        own, fraction = row["timings"][row["own"]]["median"], min(1.0, row["fraction_of_limit"])
        axis.barh(y, fraction, 0.62, color=OWN, alpha=0.85)
        for name, timing in row["timings"].items():
            if name != row["own"]:
                colour = PEERS[peers.index(name) % len(PEERS)]
                marker = MARKERS[peers.index(name) // len(PEERS) % len(MARKERS)]
                axis.plot(fraction * own / timing["median"], y, marker, color=colour, markersize=5)
    axis.axvline(1, color=LIMIT, linewidth=1)
    for i, name in enumerate(peers):
        marker = MARKERS[i // len(PEERS) % len(MARKERS)]
        label = f"torch.{name}" if name.startswith("_") else name  # matplotlib leaves names with a first _ out
        axis.plot([], [], marker, color=PEERS[i % len(PEERS)], markersize=5, label=label)
    axis.barh([0], [0], color=OWN, label=rows[0]["own"])
    axis.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlim(left=0)
    axis.set_xlabel(
        "speed as a fraction of the machine's limit for our bytes and operations (line: 1, and what came out above it)",
        fontsize=8,
    )
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    _legend(axis)
