"""Searches that weight candidates by functions of architecture parameters, as DARTS does, instead of gating units."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..modules.choices import Choice
from ..modules.gates import ScaledSigmoidGate
from .adam import Adam
from .informed import energy_of
from .leaves import FactorLeaves, Leaves
from .loop import Search
from .losses import check_loss


class MixedSearch(Search):
    """Shows a network the weights that its candidates have, and lets the architecture learn from the loss.

    Where it learns from data that the weights do not see, :meth:`learn` takes the loss of such a batch ahead of a step
    of the weights, whenever it is :attr:`due`. Else both learn from the same loss.

    Attributes:
        mixed: the weights, and what they learn.
        taken: architecture steps so far.
    """

    def __init__(self, model: nn.Module, gates: Iterable[ScaledSigmoidGate], scores: Any, **settings: Any) -> None:
        assert isinstance(scores, MixedScores)
        super().__init__(model, gates, scores, **settings)
        self.mixed = scores
        self.choices = [module for module in model.modules() if isinstance(module, Choice)]
        self.taken = 0

    @property
    def due(self) -> bool:
        """Whether the architecture learns ahead of the coming step of the weights."""
        if self.done >= self.steps:
            return False
        return (self.done + 1) % self.mixed.every == 0 if self.rest is None else bool(self.rest.due())

    def learn(self, loss: Callable[[], Tensor]) -> None:
        """One architecture step from a loss that the weights do not learn from.

        Args:
            loss: runs the model on such a batch, and gives its loss, 0-d.
        """
        for leaf in self.leaves.tensors:
            leaf.requires_grad_(True)
        found = loss()
        check_loss(found, f"the held-out loss at search step {self.done}")
        found.backward(inputs=self.leaves.tensors)
        self._reached = True
        self.mixed.update(self.leaves.gradient(), self.g, self.done)
        self.taken += 1
        self.leaves.clear()
        for leaf in self.leaves.tensors:
            leaf.requires_grad_(False)
        self._set_gates()

    def start(self) -> None:
        super().start()
        if self.mixed.held_out:
            for leaf in self.leaves.tensors:
                leaf.requires_grad_(False)

    def before_optimizer_step(self) -> None:
        if self.mixed.held_out:
            if self.done < self.steps and self.rest is not None:
                self.rest.advance(energy_of(self._trainable))
            return
        super().before_optimizer_step()
        self.taken += self.done < self.steps

    @torch.no_grad()
    def _set_gates(self) -> None:
        self.g = self.mixed.weights(self.done)
        self.mixed.value.copy_(self.g)
        own = self.gates[0].s
        for gate, part in zip(self.gates, self.g.to(own.dtype).split([gate.s.numel() for gate in self.gates])):
            gate.s.copy_(part - 0.5)
        for choice in self.choices:
            choice.resting = self.mixed.resting(choice.label)
        self.leaves.show(self.g.to(own.dtype))

    @torch.no_grad()
    def decided(self) -> float:
        return float(((self.mixed.value < 0.05) | (self.mixed.value > 0.95)).double().mean())

    def notes(self) -> list[str]:
        return [*super().notes(), f"the architecture learned in {self.taken} of the {self.done} steps"]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.taken = int(state["taken"])


class MixedScores(abc.ABC):
    """What weight every candidate has, as a function of parameters that learn by Adam; the network that follows.

    Args:
        parameters: float64, trained in place.
        units: of all choices together.
        steps: planned number.
        lr: of Adam; betas and weight decay are DARTS's.
        cost: what the network costs at gates ``[units]``, as a fraction of the supernet, 0-d.

    Attributes:
        value: the weights shown last, float64 ``[units]``.
        held_out: whether it learns from data that the weights do not see.
        every: steps of the weights for one of the architecture, where they are counted.
    """

    kind: ClassVar[type[Search]] = MixedSearch
    leaves: ClassVar[type[Leaves]] = FactorLeaves
    lambda_ = 0.0
    held_out = True
    every = 1

    def __init__(
        self, parameters: Sequence[Tensor], units: int, steps: int, lr: float, cost: Callable[[Tensor], Tensor]
    ) -> None:
        self.steps = self.moving = steps
        self.floor: Sequence[int] = ()
        self.value = parameters[0].detach().new_zeros(units)
        self.cost_of = cost
        self.adam = Adam(parameters, lr)

    @abc.abstractmethod
    def weights(self, step: int) -> Tensor:
        """The factor of every unit at a step, float64 ``[units]``; differentiable in the parameters."""

    @abc.abstractmethod
    def chosen(self) -> Tensor:
        """The units that stay, bool ``[units]``."""

    def penalty(self, step: int) -> Tensor:
        """What is added to the loss at a step, 0-d."""
        return self.value.new_zeros(())

    def stepped(self, step: int) -> None:  # noqa: B027  few have something to do
        """Called after each architecture step, with its number."""

    def resting(self, label: str) -> frozenset[int]:
        """The units of a decision that need not run."""
        return frozenset()

    def update(self, grad: Tensor, g: Tensor, step: int | Tensor) -> None:
        """One step of Adam from the gradient on the weights, ``[units]``."""
        self.adam.step(lambda: (self.weights(int(step)) * grad).sum() + self.penalty(int(step)))
        self.stepped(int(step))

    def gates(self, step: int | Tensor) -> tuple[Tensor, Tensor]:
        """The weights, less a half, at a delta of one: what a gate says of itself. They act through the leaves."""
        return self.value - 0.5, self.value.new_ones(())

    def penalised(self, loss: Tensor, s: Sequence[Tensor]) -> Tensor:
        """``loss`` as it is: penalties are for the architecture."""
        return loss

    def settle(self) -> None:  # noqa: B027  likewise
        """Nothing: the weights move to the end."""

    def slower(self, share: float) -> None:  # noqa: B027  likewise
        """Learn as far as before in fewer steps: the rate is already made for the steps that there will be."""

    def cost(self, g: Tensor) -> Tensor:
        """For the history: the cost (0-d) at weights ``g``, ``[units]``."""
        return self.cost_of(g)

    def rank(self, s: Tensor) -> Tensor:
        """The weights."""
        return self.value

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors themselves."""
        return {"score": self.value, **self.adam.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` gave."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
