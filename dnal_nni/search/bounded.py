"""Candidates are dropped until a supernet fits in memory: least likely for their size first (after RADARS)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from torch import nn

from ..cost.memory import mib
from ..errors import DNALError
from .controller import Controller
from .subspace import Holdings, Subspace

SLACK = 0.02  # of the limit: what a search adds to the supernet for its own parameters


@dataclasses.dataclass(frozen=True)
class Bound:
    """What a search within a limit of memory came to.

    Attributes:
        limit: in bytes.
        whole: what a step of the whole supernet would hold, in bytes.
        predicted: what a step of the part that is left holds, by the same count.
        peak: the most that was held at any time, as it was measured.
        kept: by the label of a decision, the candidates that are left.
        dropped: how many are not.
        seconds: that it took to find them.
    """

    limit: int
    whole: int
    predicted: int
    peak: int
    kept: Mapping[str, list[str]]
    dropped: int
    seconds: float

    def note(self) -> str:
        """What a reader of the result should know."""
        count = sum(map(len, self.kept.values()))
        return (
            f"searched within {mib(self.limit)} of memory ({mib(self.peak)} held at most): {self.dropped} of "
            f"{count + self.dropped} candidates were dropped first, with all of them it is {mib(self.whole)}"
        )


class Shrinking:
    """Makes a supernet smaller in rounds, each of which drops an equal part of what is too much.

    Args:
        subspace: what is left.
        controller: which candidates are likely.
        holdings: of the whole supernet.
        limit: in bytes, or up to 1 a fraction of what the whole supernet holds.
        rounds: planned number.

    Raises:
        DNALError: a single path needs more than that; tells what it needs.
    """

    def __init__(
        self, subspace: Subspace, controller: Controller, holdings: Holdings, limit: float, rounds: int
    ) -> None:
        self.subspace, self.controller, self.holdings, self.rounds = subspace, controller, holdings, rounds
        self.whole, self.done, self.dropped = self.size, 0, 0
        self.limit = int(limit * self.whole) if limit <= 1 else int(limit)
        least = max(holdings.path(subspace.options), math.ceil(self._smallest() / (1 - SLACK)))
        if least > self.limit:
            share = "" if limit > 1 else f", {self.limit} of the {self.whole} bytes that the whole supernet needs"
            raise DNALError(
                f"memory={limit}{share}: the largest single path needs {least} bytes ({mib(least)}), with the "
                f"parameters of all candidates; give at least memory={least}, or smaller batches, or leave out the "
                "large candidates"
            )

    @property
    def size(self) -> int:
        """Bytes that a step of what is left holds."""
        return self.holdings.whole(self.subspace.options)

    @property
    def fits(self) -> bool:
        """Whether what is left can be searched within the limit."""
        return self.size <= (1 - SLACK) * self.limit

    def _smallest(self) -> int:
        """Bytes that a step holds with the smallest candidate of every decision."""
        options = self.subspace.options
        sizes = {
            label: {name: self.holdings.whole({**options, label: [name]}) for name in names}
            for label, names in options.items()
        }
        return self.holdings.whole({label: [min(size, key=lambda name: size[name])] for label, size in sizes.items()})

    def shrink(self) -> list[nn.Parameter]:
        """The next round; the parameters that are no part of the supernet any more."""
        self.done += 1
        end = (1 - SLACK) * self.limit
        goal = end + (self.whole - end) * max(0, self.rounds - self.done) / self.rounds
        gone: list[nn.Parameter] = []
        while self.size > goal:
            gone += self.drop()
        return gone

    def drop(self) -> list[nn.Parameter]:
        """Drop the least likely candidate for the bytes that it takes, of a decision that has another one."""
        size, options, worth = self.size, self.subspace.options, {}
        for label, names in options.items():
            if len(names) == 1:
                continue
            for name, p in self.controller.probabilities(label).items():
                freed = size - self.holdings.whole({**options, label: [one for one in names if one != name]})
                worth[label, name] = p * len(names) / freed if freed > 0 else math.inf
        if not worth:
            raise DNALError(
                f"memory={self.limit}: the search needs more, with one candidate left for every decision; give it more"
            )
        label, option = min(worth, key=lambda key: worth[key])
        self.dropped += 1
        self.controller.drop(label, option)
        return self.subspace.drop(label, option)
