"""Search how two modalities are fused, and count what people still decide.

    python examples/multimodal.py --data builtin --epochs 1 --samples 2 --proxy 1 --final 2 --out out/look
    apt-get install espeak-ng && python examples/multimodal.py --seeds 0 1 2 3 4 --out out/multimodal

The first is a look at it, in under a minute on one CPU core, on a pair that needs nothing installed; the second takes
some five minutes a seed. A digit's picture and its spoken name (multimodal_data.py) go through one space for both
(multimodal_space.py): where they are fused, how, and the operations, depths and widths before and behind that. On it,
under one budget of MACs: random search (after RandomNet, arXiv 2003.01181, of which only the abstract and a first
paragraph are public) and `DNALStrategy`. Beside them each modality by itself, and late fusion by hand.
Needs pytorch_lightning: pip install -e ".[examples,lightning]".

Writes OUT/runs.jsonl, a line for every seed and method (those that are there are not repeated), OUT/table.md and
OUT/accuracy.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from multimodal_data import Pairs, pairs
from torch import Tensor, nn
from torch.utils.data import TensorDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # NNI wraps every class of torch.nn when it is imported
    from multimodal_space import ByHand, Space
    from nni.nas.evaluator.pytorch import DataLoader, Lightning, LightningModule, Trainer
    from nni.nas.nn.pytorch import LayerChoice
    from nni.nas.space import model_context

from dnal_nni import Budget, DNALPruner, DNALStrategy, measure
from dnal_nni.report.interventions import Interventions
from dnal_nni.report.record import versions

BATCH, LR = 64, 0.05
Data = tuple[Pairs, Pairs, Pairs]  # to train on, to choose by, to test on
Found = tuple[nn.Module, Interventions, int, int]  # a network, decisions behind it, epochs and trainings that it took


def paired(x: Tensor, y: Tensor) -> Tensor:
    """A batch whose pictures got the sounds of others of their digit: pairs are learned by heart, digits are not."""
    order = torch.randperm(len(y))
    here, there = y.argsort(stable=True), order[y[order].argsort(stable=True)]
    sounds = torch.empty_like(x[:, 1:]).index_copy(0, here, x[there, 1:])
    return torch.cat((x[:, :1], sounds), 1)


def train(model: nn.Module, data: Pairs, epochs: int, seed: int) -> None:
    """SGD with a one-cycle learning rate."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=1e-3)
    steps = epochs * (len(data.y) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.2)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(data.y), generator=generator).split(BATCH)[: len(data.y) // BATCH]:
            optimizer.zero_grad()
            F.cross_entropy(model(paired(data.x[rows], data.y[rows])), data.y[rows]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Pairs) -> float:
    return 100 * float((model.eval()(data.x).argmax(1) == data.y).double().mean())


class Training(LightningModule):
    """The same for NNI; the model is set by it."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(paired(*batch)), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("accuracy", 100 * (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, LR, momentum=0.9, nesterov=True, weight_decay=1e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps + 1, pct_start=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def evaluator(data: Data, epochs: int, seed: int) -> Lightning:
    """NNI's evaluator of a training on ``data``."""
    shuffle = torch.Generator().manual_seed(seed)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, check_val_every_n_epoch=epochs, num_sanity_val_steps=0,
    )  # fmt: skip
    fit, held = (TensorDataset(part.x, part.y) for part in data[:2])
    loader = DataLoader(fit, batch_size=BATCH, shuffle=True, drop_last=True, generator=shuffle)
    return Lightning(Training(), trainer, loader, DataLoader(held, batch_size=500))


def by_hand(data: Data, args: argparse.Namespace, seed: int, modalities: tuple[int, ...]) -> Found:
    """A network as people make it, trained for as many epochs as `DNALStrategy` and what it finds together."""
    model = ByHand(modalities)
    pruner = DNALPruner(ByHand(modalities), [{"op_types": ["Conv2d", "Linear"]}], dummy_input=data[0].x[:1])
    pruner.harden({})  # no search: every width stays as it was made
    pruner.speedup()
    made = pruner.report.interventions
    assert made is not None
    epochs = args.epochs + args.final
    train(model, data[0], epochs, seed)
    return model, dataclasses.replace(made, changed={"epochs": epochs}), epochs, 1


def fixed_layers(space: nn.Module) -> int:
    """Layers of the space that no choice is about."""
    chosen = {id(part) for m in space.modules() if isinstance(m, LayerChoice) for part in m.modules()}
    return sum(isinstance(m, (nn.Conv2d, nn.Linear)) and id(m) not in chosen for m in space.modules())


def at_random(data: Data, args: argparse.Namespace, seed: int) -> Found:
    """Networks of the space within the budget, each trained for some epochs; the best are trained anew, to the end."""
    rng, choices = random.Random(seed), Space().simplify()
    tried: list[tuple[float, dict[str, Any]]] = []

    def build(sample: dict[str, Any]) -> nn.Module:
        with model_context(sample):
            return Space()

    def score(sample: dict[str, Any], epochs: int) -> tuple[float, nn.Module]:
        model = build(sample)
        train(model, data[0], epochs, seed)
        return accuracy(model, data[1]), model

    while len(tried) < args.samples:
        sample = {label: rng.choice(choice.values) for label, choice in choices.items()}
        if measure(build(sample), data[0].x[:1]).flops <= args.flops:
            tried.append((score(sample, args.proxy)[0], sample))
    best = sorted(tried, key=lambda pair: -pair[0])[: args.finalists]
    _, model = max((score(sample, args.final) for _, sample in best), key=lambda pair: pair[0])
    kinds = {"width": "widths", "hidden": "widths", "depth": "depths"}
    names = [next((kind for part, kind in kinds.items() if part in label), "operations") for label in choices]
    arguments = ("flops", "samples", "proxy", "finalists", "final")
    made = Interventions(
        {kind: names.count(kind) for kind in dict.fromkeys(names)},
        {"operations": fixed_layers(Space())},
        {name: getattr(args, name) for name in arguments},
        candidates=args.samples,
    )
    trained = args.samples * args.proxy + len(best) * args.final
    return model, made, trained, args.samples + len(best)


def learned(data: Data, args: argparse.Namespace, seed: int) -> Found:
    """The network that a single training of the whole space ends with, trained on."""
    strategy = DNALStrategy(Budget(flops=args.flops), single_path=True)
    strategy(Space(), evaluator(data, args.epochs, seed))
    model = strategy.slim_model()
    made = strategy.report.interventions
    assert made is not None
    train(model, data[0], args.final, seed)
    made = dataclasses.replace(made, changed=made.changed | {"epochs": args.epochs, "final": args.final})
    return model, made, args.epochs + args.final, 2


METHODS: dict[str, Callable[[Data, argparse.Namespace, int], Found]] = {
    "picture alone, by hand": lambda data, args, seed: by_hand(data, args, seed, (0,)),
    "sound alone, by hand": lambda data, args, seed: by_hand(data, args, seed, (1,)),
    "late fusion, by hand": lambda data, args, seed: by_hand(data, args, seed, (0, 1)),
    "random search": at_random,
    "DNALStrategy": learned,
}


def one(method: str, data: Data, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    start = time.perf_counter()
    model, made, epochs, trainings = METHODS[method](data, args, seed)
    return {
        "method": method, "seed": seed, "accuracy": accuracy(model, data[2]), "validation": accuracy(model, data[1]),
        "flops": measure(model, data[0].x[:1]).flops, "epochs": epochs, "trainings": trainings,
        "interventions": dataclasses.asdict(made) | {"count": made.count}, "seconds": time.perf_counter() - start,
        "network": str(model),
    }  # fmt: skip


def table(runs: list[dict[str, Any]]) -> str:
    """Means over seeds and, behind a sign, standard deviations."""
    lines = ["| | test accuracy (%) | kFLOPs | trainings | epochs | seconds | decided by people | by search |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for method in METHODS:
        rows = [run for run in runs if run["method"] == method]
        if not rows:
            continue
        right = [row["accuracy"] for row in rows]
        spread = f" ± {statistics.stdev(right):.2f}" if len(right) > 1 else ""
        made = rows[0]["interventions"]
        cells = [
            f"{statistics.mean(right):.2f}{spread}", f"{statistics.mean(row['flops'] for row in rows) / 1e3:.0f}",
            rows[0]["trainings"], rows[0]["epochs"], f"{statistics.mean(row['seconds'] for row in rows):.0f}",
            made["count"], sum(made["searched"].values()),
        ]  # fmt: skip
        lines.append(f"| {method} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def picture(runs: list[dict[str, Any]], path: Path) -> None:
    """A dot for every seed, by method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot(xlabel="test accuracy (%)")
    for y, method in enumerate(METHODS):
        found = [run["accuracy"] for run in runs if run["method"] == method]
        axes.plot(found, [y] * len(found), "o", alpha=0.6)
    axes.set_yticks(range(len(METHODS)), list(METHODS))
    axes.invert_yaxis()
    figure.savefig(path, dpi=110)


def commit() -> str | None:
    """The git commit this script stands at; None outside of a checkout."""
    command = ["git", "rev-parse", "HEAD"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("spoken", "builtin"), default="spoken")
    parser.add_argument("--flops", type=float, default=700e3, help="budget of every network")
    parser.add_argument("--epochs", type=int, default=12, help="of DNALStrategy's search, half of them its warmup")
    parser.add_argument("--samples", type=int, default=30, help="networks that random search tries")
    parser.add_argument("--proxy", type=int, default=6, help="epochs of each of them")
    parser.add_argument("--finalists", type=int, default=3, help="best ones that are trained to the end")
    parser.add_argument("--final", type=int, default=28, help="epochs of these, and of what DNALStrategy finds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("out/multimodal"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="(torch|pytorch_lightning|nni).*")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "runs.jsonl"
    settings = {name: value for name, value in vars(args).items() if name not in ("seeds", "methods", "out")}
    runs = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    runs = [run for run in runs if run["settings"] == settings]
    for seed in args.seeds:
        data = pairs(args.data, args.out, seed)
        for method in args.methods:
            if any((run["method"], run["seed"]) == (method, seed) for run in runs):
                continue
            run = one(method, data, args, seed)
            run |= {"settings": settings, "command": shlex.join(["python", *sys.argv]), "commit": commit()}
            run |= {"versions": versions(), "device": f"{platform.machine()} CPU, 1 thread"}
            runs.append(run)
            with log.open("a") as file:
                file.write(json.dumps(run) + "\n")
            print(f"seed {seed}: {method}: {run['accuracy']:.2f} %, {run['seconds']:.0f} s", flush=True)
    (args.out / "table.md").write_text(table(runs))
    picture(runs, args.out / "accuracy.png")
    print(f"\n{table(runs)}\nwritten: {log}, {args.out / 'table.md'}, {args.out / 'accuracy.png'}")


if __name__ == "__main__":
    main()
