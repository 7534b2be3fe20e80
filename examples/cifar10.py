"""CIFAR-10 from start to finish: train a network, search its widths, cut it, fine-tune the smaller one.

    python examples/cifar10.py --data DIR --out runs/r20 --model resnet20 --flops 0.5

DIR holds train/ and test/, each with one folder of 32x32 images per class, or torchvision's cifar-10-batches-py.
Every epoch ends in a checkpoint under --out; the same command run again goes on where it stopped, and ends with the
same network. A stage that is complete is not redone. The result is OUT/report.json, the network OUT/slim.safetensors.
ResNet-20 takes about a minute an epoch on two CPU cores; give --threads 1 where others share them.

    torchrun --nproc_per_node=2 examples/cifar10.py --data DIR --out runs/r20    (the same, in two processes)
"""

import argparse
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cifar_data import Images, batches_per_epoch, load_images, normalised, training_batches
from cifar_models import MODELS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from tqdm.auto import tqdm

STAGES = ("train", "search", "finetune")
RECALIBRATION_BATCHES = 50

# What the result of a stage depends on: a checkpoint is only taken up by a run that asks for the same.
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
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="of the forward passes (default: the faster)")
    parser.add_argument("--threads", type=int, default=0, help="torch's CPU threads (0: as torch chooses)")
    args = parser.parse_args()
    args.stages = args.stages.split(",")
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"--stages: unknown {', '.join(sorted(unknown))}; choose from {', '.join(STAGES)}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.precision is None:  # without AVX-512, bfloat16 is several times slower on a CPU
        fast = args.device == "cuda" or "AVX512" in torch.backends.cpu.get_cpu_capability()
        args.precision = "bf16" if fast else "fp32"
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Several processes: torchrun starts them, every one makes the same calls, rank 0 writes


def ranks() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join(args: argparse.Namespace) -> None:
    """Meet the other processes that torchrun has started."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def meet() -> None:
    """Wait for the others: what rank 0 has written can be read."""
    if dist.is_initialized():
        dist.barrier()


def reduced(model: nn.Module) -> nn.Module:
    """`model`, with the mean of all processes' gradients where there are several."""
    return DistributedDataParallel(model) if ranks()[1] > 1 else model


def epoch_batches(train: Images, stage: str, epoch: int, args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of an epoch's batches."""
    return training_batches(train, args.batch_size, epoch_seed(stage, epoch, args), *ranks())


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
    for pixels, labels in zip(torch.split(images.pixels, 1000), torch.split(images.labels, 1000), strict=True):
        with autocast(args):
            right += int((model(normalised(pixels)).argmax(1) == labels).sum())
    return 100 * right / len(images.labels)


def build(args: argparse.Namespace, classes: int) -> nn.Module:
    torch.manual_seed(args.seed)
    form = torch.channels_last if args.precision == "bf16" else torch.contiguous_format  # docs/howto.md has why
    return MODELS[args.model](classes, args.width).to(args.device).to(memory_format=form)


def epoch_seed(stage: str, epoch: int, args: argparse.Namespace) -> int:
    """Every epoch draws its own order and crops, whatever ran before it: so a resumed run is the same run."""
    return int(args.seed) * 1_000_000 + STAGES.index(stage) * 10_000 + epoch


def settings_of(stage: str, args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SETTINGS[stage]}


def log(args: argparse.Namespace, line: str) -> None:
    if ranks()[0] > 0:
        return
    tqdm.write(line)
    with (args.out / "log.txt").open("a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: `write(temporary path)`, then one atomic rename. Rank 0 does it."""
    if ranks()[0] == 0:
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
    per_epoch = batches_per_epoch(train, args.batch_size)
    parallel = reduced(model)
    for epoch in range(state["epoch"], epochs):
        start = time.perf_counter()
        model.train()
        batches, hidden = epoch_batches(train, stage, epoch, args), ranks()[0] > 0
        bar = tqdm(batches, total=per_epoch, desc=f"{stage} {epoch + 1}/{epochs}", leave=False, disable=hidden)
        for step, (images, labels) in enumerate(bar, start=epoch * per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = lr * cosine(step, epochs * per_epoch)
            with autocast(args):
                loss = F.cross_entropy(parallel(images), labels)
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
        meet()
        log(args, f"{stage} epoch {epoch + 1}/{epochs}: loss {loss.item():.3f}, test {accuracy:.2f} %, {seconds:.1f} s")
    return state


# ---------------------------------------------------------------------------------------------------------------------
# Search and cut


def trained_model(classes: int, args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The network as the train stage left it, and that stage's checkpoint."""
    state = load_checkpoint("train", args)
    if state is None or state["epoch"] < args.epochs:
        raise SystemExit(f"{args.out / 'train.pt'} is missing or incomplete: run the train stage first")
    model = build(args, classes)
    model.load_state_dict(state["model"])
    return model, state


def search_and_cut(train: Images, test: Images, args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """Learn the trained network's widths, cut it, recalibrate its norms; returns the small network and a record."""
    from dnal_nni import Budget, DNALPruner, load_compressed, save_compressed

    cut = args.out / "cut.safetensors"
    state: dict[str, Any] = {"epoch": 0, "seconds": 0.0, "settings": settings_of("search", args)}
    state = load_checkpoint("search", args) or state
    if "report" in state:
        return load_compressed(build(args, train.classes), cut), state

    model, _ = trained_model(train.classes, args)
    optimizer = sgd(model, args.search_lr)
    dummy_input = normalised(test.pixels[:1])
    pruner = DNALPruner(model, [{"op_types": ["Conv2d"]}], dummy_input=dummy_input, budget=Budget(flops=args.flops))
    if state["epoch"] > 0:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        pruner.load_state_dict(state["pruner"])
    steps = args.search_epochs * batches_per_epoch(train, args.batch_size)
    parallel = reduced(model)
    with pruner.search(steps=steps, optimizer=optimizer) as search:
        for epoch in range(state["epoch"], args.search_epochs):
            start = time.perf_counter()
            model.train()
            for images, labels in epoch_batches(train, "search", epoch, args):
                with autocast(args):
                    loss = F.cross_entropy(parallel(images), labels)
                search.step(loss)
            state["epoch"], state["seconds"] = epoch + 1, state["seconds"] + time.perf_counter() - start
            state["model"], state["optimizer"] = model.state_dict(), optimizer.state_dict()
            state["pruner"] = pruner.state_dict()
            write_whole(args.out / "search.pt", lambda path: torch.save(state, path))

    start = time.perf_counter()
    slim = pruner.speedup()
    with autocast(args):
        batches = epoch_batches(train, "search", args.search_epochs, args)
        update_bn(itertools.islice(batches, RECALIBRATION_BATCHES), slim)
    write_whole(cut, lambda path: save_compressed(slim, path))
    record = {
        "settings": state["settings"],
        "seconds": state["seconds"],
        "seconds_cut": time.perf_counter() - start,
        "accuracy_after_cut": evaluate(slim, test, args),
        "report": pruner.report.to_dict(),
    }
    write_whole(args.out / "search.pt", lambda path: torch.save(record, path))
    meet()
    log(args, f"search {record['seconds']:.1f} s; right after the cut: test {record['accuracy_after_cut']:.2f} %")
    return load_compressed(build(args, train.classes), cut), record


# ---------------------------------------------------------------------------------------------------------------------
# Report


def plot_widths(groups: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6, 0.3 * len(groups)), 4), layout="constrained")
    axes = figure.add_subplot(ylabel="channels", title="channels before (grey) and after")
    names = [group["name"] for group in groups]
    axes.bar(names, [group["units"] for group in groups], color="lightgrey")
    axes.bar(names, [group["kept"] for group in groups], color="tab:blue")
    axes.tick_params(axis="x", labelrotation=90, labelsize=7)
    figure.savefig(path, dpi=150)


def versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "torch-pruning", "fvcore", "nni")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def commit() -> str | None:
    """The git commit this script stands at; None outside of a checkout."""
    command = ["git", "rev-parse", "HEAD"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def write_report(
    slim: nn.Module, search: dict[str, Any], finetune: dict[str, Any], test: Images, args: argparse.Namespace
) -> None:
    from dnal_nni import measure
    from dnal_nni.cost.latency import latencies

    dense, train = trained_model(test.classes, args)
    image = normalised(test.pixels[:1])
    models = {"before": dense, "after": slim}
    accuracy = {"before": train["accuracy"][-1], "after": [search["accuracy_after_cut"], *finetune["accuracy"]][-1]}
    latency = dict(zip(models, latencies([dense, slim], image)))
    report: dict[str, Any] = {}
    for name, model in models.items():
        size = measure(model, image)
        report[name] = {"flops": size.flops, "params": size.params}
        report[name] |= {"accuracy": accuracy[name], "latency_ms": latency[name]}
        sizes = f"{size.flops / 1e6:8.2f} MFLOPs {size.params / 1e6:7.3f} M params"
        log(args, f"{name:6} {sizes} {accuracy[name]:6.2f} % {latency[name]:6.2f} ms")
    on_cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    report |= {
        "accuracy_after_cut": search["accuracy_after_cut"],
        "max_abs_diff": search["report"]["max_abs_diff"],
        "target": args.flops,
        "seconds": {
            "train": train["seconds"],
            "search": search["seconds"],
            "cut": search["seconds_cut"],
            "finetune": finetune["seconds"],
        },
        "groups": search["report"]["groups"],
        "settings": finetune["settings"],
        "seed": args.seed,
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else on_cpu,
    }
    write_whole(args.out / "report.json", lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
    plot_widths(search["report"]["groups"], args.out / "widths.png")


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    join(args)
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

        slim, search = search_and_cut(train, test, args)  # the result of the search stage, where that was run
        finetune = fit(slim, train, test, "finetune", args)
        write_whole(args.out / "slim.safetensors", lambda path: save_compressed(slim, path))
        if ranks()[0] == 0:
            write_report(slim, search, finetune, test, args)
    meet()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
