"""DNAL beside its peers: same trained weights, same total epochs (search included), same fvcore MACs.

    python benchmarks/peers.py run --data DIR --out benchmarks/results/peers --datasets cifar10 --models resnet20
    python benchmarks/peers.py report --out benchmarks/results/peers

`run` appends one JSON line per run to OUT/runs.jsonl; a run whose line is there is not repeated, so a stopped benchmark
goes on where it stopped. `report` makes table.md and curves.png from the lines. DIR holds cifar10/{train,test}/<class>/
images (or torchvision's cifar-10-batches-py) and FashionMNIST/raw; digits are scikit-learn's.

Rules for all: a trained network, then `--epochs` epochs in all; a method that searches or trains sparsely does so
inside of them. Every cut hits the budget to the channel with the same code, in the method's own order of removal, and
has its norms re-estimated on 50 batches. The accuracy is the last epoch's, of the physically smaller network. How the
runs are trained, many at once: engine.py. Methods whose names end in "+teacher" learn from the uncut network too, in
every epoch after its training.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import gzip
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from cifar_data import load_images
from cifar_models import MODELS
from cuts import Job, gated, image, network, new_weights, physical
from engine import Data, Net, batches, run_all
from methods import METHODS, Run
from torch import nn

from dnal_nni import measure

RECALIBRATION_BATCHES = 50
RUNS = LINES = "runs.jsonl"  # ablations.py writes lines of its own


# ---------------------------------------------------------------------------------------------------------------------
# Data


def idx_file(path: Path) -> np.ndarray:
    """An array in the format of the MNIST files."""
    raw = gzip.decompress(path.read_bytes())
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def load(dataset: str, root: Path, train: bool) -> Data:
    """One split of a data set, as images of 32 x 32 pixels."""
    if dataset == "cifar10":
        images = load_images(root / "cifar10", train, 0, False)
        return Data(images.pixels, images.labels, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), True)
    if dataset == "fashion_mnist":
        name = "train" if train else "t10k"
        pixels = idx_file(root / "FashionMNIST" / "raw" / f"{name}-images-idx3-ubyte.gz")
        labels = idx_file(root / "FashionMNIST" / "raw" / f"{name}-labels-idx1-ubyte.gz")
        padded = torch.from_numpy(np.pad(pixels, ((0, 0), (2, 2), (2, 2))))[..., None]
        return Data(padded, torch.from_numpy(labels).long(), (0.2190,), (0.3318,), True)
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = train_test_split(np.arange(1797), test_size=0.25, stratify=digits.target, random_state=0)[0 if train else 1]
    small = torch.tensor(digits.images[rows] * 15.9, dtype=torch.float32)[:, None]
    pixels = F.interpolate(small, scale_factor=4, mode="bilinear").permute(0, 2, 3, 1)
    return Data(pixels.to(torch.uint8), torch.tensor(digits.target[rows]), (0.3,), (0.36,), False)


def load_cached(dataset: str, args: argparse.Namespace) -> tuple[Data, Data]:
    """Both splits on the device; decoded once and kept beside the trained weights."""
    path = args.work / f"{dataset}.pt"
    if not path.exists():
        splits = [load(dataset, args.data, train) for train in (True, False)]
        write_whole(path, [tuple(split) for split in splits])
    train, test = (Data(*split) for split in torch.load(path, weights_only=True))
    if args.subset:
        train = train._replace(pixels=train.pixels[: args.subset], labels=train.labels[: args.subset])
    return train.to(args.device), test.to(args.device)


def write_whole(path: Path, value: object) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    torch.save(value, partial)
    os.replace(partial, path)


# ---------------------------------------------------------------------------------------------------------------------
# Runs

SETTINGS = ("pretrain_epochs", "epochs", "search_epochs", "pretrain_lr", "lr", "batch_size", "subset", "precision")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SETTINGS}


class Bench:
    """What all runs share."""

    def __init__(self, args: argparse.Namespace, pool: concurrent.futures.Executor) -> None:
        self.args, self.pool = args, pool
        self.data = {name: load_cached(name, args) for name in args.datasets}
        self.nets: dict[str, Net] = {}
        self.objectives = {}
        for model in args.models:
            job = Job("", model, args.width, 0.5, "", 0)
            self.nets[model] = Net(gated(network(job), 0.5), args.device, args.precision)
            for budget in args.budgets:
                self.objectives[model, budget] = gated(network(job), budget).plan.objective

    def pretrain(self, job: Job) -> Generator[None, None, dict[str, Any]]:
        run, start = Run(self, job), time.perf_counter()
        run.load(network(job).state_dict())
        yield from run.training(run.ones(), run.cosine(self.args.pretrain_lr, self.args.pretrain_epochs), 0).steps()
        accuracy = yield from run.net.accuracy(run.weights, run.ones(), run.test)
        write_whole(self.args.work / job.weights, run.state())
        size = measure(network(job), image())
        found = {"accuracy": accuracy, "flops": size.flops, "params": size.params}
        return {**found, "seconds": time.perf_counter() - start}

    def compress(self, job: Job) -> Generator[None, None, dict[str, Any]]:
        args, run, start = self.args, Run(self, job), time.perf_counter()
        run.load(torch.load(args.work / job.weights, weights_only=True))
        keep, found = yield from METHODS[job.method](run)
        g = keep.to(run.net.device).float()
        found["seconds_to_cut"] = time.perf_counter() - start
        epochs, first = args.epochs - found.get("epochs", 0), found.get("epochs", 0)
        if job.method == "uniform_scratch":
            run.load((yield from run.elsewhere(new_weights, keep)))
            epochs = args.pretrain_epochs + args.epochs
            lr = run.cosine(args.pretrain_lr, epochs)
        else:
            found["accuracy_cut"] = yield from run.net.accuracy(run.weights, g, run.test)
            run.net.recalibrate(
                run.weights, g, batches(run.net, run.train, args.batch_size, job.seed, RECALIBRATION_BATCHES)
            )
            found["accuracy_recalibrated"] = yield from run.net.accuracy(run.weights, g, run.test)
            cycle = args.epochs if found.pop("one_cycle", False) else epochs
            lr = run.cosine(args.lr, cycle)[-epochs * run.per_epoch :]
        yield from run.training(g, lr, 2, first_epoch=first).steps()
        found["accuracy_gated"] = yield from run.net.accuracy(run.weights, g, run.test)
        small, size = yield from run.elsewhere(physical, run.state(), keep)
        accuracy = module_accuracy(small, run)
        return {"accuracy": accuracy, **size, **found, "seconds": time.perf_counter() - start}


@torch.no_grad()
def module_accuracy(model: nn.Module, run: Run) -> float:
    """Top-1 in per cent of an ordinary module."""
    model = model.to(run.net.device, memory_format=torch.channels_last).eval()
    right = 0
    for pixels, labels in zip(run.test.pixels.split(2000), run.test.labels.split(2000)):
        with torch.autocast(run.net.device, dtype=torch.bfloat16, enabled=run.args.precision == "bf16"):
            right += (model(run.net.normalised(pixels, run.test)).argmax(1) == labels).sum()
    return 100 * float(right) / len(run.test.labels)


def key(line: dict[str, Any]) -> str:
    names = [field.name for field in dataclasses.fields(Job)]
    return json.dumps([*(line[name] for name in names), line["settings"]], sort_keys=True)


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    where = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, check=False)
    packages = ("torch", "torch-pruning", "fvcore", "nni")
    asked = {"datasets": args.datasets, "models": args.models, "budgets": args.budgets, "methods": args.methods}
    options = " ".join(f"--{name} {' '.join(map(str, values))}" for name, values in asked.items())
    numbers = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings_of(args).items())
    return {
        "settings": settings_of(args),
        "command": f"python {Path(sys.argv[0]).name} run {options} {numbers}",
        "commit": args.commit or commit.stdout.strip() or None,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU",
        "lanes": args.lanes,
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(args: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    extra = provenance(args)
    done = {key(line) for name in (RUNS, LINES) for line in read_lines(args.out / name)}
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    dense = [Job(d, m, args.width, 1.0, "dense", s) for d in args.datasets for m in args.models for s in seeds]
    jobs = [dataclasses.replace(j, budget=b, method=m) for m in args.methods for b in args.budgets for j in dense]
    start = time.perf_counter()

    def ended(job: Job, result: dict[str, Any]) -> None:
        if "error" in result:
            print(job, result["error"], result["trace"][-1500:], flush=True)
            return
        with (args.out / (RUNS if job.method == "dense" else LINES)).open("a") as file:
            file.write(json.dumps({**dataclasses.asdict(job), **result, **extra}) + "\n")
        what = f"{job.dataset} {job.model} {job.budget:g} seed {job.seed} {job.method}"
        print(f"{time.perf_counter() - start:5.0f} s  {what}: {result['accuracy']:.2f} %", flush=True)

    def wanted(job: Job) -> bool:
        return key({**dataclasses.asdict(job), "settings": extra["settings"]}) not in done

    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        bench = Bench(args, pool)
        missing = [job for job in dense if wanted(job) or not (args.work / job.weights).exists()]
        run_all(((job, bench.pretrain(job)) for job in missing), args.lanes, args.device, ended)
        run_all(((job, bench.compress(job)) for job in jobs if wanted(job)), args.lanes, args.device, ended)


# ---------------------------------------------------------------------------------------------------------------------
# Report


def spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


def widths_vary(runs: list[dict[str, Any]]) -> str:
    """Standard deviation of a layer's width over the seeds, in per cent of its mean: the mean over the layers."""
    if len(runs) < 2:
        return ""
    layers = zip(*(run["widths"].values() for run in runs))
    return f"{statistics.mean(100 * statistics.stdev(w) / statistics.mean(w) for w in layers):.0f}"


def net_of(line: dict[str, Any]) -> tuple[Any, ...]:
    """What runs must share to be compared."""
    settings = {name: value for name, value in line["settings"].items() if name != "search_epochs"}
    return line["dataset"], line["model"], line["width"], json.dumps(settings, sort_keys=True)


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown, one table per data set, model and budget, best mean first."""
    dense = {net_of(x): [] for x in lines}
    cells: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    sizes = {}
    for x in lines:
        net = net_of(x)
        if x["method"] == "dense":
            dense[net].append(x["accuracy"])
            sizes[net] = x["flops"]
        else:
            cells[(*net, x["budget"])][x["method"]].append(x)
    out = []
    for (*net, budget), methods in sorted(cells.items(), key=str):
        net_key = tuple(net)
        out.append(f"\n### {net[0]}, {net[1]}{'' if net[2] == 1 else f' x {net[2]:g}'}, {100 * budget:g} % MACs\n")
        some = next(iter(methods.values()))[0]
        setting = some["settings"]
        images = f" of {setting['subset']} images" if setting["subset"] else ""
        out.append(
            f"Uncut: {spread(dense[net_key])} % after {setting['pretrain_epochs']} epochs{images}; then "
            f"{setting['epochs']} epochs in all. {some['device']}, {setting['precision']}.\n"
        )
        out.append(
            "| method | accuracy % | seeds | end of the search % | right after the cut % | norms recalibrated % "
            "| MACs % | params k | gates decided % | widths vary % |"
        )
        out.append("|---|---|---|---|---|---|---|---|---|---|")
        ranked = sorted(methods.items(), key=lambda item: -statistics.mean(x["accuracy"] for x in item[1]))
        for name, runs in ranked:
            columns = ("accuracy_search", "accuracy_cut", "accuracy_recalibrated")
            cut = " | ".join(spread([x[c] for x in runs]) if c in runs[0] else "" for c in columns)
            share = statistics.mean(100 * x["flops"] / sizes[net_key] for x in runs)
            params = statistics.mean(x["params"] / 1000 for x in runs)
            accuracy = spread([x["accuracy"] for x in runs])
            decided = f"{100 * min(x['decided'] for x in runs):.0f}" if "decided" in runs[0] else ""
            out.append(
                f"| {name} | {accuracy} | {len(runs)} | {cut} | {share:.2f} | {params:.0f} | {decided} "
                f"| {widths_vary(runs)} |"
            )
    return "\n".join(out) + "\n"


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against MACs, one panel per data set and model."""
    from matplotlib.figure import Figure

    nets = sorted({net_of(x) for x in lines})
    figure = Figure(figsize=(6 * len(nets), 4.5), layout="constrained")
    for axes, net in zip(figure.subplots(1, len(nets), squeeze=False)[0], nets):
        here = [x for x in lines if net_of(x) == net]
        for method in [m for m in METHODS if any(x["method"] == m for x in here)]:
            budgets = sorted({x["budget"] for x in here if x["method"] == method})
            runs = [[x["accuracy"] for x in here if (x["method"], x["budget"]) == (method, b)] for b in budgets]
            errors = [statistics.stdev(r) if len(r) > 1 else 0 for r in runs]
            style: dict[str, Any] = {"linewidth": 2.5, "color": "black", "zorder": 3} if method == "dnal" else {}
            share = [100 * b for b in budgets]
            axes.errorbar(share, [statistics.mean(r) for r in runs], errors, marker="o", label=method, **style)
        axes.set(
            title=f"{net[0]}, {net[1]}{'' if net[2] == 1 else f' x {net[2]:g}'}",
            xlabel="MACs, % of the uncut network",
            ylabel="test accuracy, %",
        )
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def report(args: argparse.Namespace) -> None:
    lines = [x for x in read_lines(args.out / RUNS) if x["method"] == "dense" or x["method"] in METHODS]
    text = table(lines).lstrip("\n")
    if changed := [x for x in read_lines(args.out / "ablations.jsonl") if x["method"] != "dense"]:
        text += "\n## Settings of the search\n" + table(changed + [x for x in lines if x["method"] == "dense"])
    (args.out / "table.md").write_text(text)
    plot(lines, args.out / "curves.png")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="decoded data and trained weights (default: OUT/work)")
    parser.add_argument("--datasets", nargs="+", default=["digits"], choices=("digits", "fashion_mnist", "cifar10"))
    parser.add_argument("--models", nargs="+", default=["resnet20"], choices=sorted(MODELS))
    parser.add_argument("--width", type=float, default=1.0, help="multiplies every channel count")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.35])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--pretrain-epochs", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=10, help="after training: search and fine-tuning together")
    parser.add_argument("--search-epochs", type=int, default=2, help="of them, for DNAL's search")
    parser.add_argument("--pretrain-lr", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=0.05, help="after training; cosine to 0")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--subset", type=int, default=0, help="train on so many images only (0: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the forward passes")
    parser.add_argument("--lanes", type=int, default=1, help="runs that share the device")
    parser.add_argument("--workers", type=int, default=2, help="processes for what runs on the CPU")
    parser.add_argument("--commit", help="to be recorded where there is no git")
    args = parser.parse_args()
    args.work = args.work or args.out / "work"
    if args.command == "run":
        run(args)
    else:
        report(args)


if __name__ == "__main__":
    main()
