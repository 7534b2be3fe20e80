"""What becomes of values: a mix of channels binds them only if its result reaches something.

``nn.MultiheadAttention`` averages its weights over the heads for callers that mostly throw the average away.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..modules.running import flatten_tensors
from .graph import CouplingGraph

_DEPENDS_ON_DATA = {
    getattr(torch.Tag, name) for name in ("data_dependent_output", "dynamic_output_shape") if hasattr(torch.Tag, name)
}


class Uses:
    """Channels that are frozen for the sake of a value, and what was computed from that value.

    Args:
        graph: the channels are frozen there at once, and freed again where the value turns out to reach nothing.
    """

    def __init__(self, graph: CouplingGraph) -> None:
        self.graph = graph
        self._pending: list[int] = []  # held by the operation that is read now
        self._forget()

    def _forget(self) -> None:
        self._made_by: Any = WeakIdKeyDictionary()  # tensor -> the number of what computed it
        self._sources: list[set[int]] = []
        self._held: list[list[int]] = []
        self._reached: set[int] = set()

    def hold(self, ids: Tensor, reason: str) -> None:
        """Freeze channels for the sake of what the operation that is read now returns."""
        self._pending.append(self.graph.freeze(ids, reason))

    def operation(self, func: Any, entering: Iterable[Tensor], out: Any) -> None:
        """An operation has run: its result comes from what entered, or, where there is none to follow, that is used."""
        if self._pending or self._sources:
            results = list(flatten_tensors(out))
            follows = results and not func._schema.is_mutable and not _DEPENDS_ON_DATA & set(func.tags)
            self.computed(entering, results if follows else ())

    def computed(self, entering: Iterable[Tensor], results: Iterable[Tensor]) -> None:
        """Tensors are computed from others; from no results: these are used."""
        sources = {self._made_by[tensor] for tensor in entering if tensor in self._made_by}
        pending, self._pending = self._pending, []
        results = list(results)
        if not results:
            self._reached |= sources
        elif sources or pending:
            for tensor in results:
                self._made_by[tensor] = len(self._sources)
            self._sources.append(sources)
            self._held.append(pending)

    def finish(self, model: nn.Module) -> None:
        """After a run: what none of the values used was computed from is free. What modules keep counts as used."""
        for module in model.modules():
            kept = [value for name, value in vars(module).items() if name != "_modules"]
            self.computed(flatten_tensors([v for v in kept if isinstance(v, (Tensor, list, tuple, dict))]), ())
        for number in range(len(self._sources) - 1, -1, -1):  # made after all that it was computed from
            if number in self._reached:
                self._reached |= self._sources[number]
            else:
                self.graph.free(self._held[number])
        self._forget()
