"""Files that appear whole or not at all, and tensors beside JSON in one of them: safetensors, never pickle."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import DNALError

_NO_SUM = "0" * 20
_SUM = re.compile(rb'"sum":"\d{20}"')


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """``write(temporary path)``, then one atomic rename: whoever reads ``path`` sees the old file or the new one.

    Raises:
        DNALError: the file cannot be written; what was at ``path`` is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # or a crash of the machine may leave the new name without its content
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise DNALError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], **parts: Any) -> None:
    """A safetensors file of ``tensors``, with ``kind`` and the ``parts`` (plain JSON values) in its header."""
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {"format": kind, "sum": _NO_SUM} | {name: json.dumps(part) for name, part in parts.items()}
    data = bytearray(save(whole, header))
    start = data.index(f'"sum":"{_NO_SUM}"'.encode()) + len('"sum":"')
    data[start : start + len(_NO_SUM)] = _sum(torch.frombuffer(data, dtype=torch.uint8)).encode()
    write_whole(path, lambda temporary: temporary.write_bytes(data))


def read_tensors(path: str | os.PathLike[str], kind: str, writer: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`write_tensors` wrote. The tensors are mapped, not read: :func:`check_sum` reads them.

    Returns:
        the tensors, and the parts of the header as JSON gives them: nothing about them has been checked.

    Raises:
        DNALError: the file cannot be read, is damaged, or is of another ``kind`` than ``writer`` writes.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != kind:
                raise DNALError(f"{path} was not written by {writer} (format {header.get('format')!r})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DNALError(f"{path} cannot be read: {error}") from error
    try:
        parts = {name: json.loads(text) for name, text in header.items() if name not in ("format", "sum")}
    except (ValueError, RecursionError) as error:
        raise DNALError(f"{path} is damaged: its header is no JSON ({error})") from error
    return tensors, parts | {"sum": header.get("sum")}


def check_sum(path: str | os.PathLike[str], parts: Mapping[str, Any]) -> None:
    """Raise a DNALError where the file's bytes are not those that were written. Files without a sum pass."""
    if parts["sum"] is None:
        return
    data = torch.from_file(str(path), size=os.path.getsize(path), dtype=torch.uint8)
    if parts["sum"] != _sum(data):
        raise DNALError(f"{path} is damaged: its bytes do not have their checksum; get the file again")


def _sum(data: Tensor) -> str:
    """The sum of the 64-bit words behind the header, at the speed of memory, and of the header's CRC: 20 digits."""
    start = 8 + int(data[:8].view(torch.int64))  # a multiple of 8, as safetensors writes it
    header = _SUM.sub(f'"sum":"{_NO_SUM}"'.encode(), data[8:start].numpy().tobytes())
    words = data[start : start + (len(data) - start) // 8 * 8]
    tail = data[start + len(words) :]
    words = (words if start % 8 == 0 else words.clone()).view(torch.int64)
    return f"{(int(words.sum()) + int(tail.sum()) + zlib.crc32(header)) % 2**64:020d}"
