"""Networks, data and a folder to work in, for tests of the command line."""

from importlib import import_module
from pathlib import Path

import torch
from PIL import Image

from dnal_nni import load_compressed
from dnal_nni.cli.main import main
from dnal_nni.cli.run import NETWORK

NETS = """
import torch
from torch import nn

def net(width=12, classes=3):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 16, 3, padding=1), nn.BatchNorm2d(16, momentum=0.01), nn.ReLU(), nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes),
    )

def plain(classes=3):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, classes, 3))

def breaks():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 3))
"""
DATA = """
import torch
from torch.utils.data import DataLoader, TensorDataset

def _set(n, classes=3):
    generator = torch.Generator().manual_seed(n)
    labels = torch.arange(n) % classes
    colours = torch.eye(3)[labels % 3].view(n, 3, 1, 1)
    return TensorDataset(colours + 0.5 * torch.randn(n, 3, 8, 8, generator=generator), labels)

def loaders():
    return DataLoader(_set(48), 12, shuffle=True), DataLoader(_set(30), 30)

def no_test():
    return DataLoader(_set(24), 12, shuffle=True), None

def too_many_classes():
    return DataLoader(_set(48, 7), 12, shuffle=True), None

def empty():
    return DataLoader(_set(8), 12, drop_last=True), None

def images_only():
    return DataLoader(_set(8).tensors[0], 4), None

def float_labels():
    return DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.rand(8)), 4), None

def torn():
    inputs, labels = _set(12).tensors
    return [(inputs, labels), inputs], None

def below_zero():
    inputs, labels = _set(12).tensors
    return [(inputs, labels - 1)], None

def nan():
    return DataLoader(TensorDataset(torch.full((8, 3, 8, 8), float("nan")), torch.zeros(8).long()), 4), None

def double():
    inputs, labels = _set(12).tensors
    return DataLoader(TensorDataset(inputs.double(), labels), 4), None

def datasets():
    return _set(12), _set(12)

def one():
    return DataLoader(_set(12), 4)

def endless():
    return iter([]), None

def single():
    return []

def raises():
    raise RuntimeError("no disk")
"""


SHORT = ["--search-epochs", "2", "--epochs", "2", "--flops", "0.5"]


def compress(*arguments: str, out: str = "run") -> int:
    return main(["compress", "mynets:net", *SHORT, "--out", out, *arguments])


def pictures(folder: Path, per_class: int) -> None:
    """Squares of one colour with noise, 12 x 10 pixels, by class."""
    generator = torch.Generator().manual_seed(per_class)
    for i, name in enumerate(("blue", "green", "red")):
        (folder / name).mkdir(parents=True)
        for k in range(per_class):
            pixels = 60 + 80 * torch.rand(10, 12, 3, generator=generator)
            pixels[..., 2 - i] += 100
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / name / f"{k}.png")


def same_networks(a: Path, b: Path) -> bool:
    nets = [load_compressed(import_module("mynets").net(), path / NETWORK).state_dict() for path in (a, b)]
    return all(torch.equal(x, nets[1][name]) for name, x in nets[0].items())
