"""Seconds from a model to a verified cut, beside torch-pruning's own way from a model to a cut.

    python benchmarks/graph_speed.py --out benchmarks/results/graph_speed.json

ResNet-50 and DenseNet-121 at 224 pixels, random weights, 30 % of every group. Interleaved rounds in one process; the
figures are medians. Ours verifies the cut (one comparison of two networks in float64, four images, eval and train
mode); torch-pruning has no such step.
"""

import argparse
import copy
import json
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
import torchvision
from provenance import device_name, provenance
from torch import Tensor, nn
from zoo import CUT, CUT_SEED

from dnal_nni.channels.groups import find_groups
from dnal_nni.surgery.slim import slim_copy
from dnal_nni.surgery.verify import random_keep, verify_and_freeze

CLASSIFIER = {"resnet50": "fc", "densenet121": "classifier"}

Seconds = dict[str, list[float]]


@contextmanager
def timed(seconds: Seconds, name: str) -> Iterator[None]:
    """Append the wall-clock time of the block to ``seconds[name]``."""
    start = time.perf_counter()
    yield
    seconds[name].append(time.perf_counter() - start)


def ours(model: nn.Module, x: Tensor, _: str, seconds: Seconds) -> int:
    """Groups, plan, slice and verification; returns the number of comparisons that it took."""
    with timed(seconds, "groups"):
        groups = find_groups(model, x)
    with timed(seconds, "plan"):
        keep = random_keep(groups, CUT, CUT_SEED)
    with timed(seconds, "slice"):
        slim_copy(model, groups, keep)
    with timed(seconds, "verify"):
        return verify_and_freeze(model, groups, x, seconds=60)


def theirs(model: nn.Module, x: Tensor, classifier: str, seconds: Seconds) -> int:
    """torch-pruning's graph, its groups, and its pruner, which builds both again; returns the number of groups."""
    model = copy.deepcopy(model).eval()  # it is cut in place
    ignored = [model.get_submodule(classifier)]
    with timed(seconds, "graph"):
        graph = tp.DependencyGraph().build_dependency(model, x)
    with timed(seconds, "get_all_groups"):
        number = len(list(graph.get_all_groups(ignored_layers=ignored)))
    with timed(seconds, "pruner init"):
        # without a dict of its own every pruner shares one, with the entries of the models before
        pruner = tp.pruner.MagnitudePruner(
            model,
            x,
            importance=tp.importance.MagnitudeImportance(),
            pruning_ratio=CUT,
            ignored_layers=ignored,
            in_channel_groups={},
            out_channel_groups={},
        )
    with timed(seconds, "pruner step"):
        pruner.step()
    return number


def medians(seconds: Seconds) -> dict[str, float]:
    """The median of every phase, and of the rounds' sums."""
    total = [sum(round_) for round_ in zip(*seconds.values())]
    return {name: round(statistics.median(values), 4) for name, values in [*seconds.items(), ("total", total)]}


def compare(name: str, rounds: int) -> dict[str, Any]:
    """Both ways on one model, in turn."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None)
    x = torch.randn(1, 3, 224, 224)
    ways: dict[str, Callable[[nn.Module, Tensor, str, Seconds], int]] = {"dnal_nni": ours, "torch_pruning": theirs}
    seconds: dict[str, Seconds] = {way: defaultdict(list) for way in ways}
    numbers = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch-pruning warns of every op that it takes for element-wise
        for _ in range(rounds):
            for way, run in ways.items():
                numbers[way] = run(model, x, CLASSIFIER[name], seconds[way])
    return {
        "model": name,
        "seconds": {way: medians(phases) for way, phases in seconds.items()},
        "comparisons": numbers["dnal_nni"],
        "groups of torch_pruning": numbers["torch_pruning"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {
        "models": [compare(name, args.rounds) for name in CLASSIFIER],
        "input": [1, 3, 224, 224],
        "rounds": args.rounds,
    } | provenance(device_name("cpu"), "torch", "torchvision", "torch-pruning")
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
