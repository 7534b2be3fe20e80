"""Cost of a search step against a plain training step, and the activations that both save for backward.

    python benchmarks/search_step.py --out benchmarks/results/search_step.json

Interleaved rounds on one machine; the figures are ratios of medians. float32, channels_first, eager. A search step with
frozen weights, and one with an optimizer (its mean where the kinds of step differ). `--device cuda` times with CUDA
events and adds the peak of the memory that a step takes.
"""

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from cifar_models import MODELS

from dnal_nni import Budget, DNALPruner


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


def timed(step: Callable[[], None], device: str) -> tuple[float, int]:
    """Seconds of one step, and on a GPU the bytes that it allocates at its peak."""
    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start, 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000, torch.cuda.max_memory_allocated() - held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="resnet56")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, 32, 32, device=args.device)
    labels = torch.randint(0, 10, (args.batch_size,), device=args.device)
    models = {name: MODELS[args.model](10, 1.0).to(args.device) for name in ("plain", "frozen", "learning")}
    optimizers = {name: torch.optim.SGD(model.parameters(), 0.01, momentum=0.9) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    peaks = dict.fromkeys(models, 0)
    with contextlib.ExitStack() as stack:
        steps: dict[str, Callable[[], None]] = {}
        memory: dict[str, int] = {}

        def plain() -> None:
            optimizers["plain"].zero_grad()
            F.cross_entropy(models["plain"](images), labels).backward()
            optimizers["plain"].step()

        steps["plain"] = plain
        for name in ("frozen", "learning"):
            budget = Budget(flops=0.5)
            pruner = DNALPruner(models[name], [{"op_types": ["Conv2d"]}], dummy_input=images[:2], budget=budget)
            optimizer = optimizers[name] if name == "learning" else None
            # more steps than are taken: what the progress report costs is left out
            search = stack.enter_context(pruner.search(100_000, optimizer=optimizer, progress=False))

            def searched(name=name, search=search) -> None:
                search.step(F.cross_entropy(models[name](images), labels))

            steps[name] = searched
        for name, model in models.items():
            memory[name] = saved_bytes(model, images, labels)
        for turn in range(args.rounds + 4):  # the first four warm up
            for name, step in steps.items():
                seconds, peak = timed(step, args.device)
                if turn >= 4:
                    times[name].append(seconds)
                    peaks[name] = max(peaks[name], peak)
    # kinds of step may take turns: the mean of the medians of the even and the odd ones
    seconds = {n: (statistics.median(t[::2]) + statistics.median(t[1::2])) / 2 for n, t in times.items()}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    result = {
        "model": args.model,
        "batch_size": args.batch_size,
        "seconds": seconds,
        "step_ratio": {name: seconds[name] / seconds["plain"] for name in ("frozen", "learning")},
        "saved_activation_ratio": {name: memory[name] / memory["plain"] for name in ("frozen", "learning")},
        "peak_bytes": peaks if args.device == "cuda" else None,
        "rounds": args.rounds,
        "command": f"python benchmarks/search_step.py --model {args.model} --batch-size {args.batch_size} "
        f"--rounds {args.rounds} --device {args.device}",
        "commit": commit or None,
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "device": torch.cuda.get_device_name() if args.device == "cuda" else cpu,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
