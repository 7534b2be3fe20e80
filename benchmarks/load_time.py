"""How long `load_compressed` takes, beside two plain safetensors loads into a network that has the cut shapes already.

"own memory": `load_file`, a copy of each tensor, `load_state_dict(assign=True)`: like `load_compressed`, which gives
the cut tensors fresh memory and lets go of the file. "in place": `load_model`, into the memory that the network has.
Only ours checks that the file is whole: its digest is computed in threads, the rest of all three in one.

Networks of torchvision, a random 30 % cut; the loads take turns; medians. Then a file of 400 MB: how fast its digest is
checked, the sum that files of version 0.1 have instead, and a plain load into own memory. Two minutes.
"""

import argparse
import contextlib
import copy
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from provenance import device_name, provenance
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_model
from torch import nn
from zoo_models import MODELS

from dnal_nni import DNALError, load_compressed, save_compressed
from dnal_nni.channels.groups import find_groups
from dnal_nni.storage.files import check_sum, write_tensors
from dnal_nni.surgery.slim import slim_copy
from dnal_nni.surgery.verify import random_keep

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "vgg16_bn", "densenet121", "swin_t", "vit_b_16", "convnext_tiny")


def own_memory(model: nn.Module, path: str) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    missing, unexpected = model.load_state_dict(tensors, assign=True, strict=False)
    assert not missing and not unexpected


def seconds(name: str, repeats: int) -> dict[str, float]:
    """Median of each way to load."""
    dense = MODELS[name].build()
    groups = find_groups(dense, MODELS[name].inputs(0, torch.float32))
    slim = slim_copy(dense, groups, random_keep(groups, 0.3))
    ways = {"ours": (load_compressed, dense), "own memory": (own_memory, slim), "in place": (load_model, slim)}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        save_compressed(slim, f"{folder}/ours")
        save_model(slim, f"{folder}/plain")
        for _ in range(repeats):
            for way, (load, model) in ways.items():
                fresh = copy.deepcopy(model)
                start = time.perf_counter()
                load(fresh, f"{folder}/{'ours' if way == 'ours' else 'plain'}")
                taken[way].append(time.perf_counter() - start)
    return {way: statistics.median(times) for way, times in taken.items()}


def megabytes_per_second(repeats: int, megabytes: int = 400) -> dict[str, float]:
    """Of a file in the page cache, medians."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/large"
        write_tensors(path, "large", {str(i): torch.randn(1_000_000) for i in range(megabytes // 4)})
        with safe_open(path, framework="pt") as file:
            header = file.metadata()

        def old_sum() -> None:
            with contextlib.suppress(DNALError):  # it is another one
                check_sum(path, {"sum": "0" * 20})

        ways = {
            "digest": lambda: check_sum(path, header),
            "old sum": old_sum,
            "plain load": lambda: {name: tensor.clone() for name, tensor in load_file(path).items()},
        }
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, work in ways.items():
                start = time.perf_counter()
                work()
                taken[way].append(time.perf_counter() - start)
    return {way: megabytes / statistics.median(times) for way, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=21)
    args = parser.parse_args()
    torch.set_num_threads(1)
    networks = {}
    print(f"{'':16}{'ours':>11}{'own memory':>12}{'in place':>11}")
    for name in NETWORKS:
        taken = seconds(name, args.repeats)
        networks[name] = {
            "seconds": taken,
            "ratio_own_memory": taken["ours"] / taken["own memory"],
            "ratio_in_place": taken["ours"] / taken["in place"],
        }
        print(f"{name:16}" + "".join(f"{1000 * t:8.1f} ms" for t in taken.values()), flush=True)
    rates = megabytes_per_second(args.repeats)
    print(", ".join(f"{way} {rate:.0f} MB/s" for way, rate in rates.items()))
    result = {
        "worst_ratio_own_memory": max(entry["ratio_own_memory"] for entry in networks.values()),
        "worst_ratio_in_place": max(entry["ratio_in_place"] for entry in networks.values()),
        "networks": networks,
        "megabytes_per_second": rates,
        "cores": os.cpu_count(),
        **provenance(device_name("cpu"), "torch", "safetensors", "torchvision"),
    }
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
