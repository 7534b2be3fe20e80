"""Criteria of torch-pruning on our groups: its own scores, unit by unit."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torch_pruning as tp
import torchvision
from cifar_models import MODELS
from torch import Tensor, nn

from dnal_nni import DNALError
from dnal_nni.channels.groups import ChannelGroup, find_groups
from dnal_nni.modules.gates import GateState, ScaledSigmoidGate
from dnal_nni.search.criteria import criterion_scores
from dnal_nni.surgery.inject import attach

CRITERIA: dict[str, Callable[[], Any]] = {
    "magnitude": tp.importance.MagnitudeImportance,
    "first layer, L1": lambda: tp.importance.MagnitudeImportance(1, "first", None),
    "largest": lambda: tp.importance.MagnitudeImportance(2, "max", "max", bias=True),
    "LAMP": tp.importance.LAMPImportance,
    "FPGM": tp.pruner.importance.FPGMImportance,
    "BN scale": tp.importance.BNScaleImportance,
    "Taylor": tp.importance.TaylorImportance,
    "Hessian": tp.importance.HessianImportance,
}
TEN = (
    "vgg16_bn resnet20 resnet18 squeezenet1_1 mnasnet0_5 mobilenet_v2 mobilenet_v3_small efficientnet_b0 lcnet_050"
    " densenet"
).split()


def network(name: str) -> nn.Module:
    """In float64, its weights small whole numbers times powers of 2: torch-pruning adds float32, in another order."""
    torch.manual_seed(0)
    model = {
        **{name: (lambda build=build: build(10, 0.5)) for name, build in MODELS.items()},
        "lcnet_050": lambda: timm.create_model("lcnet_050", num_classes=10),
        "densenet": lambda: torchvision.models.DenseNet(8, (2, 2, 2), 16, num_classes=10),
    }.get(name, lambda: torchvision.models.get_model(name, weights=None, num_classes=10))()
    for parameter in model.double().eval().parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 1
        whole = torch.randint(1, 4, parameter.shape) * (1 - 2 * torch.randint(0, 2, parameter.shape)).pow(fan > 1)
        parameter.data = whole.double() * 2.0 ** -round(0.5 * torch.tensor(4.0 * fan).log2().item())
    return model


FAST = ("vgg16_bn", "resnet20", "squeezenet1_1", "densenet")


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in TEN])
def test_scores_are_torch_prunings_own_on_ten_networks(name: str) -> None:
    model = network(name)
    x, labels = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([3, 7])
    graph = tp.DependencyGraph().build_dependency(model, x, verbose=False)
    groups = [g for g in find_groups(model, x) if g.frozen is None]
    for criterion_name, make in CRITERIA.items():
        criterion = make()
        if criterion_name == "BN scale" and not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
            continue
        gradients = criterion_name in ("Taylor", "Hessian")
        scores = criterion_scores(model, groups, make(), [(x, labels)] if gradients else None)
        with torch.enable_grad():
            model.zero_grad()
            losses = F.cross_entropy(model(x), labels, reduction="none")
            if criterion_name == "Taylor":
                losses.mean().backward()
            for loss in losses if criterion_name == "Hessian" else ():
                model.zero_grad()
                loss.backward(retain_graph=True)
                criterion.accumulate_grad(model)
        compared = 0
        for group, ours in zip(groups, scores.split([g.channels for g in groups])):
            root = model.get_submodule(group.producers[0])
            function = graph.get_pruner_of_module(root).prune_out_channels
            theirs = criterion(graph.get_pruning_group(root, function, list(range(group.width))))
            if theirs is not None:
                units = next(m.units for m in group.members if m.path == group.producers[0] and m.side == "out")
                theirs = torch.stack([theirs[units == u].mean() for u in range(group.channels)]).double()
                assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max())), group.name
                compared += 1
        assert compared >= (1 if criterion_name == "BN scale" else len(groups))
    model.zero_grad()


def open_groups(model: nn.Module, x: Tensor) -> list[ChannelGroup]:
    return [g for g in find_groups(model, x) if g.frozen is None]


def test_the_model_is_as_it_was_and_the_gates_were_open(small: nn.Module, x: Tensor) -> None:
    y = torch.randint(0, 10, (4,))
    groups = open_groups(small, x)
    plain = criterion_scores(small, groups, tp.importance.TaylorImportance(), [(x, y)])
    small.conv1.weight.requires_grad_(False)
    small.fc.weight.grad = torch.ones_like(small.fc.weight)
    small.train()
    small.bn1.eval()
    gates = {g.name: ScaledSigmoidGate(g.channels) for g in groups}
    attach(small, groups, gates)
    for gate in gates.values():
        gate.harden(torch.arange(len(gate.s)) % 2 == 0)
    before = copy.deepcopy(small.state_dict())
    gated = criterion_scores(small, groups, tp.importance.TaylorImportance(), [(x, y)])
    assert torch.allclose(gated, plain)
    assert all(gate.state is GateState.HARD for gate in gates.values())
    assert small.training and not small.bn1.training
    assert not small.conv1.weight.requires_grad and small.conv1.weight.grad is None
    assert bool((small.fc.weight.grad == 1).all())
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


def test_a_users_loss_several_batches_and_arguments_by_name(small: nn.Module, x: Tensor) -> None:
    groups = open_groups(small, x)
    criterion = tp.importance.TaylorImportance(normalizer=None)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum()

    both = criterion_scores(small, groups, criterion, [x[:2], x[2:]], loss)
    assert torch.allclose(both, criterion_scores(small, groups, criterion, [x], loss), rtol=1e-3)
    hessian = tp.importance.HessianImportance()
    assert criterion_scores(small, groups, hessian, [{"x": x}], lambda m, b: m(**b).sum()).shape == both.shape


class ByActivation(tp.importance.Importance):
    """Mean absolute input of the layers that read a group, by hooks of its own."""

    def compute_importance(self, model: nn.Module) -> Any:
        import contextlib

        @contextlib.contextmanager
        def watching() -> Any:
            self.seen: dict[nn.Module, Tensor] = {}
            layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
            handles = [
                m.register_forward_hook(lambda m, args, out: self.seen.update({m: args[0].abs().mean((0, 2, 3))}))
                for m in layers
            ]
            yield
            for handle in handles:
                handle.remove()

        return watching()

    def __call__(self, group: "tp.Group") -> Tensor | None:
        parts = [self.seen[i.dep.layer].detach()[i.idxs] for i in group if i.dep.handler == tp.prune_conv_in_channels]
        return torch.stack(parts).mean(0) if parts else None


def test_activations_and_groups_that_a_criterion_says_nothing_of(small: nn.Module, x: Tensor) -> None:
    groups = open_groups(small, x)
    scores = criterion_scores(small, groups, ByActivation(), [x], lambda m, b: m(b).sum())
    stem, *_, last = scores.split([g.channels for g in groups])
    small.eval()
    expected = torch.relu(small.bn(small.stem(x)))
    assert stem.shape == (12,) and not torch.allclose(stem, expected.abs().mean((0, 2, 3)).double())  # two read it
    assert bool((last > scores[:-16].max()).all())  # only a linear layer reads these: they go last
    assert not any(m._forward_hooks for m in small.modules())


def test_torch_prunings_criterion_of_activations_needs_no_labels(small: nn.Module, x: Tensor) -> None:
    groups = open_groups(small, x)
    scores = criterion_scores(small, groups, tp.importance.ActivationImportance(normalizer=None), [x])
    small.eval()
    with torch.no_grad():
        expected = torch.relu(small.bn1(small.conv1(torch.relu(small.bn(small.stem(x)))))).abs().mean((0, 2, 3))
    parts = dict(zip([g.name for g in groups], scores.split([g.channels for g in groups])))
    assert torch.allclose(parts["conv1"], expected.double(), rtol=1e-5)
    assert not any("_importance" in vars(m) for m in small.modules())
    copy.deepcopy(small)


def test_a_group_whose_root_is_a_bare_parameter() -> None:
    """Heads, whose projection is a parameter of the attention: criteria look at the layer that reads them."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 16), layer, nn.Linear(16, 3))
    groups = open_groups(model, torch.randn(2, 5, 8))
    heads = next(g for g in groups if g.producers == ("1.self_attn.in_proj_weight",))
    scores = criterion_scores(model, [heads], tp.importance.MagnitudeImportance(normalizer=None))
    columns = layer.self_attn.out_proj.weight.detach().square().sum(0).view(4, 4).mean(1)
    assert torch.allclose(scores, columns.double(), rtol=1e-6)
    batch = [(torch.randn(2, 5, 8), torch.randint(0, 3, (2, 5)))]
    for name in "Random LAMP FPGM Taylor Hessian".split():
        criterion = getattr(tp.importance, f"{name}Importance")()
        found = criterion_scores(model, groups, criterion, batch, lambda m, b: F.cross_entropy(m(b[0])[0], b[1][0]))
        assert found.shape == (16 + 4 + 32,) and bool(found.isfinite().all())  # the stream, heads, inner features


@pytest.mark.parametrize("name", CRITERIA)
def test_convolutions_whose_weights_have_fewer_rows_than_channels(name: str) -> None:
    """Depthwise ones that make two channels of each, and transposed ones of groups: torch-pruning's own walk fails."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 12, 3, groups=6), nn.ReLU(), nn.Conv2d(12, 8, 1)),
        *(nn.ReLU(), nn.ConvTranspose2d(8, 12, 2, groups=4), nn.BatchNorm2d(12), nn.Conv2d(12, 5, 1), nn.Flatten()),
    )
    nn.init.uniform_(model[1].weight), nn.init.uniform_(model[7].weight)
    x = torch.randn(2, 3, 4, 4)
    groups = open_groups(model, x)
    assert [(g.channels, len(g.members)) for g in groups] == [(6, 5), (4, 5)]
    if name == "FPGM":  # it fails on any input side of groups
        groups = groups[:1]
    scores = criterion_scores(model, groups, CRITERIA[name](), [(x, torch.tensor([0, 1]))])
    assert len(scores) == sum(g.channels for g in groups) and bool(scores.isfinite().all()) and len(scores.unique()) > 2
    plain = criterion_scores(model, groups[:1], tp.importance.MagnitudeImportance(normalizer=None))
    first, norm, deep, last = (model[i].weight.detach().square() for i in (0, 1, 2, 4))
    units = (first.flatten(1).sum(1), norm, deep.reshape(6, -1).sum(1), last.sum((0, 2, 3)).view(6, 2).sum(1))
    assert torch.allclose(plain, torch.stack(units).mean(0).double(), rtol=1e-5)


def test_a_criterion_that_looks_first_at_fewer_channels_than_the_root_has() -> None:
    norm = nn.BatchNorm2d(4)
    nn.init.uniform_(norm.weight)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), norm, nn.ReLU(), nn.Conv2d(4, 2, 1))
    groups = open_groups(model, torch.randn(2, 3, 4, 4))
    assert groups[0].channels == 4 and groups[0].width == 16
    scores = criterion_scores(model, groups[:1], tp.importance.BNScaleImportance(normalizer=None))
    assert torch.allclose(scores, norm.weight.detach().double())


def test_units_of_several_channels_get_their_mean() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    groups = open_groups(model, torch.randn(2, 3, 4, 4))
    assert groups[0].channels == 4
    scores = criterion_scores(model, groups, tp.importance.MagnitudeImportance(1, "first", None))
    channels = model[0].weight.detach().abs().flatten(1).sum(1).double()
    assert torch.allclose(scores[:4], channels.view(4, 2).mean(1))


def failing(group: Any) -> Tensor:
    raise KeyError("weights")


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (tp.importance.TaylorImportance(), r"TaylorImportance fails on stem \(.*\): a criterion of grad.* batches="),
        (failing, r"failing fails on stem \('weights'\)"),
        (lambda group: torch.ones(3), r"must give stem a tensor of 12 scores, one a channel, not \[3\]"),
        (lambda group: 1.0, "not float"),
        (lambda group: torch.full((len(group[0].idxs),), torch.nan), "gives stem a score that is nan or infinite"),
        (lambda group: None, "gives no score for any group"),
        (tp.importance.RandomImportance, "importance=the class RandomImportance: pass a criterion, as tp.importance"),
        ("magnitude", "importance='magnitude': pass a criterion"),
    ],
)
def test_what_a_criterion_gets_wrong_is_said(small: nn.Module, x: Tensor, criterion: Any, message: str) -> None:
    with pytest.raises(DNALError, match=message):
        criterion_scores(small, open_groups(small, x), criterion)


def test_batches_that_have_no_loss_are_refused(small: nn.Module, x: Tensor) -> None:
    groups, taylor = open_groups(small, x), tp.importance.TaylorImportance()
    for batch in (x, (x, torch.rand(4)), (x, x, x)):
        with pytest.raises(DNALError, match=r"not \(inputs, labels\) of a classifier: .* loss=f\(model, batch\)"):
            criterion_scores(small, groups, taylor, [batch])
    with pytest.raises(DNALError, match="batches is empty"):
        criterion_scores(small, groups, taylor, [])
