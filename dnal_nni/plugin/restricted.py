"""Model spaces of NNI with fewer candidates."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from nni.mutable import Mutable, frozen_context
from nni.nas.nn.pytorch import Cell, LayerChoice, ModelSpace
from torch import nn

from ..errors import DNALError
from ..modules.choices import Mixture


class Candidates:
    """The decisions of a model space that can do with fewer candidates: of LayerChoices, and the operations of Cells.

    Args:
        space: it is not changed.

    Raises:
        DNALError: there is none; names what there is.
    """

    def __init__(self, space: ModelSpace) -> None:
        self.space = space
        self.cells = {module.label: _operations(module) for module in space.modules() if isinstance(module, Cell)}
        inside = {id(m) for cell in space.modules() if isinstance(cell, Cell) for m in cell.ops.modules()}
        self.layers = {
            module.label: list(module.names)
            for module in space.modules()
            if type(module) is LayerChoice and id(module) not in inside
        }
        if not self.cells and not self.layers:
            what = ", ".join(f"{name!r} ({type(mutable).__name__})" for name, mutable in space.simplify().items())
            raise DNALError(
                "the model space has no candidates that could be dropped, which those of a LayerChoice and the "
                f"operations of a Cell can: it has {what or 'no choices'}; use the inner strategy as it is"
            )

    def named(self, mixture: Mixture) -> tuple[str, dict[str, str]] | None:
        """The decision that a sum of the supernet belongs to, and the option of each of its candidates."""
        if mixture.label in self.layers:
            return mixture.label, {name: name for name in mixture.names}
        for label in self.cells:
            if mixture.label.startswith(f"{label}/"):  # a node, or one input of it
                return label, {name: name.rpartition("_from_")[0] for name in mixture.names}
        return None

    def restricted(self, keep: Mapping[str, Collection[str]]) -> ModelSpace:
        """A copy of the space with the candidates ``keep`` of every decision."""
        made = copy.deepcopy(self.space)
        with frozen_context():  # NNI asks for one where mutable modules are made
            self._restrict(made, keep, {})
        return made

    def _restrict(self, module: nn.Module, keep: Mapping[str, Collection[str]], made: dict[int, nn.Module]) -> None:
        for name, child in list(module._modules.items()):
            if child is None:
                continue
            if id(child) not in made:
                made[id(child)] = child
                if isinstance(child, Cell):
                    self._restrict_cell(child, keep[child.label])
                elif type(child) is LayerChoice and child.label in self.layers:
                    made[id(child)] = _layer(child, keep[str(child.label)])
                self._restrict(made[id(child)], keep, made)
            module._modules[name] = made[id(child)]

    def _restrict_cell(self, cell: Cell, keep: Collection[str]) -> None:
        """In place: NNI's one-shot cells are made from the factories, or else from the operations of the first node."""
        if cell.op_candidates_factory is not None:
            given: Any = cell.op_candidates_factory
            named = given.items() if isinstance(given, dict) else enumerate(given)
            cell.op_candidates_factory = {str(name): make for name, make in named if str(name) in keep}
        for node in cell.ops:
            for k, choice in enumerate(node):
                node[k] = _layer(choice, keep)

    def sample(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """An architecture of a restricted space, as one of the whole.

        What a choice inside of a dropped candidate would be does not matter: it gets its first value.
        """
        whole: dict[str, Mutable] = self.space.simplify()
        sample = {}
        for label, mutable in whole.items():
            value = found[label] if label in found else mutable.default()
            words = {str(one): one for one in getattr(mutable, "values", [])}  # numbers, in names of candidates
            sample[label] = words.get(value, value) if isinstance(value, str) else value
        return sample


def _operations(cell: Cell) -> list[str]:
    return [str(name) for name in cell.ops[0][0].names]


def _layer(choice: LayerChoice, keep: Collection[str]) -> LayerChoice:
    """A new one with these candidates, which are the old one's."""
    kept = {str(name): choice[name] for name in choice.names if str(name) in keep}
    prior = dict(zip(map(str, choice.names), choice.choice.weights))
    weights = [prior[name] / sum(prior[name] for name in kept) for name in kept]
    return LayerChoice(kept, weights=weights, label=choice.label)
