"""Train a small residual CNN on scikit-learn's handwritten digits, halve its FLOPs, and compare.

    python examples/quickstart.py --out out

Under a minute on one CPU core; nothing is downloaded. Expect some 99 % accuracy before and after. Writes to OUT:
slim.safetensors, the smaller network, for dnal_nni.load_compressed; report.html, to look at; report.json, for programs;
widths.png, a picture.
"""

import argparse
import json
import logging
import os
import shlex
import sys
import time
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm.auto import tqdm

from dnal_nni import Budget, DNALPruner, save_compressed
from dnal_nni.cost.latency import latencies

BATCH = 64


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, fan_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or fan_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(fan_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def network() -> nn.Module:
    layers: dict[str, nn.Module] = {
        "stem": nn.Conv2d(1, 16, 3, 1, 1, bias=False),
        "bn": nn.BatchNorm2d(16),
        "relu": nn.ReLU(),
        "block1": Block(16, 16, 1),
        "block2": Block(16, 32, 2),
        "block3": Block(32, 64, 2),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "classifier": nn.Linear(64, 10),
    }
    return nn.Sequential(OrderedDict(layers))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images ``[n, 1, 8, 8]`` of -1 to 1, 1,347 to train on and 450 others, then the labels ``[n]`` of both."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target)
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    return train_x, test_x, train_y, test_y


def batches(images: Tensor, labels: Tensor, epochs: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """All batches of some epochs, each image shifted by up to one pixel."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(BATCH)[:-1]:
            dy, dx = torch.randint(-1, 2, (2,), generator=generator).tolist()
            result.append((images[chosen].roll((dy, dx), (2, 3)), labels[chosen]))
    return result


def train(model: nn.Module, data: list[tuple[Tensor, Tensor]], lr: float, what: str) -> None:
    """SGD with a one-cycle learning rate."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(data), pct_start=0.2)
    model.train()
    for images, labels in tqdm(data, desc=what, unit="step"):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * float((model.eval()(images).argmax(1) == labels).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--flops", type=float, default=0.5, help="fraction of the FLOPs to keep")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # what takes how long, and what the bars show
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # the network is small: more threads would spend their time waiting for each other

    train_x, test_x, train_y, test_y = digits()
    model = network()
    train(model, batches(train_x, train_y, 25, args.seed), 0.1, "train")
    before = accuracy(model, test_x, test_y)
    dense = network()
    dense.load_state_dict(model.state_dict())

    pruner = DNALPruner(model, [{"op_types": ["Conv2d"]}], dummy_input=test_x[:2], budget=Budget(flops=args.flops))
    data = batches(train_x, train_y, 15, args.seed + 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)
    model.train()
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / f"search-{args.seed}.safetensors"  # killed, the same command goes on from here
    if checkpoint.exists():
        pruner.load_checkpoint(checkpoint, optimizer)
    with pruner.search(steps=len(data), optimizer=optimizer) as search:
        for x, y in data[search.done :]:
            search.step(F.cross_entropy(model(x), y))
            if search.done % 50 == 0:
                pruner.save_checkpoint(checkpoint, optimizer)
    slim = pruner.speedup()
    update_bn(data[:20], slim)
    cut = accuracy(slim, test_x, test_y)
    train(slim, batches(train_x, train_y, 20, args.seed + 2), 0.05, "fine-tune")

    report = pruner.report
    report.command = shlex.join(["python", *sys.argv])
    report.accuracy, report.accuracy_cut = (before, accuracy(slim, test_x, test_y)), cut
    dense_ms, slim_ms = latencies([dense, slim], test_x)
    report.latency_ms = (dense_ms, slim_ms)
    report.notes.append(f"latency is that of a batch of {len(test_x)} images of 8 x 8, on one thread")
    print(report)

    result = {
        name: {
            "flops": size.flops,
            "params": size.params,
            "accuracy": report.accuracy[i],
            "latency_ms": report.latency_ms[i],
        }
        for i, (name, size) in enumerate([("before", report.before), ("after", report.after)])
    }
    result |= {"max_abs_diff": report.max_abs_diff, "seconds": time.perf_counter() - start, "target": args.flops}
    partial = args.out / "report.json.partial"
    partial.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(partial, args.out / "report.json")
    save_compressed(slim, args.out / "slim.safetensors", report)
    report.plot_widths(args.out / "widths.png")
    (args.out / "report.html").write_text(report.to_html())
    checkpoint.unlink(missing_ok=True)
    print("\nwritten:")
    for name, what in (
        ("slim.safetensors", "the smaller network: load_compressed(network(), path)"),
        ("report.html", "how it came about, to look at"),
        ("report.json", "the same for programs"),
        ("widths.png", "channels before and after"),
    ):
        print(f"  {args.out / name}  {what}")


if __name__ == "__main__":
    main()
