"""Save and load a cut network without pickle: safetensors, with the layers' new sizes as JSON in the header."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import checked
from ..errors import DNALError
from ..modules.adapters import adapt, restore
from ..modules.bake import bake
from ..modules.choices import Choice
from ..modules.given import check_kind
from ..modules.layers import Layer, layer_of
from ..modules.running import FORWARD_ERRORS, clone
from ..report.record import Report
from ..surgery.changes import Changes, changes_of, of_form, set_changes
from ..surgery.inject import is_gated
from ..surgery.slim import drop
from .files import read_tensors, write_tensors

FORMAT = "dnal_nni/1"


def _layers(modules: Mapping[str, nn.Module]) -> dict[str, Layer]:
    """The layers that have sizes: those that only a user's functions know keep numbers of their own."""
    found = {path: layer for path, module in modules.items() if (layer := layer_of(module))}
    return {path: layer for path, layer in found.items() if layer.state(modules[path])}


def _sizes(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, int]]:
    """The channel counts of every layer that has some."""
    return {path: layer.state(modules[path]) for path, layer in _layers(modules).items()}


def _holder(modules: Mapping[str, nn.Module], path: str) -> tuple[nn.Module, str]:
    """The module that keeps a tensor, or a number about its channels, and the name of that."""
    owner, _, name = path.rpartition(".")
    return modules[owner], name


@checked
def save_compressed(slim: nn.Module, path: str | os.PathLike[str], report: Report | None = None) -> None:
    """Write a cut network: its tensors and its layers' sizes. The file appears whole or not at all.

    Args:
        slim: what ``speedup()`` returned (also after fine-tuning).
        path: usually ``*.safetensors``.
        report: ``pruner.report``, to be kept with the network; ``dnal report`` shows it.

    Raises:
        DNALError: ``slim`` still has gates, or state that is no tensor; or the file cannot be written.
    """
    check_kind(slim)
    if is_gated(slim):
        raise DNALError("save_compressed: this network still has gates: save what speedup() returned")
    changes = changes_of(slim)
    state = dict(slim.state_dict(keep_vars=True))
    state |= {name: slim.get_buffer(name) for name in changes.unsaved}
    tensors: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise DNALError(f"the state of {name} is a {type(tensor).__name__}, not a tensor: it cannot be saved")
        if tensor.is_meta:
            raise DNALError(f"{name} is on the meta device and has no values: it cannot be saved")
        if id(tensor) in seen:
            aliases[name] = seen[id(tensor)]
        else:
            seen[id(tensor)] = name
            tensors[name] = tensor
    parts = {
        "sizes": _sizes(dict(slim.named_modules())),
        "aliases": aliases,
        "changes": changes.to_json(),
        "versions": {"dnal_nni": version("dnal_nni"), "torch": torch.__version__},
    }
    write_tensors(path, FORMAT, tensors, **parts, **({} if report is None else {"report": report.to_dict()}))


@checked
def load_compressed(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Turn a fresh dense ``model`` into the saved network, in place, and return it. Nothing is traced or unpickled.

    Every check comes ahead of the first change: a file that does not fit raises and leaves ``model`` as it was.

    Args:
        model: the architecture that the saved network was cut from.
        path: a file of :func:`save_compressed`.

    Raises:
        DNALError: the file cannot be read, is damaged, or is not of this architecture; the first mismatch is named.
    """
    check_kind(model)
    if is_gated(model):
        raise DNALError("load_compressed: this network has gates: call pruner.unwrap_model(), or build a fresh one")
    tensors, parts = read_tensors(path, FORMAT, "save_compressed")
    changes = Changes.from_json(parts.get("changes"), path)
    aliases: dict[str, str] = of_form(dict[str, str], parts.get("aliases"), "aliases", path)
    sizes: dict[str, dict[str, int]] = of_form(dict[str, dict[str, int]], parts.get("sizes"), "sizes", path)
    for name, first in aliases.items():
        if first not in tensors or name in tensors:
            raise DNALError(f"{path} is damaged: it has no {first} for {name} to be the same as")
    planned = _chosen(model, path, changes)
    own = _own_tensors(planned, path, changes)
    _check_tensors(path, own, tensors, aliases)
    modules = dict(planned.named_modules(remove_duplicate=False))
    adapt(planned, revertible=True)  # the layers that the cut network has
    try:
        _check_sizes(dict(planned.named_modules()), path, sizes, tensors)
    finally:
        restore(planned)
    stored = _check_stored(modules, path, changes.stored)
    try:
        for name in own:
            _holder(modules, name)
    except KeyError as error:
        raise DNALError(f"the model's state has a {error} that is no parameter or buffer of a module") from error
    # what lies on a device can run out of its memory: it is there ahead of the first change
    new = {name: _like(own[name], tensor) for name, tensor in tensors.items() if own[name].device.type != "cpu"}

    drop(model, changes.choices)  # the first change
    adapt(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    for layer in changes.baked:
        bake(modules[layer])
    for place, kind in _layers(modules).items():
        for attribute, size in sizes.get(place, {}).items():
            kind.set_size(modules[place], attribute, size)
    for number, value in stored.items():
        setattr(*_holder(modules, number), value)
    set_changes(model, changes)
    for name in list(own):  # one at a time, so that the memory of the old tensors serves the new ones
        old, first = own.pop(name), aliases.get(name, name)
        if first not in new:
            new[first] = _like(own.get(first, old), tensors[first])
        module, attribute = _holder(modules, name)
        held: dict[str, Any] = module._parameters if isinstance(old, nn.Parameter) else module._buffers
        held[attribute] = new[first]
    return model


def _chosen(model: nn.Module, path: Any, changes: Changes) -> nn.Module:
    """The model without the candidates that went: a copy, where there are some."""
    if not changes.choices:
        return model
    model = clone(model)
    for place in sorted(changes.choices, key=len):
        try:
            choice = model.get_submodule(place)
        except AttributeError:
            continue  # inside of a candidate that is gone; else tensors are missing, which is seen next
        number = len(changes.choices[place])
        if not isinstance(choice, Choice) or len(choice.units) != number:
            raise DNALError(f"{path} does not fit the model: {place} is no choice among {number} candidates")
        drop(model, {place: changes.choices[place]})
    return model


def _own_tensors(model: nn.Module, path: Any, changes: Changes) -> dict[str, Tensor]:
    """The tensors that the model would have with its computed weights made plain; the model stays as it is."""
    own = dict(model.state_dict(keep_vars=True))
    try:
        own |= {name: model.get_buffer(name) for name in changes.unsaved}
        for layer in changes.baked:
            module = clone(model.get_submodule(layer))
            bake(module)  # or it is plain already, as a model without the masks of torch.nn.utils.prune
            own = {name: tensor for name, tensor in own.items() if not name.startswith(f"{layer}.")}
            own |= module.state_dict(prefix=f"{layer}.", keep_vars=True)
    except FORWARD_ERRORS as error:
        raise DNALError(f"{path} does not fit the model: {error}") from error
    for name, tensor in own.items():
        if not isinstance(tensor, Tensor):
            raise DNALError(f"the model's state of {name} is a {type(tensor).__name__}, not a tensor")
        if tensor.is_meta:
            raise DNALError(f"the model's {name} is on the meta device: build the model on a device that has memory")
    return own


def _like(old: Tensor, tensor: Tensor) -> Tensor:
    """``tensor`` on the device of ``old``, in its memory format, and a parameter where it is one."""
    last = old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous()
    form = torch.channels_last if last else torch.contiguous_format
    new = torch.empty(tensor.shape, dtype=old.dtype, device=old.device, memory_format=form).copy_(tensor)
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _check_tensors(path: Any, own: dict[str, Tensor], tensors: dict[str, Tensor], aliases: dict[str, str]) -> None:
    theirs = tensors | {name: tensors[first] for name, first in aliases.items()}
    for name in own:
        if name not in theirs:
            raise DNALError(f"{path} does not fit the model: it has no {name}")
    for name, tensor in theirs.items():
        if name not in own:
            raise DNALError(f"{path} does not fit the model: the model has no {name}")
        mine = own[name]
        if mine.dtype != tensor.dtype:
            raise DNALError(f"{path} does not fit the model: {name} is {tensor.dtype}, the model's is {mine.dtype}")
        if mine.dim() != tensor.dim() or any(a > b for a, b in zip(tensor.shape, mine.shape)):
            raise DNALError(
                f"{path} does not fit the model: {name} is {list(tensor.shape)}, the model's is {list(mine.shape)}"
            )
    for name, first in aliases.items():
        if isinstance(own[name], nn.Parameter) != isinstance(own[first], nn.Parameter):
            raise DNALError(f"{path} does not fit the model: {name} and {first} cannot be the same tensor")


def _check_sizes(
    modules: Mapping[str, nn.Module], path: Any, sizes: dict[str, dict[str, int]], tensors: dict[str, Tensor]
) -> None:
    have = _sizes(modules)
    if not sizes.keys() <= have.keys():
        odd = min(sizes.keys() - have.keys())
        raise DNALError(f"{path} does not fit the model: layer {odd} is only in one of them")
    for layer, kind in _layers(modules).items():
        values = sizes.get(layer, have[layer])  # a kind that was not known when the file was written is whole
        if values.keys() != have[layer].keys():
            odd = min(values.keys() ^ have[layer].keys())
            raise DNALError(f"{path} does not fit the model: {layer}.{odd} is only in one of them")
        for name, value in values.items():
            if not 0 < value <= have[layer][name]:
                raise DNALError(f"{path} does not fit the model: {layer}.{name} is {value}, not {have[layer][name]}")
        groups = values.get("groups", values.get("num_groups", 1))
        if any(values.get(name, 0) % groups for name in ("in_channels", "out_channels", "num_channels")):
            raise DNALError(f"{path} is damaged: the channels of {layer} do not fall into {groups} groups")
        for name, expected in kind.shapes(modules[layer], values).items():
            tensor = tensors.get(f"{layer}.{name}" if layer else name)
            if tensor is not None and list(tensor.shape) != expected:
                raise DNALError(f"{path}: {layer}.{name} is {list(tensor.shape)}, but its sizes say {expected}")


def _check_stored(modules: Mapping[str, nn.Module], path: Any, stored: Mapping[str, int | list[int]]) -> dict[str, Any]:
    """The stored numbers, each in the type that the model has for it."""
    checked: dict[str, Any] = {}
    for number, value in stored.items():
        try:
            module, name = _holder(modules, number)
            own = vars(module)[name]
        except KeyError as error:
            raise DNALError(f"{path} does not fit the model: it has no {number}") from error
        new, old = (list(v) if isinstance(v, (list, tuple)) else [v] for v in (value, own))
        if (
            isinstance(value, list) != isinstance(own, (list, tuple))
            or len(new) != len(old)
            or not all(type(b) is int and 0 < a <= b for a, b in zip(new, old))
        ):
            raise DNALError(f"{path} does not fit the model: {number} is {value!r}, the model's is {own!r}")
        checked[number] = type(own)(value)
    return checked


