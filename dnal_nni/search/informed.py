"""When gates learn: while the weights are near rest (the dynamic schedule of DARTS-PRIME, arXiv 2106.11655)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..arguments import fits
from ..errors import DNALError
from .learner import ArchOptimizer
from .ranks import mean_


@dataclasses.dataclass(frozen=True)
class Informed:
    """Architecture steps only where the gradients of the weights are below their trend.

    The energy of a step is the sum of the squared gradients of all weights, F its moving average. An architecture step
    is due where F is below a level that falls by ``growth ** every`` with each such step, and grows by ``growth``
    with each other one. So one step in ``every + 1`` is due, whatever the gradients' scale is: the rule says *when*.

    Args:
        every: weight steps for each architecture step.
        growth: by how much the level grows in a step without.
        ewma: weight of the newest step in F.

    Raises:
        DNALError: for values that are none of these.
    """

    every: int = 10
    growth: float = 1.05
    ewma: float = 0.2

    def __post_init__(self) -> None:
        if not fits(self.every, int) or self.every < 1:
            raise DNALError(f"Informed(every={self.every!r}): must be a whole number >= 1, weight steps for each other")
        if not fits(self.growth, float) or not 1 < self.growth < float("inf"):
            raise DNALError(f"Informed(growth={self.growth!r}): must be a number above 1, such as 1.05")
        if not fits(self.ewma, float) or not 0 < self.ewma <= 1:
            raise DNALError(f"Informed(ewma={self.ewma!r}): must be a number in (0, 1], such as 0.2")

    @property
    def share(self) -> float:
        """The share of the steps that are due, in the long run."""
        return 1 / (self.every + 1)


class Rest:
    """How near to rest the weights of one search are. Everything stays on the device; nothing waits for it.

    Args:
        when: the rule.
        device: of the gradients.

    Attributes:
        energy: F, float64 0-d; -1 before the first step.
        level: below which a step is due, float64 0-d.
        taken: steps that were due, int64 0-d.
    """

    def __init__(self, when: Informed, device: torch.device | str = "cpu") -> None:
        self.when = when
        self.energy = torch.full((), -1.0, dtype=torch.float64, device=device)
        self.level = torch.zeros_like(self.energy)
        self.taken = torch.zeros((), dtype=torch.int64, device=device)

    def due(self) -> Tensor:
        """Whether the coming step is one of the architecture too: bool, 0-d."""
        return (self.energy > 0) & (self.energy < self.level)

    @torch.no_grad()
    def advance(self, energy: Tensor) -> None:
        """Count a step whose weights' gradients have this ``energy`` (0-d); one that overflowed says nothing."""
        due, first, told = self.due(), self.energy < 0, torch.isfinite(energy)
        self.taken.add_(due)
        factor = torch.where(due, self.when.growth**-self.when.every, self.when.growth)
        mixed = torch.where(first, energy, self.energy + self.when.ewma * (energy - self.energy))
        self.level.copy_(torch.where(first & told, energy, self.level * factor))
        self.energy.copy_(torch.where(told, mixed, self.energy))

    def note(self, done: int) -> str:
        """What a reader of the result should know."""
        return f"the gates learned in {int(self.taken)} of the {done} steps: {self.when}"

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors themselves."""
        return {"energy": self.energy, "level": self.level, "taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` gave."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


def rest_of(when: Informed | None, scores: ArchOptimizer, weights_learn: bool) -> Rest | None:
    """What goes by the rule in a search; its ``scores`` then learn as far in fewer steps.

    Raises:
        DNALError: weights that do not learn have no gradients to go by.
    """
    if when is None:
        return None
    if not weights_learn:
        raise DNALError(f"search(when={when}) goes by the weights' gradients: let them learn too, optimizer=")
    scores.slower(when.share)
    return Rest(when, scores.value.device)


@contextlib.contextmanager
def only_if_due(rest: Rest | None, scores: ArchOptimizer, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Take back what ``scores`` learn in a step that is not due; then count the step, by the ``weights`` gradients."""
    if rest is None:
        yield
        return
    before = [(tensor, tensor.clone()) for tensor in scores.state_dict().values()]
    yield
    due = rest.due()
    for tensor, value in before:
        tensor.copy_(torch.where(due, tensor, value))
    rest.advance(energy_of(weights))


def state_of(rest: Rest | None) -> dict[str, Tensor] | None:
    """Copies of its tensors."""
    return None if rest is None else {name: tensor.clone() for name, tensor in rest.state_dict().items()}


def take_up(rest: Rest | None, state: Mapping[str, Tensor] | None) -> None:
    """What :func:`state_of` gave; an error where one search has such a rule and the other has none."""
    if rest is not None and state is not None:
        rest.load_state_dict(state)
    elif rest is not None or state is not None:
        had = "had no when=" if state is None else "had a when="
        raise DNALError(f"search(): the search to be resumed {had}: give the same")


def energy_of(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The sum of the squared gradients, float64 0-d; the mean over the ranks. Gradients as the optimizer will see them,
    unscaled and not clipped."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.full((), torch.nan, dtype=torch.float64)
    norms = torch._foreach_norm(gradients)
    return mean_(torch.stack([norm.double() for norm in norms]).square().sum())
