"""The search: steps that move the gates, with frozen weights or with weights that learn at the same time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..arguments import checked_but
from ..errors import DNALError
from ..modules.gates import GateState, ScaledSigmoidGate
from ..progress import logger
from .informed import Informed, only_if_due, rest_of, state_of, take_up
from .learner import ArchOptimizer
from .leaves import factors_of
from .losses import OnlyStep, check_loss, told_of_backward
from .ranks import broadcast_, check_same, checksum, is_first, mean_, share_state, world_size
from .statistics import Pace

BINS = 20  # of the gates' histogram in the history
PATIENCE = 3  # steps after which a search that no gradient reaches is an error


class Search:
    """A search over a fixed number of steps; use it as a context manager and call :meth:`step` after each forward.

    Args:
        model: the gated model.
        gates: in the order of the units.
        scores: what the gates are at each step.
        optimizer: of the model's weights, which :meth:`step` steps too where they learn.
        weights_learn: whether the weights learn in the same steps; otherwise they are frozen.
        progress: show a progress bar.
        when: the steps in which gates learn too; None: all.

    Attributes:
        steps: planned number of calls of :meth:`step`.
        running: whether it has been entered, and not left.
        pace: of the norms' running statistics.
        done: how many have been made.
        history: of the report.
        seconds: what it took, once it has ended.
    """

    def __init__(
        self,
        model: nn.Module,
        gates: Iterable[ScaledSigmoidGate],
        scores: ArchOptimizer,
        *,
        optimizer: torch.optim.Optimizer | None,
        weights_learn: bool,
        progress: bool,
        when: Informed | None = None,
    ) -> None:
        self.rest = rest_of(when, scores, weights_learn)
        self.model, self.gates, self.scores, self.steps = model, list(gates), scores, scores.steps
        self.optimizer, self.weights_learn, self.progress = optimizer, weights_learn, progress
        self.pace = Pace(model, self.steps)
        self.done = 0
        self.history: list[dict[str, Any]] = []
        self.seconds: float | None = None
        self.running = False
        self._said = self._reached = False  # that it is over; whether a gradient has come to a gate
        self._weights = OnlyStep(optimizer, lambda: self.done >= self.steps)
        self._loss: Tensor | None = None
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=scores.value.device)
        self._trainable: list[nn.Parameter] = []
        self.saved: dict[str, Tensor] = {}
        self._random: Mapping[str, Tensor] = {}

    # -- the loop -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Search:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(error)

    def start(self) -> None:
        """Let the gates act, softly, and the weights learn or stand still; what entering the context does."""
        if self.running:
            raise DNALError("this search is under way already: enter it once")
        self._started = time.perf_counter()
        if world_size() > 1:
            settings = (self.steps, self.done, self.weights_learn, self.scores.lambda_, checksum(self.model))
            remedy = "load the same weights on every rank, and search with the same arguments"
            check_same("steps, steps done, whether weights learn, lambda and the weights' checksum", settings, remedy)
            share_state(self.scores)
        self._trainable = [p for p in self.model.parameters() if p.requires_grad]
        self._gradients = [p.grad for p in self._trainable]
        if not self.saved:
            self.saved = {name: tensor.detach().clone() for name, tensor in self._tensors()}
        logger.info(
            "searching, %d steps: cost is the network's with every channel counted by its gate, as a fraction of the "
            "dense one's; delta is how sharp the gates are, 0/1 at the end",
            self.steps,
        )
        hidden = not self.progress or not is_first()
        self.bar = tqdm(total=self.steps, initial=self.done, desc="search", unit="step", disable=hidden)
        self.pace.raise_()
        for gate in self.gates:
            gate.state = GateState.SOFT
        self.leaves = self.scores.leaves(self.model, self.gates)
        self._set_gates()
        self._freeze()
        for device, state in self._random.items():
            torch.set_rng_state(state) if device == "cpu" else torch.cuda.set_rng_state(state, self.score.device)
        self.running = True

    def stop(self, error: BaseException | None = None) -> None:
        """End the search, or end it because of an ``error``; what leaving the context does."""
        self.running = False
        self.bar.close()
        self._weights.close()
        for parameter, grad in zip(self._trainable, self._gradients):
            parameter.requires_grad_(True)
            parameter.grad = grad
        for gate in self.gates:
            gate.s.requires_grad_(False)
            gate.s.grad = None
            if error is not None:
                gate.state = GateState.TRANSPARENT
        for factor in factors_of(self.model):
            factor.value = None
        if error is None:
            broadcast_(*self.model.buffers())  # norm statistics are each rank's own
            self.seconds = time.perf_counter() - self._started
            logger.info("searching, %d of %d steps: %.1f s", self.done, self.steps, self.seconds)
        if isinstance(error, DNALError):
            self.restore()

    def _tensors(self) -> list[tuple[str, Tensor]]:
        # the gates' indices are not persistent: not in the state dict
        return [(name, t) for name, t in self.model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)]

    @torch.no_grad()
    def restore(self, model: nn.Module | None = None) -> None:
        """Give weights and norm statistics, of a copy too, the values that they had ahead of the first search."""
        if model is None:
            self.running = False
            self.pace.restore()
        for name, tensor in (model or self.model).state_dict(keep_vars=True).items():
            if name in self.saved:
                tensor.copy_(self.saved[name])

    @property
    def score(self) -> Tensor:
        """What has been learned so far, float64 ``[units]`` of all gates."""
        return self.scores.value

    @property
    def settled(self) -> bool:
        """Whether the structure stands, and only weights and norm statistics still learn."""
        return self.done >= self.scores.moving

    @property
    def learns_weights(self) -> bool:
        """Whether the weights make a step in the next one too."""
        return self.weights_learn and self.done < self.steps

    @checked_but("loss")
    def step(self, loss: Tensor) -> None:
        """Backward of ``loss`` (0-d), then one step of the gates, and of the weights where they learn too.

        Steps beyond the planned number change nothing, and say so once.

        Raises:
            DNALError: ``loss`` is no number of this model with a gradient; then weights and statistics are put back.
        """
        if not self.running:
            ended = f"it has ended after {self.done} of its {self.steps} steps" if self.done else "it has not begun"
            raise DNALError(f"step(loss) outside of the search: {ended}; call it inside of `with pruner.search(steps)`")
        check_loss(loss, f"step(loss) at search step {self.done}")
        if self.done >= self.steps:
            self._ask_for_less()
            return
        if self.learns_weights:
            self._weights.begin()
        penalised = self.penalised(loss)
        with told_of_backward():
            penalised.backward()
        self.before_optimizer_step()
        if self.learns_weights:
            self._weights.make()
        self.after_optimizer_step()

    def _ask_for_less(self) -> None:
        if not self._said:
            logger.warning("the search has made its %d steps: further calls of step() change nothing", self.steps)
        self._said = True

    def notes(self) -> list[str]:
        """What a reader of the result should know, a sentence each."""
        early = (
            f"the search ended after {self.done} of the {self.steps} steps that it was planned for: the widths are "
            "those of an unfinished search"
        )
        rest = [] if self.rest is None else [self.rest.note(self.done)]
        return [*filter(None, [self.pace.note]), *([early] if self.done < self.steps else []), *rest]

    def penalised(self, loss: Tensor) -> Tensor:
        """The loss of the coming step: with the regulariser of the paper's search; an error if NaN.

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
        return loss if self.done >= self.steps else self.scores.penalised(loss, [gate.s for gate in self.gates])

    def before_optimizer_step(self) -> None:
        """The step of the gates, between a backward pass and the weights' own step."""
        if self.done >= self.steps:
            return
        if self.done == 0 and not self.model.training:
            logger.warning(
                "the model is in eval mode, and searched with frozen norm statistics and without dropout: call "
                "model.train() ahead of the loop"
            )
        if not self.learns_weights:
            for parameter in self._trainable:
                parameter.grad = None  # frozen: not even decay or momentum may move a weight
        self._reached = self._reached or any(leaf.grad is not None for leaf in self.leaves.tensors)
        if not self._reached and self.done >= min(self.steps, PATIENCE) - 1:
            raise DNALError(
                f"in {self.done + 1} steps no gradient has reached a gate, so nothing can be learned: the loss must be "
                "of this very model (not of a copy, or of one made again), with gradients enabled, and not detached"
            )
        self.update()

    def after_optimizer_step(self) -> None:
        """Count the step."""
        if self.done < self.steps:
            self.advance()

    def advance(self) -> None:
        """Count a step, and prepare the gates of the next one."""
        self.done += 1
        self.leaves.clear()  # not in update: a closure may run several times in a step
        if self.done == self.scores.moving:
            self.scores.settle()
        if self.done < self.steps:
            self._set_gates()
        else:
            self._freeze()
        self.bar.update()
        if self._reports(self.done):
            cost = float(self.scores.cost(self.g))
            loss = None if self._loss is None else float(self._loss)
            entry = {"step": self.done, "delta": float(self.gates[0].delta), "cost": cost, "loss": loss}
            self.history.append({**entry, "gates": torch.histc(self.g, BINS, 0, 1).long().tolist()})
            self.bar.set_postfix(cost=f"{cost:.3f}", delta=f"{float(self.gates[0].delta):.0f}")

    def _reports(self, step: int) -> bool:
        return step % max(1, self.steps // 100) == 0 or step == self.steps

    def _freeze(self) -> None:
        for parameter in self._trainable:
            parameter.requires_grad_(self.learns_weights)

    # -- the gates ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self) -> None:
        """One step of the gates, from the gradients that the backward pass left, if it is due."""
        with only_if_due(self.rest, self.scores, self._trainable):
            self.scores.update(self.leaves.gradient(), self.g, self.done)

    @torch.no_grad()
    def _set_gates(self) -> None:
        """delta and ``s`` for the coming step."""
        s, delta = self.scores.gates(self.done)
        sizes = [gate.s.numel() for gate in self.gates]
        # one kernel for all gates
        torch._foreach_copy_([gate.s for gate in self.gates], s.to(self.gates[0].s.dtype).split(sizes))
        torch._foreach_copy_([gate.delta for gate in self.gates], [delta.to(self.gates[0].delta.dtype)] * len(sizes))
        g = torch.sigmoid(delta * s).to(self.gates[0].s.dtype)
        self.g = g.double()  # as the model has them
        self.leaves.show(g)

    @torch.no_grad()
    def decided(self) -> float:
        """Fraction of the gates outside of [0.05, 0.95]."""
        g = torch.cat([torch.sigmoid(gate.delta * gate.s) for gate in self.gates])
        return float(((g < 0.05) | (g > 0.95)).double().mean())

    # -- resuming -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a search needs to go on: tensors and numbers only. Torch's random state of now is part of it."""
        tensors = {name: tensor.clone() for name, tensor in self.scores.state_dict().items()}
        random = {"cpu": torch.get_rng_state()}
        if self.score.is_cuda:
            random["cuda"] = torch.cuda.get_rng_state(self.score.device)
        return {
            "done": self.done, "steps": self.steps,
            "history": list(self.history),
            "saved": self.saved,
            "random": random,
            "rest": state_of(self.rest),
            **tensors,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a search of the same number of steps; its random state is put back when the search is entered."""
        if state["steps"] != self.steps:
            raise DNALError(f"search(steps={self.steps}): the search to be resumed was planned for {state['steps']}")
        take_up(self.rest, state.get("rest"))
        self.scores.load_state_dict(state)
        self.done, self.history = int(state["done"]), list(state["history"])
        if self.settled:
            self.scores.settle()
        self.saved = dict(state["saved"])
        self._random = {name: value.cpu() for name, value in state.get("random", {}).items()}


def check_over(search: Search | None) -> None:
    """Raise in the midst of a search: what is fixed there would rule the cut, whatever is learned later."""
    if search is not None and search.running and search.done < search.steps:
        raise DNALError(f"the search is at {search.done} of its {search.steps} steps: leave its `with` first")
