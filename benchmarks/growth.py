"""How the work around a search grows with the number of layers and of channels, and what slicing takes of memory.

    python benchmarks/growth.py --out benchmarks/results/growth.json

Depth: ResNets of 20 to 1,202 layers (6n + 2, a quarter of the usual width); width: ResNet-20 at one to eight times its
channels. Batch 2 of 32 x 32 pixels, float32. Seconds of each part of the work (the fastest of three), and what a search
step does beyond forward and backward (the median of ten). Next to the file, a plot. Some ten minutes on two CPU cores;
measured networks are not measured again.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from tqdm.auto import tqdm

from dnal_nni import Budget, DNALPruner
from dnal_nni.channels.groups import find_groups
from dnal_nni.cost.model import CostModel
from dnal_nni.surgery.compare import check_equal
from dnal_nni.surgery.slim import slim_copy
from dnal_nni.surgery.verify import random_keep, verify_and_freeze

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from cifar_models import ResNet
from memory import peak_bytes
from provenance import device_name, provenance

BLOCKS = (3, 9, 18, 36, 72, 200)  # a stage
WIDTHS = (1, 2, 4, 8)
PARTS = ("groups", "verify", "cost model", "slice", "check", "search step")
STORED = {"resnet50": 224, "vgg16_bn": 224, "densenet121": 224}  # whose slicing is weighed, at so many pixels


def fastest(run: Callable[[], Any], repeats: int = 3) -> tuple[float, Any]:
    """Seconds, and what the last run returned."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def deep(blocks: int, width: float) -> nn.Module:
    """A ResNet whose activations stay finite at any depth, whatever its weights."""
    model = ResNet(blocks, 10, width)
    for name, parameter in model.named_parameters():
        if name.endswith("bn2.weight"):
            nn.init.constant_(parameter, 0.01)
    return model


def parts(model: nn.Module) -> dict[str, float]:
    """Seconds of every part of the work on one network."""
    x = torch.randn(2, 3, 32, 32)
    found: dict[str, float] = {}
    found["groups"], groups = fastest(lambda: find_groups(model, x))
    frozen = [group.frozen for group in groups]
    found["verify"], _ = fastest(lambda: verify_and_freeze(model, groups, x, seconds=600))
    assert frozen == [group.frozen for group in groups], "what is timed is a verification that finds nothing"
    found["cost model"], _ = fastest(lambda: CostModel(model, groups, x))
    keep = random_keep(groups, 0.5, 0)
    found["slice"], _ = fastest(lambda: slim_copy(model, groups, keep))
    pruner = DNALPruner(model, [{"op_types": ["Conv2d"]}], dummy_input=x, budget=Budget(flops=0.5), verify_seconds=600)
    with pruner.search(1_000_000, progress=False) as search:
        model(x).sum().backward()

        def step() -> None:
            search.update()
            search.advance()

        found["search step"] = statistics.median(fastest(step, 1)[0] for _ in range(10))
    pruner.harden(keep)
    slim = slim_copy(model, groups, keep)
    found["check"], _ = fastest(lambda: check_equal(model, slim, x))
    return found | {"units": sum(group.channels for group in groups), "gates": len(groups)}


def memory(name: str, pixels: int) -> dict[str, float]:
    """Peak of slicing beyond what the process held, relative to the model's size; the new network is part of it."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    groups = find_groups(model, torch.randn(1, 3, pixels, pixels))
    keep = random_keep(groups, 0.5, 0)
    gc.collect()
    held: list[nn.Module] = []
    peak = peak_bytes(lambda: held.append(slim_copy(model, groups, keep)), "cpu")
    left = sum(t.nbytes for t in (*held[0].parameters(), *held[0].buffers()))
    return {"model_bytes": size, "slim_bytes": left, "peak_to_model": None if peak is None else round(peak / size, 3)}


def plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("depth", "width"), ("layers", "times the channels")):
        sizes = [int(size) for size in result[key]]
        for part in PARTS:
            seconds = [row[part] for row in result[key].values()]
            axes.loglog(sizes, seconds, marker="o", label=part)
        first = min(row["groups"] for row in result[key].values())
        axes.loglog(sizes, [first * size / sizes[0] for size in sizes], "k--", linewidth=0.8, label="linear")
        axes.set(xlabel=label, ylabel="seconds")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def to_linear(result: dict[str, Any], layers: str) -> dict[str, float]:
    """Of every part, and of all, the time of the deepest network by that of ``layers``, to the number of layers."""
    deepest = max(result["depth"], key=int)
    small, large = result["depth"][layers], result["depth"][deepest]
    times = {part: (large[part], small[part]) for part in PARTS}
    times["all"] = sum(a for a, _ in times.values()), sum(b for _, b in times.values())
    return {part: round(a / b * int(layers) / int(deepest), 2) for part, (a, b) in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result: dict[str, Any] = {"depth": {}, "width": {}, "memory": {}}
    if args.out.exists():
        result = json.loads(args.out.read_text())
    jobs: list[tuple[str, str, Callable[[], Any]]] = []
    for blocks in BLOCKS:
        jobs.append(("depth", str(6 * blocks + 2), lambda n=blocks: parts(deep(n, 0.25))))
    for width in WIDTHS:
        jobs.append(("width", str(width), lambda w=width: parts(deep(3, w))))
    for name, pixels in STORED.items():
        jobs.append(("memory", name, lambda n=name, p=pixels: memory(n, p)))
    for key, size, job in tqdm(jobs, desc="networks"):
        if size in result[key]:
            continue
        torch.manual_seed(0)
        result[key][size] = job()
        result |= provenance(device_name("cpu"), "torch")
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    result["to_linear"] = {f"from {layers} layers": to_linear(result, layers) for layers in ("20", "110")}
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    plot(result, args.out.with_suffix(".png"))
    print(json.dumps({"to_linear": result["to_linear"], "memory": result["memory"]}, indent=2))


if __name__ == "__main__":
    main()
