"""Cost of a search step against a plain training step, and the activations that both save for backward.

    python benchmarks/search_step.py --out benchmarks/results/search_step.json

Interleaved rounds on one machine; the figures are ratios of medians. float32, channels_first, frozen weights.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from cifar_models import MODELS  # noqa: E402

from dnal_nni import Budget, DNALPruner  # noqa: E402


def saved_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes of distinct tensors that autograd keeps for backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(images), labels)
    size = sum(storages.values())
    del loss
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="resnet56")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    images, labels = torch.randn(args.batch_size, 3, 32, 32), torch.randint(0, 10, (args.batch_size,))
    plain, searched = MODELS[args.model](10, 1.0), MODELS[args.model](10, 1.0)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    pruner = DNALPruner(searched, [{"op_types": ["Conv2d"]}], dummy_input=images[:2], budget=Budget(flops=0.5))
    times: dict[str, list[float]] = {"plain": [], "search": []}
    with pruner.search(steps=args.rounds + 2, progress=False) as search:
        memory = {"plain": saved_bytes(plain, images, labels), "search": saved_bytes(searched, images, labels)}
        for turn in range(args.rounds + 2):  # the first two warm up
            start = time.perf_counter()
            optimizer.zero_grad()
            F.cross_entropy(plain(images), labels).backward()
            optimizer.step()
            middle = time.perf_counter()
            search.step(F.cross_entropy(searched(images), labels))
            if turn >= 2:
                times["plain"].append(middle - start)
                times["search"].append(time.perf_counter() - middle)
    medians = {name: statistics.median(values) for name, values in times.items()}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "model": args.model,
        "batch_size": args.batch_size,
        "seconds": medians,
        "step_ratio": medians["search"] / medians["plain"],
        "saved_activation_ratio": memory["search"] / memory["plain"],
        "rounds": args.rounds,
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
