"""The search: steps that move the gates, with frozen weights or with weights that learn at the same time."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .budget import Objective, best_of_group, first_ranks, price
from .cut import exact_cut
from .errors import DNALError
from .gate import ChannelFactor, GateState, ScaledSigmoidGate
from .graph import Conv
from .groups import ChannelGroup
from .ranks import check_same, checksum, copy_first_, is_first, mean_, ranks
from .schedule import delta_paper, delta_per_step, ramp

PAPER_LR, PAPER_MOMENTUM, PAPER_THRESHOLD = 0.01, 0.9, 0.9
MOMENTUM = 0.9
# Measured: with 1, groups move as blocks down to their floors, and the widths end up worse than uniform ones on
# Fashion-MNIST; with 0, the norms of the trained weights decide alone.
REACH = 0.3
# Candidates of a supernet start alike, and must come apart: they move farther by this factor.
CANDIDATES_REACH = 1 / REACH
BINS = 20  # of the gates' histogram in the history
# From this share of a search on, the structure is that of the cut. A unit that would help while closed and hurt while
# open keeps its score at the price: left alone, some 10 % of the gates end there, undecided.
SETTLED = 0.75
# From this share on, no more candidates of a choice are open than may stay, where that is limited.
NARROWED = 0.5


def importance(model: nn.Module, groups: Sequence[ChannelGroup]) -> Tensor:
    """Norm of each unit's weights over all layers of its group, divided by the group's mean: float64 ``[units]``."""
    scores = []
    for group in groups:
        total = torch.zeros(group.channels, dtype=torch.float64)
        for member in group.members:
            if member.bare or member.side == "size":
                continue
            module = model.get_submodule(member.path)
            if not isinstance(module, (Conv, nn.Linear)):
                continue
            weight = module.weight.detach().double().cpu()
            transposed = isinstance(module, Conv) and module.transposed
            grouped = isinstance(module, Conv) and module.groups > 1
            if grouped and member.side == "in":
                continue
            dim = 0 if (member.side == "out") != transposed or grouped else 1
            squares = weight.pow(2).sum([d for d in range(weight.dim()) if d != dim])
            if squares.numel() <= int(member.channels.max()):
                continue
            part = torch.zeros(group.channels, dtype=torch.float64)
            part.index_add_(0, member.units, squares[member.channels])
            total += part / part.mean().clamp(min=1e-30)
        root = total.sqrt() if bool(total.any()) else torch.ones_like(total)  # candidates start alike
        scores.append(root / root.mean().clamp(min=1e-30))
    return torch.cat(scores)


class Scores:
    """What every unit is worth, and what the gates should be at each step of a search under an objective.

    A gate's ``s`` is ``score - price``: the score starts at the relative norm of the unit's weights and collects
    ``-dL/dg`` per unit of cost; the price is set at every step so that the expected cost follows a descent to the
    target. A gate thus closes when it is worth less, per cost, than what the budget can afford, and reopens when it is
    worth more, until the last quarter of the search: there the structure stands, while weights and norm statistics
    settle. Everything stays on the device of the scores; a step has no host sync and can be put into a CUDA graph.

    Args:
        objective: what the search is held to.
        start: the first scores, float64 ``[units]``.
        steps: planned number of steps.
        reach: how far a steady task gradient of average size moves a score over a whole search.

    Attributes:
        value: the scores, float64 ``[units]``.
        floor: units that stay open in each group.
        moving: the number of steps after which :meth:`settle` is due.
    """

    def __init__(self, objective: Objective, start: Tensor, steps: int, reach: float = REACH) -> None:
        self.objective = objective
        self.floor = objective.to("cpu").floor()
        objective.to(start.device)
        limits = [first_ranks(objective.sizes, counts) for counts in (self.floor, objective.limits.most)]
        self.ranks = torch.stack(limits).to(start.device)
        self.value = start.clone()
        self.momentum = torch.zeros_like(start)
        self.scale = start.new_zeros(2)  # mean squares: of channels, of candidates
        chosen = torch.tensor(objective.choices, device=start.device)[objective.group_of]
        self.choices = chosen.nonzero().flatten()  # units that are candidates of a supernet
        self.cheap = 0.1 * objective.whole[self.choices].mean()
        self.delta = torch.tensor([delta_per_step(t, steps) for t in range(steps)]).to(start)
        self.moving = max(1, round(SETTLED * steps))
        self.pace = torch.tensor([reach / self.moving if t < self.moving else 0.0 for t in range(steps)]).to(start)
        self.settled = torch.arange(steps, device=start.device) >= self.moving
        self.narrowed = torch.arange(steps, device=start.device) >= NARROWED * steps
        self.structure = torch.ones_like(start)  # 1 open, -1 closed; set by settle
        descent = torch.tensor([ramp(t, steps, 1.0, 0.0) for t in range(steps)]).to(start).unsqueeze(1)
        self.aims = objective.targets + (0.98 - objective.targets) * descent

    @torch.no_grad()
    def update(self, grad: Tensor, g: Tensor, step: int | Tensor) -> None:
        """One architecture step from dL/dg at the gates ``g``, both ``[units]``; ``step`` as in :meth:`gates`."""
        g = g.detach().to(self.value.dtype).requires_grad_()
        with torch.enable_grad():
            (marginal,) = torch.autograd.grad(self.objective.relative(g).sum(), g)
        # loss saved per unit of cost; that a unit costs (next to) nothing must not drown all others
        worth = -grad.to(self.value.dtype) / torch.maximum(marginal, 1e-3 * marginal.mean())
        if len(self.choices):
            # candidates among themselves: next to single channels they are few and steady, and some cost nothing
            own = -grad.to(self.value.dtype) / marginal.clamp(min=self.cheap)
            own = CANDIDATES_REACH * _normalised(own.index_select(0, self.choices), self.scale[1])
            worth = _normalised(worth.index_fill(0, self.choices, 0.0), self.scale[0]).index_copy(0, self.choices, own)
        else:
            worth = _normalised(worth, self.scale[0])
        self.momentum.mul_(MOMENTUM).add_(worth, alpha=1 - MOMENTUM)
        self.value.add_(self.momentum * _entry(self.pace, step))

    @torch.no_grad()
    def gates(self, step: int | Tensor) -> tuple[Tensor, Tensor]:
        """``s`` ``[units]`` and ``delta`` (0-d) of a step (a number, or int64 ``[1]`` on the device)."""
        delta, settled, aims = (_entry(table, step) for table in (self.delta, self.settled, self.aims))
        if not isinstance(step, Tensor) and step >= self.moving:
            return self.structure, delta
        held, allowed = best_of_group(self.value, self.objective.group_of, self.ranks)
        if len(self.choices):
            free = price(self.objective, self.value, delta, held, allowed, aims)
            must, may = self.objective.candidates(self.value, free[self.objective.owner])
            held, allowed = held | must, allowed & (may | ~_entry(self.narrowed, step))
        s = self.value - price(self.objective, self.value, delta, held, allowed, aims)[self.objective.owner]
        s = torch.where(held, torch.maximum(s, 6.0 / delta), s)  # held open: far enough on the open side
        s = torch.where(allowed, s, torch.minimum(s, -6.0 / delta))
        return torch.where(settled, self.structure, s), delta

    def settle(self) -> None:
        """Fix the structure: what would be cut now, to the channel. Waits for the device, once in a search."""
        objective = copy.deepcopy(self.objective)  # a CUDA graph holds the tables of this one
        keep = exact_cut(objective, self.value, self.floor)
        self.structure.copy_(keep.double() * 2 - 1)
        copy_first_(self.structure)


def _normalised(worth: Tensor, scale: Tensor) -> Tensor:
    """``worth`` by its running root mean square, whose square ``scale`` keeps."""
    mean_square = worth.square().mean()
    scale.copy_(torch.where(scale == 0, mean_square, 0.9 * scale + 0.1 * mean_square))
    return (worth / scale.sqrt().clamp(min=1e-30)).clamp(-5, 5)


def _entry(table: Tensor, step: int | Tensor) -> Tensor:
    return table.index_select(0, step)[0] if isinstance(step, Tensor) else table[step]


def ungated(name: str) -> str:
    """The name that a parameter has while no gate acts on it."""
    return name.replace(".parametrizations", "").removesuffix(".original")


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
        if ranks() > 1:
            settings = (self.steps, self.done, self.weights_learn, self.lambda_, checksum(self.model))
            remedy = "load the same weights on every rank, and search with the same arguments"
            check_same("steps, steps done, whether weights learn, lambda and the weights' checksum", settings, remedy)
            copy_first_(self.score, self.momentum, self.scale)
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
            copy_first_(*self.model.buffers())  # norm statistics are each rank's own
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
