"""DNALStrategy beside NNI's one-shot strategies and random search, on the paper's space.

    python benchmarks/nas.py run --data fashion --root DIR --out benchmarks/results/nas
    python benchmarks/nas.py report --out benchmarks/results/nas

`run` appends one JSON line per run to OUT/runs.jsonl; a run whose line is there is not repeated, so a stopped benchmark
goes on where it stopped. Every run is a process of its own, whose largest resident size is the peak memory. `report`
prints the table and writes it to OUT/table.md. DIR holds FashionMNIST/raw; digits are scikit-learn's.

Rules for all: the same space (`examples/supernet_space.py`), training images, SGD and schedule; `--epochs` epochs of
search, then `--retrain` epochs of the network found; the last epoch's accuracy on test images that nothing else sees.
The network found costs `--flops` MACs (fvcore): DNAL's by its budget, any other's by one factor on the widths inside of
its blocks, as near as whole channels allow. Accuracies are compared at what was reached, which the table tells.

- darts, gumbel, proxyless: NNI's, with half of the images for weights and half for the architecture, as in DARTS.
- random_oneshot: NNI's supernet trained on random paths, of which it exports a random one.
- random: `--samples` architectures, each trained for an equal share of the epochs of search; the best one on a fifth of
  the images is retrained. random_one: a single one, retrained, with no search. random_long: that one, trained for the
  epochs of the search too; cheapest_long: the cheapest candidate everywhere, likewise.
- dnal: goes on with the weights of the search, as the paper does; dnal_scratch: those networks from new weights, as
  for all others; dnal_single: one candidate a layer, from new weights.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
warnings.filterwarnings("ignore", module="(torch|pytorch_lightning|nni|fvcore).*")

import torch
from nni.nas import strategy as nnis
from nni.nas.evaluator.pytorch import DataLoader, Lightning
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import RawFormatModelSpace, model_context
from quickstart import accuracy, digits
from supernet import Data, evaluator, fashion
from supernet_space import DIGITS, FASHION, Supernet
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dnal_nni import Budget, DNALStrategy, measure

NNIS: dict[str, Any] = {
    "darts": nnis.DARTS, "gumbel": nnis.GumbelDARTS, "proxyless": nnis.Proxyless, "random_oneshot": nnis.RandomOneShot
}  # fmt: skip
METHODS = ["dnal", "dnal_scratch", "dnal_single", *NNIS, "random", "random_one", "random_long", "cheapest_long"]
LR = 0.05


@dataclasses.dataclass(frozen=True)
class Job:
    """One run. ``samples`` and ``warmup`` matter to some methods only."""

    method: str
    seed: int
    data: str
    root: str
    images: int
    flops: float
    epochs: int
    retrain: int
    samples: int
    warmup: float

    @property
    def config(self) -> dict[str, Any]:
        return DIGITS if self.data == "digits" else FASHION


def load(job: Job) -> Data:
    return digits() if job.data == "digits" else fashion(Path(job.root), job.images)


def split(data: Data, share: float, seed: int) -> tuple[Data, Data]:
    """The training images in two parts, the second with ``share`` of them; both with themselves as test images."""
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))
    cut = round((1 - share) * len(order))
    return tuple((data[0][i], data[0][i], data[2][i], data[2][i]) for i in (order[:cut], order[cut:]))


def loader(images: Tensor, labels: Tensor, seed: int) -> Any:
    shuffle = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True, drop_last=True, generator=shuffle)


def train(model: nn.Module, data: Data, epochs: int, seed: int) -> None:
    evaluator(data, epochs, LR, seed, progress=False).evaluate(model)


def network(job: Job, architecture: dict[str, Any], image: Tensor) -> nn.Module:
    """One architecture, its blocks as wide as the MACs allow."""

    def build(hidden: float) -> nn.Module:
        with model_context(architecture):
            return Supernet(**job.config, hidden=hidden)

    low, high = 0.02, 8.0
    for _ in range(14):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if measure(build(middle), image).flops <= job.flops else (low, middle)
    hidden = min((low, high), key=lambda factor: abs(measure(build(factor), image).flops - job.flops))
    torch.manual_seed(job.seed)
    return build(hidden)


def sampled(job: Job, rng: random.Random) -> dict[str, Any]:
    return {label: rng.choice(choice.values) for label, choice in Supernet(**job.config).simplify().items()}


def nni_search(job: Job, data: Data) -> dict[str, Any]:
    weights, gates = split(data, 0.5, job.seed)
    base = evaluator(data, job.epochs, LR, job.seed, progress=False)
    given = Lightning(
        base.module, base.trainer, loader(weights[0], weights[2], job.seed), loader(gates[0], gates[2], job.seed)
    )
    strategy = NNIS[job.method]()
    strategy(RawFormatModelSpace(Supernet(**job.config), given), SequentialExecutionEngine())
    (model,) = strategy.list_models(limit=1)
    architecture: dict[str, Any] = model.sample
    return architecture


def random_search(job: Job, data: Data) -> dict[str, Any]:
    training, held = split(data, 0.2, job.seed)
    rng = random.Random(job.seed)
    found = [sampled(job, rng) for _ in range(job.samples)]
    each = max(1, job.epochs // job.samples)
    scores = []
    for architecture in found:
        model = network(job, architecture, data[0][:1])
        train(model, training, each, job.seed)
        scores.append(accuracy(model, held[0], held[2]))
    return found[scores.index(max(scores))]


def renew(model: nn.Module, seed: int) -> None:
    """New weights."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm)):
            module.reset_parameters()


def one(job: Job) -> dict[str, Any]:
    """Run a job in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    data, start = load(job), time.perf_counter()
    image = data[0][:1]
    architecture: Any
    if job.method.startswith("dnal"):
        budget = Budget(flops=job.flops)
        strategy = DNALStrategy(budget, warmup=job.warmup, single_path=job.method == "dnal_single")
        strategy(Supernet(**job.config), evaluator(data, job.epochs, LR, job.seed, progress=False))
        model = strategy.slim_model()
        architecture = {g.name: [g.kept, g.units] for g in strategy.report.groups}
        if job.method != "dnal":
            renew(model, job.seed)
    else:
        if job.method in ("random_one", "random_long"):
            architecture = sampled(job, random.Random(job.seed))
        elif job.method == "cheapest_long":
            architecture = {label: choice.values[0] for label, choice in Supernet(**job.config).simplify().items()}
        else:
            architecture = random_search(job, data) if job.method == "random" else nni_search(job, data)
        model = network(job, architecture, image)
    searched = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cost = measure(copy.deepcopy(model), image)
    before = time.perf_counter()
    train(model, data, job.retrain + (job.epochs if job.method.endswith("_long") else 0), job.seed)
    return {
        "accuracy": accuracy(model, data[1], data[3]), "flops": cost.flops, "params": cost.params,
        "search_seconds": searched, "retrain_seconds": time.perf_counter() - before, "peak_bytes": memory,
        "architecture": architecture, "epochs": job.retrain + (0 if job.method == "random_one" else job.epochs),
    }  # fmt: skip


def run(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "runs.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    done = {json.dumps(json.loads(line)["job"], sort_keys=True) for line in lines}
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    versions = {name: version(name) for name in ("torch", "nni", "pytorch_lightning")}
    for seed in args.seeds:
        for method in args.methods:
            job = Job(
                method, seed, args.data, str(args.root), args.images, args.flops, args.epochs, args.retrain,
                args.samples, args.warmup,
            )  # fmt: skip
            key = {name: value for name, value in dataclasses.asdict(job).items() if name != "root"}
            if json.dumps(key, sort_keys=True) in done:
                continue
            print(f"{method}, seed {seed} ...", flush=True)
            command = [sys.executable, "-W", "ignore", __file__, "one", json.dumps(dataclasses.asdict(job))]
            process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if process.returncode:
                print(f"{method}, seed {seed} failed: see above", flush=True)
                continue
            result = json.loads(process.stdout.splitlines()[-1])
            context = {"commit": commit, "python": platform.python_version(), **versions, "device": platform.machine()}
            with log.open("a") as file:
                file.write(json.dumps({"job": key, **result, **context}) + "\n")
            print(f"  {result['accuracy']:.2f} % with {result['flops'] / 1e6:.3f} MFLOPs", flush=True)


def report(args: argparse.Namespace) -> None:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in (args.out / "runs.jsonl").read_text().splitlines():
        entry = json.loads(line)
        found[entry["job"]["method"]].append(entry)
    heads = ["method", "seeds", "accuracy (%)", "MFLOPs", "parameters", "search (s)", "peak memory (MiB)"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for method in sorted(found, key=lambda m: -statistics.mean(e["accuracy"] for e in found[m])):
        runs = found[method]
        mean = {key: statistics.mean(e[key] for e in runs) for key in runs[0] if isinstance(runs[0][key], (int, float))}
        spread = statistics.stdev(e["accuracy"] for e in runs) if len(runs) > 1 else float("nan")
        rows.append(
            f"| {method} | {len(runs)} | {mean['accuracy']:.2f} ± {spread:.2f} | {mean['flops'] / 1e6:.3f} | "
            f"{mean['params']:.0f} | {mean['search_seconds']:.0f} | {mean['peak_bytes'] / 2**20:.0f} |"
        )
    print("\n".join(rows))
    (args.out / "table.md").write_text("\n".join(rows) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report", "one"))
    parser.add_argument("job", nargs="?", help="of `one`: which `run` starts")
    parser.add_argument("--out", type=Path, default=Path("out/nas"))
    parser.add_argument("--data", choices=("digits", "fashion"), default="fashion")
    parser.add_argument("--root", type=Path, default=Path("data"), help="directory of FashionMNIST/raw")
    parser.add_argument("--images", type=int, default=10_000, help="of Fashion-MNIST, to train on")
    parser.add_argument("--flops", type=float, default=3e5, help="MACs of the network found")
    parser.add_argument("--epochs", type=int, default=10, help="of the search")
    parser.add_argument("--retrain", type=int, default=10)
    parser.add_argument("--samples", type=int, default=5, help="architectures of the random search")
    parser.add_argument("--warmup", type=float, default=0.5, help="of DNALStrategy")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    if args.command == "one":
        print(json.dumps(one(Job(**json.loads(args.job)))))
    elif args.command == "run":
        run(args)
    else:
        report(args)


if __name__ == "__main__":
    main()
