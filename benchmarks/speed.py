"""What a step costs, beside a plain training step: seconds, saved activations, peak memory; ours and our peers'.

    python benchmarks/speed.py run --out benchmarks/results/speed.jsonl
    python benchmarks/speed.py table --out benchmarks/results/speed.jsonl

float32, channels_first, eager. All kinds of step take turns in one process, in another order every round; a figure is
the median over the rounds of the ratio to the plain step of the same round. A line per network and batch size; what is
in the file is not measured again. On two CPU cores about three minutes a line. `--device cuda` times with CUDA events
and gives the peak of allocated memory.

    plain              forward, backward, SGD with momentum; measured twice, which shows the noise
    architecture       a search step with frozen weights
    learning           a search step in which the weights learn too (the alternating step)
    hard gates         a fine-tuning step of the whole network with its gates fixed to 0 and 1
    NNI Slim, Taylor   a step of these pruners' own training
    tp GroupNorm       a step with torch-pruning's `regularize`
    authors' gate      an architecture step with the gate of DNAL's released code: transpose, reshape, multiply
"""

import argparse
import contextlib
import functools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
import torchvision

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from cifar_models import MODELS
from memory import peak_bytes, saved_bytes
from provenance import device_name, provenance
from torch import Tensor, nn
from tqdm.auto import tqdm

from dnal_nni import Budget, DNALPruner
from dnal_nni.modules.gates import ScaledSigmoidGate

NETWORKS = {"resnet56": 32, "mobilenet_v2": 64, "resnet50": 64, "densenet121": 64}  # pixels
LAYERS = [{"op_types": ["Conv2d"]}]
WARM_UP = 3
MANY = 1_000_000  # steps that are planned: more than are made, so nothing falls due (the report, the settling)

Step = Callable[[], None]


class Batch:
    """One batch of noise, and a network and an optimizer a kind of step."""

    def __init__(self, network: str, size: int, device: str) -> None:
        pixels = NETWORKS[network]
        generator = torch.Generator().manual_seed(0)
        self.network, self.device = network, device
        self.images = torch.randn(size, 3, pixels, pixels, generator=generator).to(device)
        self.labels = torch.randint(0, 10, (size,), generator=generator).to(device)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        if self.network == "resnet56":
            return MODELS["resnet56"](10, 1.0).to(self.device)
        model: nn.Module = torchvision.models.get_model(self.network, weights=None, num_classes=10)
        return model.to(self.device)

    def pruner(self, model: nn.Module) -> DNALPruner:
        return DNALPruner(model, LAYERS, dummy_input=self.images[:2], budget=Budget(flops=0.5))

    def loss(self, model: nn.Module) -> Tensor:
        return F.cross_entropy(model(self.images), self.labels)

    def training(self, model: nn.Module, then: Callable[[], object] = lambda: None) -> Step:
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad()
            self.loss(model).backward()
            then()
            optimizer.step()

        return step


# ---------------------------------------------------------------------------------------------------------------------
# The kinds of step. A model, and its step


def plain(batch: Batch, stack: contextlib.ExitStack) -> tuple[nn.Module, Step]:
    model = batch.model()
    return model, batch.training(model)


def architecture(batch: Batch, stack: contextlib.ExitStack) -> tuple[nn.Module, Step]:
    model = batch.model()
    search = stack.enter_context(batch.pruner(model).search(MANY, progress=False))
    return model, lambda: search.step(batch.loss(model))


def learning(batch: Batch, stack: contextlib.ExitStack) -> tuple[nn.Module, Step]:
    model = batch.model()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    search = stack.enter_context(batch.pruner(model).search(MANY, optimizer=optimizer, progress=False))
    return model, lambda: search.step(batch.loss(model))


def hard_gates(batch: Batch, stack: contextlib.ExitStack) -> tuple[nn.Module, Step]:
    model = batch.model()
    pruner = batch.pruner(model)
    keep = {name: torch.rand(gate.s.numel()).argsort() < 0.7 * gate.s.numel() for name, gate in pruner.gates.items()}
    pruner.harden(keep)
    return model, batch.training(model)


def torch_pruning(batch: Batch, stack: contextlib.ExitStack) -> tuple[nn.Module, Step]:
    model = batch.model()
    head = [module for module in model.modules() if isinstance(module, nn.Linear)]
    pruner = tp.pruner.GroupNormPruner(
        model,
        batch.images[:2],
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=head,
        in_channel_groups={},
        out_channel_groups={},
    )
    pruner.update_regularizer()
    return model, batch.training(model, lambda: pruner.regularize(model))


def authors_gate(batch: Batch, stack: contextlib.ExitStack) -> tuple[nn.Module, Step]:
    """A gate behind every norm; convolutions and norms frozen, the classifier and the gates learn, as in their code."""
    model = batch.model()
    gates = []

    def hook(gate: ScaledSigmoidGate) -> Callable[..., Tensor]:
        mask = torch.ones(gate.s.numel(), device=batch.device)

        def scale(module: nn.Module, args: tuple[Any, ...], x: Tensor) -> Tensor:
            last = x.transpose(1, 3)
            flat = last.reshape(-1, x.shape[1]) * torch.sigmoid(gate.delta * gate.s) * mask
            return flat.reshape(last.shape).transpose(1, 3)

        return scale

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.requires_grad_(False)
        if isinstance(module, nn.BatchNorm2d):
            gates.append(ScaledSigmoidGate(module.num_features).to(batch.device))
            gates[-1].s.requires_grad_(True)
            module.register_forward_hook(hook(gates[-1]))
    learn = [p for p in model.parameters() if p.requires_grad] + [gate.s for gate in gates]
    optimizer = torch.optim.SGD(learn, 0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        loss = batch.loss(model)
        for gate in gates:
            loss = loss + 1e-4 * torch.sigmoid(gate.s).sum()
        loss.backward()
        optimizer.step()

    return model, step


KINDS = {
    "plain": plain,
    "plain again": plain,
    "architecture": architecture,
    "learning": learning,
    "hard gates": hard_gates,
    "tp GroupNorm": torch_pruning,
    "authors' gate": authors_gate,
}


def inside_nni(batch: Batch, name: str, then: Callable[[nn.Module, Step], None]) -> None:
    """Call ``then`` with a model and its training step inside of a pruner's own training, which NNI drives."""
    import nni
    from nni.compression import TorchEvaluator
    from nni.compression.pruning import SlimPruner, TaylorPruner

    def training(model, optimizer, training_step, scheduler, max_steps, max_epochs):
        def step() -> None:
            optimizer.zero_grad()
            training_step((batch.images, batch.labels), model).backward()
            optimizer.step()

        model.train()
        then(model, step)

    def training_step(data: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return F.cross_entropy(model(data[0]), data[1])

    model = batch.model()
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01, momentum=0.9)
    evaluator = TorchEvaluator(training, optimizer, training_step)
    config = [{"op_types": ["BatchNorm2d" if name == "NNI Slim" else "Conv2d"], "sparse_ratio": 0.5}]
    pruner = (SlimPruner if name == "NNI Slim" else TaylorPruner)(model, config, evaluator, training_steps=MANY)
    with contextlib.suppress(_Done):
        pruner.compress()


class _Done(Exception):
    """All has been measured: leave NNI's training, which would go on to make masks."""


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def seconds_of(step: Step, device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def measured(steps: dict[str, tuple[nn.Module, Step]], batch: Batch, rounds: int) -> dict[str, Any]:
    """All kinds of step in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in tqdm(range(WARM_UP + rounds), desc=f"{batch.network}, batch {len(batch.labels)}", unit="round"):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            took = seconds_of(steps[name][1], batch.device)
            if turn >= WARM_UP:
                seconds[name].append(took)
    saved = {name: saved_bytes(model, functools.partial(batch.loss, model)) for name, (model, _) in steps.items()}
    peak = {name: peak_bytes(step, batch.device) for name, (_, step) in steps.items()}
    return {
        "seconds": {name: round(statistics.median(times), 5) for name, times in seconds.items()},
        "step_ratio": {
            name: round(statistics.median(a / b for a, b in zip(times, seconds["plain"])), 3)
            for name, times in seconds.items()
        },
        "saved_ratio": {name: round(size / saved["plain"], 4) for name, size in saved.items()},
        "peak_ratio": {name: round(size / peak["plain"], 3) if size else None for name, size in peak.items()},
        "saved_bytes": saved["plain"],
        "peak_bytes": peak["plain"],
    }


def line(network: str, size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one network and batch size."""
    batch = Batch(network, size, args.device)
    result: dict[str, Any] = {}
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch-pruning and NNI on today's torch
        steps = {name: kind(batch, stack) for name, kind in KINDS.items()}
        for model, _ in steps.values():
            model.train()

        def in_slim(model: nn.Module, step: Step) -> None:
            steps["NNI Slim"] = model, step
            inside_nni(batch, "NNI Taylor", in_both)
            raise _Done

        def in_both(model: nn.Module, step: Step) -> None:
            steps["NNI Taylor"] = model, step
            result.update(measured(steps, batch, args.rounds))
            raise _Done

        inside_nni(batch, "NNI Slim", in_slim)
    gates = len(batch.pruner(batch.model()).gates)
    return {"network": network, "batch_size": size, "pixels": NETWORKS[network], "gates": gates} | result


def run(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    old = [json.loads(text) for text in args.out.read_text().splitlines()] if args.out.exists() else []
    device = device_name(args.device)
    done = {(row["network"], row["batch_size"], row["device"]) for row in old}
    for network in args.networks:
        for size in args.batch_sizes:
            if (network, size, device) in done:
                continue
            row = line(network, size, args) | {"rounds": args.rounds}
            row |= provenance(device, "torch", "torchvision", "nni", "torch-pruning")
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row["step_ratio"]))


def table(args: argparse.Namespace) -> None:
    """Markdown: the ratios to the plain step."""
    rows = [json.loads(text) for text in args.out.read_text().splitlines()]
    names = [name for name in rows[0]["step_ratio"] if name != "plain"]
    for title, key in (("step", "step_ratio"), ("saved activations", "saved_ratio"), ("peak memory", "peak_ratio")):
        print(f"| {title}, ratio to plain | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
        for row in rows:
            head = f"{row['network']}, batch {row['batch_size']} ({row['device']})"
            print(f"| {head} | {' | '.join(f'{row[key][name]:.2f}' for name in names)} |")
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="torch's CPU threads (0: as torch chooses)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    {"run": run, "table": table}[args.what](args)


if __name__ == "__main__":
    main()
