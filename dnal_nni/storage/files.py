"""Tensors beside JSON in one file: safetensors, never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import DNALError
from .whole import write_whole

_BLOCK = 2**20
_KIND = "blake2b:"  # no JSON: a part of the header whose name has become another one does not pass for a part
_BLANK = f'"sum":"{_KIND}{"0" * 32}"'.encode()
_SUM = re.compile(rf'"sum":"{_KIND}[0-9a-f]{{32}}"'.encode())


def write_tensors(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], **parts: Any) -> None:
    """A safetensors file of ``tensors``, with ``kind`` and the ``parts`` (plain JSON values) in its header."""
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {"format": kind, "sum": _KIND + "0" * 32} | {name: json.dumps(part) for name, part in parts.items()}
    data = save(whole, header)
    data = data.replace(_BLANK, f'"sum":"{_digest(memoryview(data))}"'.encode(), 1)
    write_whole(path, lambda temporary: temporary.write_bytes(data))


def read_tensors(path: str | os.PathLike[str], kind: str, writer: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`write_tensors` wrote, byte for byte: see :func:`check_sum`. The tensors are mapped into memory.

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
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DNALError(f"{path} cannot be read: {error}") from error
    check_sum(path, header)
    try:
        parts = {name: json.loads(text) for name, text in header.items() if name not in ("format", "sum")}
    except (ValueError, RecursionError) as error:
        raise DNALError(f"{path} is damaged: its header is no JSON ({error})") from error
    return tensors, parts | {"sum": header.get("sum")}


def check_sum(path: str | os.PathLike[str], header: Mapping[str, str]) -> None:
    """Raise a DNALError where the file's bytes are not those that were written. Files without a sum pass."""
    written = header.get("sum")
    if written is None:
        return
    data = np.memmap(path, mode="r").data
    if written != (_sum_of_words(data) if written.isdigit() else _digest(data)):
        raise DNALError(f"{path} is damaged: its bytes do not have their checksum; get the file again")


def _digest(data: memoryview) -> str:
    """BLAKE2b of the header, with the place of the digest blank, and of the BLAKE2bs of all 1 MiB blocks behind it.

    The blocks are hashed in threads: one is slower than the memory.
    """
    header, start = _header(data)
    places = range(start, len(data), _BLOCK)
    with ThreadPoolExecutor() as threads:
        blocks = threads.map(lambda at: hashlib.blake2b(data[at : at + _BLOCK]).digest(), places)
        digest = hashlib.blake2b(_SUM.sub(_BLANK, header) + b"".join(blocks), digest_size=16)
    return _KIND + digest.hexdigest()


def _sum_of_words(data: memoryview) -> str:
    """What files of version 0.1 have: the sum of the 64-bit words behind the header, and of the header's CRC."""
    header, start = _header(data)
    words = np.frombuffer(data, np.uint64, (len(data) - start) // 8, start)
    tail = data[start + words.nbytes :]
    crc = zlib.crc32(re.sub(rb'"sum":"\d{20}"', b'"sum":"%020d"' % 0, header[8:]))
    return f"{(int(words.sum()) + sum(tail) + crc) % 2**64:020d}"


def _header(data: memoryview) -> tuple[bytes, int]:
    """The header of a safetensors file with its length ahead of it, and where the data start."""
    start = 8 + int.from_bytes(data[:8], "little")
    return bytes(data[:start]), start
