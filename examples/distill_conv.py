"""Compresses a small convolutional network on scikit-learn's digits to 90 % and int8, distilled.

    python examples/distill_conv.py

Accuracy on a quarter of the digits that no step has seen, for several seeds. Convolutions are compressed as the linear
layers are, but for the first, whose 288 weights are worth more than their bytes.
"""

import argparse
import copy
import json
import statistics
from pathlib import Path

import torch
from distill_digits import Batches, accuracy, train_dense
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import engine


class ConvolutionalNetwork(nn.Module):
    """Two convolutions, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()
        )
        self.first, self.second = nn.Linear(64 * 4 * 4, 128), nn.Linear(128, 10)

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Images [batch, 64] to logits; the labels are for the loss alone."""
        seen = self.convolutions(images.view(-1, 1, 8, 8)).flatten(1)
        return self.second(torch.relu(self.first(seen)))


def run(seed: int, sparsity: float, steps: int) -> dict[str, float]:
    """Accuracies of one seed: its own split, its own start."""
    digits = load_digits()
    parts = train_test_split(digits.data / 16, digits.target, test_size=0.25, random_state=seed, stratify=digits.target)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    train_y, test_y = (torch.tensor(part) for part in parts[2:])
    torch.manual_seed(seed)
    batches = Batches(train_x, train_y)
    teacher = ConvolutionalNetwork()
    train_dense(teacher, batches)
    found = {"dense": accuracy(teacher, test_x, test_y)}
    calibration = engine.calibrate(teacher, batches, second_moment=True, progress=False)
    for kind in ("magnitude", "obs"):
        prune = engine.Prune(sparsity=sparsity, importance=kind)
        recipe = engine.Recipe(prune, engine.Quantize(), ignore=("convolutions.0",), guard="none")
        student = copy.deepcopy(teacher)
        report = engine.compress_(student, recipe, calibration=calibration)
        found[f"{kind}, not trained"] = accuracy(student, test_x, test_y)
    student = copy.deepcopy(teacher)
    how = {"loss": "kl", "temperature": 3.0, "learning_rate": 1e-3, "progress": False}
    engine.distill(student, teacher, batches, steps=steps, recipe=recipe, calibration=calibration, **how)
    found["distilled"] = accuracy(student, test_x, test_y)
    found["bytes, of dense"] = 100 * report.bytes_after / report.bytes_before
    return found


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the numbers to this .json")
    arguments = parser.parse_args()
    results = [run(seed, arguments.sparsity, arguments.steps) for seed in range(arguments.seeds)]
    title = f"convolutions and linears on digits, {arguments.sparsity:.0%} + int8"
    table = Table(title, f"%, mean of {len(results)} seeds", "spread")
    for name in results[0]:
        values = [result[name] for result in results]
        table.add_row(name, f"{statistics.mean(values):.2f}", f"{min(values):.2f} to {max(values):.2f}")
    Console(width=110).print(table)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
