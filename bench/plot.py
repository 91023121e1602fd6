"""Pictures of what `engine bench` measured."""

import io
from collections.abc import Sequence
from pathlib import Path

# Okabe and Ito's palette, told apart by every kind of colour vision.
OWN, PEERS, LIMIT = "#D55E00", ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999"), "#222222"
MOST_ROWS = 24


def save_plot(results: Sequence[dict], path: Path) -> None:
    """One panel an op: how many times as fast as the fastest peer each shape is, with the machine's limit drawn in."""
    from matplotlib.figure import Figure  # takes a second to import, and only this needs it

    groups: dict[str, list[dict]] = {}
    for row in results:
        title = row["op"] + (f"\n{row['note']}" if row["note"] else "")
        groups.setdefault(title, []).append(row)
    shown = {title: rows[:MOST_ROWS] for title, rows in groups.items()}
    heights = [1.1 + 0.32 * len(rows) for rows in shown.values()]
    figure = Figure(figsize=(9, sum(heights) + 0.4), layout="constrained")
    axes = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, rows) in zip(axes, shown.items(), strict=True):
        _panel(axis, title, rows)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    path.write_bytes(buffer.getvalue())


def _panel(axis, title: str, rows: list[dict]) -> None:
    peers = sorted({name for row in rows for name in row["timings"]} - {row["own"] for row in rows})
    for y, row in enumerate(rows):
        own = row["timings"][row["own"]]["median"]
        axis.barh(y, row["fraction_of_limit"], 0.62, color=OWN, alpha=0.85)
        for name, timing in row["timings"].items():
            if name != row["own"]:
                colour = PEERS[peers.index(name) % len(PEERS)]
                marker = "os^Dv"[peers.index(name) // len(PEERS) % 5]
                axis.plot(row["fraction_of_limit"] * own / timing["median"], y, marker, color=colour, markersize=5)
    axis.axvline(1, color=LIMIT, linewidth=1)
    for i, name in enumerate(peers):
        label = f"torch.{name}" if name.startswith("_") else name  # matplotlib leaves names with a first _ out
        axis.plot([], [], "os^Dv"[i // len(PEERS) % 5], color=PEERS[i % len(PEERS)], markersize=5, label=label)
    axis.barh([0], [0], color=OWN, label=rows[0]["own"])
    axis.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlim(left=0)
    axis.set_xlabel("speed as a fraction of the machine's limit for our bytes and operations (line: 1)", fontsize=8)
    axis.set_title(title, fontsize=10, loc="left")
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.spines[["top", "right"]].set_visible(False)
