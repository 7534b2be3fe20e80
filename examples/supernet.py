"""Search the paper's space, {3, 5, 7} x expansion {3, 6} on every layer, on handwritten digits or Fashion-MNIST.

    python examples/supernet.py --out out/supernet
    python examples/supernet.py --data fashion --root DIR --images 10000 --epochs 10 --out out/supernet_fashion
    python examples/supernet.py --strategy prime --out out/prime
    python examples/supernet.py --strategy topology --out out/topology
    python examples/supernet.py --strategy bounded --memory 0.5 --out out/bounded

The first takes one to two minutes on one CPU core and downloads nothing; expect some 99 % accuracy. DIR holds
FashionMNIST/raw. Needs pytorch_lightning: pip install -e ".[examples,lightning]". Writes OUT/network.png, the
operations and widths that were kept, OUT/network.safetensors and OUT/report.json.

- dnal: DNALStrategy, candidates and widths under a budget. prime: PrimeStrategy, one candidate a layer; a part of the
  training images is for its architecture. topology: TopologyStrategy, on two cells: which inputs every node reads, and
  which operation on each. gates: that, with DNAL's gates under the budget. bounded: candidates are dropped until the
  supernet fits in half of the memory that it takes, then dnal searches what is left.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # NNI wraps every class of torch.nn when it is imported
    from nni.nas.evaluator.pytorch import DataLoader, Lightning, LightningModule, Trainer

from quickstart import accuracy, digits
from supernet_space import DIGITS, FASHION, Cells, Supernet

from dnal_nni import BoundedStrategy, Budget, DNALStrategy, PrimeStrategy, TopologyStrategy, save_compressed
from dnal_nni.modules.cells import Node
from dnal_nni.modules.choices import Mixture

Data = tuple[Tensor, Tensor, Tensor, Tensor]  # images to train on, to test on, labels of both


def fashion(root: Path, count: int) -> Data:
    """Images ``[n, 1, 28, 28]`` of mean 0 and deviation 1: the first ``count`` to train on, all 10,000 to test on."""

    def read(name: str, header: int) -> Tensor:
        with gzip.open(root / "FashionMNIST" / "raw" / f"{name}.gz") as file:
            return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)[header:]

    parts = []
    for name, many in (("train", count), ("t10k", 10_000)):
        images = read(f"{name}-images-idx3-ubyte", 16).view(-1, 1, 28, 28)[:many].float() / 255
        parts.append(((images - 0.2860) / 0.3530, read(f"{name}-labels-idx1-ubyte", 8)[:many].long()))
    return parts[0][0], parts[1][0], parts[0][1], parts[1][1]


class Training(LightningModule):
    """SGD with a cosine schedule; every batch is shifted by up to one pixel. The model is set by NNI."""

    def __init__(self, lr: float, seed: int = 0) -> None:
        super().__init__()
        self.lr = lr
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        dy, dx = torch.randint(-1, 2, (2,), generator=self.generator).tolist()
        return F.cross_entropy(self(images.roll((dy, dx), (2, 3))), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", 100 * (self(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, self.lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def evaluator(data: Data, epochs: int, lr: float, seed: int = 0, progress: bool = True) -> Lightning:
    """NNI's evaluator of a training on ``data``; the test images are looked at once, at its end."""
    train_x, test_x, train_y, test_y = data
    shuffle = torch.Generator().manual_seed(seed)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=progress, check_val_every_n_epoch=epochs, num_sanity_val_steps=0,
    )  # fmt: skip
    return Lightning(
        Training(lr, seed),
        trainer,
        DataLoader(TensorDataset(train_x, train_y), batch_size=64, shuffle=True, drop_last=True, generator=shuffle),
        DataLoader(TensorDataset(test_x, test_y), batch_size=500),
    )


def layers(supernet: nn.Module, slim: nn.Module) -> dict[str, dict[str, tuple[int, int]]]:
    """By layer and candidate, the width inside of it that was kept, and the one it had."""
    cut = dict(slim.named_modules())

    def width(candidate: nn.Module | None) -> int:
        if candidate is None:
            return 0
        convs = [m for m in candidate.modules() if isinstance(m, nn.Conv2d)]
        return convs[-1].in_channels if convs else 1

    return {
        module.label: {name: (width(cut.get(f"{path}.{name}")), width(getattr(module, name))) for name in module.names}
        for path, module in supernet.named_modules()
        if isinstance(module, Mixture)
    }


def table(kept: dict[str, dict[str, tuple[int, int]]]) -> str:
    rows = [f"{'layer':16}kept"]
    for label, candidates in kept.items():
        stays = [f"{name} {now}/{before}" for name, (now, before) in candidates.items() if now]
        rows.append(f"{label:16}{', '.join(stays)}")
    return "\n".join(rows)


def picture(kept: dict[str, dict[str, tuple[int, int]]], title: str, path: Path) -> None:
    """A square for every candidate of every layer, as dark as it is wide; empty where it was removed."""
    from matplotlib.figure import Figure

    names = sorted({name for row in kept.values() for name in row})
    widths = [[row.get(name, (0, 1)) for row in kept.values()] for name in names]
    share = [[now / before for now, before in row] for row in widths]
    figure = Figure(figsize=(2 + 0.9 * len(kept), 1.5 + 0.5 * len(names)), layout="constrained")
    axes = figure.add_subplot(title=title)
    widest = max(max(row) for row in share)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=widest, aspect="auto")
    for y, row in enumerate(widths):
        for x, (now, before) in enumerate(row):
            dark = "white" if now > 0.6 * widest * before else "black"
            axes.text(x, y, f"{now}/{before}" if now else "", ha="center", va="center", color=dark, fontsize=8)
    axes.set_xticks(range(len(kept)), list(kept), rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    figure.colorbar(image, label="channels kept")
    figure.savefig(path, dpi=120)


def wiring(slim: nn.Module, title: str, path: Path) -> None:
    """The nodes of a cell, what each of them reads, and by which operation."""
    from matplotlib.figure import Figure

    nodes = {module.label: module for module in slim.modules() if isinstance(module, Node)}
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot(title=title)
    axes.set_axis_off()
    place = {0: (0.0, 1.0), 1: (0.0, -1.0)} | {j: (2.0 * (j - 1), 0.5 * (-1) ** j) for j in range(2, 2 + len(nodes))}
    for number, (x, y) in place.items():
        name = f"input {number}" if number < 2 else f"node {number - 1}"
        axes.text(x, y, name, ha="center", va="center", bbox={"boxstyle": "round", "facecolor": "lightblue"})
    for number, node in enumerate(nodes.values(), 2):
        for source, edge in node.edges.items():
            (x0, y0), (x1, y1) = place[source], place[number]
            arrow = {"arrowstyle": "-|>", "shrinkA": 25, "shrinkB": 25}
            axes.annotate("", (x1, y1), (x0, y0), arrowprops=arrow)
            what = " + ".join(unit.rpartition("_from_")[0] for unit in edge.units)
            axes.text(0.45 * x0 + 0.55 * x1, 0.45 * y0 + 0.55 * y1, what, ha="center", fontsize=8, color="darkred")
    axes.set_xlim(-1, 2 * len(nodes) + 1)
    axes.set_ylim(-1.5, 1.5)
    figure.savefig(path, dpi=120)


def held_out(data: Data, seed: int) -> Data:
    """The training images alone: ten elevenths for the weights, the rest for an architecture, as its tests."""
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))
    own, rest = order[len(order) // 11 :], order[: len(order) // 11]
    return data[0][own], data[0][rest], data[2][own], data[2][rest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=("dnal", "prime", "topology", "gates", "bounded"), default="dnal")
    parser.add_argument("--data", choices=("digits", "fashion"), default="digits")
    parser.add_argument("--root", type=Path, default=Path("data"), help="directory of FashionMNIST/raw")
    parser.add_argument("--images", type=int, default=60_000, help="of Fashion-MNIST, to train on")
    parser.add_argument("--flops", type=float, default=0.15, help="budget: a fraction of the supernet's, or a number")
    parser.add_argument("--epochs", type=int, default=20, help="of the search, half of them its warmup")
    parser.add_argument("--retrain", type=int, help="epochs of the network found; as many by default")
    parser.add_argument("--single-path", action="store_true", help="one candidate a layer")
    parser.add_argument("--memory", type=float, default=0.5, help="of bounded: bytes, or a fraction of the supernet's")
    parser.add_argument("--sequential", action="store_true", help="one candidate in memory at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/supernet"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="(torch|pytorch_lightning|nni).*")
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    data = digits() if args.data == "digits" else fashion(args.root, args.images)
    space: Any = Supernet(**(DIGITS if args.data == "digits" else FASHION))
    strategy: Any = DNALStrategy(Budget(flops=args.flops), single_path=args.single_path, sequential=args.sequential)
    seen = data
    if args.strategy == "prime":
        strategy = PrimeStrategy(sequential=args.sequential)
        seen = held_out(data, args.seed)
    elif args.strategy == "bounded":
        strategy = BoundedStrategy(strategy, memory=args.memory)
        seen = held_out(data, args.seed)
    elif args.strategy in ("topology", "gates"):
        space, budget = Cells(), Budget(flops=args.flops) if args.strategy == "gates" else None
        ops = "softmax" if budget is None else "gates"
        strategy = TopologyStrategy(ops=ops, budget=budget, sequential=args.sequential)
    strategy(space, evaluator(seen, args.epochs, 0.05, args.seed))
    searched = time.perf_counter() - start
    slim = strategy.slim_model()
    kept = layers(strategy.supernet, slim)
    print(f"{strategy.report}\n\n{table(kept)}\n")

    evaluator(data, args.retrain or args.epochs, 0.05, args.seed).evaluate(slim)
    right = accuracy(slim, data[1], data[3])
    found = strategy.report.after
    print(f"accuracy {right:.2f} %, {found.flops / 1e6:.3f} MFLOPs, {found.params} parameters, search {searched:.0f} s")

    title = f"{right:.1f} % with {found.flops / 1e6:.2f} MFLOPs"
    if isinstance(space, Cells):
        wiring(slim, title, args.out / "network.png")
    else:
        picture(kept, title, args.out / "network.png")
    save_compressed(slim, args.out / "network.safetensors")
    result = {
        "accuracy": right, "flops": found.flops, "params": found.params, "supernet_flops": strategy.report.before.flops,
        "search_seconds": searched, "seconds": time.perf_counter() - start, "kept": kept,
    }  # fmt: skip
    partial = args.out / "report.json.partial"
    partial.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(partial, args.out / "report.json")
    print(f"written: {args.out / 'network.png'}, {args.out / 'network.safetensors'}, {args.out / 'report.json'}")


if __name__ == "__main__":
    main()
