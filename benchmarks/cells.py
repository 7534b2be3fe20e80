"""What searches find in small spaces, beside the true ranking of their networks: a judge that cannot be fooled.

    python benchmarks/cells.py truth --space cell --root DIR --out benchmarks/results/cells
    python benchmarks/cells.py search --space cell --root DIR --out benchmarks/results/cells
    python benchmarks/cells.py report --out benchmarks/results/cells

`truth` trains `--networks` random networks of a space alone, from new weights, and writes a line for each to
OUT/SPACE.truth.jsonl. `search` runs methods at budgets and seeds, trains what they find in the same way, and appends to
OUT/SPACE.found.jsonl. A line that is there is not made again. Of every network found, `report` says by how many of the
random ones that cost no more than the budget it is beaten (NNI's strategies know none: than it costs itself). DIR
holds FashionMNIST/raw.

- dnal: DNALStrategy(widths=False). gates: the same search by the gates and the price that widths are searched with.
- random_spent: a random network that spends as much of the budget as dnal's must. darts, gumbel, proxyless,
  random_oneshot: NNI's, one half of the images for weights and the other for the architecture.

Rules for all: `--images` images of Fashion-MNIST at half their size, `--epochs` epochs, batches of 64, SGD with a
cosine schedule, one shift of a pixel a batch; the last epoch's accuracy on 5,000 test images that nothing else sees. A
search sees the training images, for as many epochs. Spaces:

- cell: five operations (none, skip, average pooling, 1x1 and 3x3 convolution) on each of the six edges of a cell of
  four nodes; the cell stands at two widths, 15,625 networks.
- chain: six layers, each nothing, or an inverted residual block of kernel 3 and expansion 2, or of 5 and 4; 729
  networks.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
warnings.filterwarnings("ignore", module="(torch|pytorch_lightning|nni|fvcore).*")

import torch
import torch.nn.functional as F
from nni.nas import strategy as nnis
from nni.nas.evaluator.pytorch import DataLoader, Lightning
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.nn.pytorch import LayerChoice, ModelSpace
from nni.nas.space import RawFormatModelSpace, model_context
from quickstart import accuracy
from supernet import Data, evaluator, fashion
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dnal_nni import Budget, DNALStrategy, measure
from dnal_nni.plan import Method
from dnal_nni.plugin.space import supernet
from dnal_nni.search.paths import SPENT

LR = 0.05
RETRAINED = (100, 101, 102)  # seeds of what was found
NNIS: dict[str, Any] = {
    "darts": nnis.DARTS, "gumbel": nnis.GumbelDARTS, "proxyless": nnis.Proxyless, "random_oneshot": nnis.RandomOneShot
}  # fmt: skip
METHODS = ["dnal", "gates", "random_spent", *NNIS]
Make = Callable[[int], nn.Module]


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.0


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, **kwargs: Any) -> nn.Sequential:
    padding = kwargs.get("dilation", 1) * (kernel // 2)
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False, **kwargs)
    return nn.Sequential(nn.ReLU(), layer, nn.BatchNorm2d(outputs))


CELL: dict[str, Make] = {
    "none": lambda c: Zero(),
    "skip": lambda c: nn.Identity(),
    "conv1": lambda c: conv(c, c, 1),
    "conv3": lambda c: conv(c, c, 3),
    "pool": lambda c: nn.AvgPool2d(3, 1, 1),
}
EDGES = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]


class Cell(nn.Module):
    """Nodes that sum what the edges from all earlier ones give; the last node goes on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.edges = nn.ModuleList(
            LayerChoice({name: make(width) for name, make in CELL.items()}, label=f"edge{i}{j}") for i, j in EDGES
        )

    def forward(self, x: Tensor) -> Tensor:
        nodes = {0: x}
        for (i, j), edge in zip(EDGES, self.edges):
            nodes[j] = nodes[j] + edge(nodes[i]) if j in nodes else edge(nodes[i])
        return nodes[3]


class Cells(ModelSpace):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width))
        self.first = Cell(width)
        self.down = conv(width, 2 * width, 3, 2)
        self.second = Cell(2 * width)
        self.norm = nn.BatchNorm2d(2 * width)
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.down(self.first(self.stem(x))))
        y: Tensor = self.fc(torch.relu(self.norm(x)).mean((2, 3)))
        return y


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, expand: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden),
            conv(hidden, hidden, kernel, stride, groups=hidden), nn.ReLU(),
            nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.shortcut else y


class Chain(ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        layers, width = [], 8
        for i, (outputs, stride) in enumerate([(12, 2), (12, 1), (12, 1), (16, 2), (16, 1), (16, 1)]):
            less = nn.Identity() if stride == 1 else nn.Sequential(
                nn.Conv2d(width, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )  # fmt: skip
            candidates = {
                "nothing": less,
                "k3e2": Block(width, outputs, 3, 2, stride),
                "k5e4": Block(width, outputs, 5, 4, stride),
            }
            layers.append(LayerChoice(candidates, label=f"layer{i}"))
            width = outputs
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(torch.relu(self.layers(self.stem(x))).mean((2, 3)))
        return y


SPACES: dict[str, Callable[[], ModelSpace]] = {"cell": Cells, "chain": Chain}


def built(space: str, architecture: dict[str, str], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    with model_context(architecture):
        return SPACES[space]().to(memory_format=torch.channels_last)


def train(model: nn.Module, data: Data, epochs: int, seed: int) -> float:
    """As the evaluator of `examples/supernet.py` does, without what Lightning costs a step; accuracy in percent."""
    generator, images, labels = torch.Generator().manual_seed(seed), data[0], data[2]
    steps = len(images) // 64
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator)[: steps * 64].split(64):
            dy, dx = torch.randint(-1, 2, (2,), generator=generator).tolist()
            loss = F.cross_entropy(model(images[batch].roll((dy, dx), (2, 3))), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return float(accuracy(model, data[1], data[3]))


def cost(space: str, architecture: dict[str, str], image: Tensor) -> int:
    return int(measure(built(space, architecture, 0), image).flops)


def load(args: argparse.Namespace) -> Data:
    train_x, test_x, train_y, test_y = fashion(args.root, args.images)
    train_x, test_x = (F.avg_pool2d(x, 2).contiguous(memory_format=torch.channels_last) for x in (train_x, test_x))
    return train_x, test_x[:5000], train_y, test_y[:5000]


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def truth(args: argparse.Namespace) -> None:
    data, path, rng = load(args), args.out / f"{args.space}.truth.jsonl", random.Random(0)
    choices = {label: list(choice.values) for label, choice in SPACES[args.space]().simplify().items()}
    done = [entry["architecture"] for entry in entries(path)]
    wanted: list[dict[str, str]] = []
    while len(wanted) < args.networks:
        architecture = {label: rng.choice(values) for label, values in choices.items()}
        if architecture not in wanted:
            wanted.append(architecture)
    for seed, architecture in enumerate(wanted):
        if architecture in done:
            continue
        start = time.perf_counter()
        right = train(built(args.space, architecture, seed), data, args.epochs, seed)
        entry = {"architecture": architecture, "flops": cost(args.space, architecture, data[0][:1]), "accuracy": right}
        write(path, {**entry, "seconds": round(time.perf_counter() - start, 2)})


class ByGates(DNALStrategy):
    """Candidates alone by the gates that widths are searched with: how it was before whole paths were compared."""

    def mutate_evaluator(self, evaluator: Any) -> Any:
        evaluator = super().mutate_evaluator(evaluator)
        self.pruner.session.method, self.widths = Method(), True
        return evaluator


def found(method: str, space: str, share: float, seed: int, data: Data, epochs: int) -> dict[str, str]:
    """The architecture that a method finds for this share of the supernet's MACs."""
    torch.manual_seed(seed)
    given, model, choices = evaluator(data, epochs, LR, seed, progress=False), SPACES[space](), {}
    if method in NNIS:
        weights, gates = (TensorDataset(data[0][part], data[2][part]) for part in torch.arange(len(data[0])).chunk(2))
        loaders = [DataLoader(part, batch_size=64, shuffle=True, drop_last=True) for part in (weights, gates)]
        given = Lightning(given.module, given.trainer, *loaders)
        strategy = NNIS[method]()
        strategy(RawFormatModelSpace(model, given), SequentialExecutionEngine())
    elif method == "random_spent":
        choices = {label: list(choice.values) for label, choice in model.simplify().items()}
        limit, rng = share * whole(space, data[0][:1]), random.Random(seed)
        tried = [{label: rng.choice(values) for label, values in choices.items()} for _ in range(300)]
        costs = [cost(space, architecture, data[0][:1]) for architecture in tried]
        most = max(c for c in costs if c <= limit)
        return next(a for a, c in zip(tried, costs) if SPENT * most <= c <= limit)
    else:
        strategy = (ByGates if method == "gates" else DNALStrategy)(Budget(flops=share), widths=False)
        strategy(model, given)
    (one,) = strategy.list_models(limit=1)
    architecture: dict[str, str] = one.sample
    return architecture


def whole(space: str, image: Tensor) -> int:
    return int(measure(supernet(SPACES[space]()), image).flops)


def search(args: argparse.Namespace) -> None:
    data, path = load(args), args.out / f"{args.space}.found.jsonl"
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    for method in args.methods:
        for share in [1.0] if method in NNIS else args.shares:
            for seed in args.seeds:
                job = {"method": method, "share": share, "seed": seed, "images": args.images, "epochs": args.epochs}
                if any(entry["job"] == job for entry in entries(path)):
                    continue
                start = time.perf_counter()
                architecture = found(method, args.space, share, seed, data, args.epochs)
                seconds = round(time.perf_counter() - start, 1)
                right = [train(built(args.space, architecture, s), data, args.epochs, s) for s in RETRAINED]
                write(path, {
                    "job": job, "architecture": architecture, "flops": cost(args.space, architecture, data[0][:1]),
                    "limit": share * whole(args.space, data[0][:1]), "accuracy": statistics.mean(right),
                    "seconds": seconds, "commit": commit, "torch": torch.__version__, "threads": 1,
                })  # fmt: skip
                print(method, share, seed, statistics.mean(right), "/".join(architecture.values()), flush=True)


def report(args: argparse.Namespace) -> None:
    heads = ["space", "method", "of the MACs", "seeds", "beaten by (%)", "accuracy (%)", "spent (%)", "search (s)"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for space in SPACES:
        known, runs = entries(args.out / f"{space}.truth.jsonl"), defaultdict(list)
        for entry in entries(args.out / f"{space}.found.jsonl"):
            no_more = [e["accuracy"] for e in known if e["flops"] <= entry["limit"]]
            if entry["job"]["method"] in NNIS:  # they know no budget
                no_more = [e["accuracy"] for e in known if e["flops"] <= entry["flops"]]
            beaten = 100 * statistics.mean(accuracy > entry["accuracy"] for accuracy in no_more)
            spent = 100 * entry["flops"] / entry["limit"]
            runs[entry["job"]["method"], entry["job"]["share"]].append(
                (beaten, entry["accuracy"], spent, entry["seconds"])
            )
        for (method, share), found_by in sorted(runs.items()):
            beaten, right, spent, seconds = (statistics.mean(column) for column in zip(*found_by))
            each = ", ".join(f"{run[0]:.0f}" for run in found_by)
            rows.append(
                f"| {space} | {method} | {'' if method in NNIS else share} | {len(found_by)} | {beaten:.1f} ({each}) | "
                f"{right:.2f} | {spent:.0f} | {seconds:.0f} |"
            )
    print("\n".join(rows))
    (args.out / "table.md").write_text("\n".join(rows) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("truth", "search", "report"))
    parser.add_argument("--space", choices=SPACES, default="cell")
    parser.add_argument("--root", type=Path, default=Path("data"), help="directory of FashionMNIST/raw")
    parser.add_argument("--out", type=Path, default=Path("out/cells"))
    parser.add_argument("--images", type=int, default=2560)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--networks", type=int, default=200, help="of the truth")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.15, 0.3, 0.45], help="of the supernet's MACs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    {"truth": truth, "search": search, "report": report}[args.command](args)


if __name__ == "__main__":
    main()
