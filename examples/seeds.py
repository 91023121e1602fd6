"""Results of several seeds: kept in one JSON file, each as it is made, and shown as a table in a page of the docs.

python examples/seeds.py bytes_out/results.json --page docs/guide.md --mark bytes
"""

import argparse
import json
import os
import statistics
from pathlib import Path


def keep(path: Path, title: str, digits: dict[str, int], seed: int, settings: dict, found: dict[str, dict]) -> None:
    """Adds a seed's numbers to `path`, in place of the same seed's and of those with other settings.

    `found` holds for each model that was measured its numbers by name, `digits` how many of each follow the point.
    """
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else {}
    runs = {name: run for name, run in runs.items() if run["settings"] == settings}
    runs[str(seed)] = {"settings": settings, "found": found}
    everything = {"title": title, "digits": digits, "runs": dict(sorted(runs.items()))}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def table(path: Path) -> list[str]:
    """Markdown: a row for each model; a cell is the mean over the seeds, and from where to where they spread."""
    results = json.loads(path.read_text(encoding="utf-8"))
    seeds = [run["found"] for run in results["runs"].values()]
    count = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    lines = [f"| {results['title']}, {count} | " + " | ".join(results["digits"]) + " |"]
    lines.append("|---|" + "---|" * len(results["digits"]))
    for model in seeds[0]:
        cells = []
        for column, places in results["digits"].items():
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


def main() -> None:
    """Prints the table, or puts it into a page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--mark")
    arguments = parser.parse_args()
    lines = table(arguments.results)
    if arguments.page:
        put(arguments.page, arguments.mark, lines)
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
