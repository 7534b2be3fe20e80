"""What a search asks of whatever says what its gates are, and learns from their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from .leaves import Leaves

if TYPE_CHECKING:
    from .loop import Search


class ArchOptimizer(Protocol):
    """What the gates are at each step of a search, and what they learn from a gradient.

    :class:`~dnal_nni.search.scores.Scores` under a budget or ratios, :class:`~dnal_nni.search.paper.PaperScores` in the
    paper's search. Units are those of all gates, one gate after the other.

    Attributes:
        kind: the search that goes with it.
        leaves: where gradients are read, and thus what :meth:`update` gets.
        steps: planned number.
        moving: the number of steps after which :meth:`settle` is due.
        floor: units of each group that a cut leaves at least, ``[groups]``.
        value: what has been learned, float64 ``[units]``.
        lambda_: weight of the penalty on the loss.
    """

    kind: ClassVar[type[Search]]
    leaves: ClassVar[type[Leaves]]
    steps: int
    moving: int
    floor: Sequence[int]
    value: Tensor
    lambda_: float

    def gates(self, step: int | Tensor) -> tuple[Tensor, Tensor]:
        """``s`` ``[units]`` and ``delta`` (0-d) of a step (a number, or int64 ``[1]`` on the device)."""

    def penalised(self, loss: Tensor, s: Sequence[Tensor]) -> Tensor:
        """The loss (0-d) with what the gates ``s`` are charged for."""

    def update(self, grad: Tensor, g: Tensor, step: int | Tensor) -> None:
        """Learn from the gradient on the leaves at the gates ``g``, both ``[units]``."""

    def slower(self, share: float) -> None:
        """Learn as far as before where but a ``share`` of the steps are those of the gates too."""

    def settle(self) -> None:
        """Fix the structure: from now on it is the one that is cut."""

    def cost(self, g: Tensor) -> Tensor:
        """For the history: the cost (0-d) at gates ``g``, ``[units]``, as a fraction of the dense one."""

    def rank(self, s: Tensor) -> Tensor:
        """What orders the units in a cut, ``[units]``; ``s`` is what the gates have."""

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors themselves that a search needs to go on."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` gave."""


@runtime_checkable
class Decides(Protocol):
    """What says by itself which units stay; else they are cut to an objective, in the order of their rank."""

    def chosen(self) -> Tensor:
        """The units that stay, bool ``[units]``."""
