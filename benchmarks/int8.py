"""Size of the file and latency of networks: dense and cut, in float and in int8, and both.

    python benchmarks/int8.py --out benchmarks/results/int8.json

resnet18 and mobilenet_v2 of torchvision, random weights, one 224 x 224 image, one thread; cut to half of the FLOPs in
multiples of 8 (by norms: what is cut does not change the time). As ONNX files in ONNX Runtime, and compiled by torch
(inductor with freezing; int8 from torchao 0.18, which refuses resnet18). All that is compared is timed in turns;
medians. Some ten minutes on one core. Accuracies are in examples/quantize.py, whose functions these are. Goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch_pruning as tp
import torchvision
from provenance import device_name, provenance
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import onnxruntime
from quantize import int8_after_training, int8_by_onnx_runtime, to_onnx

from dnal_nni import Budget, DNALPruner

Run = Callable[[], object]


def cut(model: nn.Module, x: Tensor) -> nn.Module:
    pruner = DNALPruner(
        model, [{"op_types": ["Conv2d"]}], dummy_input=x, budget=Budget(flops=0.5), channel_multiple=8,
        verify_seconds=300,
    )  # fmt: skip
    pruner.choose(tp.importance.MagnitudeImportance())
    return pruner.speedup().eval()


def in_turns(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Milliseconds, by median, of what is run in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 3):  # the first three warm up
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def session(path: Path, x: Tensor) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    found = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {found.get_inputs()[0].name: x.numpy()}
    return lambda: found.run(None, feed)


def compiled(model: nn.Module, x: Tensor) -> Run:
    fast = torch.compile(model)

    def run() -> object:
        with torch.no_grad():
            return fast(x)

    run()
    return run


def networks(name: str, x: Tensor, images: list[Tensor]) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    dense = getattr(torchvision.models, name)(weights=None)
    with torch.no_grad():
        dense.train()(torch.cat(images))  # norms off their first values
    return {"dense": dense.eval(), "cut": cut(copy.deepcopy(dense), x)}


def by_onnx_runtime(name: str, rounds: int, x: Tensor, images: list[Tensor]) -> dict[str, object]:
    sizes, runs = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, network in networks(name, x, images).items():
            files = {f"{kind}, {numbers}": Path(folder, f"{kind}-{numbers}.onnx") for numbers in ("float", "int8")}
            to_onnx(network, x, files[f"{kind}, float"])
            int8_by_onnx_runtime(files[f"{kind}, float"], files[f"{kind}, int8"], images)
            for what, path in files.items():
                sizes[what], runs[what] = path.stat().st_size, session(path, x)
        return {"bytes": sizes, "ms": in_turns(runs, rounds)}


def by_torch(name: str, rounds: int, x: Tensor, images: list[Tensor]) -> dict[str, object]:
    made = {}
    for kind, network in networks(name, x, images).items():
        made[f"{kind}, float"] = network
        made[f"{kind}, int8"] = int8_after_training(network, images, torch.cat(images[:2]))
    runs = {what: compiled(network, x) for what, network in made.items()}  # behind all exports, which it disturbs
    return {"ms": in_turns(runs, rounds)}


ENGINES = {"ONNX Runtime": by_onnx_runtime, "torch.compile": by_torch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/int8.json"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")  # of the exporters
    torch.set_num_threads(1)
    torch._inductor.config.freezing = True
    result = json.loads(args.out.read_text()) if args.out.exists() else {"networks": {}}
    x, images = torch.randn(1, 3, 224, 224), list(torch.randn(8, 1, 3, 224, 224))
    for name in args.networks:
        for engine in args.engines:
            if (key := f"{name}, {engine}") in result["networks"]:
                continue
            result["networks"][key] = ENGINES[engine](name, args.rounds, x, images)
            result["provenance"] = provenance(device_name("cpu"), "torch", "torchao", "onnxruntime")
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            print(key, result["networks"][key], flush=True)


if __name__ == "__main__":
    main()
