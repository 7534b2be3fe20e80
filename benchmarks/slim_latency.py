"""What half of the FLOPs is worth in milliseconds: latency of cut networks beside the uncut ones.

    python benchmarks/slim_latency.py --out benchmarks/results/slim_latency.json

ResNet-50, VGG16-BN and MobileNetV2 of torchvision, random weights, widths learned in a short search on noise (what they
are matters little here). One image of 224 x 224 pixels on the CPU: eager float32, eager bfloat16 (autocast), ONNX
Runtime; `--device cuda`: eager float32 and float16, batch 32. FLOPs budget 0.5 with channels as they come and in
multiples of 8; and a latency budget of 0.6 and 0.4, measured again after the cut. The networks take turns; the fastest
of 30 rounds counts. Some ten minutes on two CPU cores; what is in the file is not measured again.
"""

import argparse
import copy
import io
import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from provenance import device_name, provenance
from torch import Tensor, nn
from tqdm.auto import tqdm

from dnal_nni import Budget, DNALPruner, measure
from dnal_nni.cost.latency import latencies

NETWORKS = ("resnet50", "vgg16_bn", "mobilenet_v2")
STEPS = 12
ROUNDS = 30
LATENCY_BUDGETS = (0.6, 0.4)


def network(name: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name, weights=None)
    return model.to(device)


def cut(model: nn.Module, x: Tensor, budget: Budget, multiple: int) -> tuple[nn.Module, DNALPruner]:
    """The network at the budget; the search sees noise of 64 x 64 pixels."""
    config = [{"op_types": ["Conv2d", "Linear"]}]
    pruner = DNALPruner(model, config, dummy_input=x, budget=budget, channel_multiple=multiple)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 64, 64, generator=generator).to(x.device)
    labels = torch.randint(0, 1000, (8,), generator=generator).to(x.device)
    model.train()
    with pruner.search(STEPS, optimizer=torch.optim.SGD(model.parameters(), 0.001), progress=False) as search:
        for _ in range(STEPS):
            search.step(F.cross_entropy(model(images), labels))
    return pruner.speedup().eval(), pruner


def onnx_session(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    import onnxruntime

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(model.eval(), (x,), buffer, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def in_turn(runs: Sequence[Callable[[], Any]]) -> list[float]:
    """Milliseconds of each, the fastest of some rounds."""
    best = [float("inf")] * len(runs)
    for turn in range(ROUNDS + 3):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            if turn >= 3:
                best[i] = min(best[i], 1e3 * (time.perf_counter() - start))
    return best


def compared(models: dict[str, nn.Module], x: Tensor) -> dict[str, dict[str, float]]:
    """Milliseconds of every network, by the way it is run."""
    device = x.device.type
    low = torch.bfloat16 if device == "cpu" else torch.float16
    ways = {"eager float32": latencies(list(models.values()), x, ROUNDS)}
    with torch.autocast(device, dtype=low):
        ways[f"eager {str(low).removeprefix('torch.')}"] = latencies(list(models.values()), x, ROUNDS)
    if device == "cpu":
        ways["ONNX Runtime float32"] = in_turn([onnx_session(model, x) for model in models.values()])
    return {way: dict(zip(models, (round(ms, 3) for ms in found))) for way, found in ways.items()}


def halved(name: str, x: Tensor) -> dict[str, Any]:
    dense = network(name, x.device.type)
    models: dict[str, nn.Module] = {"dense": dense.eval()}
    for multiple in (1, 8):
        models[f"multiples of {multiple}"], _ = cut(copy.deepcopy(dense), x, Budget(flops=0.5), multiple)
    sizes = {kind: measure(model, x) for kind, model in models.items()}
    ms = compared(models, x)
    return {
        "flops_ratio": {kind: round(size.flops / sizes["dense"].flops, 4) for kind, size in sizes.items()},
        "params_ratio": {kind: round(size.params / sizes["dense"].params, 4) for kind, size in sizes.items()},
        "ms": ms,
        "latency_ratio": {
            way: {kind: round(one / found["dense"], 3) for kind, one in found.items()} for way, found in ms.items()
        },
    }


def latency_budget(name: str, x: Tensor, asked: float) -> dict[str, Any]:
    dense = network(name, x.device.type)
    slim, pruner = cut(copy.deepcopy(dense), x, Budget(latency=asked), 8)
    reported = pruner.report.latency_ms
    assert reported is not None
    before, after = latencies([dense, slim], x, ROUNDS)
    return {
        "asked": asked,
        "reported": round(reported[1] / reported[0], 4),
        "measured_again": round(after / before, 4),
        "flops_ratio": round(measure(slim, x).flops / measure(dense, x).flops, 4),
    }


def table(result: dict[str, Any]) -> None:
    print("| latency, ratio to the uncut network | FLOPs | channels as they come | multiples of 8 |\n|---|---|---|---|")
    for name in NETWORKS:
        row = result["halved"][name]
        for way, found in row["latency_ratio"].items():
            cells = f"{found['multiples of 1']:.2f} | {found['multiples of 8']:.2f}"
            print(f"| {name}, {way} | {row['flops_ratio']['multiples of 8']:.3f} | {cells} |")
    print(
        "\n| latency budget, multiples of 8 | asked | in the report | measured again | FLOPs |\n|---|---|---|---|---|"
    )
    for key, row in result["latency_budget"].items():
        again = f"{row['measured_again']:.3f}"
        print(f"| {key.split()[0]} | {row['asked']} | {row['reported']:.3f} | {again} | {row['flops_ratio']:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result: dict[str, Any] = {"halved": {}, "latency_budget": {}}
    if args.out.exists():
        result = json.loads(args.out.read_text())
    torch.manual_seed(0)
    x = torch.randn(1 if args.device == "cpu" else 32, 3, 224, 224, device=args.device)
    jobs: list[tuple[str, str, Callable[[], Any]]] = []
    for name in NETWORKS:
        jobs.append(("halved", name, lambda n=name: halved(n, x)))
        for asked in LATENCY_BUDGETS:
            jobs.append(("latency_budget", f"{name} {asked}", lambda n=name, a=asked: latency_budget(n, x, a)))
    for key, label, job in tqdm(jobs, desc="networks"):
        if label in result[key]:
            continue
        result[key][label] = job()
        result |= provenance(device_name(args.device), "torch")
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    table(result)


if __name__ == "__main__":
    main()
