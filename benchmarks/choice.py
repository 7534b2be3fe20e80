"""Networks that were trained for a few epochs: a choice without a search, a search, one share for all layers.

    python benchmarks/choice.py --data DIR --out benchmarks/results/choice.jsonl
    python benchmarks/choice.py --table --out benchmarks/results/choice.jsonl

DIR as in `peers.py`. ResNet-20 at half width on the first 6,400 images of a data set: 8 epochs, then 6 in all (batch
64, bfloat16 autocast or float32, SGD with Nesterov momentum 0.9, weight decay 5e-4, lr 0.1 and then 0.05, 5 % warm-up
and half a cosine; mirrored and shifted at random). choice: `choose(batches=...)` and `repair` on 512 images. uniform:
the same share of every group by its norms, and `repair`. taylor: torch-pruning's criterion on 8 batches, over all
groups, and `repair`. search: the default search for 2 of the epochs, the weights learning too; norms re-estimated. One
JSON line a run; lines that are there are not repeated. Accuracies are of all test images. `--table` prints means and
standard deviations, and by how much choice is ahead of the others, paired by seed, with its 95 % interval (Student's
t).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from cuts import uniform_ranks
from peers import load
from provenance import provenance
from scipy.stats import t
from tabulate import tabulate
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import update_bn

from dnal_nni import Budget
from dnal_nni.plan import Plan
from dnal_nni.search.close import cut
from dnal_nni.search.importance import importance
from dnal_nni.session import Session

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from cifar_data import augmented
from cifar_models import MODELS

METHODS = ("choice", "uniform", "taylor", "search")
NAMES = ("dataset", "model", "precision", "seed", "budget", "method")
WIDTH, SUBSET, BATCH, TRAINED, EPOCHS, SEARCHED, IMAGES = 0.5, 6400, 64, 8, 6, 2, 512


class Bench:
    """A data set, and what is done on it."""

    def __init__(self, root: Path, dataset: str, model: str, precision: str) -> None:
        train, self.test = load(dataset, root, True), load(dataset, root, False)
        self.train = train._replace(pixels=train.pixels[:SUBSET], labels=train.labels[:SUBSET])
        self.model, self.steps, self.precision = model, SUBSET // BATCH, precision

    def normalised(self, pixels: Tensor) -> Tensor:
        scales = zip(self.train.mean, self.train.std)
        channels = [(pixels[..., i].float() - 255 * m) / (255 * s) for i, (m, s) in enumerate(scales)]
        return torch.stack(channels * (3 // len(channels)), 1)

    def batches(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        for rows in torch.randperm(SUBSET, generator=generator).split(BATCH):
            pixels = augmented(self.train.pixels[rows], generator, flips=self.train.flips)
            yield self.normalised(pixels), self.train.labels[rows]

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with self.autocast():
            return F.cross_entropy(model(images), labels)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        model.eval()
        right = 0
        for pixels, labels in zip(self.test.pixels.split(1000), self.test.labels.split(1000)):
            with self.autocast():
                right += int((model(self.normalised(pixels)).argmax(1) == labels).sum())
        return 100 * right / len(self.test.labels)

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.SGD:
        return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def fit(self, model: nn.Module, seed: int, first: int, epochs: int, lr: float) -> nn.Module:
        optimizer, steps = self.optimizer(model, lr), epochs * self.steps
        warm_up = max(1, round(0.05 * steps))
        schedule = LambdaLR(
            optimizer,
            lambda t: min((t + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * max(0, t - warm_up) / (steps - warm_up))),
        )
        for epoch in range(epochs):
            model.train()
            for images, labels in self.batches(seed, first + epoch):
                optimizer.zero_grad()
                self.loss(model, images, labels).backward()
                optimizer.step()
                schedule.step()
        return model

    def cut(self, dense: nn.Module, method: str, budget: float, seed: int) -> tuple[nn.Module, int]:
        """The smaller network, and the epochs that it took."""
        images = torch.cat([images for images, _ in itertools.islice(self.batches(seed, 60), IMAGES // BATCH)])
        plan = Plan.of(dense, images[:1], budget=Budget(flops=budget))
        session = Session(dense, plan)
        if method == "search":
            with session.search(SEARCHED * self.steps, optimizer=self.optimizer(dense, 0.05), progress=False) as search:
                for epoch in range(SEARCHED):
                    dense.train()
                    for batch in self.batches(seed, epoch):
                        search.step(self.loss(dense, *batch))
            slim = session.speedup()
            update_bn(((images,) for images, _ in itertools.islice(self.batches(seed, 60), 50)), slim)
            return slim, SEARCHED
        if method == "choice":
            session.choose(batches=images.split(BATCH))
        elif method == "taylor":
            batches = itertools.islice(self.batches(seed, 60), IMAGES // BATCH)
            session.choose(tp.importance.TaylorImportance(), list(batches))
        else:
            assert plan.objective is not None
            ranks, ones = uniform_ranks(importance(dense, plan.active), plan.sizes), [1] * len(plan.sizes)
            keep = cut(plan.objective, ranks, ones, lambda units: plan.cost_of(units, dense))
            session.harden(plan.by_group(keep))
        slim = session.speedup()
        session.repair(slim, images)
        return slim, 0

    def run(self, dense: nn.Module, method: str, budget: float, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        start = time.process_time()
        slim, spent = self.cut(copy.deepcopy(dense), method, budget, seed)
        found = {"accuracy_cut": self.accuracy(slim)}
        self.fit(slim, seed, 100, EPOCHS - spent, 0.05)
        return found | {"accuracy": self.accuracy(slim), "cpu_seconds": time.process_time() - start}


def table(lines: list[dict[str, Any]]) -> str:
    runs: dict[tuple[str, str, float, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in lines:
        runs[line["dataset"], line["precision"], line["budget"], line["method"]][line["seed"]] = line
    rows = []
    for (dataset, precision, budget, method), found in sorted(runs.items()):
        after, end = ([line[name] for line in found.values()] for name in ("accuracy_cut", "accuracy"))
        ours = runs[dataset, precision, budget, METHODS[0]]
        ahead = [ours[seed]["accuracy"] - line["accuracy"] for seed, line in found.items() if seed in ours]
        gap = ""
        if method != METHODS[0] and len(ahead) > 1:
            half = t.ppf(0.975, len(ahead) - 1) * statistics.stdev(ahead) / math.sqrt(len(ahead))
            gap = f"{statistics.mean(ahead):+.2f} ± {half:.2f}"
        cells = [f"{statistics.mean(x):.2f} ± {statistics.stdev(x) if len(x) > 1 else 0:.2f}" for x in (after, end)]
        rows.append([dataset, precision, f"{budget:.0%}", method, len(found), *cells, gap])
    head = ["data", "precision", "FLOPs", "method", "seeds", "right after the cut", "in the end", "choice is ahead by"]
    return tabulate(rows, head, tablefmt="github")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dataset", choices=("fashion_mnist", "cifar10"), default="fashion_mnist")
    parser.add_argument("--model", choices=tuple(MODELS), default="resnet20")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.2], help="FLOPs to keep")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="fp32 without AVX512 or AMX")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if args.table:
        print(table(lines))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = {tuple(line[name] for name in NAMES) for line in lines}
    bench = Bench(args.data, args.dataset, args.model, args.precision)
    for seed in range(args.seeds):
        of = args.dataset, args.model, args.precision, seed
        jobs = [(*of, budget, method) for budget in args.budgets for method in args.methods]
        if all(job in done for job in jobs):
            continue
        torch.manual_seed(seed)
        dense = bench.fit(MODELS[args.model](10, WIDTH), seed, 0, TRAINED, 0.1)
        uncut = bench.accuracy(dense)
        for job in jobs:
            if job not in done:
                line = dict(zip(NAMES, job)) | {"uncut": uncut} | bench.run(dense, job[5], job[4], seed)
                line |= provenance("cpu", "torch", "torch-pruning", "fvcore")
                with args.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(job, *(round(line[name], 2) for name in ("uncut", "accuracy_cut", "accuracy")), flush=True)


if __name__ == "__main__":
    main()
