"""Tensors beside JSON in one file: safetensors, never pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import DNALError
from .digest import NO_SUM, check_sum, with_sum
from .whole import write_whole


def write_tensors(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], **parts: Any) -> None:
    """A safetensors file of ``tensors``, with ``kind`` and the ``parts`` (plain JSON values) in its header."""
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {"format": kind, "sum": NO_SUM} | {name: json.dumps(part) for name, part in parts.items()}
    data = with_sum(save(whole, header))
    write_whole(path, lambda temporary: temporary.write_bytes(data))


def _unreadable(path: Path, writer: str) -> str:
    """What is the matter with a file that is no safetensors file."""
    try:
        with path.open("rb") as file:
            begins = file.read(4)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    except ValueError:
        return f"{str(path)!r} is no path"  # a zero byte is in it
    kinds = {b"PK\x03\x04": "it is a zip, as torch.save writes", b"": "it is empty"}
    kind = kinds.get(begins, "it is no safetensors file, or is damaged")
    return f"{path} cannot be read: {kind}; give a file of {writer}"


def read_tensors(path: str | os.PathLike[str], kind: str, writer: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`write_tensors` wrote, byte for byte: see :mod:`.digest`. The tensors are mapped into memory.

    Returns:
        the tensors, and the parts of the header as JSON gives them: their form has not been checked.

    Raises:
        DNALError: the file cannot be read, is damaged, or is of another ``kind`` than ``writer`` writes.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != kind:
                raise DNALError(f"{path} was not written by {writer} (format {header.get('format')!r})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise DNALError(_unreadable(Path(path), writer)) from error
    check_sum(path, header)
    try:
        parts = {name: json.loads(text) for name, text in header.items() if name not in ("format", "sum")}
    except (ValueError, RecursionError) as error:
        raise DNALError(f"{path} is damaged: its header is no JSON ({error})") from error
    return tensors, parts | {"sum": header.get("sum")}
