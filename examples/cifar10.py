"""CIFAR-10 from start to finish: train a network, search its widths, cut it, fine-tune the smaller one.

    python examples/cifar10.py --data DIR --out runs/r20 --model resnet20 --flops 0.5

DIR holds train/ and test/, each with one folder of 32x32 images per class, or torchvision's cifar-10-batches-py.
Every epoch ends in a checkpoint under --out; the same command run again goes on where it stopped, and ends with the
same network. A stage that is complete is not redone. The result is OUT/report.json, the network OUT/slim.safetensors.
"""

import argparse
import itertools
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from cifar_models import MODELS
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torchvision.datasets import CIFAR10, ImageFolder
from tqdm.auto import tqdm

STAGES = ("train", "search", "finetune")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's training images, RGB
RECALIBRATION_BATCHES = 50

# What a stage depends on: a checkpoint is only taken up by a run that asks for the same.
TRAIN_SETTINGS = ("model", "width", "epochs", "lr", "batch_size", "train_subset", "seed", "precision")
SEARCH_SETTINGS = (*TRAIN_SETTINGS, "flops", "search_epochs", "search_lr")
FINETUNE_SETTINGS = (*SEARCH_SETTINGS, "finetune_epochs", "finetune_lr")
SETTINGS = {"train": TRAIN_SETTINGS, "search": SEARCH_SETTINGS, "finetune": FINETUNE_SETTINGS}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--download", action="store_true", help="let torchvision fetch CIFAR-10 into --data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--model", choices=sorted(MODELS), default="resnet20")
    parser.add_argument("--width", type=float, default=1.0, help="multiplies every channel count")
    parser.add_argument("--flops", type=float, default=0.5, help="<= 1: the fraction to keep; larger: absolute")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--search-epochs", type=int, default=2)
    parser.add_argument("--finetune-epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--search-lr", type=float, default=0.01, help="constant, for the weights during the search")
    parser.add_argument("--finetune-lr", type=float, default=0.05)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--train-subset", type=int, default=0, help="train on so many images only (0: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the forward passes")
    parser.add_argument("--threads", type=int, default=0, help="torch's CPU threads (0: as torch chooses)")
    args = parser.parse_args()
    args.stages = args.stages.split(",")
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"--stages: unknown {', '.join(sorted(unknown))}; choose from {', '.join(STAGES)}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Data: decoded once into one uint8 tensor, augmented a whole batch at a time.


class Images(NamedTuple):
    pixels: Tensor  # uint8 [images, 32, 32, 3]
    labels: Tensor  # int64 [images]
    classes: int

    def to(self, device: str) -> "Images":
        return Images(self.pixels.to(device), self.labels.to(device), self.classes)


def load_images(root: Path, train: bool, subset: int, download: bool) -> Images:
    """Decode one split; `subset` > 0 takes that many images, the same ones every time."""
    split = "train" if train else "test"
    source: CIFAR10 | ImageFolder
    if download or (root / CIFAR10.base_folder).is_dir():
        source = CIFAR10(str(root), train, download=download)
    elif (root / split).is_dir():
        source = ImageFolder(str(root / split))
    else:
        raise SystemExit(f"--data {root}: neither {split}/ nor {CIFAR10.base_folder}/ is there (or pass --download)")
    labels = torch.tensor(source.targets)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: subset or None]
    pixels = torch.empty(len(chosen), 32, 32, 3, dtype=torch.uint8)
    for row, index in enumerate(tqdm(chosen.tolist(), desc=f"decode {split}", leave=False)):
        image = np.array(source[index][0])
        if image.shape != (32, 32, 3):
            raise SystemExit(f"--data {root}: image {index} of {split}/ is {image.shape}, expected (32, 32, 3)")
        pixels[row] = torch.from_numpy(image)
    return Images(pixels, labels[chosen], len(source.classes))


def normalised(pixels: Tensor) -> Tensor:
    """uint8 [n, 32, 32, 3] -> float32 [n, 3, 32, 32] in channels_last memory order."""
    mean, std = (torch.tensor(values, device=pixels.device) for values in (MEAN, STD))
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pad by 4, crop 32x32 at a random place, flip every second image or so; uint8 in and out."""
    count, size = pixels.shape[:2]
    top, left = torch.randint(0, 9, (2, count, 1), generator=generator)
    flip = torch.rand(count, 1, generator=generator) < 0.5
    steps = torch.arange(size)
    rows = (top + steps).to(pixels.device)
    columns = (left + torch.where(flip, steps.flip(0), steps)).to(pixels.device)
    padded = F.pad(pixels, (0, 0, 4, 4, 4, 4))
    images = torch.arange(count, device=pixels.device)
    return padded[images[:, None, None], rows[:, :, None], columns[:, None, :]]


def batches_per_epoch(images: Images, args: argparse.Namespace) -> int:
    return max(1, len(images.labels) // args.batch_size)  # the incomplete last batch is dropped


def training_batches(images: Images, stage: str, epoch: int, args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch; its order and crops depend on (seed, stage, epoch) alone, so a resumed run is the same run."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_000 + STAGES.index(stage) * 10_000 + epoch)
    order = torch.randperm(len(images.labels), generator=generator)
    for step in range(batches_per_epoch(images, args)):
        chosen = order[step * args.batch_size : (step + 1) * args.batch_size].to(images.labels.device)
        yield normalised(augmented(images.pixels[chosen], generator)), images.labels[chosen]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def cosine(step: int, steps: int) -> float:
    """Learning-rate factor: 5 % linear warm-up, then a half cosine down to 0."""
    warmup = max(1, round(0.05 * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def sgd(model: nn.Module, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.precision == "bf16")


@torch.no_grad()
def evaluate(model: nn.Module, images: Images, args: argparse.Namespace) -> float:
    """Top-1 accuracy in per cent."""
    model.eval()
    right = 0
    for pixels, labels in zip(images.pixels.split(1000), images.labels.split(1000), strict=True):
        with autocast(args):
            right += int((model(normalised(pixels)).argmax(1) == labels).sum())
    return 100 * right / len(images.labels)


def build(args: argparse.Namespace, classes: int) -> nn.Module:
    torch.manual_seed(args.seed)
    return MODELS[args.model](classes, args.width).to(args.device, memory_format=torch.channels_last)


def settings_of(stage: str, args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SETTINGS[stage]}


def log(args: argparse.Namespace, line: str) -> None:
    tqdm.write(line)
    with (args.out / "log.txt").open("a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: `write(temporary path)`, then one atomic rename."""
    temporary = path.with_name(f"{path.stem}.partial{path.suffix}")
    write(temporary)
    os.replace(temporary, path)


def load_checkpoint(stage: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """The stage's checkpoint, or None where there is none yet; stops where it was made with other settings."""
    path = args.out / f"{stage}.pt"
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location=args.device, weights_only=True)
    wanted = settings_of(stage, args)
    if differing := {name for name in wanted if state["settings"].get(name) != wanted[name]}:
        changes = ", ".join(f"{name}: {state['settings'].get(name)} -> {wanted[name]}" for name in sorted(differing))
        raise SystemExit(f"{path} was made with other settings ({changes}); choose another --out or delete it")
    return state


def fit(model: nn.Module, train: Images, test: Images, stage: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train `model` in place for the stage's epochs, from its last checkpoint on; returns the last checkpoint."""
    epochs, lr = (args.epochs, args.lr) if stage == "train" else (args.finetune_epochs, args.finetune_lr)
    optimizer = sgd(model, lr)
    state: dict[str, Any] = {"epoch": 0, "accuracy": [], "seconds": 0.0, "settings": settings_of(stage, args)}
    if (saved := load_checkpoint(stage, args)) is not None:
        state = saved
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    per_epoch = batches_per_epoch(train, args)
    for epoch in range(state["epoch"], epochs):
        start = time.perf_counter()
        model.train()
        batches = training_batches(train, stage, epoch, args)
        bar = tqdm(batches, total=per_epoch, desc=f"{stage} {epoch + 1}/{epochs}", leave=False)
        for step, (images, labels) in enumerate(bar, start=epoch * per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = lr * cosine(step, epochs * per_epoch)
            with autocast(args):
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", lr=f"{optimizer.param_groups[0]['lr']:.4f}")
        accuracy = evaluate(model, test, args)
        seconds = time.perf_counter() - start
        state["epoch"], state["seconds"] = epoch + 1, state["seconds"] + seconds
        state["accuracy"].append(accuracy)
        state["model"], state["optimizer"] = model.state_dict(), optimizer.state_dict()
        write_whole(args.out / f"{stage}.pt", lambda path: torch.save(state, path))
        log(args, f"{stage} epoch {epoch + 1}/{epochs}: loss {loss.item():.3f}, test {accuracy:.2f} %, {seconds:.1f} s")
    return state


# ---------------------------------------------------------------------------------------------------------------------
# Search and cut


def search_and_cut(train: Images, test: Images, args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """Learn the widths of the trained network, cut it, recalibrate its norms; returns the small network and a record."""
    from dnal_nni import Budget, DNALPruner, load_compressed, save_compressed

    cut = args.out / "cut.safetensors"
    state = load_checkpoint("search", args)
    if state is not None:
        return load_compressed(build(args, train.classes), cut), state

    model = trained_model(train.classes, args)
    optimizer = sgd(model, args.search_lr)
    dummy_input = normalised(test.pixels[:1])
    steps = args.search_epochs * batches_per_epoch(train, args)
    start = time.perf_counter()
    pruner = DNALPruner(model, [{"op_types": ["Conv2d"]}], dummy_input=dummy_input, budget=Budget(flops=args.flops))
    with pruner.search(steps=steps, optimizer=optimizer) as search:
        for epoch in range(args.search_epochs):
            for images, labels in training_batches(train, "search", epoch, args):
                with autocast(args):
                    loss = F.cross_entropy(model(images), labels)
                search.step(loss)
    searched = time.perf_counter()
    slim = pruner.speedup()
    with autocast(args):
        batches = training_batches(train, "search", args.search_epochs, args)
        update_bn(itertools.islice(batches, RECALIBRATION_BATCHES), slim)
    state = {
        "settings": settings_of("search", args),
        "seconds": searched - start,
        "seconds_cut": time.perf_counter() - searched,
        "accuracy_after_cut": evaluate(slim, test, args),
        "report": pruner.report.to_dict(),
    }
    log(args, f"search {state['seconds']:.1f} s; right after the cut: test {state['accuracy_after_cut']:.2f} %")
    write_whole(cut, lambda path: save_compressed(slim, path))
    write_whole(args.out / "search.pt", lambda path: torch.save(state, path))
    return slim, state


def trained_model(classes: int, args: argparse.Namespace) -> nn.Module:
    """The network as the train stage left it."""
    state = load_checkpoint("train", args)
    if state is None or state["epoch"] < args.epochs:
        raise SystemExit(f"{args.out / 'train.pt'} is missing or incomplete: run the train stage first")
    model = build(args, classes)
    model.load_state_dict(state["model"])
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Report


@torch.no_grad()
def latencies_ms(models: dict[str, nn.Module], image: Tensor, repeats: int = 100) -> dict[str, float]:
    """Median time of a float32 forward pass per model; the models take turns, so that both see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 10):  # the first 10 warm up
        for name, model in models.items():
            start = time.perf_counter()
            model.eval()(image)
            if image.is_cuda:
                torch.cuda.synchronize()
            if turn >= 10:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def plot_widths(groups: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6, 0.3 * len(groups)), 4), layout="constrained")
    axes = figure.add_subplot(ylabel="channels", title="channels before (grey) and after")
    names = [group["name"] for group in groups]
    axes.bar(names, [group["units"] for group in groups], color="lightgrey")
    axes.bar(names, [group["kept"] for group in groups], color="tab:blue")
    axes.tick_params(axis="x", labelrotation=90, labelsize=7)
    figure.savefig(path, dpi=150)


def write_report(slim: nn.Module, search: dict[str, Any], finetune: dict[str, Any], test: Images, args: argparse.Namespace) -> None:
    from dnal_nni import measure

    train = load_checkpoint("train", args)
    assert train is not None
    image = normalised(test.pixels[:1])
    models = {"before": trained_model(test.classes, args), "after": slim}
    accuracy = {"before": train["accuracy"][-1], "after": [search["accuracy_after_cut"], *finetune["accuracy"]][-1]}
    latency = latencies_ms(models, image)
    report: dict[str, Any] = {}
    for name, model in models.items():
        size = measure(model, image)
        report[name] = {
            "flops": size.flops,
            "params": size.params,
            "accuracy": accuracy[name],
            "latency_ms": latency[name],
        }
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    gpu = args.device == "cuda"
    report |= {
        "accuracy_after_cut": search["accuracy_after_cut"],
        "max_abs_diff": search["report"]["max_abs_diff"],
        "groups": search["report"]["groups"],
        "target": args.flops,
        "seconds": {
            "train": train["seconds"],
            "search": search["seconds"],
            "cut": search["seconds_cut"],
            "finetune": finetune["seconds"],
        },
        "seed": args.seed,
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit.stdout.strip() or None,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "torchvision", "nni", "fvcore")},
        "device": torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
    }
    write_whole(args.out / "report.json", lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
    plot_widths(search["report"]["groups"], args.out / "widths.png")
    for name in models:
        row = report[name]
        log(
            args,
            f"{name:6} {row['flops'] / 1e6:8.2f} MFLOPs {row['params'] / 1e6:7.3f} M params "
            f"{row['accuracy']:6.2f} % {row['latency_ms']:6.2f} ms",
        )


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    log(args, shlex.join(["python", *sys.argv]))
    train = load_images(args.data, True, args.train_subset, args.download).to(args.device)
    test = load_images(args.data, False, 0, args.download).to(args.device)

    if "train" in args.stages:
        fit(build(args, train.classes), train, test, "train", args)
    if "search" in args.stages:
        search_and_cut(train, test, args)
    if "finetune" in args.stages:
        from dnal_nni import save_compressed

        slim, search = search_and_cut(train, test, args)
        finetune = fit(slim, train, test, "finetune", args)
        write_whole(args.out / "slim.safetensors", lambda path: save_compressed(slim, path))
        write_report(slim, search, finetune, test, args)


if __name__ == "__main__":
    main()
