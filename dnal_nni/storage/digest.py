"""The header of a safetensors file, and whether its bytes are those that were written; without torch."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import DNALError

_BLOCK = 2**20
_KIND = "blake2b:"
NO_SUM = _KIND + "0" * 32
_BLANK = f'"sum":"{NO_SUM}"'.encode()
_SUM = re.compile(rf'"sum":"{_KIND}[0-9a-f]{{32}}"'.encode())


def with_sum(data: bytes) -> bytes:
    """A file's bytes with their digest in place of ``NO_SUM``, the "sum" of the header."""
    return data.replace(_BLANK, f'"sum":"{_digest(memoryview(data))}"'.encode(), 1)


def check_sum(path: str | os.PathLike[str], header: Mapping[str, str]) -> None:
    """Raise a DNALError where the file's bytes are not those that were written. Files without a sum pass."""
    # a digest whose name has been damaged is one all the same
    written = header.get("sum", next((text for text in header.values() if text.startswith(_KIND)), None))
    if written is None:
        return
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        with memoryview(pages) as data:
            found = _sum_of_words(data) if written.isdigit() else _digest(data)
    if written != found:
        raise DNALError(f"{path} is damaged: its bytes do not have their checksum; get the file again")


def read_header(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts in the header of a safetensors file: it starts with its length, 8 bytes, little-endian, and is JSON.

    Raises:
        DNALError: the file cannot be read, or has no such header.
    """
    try:
        with Path(path).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length) if length < os.path.getsize(path) else b"")
        texts = header.get("__metadata__", {})
        if not all(isinstance(text, str) for text in texts.values()):
            raise ValueError
    except OSError as error:
        raise DNALError(f"{path} cannot be read: {error.strerror}") from error
    except (AttributeError, ValueError, RecursionError) as error:
        raise DNALError(f"{path} is no safetensors file, or is damaged: it has no header") from error
    return dict(texts)


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
    import numpy as np

    header, start = _header(data)
    words = (len(data) - start) // 8
    total = int(np.frombuffer(data, np.uint64, words, start).sum()) + sum(data[start + 8 * words :])
    crc = zlib.crc32(re.sub(rb'"sum":"\d{20}"', b'"sum":"%020d"' % 0, header[8:]))
    return f"{(total + crc) % 2**64:020d}"


def _header(data: memoryview) -> tuple[bytes, int]:
    """The header of a safetensors file with its length ahead of it, and where the data start."""
    start = 8 + int.from_bytes(data[:8], "little")
    return bytes(data[:start]), start
