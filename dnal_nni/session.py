"""Search, harden, cut, resume: what every front end shares. No NNI here.

session = Session(model, Plan.of(model, x, budget=Budget(flops=0.5)))
with session.search(steps, optimizer=optimizer) as search:
    for images, labels in batches:
        search.step(loss(model(images), labels))
slim = session.speedup()
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .arguments import checked, checked_but, shown
from .channels.tp_groups import dependency_groups
from .decisions import chosen, learned
from .errors import DNALError
from .modules.gates import ScaledSigmoidGate
from .outcome import reported, sizeless
from .plan import Method, Plan
from .progress import logger, phase
from .report.record import Report
from .search.criteria import Criterion, Loss
from .search.informed import Informed
from .search.loop import Search, check_over
from .search.ranks import from_first, is_first
from .storage.state import load_state, save_state, under_own_names
from .surgery.compare import check_equal
from .surgery.inject import attach, check_layers, check_members, check_ungated, detach, is_gated, layers_of
from .surgery.optimizer import carry_optimizer, check_optimizer
from .surgery.repair import kept_outputs, repair
from .surgery.slim import every_group

if TYPE_CHECKING:
    from .channels.dependency import Group


class Session:
    """The gates of one model: searched, fixed, cut, saved and taken up again.

    Args:
        model: the trained network, the one that ``plan`` was made of; gates are attached to it in place, its parameters
            stay the same objects.
        plan: of the model.
        method: how gates learn.

    Attributes:
        gates: by group name; ``.s`` is the parameter ``[channels]``, ``.delta`` a 0-d buffer.
        keep: by group name, bool ``[channels]``: the units that :meth:`harden` left; None before.
        last: the last :meth:`search`, or None.
        seconds: what took how long, by name.

    Raises:
        DNALError: the model has gates already.
    """

    @checked
    def __init__(self, model: nn.Module, plan: Plan, method: Method | None = None) -> None:
        check_ungated(model)
        check_members(model, plan.active)
        self.model, self.plan, self.method = model, plan, method or Method()
        device = next(model.parameters()).device
        self.gates = OrderedDict((g.name, ScaledSigmoidGate(g.channels).to(device)) for g in plan.active)
        self.keep: dict[str, Tensor] | None = None
        self.last: Search | None = None
        self._resume: dict[str, Any] | None = None
        self._report: Report | None = None
        self.seconds = {"build": plan.seconds}
        self.attach()
        self._layers = layers_of(model, plan.active)

    def attach(self) -> None:
        """Put the gates on the model, if they are not."""
        if not is_gated(self.model):
            attach(self.model, self.plan.groups, self.gates)

    def detach(self) -> None:
        """Take the gates off and undo what searches changed: the dense model as it was, with the same parameters."""
        detach(self.model)
        if self.last is not None:
            self.last.restore()

    # -- searching ----------------------------------------------------------------------------------------------------

    @checked_but("steps")
    def search(
        self,
        steps: int,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        weights_learn: bool | None = None,
        progress: bool = True,
        when: Informed | None = None,
    ) -> Search:
        """A search inside of a training loop: a context manager, with a ``step(loss)`` to be called once per batch.

        Args:
            steps: how many batches you are going to give it.
            optimizer: of the model's weights. If given, weights learn in the same steps; otherwise they are frozen.
            weights_learn: whether they do, where somebody else steps their optimizer.
            progress: show a progress bar.
            when: the steps in which the gates learn too, where weights do: ``Informed(10)``; None: all.
        """
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise DNALError(f"search(steps={shown(steps)}): must be a whole number >= 1, how many batches you give it")
        if self.last is not None and self.last.running:
            raise DNALError("a search of this model is under way: leave its `with` ahead of another one")
        if optimizer is not None:
            check_optimizer(optimizer, self.model)
        check_layers(self.model, self.plan.active, self._layers)
        self.attach()
        if self.last is not None:
            self.last.pace.restore()
        scores = self.method.scores(self.model, self.plan, steps)
        learn = optimizer is not None if weights_learn is None else weights_learn
        search = scores.kind(
            self.model, self.gates.values(), scores,
            optimizer=optimizer, weights_learn=learn, progress=progress, when=when,
        )  # fmt: skip
        for note in sizeless(self.plan, search):
            logger.warning(note)
        if self.last is not None:
            search.saved = self.last.saved
        if self._resume is not None:
            search.load_state_dict(self._resume)
            self._resume = None
        self.last, self.keep, self._report = search, None, None
        return search

    # -- cutting ------------------------------------------------------------------------------------------------------

    @checked
    def harden(self, keep: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Fix every gate to 0 or 1; the model then computes the hard-gated function.

        Args:
            keep: by group name, bool ``[channels]``; groups not named stay whole. None: what the search learned.

        Returns:
            by group name, bool ``[channels]``: what stays, of all groups that have a gate.
        """
        check_layers(self.model, self.plan.active, self._layers)
        check_over(self.last)
        if keep is None:
            if self.last is None or self.last.done == 0:
                raise DNALError("nothing has been learned yet: run search() or compress() first, or pass keep=")
            search = self.last
            for note in search.notes():
                logger.warning(note)
            with phase("choosing what goes"):
                kept = from_first(lambda: learned(self.plan, self.model, list(self.gates.values()), search))
        else:
            kept = every_group(keep, self.plan.active)
        for group in self.plan.active:
            if group.choice and not group.least:  # blocks: behind one that closes nothing runs
                kept[group.name] = kept[group.name].cumprod(0).bool()
        for name, gate in self.gates.items():
            gate.harden(kept[name])
        self.keep, self._report = kept, None
        return kept

    @checked
    def choose(
        self,
        importance: Criterion | None = None,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
    ) -> dict[str, Tensor]:
        """Fix every gate by what the weights are worth as they are, cut to the budget: no search.

        Args:
            importance: None: what the loss would rise by, and the layers behind make up for, per cost of a unit
                (:mod:`~dnal_nni.search.surgeon`), to less than half in two steps; call :meth:`repair` then. Or one
                of torch-pruning's, ``tp.importance.MagnitudeImportance()``, or any function from a ``tp.Group`` to a
                score for each channel of its root; the lowest go first, down to the floor that a search has too.
            batches: some hundred examples in the form of the dummy input, no labels. With a criterion: for those that
                need gradients or activations, ``(inputs, labels)``; None: the gradients that the parameters have.
            loss: from the model and a batch to its loss, 0-d; None: how far what the model returns moves, no labels
                needed; for a criterion, cross entropy of ``(inputs, labels)``. A criterion of activations
                (``tp.importance.ActivationImportance``) needs none, where batches are inputs alone.

        Returns:
            as :meth:`harden`.
        """
        start, of = time.perf_counter(), (self.plan, self.model, list(self.gates.values()))
        with phase("weighing what removals cost"):
            keep = self.harden(from_first(lambda: chosen(*of, importance, batches, loss)))
        self.seconds["choose"] = time.perf_counter() - start
        return keep

    def speedup(self) -> nn.Module:
        """A new, physically smaller module that computes what the hard-gated ``model`` computes.

        Hardens first if need be. Both are compared in eval and train mode; a difference is an error.
        """
        if not is_gated(self.model):
            raise DNALError(
                "speedup: unwrap_model() has taken the gates off and put the dense weights back: call speedup() ahead "
                "of it, or wrap_model() first to cut the dense weights"
            )
        keep = self.harden() if self.keep is None else self.keep
        start = time.perf_counter()
        with phase("cutting, and comparing with the gated network"):
            slim = self.plan.slim(self.model, keep)
            differences = from_first(lambda: check_equal(self.model, slim, self.plan.dummy_input))
        if self.last is not None and self.last.seconds is not None:
            self.seconds["search"] = self.last.seconds
        self.seconds["cut"] = time.perf_counter() - start
        self._report = reported(self.plan, self.model, slim, keep, self.last, self.seconds, differences, self.method)
        return slim

    def dependency_groups(self) -> list[Group]:
        """Every group that is not left whole as a ``torch_pruning.Group``, for what is written for those.

        The first item of each is its root, the layer that the group is named after; ``idxs`` are channels of each
        layer, ``root_idxs`` the places among the root's ``idxs`` that they go with.
        """
        return dependency_groups(self.model, self.plan.active)

    @checked
    def carry_optimizer(self, optimizer: torch.optim.Optimizer, slim: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of ``model`` as one of the cut network: its momentum is cut with the weights.

        Class, parameter groups and hyperparameters stay; ``optimizer`` itself is not changed. A parameter that the cut
        replaced by another (computed weights, such as ``weight_norm``) starts without state. Learning-rate schedules
        hold the old optimizer: make a new one.

        Args:
            optimizer: of the model's parameters, such as the one that the search was given.
            slim: what the last :meth:`speedup` returned.

        Raises:
            DNALError: the state is not in the shape of the parameters (LBFGS, Adafactor), or not of this model.
        """
        if self.keep is None:
            raise DNALError("carry_optimizer: nothing has been cut yet: call speedup() first")
        return carry_optimizer(optimizer, self.model, self.plan.groups, self.keep, slim)

    @checked_but("inputs")
    def repair(self, slim: nn.Module, inputs: Any) -> dict[str, tuple[float, float]]:
        """Fit the layers of a cut network to what they gave in the one ahead of the search: no labels, no training.

        Args:
            slim: what the last :meth:`speedup` returned; the function that it computes changes, on purpose.
            inputs: a batch in the form of the dummy input: some hundred training examples, or a thousand.

        Returns:
            by layer, the relative squared error of its outputs: before, and after on examples that were left out.
        """
        if self.keep is None:
            raise DNALError("repair: nothing has been cut yet: call speedup() first")
        if any(group.choice for group in self.plan.active):
            raise DNALError("repair: the model is a supernet, and no trained network whose outputs are to be kept")
        with phase("fitting the layers of the cut network"):
            dense = self.plan.slim(self.model, {})
            if self.last is not None:
                self.last.restore(dense)
            return repair(dense, slim, kept_outputs(self.plan.groups, self.keep), inputs)

    @property
    def report(self) -> Report:
        """What the last :meth:`speedup` did."""
        if self._report is None:
            raise DNALError("there is no report yet: call speedup() first")
        return self._report

    # -- resuming -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state of the gates and of a search under way: tensors, numbers and strings only.

        The model's weights and the optimizer of the weights are yours to save beside it.
        """
        cost = self.plan.cost
        return {
            "gates": {name: gate.values() for name, gate in self.gates.items()},
            "search": self.last.state_dict() if self.last is not None else None,
            "keep": self.keep,
            "latency": cost.latency_state() if cost.dense.latency is not None else None,
            "settings": self.settings(),
        }

    def settings(self) -> dict[str, Any]:
        """What must be the same where a search goes on."""
        budget = None if self.plan.budget is None else self.plan.budget.limits
        return {"budget": budget, **self.method.settings(), "channel_multiple": self.plan.channel_multiple}

    @checked_but("state")
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a search where :meth:`state_dict` left it: the next ``search(steps)`` goes on from there."""
        _check_state(self, state)
        latencies, multiple = state.get("latency"), state.get("settings", {}).get("channel_multiple")
        if latencies is not None or multiple not in (None, self.plan.channel_multiple):
            self.plan = self.plan.resumed(latencies, multiple or self.plan.channel_multiple)
        for name, values in state["gates"].items():
            self.gates[name].take(values)
        self._resume, self.keep = state["search"], state["keep"]

    @checked
    def save_checkpoint(self, path: str | os.PathLike[str], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Write all that a search under way needs to go on: model, gates, torch's random state and the optimizer's.

        The file appears whole or not at all, in place of the one before: call this as often as you like. It is
        safetensors, and holds no pickle. Of several processes, rank 0 writes it.

        Args:
            path: usually ``*.safetensors``.
            optimizer: the one that the search was given.
        """
        if not is_first():
            return
        state = {"model": self.model.state_dict(), "pruner": self.state_dict()}
        save_state(path, state | {"optimizer": None if optimizer is None else optimizer.state_dict()})

    @checked
    def load_checkpoint(self, path: str | os.PathLike[str], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Take up a search where :meth:`save_checkpoint` left it: the next ``search(steps)`` goes on from there.

        ``search.done`` says how many steps it has made: give it the batches from there on, and it ends as it would have
        without the interruption, bit for bit on the same machine. Torch's random state is put back as the search is
        entered; random numbers of other sources (``random``, numpy, data loading) are yours to repeat. Of several
        processes, all load the file, and all get rank 0's random state.

        Raises:
            DNALError: the file is damaged, or of another model, budget or optimizer; nothing has then changed.
        """
        state = _checkpoint(self, path)
        if (optimizer is None) != (state["optimizer"] is None):
            missing = "needs the optimizer that the search had" if optimizer is None else "holds no optimizer"
            raise DNALError(f"{path} {missing}: load_checkpoint(path, optimizer) and save_checkpoint alike")
        if optimizer is not None:
            try:
                optimizer.load_state_dict(state["optimizer"])
            except ValueError as error:
                raise DNALError(f"{path} does not fit the optimizer: {error}") from error
        self.model.load_state_dict(state["model"])
        self.load_state_dict(state["pruner"])


def _checkpoint(session: Session, path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file holds, if it fits the session."""
    state = load_state(path)
    if not isinstance(state, dict) or state.keys() != {"model", "pruner", "optimizer"}:
        raise DNALError(f"{path} was not written by save_checkpoint")
    own = session.model.state_dict()
    theirs = under_own_names(state["model"], own)
    for name in [*own, *theirs]:
        shapes = [list(t[name].shape) if isinstance(t.get(name), Tensor) else None for t in (own, theirs)]
        if shapes[0] != shapes[1]:
            raise DNALError(f"{path} does not fit the model: {name} is {shapes[1]}, the model's is {shapes[0]}")
    _check_state(session, state["pruner"])
    return state | {"model": theirs}


def _check_state(session: Session, state: Mapping[str, Any]) -> None:
    """Raise for what is no state of this session, and in the midst of a search."""
    check_over(session.last)
    if not isinstance(state, Mapping) or not {"gates", "search", "keep"} <= state.keys():
        raise DNALError("load_state_dict: this is not what pruner.state_dict() returned")
    mine, theirs = session.settings(), state.get("settings", {})
    for name, value in theirs.items():
        tried = name == "channel_multiple" and value in session.plan.tried  # by latencies, which are never the same
        if value != mine.get(name) and not tried:
            raise DNALError(
                f"load_state_dict: the search ran with {name}={value!r}, here it is {mine.get(name)!r}: make the "
                "pruner as it was, or start anew"
            )
    gates = state["gates"]
    if list(gates) != list(session.gates):
        different = sorted(set(gates) ^ set(session.gates)) or ["their order"]
        raise DNALError(f"load_state_dict: the gates are not those of this model ({different[0]})")
    for name, values in gates.items():
        here = session.gates[name].s.numel()
        if tuple(values["s"].shape) != (here,):
            raise DNALError(f"load_state_dict: gate {name} has {values['s'].numel()} channels, here {here}")
