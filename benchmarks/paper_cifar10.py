"""The lambda sweep of the paper's CIFAR-10 tables: accuracy against FLOPs, with nothing but lambda to set the size.

    # the paper's networks, on a GPU: 30 epochs of weights, 10 of architecture, 70 of fine-tuning
    python benchmarks/paper_cifar10.py run --data DIR --out OUT --models vgg16_bn resnet56 mobilenet_v2 \
        --pretrain-epochs 30 --epochs 80 --search-epochs 10
    # the short form for a CPU whose results are in benchmarks/results/paper_cifar10
    python benchmarks/paper_cifar10.py run --data DIR --out benchmarks/results/paper_cifar10 --width 0.5 --subset 6400 \
        --pretrain-epochs 8 --epochs 10 --search-epochs 4 --batch-size 64 --seeds 1
    python benchmarks/paper_cifar10.py report --out benchmarks/results/paper_cifar10

Equations, learning rate, delta and threshold are the paper's (arXiv 2103.02126); the epochs are those of its ImageNet
scripts, since none are published for CIFAR-10. Three things differ: one gate acts on a whole coupled group (the paper
gates layers), every group keeps a channel, and lambda is multiplied by 3910 / steps where the architecture phase has
other than the paper's 10 x 391 steps: the regulariser moves s by lambda a step, whatever the data. The same harness,
files and resuming as peers.py.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path

import methods
import peers
import torch
from torch import Tensor

LAMBDAS = (1e-5, 5e-5, 1e-4, 2e-4, 3e-4, 4e-4, 5e-4)  # the paper's
LARGER = (1e-3, 2e-3, 3e-3, 1e-2)  # a network that was trained briefly holds its gates open against the paper's
STEPS = 3910
THRESHOLD = 0.9
# the authors' README: top-1 in per cent, FLOPs in millions; the uncut network, then one point a lambda
PAPER = {
    "vgg16_bn": [(93.77, 313.47), (93.82, 211.89), (93.53, 195.14), (93.75, 161.97), (92.33, 61.23), (89.93, 29.77),
                 (89.92, 22.04), (89.27, 16.65)],
    "resnet56": [(94.15, 125.49), (93.76, 93.94), (93.75, 83.11), (93.20, 36.94), (89.31, 8.63), (85.83, 3.44),
                 (84.07, 2.38), (83.48, 1.68)],
    "mobilenet_v2": [(94.31, 91.17), (94.17, 59.47), (94.30, 54.98), (94.01, 36.63), (91.96, 13.35), (90.65, 7.81),
                     (88.83, 5.40), (87.85, 4.50)],
}  # fmt: skip


def sweep(lambda_: float) -> methods.Method:
    def method(run: methods.Run) -> Generator[None, None, methods.Outcome]:
        epochs = run.args.search_epochs
        scaled = lambda_ * STEPS / (epochs * run.per_epoch)
        s, found = yield from methods.paper_search(run, epochs, scaled)
        keep = torch.sigmoid(1e4 * s) > THRESHOLD
        sizes = run.bench.objectives[run.job.model, run.job.budget].sizes
        return torch.cat([_at_least_one(k, p) for k, p in zip(keep.split(sizes), s.split(sizes))]), found

    return method


def _at_least_one(keep: Tensor, s: Tensor) -> Tensor:
    return keep if bool(keep.any()) else torch.arange(len(s)) == s.argmax()


def plot(lines: list[dict[str, object]], path: Path) -> None:
    """Accuracy lost against FLOPs left, relative to the uncut network: ours and the paper's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="FLOPs, % of the uncut network", ylabel="accuracy - uncut, points", xscale="log")
    for model in sorted({str(x["model"]) for x in lines}):
        dense = {x["seed"]: x for x in lines if x["model"] == model and x["method"] == "dense"}
        points = [
            (100 * x["flops"] / dense[x["seed"]]["flops"], x["accuracy"] - dense[x["seed"]]["accuracy"])
            for x in lines
            if x["model"] == model and x["method"] != "dense" and x["seed"] in dense
        ]
        axes.plot(*zip(*sorted(points)), "o-", label=f"{model}, here")
    for model, rows in PAPER.items():
        (top, whole), *rest = rows
        axes.plot(
            [100 * f / whole for _, f in rest], [a - top for a, _ in rest], "x--", alpha=0.5, label=f"{model}, paper"
        )
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    methods.METHODS.clear()
    methods.METHODS.update({f"lambda {value:g}": sweep(value) for value in (*LAMBDAS, *LARGER)})
    peers.plot = plot
    sys.argv[2:2] = ["--budgets", "1", "--datasets", "cifar10"]
    peers.main()


if __name__ == "__main__":
    main()
