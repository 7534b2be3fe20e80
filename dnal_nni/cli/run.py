"""What ``dnal compress`` does: search, cut and fine-tune a classifier, with a checkpoint after every epoch."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import random
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import update_bn
from tqdm.auto import tqdm

from ..cost.latency import latencies
from ..errors import DNALError, told
from ..modules.layers import mixing
from ..modules.running import FORWARD_ERRORS
from ..progress import logger, phase
from ..report.record import Report
from ..storage.compressed import load_compressed, save_compressed
from ..storage.reports import REPORT, read_report
from ..storage.state import load_state, save_state, under_own_names
from ..storage.whole import write_whole
from .data import each, loaders
from .settings import Settings
from .targets import load_target, load_weights

if TYPE_CHECKING:
    from ..plugin.pruner import DNALPruner


CHECKPOINT, PAGE, NETWORK = "checkpoint.safetensors", "report.html", "slim.safetensors"
RECALIBRATION_BATCHES, WARM_UP = 50, 0.05
_FREE = ("out", "device", "workers", "tensorboard")  # may differ where a run goes on


def compress(settings: Settings, command: str | None = None) -> Report:
    """Run all of it, or what is left to do of it; the files in ``settings.out`` are the result.

    Args:
        settings: what to do. A folder that holds the work of other settings is refused.
        command: for the report.

    Returns:
        the report, as it stands in ``report.json``.

    Raises:
        DNALError: whatever the caller can mend; the checkpoint of the last whole epoch is then still there.
    """
    out = settings.out
    if settings.tensorboard and find_spec("tensorboard") is None:
        raise DNALError("--tensorboard needs tensorboard: pip install tensorboard")
    with told(f"{out} cannot be made", OSError):
        out.mkdir(parents=True, exist_ok=True)
    finished = out / REPORT
    if finished.exists():
        report = read_report(finished)
        _check_same(settings, report.settings, finished)
        return report
    state = load_state(out / CHECKPOINT) if (out / CHECKPOINT).exists() else None
    if state is not None:
        _check_same(settings, state["settings"], out / CHECKPOINT)
    logger.info("%s: at the beginning" if state is None else "%s: taken up where it was left", out)
    run = Run(settings, state)
    report = run.finetune(*run.search())
    report.command, report.settings, report.notes = command, settings.to_dict(), [*report.notes, *run.notes]
    save_compressed(run.slim, out / NETWORK, report)
    write_whole(out / PAGE, lambda path: path.write_text(report.to_html()))
    write_whole(finished, lambda path: path.write_text(report.to_json() + "\n"))
    (out / CHECKPOINT).unlink(missing_ok=True)
    if settings.tensorboard:
        report.to_tensorboard(out / "tensorboard")
    return report


def _check_same(settings: Settings, theirs: dict[str, Any], path: Path) -> None:
    theirs = {field.name: field.default for field in dataclasses.fields(Settings)} | theirs  # of an older version
    for name, mine in settings.to_dict().items():
        if name not in _FREE and theirs[name] != mine:
            raise DNALError(
                f"{path} is of a run with {name} {theirs[name]!r}, and this one has {mine!r}: choose another --out, or "
                "delete it"
            )


def seed_everything(seed: int) -> None:
    """Every source of random numbers that loaders and models use: each epoch is the same whatever ran before it."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class Run:
    """The stages of one run."""

    def __init__(self, settings: Settings, state: dict[str, Any] | None) -> None:
        self.settings, self.state = settings, state or {"stage": "search", "epoch": 0, "seconds": 0.0}
        self.device = _device(settings.device)
        seed_everything(settings.seed)
        with told(f"{settings.data} cannot be used"):
            self.train, self.test, self.notes = loaders(settings)
        if settings.keep_best and self.test is None:
            raise DNALError("--keep-best needs data to test on, and there are none")
        if settings.weights is None:
            said = f"no --weights were given: {settings.model} starts with its own, random ones unless it loads some"
            self.notes.append(said)
        for note in self.notes:
            logger.warning(note)
        self.dummy_input = self._example()

    def _example(self) -> Tensor:
        """One input: the first of the data, which are thereby looked at."""
        batch = next(each(self.train, self.settings.data), None)
        if not (isinstance(batch, (list, tuple)) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)):
            raise DNALError(f"{self.settings.data} gives no batches (inputs, labels) of two tensors")
        inputs, labels = batch
        if labels.dtype != torch.int64 or labels.shape != (len(inputs),):
            raise DNALError(
                f"{self.settings.data} gives labels of {labels.dtype} and shape {list(labels.shape)}, not one class "
                "number (int64) an input: dnal compress trains classifiers, other networks go through DNALPruner"
            )
        return inputs[:1].to(self.device)

    def model(self) -> nn.Module:
        """The dense network, anew."""
        seed_everything(self.settings.seed)
        model = load_target(self.settings.model, self.settings.kwargs)
        if self.settings.weights is not None:
            model = load_weights(model, self.settings.weights)
        return model.to(self.device)

    def save(self, **state: Any) -> None:
        self.state = {"settings": self.settings.to_dict(), **state}
        save_state(self.settings.out / CHECKPOINT, self.state)

    def batches(self, stage: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        seed_everything(self.settings.seed * 1_000_000 + stage * 10_000 + epoch)
        for inputs, labels in itertools.islice(each(self.train, self.settings.data), len(self.train)):
            yield inputs.to(self.device), labels.to(self.device)

    def scores(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """What the network returns for a batch: one score a class."""
        with told("the network fails on the data", FORWARD_ERRORS):
            outputs = model(inputs)
        if not isinstance(outputs, Tensor) or outputs.dim() != 2:
            raise DNALError(
                "the network returns no scores [batch, classes]: dnal compress trains classifiers, other networks go "
                "through DNALPruner"
            )
        largest = int(labels.max())
        if largest >= outputs.shape[1]:
            raise DNALError(f"the data have a class {largest}, the network only {outputs.shape[1]} scores")
        return outputs

    @torch.no_grad()
    def accuracy(self, model: nn.Module, bar: bool = True) -> float | None:
        """Top-1 in per cent, or None without data to test on."""
        if self.test is None:
            return None
        model.eval()
        right = total = 0
        batches = each(self.test, self.settings.data)
        shown = tqdm(batches, desc="test", total=len(self.test), unit="batch", leave=False, disable=not bar)
        for inputs, labels in shown:
            inputs, labels = inputs.to(self.device), labels.to(self.device)
            right += int((self.scores(model, inputs, labels).argmax(1) == labels).sum())
            total += len(labels)
        return 100 * right / max(total, 1)

    def search(self) -> tuple[Report, float]:
        """Search and cut; the report so far, and the seconds of fine-tuning that have been spent already."""
        from ..plugin.pruner import DNALPruner

        settings, state, slim_file = self.settings, self.state, self.settings.out / NETWORK
        if state["stage"] == "finetune":
            self.slim = load_compressed(self.model(), slim_file)
            return read_report(slim_file), state["seconds"]
        model = self.model()
        before = state["accuracy"] if "accuracy" in state else self.accuracy(model)
        optimizer = torch.optim.SGD(model.parameters(), settings.lr, momentum=0.9, weight_decay=1e-4)
        kinds = {type(m).__name__ for m in model.modules() if mixing(m)}
        config = [{"op_types": sorted(kinds)}]
        limits, graph = settings.budget(), settings.graph
        pruner = DNALPruner(model, config, dummy_input=self.dummy_input, budget=limits, graph=graph)
        if state["epoch"] > 0:
            model.load_state_dict(under_own_names(state["model"], model.state_dict()))
            optimizer.load_state_dict(state["optimizer"])
            pruner.load_state_dict(state["pruner"])
        seconds = state["seconds"]
        with pruner.search(settings.search_epochs * len(self.train), optimizer=optimizer) as search:
            for epoch in range(state["epoch"], settings.search_epochs):
                start = time.perf_counter()
                model.train()
                for inputs, labels in self.batches(1, epoch):
                    search.step(F.cross_entropy(self.scores(model, inputs, labels), labels))
                seconds += time.perf_counter() - start
                self.save(
                    stage="search",
                    epoch=epoch + 1,
                    seconds=seconds,
                    accuracy=before,
                    model=model.state_dict(),
                    optimizer=optimizer.state_dict(),
                    pruner=pruner.state_dict(),
                )
        return self.cut(pruner, before, seconds), 0.0

    def cut(self, pruner: DNALPruner, before: float | None, seconds: float) -> Report:
        self.slim = pruner.speedup()
        with phase("estimating the norms' statistics anew"):
            update_bn(itertools.islice(self.batches(2, 0), RECALIBRATION_BATCHES), self.slim)
        report = pruner.report
        report.seconds["search"] = seconds
        pruner.unwrap_model()  # the dense network as it was
        with phase("measuring the latency"):
            dense, slim = latencies([pruner.bound_model, self.slim], self.dummy_input)
        report.latency_ms = (dense, slim)
        after = self.accuracy(self.slim)
        if before is not None and after is not None:
            report.accuracy, report.accuracy_cut = (before, after), after if self.settings.epochs else None
        save_compressed(self.slim, self.settings.out / NETWORK, report)
        self.save(stage="finetune", epoch=0, seconds=0.0)
        return report

    def finetune(self, report: Report, seconds: float) -> Report:
        settings, state, slim = self.settings, self.state, self.slim
        optimizer = torch.optim.SGD(slim.parameters(), settings.finetune_lr, momentum=0.9, weight_decay=1e-4)
        steps = settings.epochs * len(self.train)
        schedule = OneCycleLR(optimizer, settings.finetune_lr, steps + 1, pct_start=WARM_UP, cycle_momentum=False)
        done = state["epoch"] if "schedule" in state else 0  # version 0.1 kept none: fine-tuning begins anew
        best: dict[str, Any] | None = None
        if done > 0:
            slim.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            best = state["best"]
        bar = tqdm(total=steps, initial=done * len(self.train), desc="fine-tune", unit="step")
        with contextlib.closing(bar):
            for epoch in range(done, settings.epochs):
                start = time.perf_counter()
                slim.train()
                for inputs, labels in self.batches(3, epoch):
                    loss = F.cross_entropy(self.scores(slim, inputs, labels), labels)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.update()
                if not math.isfinite(float(loss.detach())):
                    raise DNALError(
                        f"the loss is nan or infinite in epoch {epoch + 1} of fine-tuning: lower --finetune-lr; "
                        f"{settings.out / CHECKPOINT} is of the epoch before"
                    )
                if settings.keep_best:
                    accuracy = self.accuracy(slim, bar=False)
                    if best is None or accuracy > best["accuracy"]:
                        best = {"epoch": epoch + 1, "accuracy": accuracy, "model": copy.deepcopy(slim.state_dict())}
                seconds += time.perf_counter() - start
                self.save(
                    stage="finetune",
                    epoch=epoch + 1,
                    seconds=seconds,
                    model=slim.state_dict(),
                    optimizer=optimizer.state_dict(),
                    schedule=schedule.state_dict(),
                    best=best,
                )
        if best is not None:
            slim.load_state_dict(best["model"])
            self.notes.append(
                f"of {settings.epochs} epochs of fine-tuning the best was kept, {best['epoch']}: best on the data that "
                "the accuracy is of, which flatters it"
            )
        report.seconds["finetune"] = seconds
        after = self.accuracy(slim)
        if report.accuracy is not None and after is not None:
            report.accuracy = (report.accuracy[0], after)
        return report


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise DNALError(f"there is no device {name} on this machine") from error
