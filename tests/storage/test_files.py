"""The digest of a file: whatever is done to its bytes is seen."""

import copy
import hashlib
import json
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CONV, Small
from torch import Tensor, nn

from dnal_nni import Budget, DNALError, DNALPruner, load_compressed, save_compressed
from dnal_nni.storage.files import read_tensors, write_tensors
from dnal_nni.storage.reports import saved_report
from dnal_nni.storage.state import load_state

Load = Callable[[Path], Any]


def network(model: nn.Module, x: Tensor, batches: Any, path: Path) -> Load:
    pruner = DNALPruner(model, CONV, dummy_input=x)
    pruner.harden({"conv1": torch.arange(8) < 5, "stem": torch.arange(12) % 3 > 0})
    save_compressed(pruner.speedup(), path, pruner.report)
    fresh = Small()
    return lambda path: load_compressed(copy.deepcopy(fresh), path)


def checkpoint(model: nn.Module, x: Tensor, batches: Any, path: Path) -> Load:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    pruner = DNALPruner(model, CONV, dummy_input=x, budget=Budget(flops=0.5))
    with pruner.search(20, optimizer=optimizer, progress=False) as search:
        for images, labels in batches[:3]:
            search.step(F.cross_entropy(model(images), labels))
        pruner.save_checkpoint(path, optimizer)
    return load_state


def report(model: nn.Module, x: Tensor, batches: Any, path: Path) -> Load:
    network(model, x, batches, path)
    return saved_report


def exchanged(data: bytes, a: int, b: int, size: int) -> bytes:
    """``size`` bytes at ``a`` and at ``b``, further behind, change places."""
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


def words(data: bytes, chance: random.Random) -> bytes:
    a, b = sorted(chance.sample(range(len(data) // 8 - 1), 2))
    return exchanged(data, 8 * a, 8 * b, 8)


def blocks(data: bytes, chance: random.Random) -> bytes:
    size = chance.randrange(1, len(data) // 2)
    a, b = sorted(chance.randrange(len(data) - 2 * size + 1) for _ in range(2))
    return exchanged(data, a, b + size, size)


def a_byte(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ chance.randrange(1, 256)]) + data[at + 1 :]


def shorter(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


@pytest.mark.parametrize("tries", [400, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("write", [network, checkpoint, report])
def test_damage_is_seen(write: Any, tries: int, small: nn.Module, x: Tensor, batches: Any, tmp_path: Path) -> None:
    load = write(small, x, batches, tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    load(tmp_path / "good")
    chance = random.Random(0)
    for attempt in range(tries):
        damage = (words, blocks, a_byte, shorter)[attempt % 4]
        bad = damage(good, chance)
        if bad == good:  # the two were alike
            continue
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(DNALError):
            load(tmp_path / "bad")


@pytest.mark.slow
@pytest.mark.parametrize("write", [network, checkpoint, report])
def test_every_byte_of_the_header_counts(write: Any, small: nn.Module, x: Tensor, batches: Any, tmp_path: Path) -> None:
    load = write(small, x, batches, tmp_path / "good")
    good = bytearray((tmp_path / "good").read_bytes())
    for at in range(8 + struct.unpack("<Q", good[:8])[0]):
        bad = good.copy()
        bad[at] ^= (1, 32, 255)[at % 3]  # 32: another case
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(DNALError):
            load(tmp_path / "bad")


def test_exchanged_words_in_a_saved_network_have_a_message(
    small: nn.Module, x: Tensor, batches: Any, tmp_path: Path
) -> None:
    load = network(small, x, batches, tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    (tmp_path / "bad").write_bytes(exchanged(good, len(good) - 16, len(good) - 8, 8))
    for read in (load, saved_report):
        with pytest.raises(DNALError, match="bad is damaged: its bytes do not have their checksum; get the file again"):
            read(tmp_path / "bad")


def test_the_digest_is_of_the_header_and_of_all_blocks(tmp_path: Path) -> None:
    """Computed here in another way, on a file of three blocks and a bit; exchanged blocks of it are seen."""
    path = tmp_path / "file"
    write_tensors(path, "test", {"a": torch.arange(3 * 2**17 + 5), "b": torch.ones(3)}, part={"sum": "0" * 32})
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    written = json.loads(data[8 : 8 + size])["__metadata__"]["sum"]
    blank = data[: 8 + size].replace(written.encode(), b"blake2b:" + b"0" * 32)
    total = hashlib.blake2b(blank, digest_size=16)
    rest = data[8 + size :]
    while rest:
        total.update(hashlib.blake2b(rest[: 2**20]).digest())
        rest = rest[2**20 :]
    assert written == f"blake2b:{total.hexdigest()}" and re.fullmatch("blake2b:[0-9a-f]{32}", written)
    tensors, parts = read_tensors(path, "test", "this test")
    assert torch.equal(tensors["a"], torch.arange(3 * 2**17 + 5)) and parts["part"] == {"sum": "0" * 32}
    path.write_bytes(exchanged(data, 8 + size, 8 + size + 2**20, 2**20))
    with pytest.raises(DNALError, match="their checksum"):
        read_tensors(path, "test", "this test")
