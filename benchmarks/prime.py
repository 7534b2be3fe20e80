"""What DARTS-PRIME's schedule and regularisers change: spread over seeds, and the step from soft to one-hot.

    python benchmarks/prime.py run --root DIR --out benchmarks/results/prime
    python benchmarks/prime.py report --out benchmarks/results/prime

`run` appends one JSON line for each search to OUT/runs.jsonl; a line that is there is not made again. `report` prints
the table and writes it to OUT/table.md. DIR holds FashionMNIST/raw.

The cell of `cells.py` without its "none" (the paper's space has none; 4,096 networks), at its settings: 2,560 images,
batches of 64, SGD with a cosine schedule. 10/11 of the images are for the weights, 1/11 for the architecture; every row
has the same split, and learns the architecture in as many steps (the table tells how many). A row is

- static: after every 11th step of the weights. darts: half of the images for each, after every step.
- informed: when the weights are near rest, once in 11 steps. proximity, consensus: that, and the regulariser. static
  proximity: the regulariser alone. bounded: informed, proximity and weights that do not compete.

Measured, on 5,000 test images that no search sees: `found`, the mean of the cell found, trained from two new seeds;
by how many of the 240 random networks of `results/cells` that cost no more it is beaten; `gap`, the accuracy of the
supernet as it is mixed at the end less that of the network that is left of it with the same weights, norms of both
estimated anew; the entropy of the weights.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import cells
import pytorch_lightning as pl
import torch
from cells import LR, RETRAINED, built, cost, entries, load, train, write
from nni.nas.evaluator.pytorch import DataLoader, Lightning
from provenance import provenance
from quickstart import accuracy
from supernet import Data, evaluator
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import TensorDataset

from dnal_nni import Informed, PrimeStrategy
from dnal_nni.search.mixed import MixedSearch
from dnal_nni.search.prime import PrimeScores

cells.CELL.pop("none")
ROWS: dict[str, dict[str, Any]] = {
    "static": {"schedule": 11, "regularizer": None},
    "informed": {"schedule": Informed(10), "regularizer": None},
    "informed + proximity": {"schedule": Informed(10), "regularizer": "proximity"},
    "informed + consensus": {"schedule": Informed(10), "regularizer": "consensus"},
    "static + proximity": {"schedule": 11, "regularizer": "proximity"},
    "bounded": {"schedule": Informed(10), "regularizer": "proximity", "activation": "bounded"},
    "darts": {"schedule": 1, "regularizer": None},
}
TRUTH = Path(__file__).parent / "results" / "cells" / "cell.truth.jsonl"


class Soft(pl.Callback):
    """The accuracy of the supernet as it is mixed, ahead of what is derived."""

    def __init__(self, data: Data) -> None:
        self.data, self.accuracy = data, math.nan

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step == trainer.estimated_stepping_batches:
            self.accuracy = recalibrated(module.model, self.data)
            module.train()


def recalibrated(model: nn.Module, data: Data) -> float:
    with torch.no_grad():
        update_bn(data[0].split(64)[:20], model)
    return float(accuracy(model, data[1], data[3]))


def found(row: str, seed: int, data: Data, args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(seed)
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))
    own = round(len(order) / (2 if row == "darts" else 11))
    parts = [TensorDataset(data[0][part], data[2][part]) for part in (order[own:], order[:own])]
    base = evaluator(data, args.epochs, LR, seed, progress=False)
    shuffle = torch.Generator().manual_seed(seed)
    loaders = [DataLoader(part, batch_size=64, shuffle=True, drop_last=True, generator=shuffle) for part in parts]
    soft = Soft(data)
    base.trainer.callbacks.append(soft)
    base.trainer.limit_val_batches = 0
    strategy = PrimeStrategy(rho=args.rho, arch_lr=args.arch_lr, **ROWS[row])
    start = time.perf_counter()
    strategy(cells.SPACES["cell"](), Lightning(base.module, base.trainer, *loaders))
    seconds = time.perf_counter() - start
    (model,) = strategy.list_models()
    search = strategy.pruner.session.last
    assert isinstance(search, MixedSearch) and isinstance(search.scores, PrimeScores)
    hard = recalibrated(strategy.slim_model(), data)
    return {
        "architecture": model.sample, "soft": soft.accuracy, "hard": hard, "entropy": search.scores.entropy(),
        "architecture_steps": search.taken, "steps": search.done, "seconds": round(seconds, 1),
    }  # fmt: skip


def run(args: argparse.Namespace) -> None:
    data, path = load(args), args.out / "runs.jsonl"
    for seed in args.seeds:
        for row in args.rows:
            settings = {name: getattr(args, name) for name in ("images", "epochs", "rho", "arch_lr")}
            job = {"row": row, "seed": seed, **settings}
            if any(entry["job"] == job for entry in entries(path)):
                continue
            result = found(row, seed, data, args)
            kept = result["architecture"]
            right = [train(built("cell", kept, s), data, args.trained, s) for s in RETRAINED[:2]]
            flops = cost("cell", kept, data[0][:1])
            where = provenance("cpu", "torch", "nni", "pytorch_lightning")
            write(path, {"job": job, **result, "flops": flops, "accuracy": statistics.mean(right), **where})
            gap = result["soft"] - result["hard"]
            print(row, seed, statistics.mean(right), gap, "/".join(kept.values()), flush=True)


def interval(values: list[float]) -> str:
    """Mean and two standard errors."""
    error = 2 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.2f} ± {error:.2f}"


def report(args: argparse.Namespace) -> None:
    known, runs = entries(TRUTH), defaultdict(list)
    for entry in entries(args.out / "runs.jsonl"):
        no_more = [e["accuracy"] for e in known if e["flops"] <= entry["flops"]]
        entry["beaten"] = 100 * statistics.mean(right > entry["accuracy"] for right in no_more)
        entry["gap"] = entry["soft"] - entry["hard"]
        runs[entry["job"]["row"]].append(entry)
    heads = ["row", "seeds", "steps of the architecture", "found (%)", "spread (sd)", "beaten by (%)", "gap (points)"]
    heads += ["spread of the gap", "entropy (nats)", "MFLOPs", "search (s)"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in (row for row in ROWS if row in runs):
        column = {key: [entry[key] for entry in runs[row]] for key in runs[row][0] if key != "job"}
        mean = {key: statistics.mean(column[key]) for key in ("architecture_steps", "entropy", "flops", "seconds")}
        spread = {key: statistics.stdev(column[key]) if len(runs[row]) > 1 else math.nan for key in ("accuracy", "gap")}
        rows.append(
            f"| {row} | {len(runs[row])} | {mean['architecture_steps']:.0f} | {interval(column['accuracy'])} | "
            f"{spread['accuracy']:.2f} | {interval(column['beaten'])} | {interval(column['gap'])} | "
            f"{spread['gap']:.2f} | {mean['entropy']:.2f} | {mean['flops'] / 1e6:.2f} | {mean['seconds']:.0f} |"
        )
    print("\n".join(rows))
    (args.out / "table.md").write_text("\n".join(rows) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--root", type=Path, default=Path("data"), help="directory of FashionMNIST/raw")
    parser.add_argument("--out", type=Path, default=Path("out/prime"))
    parser.add_argument("--images", type=int, default=2560)
    parser.add_argument("--epochs", type=int, default=8, help="of the search")
    parser.add_argument("--trained", type=int, default=8, help="epochs of what was found")
    parser.add_argument("--rho", type=float, default=0.1)
    parser.add_argument("--arch-lr", type=float, default=4.0)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(8)))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    {"run": run, "report": report}[args.command](args)


if __name__ == "__main__":
    main()
