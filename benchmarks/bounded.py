"""Searches within a limit of memory: BoundedStrategy beside its controller alone, chance, and recomputation.

    python benchmarks/bounded.py run --root DIR --out benchmarks/results/bounded
    python benchmarks/bounded.py resident --root DIR --out benchmarks/results/bounded
    python benchmarks/bounded.py report --out benchmarks/results/bounded

`run` appends one JSON line for each search to OUT/runs.jsonl; a line that is there is not made again. `report`
prints the table and writes it to OUT/table.md. DIR holds FashionMNIST/raw. Three seeds take a quarter of an hour on one
core.

The paper's space (`examples/supernet_space.py`: six layers, six candidates each), the first `--images` images of
Fashion-MNIST at 14 x 14 pixels, batches of 64, SGD with a cosine schedule; 1/11 of the images is what a controller
learns from. The limit is `--limit` of what a training step of the whole supernet holds, by the package's count: what
autograd keeps, parameters, gradients, optimizer states. It is enforced in all rows (in sequential, what is computed
again is not seen). Lengths were set for about the same CPU seconds; the table tells what they came to. Rows:

- bounded: BoundedStrategy(DNALStrategy). controller: its controller and shared weights all the time; the most likely
  candidate of every layer. random: candidates dropped at random until the rest fits, and DNALStrategy on it.
  sequential: DNALStrategy(sequential=True) on the whole space.
- whole: DNALStrategy on the whole space, within the limit. unlimited: without it.

What is found costs `--flops` MACs: DNAL's by its budget, the controller's by one factor on the widths inside of its
blocks. It is trained from new weights on all images; accuracy is that of the last epoch on 10,000 test images. Peak:
what the meter counted at most.

`resident` asks the kernel: with 28 x 28 pixels and batches of 256, bounded and unlimited run in a process each, one
epoch and two short rounds; by how much these grow during the search goes to OUT/resident.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
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
from cells import entries, write
from memory import peak_bytes
from nas import LR, Job, network, renew, train
from nni.nas.evaluator.pytorch import DataLoader, Lightning
from provenance import provenance
from quickstart import accuracy
from supernet import Data, evaluator, fashion, held_out
from supernet_space import FASHION, Supernet
from torch import nn
from torch.utils.data import TensorDataset

from dnal_nni import BoundedStrategy, Budget, DNALError, DNALStrategy, measure
from dnal_nni.cost.memory import Meter, mib
from dnal_nni.plugin.restricted import Candidates
from dnal_nni.plugin.space import Space
from dnal_nni.plugin.strategies.bounding import Metering, Restricting
from dnal_nni.plugin.strategies.holdout import Holdout
from dnal_nni.plugin.strategies.searching import around
from dnal_nni.search.bounded import SLACK
from dnal_nni.search.subspace import Holdings, Subspace

# epochs of DNALStrategy, or rounds of the controller, that take about the same CPU seconds
LENGTHS = {"bounded": 4, "controller": 16, "random": 8, "sequential": 2, "whole": 2, "unlimited": 3}
ROWS = list(LENGTHS)
ROUNDS: dict[str, int] = {"rounds": 4, "batches": 25, "paths": 32}
SHORT: dict[str, int] = {"rounds": 2, "batches": 3, "paths": 8}


class Alone(Restricting):
    """The controller and the shared weights, without an end to the rounds."""

    def stepped(self, step: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        done = self.trainer.global_step
        if done and done % self.batches == 0:
            self.learn(lambda given: step(given, *args, **kwargs))
        self.subspace.run(self.controller.sample(uniform=done < self.batches))
        return step(batch, *args, **kwargs)

    def on_train_batch_end(self, *args: Any) -> None:
        Metering.on_train_batch_end(self, *args)


def load(args: argparse.Namespace) -> Data:
    train_x, test_x, train_y, test_y = fashion(args.root, args.images)
    if args.batch != 64:
        return train_x, test_x, train_y, test_y
    return F.avg_pool2d(train_x, 2), F.avg_pool2d(test_x, 2), train_y, test_y


def holdings_of(image: torch.Tensor, batch: int = 64) -> tuple[Subspace, Holdings]:
    """Of the whole supernet, with SGD's momentum."""
    space = Supernet(**FASHION)
    subspace = Subspace(Space(space).supernet, Candidates(space).named)
    found = subspace.measure(lambda: subspace.model(image.expand(batch, -1, -1, -1)).sum())
    return subspace, dataclasses.replace(found, states=1.0)


def at_random(image: torch.Tensor, limit: int, seed: int) -> dict[str, list[str]]:
    """Candidates that are left where others are dropped at random until the rest fits."""
    subspace, holdings = holdings_of(image)
    kept = {label: list(names) for label, names in subspace.options.items()}
    order = [(label, name) for label, names in kept.items() for name in names]
    random.Random(seed).shuffle(order)
    for label, name in order:
        if holdings.whole(kept) > (1 - SLACK) * limit and len(kept[label]) > 1:
            kept[label].remove(name)
    return kept


def given(data: Data, epochs: int, seed: int, batch: int) -> Any:
    base = evaluator(data, epochs, LR, seed, progress=False)
    shuffle = torch.Generator().manual_seed(seed)
    sets = TensorDataset(data[0], data[2]), TensorDataset(data[1], data[3])
    loaders = [DataLoader(part, batch_size=batch, shuffle=True, drop_last=True, generator=shuffle) for part in sets]
    base.trainer.limit_val_batches = 0
    return Lightning(base.module, base.trainer, *loaders)


def searched(row: str, seed: int, data: Data, limit: int, args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The network found, or the architecture; and what there is to tell."""
    torch.manual_seed(seed)
    own, budget = given(held_out(data, seed), args.lengths[row], seed, args.batch), Budget(flops=args.flops)
    if row == "bounded":
        bounded = BoundedStrategy(DNALStrategy(budget), memory=limit, **(ROUNDS if not args.resident else SHORT))
        bounded(Supernet(**FASHION), own)
        found = bounded.bound
        told = {"peak": found.peak, "predicted": found.predicted, "kept": found.kept}
        return bounded.slim_model, told | {"shrinking_seconds": round(found.seconds, 1)}
    meter = Meter(None if row == "unlimited" else limit)
    if row == "controller":
        subspace = Subspace(Space(Supernet(**FASHION), single_path=True).supernet)
        settings = {**ROUNDS, "rounds": args.lengths[row]}
        alone = Alone(subspace, meter, Holdout(own, row), limit, None, **settings)
        own.trainer.callbacks.append(alone)
        own.trainer.fit_loop.max_epochs, own.trainer.fit_loop.epoch_loop.max_steps = -1, alone.steps
        with around(own.module, alone.stepped), meter.watching():
            own.evaluate(subspace.model)
        likely = {label: alone.controller.probabilities(label) for label in subspace.options}
        return {label: max(p, key=lambda name: p[name]) for label, p in likely.items()}, {"peak": meter.peak}
    space: Any = Supernet(**FASHION)
    told = {}
    if row == "random":
        told["kept"] = at_random(data[0][:1], limit, seed)
        space = Candidates(space).restricted(told["kept"])
    strategy = DNALStrategy(budget, sequential=row == "sequential")
    own.trainer.callbacks.append(Metering(meter))
    with meter.watching():
        strategy(space, own)
    return strategy.slim_model, told | {"peak": meter.peak}


def one(row: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """A search, and the training of what it found."""
    data = load(args)
    subspace, holdings = holdings_of(data[0][:1], args.batch)
    whole = holdings.whole(subspace.options)
    limit = int(args.limit * whole)
    told: dict[str, Any] = {"whole": whole, "limit": limit, "path": holdings.path(subspace.options)}
    del subspace, holdings
    start, wall = time.process_time(), time.perf_counter()
    found: list[Any] = []
    try:
        grown = peak_bytes(lambda: found.extend(searched(row, seed, data, limit, args)), "cpu")
    except DNALError as error:
        return told | {"died": str(error), "cpu_seconds": round(time.process_time() - start, 1)}
    told |= {"cpu_seconds": round(time.process_time() - start, 1), "seconds": round(time.perf_counter() - wall, 1)}
    result, more = found
    if args.resident:
        return told | more | {"resident": grown}
    job = Job(row, seed, "fashion", str(args.root), args.images, args.flops, 0, args.retrain, 0, 0.0)
    model: nn.Module = network(job, result, data[0][:1]) if isinstance(result, dict) else result()
    if isinstance(result, dict):
        told["architecture"] = result
    cost = measure(copy.deepcopy(model), data[0][:1])
    renew(model, seed)
    train(model, data, args.retrain, seed)
    return told | more | {"accuracy": accuracy(model, data[1], data[3]), "flops": cost.flops, "params": cost.params}


def run(args: argparse.Namespace) -> None:
    path = args.out / "runs.jsonl"
    for seed in args.seeds:
        for row in args.rows:
            names = ("images", "limit", "flops", "retrain")
            job = {"row": row, "seed": seed, "length": args.lengths[row]}
            job |= {name: getattr(args, name) for name in names}
            if any(entry["job"] == job for entry in entries(path)):
                continue
            result = one(row, seed, args)
            write(path, {"job": job, **result, **provenance("cpu", "torch", "nni", "pytorch_lightning")})
            print(row, seed, result.get("accuracy", result.get("died")), result["cpu_seconds"], "s", flush=True)


def child(row: str, seed: int, args: argparse.Namespace, *options: str) -> dict[str, Any]:
    """What `one` prints in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "one", "--rows", row, "--seeds", str(seed)]
    command += ["--root", str(args.root), *options]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def resident(args: argparse.Namespace) -> None:
    lengths = json.dumps(dict.fromkeys(LENGTHS, 1))
    for row in ("bounded", "unlimited"):
        result = child(row, 0, args, "--batch", "256", "--resident", "--images", "2816", "--lengths", lengths)
        write(args.out / "resident.jsonl", {"row": row, **result, **provenance("cpu", "torch", "nni")})
        print(row, result, flush=True)


def interval(values: list[float]) -> str:
    """Mean and two standard errors."""
    error = 2 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.2f} ± {error:.2f}"


def report(args: argparse.Namespace) -> None:
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries(args.out / "runs.jsonl"):
        runs[entry["job"]["row"]].append(entry)
    heads = ["row", "seeds", "ended by the limit", "accuracy (%)", "bounded less this row", "peak (MiB)"]
    heads += ["search (CPU s)", "MMACs", "parameters"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    ours = {entry["job"]["seed"]: entry["accuracy"] for entry in runs["bounded"]}
    for row in (row for row in ROWS if row in runs):
        ended = [entry for entry in runs[row] if "died" not in entry]
        died = f"{len(runs[row]) - len(ended)} of {len(runs[row])}"
        if not ended:
            needs = f"more than {runs[row][0]['limit'] / 2**20:.1f}"
            rows.append(f"| {row} | {len(runs[row])} | {died} | | | {needs} | | | |")
            continue
        both = [entry for entry in ended if entry["job"]["seed"] in ours]
        less = interval([ours[entry["job"]["seed"]] - entry["accuracy"] for entry in both]) if row != "bounded" else ""
        peaks = f"{max(entry['peak'] for entry in ended) / 2**20:.1f} at most"
        mean = {key: statistics.mean(e[key] for e in ended) for key in ("cpu_seconds", "flops", "params")}
        right = interval([entry["accuracy"] for entry in ended])
        rows.append(
            f"| {row} | {len(ended)} | {died} | {right} | {less} | {peaks} | {mean['cpu_seconds']:.0f} | "
            f"{mean['flops'] / 1e6:.3f} | {mean['params']:.0f} |"
        )
    first = runs["bounded"][0]
    rows.append(
        f"\nA step of the whole supernet holds {mib(first['whole'])}, the largest single path {mib(first['path'])}; "
        f"the limit is {mib(first['limit'])}."
    )
    print("\n".join(rows))
    (args.out / "table.md").write_text("\n".join(rows) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "resident", "report", "one"), help="`one` is what `resident` starts")
    parser.add_argument("--root", type=Path, default=Path("data"), help="directory of FashionMNIST/raw")
    parser.add_argument("--out", type=Path, default=Path("out/bounded"))
    parser.add_argument("--images", type=int, default=1920)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--resident", action="store_true", help="of `one`: the search alone, and how the process grows")
    parser.add_argument("--limit", type=float, default=0.4, help="of what a step of the whole supernet holds")
    parser.add_argument("--flops", type=float, default=8e4, help="MACs of what is found")
    parser.add_argument("--retrain", type=int, default=8, help="epochs of what was found")
    parser.add_argument("--lengths", type=json.loads, default=LENGTHS, help="epochs, or rounds, of every row: JSON")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.command == "one":
        print(json.dumps(one(args.rows[0], args.seeds[0], args)))
    else:
        {"run": run, "resident": resident, "report": report}[args.command](args)


if __name__ == "__main__":
    main()
