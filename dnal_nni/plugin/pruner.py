"""DNALPruner: DNAL as a pruner of NNI 3.0."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NoReturn

import torch
from nni.compression.base.compressor import Compressor, Pruner
from nni.compression.utils import Evaluator
from schema import SchemaError
from torch import Tensor, nn

from ..budget import Budget, Complexity
from ..channels.groups import ChannelGroup, Site, groups_of
from ..cost.count import measure
from ..cost.latency import latencies
from ..cost.model import CostModel
from ..errors import DNALError
from ..modules.gates import GateState, ScaledSigmoidGate
from ..report.record import GroupReport, Report, versions
from ..search.close import exact_cut, measured_cut
from ..search.importance import importance
from ..search.loop import ArchOptimizer, Search
from ..search.objective import Limits, Objective
from ..search.paper import PAPER_LR, PAPER_THRESHOLD, PaperScores
from ..search.ranks import check_same, from_first, is_first, world_size
from ..search.scores import REACH, Scores
from ..storage.state import load_state, save_state
from ..surgery.compare import check_equal
from ..surgery.inject import attach, check_model, detach, is_gated
from ..surgery.optimizer import carry_optimizer
from ..surgery.slim import slim_copy
from ..surgery.verify import verify_and_freeze
from . import config as selection
from .evaluators import check_evaluator, example_input, patch_steps, ready
from .masks import Conflicts, Masks, closed_channels, decide, layer_masks, votes_on
from .steps import steps_per_epoch

_logger = logging.getLogger(__name__)


class DNALPruner(Pruner):
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
        budget: what the compressed network may cost. With neither a budget nor a sparse_ratio, ``lambda_`` alone drives
            the search, as in the paper.
        preset: "default", or "paper" for the equations and the schedule of arXiv 2103.02126; with a budget, the
            paper's search is cut to that budget.
        lambda_: weight of the paper's regulariser ``sum sigmoid(s)``.
        arch_lr: how fast the gates learn. In the default search, how far a steady gradient of average size moves a
            score over the whole search (scores start at 1 on average); None is 0.3. In the paper's, the learning rate
            of SGD on ``s``; None is 0.01.
        channel_multiple: channels that layers keep come in multiples of this number, or whole (8 suits most devices).
        verify_seconds: time limit for comparing sliced with gated copies; groups not compared by then are left whole.
        existed_wrappers: NNI's wrappers of another compressor; given by :meth:`from_compressor`.

    Raises:
        DNALError: for anything the caller can mend; the model is then as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        *,
        dummy_input: Any = None,
        budget: Budget | None = None,
        preset: Literal["default", "paper"] = "default",
        lambda_: float = 1e-4,
        arch_lr: float | None = None,
        channel_multiple: int = 1,
        verify_seconds: float = 60.0,
        existed_wrappers: dict[str, Any] | None = None,
    ) -> None:
        if preset not in ("default", "paper"):
            raise DNALError(f"preset={preset!r}: choose 'default' or 'paper'")
        if not isinstance(lambda_, (int, float)) or not 0 <= lambda_ < float("inf"):
            raise DNALError(f"lambda_={lambda_!r}: must be a number >= 0")
        if arch_lr is not None and not 0 <= arch_lr < float("inf"):
            raise DNALError(f"arch_lr={arch_lr!r}: must be a number >= 0, or None for the preset's own")
        if not isinstance(channel_multiple, int) or isinstance(channel_multiple, bool) or channel_multiple < 1:
            raise DNALError(f"channel_multiple={channel_multiple!r}: must be a whole number >= 1")
        if budget is not None and not isinstance(budget, Budget):
            raise DNALError(f"budget={budget!r}: pass a Budget, for example Budget(flops=0.5)")
        check_model(model)
        if is_gated(model):
            raise DNALError("the model already has gates of another DNALPruner: call its unwrap_model() first")
        selection.check_config(model, config_list)
        if evaluator is not None:
            check_evaluator(evaluator, model)
        self._inherited: dict[str, Any] | None = None  # no wrapping yet
        self._built = False
        for_nni, self._selected = selection.split_config(model, config_list)
        try:
            super().__init__(model, for_nni, evaluator)
        except (AssertionError, KeyError, SchemaError) as error:
            raise DNALError(f"NNI refuses the config_list: {str(error) or type(error).__name__}") from error
        if not self._selected:
            raise DNALError("config_list selects no layer of the model: widen op_types / op_names, or exclude less")
        self.budget, self.preset, self.lambda_, self.verify_seconds = budget, preset, lambda_, verify_seconds
        self.arch_lr, self.channel_multiple = arch_lr, channel_multiple
        self._dummy_input = dummy_input if dummy_input is not None else evaluator and example_input(evaluator)
        self._groups: list[ChannelGroup] = []
        self._gates: OrderedDict[str, ScaledSigmoidGate] = OrderedDict()
        self._keep: dict[str, Tensor] | None = None
        self._search: Search | None = None
        self._resume: dict[str, Any] | None = None
        self._report: Report | None = None
        self._seconds: dict[str, float] = {}
        # NNI's own wrappers of our layers only hold masks and are never put on the model, by nobody
        self._module_wrappers = self._inherited = dict(existed_wrappers or {})
        self._is_wrapped = False
        if self._dummy_input is not None:
            self._build()
        self.wrap_model()

    @classmethod
    def from_compressor(
        cls, compressor: Compressor, new_config_list: list[dict[str, Any]], *args: Any, **kwargs: Any
    ) -> DNALPruner:
        """A pruner of the model that ``compressor`` (such as a distiller) holds, with its evaluator.

        ``compress`` then runs both in one training; arguments as in the constructor.
        """
        pruner: DNALPruner = super().from_compressor(compressor, new_config_list, *args, **kwargs)
        return pruner

    # -- gates on and off ---------------------------------------------------------------------------------------------

    def wrap_model(self) -> None:
        """Attach the gates, and NNI's wrappers of the compressors that this one was made from."""
        if self._inherited is None or self._is_wrapped:
            return
        for wrapper in self._inherited.values():
            wrapper.wrap()
        self._is_wrapped = True
        if self._built:
            attach(self.bound_model, self._groups, self._gates)

    def unwrap_model(self) -> None:
        """Take the gates off and undo what searches changed: the dense model as it was, with the same parameters."""
        if not self._is_wrapped:
            return
        if self._built:
            detach(self.bound_model)
            if self._search is not None:
                self._search.restore()
        for wrapper in self._inherited.values() if self._inherited else ():
            wrapper.unwrap()
        self._is_wrapped = False

    @contextlib.contextmanager
    def _without_wrappers(self) -> Iterator[nn.Module]:
        """The model without NNI's wrappers of any compressor (a wrapped model cannot be copied); gates stay on."""
        wrappers = [m._nni_wrapper for m in self.bound_model.modules() if hasattr(m, "_nni_wrapper")]
        for wrapper in wrappers:
            wrapper.unwrap()
        try:
            yield self.bound_model
        finally:
            for wrapper in wrappers:
                wrapper.wrap()

    def _build(self) -> None:
        """Find, select and verify the groups, count the cost, attach the gates; the model is touched last."""
        if self._built:
            return
        if self._dummy_input is None:
            raise DNALError(
                "a dummy input is needed to trace the model: DNALPruner(..., dummy_input=x), or an evaluator with one"
            )
        start = time.perf_counter()
        with self._without_wrappers() as model:
            groups = groups_of(model, self._dummy_input)
            settings = selection.select(groups, self._selected, model)
            self._verify(model, groups)
            active = [g for g in groups if g.frozen is None]
            if not active:
                reasons = "; ".join(f"{g.name}: {g.frozen}" for g in groups[:5])
                reasons = reasons or "it has no convolution or linear layer"
                raise DNALError(f"nothing in the model can be pruned ({reasons})")
            timed = self.budget is not None and self.budget.latency is not None
            self._cost = CostModel(model, groups, self._dummy_input, timed and is_first())
            if timed:
                self._cost.load_latency_state(from_first(self._cost.latency_state))
            self._settings = [settings[g.name] for g in active]
            self._limits = selection.limits(self._settings, active, self.channel_multiple)
            self._objective = self._make_objective(self._limits)
            self._groups = groups
            if timed:
                self._cost.load_latency_state(from_first(lambda: self._calibrate(model, active)))
        device = next(model.parameters()).device
        for group in active:
            self._gates[group.name] = ScaledSigmoidGate(group.channels).to(device)
        self._built = True
        if self._is_wrapped:
            attach(model, groups, self._gates)
        self._seconds["build"] = time.perf_counter() - start

    def _verify(self, model: nn.Module, groups: list[ChannelGroup]) -> None:
        """Freeze what cannot be cut exactly; all ranks go by what rank 0 finds."""
        if world_size() > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
            raise DNALError(
                "the model has SyncBatchNorm layers, which wait for each other wherever the model runs: convert the "
                "cut network instead (nn.SyncBatchNorm.convert_sync_batchnorm(slim))"
            )
        found = [(group.name, group.channels, group.frozen) for group in groups]
        check_same("the model's channel groups", found, "make the same model on every rank")

        def compare() -> list[tuple[Site, str | None]]:
            verify_and_freeze(model, groups, self._dummy_input, self.verify_seconds)
            return [(group.site, group.frozen) for group in groups]

        for group, (site, frozen) in zip(groups, from_first(compare)):
            group.site, group.frozen = site, frozen

    def _calibrate(self, model: nn.Module, active: list[ChannelGroup]) -> dict[str, Any]:
        """Hold the latency that the layers add up to against that of a network cut to the budget."""
        assert self._objective is not None
        units = exact_cut(self._objective, importance(model, active), self._objective.floor())
        self._cost.calibrate(units.double(), self._latency(self._slim(units)))
        return self._cost.latency_state()

    def _latency(self, slim: nn.Module) -> float:
        """Milliseconds of a cut network, where the uncut one takes what it took when it was measured first."""
        assert self._cost.dense.latency is not None
        now, then = latencies([slim, self.bound_model], self._dummy_input)
        return self._cost.dense.latency * now / then

    def _make_objective(self, limits: Limits) -> Objective | None:
        """What the search is held to: the budget, or the config's ratios, or nothing but lambda."""
        thresholds = any(setting.sparse_threshold is not None for setting in self._settings)
        ratios = any(setting.sparse_ratio is not None for setting in self._settings)
        if thresholds and (ratios or self.budget is not None):
            raise DNALError("sparse_threshold goes with neither a budget nor a sparse_ratio: a threshold sets no size")
        if self.budget is not None:
            return Objective(self._cost, self.budget, limits)
        if ratios:
            return Objective(self._cost, None, limits, *selection.pools(self._settings, self._cost.sizes, limits))
        return None

    @property
    def groups(self) -> list[ChannelGroup]:
        """Every channel group of the model: its layers, its gate site, or the reason why it is left whole."""
        self._build()
        return self._groups

    @property
    def gates(self) -> OrderedDict[str, ScaledSigmoidGate]:
        """The gates by group name; ``.s`` is the parameter ``[channels]``, ``.delta`` a 0-d buffer."""
        self._build()
        return self._gates

    @property
    def _active(self) -> list[ChannelGroup]:
        return [g for g in self.groups if g.frozen is None]

    # -- searching ----------------------------------------------------------------------------------------------------

    def _new_search(
        self, steps: int, optimizer: torch.optim.Optimizer | None, weights_learn: bool, progress: bool
    ) -> Search:
        self._build()
        if not self._is_wrapped:
            raise DNALError("the gates were taken off with unwrap_model(): call wrap_model() ahead of a search")
        if optimizer is not None:
            known = {id(p) for p in self.bound_model.parameters()}
            if not any(id(p) in known for group in optimizer.param_groups for p in group["params"]):
                raise DNALError("search(optimizer=...): this optimizer holds no parameter of the model")
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise DNALError(f"search(steps={steps!r}): must be a whole number >= 1")
        search = Search(
            self.bound_model,
            self.gates.values(),
            self._new_scores(steps),
            optimizer=optimizer,
            weights_learn=weights_learn,
            progress=progress,
        )
        if self._search is not None:
            search.saved = self._search.saved
        if self._resume is not None:
            search.load_state_dict(self._resume)
            self._resume = None
        self._search, self._keep, self._report = search, None, None
        return search

    def _new_scores(self, steps: int) -> ArchOptimizer:
        """The paper's search, or the one that is held to the objective."""
        device = next(iter(self.gates.values())).s.device
        if self.preset == "paper" or self._objective is None:
            lr = PAPER_LR if self.arch_lr is None else self.arch_lr
            return PaperScores(sum(self._cost.sizes), steps, self.lambda_, lr, self._limits.least, device)
        reach = REACH if self.arch_lr is None else self.arch_lr
        return Scores(self._objective, importance(self.bound_model, self._active).to(device), steps, reach)

    @contextlib.contextmanager
    def search(
        self, steps: int, *, optimizer: torch.optim.Optimizer | None = None, progress: bool = True
    ) -> Iterator[Search]:
        """A search inside of your own training loop; call ``step(loss)`` on what it yields, once per batch.

        Args:
            steps: how many batches you are going to give it.
            optimizer: of the model's weights. If given, weights learn in the same steps; otherwise they are frozen.
            progress: show a progress bar.
        """
        start = time.perf_counter()
        with self._new_search(steps, optimizer, optimizer is not None, progress) as search:
            yield search
        self._seconds["search"] = time.perf_counter() - start

    # -- NNI's contract -----------------------------------------------------------------------------------------------

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
        model, masks = super().compress(max_steps, max_epochs)
        return model, masks

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        self._fusion_compress(max_steps, max_epochs)

    def _fusion_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        if self.evaluator is None:
            raise DNALError("compress() needs an evaluator: DNALPruner(model, config_list, evaluator), or use search()")
        if (max_steps is None) == (max_epochs is None):
            raise DNALError("compress() needs exactly one of max_steps and max_epochs")
        self._build()
        try:
            super()._fusion_compress(max_steps, max_epochs)
        except BaseException:
            if getattr(self.evaluator, "model", None) is not None:
                self.evaluator.unbind_model()
            raise

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        """Let the coming training of ``evaluator`` (bound to the model) be a search."""
        self._build()
        if not is_gated(self.bound_model):  # a compressor made from this one has taken the gates off
            self._leave_wrapped_norms()
            attach(self.bound_model, self._groups, self._gates)
        self._is_wrapped = True
        learn = self.preset != "paper" and self._objective is not None
        train = evaluator.train

        def search(max_steps: int | None = None, max_epochs: int | None = None) -> None:
            start = time.perf_counter()
            steps = max_steps
            if steps is None:
                steps = steps_per_epoch(evaluator, self.bound_model, self._get_param_names_map()) * (max_epochs or 0)
            try:
                with ready(evaluator), self._new_search(steps, None, learn, progress=True) as run:
                    evaluator.patch_loss(lambda loss, batch: run.penalised(loss))
                    patch_steps(evaluator, run.before_optimizer_step, run.after_optimizer_step)
                    train(max_steps, max_epochs)
            finally:
                del evaluator.train
            if run.done < steps:
                _logger.warning(
                    "the training ended after %d of the %d steps that the search was planned for: let training_func "
                    "respect max_steps and max_epochs, or plan fewer",
                    run.done, steps,
                )  # fmt: skip
            self._seconds["search"] = time.perf_counter() - start

        # the number of steps is known at train() only, where another compressor may be the one that calls it
        evaluator.train = search

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        self.harden()

    def _leave_wrapped_norms(self) -> None:
        """Gate the readers where another compressor computes the affine of a norm at every forward."""
        for group in self._active:
            norms = [self.bound_model.get_submodule(path) for path in group.norms]
            if group.site == "norm" and any("weight" not in norm._parameters for norm in norms):
                group.site = "input"

    def _get_param_names_map(self) -> dict[str, str]:
        """Names of the parameters of the plain model -> in the model as it is."""
        return {
            name.replace("_nni_wrapper.", "").replace(".parametrizations", "").removesuffix(".original"): name
            for name, _ in self.bound_model.named_parameters()
        }

    @property
    def interval_steps(self) -> NoReturn:
        """Not for NNI's scheduled pruners: DNAL grows delta and tightens the budget by itself."""
        raise DNALError("DNALPruner has its own schedule: use it by itself, not inside AGPPruner or LinearPruner")

    total_times = interval_steps

    def get_masks(self) -> dict[str, dict[str, Tensor]]:
        """NNI masks of the selected layers, as they were left by :meth:`harden`; ones before that."""
        return {
            path: {name: space.mask.clone() for name, space in spaces.items() if space.mask is not None}
            for path, spaces in self._target_spaces.items()
        }

    def update_masks(self, masks: Masks, conflicts: Conflicts = "vote") -> None:
        """Fix the gates to what NNI masks say; ``conflicts`` as in :func:`~dnal_nni.plugin.masks.speedup`."""
        self._build()
        with self._without_wrappers() as model:
            dense = slim_copy(model, self._groups, {})
            closed = closed_channels(dense, masks)
            self.harden({g.name: decide(dense, g, votes_on(g, closed), conflicts) for g in self._active})

    def _collect_data(self) -> dict[str, dict[str, Tensor]]:
        return {name: {"s": gate.s.detach().clone()} for name, gate in self.gates.items()}

    def _calculate_metrics(self, data: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        return {name: {"g": torch.sigmoid(self.gates[name].delta * d["s"])} for name, d in data.items()}

    def _generate_sparsity(self, metrics: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        return self.harden()

    # -- cutting ------------------------------------------------------------------------------------------------------

    def harden(self, keep: Mapping[str, Tensor] | None = None) -> dict[str, dict[str, Tensor]]:
        """Fix every gate to 0 or 1; the model then computes the hard-gated function.

        Args:
            keep: by group name, bool ``[channels]``; groups not named stay whole. None: what the search learned.

        Returns:
            NNI masks ``{layer: {"weight": mask, "bias": mask}}`` of the selected layers.
        """
        self._build()
        if keep is None:
            if self._search is None or self._search.done == 0:
                raise DNALError("nothing has been learned yet: run search() or compress() first, or pass keep=")
            with self._without_wrappers():
                chosen = from_first(self._learned)
        else:
            least = {group.name: group.least for group in self._active}
            for name, mask in keep.items():
                if name not in self.gates:
                    raise DNALError(f"harden(keep): there is no gate {name!r}; the names are the keys of pruner.gates")
                size = self.gates[name].s.numel()
                if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != (size,):
                    raise DNALError(f"harden(keep): {name} needs a bool tensor of shape [{size}]")
                if not bool(mask.any()) and least[name]:
                    raise DNALError(f"harden(keep): {name} would lose every channel; keep at least one")
            whole = {name: torch.ones(gate.s.numel(), dtype=torch.bool) for name, gate in self.gates.items()}
            chosen = {**whole, **{name: mask.detach().cpu().clone() for name, mask in keep.items()}}
        for group in self._active:
            if group.choice and not group.least:  # blocks: behind one that closes nothing runs
                chosen[group.name] = chosen[group.name].cumprod(0).bool()
        for name, gate in self.gates.items():
            gate.harden(chosen[name])
        self._keep, self._report = chosen, None
        masks = layer_masks(self.bound_model, self._active, chosen, self._target_spaces)
        for path, targets in masks.items():
            for name, mask in targets.items():
                self._target_spaces[path][name].mask = mask
        return masks

    def _learned(self) -> dict[str, Tensor]:
        """What the search decided, cut to the budget; fvcore has the last word on what that costs."""
        assert self._search is not None
        names, sizes = list(self.gates), [gate.s.numel() for gate in self.gates.values()]
        s = torch.cat([gate.s.detach() for gate in self.gates.values()]).double().cpu()
        if self._objective is None:
            return dict(zip(names, self._over_threshold(s.split(sizes))))
        floor, rank = self._search.scores.floor, self._search.scores.rank(s).cpu()
        if self.budget is None:
            units = exact_cut(self._objective, rank, floor)
        else:
            units = measured_cut(self._objective, rank, floor, lambda units: self._measured(self._slim(units)))
        return dict(zip(names, units.split(sizes)))

    def _slim(self, units: Tensor) -> nn.Module:
        """A copy without the other units, bool ``[units]`` of all groups."""
        names = [g.name for g in self._groups if g.frozen is None]
        keep = dict(zip(names, units.split(self._cost.sizes)))
        return slim_copy(self.bound_model, self._groups, keep)

    def _measured(self, slim: nn.Module) -> Complexity:
        """What a cut network costs; its latency only where the budget limits it."""
        size = measure(slim, self._dummy_input)
        if self._cost.dense.latency is None:
            return size
        return dataclasses.replace(size, latency=self._latency(slim))

    def _over_threshold(self, scores: tuple[Tensor, ...]) -> list[Tensor]:
        """Units whose gate is over the threshold, as many as the limits allow."""
        delta = float(next(iter(self.gates.values())).delta)
        parts = []
        for s, setting, least, most in zip(scores, self._settings, self._limits.least, self._limits.most):
            threshold = PAPER_THRESHOLD if setting.sparse_threshold is None else setting.sparse_threshold
            count = int((torch.sigmoid(delta * s) > threshold).sum())
            part = torch.zeros(len(s), dtype=torch.bool)
            part[s.argsort(descending=True, stable=True)[: min(max(count, least), most)]] = True
            parts.append(part)
        return parts

    def speedup(self) -> nn.Module:
        """A new, physically smaller module that computes what the hard-gated ``model`` computes.

        Hardens first if need be. Both are compared in eval and train mode; a difference is an error.
        """
        if self._keep is None:
            self.harden()
        assert self._keep is not None
        start = time.perf_counter()
        with self._without_wrappers() as model:
            slim = slim_copy(model, self._groups, self._keep)
            max_abs_diff, relative_diff = from_first(lambda: check_equal(model, slim, self._dummy_input))
        self._seconds["cut"] = time.perf_counter() - start
        self._report = self._make_report(slim, max_abs_diff, relative_diff)
        return slim

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
        if self._keep is None:
            raise DNALError("carry_optimizer: nothing has been cut yet: call speedup() first")
        with self._without_wrappers() as model:
            return carry_optimizer(optimizer, model, self._groups, self._keep, slim)

    def _make_report(self, slim: nn.Module, max_abs_diff: float, relative_diff: float) -> Report:
        assert self._keep is not None
        groups = []
        left = {path for path, _ in slim.named_modules()}
        for g in self._groups:
            kept = int(self._keep[g.name].sum()) if g.name in self._keep else g.channels
            if not any(member.module in left for member in g.members):
                kept = 0  # in a candidate that is gone
            groups.append(GroupReport(g.name, g.channels, kept, g.site, len(g.members), g.frozen))
        searched = self._search is not None and self._search.done > 0
        before, after = self._cost.dense, from_first(lambda: self._measured(slim))
        return Report(
            before=before,
            after=after,
            groups=groups,
            targets=self.budget.fractions(before) if self.budget is not None else {},
            decided=self._search.decided() if searched and self._search is not None else None,
            max_abs_diff=max_abs_diff,
            relative_diff=relative_diff,
            seconds=dict(self._seconds),
            history=list(self._search.history) if self._search is not None else [],
            latency_ms=(before.latency, after.latency) if before.latency and after.latency else None,
            versions=versions(),
        )

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
        return {
            "gates": {
                name: {
                    "s": gate.s.detach().clone(),
                    "delta": gate.delta.clone(),
                    "mask": gate.mask.clone(),
                    "state": gate.state.value,
                }
                for name, gate in self.gates.items()
            },
            "search": self._search.state_dict() if self._search is not None else None,
            "keep": self._keep,
            "latency": self._cost.latency_state() if self._cost.dense.latency is not None else None,
            "settings": self._settings_of_search(),
        }

    def _settings_of_search(self) -> dict[str, Any]:
        """What must be the same where a search goes on."""
        names = ("preset", "lambda_", "arch_lr", "channel_multiple")
        budget = None if self.budget is None else self.budget.limits
        return {"budget": budget} | {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a search where :meth:`state_dict` left it: the next ``search(steps)`` goes on from there."""
        self._check_state(state)
        if state.get("latency") is not None:
            self._cost.load_latency_state(state["latency"])
            self._objective = self._make_objective(self._limits)
        with torch.no_grad():
            for name, values in state["gates"].items():
                gate = self.gates[name]
                gate.s.copy_(values["s"])
                gate.delta.copy_(values["delta"])
                gate.harden(values["mask"])
                gate.state = GateState(values["state"])
        self._resume, self._keep = state["search"], state["keep"]

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping) or not {"gates", "search", "keep"} <= state.keys():
            raise DNALError("load_state_dict: this is not what pruner.state_dict() returned")
        mine, theirs = self._settings_of_search(), state.get("settings", {})
        for name, value in theirs.items():
            if value != mine.get(name):
                raise DNALError(
                    f"load_state_dict: the search ran with {name}={value!r}, here it is {mine.get(name)!r}: make the "
                    "pruner as it was, or start anew"
                )
        gates = state["gates"]
        if list(gates) != list(self.gates):
            different = sorted(set(gates) ^ set(self.gates)) or ["their order"]
            raise DNALError(f"load_state_dict: the gates are not those of this model ({different[0]})")
        for name, values in gates.items():
            here = self.gates[name].s.numel()
            if tuple(values["s"].shape) != (here,):
                raise DNALError(f"load_state_dict: gate {name} has {values['s'].numel()} channels, here {here}")

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
        state = {"model": self.bound_model.state_dict(), "pruner": self.state_dict()}
        save_state(path, state | {"optimizer": None if optimizer is None else optimizer.state_dict()})

    def load_checkpoint(self, path: str | os.PathLike[str], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Take up a search where :meth:`save_checkpoint` left it: the next ``search(steps)`` goes on from there.

        ``search.done`` says how many steps it has made: give it the batches from there on, and it ends as it would have
        without the interruption, bit for bit on the same machine. Torch's random state is put back as the search is
        entered; random numbers of other sources (``random``, numpy, data loading) are yours to repeat. Of several
        processes, all load the file, and all get rank 0's random state.

        Raises:
            DNALError: the file is damaged, or of another model, budget or optimizer; nothing has then changed.
        """
        state = load_state(path)
        if not isinstance(state, dict) or state.keys() != {"model", "pruner", "optimizer"}:
            raise DNALError(f"{path} was not written by save_checkpoint")
        own = self.bound_model.state_dict()
        theirs = state["model"]
        for name in [*own, *theirs]:
            shapes = [list(t[name].shape) if isinstance(t.get(name), Tensor) else None for t in (own, theirs)]
            if shapes[0] != shapes[1]:
                raise DNALError(f"{path} does not fit the model: {name} is {shapes[1]}, the model's is {shapes[0]}")
        self._check_state(state["pruner"])
        if (optimizer is None) != (state["optimizer"] is None):
            missing = "needs the optimizer that the search had" if optimizer is None else "holds no optimizer"
            raise DNALError(f"{path} {missing}: load_checkpoint(path, optimizer) and save_checkpoint alike")
        if optimizer is not None:
            try:
                optimizer.load_state_dict(state["optimizer"])
            except ValueError as error:
                raise DNALError(f"{path} does not fit the optimizer: {error}") from error
        self.bound_model.load_state_dict(theirs)
        self.load_state_dict(state["pruner"])
