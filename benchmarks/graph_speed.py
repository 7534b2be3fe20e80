"""CPU seconds and memory from a model to its proven cut, beside what a training step takes, and beside the peers.

    python benchmarks/graph_speed.py                          # what benchmarks/results/graph_speed.jsonl lacks
    python benchmarks/graph_speed.py --only resnet50 "VNet, 32^3" --again
    python benchmarks/graph_speed.py --table

Every network runs in a process of its own with one thread; random weights, 30 % of every group. Seconds are of CPU, by
part, the fastest of the rounds (construction with a budget, and ``speedup()``); forward passes are of the uncut network
in float32 and eval mode. Memory is what one training step (SGD with momentum) takes at its peak beside the model, and
what construction and ``speedup()`` take together. torch-pruning (graph, groups, pruner, step) and torch-kirigami
(graph, candidates, plan, rewrite to 70 % of the parameters) run in the same process, in turn with ours, where they are
installed; neither proves anything. A peer that fails has its error in its place. One JSON line a network.
"""

import argparse
import copy
import gc
import json
import logging
import re
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
import torchvision
from memory import peak_bytes
from provenance import device_name, provenance
from tabulate import tabulate
from torch import Tensor, nn

from dnal_nni import Budget, DNALPruner
from dnal_nni.surgery.verify import random_keep

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from cifar_models import ResNet

RESULTS = Path(__file__).parent / "results" / "graph_speed.jsonl"
CUT, SEED = 0.3, 7_919
ALL = [{"op_types": ["Conv2d", "Conv3d", "ConvTranspose3d", "Linear"]}]
WALL_SECONDS = 1800
PEER_SECONDS = 60  # of CPU

Built = tuple[nn.Module, Tensor]


def vision(name: str, size: int = 64, batch: int = 2) -> Callable[[], Built]:
    def build() -> Built:
        return torchvision.models.get_model(name, weights=None), torch.randn(batch, 3, size, size)

    return build


def thousand_layers() -> Built:
    model = ResNet(166, 10, 0.25)
    for name, parameter in model.named_parameters():
        if name.endswith("bn2.weight"):
            nn.init.constant_(parameter, 0.01)  # or activations grow without bound
    return model, torch.randn(2, 3, 32, 32)


def two_conv3d() -> Built:
    convolutions = nn.Conv3d(1, 32, 3, padding=1), nn.Conv3d(32, 32, 3, padding=1)
    norms = nn.BatchNorm3d(32), nn.BatchNorm3d(32)
    layers = [part for conv, norm in zip(convolutions, norms) for part in (conv, norm, nn.ReLU())]
    return nn.Sequential(*layers, nn.Conv3d(32, 2, 1)), torch.randn(1, 1, 48, 48, 48)


def vnet() -> Built:
    from monai.networks.nets import VNet

    return VNet(), torch.randn(1, 1, 32, 32, 32)


def yolo11x() -> Built:
    from ultralytics import YOLO

    return YOLO("yolo11x.yaml").model, torch.randn(1, 3, 160, 160)


NETWORKS: dict[str, Callable[[], Built]] = {
    **{name: vision(name) for name in ("resnet50", "densenet121", "swin_t", "vgg16_bn", "mobilenet_v2")},
    "convnext_base": vision("convnext_base", 224),
    "vit_l_16": vision("vit_l_16", 224),
    "swin_b": vision("swin_b", 224),
    "efficientnet_b7": vision("efficientnet_b7", 224),
    "resnet152": vision("resnet152", 224),
    "1,000 layers": thousand_layers,
    "two Conv3d, 48^3": two_conv3d,
    "VNet, 32^3": vnet,
    "YOLO11x": yolo11x,
}


# -- one network ------------------------------------------------------------------------------------------------------


def too_late(number: int, frame: Any) -> None:
    raise TimeoutError(f"not done in {PEER_SECONDS} s")


def cpu_seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


class Parts(logging.Handler):
    """CPU seconds of each phase, between the lines with which the package logs its begin and its end."""

    def __init__(self) -> None:
        super().__init__()
        self.start = 0.0
        self.seconds: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        now = time.process_time()
        if record.getMessage().endswith(" ..."):
            self.start = now
        elif found := re.fullmatch(r"(.*): ([\d.]+) s", record.getMessage()):
            self.seconds[found[1]] = round(now - self.start, 3)


def ours(model: nn.Module, x: Tensor) -> tuple[float, float, float]:
    """CPU seconds of construction and of the cut; the share of the FLOPs that is left."""

    def construct() -> DNALPruner:
        return DNALPruner(model, ALL, dummy_input=x, budget=Budget(flops=0.5), verify_seconds=300.0)

    construction, pruner = cpu_seconds(construct)
    pruner.harden(random_keep(pruner.groups, CUT, SEED))
    cutting, _ = cpu_seconds(pruner.speedup)
    left = pruner.report.after.flops / pruner.report.before.flops
    pruner.unwrap_model()
    return construction, cutting, left


def torch_pruning(model: nn.Module, x: Tensor) -> float:
    model = copy.deepcopy(model).eval()  # it is cut in place

    def run() -> None:
        pruner = tp.pruner.MagnitudePruner(
            model,
            x,
            importance=tp.importance.MagnitudeImportance(),
            pruning_ratio=CUT,
            ignored_layers=[list(model.modules())[-1]],
            in_channel_groups={},  # else every pruner shares one, with the entries of the models before
            out_channel_groups={},
        )
        pruner.step()

    return cpu_seconds(run)[0]


def kirigami(model: nn.Module, x: Tensor) -> float:
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import Greedy, GroupMagnitude, ParameterBudget, Pruner

    model = copy.deepcopy(model).eval()
    most = int((1 - CUT) * sum(p.numel() for p in model.parameters()))

    def run() -> None:
        pruner = Pruner(model, graph=DependencyGraph.build(model, args=(x,)))
        pruner.prune(
            pruner.discover_candidates(), budget=ParameterBudget(max_params=most), strategy=Greedy(GroupMagnitude(p=2))
        )

    return cpu_seconds(run)[0]


PEERS: dict[str, Callable[[nn.Module, Tensor], float]] = {"torch-pruning": torch_pruning}
if find_spec("torch_kirigami"):
    PEERS["torch-kirigami"] = kirigami


def training_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """One step, momentum included, that leaves nothing behind."""
    model = copy.deepcopy(model).train()

    def step() -> None:
        optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9)
        out = model(x)
        leaves = [t for t in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(t, Tensor)]
        sum(leaf.float().mean() for leaf in leaves).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def weigh(model: nn.Module, x: Tensor) -> dict[str, int | None]:
    step = peak_bytes(training_step(model, x), "cpu")
    return {"training step": step, "construction and speedup": peak_bytes(lambda: ours(model, x), "cpu")}


def measured(name: str, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    signal.signal(signal.SIGVTALRM, too_late)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    model.eval()
    parts = Parts()
    logging.getLogger("dnal_nni").addHandler(parts)
    logging.getLogger("dnal_nni").setLevel(logging.INFO)
    logging.getLogger("dnal_nni").propagate = False
    memory = weigh(model, x)  # imports and first calls are paid for here
    with torch.no_grad():
        forward = statistics.median(cpu_seconds(lambda: model.eval()(x))[0] for _ in range(3))
    found: dict[str, Any] = {peer: [] for peer in PEERS}
    runs = []
    for _ in range(rounds):
        runs.append(ours(model, x))
        for peer, run in PEERS.items():
            if isinstance(found[peer], list):
                signal.setitimer(signal.ITIMER_VIRTUAL, PEER_SECONDS)
                try:
                    found[peer].append(run(model, x))
                except Exception as error:  # somebody else's package on somebody else's network
                    found[peer] = f"{type(error).__name__}: {error}"[:150]
                finally:
                    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    construction, cutting, left = min(runs, key=lambda run: run[0] + run[1])
    return {
        "network": name,
        "input": list(x.shape),
        "parameters": sum(p.numel() for p in model.parameters()),
        "forward": round(forward, 4),
        "construction": round(construction, 3),
        "speedup": round(cutting, 3),
        "seconds by part": parts.seconds,
        "flops left": round(left, 3),
        "peers": {peer: round(min(s), 3) if isinstance(s, list) else s for peer, s in found.items()},
        "memory": memory,
        "rounds": rounds,
    }


# -- all of them ------------------------------------------------------------------------------------------------------


def table(path: Path) -> str:
    rows = []
    for row in map(json.loads, path.read_text().splitlines()):
        if "error" in row:
            rows.append([row["network"], row["error"]])
            continue
        total, memory = row["construction"] + row["speedup"], row["memory"]
        peer = row["peers"]["torch-pruning"]
        peers = [f"{peer:.1f}" if isinstance(peer, float) else peer.partition(":")[0]]
        ratio = memory["construction and speedup"] / memory["training step"]
        cells = [row["construction"], row["speedup"], total, (total - 1) / row["forward"], ratio]
        rows.append([row["network"], row["forward"], *(f"{cell:.1f}" for cell in cells), *peers])
    parts = ["construction", "speedup", "both", "(both - 1 s) / forward", "memory / step"]
    head = ["", "forward", *parts, "torch-pruning"]
    return tabulate(rows, head, tablefmt="github")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="of " + "; ".join(NETWORKS))
    parser.add_argument("--classifiers", action="store_true", help="every torchvision classifier at 64 pixels instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--worker")
    args = parser.parse_args()
    if args.table:
        print(table(args.out))
        return
    chosen = list(NETWORKS)
    classifiers = torchvision.models.list_models(module=torchvision.models)
    for name in classifiers:
        least = {"inception_v3": 299}.get(name, 224 if name.startswith(("vit", "maxvit")) else 64)
        NETWORKS.setdefault(name, vision(name, least))
    if args.worker:
        print(json.dumps(measured(args.worker, args.rounds)))
        return
    known = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    for name in args.only or (classifiers if args.classifiers else chosen):
        if not args.again and any(row["network"] == name for row in known):
            continue
        command = [sys.executable, __file__, "--worker", name, "--rounds", str(args.rounds)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=WALL_SECONDS, check=False)
            failed = (done.stderr.strip().splitlines() or ["killed"])[-1][:200]
            row = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": failed}
        except subprocess.TimeoutExpired:
            row = {"error": f"not done in {WALL_SECONDS} s"}
        row = {"network": name} | row | provenance(device_name("cpu"), "torch", "torchvision", "torch-pruning")
        known = [old for old in known if old["network"] != name] + [row]
        partial = args.out.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in known))
        partial.replace(args.out)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
