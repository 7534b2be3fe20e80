"""Which inputs the nodes of a cell should read: TopologyStrategy beside DARTS's rule, on all 18 topologies of a cell.

    python benchmarks/topology.py truth --out benchmarks/results/topology
    python benchmarks/topology.py search --out benchmarks/results/topology
    python benchmarks/topology.py report --out benchmarks/results/topology

`truth` trains every topology alone from `--truths` seeds, `search` lets the methods find one, `report` prints the table
and writes it to OUT/table.md. A line that is there is not made again.

The space: a cell of three nodes on two inputs, each node with two inputs and a 3x3 convolution on each, so that
1 x 3 x 6 = 18 topologies are there; it stands twice, and the second one reads the first one and what that read. Data:
scikit-learn's digits, `--images` of them to learn from, the other ones to test on (no search sees them). The operation
is fixed, so that nothing but the topology decides. Methods, all of which learn from the same batches as their weights,
with the same logits' rate:

- subsets: TopologyStrategy, a probability for every pair. edges: one for every input, with the passive-aggressive term;
  free: without it. An invalid topology counts as such; the two strongest inputs are then taken.
- strength: every input weighted by its share against "none", and the two strongest taken: DARTS's rule.
- cooled strength: that, at the temperatures of TopologyStrategy.

Regret: mean accuracy of the best topology less that of the one found, both from `truth`. Tau: Kendall's, of the truth
with the probabilities (or sums of shares) that the method gives the 18 in the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
from cells import entries, train, write
from nni.nas.evaluator.pytorch import Lightning
from nni.nas.nn.pytorch import Cell, ModelSpace
from nni.nas.space import model_context
from provenance import provenance
from quickstart import digits
from scipy.stats import kendalltau
from supernet import Data, evaluator
from torch import Tensor, nn

from dnal_nni import Topology, TopologyStrategy
from dnal_nni.plugin.strategies.topology import Wired
from dnal_nni.search.topology import Edges, TopologyScores

LR, WIDTH = 0.05, 6
PAIRS = [list(itertools.combinations(range(inputs), 2)) for inputs in (2, 3, 4)]
TOPOLOGIES = list(itertools.product(*PAIRS))
METHODS: dict[str, Topology] = {
    "subsets": Topology(2),
    "edges": Topology(2, "edges"),
    "free": Topology(2, "edges"),
    "strength": Topology(2, "edges", temperature=(1.0, 1.0)),
    "cooled strength": Topology(2, "edges"),
}


def conv(i: int, k: int, j: int | None) -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, bias=False), nn.BatchNorm2d(WIDTH))


def narrow(inputs: int) -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(inputs, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH))


class Space(ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, WIDTH, 3, 2, 1, bias=False), nn.BatchNorm2d(WIDTH))
        self.first, self.second = (Cell({"conv": conv}, 3, 2, 2, label="cell") for _ in range(2))
        self.side, self.between, self.last = narrow(WIDTH), narrow(3 * WIDTH), nn.Linear(3 * WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.between(self.first([x, self.side(x)]))
        out: Tensor = self.last(torch.relu(self.second([x, y])).mean((2, 3)))
        return out


class Searched(TopologyStrategy):
    """TopologyStrategy whose scores can be those of a method of this file."""

    def __init__(self, method: str, arch_lr: float) -> None:
        super().__init__(METHODS[method], arch_lr=arch_lr)
        self.method = Measured(topology=self.topology, arch_lr=arch_lr, name=method)


class Strength(Edges):
    """An input's weight is its share against "none"; how many stay is a question for later."""

    def chosen(self, logits: Tensor) -> Tensor:
        return torch.zeros(len(logits), dtype=torch.bool).index_fill(0, logits.topk(self.sizes[0]).indices, True)


@dataclasses.dataclass(frozen=True)
class Measured(Wired):
    name: str = "subsets"

    def scores(self, model: nn.Module, plan: Any, steps: int) -> TopologyScores:
        made = super().scores(model, plan, steps)
        if "strength" in self.name:
            made.wires = [w and Strength(w.label, w.inputs, w.sizes) for w in made.wires]
        made.held = self.name == "edges"
        return made


def load(args: argparse.Namespace) -> Data:
    train_x, test_x, train_y, test_y = digits()
    images, labels = torch.cat([train_x, test_x]), torch.cat([train_y, test_y])
    return images[: args.images], images[args.images :], labels[: args.images], labels[args.images :]


def built(topology: Any, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sample = {f"cell/op_{2 + node}_{k}": "conv" for node in range(3) for k in range(2)}
    sample |= {f"cell/input_{2 + node}_{k}": [j] for node, pair in enumerate(topology) for k, j in enumerate(pair)}
    with model_context(sample):
        return Space()


def truth(args: argparse.Namespace) -> None:
    data, path = load(args), args.out / "truth.jsonl"
    for seed in range(1000, 1000 + args.truths):
        for topology in TOPOLOGIES:
            job = {"topology": [list(pair) for pair in topology], "seed": seed, "images": args.images}
            if not any(entry["job"] == job for entry in entries(path)):
                right = train(built(topology, seed), data, args.epochs, seed)
                write(path, {"job": job, "accuracy": right, "epochs": args.epochs})


def known(out: Path) -> dict[Any, float]:
    found = defaultdict(list)
    for entry in entries(out / "truth.jsonl"):
        found[tuple(map(tuple, entry["job"]["topology"]))].append(entry["accuracy"])
    return {topology: statistics.mean(runs) for topology, runs in found.items()}


def noise(out: Path) -> str:
    """How well the means are known: what differs between seeds for all topologies alike is no part of it."""
    runs = {(str(e["job"]["topology"]), e["job"]["seed"]): e["accuracy"] for e in entries(out / "truth.jsonl")}
    topologies, seeds = ({key[i] for key in runs} for i in (0, 1))
    by_topology = {t: statistics.mean(runs[t, s] for s in seeds) for t in topologies}
    by_seed = {s: statistics.mean(runs[t, s] for t in topologies) for s in seeds}
    whole = statistics.mean(runs.values())
    left = [(right - by_topology[t] - by_seed[s] + whole) ** 2 for (t, s), right in runs.items()]
    variance = sum(left) / ((len(topologies) - 1) * (len(seeds) - 1))
    return f"{len(seeds)} seeds each, standard error of a mean beside the others {math.sqrt(variance / len(seeds)):.2f}"


def search(args: argparse.Namespace) -> None:
    data, path = load(args), args.out / "found.jsonl"
    for seed in args.seeds:
        for method in args.methods:
            job = {"method": method, "seed": seed, "images": args.images, "epochs": args.searched}
            if any(entry["job"] == job for entry in entries(path)):
                continue
            torch.manual_seed(seed)
            given: Lightning = evaluator(data, args.searched, LR, seed, progress=False)
            given.trainer.limit_val_batches = 0
            strategy, start = Searched(method, args.arch_lr), time.perf_counter()
            strategy(Space(), given)
            last = strategy.pruner.session.last
            assert last is not None and isinstance(last.scores, TopologyScores)
            wired = zip(last.scores.wires, last.scores.logits.detach().split(last.scores.sizes))
            decisions = [(wires, logits) for wires, logits in wired if wires]
            pairs, score = [(0, 1)], {}
            invalid = 0
            for wires, logits in sorted(decisions, key=lambda pair: pair[0].label):
                kept = wires.chosen(logits)
                if int(kept.sum()) != 2:
                    invalid += 1
                    kept = torch.zeros(len(kept), dtype=torch.bool).index_fill(0, logits.topk(2).indices, True)
                pairs.append(tuple(kept.nonzero().flatten().tolist()))
                each = logits if method == "subsets" else [sum(logits[i] for i in p) for p in PAIRS[wires.inputs - 2]]
                score[wires.inputs] = dict(zip(PAIRS[wires.inputs - 2], map(float, each)))
            ranked = [score[3][t[1]] + score[4][t[2]] for t in TOPOLOGIES]
            write(path, {
                "job": job, "topology": pairs, "invalid": invalid, "ranked": ranked,
                "seconds": round(time.perf_counter() - start, 1), **provenance("cpu", "torch", "nni"),
            })  # fmt: skip
            print(method, seed, pairs, invalid, flush=True)


def report(args: argparse.Namespace) -> None:
    right, runs = known(args.out), defaultdict(list)
    best, order = max(right.values()), [right[t] for t in TOPOLOGIES]
    for entry in entries(args.out / "found.jsonl"):
        regret = best - right[tuple(map(tuple, entry["topology"]))]
        tau = kendalltau(order, entry["ranked"]).statistic
        tau = 0.0 if math.isnan(tau) else tau
        runs[entry["job"]["method"]].append((regret, tau, entry["invalid"], entry["seconds"]))
    rows = ["| method | seeds | regret (points) | tau | invalid topologies | search (s) |", "|---" * 6 + "|"]
    for method in (m for m in METHODS if m in runs):
        regret, tau, invalid, seconds = zip(*runs[method])
        error = 2 * statistics.stdev(regret) / math.sqrt(len(regret)) if len(regret) > 1 else math.nan
        wrong = sum(map(bool, invalid))
        rows.append(
            f"| {method} | {len(regret)} | {statistics.mean(regret):.2f} ± {error:.2f} | {statistics.mean(tau):.2f} | "
            f"{wrong} of {len(regret)} | {statistics.mean(seconds):.0f} |"
        )
    rows.append(f"| a random topology | all | {best - statistics.mean(order):.2f} | 0 | | |")
    spread = f"{min(order):.2f} to {best:.2f} %, sd {statistics.stdev(order):.2f}"
    rows.append(f"\nThe 18 topologies: {spread}; {noise(args.out)}.")
    print("\n".join(rows))
    (args.out / "table.md").write_text("\n".join(rows) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("truth", "search", "report"))
    parser.add_argument("--out", type=Path, default=Path("out/topology"))
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--epochs", type=int, default=30, help="of each topology alone")
    parser.add_argument("--searched", type=int, default=24, help="epochs of a search")
    parser.add_argument("--truths", type=int, default=6, help="seeds of each topology alone")
    parser.add_argument("--arch-lr", type=float, default=4.0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    {"truth": truth, "search": search, "report": report}[args.command](args)


if __name__ == "__main__":
    main()
