"""A small GPT over bytes, and the Python standard library's own sources to train it on."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256
HELD_OUT = 20  # every so many files, one is kept back


def rotated(x: Tensor) -> Tensor:
    """Queries or keys [batch, heads, time, size], each pair of channels turned by its place (Su et al., 2021).

    With this a head sees *how far back* a byte is. With a learned vector for each place it has to find out first, which
    takes a small model most of a short training.
    """
    time, half = x.shape[-2], x.shape[-1] // 2
    speeds = 1e4 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(time, device=x.device).unsqueeze(1) * speeds
    a, b = x.float().split(half, -1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1).to(x.dtype)


class Block(nn.Module):
    """Causal self-attention and a perceptron, each normalised before and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.perceptron_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, width] to the same."""
        split = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        mixed = F.scaled_dot_product_attention(rotated(query), rotated(key), value, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.perceptron_norm(x))))


class ByteModel(nn.Module):
    """Predicts the next byte. With its defaults it has 3.3 million parameters."""

    def __init__(self, width: int = 256, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)
        nn.init.normal_(self.bytes.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Bytes int64 [batch, time] to logits [batch, time, 256]."""
        return self.head(self.norm(self.blocks(self.bytes(x))))


def standard_library() -> tuple[Tensor, Tensor]:
    """The sources' bytes, uint8: those to train on, and those held out (every twentieth file). Tests are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__"}
    paths = [p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts)]
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for i, path in enumerate(paths):
        parts[i % HELD_OUT == 0].append(path.read_bytes())
    train, held_out = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
    return train, held_out


def batches(data: Tensor, batch: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless pairs of inputs and their next bytes, int64 [batch, context]; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(context + 1)
    while True:
        starts = torch.randint(data.numel() - context - 1, (batch, 1), generator=generator)
        rows = data[starts + window].long()
        yield rows[:, :-1], rows[:, 1:]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy in nats a byte."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, data: Tensor, context: int, windows: int = 64) -> float:
    """The mean over evenly spread windows of the held-out sources."""
    starts = torch.linspace(0, data.numel() - context - 1, windows).long().unsqueeze(1)
    rows = data[starts + torch.arange(context + 1)].long()
    model.eval()
    loss = loss_of(model, rows[:, :-1], rows[:, 1:])
    model.train()
    return loss.item()
