"""DNAL beside its peers: same trained weights, same total epochs (search included), same fvcore MACs.

    python benchmarks/peers.py run --data DIR --out benchmarks/results/peers --datasets cifar10 --models resnet20
    python benchmarks/peers.py report --out benchmarks/results/peers

`run` appends one JSON line per run to OUT/runs.jsonl; a run whose line is there is not repeated, so a stopped benchmark
goes on where it stopped. `report` makes table.md and curves.png from the lines. DIR holds cifar10/{train,test}/<class>/
images (or torchvision's cifar-10-batches-py) and FashionMNIST/raw; digits are scikit-learn's. Data stay on the device,
batches are cut and flipped there, and plain training steps are replayed as one CUDA graph. `--jobs` processes share the
device: such small networks leave most of it idle.

Rules for all: a trained network, then `--epochs` epochs in all. A method that searches or trains sparsely does so inside
of them. Every cut hits the budget to the channel with the same code, in the method's own order of removal, and has its
norms re-estimated on 50 batches. The accuracy is the last epoch's. NNI's own pruners are not in the table yet: they need
`speedup(model, masks)`, which this package does not have.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gzip
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from cifar_data import augmented, load_images  # noqa: E402
from cifar_models import MODELS, init_weights  # noqa: E402

from dnal_nni import Budget, DNALPruner, measure  # noqa: E402
from dnal_nni.budget import exact_cut  # noqa: E402
from dnal_nni.search import importance  # noqa: E402

CONV = [{"op_types": ["Conv2d"]}]
RECALIBRATION_BATCHES = 50
WARM_UP_STEPS = 4  # of a CUDA graph: ordinary steps


# ---------------------------------------------------------------------------------------------------------------------
# Data


class Data(NamedTuple):
    pixels: Tensor  # uint8 [images, 32, 32, 1 or 3]
    labels: Tensor  # int64 [images]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flips: bool

    def to(self, device: str) -> Data:
        return self._replace(pixels=self.pixels.to(device), labels=self.labels.to(device))


def idx_file(path: Path) -> np.ndarray:
    """An array in the format of the MNIST files."""
    raw = gzip.decompress(path.read_bytes())
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def load(dataset: str, root: Path, train: bool) -> Data:
    """One split of a data set, as images of 32 x 32 pixels."""
    if dataset == "cifar10":
        images = load_images(root / "cifar10", train, 0, False)
        return Data(images.pixels, images.labels, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), True)
    if dataset == "fashion_mnist":
        name = "train" if train else "t10k"
        pixels = idx_file(root / "FashionMNIST" / "raw" / f"{name}-images-idx3-ubyte.gz")
        labels = idx_file(root / "FashionMNIST" / "raw" / f"{name}-labels-idx1-ubyte.gz")
        padded = torch.from_numpy(np.pad(pixels, ((0, 0), (2, 2), (2, 2))))[..., None]
        return Data(padded, torch.from_numpy(labels).long(), (0.2190,), (0.3318,), True)
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = train_test_split(np.arange(1797), test_size=0.25, stratify=digits.target, random_state=0)[0 if train else 1]
    small = torch.tensor(digits.images[rows] * 15.9, dtype=torch.float32)[:, None]
    pixels = F.interpolate(small, scale_factor=4, mode="bilinear").permute(0, 2, 3, 1)
    return Data(pixels.to(torch.uint8), torch.tensor(digits.target[rows]), (0.3,), (0.36,), False)


def load_cached(dataset: str, args: argparse.Namespace) -> tuple[Data, Data]:
    """Both splits on the device; decoded once and kept beside the trained weights."""
    path = args.work / f"{dataset}.pt"
    if not path.exists():
        splits = [load(dataset, args.data, train) for train in (True, False)]
        write_whole(path, [tuple(split) for split in splits])
    train, test = (Data(*split) for split in torch.load(path, weights_only=True))
    if args.subset:
        train = train._replace(pixels=train.pixels[: args.subset], labels=train.labels[: args.subset])
    return train.to(args.device), test.to(args.device)


def write_whole(path: Path, value: object) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    torch.save(value, partial)
    os.replace(partial, path)


def normalised(pixels: Tensor, data: Data, dtype: torch.dtype) -> Tensor:
    """uint8 [n, 32, 32, c] -> [n, 3, 32, 32] in channels_last; a grey image becomes three equal channels."""
    scale = torch.tensor(data.std, device=pixels.device).mul(255)
    shift = torch.tensor(data.mean, device=pixels.device).mul(255)
    images = ((pixels.float() - shift) / scale).to(dtype)
    return images.expand(-1, -1, -1, 3).contiguous().permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Training


class Context(NamedTuple):
    """What a method gets."""

    args: argparse.Namespace
    job: Job
    train: Data
    test: Data

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train.labels) // self.args.batch_size

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.args.precision == "bf16" else torch.float32

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.args.device, dtype=torch.bfloat16, enabled=self.args.precision == "bf16")

    def to_device(self, model: nn.Module) -> nn.Module:
        return model.to(self.args.device, memory_format=torch.channels_last)

    def batches(self, phase: int, epochs: range) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented batches; the order and the crops depend on the seed, the phase and the epoch alone."""
        size = self.args.batch_size
        for epoch in epochs:
            generator = torch.Generator(self.args.device).manual_seed(self.job.seed * 10_000 + phase * 1000 + epoch)
            order = torch.randperm(len(self.train.labels), generator=generator, device=self.args.device)
            labels = self.train.labels[order]
            pixels = augmented(self.train.pixels[order], generator, flips=self.train.flips)
            for step in range(self.steps_per_epoch):
                rows = slice(step * size, (step + 1) * size)
                yield normalised(pixels[rows], self.train, self.dtype), labels[rows]


def cosine(step: int, steps: int) -> float:
    """Learning-rate factor: 5 % linear warm-up, then a half cosine down to 0."""
    warm_up = max(1, round(0.05 * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def sgd(model: nn.Module, context: Context, weight_decay: float = 5e-4) -> torch.optim.SGD:
    """The learning rate is a tensor on the device: a CUDA graph reads its current value."""
    cuda = context.args.device == "cuda"
    lr = torch.zeros((), device="cuda") if cuda else 0.0
    return torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=weight_decay, fused=cuda or None
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def fit(
    model: nn.Module,
    context: Context,
    phase: int,
    epochs: range,
    lr: Callable[[int], float],
    regularise: Callable[[], object] | None = None,
    weight_decay: float = 5e-4,
) -> None:
    """Train in place. ``lr`` is a function of the step, counted from the start of the phase's epoch 0."""
    optimizer = sgd(model, context, weight_decay)
    model.train()
    graph: torch.cuda.CUDAGraph | None = None
    inputs: tuple[Tensor, Tensor] | None = None
    capture = context.args.device == "cuda" and regularise is None

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with context.autocast():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        if regularise is not None:
            regularise()
        optimizer.step()

    first = epochs.start * context.steps_per_epoch
    stream = torch.cuda.Stream() if capture else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for number, batch in enumerate(context.batches(phase, epochs)):
            set_lr(optimizer, lr(first + number))
            if graph is not None:
                assert inputs is not None
                for static, new in zip(inputs, batch):
                    static.copy_(new)
                graph.replay()
                continue
            step(*batch)
            if capture and number == WARM_UP_STEPS:
                inputs = (batch[0].clone(memory_format=torch.preserve_format), batch[1].clone())
                optimizer.zero_grad(set_to_none=True)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    step(*inputs)
    if capture:
        torch.cuda.synchronize()


@torch.no_grad()
def evaluate(model: nn.Module, context: Context) -> float:
    """Top-1 accuracy in per cent."""
    model.eval()
    right = torch.zeros((), device=context.args.device)
    for pixels, labels in zip(context.test.pixels.split(1000), context.test.labels.split(1000)):
        with context.autocast():
            right += (model(normalised(pixels, context.test, context.dtype)).argmax(1) == labels).sum()
    return 100 * float(right) / len(context.test.labels)


@torch.no_grad()
def recalibrate(model: nn.Module, context: Context) -> None:
    """Running statistics of the norms: plain means over some training batches."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for (images, _), _ in zip(context.batches(9, range(1)), range(RECALIBRATION_BATCHES)):
        with context.autocast():
            model(images)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


# ---------------------------------------------------------------------------------------------------------------------
# Methods. Each takes the context and the trained network (on the CPU) and returns the small one (on the CPU) and what
# happened: "epochs" spent before the cut, and whatever else is worth recording.

Outcome = tuple[nn.Module, dict[str, Any]]


def image() -> Tensor:
    return torch.zeros(1, 3, 32, 32)


def budgeted(model: nn.Module, context: Context, **kwargs: Any) -> DNALPruner:
    return DNALPruner(model, CONV, dummy_input=image(), budget=Budget(flops=context.job.budget), **kwargs)


def cut_by(score: Callable[[DNALPruner], Tensor], model: nn.Module, context: Context) -> nn.Module:
    """Keep the units with the best scores (float [units], all groups) that the budget allows."""
    pruner = budgeted(model, context)
    objective = pruner._objective
    assert objective is not None
    keep = exact_cut(objective, score(pruner), [1] * len(objective.sizes))
    pruner.harden(dict(zip(pruner.gates, keep.split(objective.sizes))))
    return pruner.speedup()


def search_steps(
    model: nn.Module, pruner: DNALPruner, context: Context, epochs: int, lr: Callable[[int], float] | None
) -> dict[str, Any]:
    """A search of some epochs with the weights learning (``lr`` of the step) or frozen (None)."""
    context.to_device(model)
    optimizer = sgd(model, context) if lr is not None else None
    steps = epochs * context.steps_per_epoch
    model.train()
    start = time.perf_counter()
    with pruner.search(steps, optimizer=optimizer, progress=False) as search:
        for number, (images, labels) in enumerate(context.batches(1, range(epochs))):
            if lr is not None and optimizer is not None:
                set_lr(optimizer, lr(number))
            with context.autocast():
                loss = F.cross_entropy(model(images), labels)
            search.step(loss)
    if context.args.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    found = {"epochs": epochs, "seconds_search": seconds, "accuracy_search": evaluate(model, context)}
    model.cpu()
    return found


def finetune_lr(context: Context) -> Callable[[int], float]:
    steps = context.args.epochs * context.steps_per_epoch
    return lambda step: context.args.lr * cosine(step, steps)


def dnal(model: nn.Module, context: Context) -> Outcome:
    pruner = budgeted(model, context)
    found = search_steps(model, pruner, context, context.args.search_epochs, finetune_lr(context))
    slim = pruner.speedup()
    return slim, {**found, "decided": pruner.report.decided}


def dnal_paper(model: nn.Module, context: Context) -> Outcome:
    """The paper's 10 of the 80 epochs after training, frozen weights; cut to the budget by the order of s."""
    pruner = budgeted(model, context, preset="paper")
    found = search_steps(model, pruner, context, max(1, round(context.args.epochs / 8)), None)
    slim = pruner.speedup()
    return slim, {**found, "decided": pruner.report.decided}


def random_channels(model: nn.Module, context: Context) -> Outcome:
    generator = torch.Generator().manual_seed(context.job.seed)
    return cut_by(lambda p: torch.rand(sum(p._cost.sizes), generator=generator), model, context), {}


def uniform_ranks(pruner: DNALPruner, order: Tensor) -> Tensor:
    """Scores that take the same share of every group, in the group's order of ``order`` (float [units])."""
    parts = []
    for part in order.split(pruner._cost.sizes):
        ranks = part.argsort(descending=True).argsort().double()
        parts.append(1 - (ranks + 0.5) / len(part))
    return torch.cat(parts)


def uniform_random(model: nn.Module, context: Context) -> Outcome:
    generator = torch.Generator().manual_seed(context.job.seed)
    order = lambda p: torch.rand(sum(p._cost.sizes), generator=generator)  # noqa: E731
    return cut_by(lambda p: uniform_ranks(p, order(p)), model, context), {}


def uniform_l2(model: nn.Module, context: Context) -> Outcome:
    """The same share of every group, by the L2 norm of each channel over all layers of the group."""
    return cut_by(lambda p: uniform_ranks(p, importance(model, p._active)), model, context), {}


def uniform_scratch(model: nn.Module, context: Context) -> Outcome:
    """The uniformly narrower network, trained from new weights for all epochs (those of the trained network too)."""
    slim = uniform_random(model, context)[0]
    torch.manual_seed(context.job.seed + 1000)
    init_weights(slim)
    for module in slim.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Linear)):
            module.reset_parameters()
    return slim, {"scratch": True}


def removal_order(pruner: tp.BasePruner, ours: DNALPruner, context: Context) -> Tensor:
    """Float [units]: when torch-pruning's progressive pruning (its documented procedure) removes each of our units."""
    objective = ours._objective
    assert objective is not None
    names, sizes = list(ours.gates), objective.sizes
    unit_of: dict[str, tuple[int, Tensor]] = {}
    for offset, group in zip(np.cumsum([0, *sizes]).tolist(), ours._active):
        for member in group.members:
            if member.side == "out" and member.dim is None:
                unit_of[member.path] = (offset, member.units[member.channels.argsort()])
    alive = {path: list(range(len(units))) for path, (_, units) in unit_of.items()}
    when = torch.full((sum(sizes),), math.inf, dtype=torch.float64)
    seen = time_step = 0
    assert len(names) == len(sizes)
    while float(objective.relative((when == math.inf).double())[0]) > 0.95 * context.job.budget:
        pruner.step()
        history = pruner.pruning_history()
        if pruner.current_step == pruner.iterative_steps:
            break
        for path, _, removed in history[seen:]:
            offset, units = unit_of[path]
            gone = [alive[path][i] for i in removed]
            alive[path] = [i for i in alive[path] if i not in set(gone)]
            time_step += 1
            when[offset + units[gone]] = time_step
        seen = len(history)
    return when


def torch_pruning(
    model: nn.Module,
    context: Context,
    kind: type[tp.BasePruner],
    rank: Callable[[], tp.importance.Importance],
    sparse: float | None = None,
    gradients: bool = False,
    steps: int = 400,
) -> Outcome:
    """torch-pruning as its own CIFAR script runs it: global, 400 small steps; sparse learning with lr 0.01.

    Its script gives sparse learning as many epochs as the fine-tuning; here both share the epochs.

    Args:
        kind: the pruner.
        rank: its importance.
        sparse: strength of the sparse learning ahead of the cut.
        gradients: whether the importance needs the loss's gradients (over 10 batches).
    """
    ours = budgeted(copy.deepcopy(model), context)
    context.to_device(model)
    found: dict[str, Any] = {}
    pruner = kind(
        model,
        image().to(context.args.device),
        importance=rank(),
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=steps,
        ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear)],
        # its defaults are shared between pruners and written to
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        **({"reg": sparse} if sparse is not None else {}),
    )
    if sparse is not None:
        epochs = context.args.epochs // 2
        total = epochs * context.steps_per_epoch
        decay = lambda step: 0.01 * (1 if step < 0.6 * total else 0.1 if step < 0.8 * total else 0.01)  # noqa: E731
        start = time.perf_counter()
        fit(model, context, 1, range(epochs), decay, lambda: pruner.regularize(model), weight_decay=0)
        found = {"epochs": epochs, "seconds_search": time.perf_counter() - start}
        found["accuracy_search"] = evaluate(model, context)
    if gradients:
        model.eval()
        for (images, labels), _ in zip(context.batches(8, range(1)), range(10)):
            F.cross_entropy(model(images.float()), labels).backward()
    model.cpu()
    trained = copy.deepcopy(model)
    trained.zero_grad()
    when = removal_order(pruner, ours, context)
    return cut_by(lambda _: when, trained, context), found


def magnitude(model: nn.Module, context: Context) -> Outcome:
    return torch_pruning(model, context, tp.pruner.MagnitudePruner, lambda: tp.importance.MagnitudeImportance(p=2))


def bn_scale(model: nn.Module, context: Context) -> Outcome:
    return torch_pruning(model, context, tp.pruner.BNScalePruner, tp.importance.BNScaleImportance, sparse=1e-5)


def group_norm(model: nn.Module, context: Context) -> Outcome:
    rank = lambda: tp.importance.GroupMagnitudeImportance(p=2, normalizer="max")  # noqa: E731
    return torch_pruning(model, context, tp.pruner.GroupNormPruner, rank, sparse=5e-4)


def taylor(model: nn.Module, context: Context) -> Outcome:
    rank = tp.importance.TaylorImportance
    return torch_pruning(model, context, tp.pruner.MagnitudePruner, rank, gradients=True)


METHODS: dict[str, Callable[[nn.Module, Context], Outcome]] = {
    "tp_group_norm": group_norm,  # the slowest first
    "tp_bn_scale": bn_scale,
    "uniform_scratch": uniform_scratch,
    "tp_magnitude": magnitude,
    "tp_taylor": taylor,
    "dnal": dnal,
    "dnal_paper": dnal_paper,
    "random": random_channels,
    "uniform_random": uniform_random,
    "uniform_l2": uniform_l2,
}


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@dataclasses.dataclass(frozen=True)
class Job:
    """One line of runs.jsonl; budget 1.0 and method "dense" is the trained network itself."""

    dataset: str
    model: str
    width: float
    budget: float
    method: str
    seed: int

    @property
    def weights(self) -> str:
        return f"{self.dataset}-{self.model}-{self.width:g}-{self.seed}.pt"


SETTINGS = ("pretrain_epochs", "epochs", "search_epochs", "pretrain_lr", "lr", "batch_size", "subset", "precision")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SETTINGS}


_data: dict[str, tuple[Data, Data]] = {}


def work(job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """Do one job; returns its line."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    if job.dataset not in _data:
        _data[job.dataset] = load_cached(job.dataset, args)
    context = Context(args, job, *_data[job.dataset])
    torch.manual_seed(job.seed)
    start = time.perf_counter()
    model = MODELS[job.model](10, job.width).to(memory_format=torch.channels_last)
    found: dict[str, Any] = {}
    if job.method == "dense":
        steps = args.pretrain_epochs * context.steps_per_epoch
        fit(
            context.to_device(model),
            context,
            0,
            range(args.pretrain_epochs),
            lambda step: args.pretrain_lr * cosine(step, steps),
        )
        small = model
        write_whole(args.work / job.weights, small.state_dict())
    else:
        model.load_state_dict(torch.load(args.work / job.weights, weights_only=True))
        small, found = METHODS[job.method](model, context)
        found["seconds_to_cut"] = time.perf_counter() - start
        small = context.to_device(small)
        if found.pop("scratch", False):
            total = args.pretrain_epochs + args.epochs
            steps = total * context.steps_per_epoch
            fit(small, context, 0, range(total), lambda step: args.pretrain_lr * cosine(step, steps))
        else:
            found["accuracy_cut"] = evaluate(small, context)
            recalibrate(small, context)
            found["accuracy_recalibrated"] = evaluate(small, context)
            fit(small, context, 2, range(found.get("epochs", 0), args.epochs), finetune_lr(context))
    size = measure(small.cpu(), image())
    context.to_device(small)
    convs = [(name, m.out_channels) for name, m in small.named_modules() if isinstance(m, nn.Conv2d)]
    return {
        **dataclasses.asdict(job),
        "accuracy": evaluate(small, context),
        "flops": size.flops,
        "params": size.params,
        **found,
        "widths": dict(convs),
        "seconds": time.perf_counter() - start,
        "settings": settings_of(args),
    }


def key(line: dict[str, Any]) -> str:
    names = [field.name for field in dataclasses.fields(Job)]
    return json.dumps([*(line[name] for name in names), line["settings"]], sort_keys=True)


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    where = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, check=False)
    packages = ("torch", "torch-pruning", "fvcore", "nni")
    cpu = f"{platform.machine()} CPU, {args.threads} threads"
    return {
        "command": " ".join(["python", "benchmarks/peers.py", *sys.argv[1:]]),
        "commit": os.environ.get("DNAL_COMMIT") or commit.stdout.strip() or None,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if args.device == "cuda" else cpu,
        "jobs": args.jobs,
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    for dataset in args.datasets:
        load_cached(dataset, argparse.Namespace(**{**vars(args), "device": "cpu"}))
    lines = args.out / "runs.jsonl"
    extra = provenance(args)
    done = {key(line) for line in read_lines(lines)}
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    dense = [Job(d, m, args.width, 1.0, "dense", s) for d in args.datasets for m in args.models for s in seeds]
    jobs = [dataclasses.replace(j, budget=b, method=m) for m in args.methods for b in args.budgets for j in dense]
    wanted = lambda job: key({**dataclasses.asdict(job), "settings": settings_of(args)}) not in done  # noqa: E731
    dense = [job for job in dense if wanted(job) or not (args.work / job.weights).exists()]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for todo in (dense, [job for job in jobs if wanted(job)]):
            for line in pool.imap_unordered(_work, [(job, args) for job in todo]):
                if "error" in line:
                    print(line, flush=True)
                    continue
                with lines.open("a") as file:
                    file.write(json.dumps({**line, **extra}) + "\n")
                where = f"{line['dataset']} {line['model']} {line['budget']} seed {line['seed']}"
                print(f"{where} {line['method']}: {line['accuracy']:.2f} % in {line['seconds']:.0f} s", flush=True)


def _work(pair: tuple[Job, argparse.Namespace]) -> dict[str, Any]:
    try:
        return work(*pair)
    except Exception as error:  # one method's failure must not cost the other runs
        import traceback

        return {"error": f"{type(error).__name__}: {error}", "job": str(pair[0]), "trace": traceback.format_exc()}


# ---------------------------------------------------------------------------------------------------------------------
# Report


def spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown, one table per data set, model and budget, best mean first."""
    dense = {(x["dataset"], x["model"], x["width"]): [] for x in lines}
    cells: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    sizes = {}
    for x in lines:
        net = (x["dataset"], x["model"], x["width"])
        if x["method"] == "dense":
            dense[net].append(x["accuracy"])
            sizes[net] = x["flops"]
        else:
            cells[(*net, x["budget"])][x["method"]].append(x)
    out = []
    for (*net, budget), methods in sorted(cells.items(), key=str):
        net_key = tuple(net)
        out.append(f"\n### {net[0]}, {net[1]}{'' if net[2] == 1 else f' x {net[2]:g}'}, {100 * budget:g} % MACs\n")
        some = next(iter(methods.values()))[0]
        setting = some["settings"]
        out.append(
            f"Uncut: {spread(dense[net_key])} % after {setting['pretrain_epochs']} epochs; then {setting['epochs']} "
            f"epochs in all. {some['device']}, {setting['precision']}.\n"
        )
        out.append("| method | accuracy % | seeds | right after the cut % | norms recalibrated % | MACs % | params k |")
        out.append("|---|---|---|---|---|---|---|")
        ranked = sorted(methods.items(), key=lambda item: -statistics.mean(x["accuracy"] for x in item[1]))
        for name, runs in ranked:
            cut = [spread([x[c] for x in runs]) if c in runs[0] else "" for c in ("accuracy_cut", "accuracy_recalibrated")]
            share = statistics.mean(100 * x["flops"] / sizes[net_key] for x in runs)
            params = statistics.mean(x["params"] / 1000 for x in runs)
            accuracy = spread([x["accuracy"] for x in runs])
            out.append(f"| {name} | {accuracy} | {len(runs)} | {cut[0]} | {cut[1]} | {share:.2f} | {params:.0f} |")
    return "\n".join(out) + "\n"


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against MACs, one panel per data set and model."""
    from matplotlib.figure import Figure

    nets = sorted({(x["dataset"], x["model"], x["width"]) for x in lines})
    figure = Figure(figsize=(6 * len(nets), 4.5), layout="constrained")
    for axes, net in zip(figure.subplots(1, len(nets), squeeze=False)[0], nets):
        here = [x for x in lines if (x["dataset"], x["model"], x["width"]) == net]
        for method in [m for m in METHODS if any(x["method"] == m for x in here)]:
            budgets = sorted({x["budget"] for x in here if x["method"] == method})
            runs = [[x["accuracy"] for x in here if (x["method"], x["budget"]) == (method, b)] for b in budgets]
            errors = [statistics.stdev(r) if len(r) > 1 else 0 for r in runs]
            style: dict[str, Any] = {"linewidth": 2.5, "color": "black", "zorder": 3} if method == "dnal" else {}
            share = [100 * b for b in budgets]
            axes.errorbar(share, [statistics.mean(r) for r in runs], errors, marker="o", label=method, **style)
        axes.set(title=f"{net[0]}, {net[1]}", xlabel="MACs, % of the uncut network", ylabel="test accuracy, %")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def report(args: argparse.Namespace) -> None:
    lines = [x for x in read_lines(args.out / "runs.jsonl") if x["method"] == "dense" or x["method"] in METHODS]
    (args.out / "table.md").write_text(table(lines).lstrip("\n"))
    plot(lines, args.out / "curves.png")
    print(table(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="decoded data and trained weights (default: OUT/work)")
    parser.add_argument("--datasets", nargs="+", default=["digits"], choices=("digits", "fashion_mnist", "cifar10"))
    parser.add_argument("--models", nargs="+", default=["resnet20"], choices=sorted(MODELS))
    parser.add_argument("--width", type=float, default=1.0, help="multiplies every channel count")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.35])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--pretrain-epochs", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=10, help="after training: search and fine-tuning together")
    parser.add_argument("--search-epochs", type=int, default=2, help="of them, for DNAL's search")
    parser.add_argument("--pretrain-lr", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=0.05, help="after training; cosine to 0")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--subset", type=int, default=0, help="train on so many images only (0: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the forward passes")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the device")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each")
    args = parser.parse_args()
    args.work = args.work or args.out / "work"
    if args.command == "run":
        run(args)
    else:
        report(args)


if __name__ == "__main__":
    main()
