"""Results of several seeds: kept in one JSON file, each as it is made, and shown as a table in a page of the docs."""

import json
import os
import statistics
from pathlib import Path


def keep(path: Path, seed: int, settings: dict, found: dict[str, dict[str, float]]) -> dict[str, dict]:
    """Adds a seed's numbers to `path`, in place of those of the same seed, and returns all seeds' of these settings.

    `found` holds for each model that was measured its numbers by name.
    """
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else {}
    runs = {name: run for name, run in runs.items() if run["settings"] == settings}
    runs[str(seed)] = {"settings": settings, "found": found}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps({"runs": dict(sorted(runs.items()))}, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return runs


def table(title: str, runs: dict[str, dict], digits: dict[str, int]) -> list[str]:
    """Markdown: a row for each model, a column for each of `digits`, which says how many follow the point.

    A cell is the mean over the seeds, and from where to where they spread.
    """
    seeds = [run["found"] for run in runs.values()]
    lines = [f"| {title}, {len(seeds)} seeds | " + " | ".join(digits) + " |", "|---|" + "---|" * len(digits)]
    for model in seeds[0]:
        cells = []
        for column, places in digits.items():
            values = [found[model][column] for found in seeds if column in found[model]]
            mean, low, high = (f"{f(values):.{places}f}" if values else "" for f in (statistics.mean, min, max))
            cells.append(mean if low == high else f"{mean} ({low} to {high})")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return lines


def put(page: Path, mark: str, lines: list[str]) -> None:
    """Writes `lines` into `page`, between `<!-- mark -->` and `<!-- /mark -->`, which must be there."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- /{mark} -->")
    if not begin or not end:
        raise SystemExit(f"{page}: has no marks <!-- {mark} --> and <!-- /{mark} -->")
    page.write_text(before + begin + "\n".join(lines) + "\n" + end + after, encoding="utf-8")
