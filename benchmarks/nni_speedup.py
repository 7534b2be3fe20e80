"""Masks of NNI's pruners on torchvision models: what `dnal_nni.speedup` makes of them, and what NNI's own does.

    python benchmarks/nni_speedup.py            # what benchmarks/results/nni_speedup.jsonl lacks for this commit
    python benchmarks/nni_speedup.py --table    # -> docs/nni-speedup.md

Every cell runs in a process of its own, on one thread: random weights, norms moved away from their initial values, a
pruner of NNI at 50 % (on real optimizer steps where it trains), then the cut. The reference is the masked model in
which the layers that read a removed channel have zeros for it: that is the hard-gated model, written down without this
package's gates. Differences are max|reference - cut| / max|reference|, the worse of eval and train mode; NNI's are to
the same reference.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nni
import torch
import torch.nn.functional as F
import torchvision
from nni.compression import TorchEvaluator
from nni.compression.pruning import (
    AGPPruner,
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LinearPruner,
    MovementPruner,
    SlimPruner,
    TaylorPruner,
)
from provenance import commit
from torch import Tensor, nn
from zoo_one import randomise

from dnal_nni import DNALError, measure, speedup
from dnal_nni.channels.groups import find_groups
from dnal_nni.plugin.masks import closed_channels, decide, masked_copy, votes_on

RESULTS = Path(__file__).parent / "results" / "nni_speedup.jsonl"
TABLE = Path(__file__).parents[1] / "docs" / "nni-speedup.md"
MODELS = ("resnet18", "mobilenet_v2", "vgg16_bn", "densenet121", "mobilenet_v3_small", "efficientnet_b0")
WALL_SECONDS = 300.0
STEPS = 6
CONV = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
NORM = [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}]

Record = dict[str, Any]


def evaluator(model: nn.Module) -> TorchEvaluator:
    """A few steps of training on random images."""
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(4, 3, 64, 64, generator=generator), torch.randint(0, 10, (4,))) for _ in range(2)]

    def training(model, optimizer, training_step, scheduler, max_steps, max_epochs):
        for step in range(max_steps):
            optimizer.zero_grad()
            training_step(batches[step % 2], model).backward()
            optimizer.step()

    optimizer = nni.trace(torch.optim.Adam)(model.parameters(), lr=1e-5)  # steps of a size that no scale blows up
    return TorchEvaluator(training, optimizer, lambda batch, model: F.cross_entropy(model(batch[0]), batch[1]))


def scheduled(kind: Any) -> Callable[[nn.Module], Any]:
    return lambda model: kind(TaylorPruner(model, CONV, evaluator(model), training_steps=1), 1, total_times=3)


PRUNERS: dict[str, Callable[[nn.Module], Any]] = {
    "L1": lambda model: L1NormPruner(model, CONV),
    "L2": lambda model: L2NormPruner(model, CONV),
    "FPGM": lambda model: FPGMPruner(model, CONV),
    "Slim": lambda model: SlimPruner(model, NORM, evaluator(model), training_steps=STEPS),
    "Taylor": lambda model: TaylorPruner(model, CONV, evaluator(model), training_steps=STEPS),
    "Linear": scheduled(LinearPruner),
    "AGP": scheduled(AGPPruner),
    "Movement": lambda model: MovementPruner(model, CONV, evaluator(model), warmup_step=1, cooldown_begin_step=4),
}


def masks_of(pruner: str, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """NNI's masks; the model is unwrapped afterwards."""
    compressor = PRUNERS[pruner](model)
    steps = {"max_steps": STEPS, "max_epochs": None} if pruner in ("Linear", "AGP", "Movement") else {}
    _, masks = compressor.compress(**steps)
    compressor.unwrap_model()
    return masks


def hard_gated(model: nn.Module, masks: dict[str, dict[str, Tensor]], x: Tensor) -> nn.Module:
    """The model in which nothing reads the channels that the vote on ``masks`` removes."""
    groups = find_groups(model, x)
    closed = closed_channels(model, masks)
    asked = [g for g in groups if any(bool(gone.any()) for gone in votes_on(g, closed).values()) and g.frozen is None]
    reference = masked_copy(model, masks, asked)
    for group in asked:
        gone = ~decide(model, group, votes_on(group, closed), "vote")
        for reader in group.consumers:
            layer = reference.get_submodule(reader.path)
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and getattr(layer, "groups", 1) == 1:
                layer.weight.data[:, reader.channels[gone[reader.units]]] = 0
    return reference


def largest_difference(reference: nn.Module, other: nn.Module, x: Tensor) -> float:
    """max|reference - other| / max|reference|, the worse of eval and train mode, dropout off."""
    gap = 0.0
    for mode in (False, True):
        outputs = []
        for model in (copy.deepcopy(reference), copy.deepcopy(other)):
            model.train(mode)
            for module in model.modules():
                if isinstance(module, (nn.Dropout, torchvision.ops.StochasticDepth)):
                    module.eval()
            with torch.no_grad():
                outputs.append(model(x))
        assert outputs[0].isfinite().all(), "nothing can be compared"
        gap = max(gap, float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()))
    return gap


def run_cell(pruner: str, name: str) -> Record:
    """One pruner on one model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=10)
    x = torch.randn(8, 3, 64, 64)
    randomise(model, (x,))
    model.eval()
    masks = masks_of(pruner, model)
    model.eval()
    record: Record = {"pruner": pruner, "model": name, "flops_before": measure(model, x[:1]).flops}
    asked = [
        float((m["weight"].flatten(1).amax(1) if m["weight"].dim() > 1 else m["weight"]).mean()) for m in masks.values()
    ]
    record["masked_channels"] = round(1 - sum(asked) / len(asked), 4)
    start = time.perf_counter()
    try:
        slim = speedup(model, masks, x[:1])
    except DNALError as error:
        return record | {"error": str(error)}
    record["seconds"] = round(time.perf_counter() - start, 2)
    reference = hard_gated(model, masks, x)
    report = slim.dnal_report
    record |= {
        "flops_after": report.after.flops,
        "effect": largest_difference(model, slim, x),  # of the cut: what a comparison could have missed
        "difference": largest_difference(reference, slim, x),
        "difference_float64": largest_difference(
            copy.deepcopy(reference).double(), copy.deepcopy(slim).double(), x.double()
        ),
        "to_masked_model": report.masked_diff,
        "disputed_groups": sum(bool(group.asked) for group in report.groups),
        "groups": len(report.groups),
    }
    return record | nnis_own(model, masks, x, reference)


def nnis_own(model: nn.Module, masks: Any, x: Tensor, reference: nn.Module) -> Record:
    """What ModelSpeedup does with the same masks; any failure of it is the result."""
    from nni.compression.speedup import ModelSpeedup

    try:
        cut = ModelSpeedup(copy.deepcopy(model), x[:1], masks).speedup_model()
        return {"nni_flops_after": measure(cut, x[:1]).flops, "nni_difference": largest_difference(reference, cut, x)}
    except Exception as error:  # what fails in it is what this benchmark is about
        first = str(error).splitlines()[0] if str(error) else ""
        return {"nni_error": f"{type(error).__name__}: {first}"[:200]}


def provenance() -> Record:
    packages = ("torch", "torchvision", "nni", "fvcore")
    return {
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def load() -> list[Record]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def run_all() -> None:
    done = {(r["pruner"], r["model"]) for r in load() if r["commit"] == commit()}
    for name in MODELS:
        for pruner in PRUNERS:
            if (pruner, name) in done:
                continue
            command = [sys.executable, "-W", "ignore", __file__, "--cell", pruner, name]
            try:
                process = subprocess.run(command, capture_output=True, text=True, timeout=WALL_SECONDS, check=False)
                lines = [line for line in process.stdout.splitlines() if line.startswith('{"pruner"')]
                record = json.loads(lines[-1]) if lines else {"error": process.stderr.strip().splitlines()[-1][:200]}
            except subprocess.TimeoutExpired:
                record = {"error": f"more than {WALL_SECONDS:.0f} s"}
            record = {"pruner": pruner, "model": name, **record, **provenance()}
            rows = [r for r in load() if (r["pruner"], r["model"]) != (pruner, name)] + [record]
            RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
            print(
                pruner,
                name,
                {k: record.get(k) for k in ("flops_before", "flops_after", "difference", "nni_error", "error")},
            )


def write_table() -> None:
    rows = {(r["pruner"], r["model"]): r for r in load()}
    records = [rows[pruner, name] for name in MODELS for pruner in PRUNERS if (pruner, name) in rows]
    cells = [r for r in records if "difference" in r]
    own = [r for r in records if "nni_difference" in r]
    errors = sorted({r["nni_error"] for r in records if "nni_error" in r})
    versions = ", ".join(f"{k} {v}" for k, v in records[0]["versions"].items())
    lines = [
        "# Masks of NNI's pruners, cut",
        "",
        "Written by `python benchmarks/nni_speedup.py --table` from `benchmarks/results/nni_speedup.jsonl`.",
        "",
        f"{len(cells)} of {len(records)} cells are cut; the largest difference to the hard-gated model is "
        f"{max(r['difference'] for r in cells):.0e} in float32, {max(r['difference_float64'] for r in cells):.0e} in "
        f"float64 (of the largest output, eval and train mode). NNI's own `ModelSpeedup` runs in {len(own)}"
        + (f"; elsewhere: {'; '.join(f'`{error}`' for error in errors)}." if errors else "."),
        "",
        "64 px, 10 classes, random weights, norms moved away from their initial values. Every convolution is asked to "
        "lose 50 % (Slim: every norm); where coupled layers disagree they vote. Masked model: largest difference of "
        "the cut to NNI's masked model, which leaves the norms of masked channels on, relative to the largest output. "
        "Seconds are those of `speedup` on one thread, beside other work. "
        f"{versions}; package commit {', '.join(sorted({r['commit'][:12] for r in records}))}.",
        "",
        "| model | pruner | MFLOPs | after | left | difference | in float64 | masked model | seconds | ModelSpeedup |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        before = f"{r['flops_before'] / 1e6:.1f}" if "flops_before" in r else "-"
        theirs = f"differs by {r['nni_difference']:.0e}" if "nni_difference" in r else "fails"
        if "difference" not in r:
            lines.append(f"| {r['model']} | {r['pruner']} | {before} | - | - | {r['error']} | - | - | - | {theirs} |")
            continue
        lines.append(
            f"| {r['model']} | {r['pruner']} | {before} | {r['flops_after'] / 1e6:.1f} "
            f"| {r['flops_after'] / r['flops_before']:.0%} | {r['difference']:.0e} | {r['difference_float64']:.0e} "
            f"| {r['to_masked_model']:.0e} | {r['seconds']:.1f} | {theirs} |"
        )
    TABLE.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write docs/nni-speedup.md and run nothing")
    parser.add_argument("--cell", nargs=2, metavar=("PRUNER", "MODEL"), help="one cell in this process")
    args = parser.parse_args()
    if args.table:
        write_table()
    elif args.cell:
        warnings.simplefilter("ignore")
        print(json.dumps(run_cell(*args.cell)))
    else:
        run_all()


if __name__ == "__main__":
    main()
