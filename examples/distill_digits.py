"""Prunes a 64-100-10 network on scikit-learn's digits to 90 % with int8, distils it, measures it on held-out digits.

    python examples/distill_digits.py

Three seeds; accuracy on a quarter of the digits that no step has seen. Takes about a minute.
"""

import argparse
import copy
import time
from pathlib import Path

import seeds
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import engine

SPARSITY, STEPS, SEEDS = 0.9, 2500, (0, 1, 2)


class Batches:
    """Shuffled pairs of images and labels, anew at every epoch, as keyword arguments for `Network`."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __iter__(self):
        """Yields mini-batches of 64."""
        for rows in torch.randperm(len(self.images)).split(64):
            yield {"images": self.images[rows], "labels": self.labels[rows]}


class Network(nn.Module):
    """64-100-10."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 100), nn.Linear(100, 10)

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Logits; the labels are for the loss alone."""
        return self.second(torch.relu(self.first(images)))


def train_dense(model: Network, batches: Batches) -> None:
    """The teacher: 60 epochs of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        for batch in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(**batch), batch["labels"]).backward()
            optimizer.step()


def accuracy(model: Network, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent of right answers."""
    with torch.inference_mode():
        return 100 * (model(images).argmax(-1) == labels).float().mean().item()


def run(seed: int) -> dict[str, dict[str, float]]:
    """What one seed comes to: its own split, its own start."""
    digits = load_digits()
    parts = train_test_split(digits.data / 16, digits.target, test_size=0.25, random_state=seed, stratify=digits.target)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    train_y, test_y = (torch.tensor(part) for part in parts[2:])
    torch.manual_seed(seed)
    batches = Batches(train_x, train_y)
    teacher = Network()
    train_dense(teacher, batches)
    found: dict[str, dict[str, float]] = {}

    def note(name: str, model: torch.nn.Module, **more: float) -> None:
        percent = accuracy(model, test_x, test_y)
        found[name] = {"accuracy, %": percent, "against dense, points": 0.0} | more
        found[name]["against dense, points"] = percent - found["dense"]["accuracy, %"]

    note("dense", teacher)
    recipe = engine.Recipe(engine.Prune(sparsity=SPARSITY), engine.Quantize(), guard="none")
    student = copy.deepcopy(teacher)
    engine.compress_(student, recipe)
    note("magnitude, not trained", student)
    for name, teaches in (("distilled", teacher), ("fine-tuned without a teacher", None)):
        student, begun = copy.deepcopy(teacher), time.process_time()
        how = {"loss": "kl", "temperature": 3.0} if teaches else {"loss": task_loss}
        engine.distill(
            student,
            teaches,
            batches,
            steps=STEPS,
            recipe=recipe,
            gradual=1200,
            learning_rate=3e-3,
            progress=False,
            **how,
        )
        note(name, student, steps=STEPS, **{"CPU seconds": time.process_time() - begun})
    return found


def task_loss(output: torch.Tensor, batch: dict) -> torch.Tensor:
    """Cross-entropy to the labels."""
    return nn.functional.cross_entropy(output, batch["labels"])


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("digits_out"))
    arguments = parser.parse_args()
    digits = {"accuracy, %": 2, "against dense, points": 2, "steps": 0, "CPU seconds": 0}
    path, title = arguments.out / "results.json", f"64-100-10 on digits, {SPARSITY:.0%} + int8"
    for seed in SEEDS:
        seeds.keep(path, title, digits, seed, {"sparsity": SPARSITY, "steps": STEPS}, run(seed))
    print("\n".join(seeds.table(path)))


if __name__ == "__main__":
    main()
