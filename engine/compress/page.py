"""Pictures of a search and of distillations, and one self-contained page with all of them."""

import base64
import html
import io
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engine.compress.report import _STYLE, _html_row, _short, _without_nan

if TYPE_CHECKING:
    from engine.compress.distill import Distillation
    from engine.compress.search_result import Search

# Okabe and Ito's colours, told apart by every kind of colour vision; each kind of mark has a shape of its own besides.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
MOST_LAYERS = 60  # a picture of more is too tall to be read
SMOOTHED = 25  # steps that a curve's mean runs over


def frontier(search: "Search") -> bytes:
    """Loss over speed: what was measured as a whole, and the frontier that the layers' measurements add up to."""
    figure = _figure(8.5, 5)
    axes = figure.subplots()
    base = search.measured[0].seconds
    points = [(loss, base / seconds) for loss, seconds in search.expected if 0 < loss < 1e12 and seconds > 0]
    if points:
        speeds, losses = [speed for _, speed in points], [loss for loss, _ in points]
        axes.plot(
            speeds, losses, color="#999999", linewidth=1.2, zorder=1, label="expected: layers' measurements added up"
        )
    shown = [point for point in search.measured if 0 < point.loss < 1e12]
    for kind, mark, colour, size in ((True, "s", COLOURS[1], 46), (False, "o", COLOURS[0], 36)):
        mine = [point for point in shown if point.uniform is kind and point.options != search.chosen.options]
        label = "one recipe for all layers" if kind else "a recipe for each layer"
        axes.scatter(
            [base / p.seconds for p in mine], [p.loss for p in mine], size, colour, marker=mark, zorder=3, label=label
        )
    if search.chosen.loss > 0:
        spot = (base / search.chosen.seconds, search.chosen.loss)
        axes.scatter(*spot, 190, COLOURS[4], marker="*", zorder=4, label="chosen")
    below, last = False, 0.0
    for point in sorted((point for point in shown if point.uniform), key=lambda point: point.loss):
        below, last = not below and point.loss < 1.5 * last, point.loss  # of names at one height one goes down
        spot = (base / point.seconds, point.loss)
        axes.annotate(point.name, spot, (6, -12 if below else 5), textcoords="offset points", fontsize=8)
    ((what, most),) = search.budget.items()
    if what == "loss" and most > 0:
        axes.axhline(most, color="#000000", linestyle=":", linewidth=1, label="budget")
    elif what == "seconds" and most > 0:
        axes.axvline(base / most, color="#000000", linestyle=":", linewidth=1, label="budget")
    if shown or points:
        axes.set_yscale("log")
    axes.set(xlabel="times as fast as dense", ylabel="loss (relative squared error unless given)")
    axes.set_title("Loss over speed, the whole model measured", fontsize=11, loc="left")
    axes.grid(True, which="major", color="#e5e5e5", zorder=0)
    axes.margins(0.2, 0.12)  # room for names on the right
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return _png(figure)


def sensitivity(search: "Search") -> bytes:
    """The loss that each layer causes alone, for each candidate, and the same by kind of layer."""
    rows = search.layers
    if len(rows) > MOST_LAYERS:
        worst = sorted(rows, key=lambda row: -max(option["loss"] for option in row["options"].values()))[:MOST_LAYERS]
        rows = [row for row in rows if row in worst]
    groups = by_kind(search)
    figure = _figure(13, 2.2 + 0.21 * max(len(rows), len(groups)))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1))
    for i, candidate in enumerate(search.candidates):
        style = {"color": COLOURS[i % 8], "marker": MARKS[i % 8], "linestyle": "none", "markersize": 4.5}
        mine = [(row["options"][candidate]["loss"], y) for y, row in enumerate(rows) if candidate in row["options"]]
        left.plot([_drawn(loss) for loss, _ in mine], [y for _, y in mine], **style, label=candidate)
        means = [(values[candidate], y) for y, values in enumerate(groups.values()) if candidate in values]
        right.plot([_drawn(loss) for loss, _ in means], [y for _, y in means], **style | {"markersize": 7})
    left.set_yticks(range(len(rows)), [_short(row["name"]) for row in rows], fontsize=7)
    right.set_yticks(range(len(groups)), list(groups), fontsize=8)
    for axes, count, title in (
        (left, len(rows), "Loss of the model with this layer alone compressed"),
        (right, len(groups), "The same, mean over layers of a kind"),
    ):
        axes.set_xscale("log")
        axes.set_ylim(count - 0.4, -0.6)
        axes.grid(True, axis="both", color="#ebebeb")
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("loss")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return _png(figure)


def by_kind(search: "Search") -> dict[str, dict[str, float]]:
    """For each kind of layer (its name without numbers, and its shape) the mean loss of each candidate."""
    groups: dict[str, dict[str, list[float]]] = {}
    for row in search.layers:
        kind = ".".join(part for part in row["name"].split(".") if not part.isdigit()) or row["kind"]
        label = f"{_short(kind)}  {'×'.join(map(str, row['shape']))}"
        for candidate, option in row["options"].items():
            groups.setdefault(label, {}).setdefault(candidate, []).append(option["loss"])
    return {k: {c: sum(v) / len(v) for c, v in values.items()} for k, values in groups.items()}


def curves(distillations: Mapping[str, "Distillation"]) -> bytes:
    """The losses of trainings, step by step: each step faint, the mean of the last few strong."""
    figure = _figure(8.5, 4.8)
    axes = figure.subplots()
    for i, (name, done) in enumerate(distillations.items()):
        colour, steps = COLOURS[i % 8], range(1, len(done.losses) + 1)
        axes.plot(steps, done.losses, color=colour, alpha=0.25, linewidth=0.7)
        means = [sum(part) / len(part) for part in (done.losses[max(0, s - SMOOTHED) : s] for s in steps)]
        axes.plot(steps, means, color=colour, linewidth=1.6, linestyle=("-", "--", "-.", ":")[i % 4], label=name)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.set_title(f"Training, the mean of {SMOOTHED} steps", fontsize=11, loc="left")
    axes.grid(True, color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return _png(figure)


def page(search: "Search | None" = None, distillations: "Mapping[str, Distillation] | None" = None) -> str:
    """One HTML page, pictures inside: what each layer costs, what was done about it, the frontier, the trainings."""
    parts = ["<h1>Where compression hurts, and what was done about it</h1>"]
    if search is not None:
        parts += [f"<pre>{html.escape(str(search))}</pre>", "<h2>The frontier</h2>"]
        parts += [_image(frontier(search), "Loss over speed"), "<h2>Sensitivity</h2>"]
        parts += [_image(sensitivity(search), "Loss of each layer alone, and by kind of layer"), _choices(search)]
        parts += ["<h2>All that was measured as a whole</h2>", _points(search)]
    if distillations:
        parts += ["<h2>Training</h2>", _image(curves(distillations), "Training losses by step")]
    if search is not None:
        machine = "".join(_html_row("td", (k, "none" if v is None else str(v))) for k, v in search.machine.items())
        recipes = json.dumps(_without_nan(search.candidates), indent=2)
        parts += [f"<h2>Candidates</h2><pre>{html.escape(recipes)}</pre><h2>Machine</h2><table>{machine}</table>"]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Sensitivity and frontier</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _choices(search: "Search") -> str:
    """The layers, worst first, with what was chosen for each."""
    rows = sorted(search.layers, key=lambda row: -max(option["loss"] for option in row["options"].values()))
    body = ""
    for row in rows:
        option = row["options"].get(search.chosen.options[row["name"]])
        losses = ", ".join(f"{name} {values['loss']:.2g}" for name, values in row["options"].items())
        gain = "–"
        if option is not None and option["seconds"][0]:
            gain = f"{option['seconds'][0] * 1e6:,.0f} → {option['seconds'][1] * 1e6:,.0f} µs"
        shape = "×".join(map(str, row["shape"]))
        body += _html_row("td", (row["name"], shape, search.chosen.options[row["name"]], gain, losses))
    header = _html_row("th", ("layer", "shape", "chosen", "time", "loss alone"))
    title = "<h2>What was chosen, the most sensitive layers first</h2>"
    return f"{title}<table class='numbers wordy'>{header}{body}</table>"


def _points(search: "Search") -> str:
    header = ("", "loss", "expected", "ms", "expected", "times as fast", "MB")
    base = search.measured[0].seconds
    body = ""
    for point in search.measured:
        name = f"{point.name} (chosen)" if point.options == search.chosen.options else point.name
        cells = (name, f"{point.loss:.3g}", f"{point.expected_loss:.3g}", f"{point.seconds * 1e3:.2f}")
        more = (f"{point.expected_seconds * 1e3:.2f}", f"{base / point.seconds:.2f}", f"{point.bytes / 1e6:.2f}")
        body += _html_row("td", cells + more)
    return f"<table class=numbers>{_html_row('th', header)}{body}</table>"


def _drawn(loss: float) -> float:
    """A loss as it can stand on a logarithmic axis."""
    return min(max(loss, 1e-12), 1e12)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # takes a second to import, and only this needs it

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _image(png: bytes, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
