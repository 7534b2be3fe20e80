"""The state of work under way in one file: nested dicts and lists of tensors, numbers and strings, without pickle."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from torch import Tensor

from ..errors import DNALError
from ..surgery.inject import ungated
from .files import read_tensors, write_tensors

T = TypeVar("T")
_FORMAT = "dnal_nni/state/1"


def save_state(path: str | os.PathLike[str], state: Any) -> None:
    """Write ``state``; the file appears whole or not at all, in place of the one before.

    Args:
        path: of the file.
        state: tensors, numbers, strings and None in dicts, lists and tuples, such as ``optimizer.state_dict()``.

    Raises:
        DNALError: something else is in ``state``, or the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    packed = _pack(state, tensors, "state")
    write_tensors(path, _FORMAT, tensors, state=packed)


def load_state(path: str | os.PathLike[str]) -> Any:
    """What :func:`save_state` wrote, with its tensors on the CPU.

    Raises:
        DNALError: the file cannot be read, or is damaged.
    """
    tensors, parts = read_tensors(path, _FORMAT, "save_checkpoint")
    if parts["sum"] is None:
        raise DNALError(f"{path} is damaged: it has no checksum")
    try:
        return _unpack(parts["state"], tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DNALError(f"{path} is damaged: its header is not of the right form ({error})") from error


def under_own_names(state: Mapping[str, T], own: Collection[str]) -> dict[str, T]:
    """A gated model's state dict with the names of the model: until 0.2, a gate on a norm's affine changed them."""
    plain = {name: ungated(name) for name in state}
    return {name if name in own or plain[name] not in own else plain[name]: state[name] for name in state}


def _pack(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """JSON for ``value``; its tensors go to ``tensors``."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(entry, tensors, f"{path}[{key!r}]")] for key, entry in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(entry, tensors, f"{path}[{i}]") for i, entry in enumerate(value)]}
    raise DNALError(f"{path} is a {type(value).__name__}: only tensors, numbers, strings, dicts and lists can be saved")


def _unpack(packed: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(packed, dict):
        return packed
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return tensors[value].clone()  # the file may be replaced while this one is in use
    if kind == "dict":
        return {key: _unpack(entry, tensors) for key, entry in value}
    entries = [_unpack(entry, tensors) for entry in value]
    return {"list": entries, "tuple": tuple(entries)}[kind]
