"""Layers that are cut by somebody's own functions, in the form that torch-pruning has for them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .layers import MIXED, Layer, Side, layer_of
from .running import FORWARD_ERRORS


class PruningFunctions(Protocol):
    """What torch-pruning's ``BasePruningFunc`` asks for. Where both functions are one, channels pass one by one."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove output channels, in place."""

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove input channels, in place."""

    def get_out_channels(self, layer: Any) -> int | None:
        """Number of output channels."""

    def get_in_channels(self, layer: Any) -> int | None:
        """Number of input channels."""


# by module: of every tensor inside, the dimension that gets shorter where a channel of a side goes
_FOUND: WeakKeyDictionary[nn.Module, dict[str, dict[Side, int]]] = WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class FunctionLayer(Layer):
    """A kind of layer of which nothing is known but how it is cut; where its channels lie is found by trying.

    Its tensors and numbers may belong to modules inside of it: names are dotted.
    """

    functions: PruningFunctions = dataclasses.field(kw_only=True)

    @property
    def sides(self) -> list[Side]:
        return ["both"] if self.functions.prune_in_channels == self.functions.prune_out_channels else list(MIXED)

    def reads(self, module: nn.Module) -> bool:
        return len(self.widths(module)) == len(self.sides)

    def widths(self, module: nn.Module) -> dict[Side, int]:
        counted = {"in": self.functions.get_in_channels, "out": self.functions.get_out_channels}
        found = {side: counted.get(side, self.functions.get_out_channels)(module) for side in self.sides}
        return {side: int(width) for side, width in found.items() if width is not None}

    def dims(self, module: nn.Module, name: str) -> Mapping[Side, int]:
        return self._found(module).get(name, {})

    def grows_with(self, module: nn.Module, name: str) -> Collection[Side]:
        return self._found(module).get(name, {})

    def moves(self, module: nn.Module) -> set[Side]:
        return {side for dims in self._found(module).values() for side in dims}

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        return {name: p for name, p in module.named_parameters() if p.dim() > 1 and name in self._found(module)}

    def vectors(self, module: nn.Module, side: Side) -> int:
        lines = {name for name, dims in self._found(module).items() if set(dims) == {side}}
        return sum(p.numel() for name, p in module.named_parameters() if p.dim() == 1 and name in lines)

    def cut(self, module: nn.Module, keep: Mapping[Side, Tensor]) -> None:
        """As :meth:`Layer.cut`.

        Raises:
            ValueError: the functions leave another number of channels, or change what no file of a cut network holds.
        """
        training, trained = module.training, {name: p.requires_grad for name, p in module.named_parameters()}
        for parameter in module.parameters():
            parameter.data = parameter.detach().clone()  # a twin shares its memory, into which functions may write
        before = _attributes(module)
        for side, mask in keep.items():
            prune = self.functions.prune_in_channels if side == "in" else self.functions.prune_out_channels
            prune(module, (~mask).nonzero().flatten().tolist())
            if self.widths(module).get(side) != int(mask.sum()):
                raise ValueError(f"{self._name} leaves {self.widths(module).get(side)} channels, not {int(mask.sum())}")
        module.train(training)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(trained.get(name, parameter.requires_grad))
        for inner in module.modules():
            if inner is not module and (layer := layer_of(inner)):
                layer.follow(inner)
        odd = [name for name, value in _attributes(module).items() if value != before.get(name) and not _counts(value)]
        if odd:
            raise ValueError(f"{self._name} changes {odd[0]}, which is no number of channels: it could not be saved")

    def follow(self, module: nn.Module) -> None:
        pass

    def numbers(self, module: nn.Module) -> dict[str, Any]:
        return {name: value for name, value in _attributes(module).items() if _counts(value)}

    @property
    def _name(self) -> str:
        return type(self.functions).__name__

    def _found(self, module: nn.Module) -> dict[str, dict[Side, int]]:
        if module not in _FOUND:
            found: dict[str, dict[Side, int]] = {}
            _FOUND[module] = found
            for side, width in self.widths(module).items():
                trial = copy.deepcopy(module)
                try:
                    self.cut(trial, {side: torch.arange(width) > 0})
                except FORWARD_ERRORS:
                    continue  # such as heads, which go as a whole only
                after = trial.state_dict()
                for name, tensor in module.state_dict().items():
                    for dim, (a, b) in enumerate(zip(tensor.shape, after[name].shape)):
                        if b < a:
                            found.setdefault(name, {})[side] = dim
        return _FOUND[module]


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module and those inside keep as plain values, but for the sizes of layers that have a record."""
    found = {}
    for path, inner in module.named_modules():
        layer = layer_of(inner) if inner is not module else None
        known = {*nn.Module().__dict__, *(layer.state(inner) if layer else ())}
        for name, value in vars(inner).items():
            if name not in known and (value is None or isinstance(value, (bool, int, float, str, tuple, list))):
                found[f"{path}.{name}" if path else name] = copy.copy(value)
    return found


def _counts(value: Any) -> bool:
    """Whether a value is a number, or some, that may count channels."""
    return type(value) is int or (isinstance(value, (list, tuple)) and all(type(n) is int for n in value))
