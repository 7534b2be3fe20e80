"""The search: steps that move the gates, with frozen weights or with weights that learn at the same time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..channels.groups import ChannelGroup
from ..errors import DNALError
from ..modules.gates import ChannelFactor, GateState, ScaledSigmoidGate
from ..surgery.inject import ungated
from .importance import importance
from .objective import Objective
from .ranks import broadcast_, check_same, checksum, is_first, mean_, world_size
from .schedule import delta_paper
from .scores import REACH, Scores

PAPER_LR, PAPER_MOMENTUM, PAPER_THRESHOLD = 0.01, 0.9, 0.9
BINS = 20  # of the gates' histogram in the history


class Search:
    """A search over a fixed number of steps; use it as a context manager and call :meth:`step` after each forward.

    With an ``objective``, :class:`Scores` says what the gates are. Without one, it is the paper's search:
    ``loss + lambda * sum sigmoid(s)``, SGD on ``s`` from 0, which leaves the final cost to lambda.

    Args:
        model: the gated model.
        groups: the groups that have a gate.
        gates: by group name, in the order of ``groups``.
        steps: planned number of calls of :meth:`step`.
        objective: what the search is held to, or None for the paper's.
        lambda_: weight of the paper's regulariser.
        arch_lr: ``reach`` of :class:`Scores`, or the learning rate of the paper's SGD; None: REACH or PAPER_LR.
        optimizer: of the model's weights, which :meth:`step` steps too where they learn.
        weights_learn: whether the weights learn in the same steps; otherwise they are frozen.
        progress: show a progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        gates: Mapping[str, ScaledSigmoidGate],
        *,
        steps: int,
        objective: Objective | None,
        lambda_: float,
        arch_lr: float | None,
        optimizer: torch.optim.Optimizer | None,
        weights_learn: bool,
        progress: bool,
    ) -> None:
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise DNALError(f"search(steps={steps!r}): must be a whole number >= 1")
        self.model, self.objective, self.lambda_, self.steps = model, objective, lambda_, steps
        self.gates = list(gates.values())
        self.optimizer, self.weights_learn, self.progress = optimizer, weights_learn, progress
        self.done = 0
        self.history: list[dict[str, Any]] = []
        self._loss: Tensor | None = None
        device = self.gates[0].s.device
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.scores: Scores | None = None
        self.paper_lr = PAPER_LR if arch_lr is None else arch_lr
        if objective is not None:
            reach = REACH if arch_lr is None else arch_lr
            self.scores = Scores(objective, importance(model, groups).to(device), steps, reach)
            self.score, self.momentum, self.scale = self.scores.value, self.scores.momentum, self.scores.scale
            self.floor = self.scores.floor
        else:
            self.score = torch.zeros(sum(g.channels for g in groups), dtype=torch.float64, device=device)
            self.momentum, self.scale = torch.zeros_like(self.score), self.score.new_zeros(())
        self._trainable: list[nn.Parameter] = []
        self.saved: dict[str, Tensor] = {}
        self._random: Mapping[str, Tensor] = {}

    # -- the loop -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Search:
        if world_size() > 1:
            settings = (self.steps, self.done, self.weights_learn, self.lambda_, checksum(self.model))
            remedy = "load the same weights on every rank, and search with the same arguments"
            check_same("steps, steps done, whether weights learn, lambda and the weights' checksum", settings, remedy)
            broadcast_(self.score, self.momentum, self.scale)
        self._trainable = [p for p in self.model.parameters() if p.requires_grad]
        self._gradients = [p.grad for p in self._trainable]
        if not self.saved:
            self.saved = {ungated(name): tensor.detach().clone() for name, tensor in self._tensors()}
        hidden = not self.progress or not is_first()
        self.bar = tqdm(total=self.steps, initial=self.done, desc="search", unit="step", disable=hidden)
        for gate in self.gates:
            gate.state = GateState.SOFT
            if self.scores is None:
                gate.s.requires_grad_(True)
        self.leaves: list[Tensor] = [gate.s for gate in self.gates]
        if self.scores is not None:
            self.leaves = self._attach_leaves()
        self._set_gates()
        self._freeze()
        for device, state in self._random.items():
            torch.set_rng_state(state) if device == "cpu" else torch.cuda.set_rng_state(state, self.score.device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        for parameter, grad in zip(self._trainable, self._gradients):
            parameter.requires_grad_(True)
            parameter.grad = grad
        for gate in self.gates:
            gate.s.requires_grad_(False)
            gate.s.grad = None
            if error is not None:
                gate.state = GateState.TRANSPARENT
        for factor in self._factors():
            factor.value = None
        if error is None:
            broadcast_(*self.model.buffers())  # norm statistics are each rank's own
        if isinstance(error, DNALError):
            self.restore()

    def _factors(self) -> list[ChannelFactor]:
        return [module for module in self.model.modules() if isinstance(module, ChannelFactor)]

    def _attach_leaves(self) -> list[Tensor]:
        """Give every factor in the model a leaf of its own; those that are the same share one."""
        first = dict(zip(self.gates, itertools.accumulate([gate.s.numel() for gate in self.gates], initial=0)))
        end = len(self.score)  # the entry of channels without a gate
        leaves: dict[bytes, Tensor] = {}
        for factor in self._factors():
            units = torch.cat([*(torch.arange(len(g.s)) + first[g] for g in factor.gates), torch.tensor([end])])
            units = units[factor.index.cpu()]
            leaf = factor.gates[0].s.new_ones(len(units)).requires_grad_()
            factor.value = leaves.setdefault(units.numpy().tobytes(), leaf)
        self.unit_of = torch.from_numpy(np.frombuffer(b"".join(leaves), dtype=np.int64).copy()).to(self.score.device)
        return list(leaves.values())

    def _tensors(self) -> list[tuple[str, Tensor]]:
        # the gates' indices are not persistent: not in the state dict
        return [(name, t) for name, t in self.model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)]

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model's weights and norm statistics the values that they had ahead of the first search."""
        for name, tensor in self._tensors():
            if ungated(name) in self.saved:
                tensor.copy_(self.saved[ungated(name)])

    @property
    def learns_weights(self) -> bool:
        """Whether the weights make a step in the next one too."""
        return self.weights_learn and self.done < self.steps

    def step(self, loss: Tensor) -> None:
        """Backward of ``loss`` (0-d), then one step of the gates, and of the weights where they learn too.

        Steps beyond the planned number change nothing.
        """
        if self.done >= self.steps:
            return
        if self.learns_weights:
            assert self.optimizer is not None
            self.optimizer.zero_grad()
        self.penalised(loss).backward()
        self.before_optimizer_step()
        if self.learns_weights:
            assert self.optimizer is not None
            self.optimizer.step()
        self.after_optimizer_step()

    def penalised(self, loss: Tensor) -> Tensor:
        """The loss of the coming step: with the paper's regulariser where there is no objective; an error if NaN.

        On a GPU, looking at the loss would wait for the device: there it is looked at with every entry of the history.
        """
        self._loss = mean_(loss.detach().double().clone())
        wrong = ~torch.isfinite(self._loss).all() & (self.bad_step < 0)
        self.bad_step.masked_fill_(wrong.to(self.bad_step.device), self.done)
        if (not loss.is_cuda or self._reports(self.done + 1)) and int(self.bad_step) >= 0:
            raise DNALError(
                f"the loss is nan or infinite at search step {int(self.bad_step)}: lower the learning rate, check the "
                "data, or use float32; the model's weights have been put back"
            )
        if self.objective is not None or self.done >= self.steps:
            return loss
        return loss + self.lambda_ * torch.stack([torch.sigmoid(gate.s).sum() for gate in self.gates]).sum()

    def before_optimizer_step(self) -> None:
        """The step of the gates, between a backward pass and the weights' own step."""
        if self.done >= self.steps:
            return
        if not self.learns_weights:
            for parameter in self._trainable:
                parameter.grad = None  # frozen: not even decay or momentum may move a weight
        self.update()

    def after_optimizer_step(self) -> None:
        """Count the step."""
        if self.done < self.steps:
            self.advance()

    def advance(self) -> None:
        """Count a step, and prepare the gates of the next one."""
        self.done += 1
        for leaf in self.leaves:  # not in update: a closure may run several times in a step
            leaf.grad = None
        if self.scores is not None and self.done == self.scores.moving:
            self.scores.settle()
        if self.done < self.steps:
            self._set_gates()
        else:
            self._freeze()
        self.bar.update()
        if self._reports(self.done):
            cost = float(self.objective.relative(self.g).mean() if self.objective is not None else self.g.mean())
            self.history.append(
                {
                    "step": self.done,
                    "delta": float(self.gates[0].delta),
                    "cost": cost,
                    "loss": None if self._loss is None else float(self._loss),
                    "gates": torch.histc(self.g, BINS, 0, 1).long().tolist(),
                }
            )
            self.bar.set_postfix(cost=f"{cost:.3f}", delta=f"{float(self.gates[0].delta):.0f}")

    def _reports(self, step: int) -> bool:
        return step % max(1, self.steps // 100) == 0 or step == self.steps

    def _freeze(self) -> None:
        for parameter in self._trainable:
            parameter.requires_grad_(self.learns_weights)

    # -- the gates ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self) -> None:
        """One step of the gates, from the gradients that the backward pass left."""
        grad = torch.cat([t.grad if t.grad is not None else torch.zeros_like(t) for t in self.leaves]).double()
        grad.nan_to_num_(0.0, 0.0, 0.0)  # a GradScaler skips the steps that overflow, whose gradients stay here
        mean_(grad)
        if self.scores is None:
            self.momentum.mul_(PAPER_MOMENTUM).add_(grad)
            self.score.sub_(self.momentum, alpha=self.paper_lr)
        else:
            of_units = grad.new_zeros(len(self.score) + 1).index_add_(0, self.unit_of, grad)
            self.scores.update(of_units[:-1], self.g, self.done)

    @torch.no_grad()
    def _set_gates(self) -> None:
        """delta and ``s`` for the coming step."""
        if self.scores is None:
            s, delta = self.score, self.score.new_tensor(delta_paper(self.done, self.steps))
        else:
            s, delta = self.scores.gates(self.done)
        sizes = [gate.s.numel() for gate in self.gates]
        # one kernel for all gates
        torch._foreach_copy_([gate.s for gate in self.gates], s.to(self.gates[0].s.dtype).split(sizes))
        torch._foreach_copy_([gate.delta for gate in self.gates], [delta.to(self.gates[0].delta.dtype)] * len(sizes))
        g = torch.sigmoid(delta * s).to(self.gates[0].s.dtype)
        self.g = g.double()  # as the model has them
        if self.scores is not None:
            values = F.pad(g, (0, 1), value=1.0).index_select(0, self.unit_of)
            torch._foreach_copy_(self.leaves, values.split([len(leaf) for leaf in self.leaves]))

    @torch.no_grad()
    def decided(self) -> float:
        """Fraction of the gates outside of [0.05, 0.95]."""
        g = torch.cat([torch.sigmoid(gate.delta * gate.s) for gate in self.gates])
        return float(((g < 0.05) | (g > 0.95)).double().mean())

    # -- resuming -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a search needs to go on: tensors and numbers only. Torch's random state of now is part of it."""
        tensors = {name: getattr(self, name).clone() for name in ("score", "momentum", "scale")}
        random = {"cpu": torch.get_rng_state()}
        if self.score.is_cuda:
            random["cuda"] = torch.cuda.get_rng_state(self.score.device)
        return {
            "done": self.done,
            "steps": self.steps,
            "history": list(self.history),
            "saved": self.saved,
            "random": random,
            **tensors,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a search of the same number of steps; its random state is put back when the search is entered."""
        if state["steps"] != self.steps:
            raise DNALError(f"search(steps={self.steps}): the search to be resumed was planned for {state['steps']}")
        for name in ("score", "momentum", "scale"):
            getattr(self, name).copy_(state[name])
        self.done, self.history = int(state["done"]), list(state["history"])
        if self.scores is not None and self.done >= self.scores.moving:
            self.scores.settle()
        self.saved = dict(state["saved"])
        self._random = {name: value.cpu() for name, value in state.get("random", {}).items()}
