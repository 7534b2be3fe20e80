"""Kinds of layers: every record of the table against what the layers themselves compute and hold."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dnal_nni import Budget, DNALError, DNALPruner, load_compressed, measure, register_layer, save_compressed
from dnal_nni.channels.groups import groups_of
from dnal_nni.modules.layers import RMSNorm, Side, kinds, layer_of, masked_statistics

torch.manual_seed(0)
# by the name of the class in the table: layers of that kind, and an input of each
SAMPLES: dict[str, list[tuple[nn.Module, Tensor]]] = {
    "_ConvNd": [
        (nn.Conv2d(6, 8, 3), torch.randn(2, 6, 7, 7)),
        (nn.Conv1d(8, 8, 3, groups=8), torch.randn(2, 8, 9)),
        (nn.Conv2d(8, 12, 3, groups=2), torch.randn(2, 8, 7, 7)),
        (nn.ConvTranspose2d(6, 8, 2, 2), torch.randn(2, 6, 5, 5)),
        (nn.ConvTranspose2d(8, 12, 2, groups=2), torch.randn(2, 8, 5, 5)),
        (nn.Conv3d(4, 6, 2, bias=False), torch.randn(1, 4, 4, 4, 4)),
    ],
    "torchvision.ops.deform_conv.DeformConv2d": [(torchvision.ops.DeformConv2d(6, 8, 3), torch.randn(2, 6, 7, 7))],
    "Linear": [(nn.Linear(6, 8), torch.randn(2, 5, 6))],
    "Bilinear": [(nn.Bilinear(4, 4, 8), torch.randn(2, 4))],
    "Embedding": [(nn.Embedding(11, 8, padding_idx=0), torch.arange(11).view(1, -1))],
    "EmbeddingBag": [(nn.EmbeddingBag(11, 8), torch.arange(10).view(2, -1))],
    "RNNBase": [
        (nn.LSTM(6, 4, num_layers=2, bidirectional=True), torch.randn(3, 2, 6)),
        (nn.GRU(6, 4, bias=False), torch.randn(3, 2, 6)),
    ],
    "RNNCellBase": [(nn.GRUCell(6, 4), torch.randn(2, 6)), (nn.LSTMCell(6, 4), torch.randn(2, 6))],
    "_BatchNorm": [(nn.BatchNorm2d(8), torch.randn(4, 8, 5, 5)), (nn.BatchNorm1d(8, affine=False), torch.randn(4, 8))],
    "_InstanceNorm": [
        (nn.InstanceNorm2d(8, affine=True, track_running_stats=True), torch.randn(2, 8, 5, 5)),
        (nn.InstanceNorm1d(8), torch.randn(8, 5)),
    ],
    "GroupNorm": [
        (nn.GroupNorm(4, 8), torch.randn(2, 8, 5)),
        (nn.GroupNorm(2, 8), torch.randn(2, 8, 5)),
        (nn.GroupNorm(1, 8), torch.randn(2, 8, 5)),
    ],
    "LayerNorm": [(nn.LayerNorm(8), torch.randn(2, 5, 8))],
    **({"RMSNorm": [(RMSNorm(8), torch.randn(2, 5, 8))]} if RMSNorm else {}),
    "PReLU": [(nn.PReLU(8), torch.randn(2, 8, 5))],
}
EVERY = [(name, layer, x) for name, samples in SAMPLES.items() for layer, x in samples]


def name_of(kind: type[nn.Module] | str) -> str:
    return kind if isinstance(kind, str) else kind.__name__


def test_every_kind_has_samples() -> None:
    of_any_width = {"PixelNorm"}  # which has nothing to be cut
    assert sorted(set(map(name_of, kinds())) - of_any_width) == sorted(SAMPLES)


def run(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Bilinear):
        return layer(x, x)
    if isinstance(layer, torchvision.ops.DeformConv2d):
        size = x.shape[-1] - 2
        return layer(x, torch.linspace(-1, 1, 18 * size * size).view(1, 18, size, size).expand(len(x), -1, -1, -1))
    out = layer(x)
    return out[0] if isinstance(out, tuple) else out


def random_masks(layer: nn.Module, seed: int) -> dict[Side, Tensor]:
    """Some units of every side dropped, at least one and not all."""
    record = layer_of(layer)
    assert record is not None
    generator = torch.Generator().manual_seed(seed)
    widths = record.widths(layer)
    units = record.units(layer) or {side: torch.arange(n) + 100 * i for i, (side, n) in enumerate(widths.items())}
    kept = {}
    for number in torch.cat(list(units.values())).unique().tolist():
        kept[number] = bool(torch.rand((), generator=generator) < 0.6)
    for numbers in units.values():
        kept[int(numbers[0])], kept[int(numbers[-1])] = True, False
    return {side: torch.tensor([kept[n] for n in numbers.tolist()]) for side, numbers in units.items()}


@pytest.mark.parametrize(("name", "layer", "x"), EVERY, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(EVERY)])
def test_a_record_says_what_the_layer_is(name: str, layer: nn.Module, x: Tensor) -> None:
    import copy

    record = layer_of(layer)
    assert record is not None
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.2)
    layer.eval()
    widths = record.widths(layer)
    assert set(widths) == set(record.sides)
    axis = record.input_axis(layer) % x.dim()
    if widths.keys() & {"in", "both"}:
        assert x.shape[axis] == widths.get("in", widths.get("both"))
    for tensor_name in record.tensors:
        tensor = getattr(layer, tensor_name, None)
        for side, dim in record.dims(layer, tensor_name).items() if tensor is not None else ():
            assert tensor.shape[dim] == widths[side]
    # all parameters are accounted for
    counted = sum(w.numel() for w in record.weights(layer).values())
    lines = {side for side in record.sides if side == "both"} or ("in", "out")
    counted += sum(record.vectors(layer, side) for side in lines)
    others = sum(p.numel() for n, p in layer.named_parameters() if n.startswith("bias_"))  # of recurrent layers
    assert counted + others == sum(p.numel() for p in layer.parameters())

    for seed in range(4):
        masks = random_masks(layer, seed)
        cut = copy.deepcopy(layer)
        record.cut(cut, masks)
        for side, width in record.widths(cut).items():
            assert width == int(masks[side].sum())
        assert record.state(cut).keys() == record.state(layer).keys()
        for tensor_name, shape in record.shapes(cut, record.state(cut)).items():
            if getattr(cut, tensor_name, None) is not None:
                assert list(getattr(cut, tensor_name).shape) == shape
        for tensor_name, shape in record.shapes(layer, record.state(cut)).items():  # as they are known before a load
            if getattr(cut, tensor_name, None) is not None:
                assert list(getattr(cut, tensor_name).shape) == shape
        fresh = copy.deepcopy(layer)
        for attribute, size in record.state(cut).items():
            record.set_size(fresh, attribute, size)
        assert repr(fresh) == repr(cut)
        # what the cut layer computes is what the whole one computes from the channels that are left
        into = masks.get("in", masks.get("both"))
        out = masks.get("out", masks.get("both"))
        less, zeroed = x, x
        if into is not None and x.is_floating_point():
            less = x.index_select(axis, into.nonzero().flatten())
            zeroed = x * into.to(x.dtype).view(-1, *[1] * (x.dim() - 1 - axis))
        expected = run(layer, zeroed)
        if out is not None:
            expected = expected.index_select(record.input_axis(layer) % expected.dim(), out.nonzero().flatten())
        got = run(cut, less)
        if masked_statistics(layer):
            expected = _normalised(layer, out, less)
        assert torch.allclose(got, expected, atol=1e-5), (got - expected).abs().max()


def _normalised(norm: nn.Module, keep: Tensor, x: Tensor) -> Tensor:
    weight = norm.weight[keep]
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(x, norm.num_groups, weight, norm.bias[keep], norm.eps)
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, (len(weight),), weight, norm.bias[keep], norm.eps)
    return x * (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt() * weight


def test_what_has_no_channels_of_its_own_is_no_layer() -> None:
    for module in (nn.LayerNorm((4, 4)), nn.PReLU(), nn.ReLU(), nn.Embedding(4, 2, max_norm=1.0), nn.Upsample(2)):
        assert layer_of(module) is None


class Factorised(nn.Module):
    """A 1x1 convolution of low rank, by means that no rule follows: an einsum inside of an autograd function."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.u, self.v = nn.Parameter(torch.randn(rank, inputs)), nn.Parameter(torch.randn(outputs, rank))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        product = torch.linalg.multi_dot([self.v, self.u, x.movedim(1, 0).flatten(1)])
        return (product + self.bias[:, None]).unflatten(1, (len(x), *x.shape[2:])).movedim(0, 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.middle = Factorised(16, 24, 6)
        self.norm = nn.BatchNorm2d(24)
        self.last = nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.middle(self.stem(x))))).mean((2, 3))


FACTORISED: dict[str, Mapping[Side, int]] = {"u": {"in": 1}, "v": {"out": 0}, "bias": {"out": 0}}
SIZES: dict[str, Side] = {"inputs": "in", "outputs": "out"}


@pytest.fixture
def registered() -> Iterator[Callable[[], None]]:
    undo = register_layer(Factorised, FACTORISED, SIZES, axis=1)
    yield undo
    undo()


def test_a_users_kind_is_cut_saved_loaded_and_counted(registered: Callable[[], None], tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    net = Net()
    config = [{"op_types": ["Conv2d"]}, {"op_names": ["middle"]}]
    pruner = DNALPruner(net, config, dummy_input=x, budget=Budget(flops=0.4))
    groups = {group.name: group for group in pruner.groups}
    assert groups["stem.0"].frozen is None
    assert groups["middle"].frozen is None
    pruner.harden({"stem.0": torch.arange(16) < 9, "middle": torch.arange(24) % 2 == 0})
    slim = pruner.speedup()
    assert slim.middle.u.shape == (6, 9)
    assert slim.middle.v.shape == (12, 6)
    assert (slim.middle.inputs, slim.middle.outputs) == (9, 12)
    dense = Net()
    assert pruner.report.after.params == measure(slim, x).params < measure(dense, x).params
    save_compressed(slim, tmp_path / "slim.safetensors")
    again = load_compressed(dense, tmp_path / "slim.safetensors")
    assert (again.middle.inputs, again.middle.outputs) == (9, 12)
    assert torch.equal(again.eval()(x), slim.eval()(x))

    registered()
    # what it reads is followed through its products all the same; its neighbours keep all that it makes
    assert [group.name for group in groups_of(Net(), x) if group.frozen is None] == ["stem.0"]
    assert layer_of(Net().middle) is None


@pytest.mark.parametrize(
    ("tensors", "sizes", "message"),
    [
        ({"u": {"inside": 1}}, SIZES, r"register_layer\(Factorised\): tensors\['u'\] has 'inside': 1; sides: \('in'"),
        ({"u": {"in": -1}}, SIZES, r"has 'in': -1"),
        ({"u": {"in": 1}, "v": {"both": 0}}, SIZES, r"the sides \['in', 'both'\]: a layer has"),
        ({}, SIZES, r"the sides \[\]"),
        (FACTORISED, {"inputs": "in"}, "sizes needs one attribute that counts 'out'"),
    ],
)
def test_a_record_that_cannot_be_is_refused(tensors: dict, sizes: dict, message: str) -> None:
    with pytest.raises(DNALError, match=message):
        register_layer(Factorised, tensors, sizes, axis=1)
    with pytest.raises(DNALError, match="pass a subclass of torch.nn.Module"):
        register_layer(Factorised(2, 2, 2), FACTORISED, SIZES, axis=1)  # type: ignore[arg-type]
