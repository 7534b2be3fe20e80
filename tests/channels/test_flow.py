"""The labels of channels, against what really depends on a channel, and against torch-pruning's groups."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch_pruning
import torchvision
from torch import Tensor, nn

from dnal_nni.channels.flow import Flow
from dnal_nni.channels.graph import CouplingGraph
from dnal_nni.channels.groups import find_groups
from dnal_nni.channels.rules.dispatch import run
from dnal_nni.channels.trace import Trace

C = 6


class Labelled(nn.Module):
    """A convolution, then any function of its output."""

    def __init__(self, function: Callable[[Tensor], Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, C, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(self.conv(x))


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda x: x.flatten(1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose and back": lambda x: x.flatten(2).transpose(1, 2).reshape(2, 4, 4, C),
    "first half": lambda x: x[:, : C // 2],
    "every other": lambda x: x[:, ::2],
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(2, 1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "index_select": lambda x: x.index_select(1, torch.tensor([4, 0, 2])),
    "concat with itself": lambda x: torch.cat([x, x.flip(1)], 1),
    "option-A shortcut": lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)),
    "pixel_shuffle of repeated": lambda x: F.pixel_shuffle(x.repeat_interleave(4, 1), 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel shuffle": lambda x: x.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2),
    "chunk": lambda x: x.chunk(3, 1)[1],
    "split": lambda x: x.split([1, 2, 3], 1)[2],
    "expand": lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 3, 3),
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "avg_pool": lambda x: F.avg_pool2d(x, 2),
    "adaptive_avg_pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "spatial softmax": lambda x: x.flatten(2).softmax(-1),
    "spatial mean": lambda x: x.mean((2, 3)),
    "relu and scale": lambda x: F.relu(x) * 2 + 1,
    "reflection pad": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "circular pad": lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "written into slices": lambda x: filled(x, x.shape[1]),
    "written into slices of zeros": lambda x: filled(x, 2 * x.shape[1]),
    "written beside zeros": lambda x: added(x),
    "a product with a tensor made for it": lambda x: x * torch.full((x.shape[1], 1, 1), 2.0) + torch.zeros(x.shape),
    "Fourier transform": lambda x: torch.fft.rfft2(x),
    "and back": lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=x.shape[-2:]),
    "real and imaginary parts": lambda x: torch.view_as_real(torch.fft.fft(x)),
    "complex number of two": lambda x: torch.view_as_complex(torch.stack([x, 2 * x], -1)).abs(),
    "unfold": lambda x: F.unfold(x, 3, padding=1),
    "fold": lambda x: F.fold(F.unfold(x, 2, stride=2), 4, 2, stride=2),
    "max_unpool": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "gather": lambda x: x.flatten(2).gather(2, torch.arange(3).expand(*x.shape[:2], 3)),
    "topk": lambda x: x.flatten(2).topk(3)[0],
    "sort": lambda x: x.sort(2)[0],
    "cumsum": lambda x: x.cumsum(-1),
    "scatter_add": lambda x: torch.zeros_like(x).scatter_add(2, torch.zeros(x.shape, dtype=torch.long), x),
    "index_add": lambda x: torch.zeros_like(x).index_add(3, torch.tensor([0, 0, 1, 3]), x),
    "triu": lambda x: x.triu(),
    "one kernel for all": lambda x: F.conv2d(x, torch.ones(1, 1, 3, 3).expand(x.shape[1], 1, 3, 3), groups=x.shape[1]),
    "one kernel for all, transposed": lambda x: F.conv_transpose2d(
        x, torch.ones(x.shape[1], 1, 2, 2), stride=2, groups=x.shape[1]
    ),
}


def filled(x: Tensor, channels: int) -> Tensor:
    """``x`` shifted by one, in a tensor of its own; and again in further channels."""
    out = x.new_zeros(len(x), channels, *x.shape[2:])
    out[:, : x.shape[1], :, 1:] = x[..., :-1]
    for i in range(channels - x.shape[1] and 4):
        out[:, x.shape[1] :, i] = x[:, :, 3 - i]
    return out


def added(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape)
    out[:, :, 1:3] += x[:, :, 1:3]
    return out * 2


# a change may not show, or zeros count as their neighbours
HIDDEN = {"spatial softmax", "relu and scale", "max_pool", "written into slices", "written into slices of zeros"}
HIDDEN |= {"written beside zeros", "max_unpool", "gather", "topk", "sort", "scatter_add", "index_add", "triu", "unfold"}
HIDDEN |= {"real and imaginary parts"}


def traced(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Trace]:
    """Output of the function, its labels (channel of the convolution, or -1), and the trace."""
    torch.manual_seed(0)
    seen: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(function(x))
        return seen[-1]

    trace = Trace(Labelled(watched))
    trace.run(torch.randn(2, 3, 4, 4))
    labels = trace.flow.of(seen[0])
    offset = trace.graph.vertices["conv", "out", None].offset
    if labels is None:
        return seen[0], torch.full(seen[0].shape, -1), trace
    assert len(labels.arrays) == 1
    array = labels.arrays[0]
    return seen[0], torch.where(array >= 0, array - offset, array).expand(seen[0].shape), trace


@pytest.mark.parametrize("name", MOVES)
def test_labels_are_where_a_channel_comes_out(name: str) -> None:
    _, labels, _ = traced(MOVES[name])
    for channel in range(C):
        x = torch.randn(2, C, 4, 4)
        other = x.clone()
        other[:, channel] += 7 + torch.rand(2, 4, 4)
        changed = MOVES[name](x) != MOVES[name](other)
        assert not (changed & (labels != channel)).any(), "a channel reaches places that are not labelled with it"
        if name not in HIDDEN:
            assert torch.equal(changed, labels == channel)


def beside(x: Tensor) -> Tensor:
    out = torch.arange(float(C)).view(C, 1, 1).repeat(2, 1, 4, 4)
    out[:, :, 1:] = x[:, :, 1:]
    return out


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "channel mean": lambda x: x - x.mean(1, keepdim=True),
    "channel softmax": lambda x: x.softmax(1),
    "channel max": lambda x: x.amax(1),
    "one channel": lambda x: x[:, 2],
    "constant per channel": lambda x: x * torch.arange(C).view(1, C, 1, 1),
    "matrix over channels": lambda x: torch.einsum("oc,bchw->bohw", torch.ones(4, C), x),
    "sort": lambda x: x.sort(1)[0],
    "fft": lambda x: torch.fft.fft(x, dim=1).real,
    "topk": lambda x: x.topk(2, 1)[0],
    "gather": lambda x: x.gather(1, torch.zeros_like(x, dtype=torch.long)),
    "channels beside fixed values": lambda x: beside(x),
}


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_channels_is_frozen_with_the_place(name: str) -> None:
    _, _, trace = traced(lambda x: MIXES[name](x).sum().sigmoid())
    frozen = trace.graph.frozen_units(trace.graph.units())
    offset = trace.graph.vertices["conv", "out", None].offset
    assert {int(u) for u in trace.graph.units()[offset : offset + C]} <= set(frozen)
    assert "Labelled.forward" in next(iter(frozen.values())) or "conv reads" in next(iter(frozen.values()))


def test_an_operation_without_a_rule_freezes_what_enters() -> None:
    graph = CouplingGraph()
    vertex = graph.vertex("a", "out", 4)
    flow = Flow(graph, lambda tensor: None, lambda: ("block", "Block"))
    x = torch.randn(2, 4)
    flow.put(x, [vertex.ids[None]], None)
    run(flow, torch.ops.aten.renorm.default, (x, 2, 0, 1), {})
    reasons = set(graph.frozen_units(graph.units()).values())
    assert reasons == {"block: there is no rule for aten::renorm in Block.forward"}


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2", "efficientnet_b0"])
def test_units_are_those_of_torch_pruning_where_its_graph_is_right(name: str) -> None:
    """Another implementation: for some channels of every group, the same slices of the same layers."""
    model = getattr(torchvision.models, name)(weights=None).eval()
    x = torch.randn(1, 3, 64, 64)
    graph = torch_pruning.DependencyGraph().build_dependency(model, x)
    paths = {module: path for path, module in model.named_modules()}
    compared = 0
    for group in find_groups(model, x):
        if group.frozen is not None:
            continue
        root = next(m for m in group.members if m.path == group.producers[0] and m.side == "out")
        for unit in (0, group.channels - 1):
            ours: dict[str, set[int]] = {}
            for member in group.members:
                channels = set(member.channels[member.units == unit].tolist())
                ours[member.path] = ours.get(member.path, set()) | channels if member.side == "both" else channels
            module = model.get_submodule(root.path)
            theirs: dict[str, set[int]] = {}
            for item in graph.get_pruning_group(
                module, torch_pruning.prune_conv_out_channels, sorted(root.channels[root.units == unit].tolist())
            ):
                if item.dep.target.module in paths:
                    theirs.setdefault(paths[item.dep.target.module], set()).update(item.idxs)
            two_sided = {p for p in theirs if isinstance(model.get_submodule(p), (nn.Conv2d, nn.Linear))}
            for path in theirs.keys() - two_sided:
                assert ours[path] == theirs[path]
            assert two_sided <= ours.keys()
            compared += 1
    assert compared >= 20
