"""Cells: nodes that sum what reads the nodes before them. Which of these a node reads can be a decision of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..arguments import fits, shown
from ..errors import DNALError
from .choices import Choice, Mixture, Weight, times

Distribution = Literal["subsets", "edges"]


@dataclasses.dataclass(frozen=True)
class Topology:
    """How many inputs the nodes of a cell read, and how a search decides which.

    Args:
        inputs: so many, or (least, most) of them; where there are fewer, all. None: as many as NNI's cell or
            InputChoice says.
        distribution: "subsets": one probability for every set of inputs that may stay. "edges": one for every input,
            each by itself; sets of another size are then possible, and are held off by a penalty.
        temperature: of the probabilities, up to the middle of a search and at its end.
        slack: probability of sets of another size that is left alone at the end of a search, for "edges".

    Raises:
        DNALError: for values that are none of these.
    """

    inputs: int | tuple[int, int] | None = None
    distribution: Distribution = "subsets"
    temperature: tuple[float, float] = (1.0, 0.02)
    slack: float = 0.05

    def __post_init__(self) -> None:
        given = (self.inputs, self.inputs) if isinstance(self.inputs, int) else self.inputs
        pair = isinstance(given, tuple) and len(given) == 2 and all(fits(count, int) for count in given)
        if given is not None and not (pair and 1 <= given[0] <= given[1]):
            raise DNALError(f"Topology(inputs={shown(self.inputs)}): give a number >= 1, or (least, most)")
        if self.distribution not in get_args(Distribution):
            raise DNALError(f"Topology(distribution={self.distribution!r}): choose 'subsets' or 'edges'")
        pair = isinstance(self.temperature, tuple) and len(self.temperature) == 2
        if not pair or not all(fits(t, float) and 0 < t < float("inf") for t in self.temperature):
            raise DNALError(f"Topology(temperature={shown(self.temperature)}): give two numbers above 0, (1.0, 0.02)")
        if not fits(self.slack, float) or not 0 < self.slack <= 1:
            raise DNALError(f"Topology(slack={self.slack!r}): must be a probability above 0, such as 0.05")

    def sizes(self, inputs: int, usual: int | None = None) -> tuple[int, int]:
        """The least and the most inputs of a node that could have so many.

        Args:
            inputs: how many there are to choose from.
            usual: how many stay where nothing was asked for.
        """
        asked = usual if self.inputs is None else self.inputs
        if asked is None:
            raise DNALError("Topology(): say how many inputs a node has, Topology(inputs=2)")
        least, most = (asked, asked) if isinstance(asked, int) else asked
        return min(least, inputs), min(most, inputs)

    def node(self, mixture: Mixture) -> Node:
        """A node of the candidates of ``mixture``, each on its source."""
        assert mixture.sources is not None
        edges: dict[int, dict[str, nn.Module]] = {source: {} for source in sorted(set(mixture.sources.values()))}
        for name in mixture.names:
            edges[mixture.sources[name]][name] = getattr(mixture, name)
        made = {source: Mixture(ops, f"{mixture.label}/{source}") for source, ops in edges.items()}
        for edge in made.values():
            edge.least = edge.most = 1
        return Node(made, mixture.label, *self.sizes(len(made)))


class Node(Choice):
    """The sum of some of its edges: choices of an operation, each on one of the tensors of a list.

    Args:
        edges: by the number of the tensor that they read.
        label: name of the decision which of them stay.
        least: edges that must stay.
        most: edges that may stay.
    """

    def __init__(self, edges: Mapping[int, Mixture], label: str, least: int, most: int) -> None:
        super().__init__(label)
        self.kept = list(edges)
        self.least, self.most = least, most
        for source, edge in edges.items():
            self.add_module(f"from_{source}", edge)

    @property
    def units(self) -> list[str]:
        return [f"from_{source}" for source in self.kept]

    @property
    def edges(self) -> dict[int, Mixture]:
        """By the number of the tensor that they read."""
        return {source: getattr(self, f"from_{source}") for source in self.kept}

    def parts(self) -> dict[str, tuple[int, ...]]:
        return {name: (i,) for i, name in enumerate(self.units)}

    def drop(self, keep: Tensor) -> None:
        for name, stays in zip(self.units, keep.tolist()):
            if not stays:
                delattr(self, name)
        self.kept = [source for source, stays in zip(self.kept, keep.tolist()) if stays]

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        def term(source: int, edge: Mixture) -> Callable[[Weight], Any]:
            return lambda weight: times(edge(tensors[source]), weight)

        return self._sum([(w, term(source, edge)) for (source, edge), w in zip(self.edges.items(), self.weights())])


class Cell(nn.Module):
    """A cell as NNI's: every node sums candidates that read earlier nodes; the nodes are concatenated.

    Args:
        nodes: each reads the list of all tensors before it.
        preprocessor: of the list of inputs.
        postprocessor: of the concatenated nodes and that list.
        concat_dim: dimension of the concat.
        topology: let every node that has sources decide about its inputs first, and about an operation on each.
    """

    def __init__(
        self,
        nodes: Sequence[Mixture | Node],
        preprocessor: Callable[[list[Tensor]], list[Tensor]],
        postprocessor: Callable[[Tensor, list[Tensor]], Any],
        concat_dim: int = 1,
        topology: Topology | None = None,
    ) -> None:
        super().__init__()
        if topology is not None:
            nodes = [topology.node(node) if isinstance(node, Mixture) and node.sources else node for node in nodes]
        self.preprocessor = preprocessor
        self.nodes = nn.ModuleList(nodes)
        self.postprocessor = postprocessor
        self.concat_dim = concat_dim

    def forward(self, *inputs: Any) -> Any:
        given = list(inputs[0]) if len(inputs) == 1 and isinstance(inputs[0], (list, tuple)) else list(inputs)
        states = list(self.preprocessor(given))
        first = len(states)
        for node in self.nodes:
            states.append(node(states))
        return self.postprocessor(torch.cat(states[first:], self.concat_dim), given)
