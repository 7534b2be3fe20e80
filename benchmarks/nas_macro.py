"""Searches judged by the true accuracies of all 6,561 networks of NAS-Bench-Macro (arXiv 2103.11922).

    python benchmarks/nas_macro.py search --root CIFAR --out benchmarks/results/nas_macro
    python benchmarks/nas_macro.py report --table FILE --out benchmarks/results/nas_macro

`search` appends one JSON line for each search to OUT/found.jsonl; a line that is there is not made again, so a run that
was stopped goes on where it stopped. It never opens the table. `report` does, once, at the end: it holds test
accuracies, and prints what was found and writes it to OUT/table.md. CIFAR is the directory of CIFAR-10 as images
(`examples/cifar10.py` says how), FILE is nas-bench-macro-cifar10.json.gz.

Eight layers with three candidates each: nothing (a 1x1 convolution where the shape changes), an inverted residual block
of kernel 3 and expansion 3, or of 5 and 6. Rules for all: `--images` training images, `--epochs` epochs,
batches of 64, SGD with a cosine schedule, crops and flips; no test image is seen.

- dnal: DNALStrategy(widths=False) under each budget of BANDS (the upper end).
- prime, darts, gumbel, proxyless, random_oneshot: they know no budget, and find one network each; NNI's have half of
  the images for the architecture, prime 1/11. They stand beside the networks of the table that cost no more.
- random: needs no search. The report computes what the best of n random networks of a band is, by the table itself.

A search takes about an hour on one CPU core, and minutes on a GPU.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
import torch.nn.functional as F
from cells import NNIS, entries, write
from cifar_data import augmented, load_images, normalised
from nni.nas.evaluator.pytorch import DataLoader, Lightning, LightningModule, Trainer
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.nn.pytorch import LayerChoice, ModelSpace
from nni.nas.space import RawFormatModelSpace, model_context
from provenance import provenance
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dnal_nni import Budget, DNALStrategy, PrimeStrategy, measure

BANDS = {"25-30": (25e6, 30e6), "38-42": (38e6, 42e6), "48-52": (48e6, 52e6)}
METHODS = ["dnal", "prime", *NNIS]
SHARE = {"prime": 1 / 11, **dict.fromkeys(NNIS, 0.5)}  # of the images, for the architecture
BEST_OF = (1, 5, 10, 20)
IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), *([nn.ReLU(inplace=True)] if act else []))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, expand: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.layers = nn.Sequential(
            conv(inputs, hidden, 1), conv(hidden, hidden, kernel, stride, hidden), conv(hidden, outputs, 1, act=False)
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.shortcut else y


class Macro(ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 32, 3)
        layers, width = [], 32
        for outputs, count in ((64, 2), (128, 3), (256, 3)):
            for i in range(count):
                stride = 2 if i == 0 else 1
                candidates = {
                    "0": nn.Identity() if i else conv(width, outputs, 1, stride, act=False),
                    "1": Block(width, outputs, 3, 3, stride),
                    "2": Block(width, outputs, 5, 6, stride),
                }
                layers.append(LayerChoice(candidates, label=f"layer{len(layers)}"))
                width = outputs
        self.layers = nn.Sequential(*layers)
        self.head = conv(width, 1280, 1)
        self.classifier = nn.Linear(1280, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.head(self.layers(self.stem(x))).mean((2, 3)))
        return y


def network(name: str) -> nn.Module:
    """The network of one digit a layer."""
    with model_context({f"layer{i}": digit for i, digit in enumerate(name)}):
        return Macro()


class Training(LightningModule):
    """SGD with a cosine schedule; every image is cropped from four pixels of padding, and flipped or not."""

    def __init__(self, lr: float, seed: int) -> None:
        super().__init__()
        self.lr = lr
        self.random = torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        pixels, labels = batch
        images = normalised(augmented(pixels, self.random)).contiguous(memory_format=torch.channels_last)
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: no test image is looked at."""

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, self.lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def evaluator(method: str, pixels: Tensor, labels: Tensor, args: argparse.Namespace, seed: int) -> Lightning:
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    own = round(SHARE.get(method, 0.0) * len(order))
    trainer = Trainer(
        max_epochs=args.epochs, accelerator=args.accelerator, devices=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip
    loaders = []
    for part in (order[own:], order[:own] if own else order):
        shuffle = torch.Generator().manual_seed(seed)
        data = TensorDataset(pixels[part], labels[part])
        loaders.append(DataLoader(data, batch_size=args.batch, shuffle=True, drop_last=True, generator=shuffle))
    return Lightning(Training(args.lr, seed), trainer, *loaders)


def found(method: str, band: str | None, pixels: Tensor, labels: Tensor, args: argparse.Namespace, seed: int) -> str:
    torch.manual_seed(seed)
    given, strategy = evaluator(method, pixels, labels, args, seed), None
    space = Macro().to(memory_format=torch.channels_last)  # half of the time on a CPU, where bfloat16 gains nothing
    if method in NNIS:
        strategy = NNIS[method]()
        strategy(RawFormatModelSpace(space, given), SequentialExecutionEngine())
    else:
        limit = Budget(flops=BANDS[band][1]) if band else None
        strategy = (
            PrimeStrategy(dummy_input=IMAGE) if limit is None
            else DNALStrategy(limit, widths=False, dummy_input=IMAGE)
        )  # fmt: skip
        strategy(space, given)
    (model,) = strategy.list_models(limit=1)
    return "".join(str(model.sample[f"layer{i}"]) for i in range(8))


def search(args: argparse.Namespace) -> None:
    pixels, labels, _ = load_images(args.root, True, args.images, False)
    for seed in args.seeds:
        for method in args.methods:
            for band in args.bands if method == "dnal" else [None]:
                settings = {name: getattr(args, name) for name in ("images", "epochs", "batch", "lr")}
                job = {"method": method, "band": band, "seed": seed, **settings}
                if any(entry["job"] == job for entry in entries(args.out / "found.jsonl")):
                    continue
                start = time.perf_counter()
                name = found(method, band, pixels, labels, args, seed)
                seconds = round(time.perf_counter() - start, 1)
                flops = int(measure(network(name), IMAGE).flops)
                where = provenance(args.accelerator, "torch", "nni", "pytorch_lightning")
                write(args.out / "found.jsonl", {"job": job, "name": name, "flops": flops, "seconds": seconds, **where})
                print(method, band or "", seed, name, f"{flops / 1e6:.1f} MMACs, {seconds} s", flush=True)


def report(args: argparse.Namespace) -> None:
    table = {name: (row["mean_acc"], row["flops"]) for name, row in json.load(gzip.open(args.table)).items()}
    runs: dict[tuple[str, str], list[tuple[float, float, float, float]]] = defaultdict(list)
    for entry in entries(args.out / "found.jsonl"):
        right, flops = table[entry["name"]]
        band = entry["job"]["band"]
        within = [acc for acc, cost in table.values() if cost <= flops]
        if band:
            within = [acc for acc, cost in table.values() if BANDS[band][0] <= cost <= BANDS[band][1]]
        beaten = 100 * statistics.mean(acc > right for acc in within)
        runs[entry["job"]["method"], band or "none"].append((right, beaten, flops / 1e6, entry["seconds"]))
    heads = ["method", "band (MMACs)", "seeds", "true accuracy (%)", "beaten by (%)", "MMACs", "search (s)"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (method, band), each in sorted(runs.items()):
        right, beaten, flops, seconds = zip(*each)
        spread = f"{statistics.mean(right):.2f}" + (f" ± {statistics.stdev(right):.2f}" if len(right) > 1 else "")
        rows.append(
            f"| {method} | {band} | {len(each)} | {spread} | {statistics.mean(beaten):.1f} | "
            f"{statistics.mean(flops):.1f} | {statistics.mean(seconds):.0f} |"
        )
    rng = random.Random(0)
    for band, (low, high) in BANDS.items():
        known = [acc for acc, cost in table.values() if low <= cost <= high]
        for n in BEST_OF:
            best = [max(rng.sample(known, n)) for _ in range(2000)]
            spread = f"{statistics.mean(best):.2f} ± {statistics.stdev(best):.2f}"
            rows.append(f"| random, best of {n} by the table | {band} | | {spread} | | | |")
        rows.append(f"| the best there is | {band} | | {max(known):.2f} | 0 | | |")
    print("\n".join(rows))
    (args.out / "table.md").write_text("\n".join(rows) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("search", "report"))
    parser.add_argument("--root", type=Path, default=Path("data/cifar10"), help="CIFAR-10 as a directory of images")
    parser.add_argument("--table", type=Path, default=Path("data/nas/nas-bench-macro-cifar10.json.gz"))
    parser.add_argument("--out", type=Path, default=Path("out/nas_macro"))
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--bands", nargs="+", choices=BANDS, default=list(BANDS), help="of dnal, in MMACs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    {"search": search, "report": report}[args.command](args)


if __name__ == "__main__":
    main()
