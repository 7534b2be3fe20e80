"""What ``dnal compress`` does: search, cut and fine-tune a classifier, with a checkpoint after every epoch."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..compression import NOTHING_DONE, Compression, epochs_of_search
from ..errors import DNALError, told
from ..modules.running import FORWARD_ERRORS
from ..plan import Plan
from ..progress import logger, phase
from ..report.record import Report
from ..search.multiples import FAST
from ..session import Session
from ..storage.compressed import load_compressed, save_compressed
from ..storage.reports import REPORT, read_report
from ..storage.state import load_state, save_state, under_own_names
from ..storage.whole import write_whole
from .data import Loader, check_out, each, loaders
from .settings import LIMITS, Settings
from .targets import load_target, load_weights

CHECKPOINT, PAGE, NETWORK, ONNX = "checkpoint.safetensors", "report.html", "slim.safetensors", "slim.onnx"
_FREE = ("out", "device", "workers", "tensorboard")  # may differ where a run goes on

# what the task is, and where it runs: no decisions about the network
_GIVEN = (
    *(*_FREE, *LIMITS, "model", "kwargs", "weights", "data", "input", "mean", "std", "skip_unreadable"),
    *("seed", "onnx"),
)


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
    if settings.onnx and not (find_spec("onnx") and find_spec("onnxscript")):
        raise DNALError("--onnx needs onnx and onnxscript: pip install onnx onnxscript")
    if settings.onnx and "external_data" not in inspect.signature(torch.onnx.export).parameters:
        raise DNALError(f"--onnx needs torch 2.5 or newer, and this is {torch.__version__}")
    check_out(settings)
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
    report = run.compress()
    report.command, report.settings, report.notes = command, settings.to_dict(), [*run.notes, *report.notes]
    if report.interventions is not None:
        defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
        decided = {name: value for name, value in vars(settings).items() if name not in _GIVEN}
        report.interventions = report.interventions.with_arguments(decided, defaults)
    if settings.onnx:
        try:
            write_whole(out / ONNX, run.export)
        except DNALError as error:  # all the rest is there
            report.notes.append(str(error))
            logger.warning(str(error))
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
        self.settings, self.state = settings, state or {"stage": "search", **NOTHING_DONE}
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
        for inputs, _ in self.pairs(self.train):
            return inputs[:1]
        raise DNALError(f"{self.settings.data} gives no batches (inputs, labels) of two tensors")

    def pairs(self, loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch of batches ``(inputs, labels)``, each looked at, on the device."""
        data = self.settings.data
        for batch in itertools.islice(each(loader, data), len(loader)):
            if not (isinstance(batch, (list, tuple)) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)):
                raise DNALError(f"{data} gives no batches (inputs, labels) of two tensors")
            inputs, labels = batch
            if labels.dtype != torch.int64 or labels.shape != (len(inputs),):
                raise DNALError(
                    f"{data} gives labels of {labels.dtype} and shape {list(labels.shape)}, not one class number "
                    "(int64) an input: dnal compress trains classifiers, other networks go through DNALPruner"
                )
            if len(labels) and int(labels.min()) < 0:
                raise DNALError(f"{data} gives a class {int(labels.min())}: classes are numbered from 0 on")
            yield inputs.to(self.device), labels.to(self.device)

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
        yield from self.pairs(self.train)

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
    def accuracy(self, model: nn.Module) -> float:
        """Top-1 in per cent, on the data to test on."""
        assert self.test is not None
        model.eval()
        right = total = 0
        shown = tqdm(self.pairs(self.test), desc="test", total=len(self.test), unit="batch", leave=False)
        for inputs, labels in shown:
            right += int((self.scores(model, inputs, labels).argmax(1) == labels).sum())
            total += len(labels)
        return 100 * right / max(total, 1)

    def stages(self, model: nn.Module) -> Compression:
        """What is done to the dense network, on the data, with a checkpoint after every epoch."""
        settings = self.settings
        rates = {1: settings.lr, 3: settings.finetune_lr}

        return Compression(
            batches=self.batches,
            steps=len(self.train),
            loss=lambda model, batch: F.cross_entropy(self.scores(model, *batch), batch[1]),
            validate=self.accuracy if self.test is not None else None,
            optimizer=lambda parameters, stage: torch.optim.SGD(
                parameters, rates[stage], momentum=0.9, weight_decay=1e-4
            ),
            search_epochs=epochs_of_search(settings.search_epochs, model),
            epochs=settings.epochs,
            keep_best=settings.keep_best,
            remedy=f"lower --finetune-lr; {settings.out / CHECKPOINT} is of the epoch before",
        )

    def plan(self, model: nn.Module) -> Plan:
        """What of the network can be cut, held to the budget."""
        settings, budget = self.settings, self.settings.budget()
        multiple = settings.channel_multiple or (FAST if settings.onnx else None)
        try:
            return Plan.of(model, self.dummy_input, budget=budget, channel_multiple=multiple, graph=settings.graph)
        except DNALError as error:
            said = str(error).replace(str(budget), settings.limits())
            raise DNALError(said.replace("the dummy_input", f"an input of {settings.data}")) from error

    def export(self, path: Path) -> None:
        """Write the smaller network, in eval mode, as ONNX."""
        with phase("exporting to ONNX"), told("the smaller network cannot be exported to ONNX", FORWARD_ERRORS):
            slim = self.slim.eval()
            torch.onnx.export(slim, (self.dummy_input,), str(path), dynamo=True, verbose=False, external_data=False)

    def compress(self) -> Report:
        """Search, cut and fine-tune, or what is left of it; ``self.slim`` is the network."""
        slim_file, model = self.settings.out / NETWORK, self.model()
        stages = self.stages(model)
        if self.state["stage"] == "finetune":
            self.slim, report = load_compressed(model, slim_file), read_report(slim_file)
        else:
            before = self.state.get("accuracy")
            if before is None and self.test is not None:
                before = self.accuracy(model)
            session = Session(model, self.plan(model))
            stages = dataclasses.replace(stages, save=lambda state: self.save(stage="search", accuracy=before, **state))
            if self.state["epoch"] > 0:
                own = model.state_dict()
                self.state["model"] = under_own_names(self.state["model"], own)
            seconds = stages.search(session, self.state)
            self.slim, report = stages.cut(session, before, seconds)
            save_compressed(self.slim, slim_file, report)
            self.save(stage="finetune", **NOTHING_DONE)
        stages = dataclasses.replace(stages, save=lambda state: self.save(stage="finetune", **state))
        stages.finetune(self.slim, report, self.state)
        return report


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise DNALError(f"there is no device {name} on this machine") from error
