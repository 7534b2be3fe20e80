"""Save and load a cut network without pickle: safetensors, with the layers' new sizes as JSON in the header."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapters import adapt
from .bake import bake
from .errors import DNALError
from .graph import Conv, RMSNorm, clone
from .slim import CHANGES, drop

FORMAT = "dnal_nni/1"
_SIZES = (
    "in_channels",
    "out_channels",
    "groups",
    "in_features",
    "out_features",
    "num_features",
    "num_channels",
    "num_groups",
    "num_parameters",
)


def _sizes(model: nn.Module) -> dict[str, dict[str, int]]:
    """The channel counts of every layer that has some."""
    return {
        path: sizes
        for path, module in model.named_modules()
        if isinstance(module, (Conv, nn.Linear, nn.GroupNorm, nn.PReLU, nn.modules.batchnorm._NormBase))
        and (sizes := {name: getattr(module, name) for name in _SIZES if hasattr(module, name)})
    } | {
        path: {"normalized_shape": module.normalized_shape[0]}
        for path, module in model.named_modules()
        if isinstance(module, (nn.LayerNorm, RMSNorm)) and len(module.normalized_shape) == 1
    }


def _stored(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that keeps a number about its channels, and the name of the number."""
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner), name


def _prepare(model: nn.Module, chosen: dict[str, list[int]], baked: list[str]) -> None:
    """The changes of modules that a cut makes: candidates that go, :mod:`dnal_nni.adapters`, :mod:`dnal_nni.bake`."""
    drop(model, chosen)
    adapt(model)
    for path in baked:
        bake(model.get_submodule(path))


def save_compressed(slim: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a cut network: its tensors and its layers' sizes. The file appears whole or not at all.

    Args:
        slim: what ``speedup()`` returned (also after fine-tuning).
        path: usually ``*.safetensors``.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in slim.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise DNALError(f"the state of {name} is a {type(tensor).__name__}, not a tensor: it cannot be saved")
        if id(tensor) in seen:
            aliases[name] = seen[id(tensor)]
        else:
            seen[id(tensor)] = name
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    header = {
        "format": FORMAT,
        "sizes": json.dumps(_sizes(slim)),
        "aliases": json.dumps(aliases),
        "changes": json.dumps(getattr(slim, CHANGES, {"choices": {}, "baked": [], "stored": {}})),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, temporary, metadata=header)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_compressed(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Turn a fresh dense ``model`` into the saved network, in place, and return it. Nothing is traced or unpickled.

    Every check comes ahead of the first change: a file that does not fit raises and leaves ``model`` as it was.

    Args:
        model: the architecture that the saved network was cut from.
        path: a file of :func:`save_compressed`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise DNALError(f"{path} cannot be read: {error}") from error
    if header.get("format") != FORMAT:
        raise DNALError(f"{path} was not written by save_compressed (format {header.get('format')!r})")
    try:
        sizes: dict[str, dict[str, int]] = json.loads(header["sizes"])
        aliases: dict[str, str] = json.loads(header["aliases"])
        tensors |= {name: tensors[first] for name, first in aliases.items()}
        changes = json.loads(header["changes"])
        baked, stored = [str(entry) for entry in changes["baked"]], dict(changes["stored"])
        chosen = dict(changes["choices"])
        trial = clone(model)
        _prepare(trial, chosen, baked)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DNALError(f"{path}: its header is damaged, or of another model: {error}") from error
    _check_fit(trial, path, sizes, tensors)
    _check_stored(trial, path, stored)
    _prepare(model, chosen, baked)
    for layer, values in sizes.items():
        module = model.get_submodule(layer)
        for name, value in values.items():
            setattr(module, name, (value,) if name == "normalized_shape" else value)
    for number, value in stored.items():
        module, name = _stored(model, number)
        setattr(module, name, type(getattr(module, name))(value))
    setattr(model, CHANGES, changes)
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        old = getattr(module, attribute)
        new = torch.empty_like(old, memory_format=torch.preserve_format) if old.shape == tensor.shape else None
        if new is None:
            last = old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous()
            form = torch.channels_last if last else torch.contiguous_format
            new = torch.empty(tensor.shape, dtype=old.dtype, device=old.device).contiguous(memory_format=form)
        new = new.detach().copy_(tensor)
        setattr(module, attribute, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    for name, first in aliases.items():
        owner, _, attribute = name.rpartition(".")
        source, _, source_attribute = first.rpartition(".")
        setattr(model.get_submodule(owner), attribute, getattr(model.get_submodule(source), source_attribute))
    return model


def _check_stored(model: nn.Module, path: Any, stored: dict[str, Any]) -> None:
    for number, value in stored.items():
        try:
            module, name = _stored(model, number)
            own = vars(module)[name]
        except (AttributeError, KeyError) as error:
            raise DNALError(f"{path} does not fit the model: it has no {number}") from error
        new, old = (list(v) if isinstance(v, (list, tuple)) else [v] for v in (value, own))
        whole = all(type(n) is int for n in (*new, *old))
        if isinstance(value, list) != isinstance(own, (list, tuple)) or not whole or len(new) != len(old):
            raise DNALError(f"{path} does not fit the model: {number} is {value!r}, the model's is {own!r}")
        if any(not 0 < a <= b for a, b in zip(new, old)):
            raise DNALError(f"{path} does not fit the model: {number} is {value!r}, the model's is {own!r}")


def _check_fit(model: nn.Module, path: Any, sizes: dict[str, dict[str, int]], tensors: dict[str, Tensor]) -> None:
    own = model.state_dict()
    for name in own:
        if name not in tensors:
            raise DNALError(f"{path} does not fit the model: it has no {name}")
    for name, tensor in tensors.items():
        if name not in own:
            raise DNALError(f"{path} does not fit the model: the model has no {name}")
        mine = own[name]
        if mine.dtype != tensor.dtype:
            raise DNALError(f"{path} does not fit the model: {name} is {tensor.dtype}, the model's is {mine.dtype}")
        if mine.dim() != tensor.dim() or any(a > b for a, b in zip(tensor.shape, mine.shape)):
            raise DNALError(
                f"{path} does not fit the model: {name} is {list(tensor.shape)}, the model's is {list(mine.shape)}"
            )
    have = _sizes(model)
    if sizes.keys() != have.keys():
        odd = min(sizes.keys() ^ have.keys())
        raise DNALError(f"{path} does not fit the model: layer {odd} is only in one of them")
    for layer, values in sizes.items():
        for name, value in values.items():
            if not isinstance(value, int) or not 0 < value <= have[layer].get(name, 0):
                raise DNALError(f"{path} does not fit the model: {layer}.{name} is {value!r}")
        module = model.get_submodule(layer)
        weight = tensors.get(f"{layer}.weight" if layer else "weight")
        expected = _leading(module, values)
        if weight is not None and expected is not None and weight.shape[: len(expected)] != torch.Size(expected):
            raise DNALError(f"{path}: {layer}.weight is {list(weight.shape)}, but its sizes say {expected}")


def _leading(module: nn.Module, values: dict[str, int]) -> list[int] | None:
    """The first dimensions that a layer's weight must have for its sizes."""
    if isinstance(module, Conv):
        first, second = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
        return [values[first], values[second] // values["groups"]]
    if isinstance(module, nn.Linear):
        return [values["out_features"], values["in_features"]]
    widths = ("num_features", "num_channels", "num_parameters", "normalized_shape")
    return next(([values[name]] for name in widths if name in values), None)
