"""Decisions among candidates that are weighted instead of gated: their options, and DARTS's rule for what stays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..channels.groups import ChannelGroup
from ..errors import DNALError
from ..modules.choices import Choice, Depth, Inputs, Mixture


@dataclasses.dataclass(frozen=True)
class Pick:
    """One decision.

    Its options are its units, or, of a depth, the number of steps of it, 0 among them. Options compete within a slot.

    Attributes:
        label: name of the decision.
        units: candidates, inputs, or steps of depth.
        count: options that stay.
        slots: of each option. Candidates of one edge of a cell share one; else there is a single slot.
        apart: whether no two options of one slot may stay, as long as there are as many slots.
        chain: whether it is a depth.
    """

    label: str
    units: int
    count: int
    slots: tuple[int, ...]
    apart: bool = True
    chain: bool = False

    @property
    def options(self) -> int:
        """How many there are."""
        return len(self.slots)

    def activated(self, alpha: Tensor) -> Tensor:
        """Softmax within each slot: ``[options]`` -> ``[options]``."""
        slots = torch.tensor(self.slots, device=alpha.device).unique(return_inverse=True)[1]
        highest = torch.full_like(alpha.detach(), -torch.inf).scatter_reduce(0, slots, alpha.detach(), "amax")
        powers = (alpha - highest[slots]).exp()
        return powers / torch.zeros_like(alpha).index_add(0, slots, powers)[slots]

    def rule(self, score: Tensor) -> Tensor:
        """DARTS's: the best option of each slot, and of those the best ``count``; the choice 0/1, ``[options]``."""
        chosen: list[int] = []
        order = score.detach().argsort(descending=True, stable=True).tolist()
        used: set[int] = set()
        for option in order if self.apart else []:
            if self.slots[option] not in used:
                chosen.append(option)
                used.add(self.slots[option])
        chosen = chosen[: self.count]
        chosen += [option for option in order if option not in chosen][: self.count - len(chosen)]
        return torch.zeros_like(score).index_fill(0, torch.tensor(chosen, device=score.device), 1.0)

    def gates(self, a: Tensor) -> Tensor:
        """What each unit is multiplied by, ``[units]``, at weights ``a``, ``[options]``."""
        if not self.chain:
            return a
        beyond = a.flip(0).cumsum(0).flip(0)  # the weight of all ends at or behind a step
        return beyond[1:] / beyond[:-1].clamp(min=1e-12)


def picks_of(model: nn.Module, active: Sequence[ChannelGroup]) -> list[Pick]:
    """The decisions of a network of which nothing but candidates is searched, in the order of the gates.

    Raises:
        DNALError: for a choice of which any number may stay.
    """
    found = []
    for group in active:
        choice = model.get_submodule(group.members[0].path)
        assert isinstance(choice, Choice)
        if isinstance(choice, Depth):
            found.append(Pick(choice.label, group.channels, 1, (0,) * (group.channels + 1), chain=True))
            continue
        if group.most is None:
            raise DNALError(
                f"{choice.label}: the rule by which a network is derived needs to know how many of its "
                f"{group.channels} units stay: give InputChoice an n_chosen"
            )
        sources = choice.sources if isinstance(choice, Mixture) else None
        slots = tuple(sources[name] for name in choice.units) if sources else (0,) * group.channels
        found.append(Pick(choice.label, group.channels, group.most, slots, apart=not isinstance(choice, Inputs)))
    return found
