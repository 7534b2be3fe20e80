"""DNALPruner: DNAL as a pruner of NNI 3.0."""

from __future__ import annotations

import contextlib
import copy
import random
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from nni.compression import TorchEvaluator
from nni.compression.base.compressor import Pruner
from nni.compression.utils import Evaluator
from schema import SchemaError
from torch import Tensor, nn

from . import selection
from .budget import Budget, Objective, exact_cut
from .cost import CostModel, measure
from .errors import DNALError
from .gate import GateState, ScaledSigmoidGate
from .graph import FORWARD_ERRORS, Norm, call, clone
from .groups import ChannelGroup, find_groups
from .inject import attach, detach
from .report import GroupReport, Report
from .search import PAPER_THRESHOLD, Search
from .slim import slim_copy
from .verify import TOLERANCE, difference, example_like, verify_and_freeze

Masks = dict[str, dict[str, Tensor]]


class DNALPruner(Pruner):
    """Learns which channels a trained network needs, and removes the others.

    Args:
        model: the trained network; gates are attached to it in place, its parameters stay the same objects.
        config_list: NNI's own schema. Selects layers by ``op_types``, ``op_names``, ``op_names_re`` and ``exclude_*``;
            ``sparse_ratio`` (fraction of channels to remove) rules where no ``budget`` is given.
        evaluator: NNI's evaluator, needed for :meth:`compress` only.
        dummy_input: a tensor, a tuple of positional arguments or a dict of keyword arguments; by default the
            evaluator's. FLOPs are counted for it.
        budget: what the compressed network may cost. With neither a budget nor a sparse_ratio, ``lambda_`` alone drives
            the search, as in the paper.
        preset: "default", or "paper" for the equations and the schedule of arXiv 2103.02126; with a budget, the
            paper's search is cut to that budget.
        lambda_: weight of the paper's regulariser ``sum sigmoid(s)``.
        verify_seconds: time limit for comparing sliced with gated copies; groups not compared by then are left whole.

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
        verify_seconds: float = 60.0,
        existed_wrappers: dict[str, Any] | None = None,
    ) -> None:
        if existed_wrappers:
            raise DNALError("DNALPruner.from_compressor is not supported yet: use DNALPruner on the unwrapped model")
        if preset not in ("default", "paper"):
            raise DNALError(f"preset={preset!r}: choose 'default' or 'paper'")
        if budget is not None and not isinstance(budget, Budget):
            raise DNALError(f"budget={budget!r}: pass a Budget, for example Budget(flops=0.5)")
        selection.check_model(model)
        selection.check_config(model, config_list)
        if evaluator is not None and not isinstance(evaluator, Evaluator):
            raise DNALError(f"evaluator is a {type(evaluator).__name__}: pass one of NNI's evaluators")
        self._built = False
        try:
            for_nni, self._beyond_nni = selection.split_config(model, config_list)
            super().__init__(model, for_nni, evaluator)
        except (AssertionError, KeyError, SchemaError) as error:
            raise DNALError(f"NNI refuses the config_list: {str(error) or type(error).__name__}") from error
        if not self._target_spaces and not self._beyond_nni:
            raise DNALError("config_list selects no layer of the model: widen op_types / op_names, or exclude less")
        self.budget, self.preset, self.lambda_, self.verify_seconds = budget, preset, lambda_, verify_seconds
        self._dummy_input = dummy_input if dummy_input is not None else evaluator and evaluator.get_dummy_input()
        self._groups: list[ChannelGroup] = []
        self._gates: OrderedDict[str, ScaledSigmoidGate] = OrderedDict()
        self._keep: dict[str, Tensor] | None = None
        self._search: Search | None = None
        self._resume: dict[str, Any] | None = None
        self._report: Report | None = None
        self._seconds: dict[str, float] = {}
        if self._dummy_input is not None:
            self._build()

    # -- gates on and off ---------------------------------------------------------------------------------------------

    def wrap_model(self) -> None:
        """Attach the gates. NNI's own wrappers are never put on the model: they only hold the masks."""
        self._is_wrapped = True
        if self._built:
            attach(self.bound_model, self._groups, self._gates)

    def unwrap_model(self) -> None:
        """Take the gates off and undo what searches changed: the dense model as it was, with the same parameters."""
        if self._built and self._is_wrapped:
            detach(self.bound_model)
            if self._search is not None:
                self._search.restore()
        self._is_wrapped = False

    def _build(self) -> None:
        """Find, select and verify the groups, count the cost, attach the gates; the model is touched last."""
        if self._built:
            return
        if self._dummy_input is None:
            raise DNALError(
                "a dummy input is needed to trace the model: DNALPruner(..., dummy_input=x), or an evaluator with one"
            )
        start = time.perf_counter()
        model = self.bound_model
        try:
            with torch.no_grad():
                call(clone(model).eval(), self._dummy_input)
        except FORWARD_ERRORS as error:
            what = f" of shape {tuple(self._dummy_input.shape)}" if isinstance(self._dummy_input, Tensor) else ""
            raise DNALError(f"the model rejects the dummy_input{what}: {str(error).splitlines()[0]}") from error
        try:
            groups = find_groups(model, self._dummy_input)
        except FORWARD_ERRORS as error:
            raise DNALError(f"the graph of {type(model).__name__} cannot be read: {error}") from error
        selected = dict(self._beyond_nni)
        for name, spaces in self._target_spaces.items():
            given = [space.sparse_ratio for space in spaces.values() if space.sparse_ratio is not None]
            selected[name] = min(given) if given else None
        ratios = selection.select(groups, selected, model)
        verify_and_freeze(model, groups, self._dummy_input, self.verify_seconds)
        active = [g for g in groups if g.frozen is None]
        if not active:
            reasons = "; ".join(f"{g.name}: {g.frozen}" for g in groups[:5]) or "it has no convolution or linear layer"
            raise DNALError(f"nothing in the model can be pruned ({reasons})")
        cost = CostModel(model, groups, self._dummy_input)
        self._objective: Objective | None = None
        if self.budget is not None:
            self._objective = Objective(cost, self.budget)
        elif any(ratio is not None for ratio in selected.values()):
            self._objective = Objective(cost, None, [ratios[g.name] for g in active])
        self._cost = cost
        self._groups = groups
        device = next(model.parameters()).device
        for group in active:
            self._gates[group.name] = ScaledSigmoidGate(group.channels).to(device)
        self._built = True
        if self._is_wrapped:
            attach(model, groups, self._gates)
        self._seconds["build"] = time.perf_counter() - start

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

    def _new_search(self, steps: int, optimizer: torch.optim.Optimizer | None, progress: bool) -> Search:
        self._build()
        if not self._is_wrapped:
            raise DNALError("the gates were taken off with unwrap_model(): call wrap_model() ahead of a search")
        if optimizer is not None:
            known = {id(p) for p in self.bound_model.parameters()}
            if not any(id(p) in known for group in optimizer.param_groups for p in group["params"]):
                raise DNALError("search(optimizer=...): this optimizer holds no parameter of the model")
        search = Search(
            self.bound_model,
            self._active,
            self.gates,
            steps=steps,
            objective=None if self.preset == "paper" else self._objective,
            lambda_=self.lambda_,
            optimizer=optimizer,
            progress=progress,
        )
        if self._search is not None:
            search.saved = self._search.saved
        if self._resume is not None:
            search.load_state_dict(self._resume)
            self._resume = None
        self._search, self._keep, self._report = search, None, None
        return search

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
        with self._new_search(steps, optimizer, progress) as search:
            yield search
        self._seconds["search"] = time.perf_counter() - start

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> tuple[nn.Module, Masks]:
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
        evaluator = self.evaluator
        if evaluator is None:
            raise DNALError("compress() needs an evaluator: DNALPruner(model, config_list, evaluator), or use search()")
        if not isinstance(evaluator, TorchEvaluator):
            raise DNALError(f"compress() supports NNI's TorchEvaluator, not {type(evaluator).__name__}; use search()")
        if (max_steps is None) == (max_epochs is None):
            raise DNALError("compress() needs exactly one of max_steps and max_epochs")
        self._build()
        start = time.perf_counter()
        names = self._get_param_names_map()
        steps = max_steps if max_steps is not None else self._count_steps(evaluator, names) * (max_epochs or 0)
        evaluator.bind_model(self.bound_model, names)
        try:
            paper = self.preset == "paper" or self._objective is None
            assert evaluator._optimizers is not None
            search = self._new_search(steps, None if paper else evaluator._optimizers[0], progress=True)
            with search:
                evaluator.patch_loss(lambda loss, batch: search.penalised(loss))
                evaluator.patch_optimizer_step([search.before_optimizer_step], [search.after_optimizer_step])
                evaluator.train(max_steps, max_epochs)
        finally:
            evaluator.unbind_model()
        self._seconds["search"] = time.perf_counter() - start
        self.harden()

    def _count_steps(self, evaluator: TorchEvaluator, names: dict[str, str]) -> int:
        """Optimizer steps of one epoch of the user's training function, without a forward or backward pass of ours."""
        steps = 0
        zero = torch.zeros((), requires_grad=True)
        form: list[Any] = []
        original = evaluator._training_step

        def count() -> None:
            nonlocal steps
            steps += 1

        def training_step(*args: Any, **kwargs: Any) -> Any:
            if not form:  # once, on a copy of the model: what the step returns
                copies = [copy.deepcopy(a) if a is self.bound_model else a for a in args]
                named = {k: copy.deepcopy(v) if v is self.bound_model else v for k, v in kwargs.items()}
                with torch.no_grad():
                    form.append(original(*copies, **named))
            loss = zero * 1
            if isinstance(form[0], Mapping):
                return {**form[0], "loss": loss}
            return (loss, *form[0][1:]) if isinstance(form[0], Sequence) else loss

        states = torch.get_rng_state(), np.random.get_state(), random.getstate()
        evaluator.bind_model(self.bound_model, names)
        try:
            evaluator._training_step = training_step
            evaluator.patch_optimizer_step([count], [])
            evaluator.train(None, 1)
        finally:
            evaluator.unbind_model()
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])
            random.setstate(states[2])
        if steps == 0:
            raise DNALError("the training function made no optimizer step in one epoch: check its data, or max_epochs")
        return steps

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        raise DNALError("DNALPruner cannot be fused with another compressor yet: run them one after the other")

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        raise DNALError("DNALPruner cannot be fused with another compressor yet: run them one after the other")

    def _get_param_names_map(self) -> dict[str, str]:
        """Names of parameters without gates -> with gates."""
        return {
            name.replace(".parametrizations", "").removesuffix(".original"): name
            for name, _ in self.bound_model.named_parameters()
        }

    # -- cutting ------------------------------------------------------------------------------------------------------

    def harden(self, keep: Mapping[str, Tensor] | None = None) -> Masks:
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
            chosen = self._learned()
        else:
            for name, mask in keep.items():
                if name not in self.gates:
                    raise DNALError(f"harden(keep): there is no gate {name!r}; the names are the keys of pruner.gates")
                size = self.gates[name].s.numel()
                if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != (size,):
                    raise DNALError(f"harden(keep): {name} needs a bool tensor of shape [{size}]")
                if not bool(mask.any()):
                    raise DNALError(f"harden(keep): {name} would lose every channel; keep at least one")
            whole = {name: torch.ones(gate.s.numel(), dtype=torch.bool) for name, gate in self.gates.items()}
            chosen = {**whole, **{name: mask.detach().cpu().clone() for name, mask in keep.items()}}
        for name, gate in self.gates.items():
            gate.harden(chosen[name])
        self._keep, self._report = chosen, None
        masks = self._nni_masks()
        self.update_masks(masks)
        return masks

    def _learned(self) -> dict[str, Tensor]:
        """What the search decided, cut to the budget; fvcore has the last word on what that costs."""
        assert self._search is not None
        names, sizes = list(self.gates), [gate.s.numel() for gate in self.gates.values()]
        s = torch.cat([gate.s.detach() for gate in self.gates.values()]).double().cpu()
        if self._objective is None:
            delta = float(next(iter(self.gates.values())).delta)
            parts = [torch.sigmoid(delta * part) > PAPER_THRESHOLD for part in s.split(sizes)]
            for part, raw in zip(parts, s.split(sizes)):
                part[raw.argmax()] = True
            return dict(zip(names, parts))
        # the paper's search knows no floor; ranks among ties are those of the weights
        floor = self._search.floor if self._search.objective is not None else [1] * len(sizes)
        rank = self._search.score.cpu() if self._search.objective is not None else s
        target = float(self._objective.targets[0])
        aim = target
        for _ in range(5):
            keep = dict(zip(names, exact_cut(self._objective, rank, floor, aim).split(sizes)))
            if self.budget is None:
                return keep
            slim = slim_copy(self.bound_model, self._groups, keep)
            got = getattr(measure(slim, self._dummy_input), self.budget.kind)
            actual = got / getattr(self._cost.dense, self.budget.kind)
            if abs(actual / target - 1) < 2e-3:
                break
            aim *= target / actual
        return keep

    def _nni_masks(self) -> Masks:
        assert self._keep is not None
        masks: Masks = {}
        channels: dict[str, Tensor] = {}
        for group in self._active:
            dropped = ~self._keep[group.name]
            for member in group.members:
                if member.side in ("in", "size") or member.bare or member.path not in self._target_spaces:
                    continue
                if member.path not in channels:
                    module = self.bound_model.get_submodule(member.path)
                    size = module.num_features if isinstance(module, Norm[:2]) else module.weight.shape[0]
                    channels[member.path] = torch.ones(int(size))  # type: ignore[arg-type]
                channels[member.path][member.channels[dropped[member.units]]] = 0
        for path, spaces in self._target_spaces.items():
            module = self.bound_model.get_submodule(path)
            for target in spaces:
                value = getattr(module, target, None)
                if not isinstance(value, Tensor):
                    continue
                mask = channels.get(path, torch.ones(value.shape[0])).to(value)
                masks.setdefault(path, {})[target] = mask.view(-1, *[1] * (value.dim() - 1)).expand_as(value).clone()
        return masks

    def _collect_data(self) -> Masks:
        return {name: {"s": gate.s.detach().clone()} for name, gate in self.gates.items()}

    def _calculate_metrics(self, data: Masks) -> Masks:
        return {name: {"g": torch.sigmoid(self.gates[name].delta * d["s"])} for name, d in data.items()}

    def _generate_sparsity(self, metrics: Masks) -> Masks:
        return self.harden()

    def speedup(self) -> nn.Module:
        """A new, physically smaller module that computes what the hard-gated ``model`` computes.

        Hardens first if need be. Both are compared in eval and train mode; a difference is an error.
        """
        if self._keep is None:
            self.harden()
        assert self._keep is not None
        start = time.perf_counter()
        slim = slim_copy(self.bound_model, self._groups, self._keep)
        native = next(p.dtype for p in self.bound_model.parameters() if p.is_floating_point())
        checks = {}
        for dtype in {native, torch.float64}:
            inputs = example_like(self._dummy_input, dtype)
            try:
                pair = clone(self.bound_model).to(dtype), clone(slim).to(dtype)
                checks[dtype] = difference(*pair, inputs)
            except FORWARD_ERRORS as error:
                if dtype is native and native not in checks:
                    raise DNALError(f"the cut model does not run: {str(error).splitlines()[0]}") from error
        best = torch.float64 if torch.float64 in checks else native
        if not checks[best][1] <= TOLERANCE.get(best, 5e-2):
            raise DNALError(
                f"the cut model differs from the gated one by {checks[best][1]:.1e} of its output (in {best}): please "
                "report the model; excluding layers in config_list narrows it down"
            )
        self._seconds["cut"] = time.perf_counter() - start
        self._report = self._make_report(slim, checks[native][0], checks[best][1])
        return slim

    def _make_report(self, slim: nn.Module, max_abs_diff: float, relative_diff: float) -> Report:
        assert self._keep is not None
        groups = []
        for g in self._groups:
            kept = int(self._keep[g.name].sum()) if g.name in self._keep else g.channels
            groups.append(GroupReport(g.name, g.channels, kept, g.site, len(g.members), g.frozen))
        searched = self._search is not None and self._search.done > 0
        budgeted = self.budget is not None and self._objective is not None
        return Report(
            before=self._cost.dense,
            after=measure(slim, self._dummy_input),
            groups=groups,
            target=float(self._objective.targets[0]) if budgeted and self._objective is not None else None,
            objective=self.budget.kind if self.budget is not None else None,
            decided=self._search.decided() if searched and self._search is not None else None,
            max_abs_diff=max_abs_diff,
            relative_diff=relative_diff,
            seconds=dict(self._seconds),
            history=list(self._search.history) if self._search is not None else [],
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
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a search where :meth:`state_dict` left it: the next ``search(steps)`` goes on from there."""
        gates = state["gates"]
        if list(gates) != list(self.gates):
            different = sorted(set(gates) ^ set(self.gates)) or ["their order"]
            raise DNALError(f"load_state_dict: the gates are not those of this model ({different[0]})")
        for name, values in gates.items():
            here = self.gates[name].s.numel()
            if tuple(values["s"].shape) != (here,):
                raise DNALError(f"load_state_dict: gate {name} has {values['s'].numel()} channels, here {here}")
        with torch.no_grad():
            for name, values in gates.items():
                gate = self.gates[name]
                gate.s.copy_(values["s"])
                gate.delta.copy_(values["delta"])
                gate.mask.copy_(values["mask"])
                gate.state = GateState(values["state"])
        self._resume, self._keep = state["search"], state["keep"]
