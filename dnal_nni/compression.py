"""From a trained model, a loader and a loss to the smaller network: a choice or a search, cut, fine-tuning.

No NNI here.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import update_bn
from tqdm.auto import tqdm

from .arguments import checked_but, shown
from .budget import Budget
from .callers import Data, Taught, measured, optimizer_of, run, validation
from .cost.latency import latencies
from .errors import DNALError
from .modules.choices import choices_of
from .modules.given import check_model
from .outcome import file_report
from .plan import Plan
from .progress import phase
from .report.record import Report
from .resumed import Checkpoint
from .search.settings import all_but
from .search.statistics import Pace
from .session import Session

RECALIBRATION_BATCHES, REPAIR_EXAMPLES, WARM_UP = 50, 512, 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compression:
    """The stages of a compression; each can begin at an epoch that another process came to.

    Attributes:
        batches: from a stage (1 the search, 2 the norms' statistics, 3 fine-tuning) and an epoch to its batches.
        steps: batches of an epoch.
        loss: from a model and a batch to the loss, 0-d.
        validate: from a model to how good it is, in per cent, more is better; None: nobody knows.
        optimizer: from parameters and a stage to their optimizer.
        search_epochs: of the search, in which the weights learn too; 0: none.
        epochs: of fine-tuning; its learning rate rises to the optimizer's own and falls to 0 (``OneCycleLR``).
        keep_best: keep the epoch of fine-tuning that validates best, not the last.
        save: called with the state (tensors, numbers, strings) after every epoch.
        progress: show bars.
        remedy: what to do where fine-tuning diverges.
    """

    batches: Callable[[int, int], Iterator[Any]]
    steps: int
    loss: Callable[[nn.Module, Any], Tensor]
    validate: Callable[[nn.Module], float] | None
    optimizer: Callable[[Iterator[nn.Parameter], int], Optimizer]
    search_epochs: int
    epochs: int
    keep_best: bool = False
    save: Callable[[dict[str, Any]], None] = lambda state: None
    progress: bool = True
    remedy: str = "lower lr"

    def search(self, session: Session, state: Mapping[str, Any]) -> float:
        """Search from the epoch of ``state`` on; the seconds of all epochs."""
        model, seconds = session.model, float(state["seconds"])
        if self.search_epochs == 0:
            return seconds
        optimizer = self.optimizer(model.parameters(), 1)
        if state["epoch"] > 0:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            session.load_state_dict(state["pruner"])
        with session.search(self.search_epochs * self.steps, optimizer=optimizer, progress=self.progress) as search:
            for epoch in range(state["epoch"], self.search_epochs):
                start = time.perf_counter()
                model.train()
                for batch in self.batches(1, epoch):
                    search.step(self.loss(model, batch))
                seconds += time.perf_counter() - start
                tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                self.save({"epoch": epoch + 1, "seconds": seconds, "pruner": session.state_dict(), **tensors})
        return seconds

    def cut(self, session: Session, before: float | None, seconds: float) -> tuple[nn.Module, Report]:
        """Choose what goes, or take what was searched, cut, and fit what is left; the dense model is then as it was.

        A short search may unlearn more than it teaches. So behind one, three networks are compared by their losses: its
        own, its widths cut out of the dense model and repaired, and what a choice without a search comes to.

        Args:
            session: behind its search.
            before: what ``validate`` said of the dense model.
            seconds: that the search took.
        """
        if self.search_epochs == 0:
            batches: list[Any] = []
            for _ in _keeping(self.batches(2, 0), batches):
                if _examples(batches) >= REPAIR_EXAMPLES:
                    break
            slim, report = self._chosen(session, batches)
        else:
            slim, report = self._searched(session, seconds)
        session.detach()
        with phase("measuring the latency"):
            dense_ms, slim_ms = latencies([session.model, slim], session.plan.dummy_input)
        report.latency_ms = (dense_ms, slim_ms)
        if before is not None and self.validate is not None:
            after = self.validate(slim)
            report.accuracy, report.accuracy_cut = (before, after), after if self.epochs else None
        return slim, report

    def _chosen(self, session: Session, batches: Sequence[Any]) -> tuple[nn.Module, Report]:
        """What goes is what the layers behind make up for; and they do."""
        inputs = _inputs(batches)
        session.choose(batches=inputs)
        slim = session.speedup()
        session.repair(slim, torch.cat(inputs))
        note = "what goes was chosen by what its removal costs; the layers were fitted to the uncut network's"
        session.report.notes.append(note)
        return slim, session.report

    def _searched(self, session: Session, seconds: float) -> tuple[nn.Module, Report]:
        """The best of what a search came to, of its widths alone, and of :meth:`_chosen`."""
        slim, batches = session.speedup(), list[Any]()
        with phase("estimating the norms' statistics anew"):
            recalibrating = itertools.islice(self.batches(2, 0), RECALIBRATION_BATCHES)
            update_bn(((batch[0],) for batch in _keeping(recalibrating, batches)), slim)
        report, keep = session.report, session.keep
        report.seconds["search"] = seconds
        if report.interventions is not None:
            report.interventions = dataclasses.replace(report.interventions, epochs=self.search_epochs)
        session.detach()
        inputs = _inputs(batches)
        if any(group.choice for group in session.plan.active) or sum(map(len, inputs)) < 2:
            return slim, report
        assert keep is not None
        widths = session.plan.slim(session.model, keep)
        session.repair(widths, torch.cat(inputs))
        session.attach()
        chosen, without = self._chosen(session, batches)
        session.detach()
        without.seconds["search"], without.interventions = seconds, report.interventions
        searched, fitted, direct = (self._mean_loss(network, batches) for network in (slim, widths, chosen))
        if searched <= min(fitted, direct):
            return slim, report
        said = f"on {len(batches)} batches, where the weights of the search have a loss of {searched:.3g}"
        if fitted <= direct:
            report.notes.append(f"after the cut the layers were fitted to the uncut network's: {fitted:.3g} {said}")
            file_report(widths, report)
            return widths, report
        without.notes.append(f"the search is not used: the choice has {direct:.3g} {said}")
        return chosen, without

    def _mean_loss(self, model: nn.Module, batches: Sequence[Any]) -> float:
        """In eval mode, in which the model is left."""
        model.eval()
        return sum(float(self.loss(model, batch).detach()) for batch in batches) / len(batches)

    def finetune(self, slim: nn.Module, report: Report, state: Mapping[str, Any]) -> None:
        """Fine-tune in place from the epoch of ``state`` on, and write into the report what came of it.

        Raises:
            DNALError: the loss is NaN or infinite at the end of an epoch.
        """
        if steps_of_training := (self.search_epochs or self.epochs) * self.steps:
            pace = Pace(slim, steps_of_training)
            pace.raise_()  # a file has them as they were
            report.notes += [note for note in [pace.note] if note and note not in report.notes]
        optimizer = self.optimizer(slim.parameters(), 3)
        steps, seconds, best = self.epochs * self.steps, float(state["seconds"]), None
        highest = [group["lr"] for group in optimizer.param_groups]
        schedule = OneCycleLR(optimizer, highest, steps + 1, pct_start=WARM_UP, cycle_momentum=False)
        done = state["epoch"] if "schedule" in state else 0  # version 0.1 kept none: fine-tuning begins anew
        if done > 0:
            slim.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            best = state["best"]
        hidden = not self.progress or not self.epochs
        bar = tqdm(total=steps, initial=done * self.steps, desc="fine-tune", unit="step", disable=hidden)
        with contextlib.closing(bar):
            for epoch in range(done, self.epochs):
                start = time.perf_counter()
                slim.train()
                for batch in self.batches(3, epoch):
                    loss = self.loss(slim, batch)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.update()
                if not math.isfinite(float(loss.detach())):
                    raise DNALError(f"the loss is nan or infinite in epoch {epoch + 1} of fine-tuning: {self.remedy}")
                if self.keep_best and self.validate is not None:
                    accuracy = self.validate(slim)
                    if best is None or accuracy > best["accuracy"]:
                        best = {"epoch": epoch + 1, "accuracy": accuracy, "model": copy.deepcopy(slim.state_dict())}
                seconds += time.perf_counter() - start
                learned = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "best": best}
                self.save({"epoch": epoch + 1, "seconds": seconds, "model": slim.state_dict(), **learned})
        if best is not None:
            slim.load_state_dict(best["model"])
            report.notes.append(
                f"of {self.epochs} epochs of fine-tuning the best was kept, {best['epoch']}: best on the data that the "
                "accuracy is of, which flatters it"
            )
        report.seconds["finetune"] = seconds
        if report.accuracy is not None and self.validate is not None:
            report.accuracy = (report.accuracy[0], self.validate(slim))


def _examples(batches: Sequence[Any]) -> int:
    return sum(len(batch[0]) for batch in batches)


def _keeping(source: Iterator[Any], batches: list[Any]) -> Iterator[Any]:
    """``source``, of which as many batches as a repair needs go to ``batches``."""
    for batch in source:
        if _examples(batches) < REPAIR_EXAMPLES:
            batches.append(batch)
        yield batch


def _inputs(batches: Sequence[Any]) -> list[Tensor]:
    """Those of the first one's shape."""
    return [batch[0] for batch in batches if batch[0].shape[1:] == batches[0][0].shape[1:]]


def epochs_of_search(asked: int | None, model: nn.Module) -> int:
    """What None comes to; a supernet has candidates, and only a search tells them apart.

    Raises:
        DNALError: none is asked for, of a supernet.
    """
    supernet = bool(choices_of(model))
    if supernet and asked == 0:
        raise DNALError("search_epochs=0: the model is a supernet, and only a search compares candidates: give 1")
    return (3 if supernet else 0) if asked is None else asked


NOTHING_DONE: dict[str, Any] = {"epoch": 0, "seconds": 0.0}
"""The state of a stage at its beginning."""


@checked_but("model", "budget", "exclude", "channel_multiple")
def compress(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Callable[..., Any] | None = None,
    *,
    budget: Budget,
    validate: Iterable[Any] | Callable[[nn.Module], float] | None = None,
    search_epochs: int | None = None,
    epochs: int = 10,
    lr: float = 0.01,
    optimizer: Callable[[Iterator[nn.Parameter]], Optimizer] | None = None,
    keep_best: bool = False,
    exclude: Sequence[str | nn.Module] = (),
    channel_multiple: int | Sequence[int] | None = None,
    verify_seconds: float | None = None,
    dummy_input: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> tuple[nn.Module, Report]:
    """Make a trained model smaller in one call: choose its widths, cut it to the budget, repair and fine-tune the rest.

    With a search, the widths are learned, and the weights in it too. Random numbers are torch's: ``torch.manual_seed``
    ahead of the call. All runs on the device that ``model`` is on. ``dnal compress`` does the same from the command
    line.

    Args:
        model: the trained network; afterwards it is as it was.
        loader: batches ``(inputs, targets)``, with a length, as a DataLoader: what the model was trained on. Or inputs
            alone: then the model itself teaches, what it returns stands in for targets.
        loss: of what the model returns and the targets of a batch, 0-d; None: cross entropy. Where the model teaches,
            cross entropy (also binary, of logits) gets its probabilities, another loss what it returns: ``F.mse_loss``.
        budget: what the network may cost in the end.
        validate: data of the same form, for the accuracy (top-1, in per cent) in the report; or a function from a model
            to a number of your own, in its place, more is better.
        search_epochs: passes over the data in a search ahead of the cut. 0: none, what goes is what the layers behind
            can make up for (:meth:`Session.choose`). None: 3 for a supernet, else 0.
        epochs: passes over the data in fine-tuning; 0: you do that yourself.
        lr: learning rate of SGD with momentum in the search, and its highest in fine-tuning.
        optimizer: from parameters to their optimizer, in place of that:
            ``lambda parameters: torch.optim.AdamW(parameters, 1e-3)``.
        keep_best: keep the epoch of fine-tuning that validates best, not the last.
        exclude: layers that keep all their outputs, with everything in them: names, or the modules themselves.
        channel_multiple: channels are kept in multiples of this number, or whole; of several, of the first that has a
            structure of the budget. None: 1; on a GPU, and for a budget of latency, (8, 4, 2, 1).
        verify_seconds: time limit for proving what can be cut; what is not compared by then stays whole. None: 60, or
            what 40 forward passes of the gated and the cut form take.
        dummy_input: what FLOPs are counted for; None: the first input of the data.
        checkpoint: a file, usually ``*.safetensors``, that is written after every epoch and goes at the end: after an
            interruption the same call goes on from it, and ends as it would have. The random numbers that are put back
            are torch's.
        progress: show bars.

    Returns:
        the smaller network, an ordinary module, and the report.

    Raises:
        DNALError: for anything the caller can mend; the model is then as it was.
    """
    check_model(model)
    if not isinstance(budget, Budget):
        raise DNALError(f"compress(budget=...) is {shown(budget)}: give a Budget, for example Budget(flops=0.5)")
    for name, value in (("search_epochs", search_epochs or 0), ("epochs", epochs)):
        if value < 0:
            raise DNALError(f"compress({name}={value}): give a whole number of at least 0")
    if not lr > 0:
        raise DNALError(f"compress(lr={lr!r}): give a number above 0")
    if keep_best and validate is None:
        raise DNALError("compress(keep_best=True) needs to know which epoch is best: give validate=")
    if inspect.isclass(loss):
        raise DNALError(f"compress(loss=...) is {shown(loss)}: this is the class, make one of it: {loss.__name__}()")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise DNALError("every parameter of the model is frozen, and fine-tuning could change none: unfreeze some")
    device = next(model.parameters()).device
    data, loss_of = Data("loader", loader, device), loss or F.cross_entropy
    training = [(module, module.training) for module in model.modules()]
    own: dict[str, Any] = {"search_epochs": search_epochs, "epochs": epochs, "lr": lr, "keep_best": keep_best}
    own |= {} if optimizer is None else {"optimizer": shown(optimizer)}
    session: Session | None = None
    try:
        with torch.random.fork_rng(devices=[]):  # looking at the data uses up none
            example = data.first()
        taught = Taught(model, loss) if example[1] is None else None
        stages = Compression(
            batches=lambda stage, epoch: data.batches(),
            steps=data.steps(),
            loss=lambda model, batch: (
                taught(model, batch[0]) if taught else measured(loss_of, run(model, batch[0]), batch[1])
            ),
            validate=validation(validate, device),
            optimizer=lambda parameters, stage: optimizer_of(parameters, lr, optimizer),
            search_epochs=epochs_of_search(search_epochs, model),
            epochs=epochs,
            keep_best=keep_best,
            progress=progress,
        )
        asked = {**own, "steps": stages.steps, "budget": budget.limits}
        kept = Checkpoint(checkpoint, model, asked, NOTHING_DONE)
        if kept.cut:
            slim, report = kept.network()
        else:
            plan = Plan.of(
                model,
                example[0][:1] if dummy_input is None else dummy_input,
                budget=budget,
                selected=all_but(model, exclude),
                channel_multiple=channel_multiple,
                verify_seconds=verify_seconds,
            )
            before = kept.state["accuracy"]
            if before is None and stages.validate is not None:
                before = stages.validate(model)
            session = Session(model, plan)
            saving = dataclasses.replace(stages, save=lambda state: kept.search(before, state))
            slim, report = stages.cut(session, before, saving.search(session, kept.state))
            if taught:
                report.notes.append("the data have no targets: what the uncut network says stands in for them")
            kept.begin_finetune(slim, report, NOTHING_DONE)
        dataclasses.replace(stages, save=kept.finetune).finetune(slim, report, kept.state)
        kept.done()
        defaults = {name: parameter.default for name, parameter in inspect.signature(compress).parameters.items()}
        if report.interventions is not None:
            report.interventions = report.interventions.with_arguments(own, defaults)
    finally:
        if session is not None:
            session.detach()
        for module, mode in training:
            module.training = mode
    for module in slim.modules():
        module.training = model.training
    return slim, report
