"""DNALPruner: DNAL as a pruner of NNI 3.0."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Concatenate, Literal, NoReturn, ParamSpec, TypeVar

import torch
from nni.compression.base.compressor import Compressor, Pruner
from nni.compression.utils import Evaluator
from schema import SchemaError
from torch import Tensor, nn

from ..arguments import checked, checked_but
from ..budget import Budget
from ..channels.dependency import Graph
from ..channels.groups import ChannelGroup
from ..errors import DNALError
from ..modules.gates import ScaledSigmoidGate
from ..modules.given import check_model
from ..modules.running import Example, Key
from ..plan import Method, Plan, check_limits
from ..report.record import Report
from ..search.criteria import Criterion, Loss
from ..search.informed import Informed
from ..search.loop import Search
from ..session import Session
from ..surgery.inject import check_ungated, is_gated
from . import config as selection
from .evaluators import check_evaluator, example_input, search_within
from .masks import Conflicts, Masks, closed_channels, decide, layer_masks, votes_on
from .wrappers import leave_wrapped_norms, plain_names, without_wrappers

# arguments of the constructor whose own checks say more than their types do
_SAID_BETTER = "model config_list evaluator budget preset lambda_ arch_lr channel_multiple graph importance".split()
_SAID_BETTER += ["exclude"]
P = ParamSpec("P")
R = TypeVar("R")


def _handed_on(
    method: Callable[Concatenate[Session, P], R], copies: bool = False
) -> Callable[Concatenate[DNALPruner, P], R]:
    """A method of the session as one of the pruner's; where it copies the model, without NNI's wrappers on it."""

    @functools.wraps(method)
    def handed_on(pruner: DNALPruner, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with without_wrappers(pruner.bound_model) if copies else contextlib.nullcontext():
            return method(pruner.session, *args, **kwargs)

    return handed_on


class _OwnSchedule(Pruner):
    """What NNI asks of a pruner that has one training, alone or with other compressors, and no schedule of NNI's."""

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        self._fusion_compress(max_steps, max_epochs)

    @property
    def interval_steps(self) -> NoReturn:
        """Not for NNI's scheduled pruners: DNAL grows delta and tightens the budget by itself."""
        raise DNALError("DNALPruner has its own schedule: use it by itself, not inside AGPPruner or LinearPruner")

    total_times = interval_steps


class DNALPruner(_OwnSchedule):
    """Learns which channels a trained network needs, and removes the others.

    In several processes (``torch.distributed``), every one makes the same calls; all go by what rank 0 finds.

    Args:
        model: the trained network; gates are attached to it in place, its parameters stay the same objects.
        config_list: NNI's own schema. Selects layers by ``op_types``, ``op_names``, ``op_names_re`` and ``exclude_*``;
            ``sparse_ratio`` (fraction of channels to remove) or ``sparse_threshold`` (gates below it close) rule where
            no ``budget`` is given; ``max_sparse_ratio`` and ``min_sparse_ratio`` limit each group in any case. Their
            meaning for coupled layers: docs/from-nni.md.
        evaluator: NNI's evaluator, needed for :meth:`compress` only.
        dummy_input: a tensor, a tuple of positional arguments or a dict of keyword arguments; by default the
            evaluator's. FLOPs are counted for it.
        outputs: what is needed of what the model returns: a position, a key or an attribute of it, several of them, or
            a function of it; None: all of it. What is not needed may lose channels, such as the features that a
            detector returns beside its predictions.
        budget: what the compressed network may cost. With neither a budget nor a sparse_ratio, ``lambda_`` alone drives
            the search, as in the paper.
        preset: "default", or "paper": equations and schedule of arXiv 2103.02126, cut to the budget if there is one.
        lambda_: weight of the paper's regulariser ``sum sigmoid(s)``.
        arch_lr: how fast the gates learn. In the default search, how far a steady gradient of average size moves a
            score over the whole search (scores start at 1 on average); None is 0.3. In the paper's, the learning rate
            of SGD on ``s``; None is 0.01.
        channel_multiple: channels are kept in multiples of this number, or whole; of several, of the first that has a
            structure of the budget. None: 1; for a budget on a GPU, and one of latency, (8, 4, 2, 1).
        verify_seconds: time limit for comparing sliced with gated copies; groups not compared by then are left whole.
            None: 60, or what 40 forward passes of both take.
        graph: where the groups come from. None: the operations that run are followed. A ``tp.DependencyGraph`` that you
            built of this model, with pruning functions of your own: its groups, verified like any other.
            "torch-pruning": such a graph is built, of a copy.
        importance: a criterion of torch-pruning, such as ``tp.importance.MagnitudeImportance()``, that the scores of
            the default search start from; None: the norms of the weights.
        exclude: layers that keep all their outputs, with everything in them: names, or the modules themselves.
        existed_wrappers: NNI's wrappers of another compressor; given by :meth:`from_compressor`.

    Raises:
        DNALError: for anything the caller can mend; the model is then as it was.
    """

    @checked_but(*_SAID_BETTER)
    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        *,
        dummy_input: Any = None,
        outputs: Key | Sequence[Key] | Callable[[Any], Any] | None = None,
        budget: Budget | None = None,
        preset: Literal["default", "paper"] = "default",
        lambda_: float = 1e-4,
        arch_lr: float | None = None,
        channel_multiple: int | Sequence[int] | None = None,
        verify_seconds: float | None = None,
        graph: Graph = None,
        importance: Criterion | None = None,
        exclude: Sequence[str | nn.Module] = (),
        existed_wrappers: dict[str, Any] | None = None,
    ) -> None:
        method = Method(preset, lambda_, arch_lr, importance)
        check_limits(budget, channel_multiple, verify_seconds)
        check_model(model)
        check_ungated(model)
        selection.check_config(model, config_list)
        if evaluator is not None:
            check_evaluator(evaluator, model)
        self._inherited: dict[str, Any] | None = None  # no wrapping yet
        for_nni, selected = selection.split_config(model, selection.without(model, config_list, exclude))
        try:
            super().__init__(model, for_nni, evaluator)
        except (AssertionError, KeyError, SchemaError) as error:
            raise DNALError(f"NNI refuses the config_list: {str(error) or type(error).__name__}") from error
        self.budget, self.preset, self.lambda_, self.verify_seconds = budget, preset, lambda_, verify_seconds
        self.arch_lr, self.channel_multiple = arch_lr, channel_multiple
        # NNI's own wrappers of our layers are never put on the model, and hold two tensors as large as every weight
        self._module_wrappers = self._inherited = dict(existed_wrappers or {})
        self._masked = {path: tuple(spaces) for path, spaces in self._target_spaces.items()}
        self._target_spaces.clear()
        self._is_wrapped = False
        self._session: Session | None = None
        if dummy_input is None and evaluator is not None:
            dummy_input = example_input(evaluator)
        plan: Plan | None = None
        if dummy_input is not None:
            dummy_input = dummy_input if outputs is None else Example(dummy_input, outputs)
            with without_wrappers(self.bound_model):
                plan = Plan.of(
                    model,
                    dummy_input,
                    budget=budget,
                    selected=selected,
                    channel_multiple=channel_multiple,
                    verify_seconds=verify_seconds,
                    graph=graph,
                )
        self.wrap_model()
        if plan is not None:
            self._session = Session(model, plan, method)

    @classmethod
    def from_compressor(
        cls, compressor: Compressor, new_config_list: list[dict[str, Any]], *args: Any, **kwargs: Any
    ) -> DNALPruner:
        """A pruner of the model that ``compressor`` (such as a distiller) holds, with its evaluator.

        ``compress`` then runs both in one training; arguments as in the constructor.
        """
        pruner: DNALPruner = super().from_compressor(compressor, new_config_list, *args, **kwargs)
        return pruner

    def __repr__(self) -> str:
        found = "no dummy_input yet" if self._session is None else str(self._session.plan).strip("<>")
        return f"<DNALPruner of a {type(self.bound_model).__name__}; {found}>"

    @property
    def session(self) -> Session:
        """Gates, search and cut of the model, which need no NNI: what this pruner hands on to."""
        if self._session is None:
            raise DNALError(
                "a dummy input is needed to trace the model: DNALPruner(..., dummy_input=x), or an evaluator with one"
            )
        return self._session

    @property
    def plan(self) -> Plan:
        """The model's groups, their limits, what they cost, and the objective of a search."""
        return self.session.plan

    @property
    def groups(self) -> list[ChannelGroup]:
        """Every channel group of the model: its layers, its gate site, or the reason why it is left whole."""
        return self.plan.groups

    @property
    def gates(self) -> OrderedDict[str, ScaledSigmoidGate]:
        """The gates by group name; ``.s`` is the parameter ``[channels]``, ``.delta`` a 0-d buffer."""
        return self.session.gates

    # -- gates on and off ---------------------------------------------------------------------------------------------

    def wrap_model(self) -> None:
        """Attach the gates, and NNI's wrappers of the compressors that this one was made from."""
        if self._inherited is None or self._is_wrapped:
            return
        for wrapper in self._inherited.values():
            wrapper.wrap()
        self._is_wrapped = True
        if self._session is not None:
            self._session.attach()

    def unwrap_model(self) -> None:
        """Take the gates off and undo what searches changed: the dense model as it was, with the same parameters."""
        if not self._is_wrapped:
            return
        if self._session is not None:
            self._session.detach()
        for wrapper in self._inherited.values() if self._inherited else ():
            wrapper.unwrap()
        self._is_wrapped = False

    @checked_but("steps")
    def search(self, steps: int, *, optimizer: torch.optim.Optimizer | None = None, progress: bool = True,
               when: Informed | None = None) -> Search:  # fmt: skip
        """A search inside of your own training loop; call ``step(loss)`` on what it yields, once per batch.

        Args:
            steps: how many batches you are going to give it.
            optimizer: of the model's weights. If given, weights learn in the same steps; otherwise they are frozen.
            progress: show a progress bar.
            when: the steps in which the gates learn too, where weights do: ``Informed(10)``; None: all.
        """
        session = self.session
        if not self._is_wrapped:
            raise DNALError("the gates were taken off with unwrap_model(): call wrap_model() ahead of a search")
        return session.search(steps, optimizer=optimizer, progress=progress, when=when)

    # -- NNI's contract -----------------------------------------------------------------------------------------------

    @checked
    def compress(
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        """Search by means of the evaluator's training function; NNI's contract.

        Args:
            max_steps: number of optimizer steps of the search.
            max_epochs: number of epochs instead. Their steps are counted first, by one pass over the data without a
                forward pass.

        Returns:
            the model with its gates fixed to 0/1, and NNI masks.
        """
        return super().compress(max_steps, max_epochs)

    def _fusion_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        if self.evaluator is None:
            raise DNALError("compress() needs an evaluator: DNALPruner(model, config_list, evaluator), or use search()")
        if (max_steps is None) == (max_epochs is None):
            raise DNALError("compress() needs exactly one of max_steps and max_epochs")
        self.session  # noqa: B018  an error ahead of the training
        try:
            super()._fusion_compress(max_steps, max_epochs)
        except BaseException:
            if getattr(self.evaluator, "model", None) is not None:
                self.evaluator.unbind_model()
            raise

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        """Let the coming training of ``evaluator`` (bound to the model) be a search."""
        session = self.session
        if not is_gated(self.bound_model):  # a compressor made from this one has taken the gates off
            leave_wrapped_norms(self.bound_model, self.plan.active)
            session.attach()
        self._is_wrapped = True
        learn = self.preset != "paper" and self.plan.objective is not None
        search_within(evaluator, session, self._get_param_names_map, learn)

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        self.harden()

    def _get_param_names_map(self) -> dict[str, str]:
        return plain_names(self.bound_model)

    def get_masks(self) -> dict[str, dict[str, Tensor]]:
        """NNI masks of the selected layers, shaped as their tensors: as :meth:`harden` left them; ones before, and in
        another search."""
        session = self._session
        groups, keep = ([], {}) if session is None else (session.plan.active, session.keep or {})
        return layer_masks(self.bound_model, groups, keep, self._masked)

    def update_masks(self, masks: Masks, conflicts: Conflicts = "vote") -> None:
        """Fix the gates to what NNI masks say; ``conflicts`` as in :func:`~dnal_nni.plugin.masks.speedup`."""
        plan = self.plan
        with without_wrappers(self.bound_model):
            dense = plan.slim(self.bound_model, {})
        closed = closed_channels(dense, masks)
        self.harden({g.name: decide(dense, g, votes_on(g, closed), conflicts) for g in plan.active})

    def _collect_data(self) -> dict[str, dict[str, Tensor]]:
        return {name: {"s": gate.s.detach().clone()} for name, gate in self.gates.items()}

    def _calculate_metrics(self, data: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        return {name: {"g": torch.sigmoid(self.gates[name].delta * d["s"])} for name, d in data.items()}

    def _generate_sparsity(self, metrics: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        return self.harden()

    # -- cutting ------------------------------------------------------------------------------------------------------

    @checked
    def harden(self, keep: Mapping[str, Tensor] | None = None) -> dict[str, dict[str, Tensor]]:
        """Fix every gate to 0 or 1; the model then computes the hard-gated function.

        Args:
            keep: by group name, bool ``[channels]``; groups not named stay whole. None: what the search learned.

        Returns:
            NNI masks ``{layer: {"weight": mask, "bias": mask}}`` of the selected layers.
        """
        with without_wrappers(self.bound_model):
            self.session.harden(keep)
        return self.get_masks()

    @checked
    def speedup(self) -> nn.Module:
        """A new, physically smaller module that computes what the hard-gated ``model`` computes.

        Hardens first if need be. Both are compared in eval and train mode; a difference is an error.
        """
        if self.session.keep is None:
            self.harden()
        with without_wrappers(self.bound_model):
            return self.session.speedup()

    @property
    def report(self) -> Report:
        """What the last :meth:`speedup` did."""
        return self.session.report

    @checked
    def choose(
        self, importance: Criterion | None = None, batches: Iterable[Any] | None = None, loss: Loss | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """Fix every gate by what the weights are worth as they are, cut to the budget: no search.

        Arguments: :meth:`Session.choose`; returns NNI masks, as :meth:`harden` does."""
        with without_wrappers(self.bound_model):
            keep = self.session.choose(importance, batches, loss)
        return self.harden(keep)

    dependency_groups = _handed_on(Session.dependency_groups)
    carry_optimizer = _handed_on(Session.carry_optimizer, copies=True)
    repair = _handed_on(Session.repair, copies=True)
    state_dict = _handed_on(Session.state_dict)
    load_state_dict = _handed_on(Session.load_state_dict)
    save_checkpoint = _handed_on(Session.save_checkpoint)
    load_checkpoint = _handed_on(Session.load_checkpoint)
