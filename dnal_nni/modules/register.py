"""Kinds of layers of users."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from ..arguments import checked_but
from ..errors import DNALError
from .functions import FunctionLayer, PruningFunctions
from .layers import Layer, Side, kinds, set_kind

_FUNCTIONS = ("prune_out_channels", "prune_in_channels", "get_out_channels", "get_in_channels")


@checked_but("kind", "functions")
def register_layer(
    kind: type[nn.Module],
    tensors: Mapping[str, Mapping[Side, int]] | None = None,
    sizes: Mapping[str, Side] | None = None,
    axis: int = 1,
    *,
    functions: PruningFunctions | None = None,
) -> Callable[[], None]:
    """Let modules of a class, and of those derived from it, be read as one layer: cut, saved, loaded, counted.

    For a module whose parameters its own forward uses in ways that cannot be followed operation by operation. A cut is
    compared with the gated network like any other: where the record is not right, the layer is left whole.

    Args:
        kind: the class. Its forward takes one tensor and returns one, with the channels along the same dimension.
        tensors: by name of a parameter or buffer, the dimension along which each side's channels lie. Sides: "in" and
            "out" of a layer whose outputs are made of all inputs; "both" where channels pass through one by one. For
            example ``{"u": {"in": 1}, "v": {"out": 0}, "bias": {"out": 0}}``.
        sizes: by name of an int attribute that counts channels, the side that it counts; every side needs one, as
            ``{"in_channels": "in", "out_channels": "out"}``.
        axis: dimension of the channels in input and output: from the front, or, negative, from the end.
        functions: instead of ``tensors`` and ``sizes``, an object that cuts such a module in place and counts its
            channels: a pruning function of torch-pruning (``tp.BasePruningFunc``), or anything with
            ``prune_out_channels``, ``prune_in_channels``, ``get_out_channels`` and ``get_in_channels``.

    Returns:
        a function that takes it back.

    Raises:
        DNALError: the description fits no layer; says what is missing.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise DNALError(f"register_layer({kind!r}): pass a subclass of torch.nn.Module")
    where = f"register_layer({kind.__name__})"
    if functions is None:
        return _set(kind, _described(where, tensors or {}, sizes or {}, axis))
    if tensors or sizes:
        raise DNALError(f"{where}: give tensors and sizes, or functions, not both")
    if isinstance(functions, type):
        raise DNALError(f"{where}: functions={functions.__name__} is a class: pass an object of it")
    if missing := [name for name in _FUNCTIONS if not callable(getattr(functions, name, None))]:
        raise DNALError(f"{where}: functions={functions!r} has no {missing[0]}()")
    return _set(kind, FunctionLayer({}, {}, axis, opaque=True, functions=functions))


def _described(where: str, tensors: Mapping[str, Mapping[Side, int]], sizes: Mapping[str, Side], axis: int) -> Layer:
    allowed = ("in", "out", "both")
    for name, dims in tensors.items():
        for side, dim in dims.items():
            if side not in allowed or type(dim) is not int or dim < 0:
                raise DNALError(f"{where}: tensors[{name!r}] has {side!r}: {dim!r}; sides: {allowed}, dimensions >= 0")
    layer = Layer({name: dict(dims) for name, dims in tensors.items()}, dict(sizes), axis, opaque=True)
    if not layer.sides or ("both" in layer.sides and len(layer.sides) > 1):
        raise DNALError(f"{where}: tensors has the sides {layer.sides}: a layer has 'in' and 'out', or 'both' alone")
    for side in layer.sides:
        if list(sizes.values()).count(side) != 1:
            raise DNALError(f"{where}: sizes needs one attribute that counts {side!r}, as {{'channels': {side!r}}}")
    return layer


def _set(kind: type[nn.Module], layer: Layer) -> Callable[[], None]:
    before = kinds().get(kind)
    set_kind(kind, layer)
    return lambda: set_kind(kind, before)
