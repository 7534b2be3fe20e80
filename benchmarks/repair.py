"""What a repair gives back right after a one-shot cut, without labels or training: small networks on digits.

    python benchmarks/repair.py --out benchmarks/results/repair.jsonl

ResNet-20, VGG16-BN and MobileNetV2 at a part of their widths, trained on scikit-learn's digits (1,347 images of 32
pixels, SGD, one cycle), cut to half of their FLOPs: the same share of every group by its norms (uniform_l2), or by
torch-pruning's group magnitude over all groups (group_l2). Accuracies on the 450 test images, in eval mode, with norm
statistics as training left them. A line for every network, seed and way to cut; lines that are there are not repeated.
The same on a network with ImageNet weights: `pretrained.py --epochs 0`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
import torch.nn.functional as F
import torch_pruning as tp
from cifar_models import MODELS
from cuts import CONV, image, uniform_ranks
from engine import Data
from peers import load
from provenance import provenance
from torch import Tensor, nn

from dnal_nni import Budget, DNALPruner
from dnal_nni.search.close import cut
from dnal_nni.search.importance import importance

WIDTHS = {"resnet20": 0.5, "vgg16_bn": 0.25, "mobilenet_v2": 0.25}


def normalised(data: Data) -> Tensor:
    """float ``[n, 3, 32, 32]``."""
    grey = (data.pixels[..., 0].float() / 255 - data.mean[0]) / data.std[0]
    return torch.stack([grey] * 3, 1)


def trained(name: str, seed: int, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    model, per_epoch = MODELS[name](10, WIDTHS[name]), len(labels) // 64
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, epochs * per_epoch + 1, cycle_momentum=False)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(64)[:per_epoch]:
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * float((model.eval()(images).argmax(1) == labels).double().mean())


def choose(pruner: DNALPruner, how: str) -> None:
    plan, model = pruner.plan, pruner.bound_model
    if how == "group_l2":
        pruner.choose(tp.importance.MagnitudeImportance())
        return
    assert plan.objective is not None
    ranks, ones = uniform_ranks(importance(model, plan.active), plan.sizes), [1] * len(plan.sizes)
    pruner.harden(plan.by_group(cut(plan.objective, ranks, ones, lambda units: plan.cost_of(units, model))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12, help="of training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {(line["network"], line["seed"], line["epochs"]) for line in lines}
    train, test = (load("digits", Path(), part) for part in (True, False))
    images, tests = normalised(train), normalised(test)
    for name in WIDTHS:
        for seed in range(args.seeds):
            if (name, seed, args.epochs) in done:
                continue
            dense = trained(name, seed, images, train.labels, args.epochs)
            for how in ("uniform_l2", "group_l2"):
                pruner = DNALPruner(copy.deepcopy(dense), CONV, dummy_input=image(), budget=Budget(flops=0.5))
                choose(pruner, how)
                slim = pruner.speedup()
                line = {"network": name, "width": WIDTHS[name], "seed": seed, "epochs": args.epochs, "cut": how}
                line |= {"uncut": accuracy(dense, tests, test.labels), "after": accuracy(slim, tests, test.labels)}
                start = time.perf_counter()
                pruner.repair(slim, images[:1024])
                line |= {"seconds": time.perf_counter() - start, "repaired": accuracy(slim, tests, test.labels)}
                line |= provenance("cpu", "torch", "torch-pruning", "fvcore", "nni")
                with args.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(name, seed, how, *(round(line[key], 1) for key in ("uncut", "after", "repaired")), flush=True)


if __name__ == "__main__":
    main()
