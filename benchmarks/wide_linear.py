"""Fine-tuning with the closed channels as linear paths, beside plain fine-tuning: is it worth its seconds?

    python benchmarks/wide_linear.py --data DIR --dataset cifar10 --out benchmarks/results/wide_linear.jsonl
    python benchmarks/wide_linear.py --table --out benchmarks/results/wide_linear.jsonl

The networks, the data and the schedule of `choice.py`; what goes is its "choice", repaired. In every residual block
the first convolution keeps all outputs, the second all inputs; between them are a compressor C, the norm and activation
of the channels that stay, and a decompressor D, both 1x1 convolutions. C starts as the selection of rows, D as the
ridge regression of the closed channels' activations on those that stay ("ridge") or as the selection of columns
("selection"), and the second convolution such that its product with D is the repaired one: the start is the cut
network. C and D learn at `--share` of the learning rate, without weight decay. At the end C goes into the first
convolution and D into the second; "merged" is the largest difference of outputs, in float64. plain: the cut network,
trained for as many epochs; plain_longer: for `--longer` times as many.
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from choice import BATCH, IMAGES, SETTINGS, Bench
from provenance import provenance
from scipy.stats import t
from tabulate import tabulate
from torch import Tensor, nn

from dnal_nni import Budget
from dnal_nni.plan import Plan
from dnal_nni.session import Session

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from cifar_models import BasicBlock

METHODS = ("plain", "ridge", "selection", "plain_longer")
RIDGE = 1e-3  # of the mean square of an activation


def linear(weight: Tensor) -> nn.Conv2d:
    """A 1x1 convolution."""
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False)
    layer.weight.data = weight[:, :, None, None].float()
    return layer


def activations(block: BasicBlock, model: nn.Module, images: Tensor) -> Tensor:
    """What the second convolution of a block reads: float64 ``[channels, places]``."""
    kept: list[Tensor] = []
    hook = block.conv2.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with hook, torch.no_grad():
        model.eval()(images)
    return kept[0].double().transpose(0, 1).flatten(1)


def widen(
    dense: nn.Module, slim: nn.Module, whole: nn.Module, keep: Mapping[str, Tensor], images: Tensor, ridge: bool
) -> None:
    """Give every block of ``slim`` its closed channels back as linear paths, in place.

    Args:
        dense: the uncut network.
        slim: the cut and repaired one.
        whole: cut like it, but for the channels inside of blocks.
        keep: bool ``[channels]`` by the path of a block's first convolution, where there are closed ones.
        images: what the regression is of.
        ridge: D is the regression, not the selection.
    """
    for path, block in slim.named_modules():
        stays = keep.get(f"{path}.conv1")
        if not isinstance(block, BasicBlock) or stays is None:
            continue
        wide, old = whole.get_submodule(path), dense.get_submodule(path)
        assert isinstance(wide, BasicBlock) and isinstance(old, BasicBlock)
        order = torch.cat([stays.nonzero().flatten(), (~stays).nonzero().flatten()])
        kept, count = int(stays.sum()), len(stays)
        back = torch.eye(count, kept, dtype=torch.float64)
        if ridge:
            x = activations(old, dense, images)[order]
            gram = x[:kept] @ x[:kept].T
            gram += RIDGE * gram.diagonal().mean() * torch.eye(kept)
            back[kept:] = torch.linalg.solve(gram, x[:kept] @ x[kept:].T).T
        first, second = copy.deepcopy(wide.conv1), copy.deepcopy(wide.conv2)
        first.weight.data = first.weight.data[order]
        first.weight.data[:kept] = block.conv1.weight.data  # as the repair has it
        weight = second.weight.data[:, order].double()
        weight[:, :kept] = block.conv2.weight.data - torch.einsum("oihw,ik->okhw", weight[:, kept:], back[kept:])
        second.weight.data = weight.float()
        block.conv1, block.conv2 = (
            nn.Sequential(first, linear(torch.eye(kept, count))),
            nn.Sequential(linear(back), second),
        )


def merge(wide: nn.Module) -> nn.Module:
    """A copy with C and D inside of the convolutions."""
    merged = copy.deepcopy(wide)
    for block in merged.modules():
        if isinstance(block, BasicBlock) and isinstance(block.conv1, nn.Sequential):
            assert isinstance(block.conv2, nn.Sequential)
            for name, conv, small, rule in (
                ("conv1", *block.conv1, "cihw,oc->oihw"),
                ("conv2", *reversed(block.conv2), "ochw,ci->oihw"),
            ):
                folded = torch.einsum(rule, conv.weight.data.double(), small.weight.data.double().flatten(1))
                new = nn.Conv2d(folded.shape[1], folded.shape[0], 3, conv.stride, 1, bias=False)
                new.weight.data = folded.to(conv.weight.dtype)
                setattr(block, name, new)
    return merged


class Wide(Bench):
    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.SGD:
        wide = [b for b in model.modules() if isinstance(b, BasicBlock) and isinstance(b.conv1, nn.Sequential)]
        small = {block.get_parameter(name) for block in wide for name in ("conv1.1.weight", "conv2.0.weight")}
        groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p not in small]}]
        if small:
            groups.append({"params": list(small), "lr": self.args.share * lr, "weight_decay": 0.0})
        return torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def compared(self, dense: nn.Module, budget: float, seed: int) -> Iterator[dict[str, Any]]:
        """The methods, from the same cut network."""
        torch.manual_seed(seed)
        images = torch.cat([images for images, _ in itertools.islice(self.batches(seed, 60), IMAGES // BATCH)])
        model = copy.deepcopy(dense)
        plan = Plan.of(model, images[:1], budget=Budget(flops=budget))
        session = Session(model, plan)
        keep = session.choose(batches=images.split(BATCH))
        cut = session.speedup()
        session.repair(cut, images)
        session.detach()
        inside = {f"{path}.conv1" for path, block in dense.named_modules() if isinstance(block, BasicBlock)}
        whole = plan.slim(model, {name: mask for name, mask in keep.items() if name not in inside})
        closed = {name: mask for name, mask in keep.items() if name in inside and not bool(mask.all())}
        for method in METHODS:
            start, slim, x = time.process_time(), copy.deepcopy(cut), images[:64].double()
            found: dict[str, Any] = {"method": method, "accuracy_cut": self.accuracy(slim)}
            if not method.startswith("plain"):
                widen(dense, slim, whole, closed, images, method == "ridge")
                found["start"] = apart(slim, cut, x)
            epochs = round(self.args.epochs * (self.args.longer if method == "plain_longer" else 1))
            for _ in self.fit(slim, seed, 100, epochs, 0.05):
                pass
            if not method.startswith("plain"):
                found["merged"] = apart(merge(slim.double()), slim, x)
                slim = merge(slim.float())
            yield found | {"accuracy": self.accuracy(slim), "cpu_seconds": time.process_time() - start}


@torch.no_grad()
def apart(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    """The largest difference of their outputs, in float64 and eval mode."""
    outputs = [copy.deepcopy(model).double().eval()(x) for model in (one, other)]
    return float((outputs[0] - outputs[1]).abs().max())


def table(lines: list[dict[str, Any]]) -> str:
    """How much better than plain, in the mean over seeds, with the 95 % interval (Student's t)."""
    runs: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        runs[(*(line[name] for name in SETTINGS), line["budget"])][line["method"]].append(line)
    rows = []
    for settings, methods in sorted(runs.items()):
        plain = {line["seed"]: line["accuracy"] for line in methods["plain"]}
        for method, found in methods.items():
            gains = [line["accuracy"] - plain[line["seed"]] for line in found]
            spread = statistics.stdev(gains) if len(gains) > 1 else math.nan
            half = t.ppf(0.975, len(gains) - 1) * spread / math.sqrt(len(gains))
            gain = "" if method == "plain" else f"{statistics.mean(gains):+.2f} ± {half:.2f}"
            means = [statistics.mean(line[name] for line in found) for name in ("accuracy", "cpu_seconds")]
            rows.append([*settings, method, len(found), *means, gain])
    head = [*SETTINGS, "FLOPs", "method", "seeds", "accuracy", "CPU s", "gain"]
    return tabulate(rows, head, tablefmt="github", floatfmt=".4g")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dataset", choices=("fashion_mnist", "cifar10"), default="cifar10")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25], help="FLOPs to keep")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=6400)
    parser.add_argument("--trained", type=int, default=8, help="epochs of the uncut network")
    parser.add_argument("--epochs", type=int, default=6, help="after that")
    parser.add_argument("--longer", type=float, default=1.4)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--dense", type=Path, help="keep the trained weights there")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="fp32 without AVX512 or AMX")
    parser.add_argument("--table", action="store_true")
    parser.set_defaults(model="resnet20")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if args.table:
        print(table(lines))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    bench, settings = Wide(args), {name: getattr(args, name) for name in SETTINGS}
    done = [{name: line[name] for name in (*SETTINGS, "seed", "budget")} for line in lines]
    for seed in range(args.seeds):
        for budget in args.budgets:
            job = settings | {"seed": seed, "budget": budget}
            if job in done:
                continue
            found = [job | line | {"share": args.share} for line in bench.compared(bench.dense(seed), budget, seed)]
            found = [line | provenance("cpu", "torch", "fvcore") for line in found]
            with args.out.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in found)
            print(table(found), flush=True)


if __name__ == "__main__":
    main()
