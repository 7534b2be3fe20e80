"""What a removal costs when the layers behind make up for it, against least squares and against what is known."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dnal_nni import Budget, DNALError, decisions, measure
from dnal_nni.modules.running import call
from dnal_nni.plan import Plan
from dnal_nni.search import fisher
from dnal_nni.search.bypass import sole_ways
from dnal_nni.search.criteria import Loss
from dnal_nni.search.surgeon import removal_losses, worth
from dnal_nni.session import Session
from dnal_nni.surgery.inject import detach


def session_of(model: nn.Module, example: Tensor, flops: float = 0.5) -> Session:
    return Session(model, Plan.of(model, example, budget=Budget(flops=flops)))


def losses_of(session: Session, batches: list[Tensor], loss: Loss | None = None) -> Tensor:
    return removal_losses(session.model, session.plan.active, list(session.gates.values()), batches, loss)


# gradients whose products add up to the identity
SIGNS = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]).repeat(100, 1)


def squared_error(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) * SIGNS).sum() / len(x)


def two_layers(width: int, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, outputs))


def test_the_cheapest_unit_costs_what_least_squares_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher, "RIDGE", 1e-9)
    model, x = two_layers(8), torch.randn(400, 6)
    session = session_of(model, x[:1])
    losses = losses_of(session, [x], loss=squared_error)
    with torch.no_grad():
        hidden = model[:2](x).double()
        centred, wanted = hidden - hidden.mean(0), model(x).double()
        wanted = wanted - wanted.mean(0)
        errors = []
        for unit in range(8):
            rest = torch.cat([centred[:, :unit], centred[:, unit + 1 :]], 1)
            errors.append(0.5 * float((wanted - rest @ torch.linalg.lstsq(rest, wanted).solution).square().sum()) / 400)
    assert float(losses.min()) == pytest.approx(min(errors), rel=0.02)
    assert int(losses.argmin()) == min(range(8), key=errors.__getitem__)


def test_of_two_units_one_makes_up_for_what_is_correlated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher, "RIDGE", 1e-9)
    model, x = two_layers(2), torch.randn(400, 6)
    losses = losses_of(session_of(model, x[:1]), [x], loss=squared_error)
    hidden, weight = model[:2](x).detach().double(), model[2].weight.detach().double()
    first = min(
        float((1 - hidden.T.corrcoef()[0, 1] ** 2) * hidden[:, unit].var() * weight[:, unit].square().sum())
        for unit in range(2)
    )
    assert float(losses.min()) == pytest.approx(0.5 * first, rel=0.02)


def test_one_of_two_equal_units_costs_nothing_and_both_cost_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher, "RIDGE", 1e-9)
    model = two_layers(8)
    with torch.no_grad():
        model[0].weight[5] = model[0].weight[2]
        model[0].bias[5] = model[0].bias[2]
        model[2].weight[:, [2, 5]] = 1.0
    session = session_of(model, torch.randn(1, 6))
    losses = losses_of(session, [torch.randn(300, 6)])
    twins = sorted([float(losses[2]), float(losses[5])])
    assert twins[0] < 1e-4 * twins[1] and twins[1] == pytest.approx(float(losses.max()))


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_with_all_their_columns(kernel: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, kernel), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(64, 3, 10, 10)
    model(x)
    with torch.no_grad():
        model[2].weight[:, [1, 7]] = 0  # read by nobody
    session = session_of(model, x[:1])
    first = session.plan.by_group(losses_of(session, [x[:32], x[32:]]))["0"]
    assert set(first.argsort()[:2].tolist()) == {1, 7}
    assert float(first[[1, 7]].max()) < 1e-6 * float(first.max())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.lstm, self.last = nn.Linear(5, 16), nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(F.relu(self.first(x)))[0][:, -1])


def test_groups_that_other_layers_read_go_by_their_gates() -> None:
    model, x = Recurrent(), torch.randn(40, 6, 5)
    with torch.no_grad():
        model.lstm.weight_ih_l0[:, 3] = 0
    session = session_of(model, x[:1], 0.7)
    losses = losses_of(session, [x])
    assert int(losses.argmin()) == 3 and float(losses[3]) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_of_the_model_changes_and_frozen_weights_will_do() -> None:
    model, x = two_layers(8).train(), torch.randn(64, 6)
    model.requires_grad_(False)
    session = session_of(model, x[:1])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    again = [losses_of(session, [x[:32], x[32:]]) for _ in range(2)]
    assert torch.equal(*again) and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training and not any(p.requires_grad for p in model.parameters())


def test_choose_hits_the_budget_and_repair_brings_the_function_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 48), nn.Linear(48, 48), nn.Linear(48, 4))  # nothing of a rank above 6
    x = torch.randn(512, 6)
    session = session_of(model, x[:1], 0.25)
    session.choose(batches=[x])
    slim = session.speedup()
    session.repair(slim, x)
    session.detach()
    assert session.report.after.flops / session.report.before.flops == pytest.approx(0.25, rel=0.01)
    with torch.no_grad():
        error = (slim(x) - model(x)).square().mean() / model(x).square().mean()
    assert float(error) < 1e-6


@functools.cache
def chain() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A plain chain of layers that has learned to read digits, and all of these."""
    torch.manual_seed(1)
    data, layers = load_digits(), list[nn.Module]()
    images, labels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)
    for inputs in (1, 32, 32, 32):
        layers += [nn.Conv2d(inputs, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    layers.insert(6, nn.MaxPool2d(2))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for batch in torch.randperm(1200).repeat(4).split(64):
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), images, labels


def test_units_of_a_sole_way_count_for_more_the_less_of_it_is_left() -> None:
    losses = [0.1, 0.4, 0.2, 0.3, 5.0, 0.0, 3.0]
    found = worth(torch.tensor(losses, dtype=torch.float64), torch.full((7,), 2.0), [4, 3], [True, False])
    gone = [0.0, 0.6, 0.1, 0.3]  # ahead of each in the first group
    expected = [loss / (1 - part) / 2 for loss, part in zip(losses, gone)] + [loss / 2 for loss in losses[4:]]
    assert found.tolist() == pytest.approx(expected)


def test_a_dear_layer_that_all_passes_through_keeps_some_and_a_branch_need_not() -> None:
    """One layer costs twenty times as much: it alone would go, to the last channel."""
    each = torch.linspace(0.5, 1.5, 64, dtype=torch.float64)
    costs = torch.cat([torch.full((64,), cost) for cost in (1.0, 20.0, 1.0)]).double()

    def left(sole: bool) -> int:
        """Of the dear one, where half of all that there is stays."""
        stay = worth(each.repeat(3), costs, [64, 64, 64], [True, sole, True]).argsort(descending=True)[:96]
        return int(((stay >= 64) & (stay < 128)).sum())

    assert left(False) == 0 and left(True) >= 1


def test_zero_losses_have_an_order_without_nan() -> None:
    assert worth(torch.zeros(5).double(), torch.ones(5), [2, 3], [True, False]).tolist() == [0.0] * 5


def of_labels(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def of_a_weight(model: nn.Module, batch: Any) -> Tensor:
    return model.head.weight.square().sum()


class Ways(nn.Module):
    """A stem, a block beside its shortcut, two layers whose channels are concatenated, and one that reads them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)
        self.neck, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.outer(F.relu(self.inner(x))))
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        return self.head(F.relu(self.neck(x)))


@pytest.mark.parametrize("form", ["inputs", "one of one", "with labels", "a loss without the model"])
def test_past_which_groups_nothing_leads(form: str) -> None:
    model, x = Ways().train(), torch.randn(6, 6)
    session = session_of(model, x[:1])
    batches: list[Any] = list(x.split(1)) if form == "one of one" else [x]
    run: Callable[[nn.Module, Any], Any] = call
    if form == "with labels":
        batches, run = [(x, torch.arange(6) % 3)], of_labels
    if form == "a loss without the model":
        run = of_a_weight
    found = sole_ways(model, session.plan.active, list(session.gates.values()), batches, run)
    sole = {group.name for group, alone in zip(session.plan.active, found) if alone}
    assert sole == (set() if form == "a loss without the model" else {"stem", "neck"})
    assert model.training and not model._forward_hooks
    with torch.no_grad():
        assert torch.equal(model(x), Ways()(x))  # with all gates open


def test_a_model_that_insists_on_what_a_closed_group_gives() -> None:
    class Insists(Ways):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            assert bool(x.any())
            return self.head(F.relu(self.inner(x)))

    model, x = Insists(), torch.randn(6, 6)
    session = session_of(model, x[:1], 0.3)
    sole = sole_ways(model, session.plan.active, list(session.gates.values()), [x])
    assert dict(zip(session.gates, sole))["stem"] is False
    session.choose(batches=[x])
    session.speedup()


@pytest.mark.parametrize("budget, times", [(0.6, 1), (0.5, 1), (0.3, 2)])
def test_below_half_it_is_weighed_anew_halfway(budget: float, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def look(model: nn.Module, groups: Any, *rest: Any) -> Tensor:
        seen.append(measure(copy_without_gates(model), images[:1]).flops)
        return removal_losses(model, groups, *rest)

    def copy_without_gates(model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        detach(model)
        return model

    monkeypatch.setattr(decisions, "removal_losses", look)
    model, images, _ = chain()
    session = session_of(model, images[:1], budget)
    session.choose(batches=[images[:128]])
    session.detach()
    shares = [flops / seen[0] for flops in seen]
    assert shares == pytest.approx([1.0, budget**0.5][:times], rel=0.02)


@pytest.mark.parametrize("form", ["as many", "a smaller last one", "one of one", "dicts", "with labels"])
def test_batches_of_every_form_are_weighed_twice(form: str) -> None:
    model, images, labels = chain()
    loss: Loss | None = None
    batches: list[Any] = list(images[:96].split({"a smaller last one": 40, "one of one": 1}.get(form, 32)))
    if form == "dicts":
        batches = [{"input": x} for x in batches]
    if form == "with labels":
        batches = list(zip(batches, labels.split(32)))
        loss = of_labels
    session = session_of(model, images[:1], 0.1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chance = torch.get_rng_state()
    keep = session.choose(batches=batches, loss=loss)
    again = session.choose(batches=batches, loss=loss)
    assert all(torch.equal(mask, again[name]) for name, mask in keep.items())
    assert torch.equal(chance, torch.get_rng_state()) and not model.training
    session.speedup()
    session.detach()
    assert session.report.after.flops / session.report.before.flops == pytest.approx(0.1, rel=0.02)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_of_one_batch_size_is_repaired_halfway_by_its_first_batch() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = chain()[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x.view(8, 1, 8, 8))

    torch.manual_seed(0)
    session = session_of(Fixed().eval(), torch.randn(8, 1, 8, 8), 0.1)
    assert session.choose(batches=list(torch.randn(32, 1, 8, 8).split(8)))
    session.detach()


def test_refusals() -> None:
    model = two_layers(8)
    session = session_of(model, torch.randn(1, 6))
    with pytest.raises(DNALError, match=r"choose\(\): give batches=\[inputs\]"):
        session.choose()
    with pytest.raises(DNALError, match="there are none; some hundred examples"):
        session.choose(batches=[])
    with pytest.raises(DNALError, match=r"rejects.*\[4, 7\]"):
        session.choose(batches=[torch.randn(4, 7)])
    with pytest.raises(DNALError, match="rejects"):
        session.choose(batches=[(torch.randn(4, 6), torch.zeros(4))])
    with pytest.raises(DNALError, match="what reaches 2, or its gradient, is nan or infinite"):
        session.choose(batches=[torch.full((4, 6), torch.nan)])
    assert session.keep is None


def test_a_model_that_cannot_be_trained_is_told_of() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.sigmoid(self.first(x))
            x += 1  # of which the gradient of the sigmoid was kept
            return self.last(x)

    session = session_of(InPlace(), torch.randn(1, 6))
    with pytest.raises(DNALError, match="no gradient comes back through the model.*modified by an inplace operation"):
        session.choose(batches=[torch.randn(40, 6)])


def test_inputs_with_means_far_above_their_spread() -> None:
    model = two_layers(8).double()
    with torch.no_grad():
        model[0].weight *= 1e-4
        model[0].bias += 3.0
    session = session_of(model, torch.randn(1, 6).double())
    assert bool(losses_of(session, [torch.randn(300, 6).double()]).isfinite().all())
