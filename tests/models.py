"""Small models that tests share."""

import torch
from torch import nn


class Mlp(nn.Module):
    """Two linears that a Bitmap makes smaller, and a tiny one that it doesn't."""

    def __init__(self, width: int = 256, outputs: int = 10) -> None:
        super().__init__()
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, outputs, bias=False)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class TinyLm(nn.Module):
    """An embedding tied to the output layer, with linears between."""

    def __init__(self, vocabulary: int = 100, width: int = 64, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=0)
        self.block = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        hidden = self.embed(tokens)
        return self.lm_head(self.norm(hidden + self.block(hidden)))


class ConvNet(nn.Module):
    """Convolutions of every kind: padded, strided, 1x1, with groups, depthwise; and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.wide = nn.Conv2d(32, 64, 3, stride=2, padding="valid", padding_mode="zeros")
        self.grouped = nn.Conv2d(64, 64, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.point = nn.Conv2d(64, 48, 1)
        self.up = nn.ConvTranspose2d(48, 32, 2, stride=2)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        for layer in (self.stem, self.wide, self.grouped, self.depthwise, self.point, self.up):
            x = torch.relu(layer(x))
        return self.head(x.mean((2, 3)))


def state_of(model: nn.Module) -> dict:
    """Everything that must not change when a verb fails: modules by identity, and tensors by value."""
    modules = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    modes = {name: module.training for name, module in model.named_modules()}
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return {"modules": modules, "modes": modes, "tensors": tensors, "hooks": hooks}


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = state_of(model)
    assert after["modules"] == before["modules"]
    assert after["modes"] == before["modes"]
    assert after["hooks"] == before["hooks"]
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, tensor in after["tensors"].items():
        assert torch.equal(tensor, before["tensors"][name]), name
