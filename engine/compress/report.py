"""What compression did to a model, layer by layer, and what it left alone: text, JSON, PNG, HTML."""

import base64
import dataclasses
import html
import importlib
import io
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch

from engine._files import write_bytes, write_text

OTHERS_NAMED = 3
LONG_NAME = 44
MOST_BARS = 60  # a picture of thousands of layers is too tall to be drawn or read


@dataclasses.dataclass
class Layer:
    """One compressed weight.

    `seconds_*` are medians inside whole forward passes on the example inputs, None where none were given. `error` is
    the relative error (L2) of the layer's output on them, or of its weight where none were given, None where the
    inputs never reach the layer. `names` has every module that shares the weight. `note` says what the recipe asked for
    and was not done, and why, and whether the model reads the weight past the layer.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    format: str
    sparsity: float
    bytes_before: int
    bytes_after: int
    seconds_before: float | None = None
    seconds_after: float | None = None
    error: float | None = None
    note: str = ""


@dataclasses.dataclass
class Report:
    """The outcome of :func:`engine.compress_`. `print` it, or `save` it.

    Attributes:
        recipe: the recipe as a dict.
        layers: what was compressed.
        left_alone: qualified name to reason, for everything that a target meant and that stayed as it was.
        others: bytes of each parameter, by name, that is a matrix or more and that no target meant: of layers whose
            class has no compressed twin (the experts of a mixture, say), or that the recipe doesn't name.
        fused_attention: how many modules :func:`engine.nn.unfuse_attention_` could make layers of.
        bytes_before, bytes_after: parameters and buffers of the whole model.
        seconds_before, seconds_after: median of a forward pass on the example inputs, None without them.
        machine: what it was measured on.
    """

    recipe: dict[str, Any]
    layers: list[Layer]
    left_alone: dict[str, str]
    bytes_before: int
    bytes_after: int = 0
    seconds_before: float | None = None
    seconds_after: float | None = None
    machine: dict[str, Any] = dataclasses.field(default_factory=lambda: machine())
    others: dict[str, int] = dataclasses.field(default_factory=dict)
    fused_attention: int = 0

    def __str__(self) -> str:
        """A table: a line a layer, then the whole model, then what was left alone and why."""
        header = ("layer", "shape", "format", "sparsity", "bytes", "µs", "error")
        rows = [_cells(layer) for layer in self.layers]
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = [_line(header, widths), "  ".join("─" * width for width in widths)]
        lines += [_line(row, widths) for row in rows]
        lines += ["", self.summary()]
        noted = [layer for layer in self.layers if layer.note]
        if noted:
            lines += ["", f"notes ({len(noted)}):"]
            lines += [f"  {layer.name}: {layer.note}" for layer in noted]
        if self.left_alone:
            lines += ["", f"left alone ({len(self.left_alone)}):"]
            lines += [f"  {name}: {reason}" for name, reason in self.left_alone.items()]
        if others := self._others():
            lines += ["", others]
        return "\n".join(lines)

    def summary(self) -> str:
        """The whole model in one line."""
        size = f"model: {_size(self.bytes_before)} → {_size(self.bytes_after)}"
        size += f" ({self.bytes_before / max(1, self.bytes_after):.2f}x smaller)"
        if self.seconds_before is None or self.seconds_after is None:
            return size
        before, after = self.seconds_before * 1e3, self.seconds_after * 1e3
        change = f"{before / after:.2f}x faster" if after <= before else f"{after / before:.2f}x slower"
        return f"{size}, {before:.2f} → {after:.2f} ms a forward pass ({change})"

    def _others(self) -> str:
        """The parameters that no target meant in one line, the largest by name; nothing below 1 % of the model."""
        if sum(self.others.values()) < self.bytes_before / 100 or not self.others:
            return ""
        largest = sorted(self.others, key=lambda name: -self.others[name])[:OTHERS_NAMED]
        more = f" and {len(self.others) - len(largest)} more" if len(self.others) > len(largest) else ""
        hint = " (engine.nn.unfuse_attention_ makes layers of attention's)" if self.fused_attention else ""
        return f"meant by no target: {_size(sum(self.others.values()))} in {', '.join(largest)}{more}{hint}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return dataclasses.asdict(self)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the report to `path`, by its ending: `.json`, `.png` (a chart) or `.html` (one self-contained page).

        Raises:
            ValueError: another ending.
        """
        path = Path(path)
        if path.suffix.lower() == ".json":
            write_text(path, json.dumps(_without_nan(self.to_dict()), indent=2, ensure_ascii=False) + "\n")
        elif path.suffix.lower() == ".png":
            write_bytes(path, self._chart())
        elif path.suffix.lower() == ".html":
            write_text(path, self._page())
        else:
            raise ValueError(f"engine.Report.save: expected a name ending in .json, .png or .html, got {path.name!r}")

    def _chart(self, titled: bool = True) -> bytes:
        """Bytes and times of each layer, before and after, as PNG."""
        from matplotlib.figure import Figure  # takes a second to import, and only this needs it

        shown = sorted(self.layers, key=lambda layer: -layer.bytes_before)[:MOST_BARS]
        shown = [layer for layer in self.layers if layer in shown]
        timed = any(layer.seconds_before is not None for layer in shown)
        count = max(1, len(shown))
        figure = Figure(figsize=(7.5 * (1 + timed), 1.6 + 0.27 * count), layout="constrained")
        axes = figure.subplots(1, 1 + timed, sharey=True, squeeze=False)[0]
        names = _short_names([layer.name for layer in shown])
        _bars(axes[0], names, [(y.bytes_before / 1e6, y.bytes_after / 1e6) for y in shown], "MB")
        if not shown:
            axes[0].text(0.5, 0.5, "no layer was compressed", ha="center", va="center")
            axes[0].set_axis_off()
        if timed:
            seconds = [(y.seconds_before or 0, y.seconds_after or 0) for y in shown]
            unit, scale = ("ms", 1e3) if max(map(max, seconds)) >= 0.01 else ("µs", 1e6)
            times = [(before * scale, after * scale) for before, after in seconds]
            _bars(axes[1], names, times, f"{unit} a forward pass")
        if shown:
            handles = axes[0].get_legend_handles_labels()
            figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
        titles = [self.summary()] * titled
        titles += [f"the {count} largest of {len(self.layers)} layers"] * (count < len(self.layers))
        figure.suptitle("\n".join(titles), fontsize=11)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()

    def _page(self) -> str:
        header = ("layer", "shape", "format", "sparsity", "bytes", "µs", "error")
        body = "".join(_html_row("td", _cells(layer)) for layer in self.layers)
        noted = _html_reasons("Notes", {layer.name: layer.note for layer in self.layers if layer.note})
        left = _html_reasons("Left alone", self.left_alone)
        if others := self._others():
            left += f"<p>{html.escape(others)}</p>"
        chart = "<p>No layer was compressed.</p>"
        if self.layers:
            chart = base64.b64encode(self._chart(titled=False)).decode()
            chart = (
                f'<img alt="Bytes and time of each layer, before and after" src="data:image/png;base64,{chart}">'
                f"<h2>Layers</h2><table class=numbers>{_html_row('th', header)}{body}</table>"
            )
        facts = "".join(_html_row("td", (k, "none" if v is None else str(v))) for k, v in self.machine.items())
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Compression report</title>'
            f"<style>{_STYLE}</style></head><body><h1>Compression report</h1>"
            f"<p>{html.escape(self.summary())}</p>"
            f"{chart}{noted}{left}<h2>Recipe</h2><pre>{html.escape(json.dumps(self.recipe, indent=2))}</pre>"
            f"<h2>Machine</h2><table>{facts}</table></body></html>\n"
        )


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
img { max-width: 100% } table { border-collapse: collapse; font-size: 14px } th { text-align: left }
th, td { padding: .2em .9em .2em 0; border-bottom: 1px solid #ddd; vertical-align: top }
td:first-child { overflow-wrap: break-word } .numbers { font-variant-numeric: tabular-nums }
.numbers th, .numbers td:nth-child(n+2) { white-space: nowrap } .wordy td:last-child { white-space: normal }
pre { background: #f5f5f5; padding: 1em }
"""


def _bars(axis: Any, names: list[str], pairs: list[tuple[float, float]], unit: str) -> None:
    rows = range(len(names))
    # Blue and orange of Okabe and Ito's palette, told apart by every kind of colour vision.
    axis.barh([y - 0.2 for y in rows], [before for before, _ in pairs], 0.4, color="#0072B2", label="before")
    axis.barh([y + 0.2 for y in rows], [after for _, after in pairs], 0.4, color="#E69F00", label="after")
    axis.set_yticks(list(rows), names, fontsize=7)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlabel(unit)
    axis.spines[["top", "right"]].set_visible(False)


def _cells(layer: Layer) -> tuple[str, ...]:
    times = "–"
    if layer.seconds_before and layer.seconds_after is not None:  # 0 where the inputs never reach it
        times = f"{layer.seconds_before * 1e6:,.0f} → {layer.seconds_after * 1e6:,.0f}"
    others = f" (+{len(layer.names) - 1} tied)" if len(layer.names) > 1 else ""
    return (
        layer.name + others,
        "×".join(map(str, layer.shape)),
        layer.format,
        f"{layer.sparsity:.2f}",
        f"{layer.bytes_before:,} → {layer.bytes_after:,}",
        times,
        "–" if layer.error is None else f"{layer.error:.4f}",
    )


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    left, right = cells[:3], cells[3:]
    padded = [c.ljust(w) for c, w in zip(left, widths[:3], strict=True)]
    padded += [c.rjust(w) for c, w in zip(right, widths[3:], strict=True)]
    return "  ".join(padded).rstrip()


def _html_row(tag: str, cells: tuple[str, ...]) -> str:
    escaped = [html.escape(cell) for cell in cells]
    escaped[0] = escaped[0].replace(".", ".<wbr>")  # a long name may be broken after a dot
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in escaped) + "</tr>"


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: null instead."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _html_reasons(title: str, reasons: dict[str, str]) -> str:
    if not reasons:
        return ""
    rows = "".join(_html_row("td", item) for item in reasons.items())
    return f"<h2>{title}</h2><table>{_html_row('th', ('layer', 'reason'))}{rows}</table>"


def _size(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def _short_names(names: list[str]) -> list[str]:
    """The names without the parts with which all of them begin, where any is long, and then their ends."""
    shared = 0
    if max(map(len, names), default=0) > LONG_NAME and len(names) > 1:
        shared = os.path.commonprefix(names).rfind(".") + 1  # noqa: RUF071
    return [_short("…" * (shared > 0) + name[shared:], LONG_NAME + 20) for name in names]


def _short(name: str, most: int = LONG_NAME) -> str:
    """The end of a long name, which tells layers apart."""
    return name if len(name) <= most else f"…{name[-most + 1 :]}"


def machine() -> dict[str, Any]:
    """What was measured here holds for: processor, instruction set, threads, torch, GPU."""
    from engine import backends

    try:
        name = importlib.import_module("engine._native").cpu_name()
    except ImportError:  # installed without a C++ compiler
        name = platform.processor()
    return {
        "processor": name,
        "instruction_set": backends.cpu_variant(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
