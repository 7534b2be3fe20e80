"""Repair at the cut: each layer against a regression by least squares in float64, and what it is for."""

import copy
from typing import Any

import pytest
import torch
from conftest import CONV
from torch import Tensor, nn

from dnal_nni import Budget, DNALError, DNALPruner
from dnal_nni.modules.choices import Mixture
from dnal_nni.plan import Plan
from dnal_nni.session import Session
from dnal_nni.surgery.repair import STRENGTHS, repair, settle_norms


def halves(columns: Tensor) -> list[Tensor]:
    """The rows of every other example: ``[examples, places, n]`` to two times ``[rows, n]``."""
    return [columns[half::2].flatten(0, 1) for half in (0, 1)]


def ridge(x: Tensor, rest: Tensor, strength: float) -> Tensor:
    """The change of the weights, by ``lstsq`` of the system with the ridge as rows of its own: ``[n, channels]``."""
    root = (strength * x.square().sum(0).mean()).sqrt()
    rows = torch.cat([x, root * torch.eye(x.shape[1], dtype=x.dtype)])
    return torch.linalg.lstsq(rows, torch.cat([rest, rest.new_zeros(x.shape[1], rest.shape[1])])).solution


def expected(weight: Tensor, columns: Tensor, wanted: Tensor) -> tuple[Tensor, float]:
    """The weights ``[channels, n]`` that are best for columns ``[examples, places, n]``, and their error left out."""
    x, rest = halves(columns), halves(wanted - columns @ weight.T)
    total = sum(part.square().sum() for part in rest)

    def left(strength: float) -> float:
        return float(
            sum((rest[1 - i] - x[1 - i] @ ridge(x[i], rest[i], strength)).square().sum() for i in (0, 1)) / total
        )

    found, strength = min((left(s), s) for s in STRENGTHS)
    change = ridge(torch.cat(x), torch.cat(rest), strength)
    error = float(total / wanted.square().sum()) * min(found, 1.0)
    return (weight + change.T if found < 1 else weight), error


CASES: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(12, 6), nn.Linear(12, 6, bias=False), (40, 12)),
    "linear on a sequence": (nn.Linear(12, 6), nn.Linear(12, 6), (10, 5, 12)),
    "1 x 1": (nn.Conv2d(8, 5, 1, bias=False), nn.Conv2d(8, 5, 1, bias=False), (11, 8, 4, 4)),
    "3 x 3, strides and bias": (nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1), (30, 4, 7, 6)),
    "dilated": (
        nn.Conv2d(3, 4, 3, dilation=2, padding=(1, 2)),
        nn.Conv2d(3, 4, 3, dilation=2, padding=(1, 2)),
        (12, 3, 9, 8),
    ),
    "circular": (
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        (12, 3, 6, 6),
    ),
    "1 dimension": (nn.Conv1d(5, 4, 3, 2, 1), nn.Conv1d(5, 4, 3, 2, 1), (20, 5, 11)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_the_regression(name: str) -> None:
    torch.manual_seed(0)
    dense, slim, shape = copy.deepcopy(CASES[name])
    dense, slim, x = (
        nn.Sequential(dense).double(),
        nn.Sequential(slim).double(),
        torch.randn(shape, dtype=torch.float64),
    )
    layer, like = slim[0], dense[0]
    slim[0].weight.data = dense[0].weight.detach() + 0.1 * torch.randn_like(dense[0].weight)
    with torch.no_grad():
        wanted = dense(x)
    before = copy.deepcopy(layer)
    if isinstance(layer, nn.Linear):
        columns, wanted = x.reshape(len(x), -1, shape[-1]), wanted.reshape(len(x), -1, 6)
    else:
        # the columns of a convolution, one by one: what it gives with a single weight of one
        columns = torch.stack(
            [
                _with_weight(before, one.view_as(before.weight[:1]))(x).detach()[:, 0].flatten(1)
                for one in torch.eye(before.weight[0].numel())
            ],
            2,
        )
        wanted = wanted.flatten(2).transpose(1, 2)
    weight = before.weight.detach().flatten(1)
    if before.bias is not None:
        columns = torch.cat([columns, torch.ones_like(columns[..., :1])], 2)
        weight = torch.cat([weight, before.bias.detach().unsqueeze(1)], 1)
    errors = repair(dense, slim, {}, x)
    best, error = expected(weight, columns, wanted)
    got = layer.weight.detach().flatten(1)
    got = got if layer.bias is None else torch.cat([got, layer.bias.detach().unsqueeze(1)], 1)
    torch.testing.assert_close(got, best, rtol=0, atol=1e-9)
    assert errors["0"][1] == pytest.approx(error, rel=1e-6, abs=1e-12)
    folded = slim(x).detach()
    folded = folded.reshape(wanted.shape) if isinstance(layer, nn.Linear) else folded.flatten(2).transpose(1, 2)
    torch.testing.assert_close(folded, columns @ best.T, rtol=0, atol=1e-9)
    assert torch.equal(like.weight, dense[0].weight)


def _with_weight(layer: Any, weight: Tensor) -> nn.Module:
    copied = copy.deepcopy(layer)
    copied.weight = nn.Parameter(weight.to(torch.float64))
    copied.bias = None
    copied.out_channels = 1
    return copied


class Twins(nn.Module):
    """Channels 4 to 7 of ``a`` are those from 0 to 3 again; behind: a norm, a depthwise layer, one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.b = nn.Conv2d(8, 6, 3, padding=1)
        self.twice = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 5)
        with torch.no_grad():
            for tensor in (self.a.weight, self.depthwise.weight, self.depthwise.bias):
                tensor[4:] = tensor[:4]
            self.norm.running_mean.copy_(torch.randn(4).repeat(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.depthwise(self.norm(self.a(x)).relu())).relu().mean((2, 3))
        return self.fc(self.twice(self.twice(x).relu()))


def twins(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    return Twins().to(dtype).eval(), torch.randn(64, 3, 6, 6, dtype=dtype)


def half(pruner: DNALPruner) -> nn.Module:
    pruner.harden({"a": torch.arange(8) < 4})
    return pruner.speedup()


def test_what_another_channel_repeats_comes_back() -> None:
    model, x = twins()
    wanted = model(x).detach()
    pruner = DNALPruner(model, CONV, dummy_input=x[:2])
    slim = half(pruner)
    lost = float((slim(x) - wanted).detach().abs().max())
    still = {name: copy.deepcopy(slim.get_submodule(name).state_dict()) for name in ("a", "depthwise", "twice")}
    errors = pruner.repair(slim, x)
    assert float((slim(x) - wanted).detach().abs().max()) < 1e-3 * lost
    before, after = errors["b"]
    assert before > 0.1 and after < 1e-6 * before
    assert set(errors) == {"a", "b", "fc"} and not slim.training
    for name, tensors in still.items():
        torch.testing.assert_close(slim.get_submodule(name).state_dict(), tensors, rtol=0, atol=1e-12)


class Norms(nn.Module):
    """Norms of two kinds, one without weights, one that runs twice, and two that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Linear(6, 6)
        self.norm, self.twice = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.bare = nn.BatchNorm2d(6, affine=False)
        self.flat, self.tied = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.tied.weight = nn.BatchNorm1d(6).weight
        self.other = nn.BatchNorm1d(6)
        self.other.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.bare(self.twice(self.twice(self.norm(self.a(x)).relu()))).mean((2, 3))
        return self.other(self.tied(self.flat(self.b(x)).relu()))


def test_settled_norms_compute_in_train_mode_what_all_compute_in_eval_mode() -> None:
    torch.manual_seed(5)
    model, x = Norms().double(), 2 + 3 * torch.randn(50, 3, 5, 5, dtype=torch.float64)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.copy_(torch.randn(6))
            norm.running_var.copy_(torch.rand(6) + 0.1)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    model.eval()
    still = {name: copy.deepcopy(model.get_submodule(name).state_dict()) for name in ("twice", "bare", "tied", "other")}
    wanted = model(x).detach()
    settle_norms(model, lambda: model(x))
    torch.testing.assert_close(model(x).detach(), wanted, rtol=0, atol=1e-10)
    for name, tensors in still.items():
        torch.testing.assert_close(model.get_submodule(name).state_dict(), tensors, rtol=0, atol=0)
    a, eval_mode = model.a(x), model.norm(model.a(x)).detach()
    torch.testing.assert_close(model.norm.running_mean, a.mean((0, 2, 3)).detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(model.norm.running_var, a.var((0, 2, 3)).detach(), rtol=1e-10, atol=0)
    model.norm.train()
    bias, variance = model.norm.bias.detach().view(6, 1, 1), a.var((0, 2, 3)).detach().view(6, 1, 1)
    of_n = ((variance + 1e-5) / (variance * 449 / 450 + 1e-5)).sqrt()  # in train mode torch divides by n = 450
    torch.testing.assert_close(model.norm(a).detach(), (eval_mode - bias) * of_n + bias, rtol=0, atol=1e-10)


def test_the_aim_is_the_network_ahead_of_the_search() -> None:
    model, x = twins(torch.float32)
    model.train()
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruner = DNALPruner(model, CONV, dummy_input=x[:2], budget=Budget(flops=0.6))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with pruner.search(4, optimizer=optimizer, progress=False) as search:
        for _ in range(4):
            search.step(model(x).square().mean())
    slim = pruner.speedup()
    moved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    back = pruner.plan.slim(model, {})
    search.restore(back)
    torch.testing.assert_close(back.state_dict(), first, rtol=0, atol=0)
    pruner.repair(slim, x)
    torch.testing.assert_close(model.state_dict(), moved, rtol=0, atol=0)
    assert slim.training and model.training


def test_what_repair_asks_for(x: Tensor) -> None:
    model, images = twins(torch.float32)
    pruner = DNALPruner(model, CONV, dummy_input=images[:2])
    with pytest.raises(DNALError, match="repair: nothing has been cut yet"):
        pruner.repair(model, images)
    slim = half(pruner)
    with pytest.raises(DNALError, match=r"repair\(inputs\): give two examples or more"):
        pruner.repair(slim, images[:1])
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(DNALError, match=r"repair\(slim\): its a is not what the cut left: pass"):
        pruner.repair(pruner.plan.slim(model, {}), images)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    supernet = nn.Sequential(nn.Conv2d(1, 6, 3), Mixture({n: nn.Conv2d(6, 6, 1) for n in ("one", "two")}, "mix"))
    pruner = DNALPruner(nn.Sequential(supernet, nn.Conv2d(6, 4, 1)), CONV, dummy_input=x)
    pruner.harden({})
    with pytest.raises(DNALError, match="repair: the model is a supernet"):
        pruner.repair(pruner.speedup(), x)


def test_very_wide_layers_stay() -> None:
    """A matrix of the products of all inputs of VGG's first linear layer would take 5 GB, several times."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 28 * 28, 10))
    x = torch.randn(16, 3, 32, 32)
    session = Session(model, Plan.of(model, x[:1], budget=Budget(flops=0.5)))
    session.choose(batches=[x])
    slim = session.speedup()
    before = slim[4].weight.clone()
    errors = session.repair(slim, x)
    assert "2" in errors and "4" not in errors and torch.equal(slim[4].weight, before)


def test_a_layer_of_two_names_is_fitted_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(6, 24), nn.Linear(24, 4)
            self.layers = nn.ModuleList([self.first, nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), self.last])
            self.stem = self.layers[2]

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model, x = Twice(), torch.randn(256, 6)
    session = Session(model, Plan.of(model, x[:1], budget=Budget(flops=0.5)))
    session.choose(batches=[x])
    slim = session.speedup()
    errors = session.repair(slim, x)
    assert set(errors) == {"first", "layers.2", "last"}
    assert errors["last"][1] < errors["last"][0]
