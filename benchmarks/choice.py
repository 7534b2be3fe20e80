"""Networks trained here: a choice without a search, a search, one share for all layers, other criteria.

    python benchmarks/choice.py --data DIR --out benchmarks/results/choice.jsonl
    python benchmarks/choice.py --data DIR --out benchmarks/results/choice.jsonl --dataset cifar10 --images 50000 \
        --trained 30 --epochs 10 --dense benchmarks/results/converged --budgets 0.5 0.35 0.2
    python benchmarks/choice.py --table --out benchmarks/results/choice.jsonl

DIR as in `peers.py`. ResNet-20 at half width on the first `--images` images of a data set: `--trained` epochs, then
`--epochs` in all (batch 64, bfloat16 autocast with channels last or float32, SGD with Nesterov momentum 0.9, weight
decay 5e-4, lr 0.1 and then 0.05, 5 % warm-up and half a cosine; mirrored and shifted at random). `--dense`: a folder
for the trained weights, which are read from there if they are there, and for what each epoch of theirs came to.

choice: `choose(batches=...)` and `repair`, as `compress` does. search: the default search for a third of the epochs,
the weights learning too. uniform: the same share of every group by its norms. taylor: torch-pruning's criterion on 8
batches, over all groups. torch_pruning: its own MagnitudePruner, global, in 200 steps. uncut: the network itself,
trained on for as many epochs. +repair: `repair` on 512 images; without, norms are re-estimated. +teacher: half of the
loss is the divergence from what the trained network says. One JSON line a run; lines that are there are not repeated.
Accuracies are of all test images. `--table` prints means and standard deviations, and by how much choice is ahead of
the others, paired by seed, with its 95 % interval (Student's t).
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
from cuts import by_torch_pruning, uniform_ranks
from peers import load
from provenance import provenance
from safetensors.torch import load_file, save_file
from scipy.stats import t
from tabulate import tabulate
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import update_bn

from dnal_nni import Budget, measure
from dnal_nni.plan import Plan
from dnal_nni.search.close import cut
from dnal_nni.search.importance import importance
from dnal_nni.session import Session

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from cifar_data import augmented
from cifar_models import MODELS

REPAIR, TEACHER = "+repair", "+teacher"
CUT = ("choice", "search", "uniform", "taylor", "torch_pruning", "uniform+repair", "taylor+repair")
METHODS = ("uncut", *CUT, *(method + TEACHER for method in CUT))
SETTINGS = ("dataset", "model", "precision", "images", "trained", "epochs")
NAMES = (*SETTINGS, "seed", "budget", "method")
WIDTH, BATCH, IMAGES = 0.5, 64, 512


class Bench:
    """A data set, and what is done on it."""

    def __init__(self, args: argparse.Namespace) -> None:
        train, self.test = load(args.dataset, args.data, True), load(args.dataset, args.data, False)
        self.train = train._replace(pixels=train.pixels[: args.images], labels=train.labels[: args.images])
        self.args, self.steps = args, -(-len(self.train.labels) // BATCH)

    def normalised(self, pixels: Tensor) -> Tensor:
        scales = zip(self.train.mean, self.train.std)
        channels = [(pixels[..., i].float() - 255 * m) / (255 * s) for i, (m, s) in enumerate(scales)]
        images = torch.stack(channels * (3 // len(channels)), 1)
        return images.contiguous(memory_format=torch.channels_last) if self.args.precision == "bf16" else images

    def batches(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        for rows in torch.randperm(len(self.train.labels), generator=generator).split(BATCH):
            pixels = augmented(self.train.pixels[rows], generator, flips=self.train.flips)
            yield self.normalised(pixels), self.train.labels[rows]

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.args.precision == "bf16")

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, teacher: nn.Module | None = None) -> Tensor:
        with self.autocast():
            said = model(images)
            loss = F.cross_entropy(said, labels)
            if teacher is None:
                return loss
            with torch.no_grad():
                taught = teacher(images)
            logs = (F.log_softmax(x.float(), 1) for x in (said, taught))
            return 0.5 * loss + 0.5 * F.kl_div(*logs, reduction="batchmean", log_target=True)

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

    def fit(
        self, model: nn.Module, seed: int, first: int, epochs: int, lr: float, teacher: nn.Module | None = None
    ) -> Iterator[dict[str, Any]]:
        """Trains; after each epoch, what it came to."""
        optimizer, steps = self.optimizer(model, lr), epochs * self.steps
        warm_up = max(1, round(0.05 * steps))
        schedule = LambdaLR(
            optimizer,
            lambda t: min((t + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * max(0, t - warm_up) / (steps - warm_up))),
        )
        for epoch in range(epochs):
            model.train()
            losses = []
            for images, labels in self.batches(seed, first + epoch):
                optimizer.zero_grad()
                loss = self.loss(model, images, labels, teacher)
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
            yield {"epoch": epoch + 1, "loss": statistics.mean(losses)}

    def dense(self, seed: int) -> nn.Module:
        """The trained network, from its file if there is one."""
        torch.manual_seed(seed)
        args, model = self.args, MODELS[self.args.model](10, WIDTH)
        name = f"{args.dataset}_{args.model}_{args.images}x{args.trained}_{seed}.safetensors"
        path = args.dense and args.dense / name
        if path and path.exists():
            model.load_state_dict(load_file(path))
            return model
        log = []
        for found in self.fit(model, seed, 0, args.trained, 0.1):
            log.append(found | {"accuracy": self.accuracy(model)})
            print("uncut", seed, log[-1], flush=True)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(model.state_dict(), path)
            path.with_suffix(".log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        return model

    def cut(self, dense: nn.Module, method: str, budget: float, seed: int, teacher: nn.Module | None) -> nn.Module:
        name, repaired = method.removesuffix(REPAIR), method == "choice" or method.endswith(REPAIR)
        images = torch.cat([images for images, _ in itertools.islice(self.batches(seed, 60), IMAGES // BATCH)])
        plan = Plan.of(dense, images[:1], budget=Budget(flops=budget))
        session = Session(dense, plan)
        if name == "search":
            epochs = self.args.epochs // 3
            with session.search(epochs * self.steps, optimizer=self.optimizer(dense, 0.05), progress=False) as search:
                for epoch in range(epochs):
                    dense.train()
                    for batch in self.batches(seed, epoch):
                        search.step(self.loss(dense, *batch, teacher))
        elif name == "choice":
            session.choose(batches=images.split(BATCH))
        elif name == "taylor":
            batches = itertools.islice(self.batches(seed, 60), IMAGES // BATCH)
            session.choose(tp.importance.TaylorImportance(), list(batches))
        else:
            assert plan.objective is not None
            ranks, ones = uniform_ranks(importance(dense, plan.active), plan.sizes), [1] * len(plan.sizes)
            keep = cut(plan.objective, ranks, ones, lambda units: plan.cost_of(units, dense))
            session.harden(plan.by_group(keep))
        slim = session.speedup()
        if repaired:
            session.repair(slim, images)
        return slim

    def run(self, dense: nn.Module, method: str, budget: float, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        start, name = time.process_time(), method.removesuffix(TEACHER)
        slim, epochs, teacher = copy.deepcopy(dense), self.args.epochs, dense.eval() if name != method else None
        image = self.normalised(self.train.pixels[:1])
        if name == "torch_pruning":
            head = [layer for layer in slim.modules() if isinstance(layer, nn.Linear)][-1]
            slim = by_torch_pruning(slim, image, head, budget)
        elif name != "uncut":
            slim = self.cut(slim, name, budget, seed, teacher)
        if name == "search":
            epochs -= epochs // 3
        if name in ("search", "uniform", "taylor", "torch_pruning"):
            update_bn(((images,) for images, _ in itertools.islice(self.batches(seed, 60), 50)), slim)
        found = {"flops": measure(slim, image).flops / measure(dense, image).flops, "accuracy_cut": self.accuracy(slim)}
        for _ in self.fit(slim, seed, 100, epochs, 0.05, teacher):
            pass
        return found | {"accuracy": self.accuracy(slim), "cpu_seconds": time.process_time() - start}


def table(lines: list[dict[str, Any]]) -> str:
    runs: dict[tuple[tuple[Any, ...], float, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in lines:
        runs[tuple(line[name] for name in SETTINGS), line["budget"], line["method"]][line["seed"]] = line
    rows = []
    for (settings, budget, method), found in sorted(runs.items()):
        after, end = ([line[name] for line in found.values()] for name in ("accuracy_cut", "accuracy"))
        ours = runs[settings, budget, "choice" + (TEACHER if method.endswith(TEACHER) else "")]
        ahead = [ours[seed]["accuracy"] - line["accuracy"] for seed, line in found.items() if seed in ours]
        gap = ""
        if not method.startswith("choice") and len(ahead) > 1:
            half = t.ppf(0.975, len(ahead) - 1) * statistics.stdev(ahead) / math.sqrt(len(ahead))
            gap = f"{statistics.mean(ahead):+.2f} ± {half:.2f}"
        cells = [f"{statistics.mean(x):.2f} ± {statistics.stdev(x) if len(x) > 1 else 0:.2f}" for x in (after, end)]
        rows.append([*settings, f"{budget:.0%}", method, len(found), *cells, gap])
    head = [*SETTINGS, "FLOPs", "method", "seeds", "right after the cut", "in the end", "choice is ahead by"]
    return tabulate(rows, head, tablefmt="github")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dataset", choices=("fashion_mnist", "cifar10"), default="fashion_mnist")
    parser.add_argument("--model", choices=tuple(MODELS), default="resnet20")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.2], help="FLOPs to keep")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(CUT))
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=6400)
    parser.add_argument("--trained", type=int, default=8, help="epochs of the uncut network")
    parser.add_argument("--epochs", type=int, default=6, help="after that, in all")
    parser.add_argument("--dense", type=Path, help="keep the trained weights there")
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
    bench, settings = Bench(args), tuple(getattr(args, name) for name in SETTINGS)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        jobs = [(*settings, seed, budget, method) for budget in args.budgets for method in args.methods]
        if all(job in done for job in jobs):
            continue
        dense = bench.dense(seed)
        uncut = bench.accuracy(dense)
        for job in jobs:
            if job not in done:
                line = dict(zip(NAMES, job)) | {"uncut": uncut} | bench.run(dense, job[-1], job[-2], seed)
                line |= provenance("cpu", "torch", "torch-pruning", "fvcore")
                with args.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(job, *(round(line[name], 2) for name in ("uncut", "accuracy_cut", "accuracy")), flush=True)


if __name__ == "__main__":
    main()
