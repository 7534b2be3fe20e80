"""Numbers that a forward reads from shapes and attributes, and asks for shapes with."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import Tensor, nn

from dnal_nni.channels.counts import Attribute, Count, runs
from dnal_nni.channels.groups import ChannelGroup, find_groups
from dnal_nni.surgery.compare import check_equal
from dnal_nni.surgery.slim import slim_copy
from dnal_nni.surgery.verify import hard_gated_copy, random_keep, verify_and_freeze


class Attention(nn.Module):
    """As timm has it in BEiT, CaiT, PVT and others: the width of the heads is taken from the input."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(*qkv.unbind(0)).transpose(1, 2).reshape(B, N, C))


class Stored(Attention):
    """The same with numbers of its own, as many heads as channels in each, and an attribute that is only compared."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.dim, self.embed_dim, self.head_dim = dim, dim, dim // heads

    def forward(self, x: Tensor) -> Tensor:
        assert x.size(-1) == self.embed_dim
        q, k, v = (
            part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(len(x), -1, self.dim))


class Turned(Attention):
    """Its heads are put together in another order than they were taken apart (NesT, EdgeNeXt, XCiT)."""

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(*qkv.unbind(0)).permute(0, 2, 3, 1).reshape(B, N, C))


@functools.lru_cache
def parts(width: int, heads: int) -> tuple[int, int]:
    return heads, width // heads


class Cached(Attention):
    """Its numbers come out of a cache, which holds those of the block that asked first."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, parts(part.shape[-1], self.num_heads)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    def __init__(self, kind: type[Attention]) -> None:
        super().__init__()
        self.image_size = 16  # as wide as the stream, by chance
        self.stem, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.blocks = nn.ModuleList(kind(16, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == self.image_size
        x = self.stem(x).flatten(2).transpose(1, 2)
        for norm, block in zip(self.norms, self.blocks):
            x = x + block(norm(x))
        return self.head(x.mean(1))


X = torch.randn(2, 3, 16, 16)


def admitted(net: nn.Module, x: Tensor = X) -> list[ChannelGroup]:
    groups = find_groups(net, x)
    trials = verify_and_freeze(net, groups, x, 60)
    assert trials <= 4  # with the three sizes of the input that are refused: no group had to be tried alone
    keep = random_keep(groups, 0.4, 7)
    check_equal(hard_gated_copy(net, groups, keep), slim_copy(net, groups, keep), x)
    return [group for group in groups if group.frozen is None]


@pytest.mark.parametrize("kind", [Attention, Turned])
def test_a_width_taken_from_the_input_couples_the_heads_with_the_stream(kind: type[Attention]) -> None:
    (stream,) = admitted(Transformer(kind))
    assert stream.channels == 4
    produced = {(m.path, m.side, len(m.channels)) for m in stream.members}
    assert {("stem", "out", 16), ("blocks.0.qkv", "out", 48), ("blocks.1.num_heads", "size", 4)} <= produced


def test_attributes_follow_by_where_they_were_read_not_by_their_value() -> None:
    stream, *blocks = admitted(Transformer(Stored))
    assert [group.channels for group in (stream, *blocks)] == [16, 4, 4]
    for i, block in enumerate(blocks):
        sizes = {m.path: len(m.channels) for m in block.members if m.side == "size"}
        assert sizes == {f"blocks.{i}.num_heads": 4, f"blocks.{i}.dim": 16}
    assert {m.path for m in stream.members if m.side == "size"} == {"blocks.0.embed_dim", "blocks.1.embed_dim"}


def test_a_number_out_of_a_cache_couples_nothing() -> None:
    groups = admitted(Transformer(Cached))
    assert [group.name for group in groups] == ["stem", "blocks.0.qkv", "blocks.1.qkv"]
    assert [group.channels for group in groups] == [16, 4, 4]


class Both(nn.Module):
    """One number for two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 1)
        self.read_a, self.read_b = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = (y.unflatten(1, (2, self.width)).amax(1) for y in (self.a(x), self.b(x)))
        return self.read_a(a) + self.read_b(b)


def test_what_one_attribute_counts_here_and_there_goes_together() -> None:
    (group,) = admitted(Both())
    assert group.channels == 8
    assert {m.path for m in group.members} == {"a", "b", "read_a", "read_b", "width"}


class FromFixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.read = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.conv(x).reshape(len(x), -1, *x.shape[1:]).amax(1))


def test_a_width_taken_from_the_model_s_input_stays() -> None:
    groups = find_groups(net := FromFixed(), X)
    verify_and_freeze(net, groups, X, 60)
    assert [group.channels for group in groups if group.frozen is None] in ([4], [])


def test_a_number_knows_what_it_is_computed_from() -> None:
    numbers = {"heads": 3, "width": 12}
    heads, width = (Count.of(n, [Attribute("block", name, (n,), None)], plain=True) for name, n in numbers.items())
    each = width // heads
    assert (each, type(each)) == (4, Count)
    assert not each.plain and {source.number for source in each.sources} == {12}
    assert {source.number for source in (each * heads).sources} == {3, 12} and type(24 // heads) is int
    found = {(source.number, start, end) for source, start, end in runs(each, 2, (2, 3, 4, 5))}
    assert found == {(12, 1, 3)}
    assert type(width + 1) is int and type(width / 2) is float
    assert type(copy.deepcopy(width)) is type(pickle.loads(pickle.dumps(width))) is int
    assert {12: "twelve"}[width] == "twelve" and width == 12 != heads


@pytest.mark.parametrize("kind", [Attention, Stored, Cached])
def test_the_model_keeps_its_own_numbers(kind: type[Attention]) -> None:
    net = Transformer(kind)
    find_groups(net, X)
    assert all(type(vars(block)["num_heads"]) is int for block in net.blocks)
