"""A search without NNI: what a front end gets from `Plan` and `Session`, and that DNALPruner is one of them."""

import copy
import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CONV
from torch import Tensor, nn

from dnal_nni import Budget, DNALError, DNALPruner, measure, report_of
from dnal_nni.plan import Method, Plan
from dnal_nni.search.settings import Setting
from dnal_nni.session import Session

Batches = list[tuple[Tensor, Tensor]]
HALF = Budget(flops=0.5)
CONVS = ("stem", "conv1", "conv2", "last")


def run(front: Any, model: nn.Module, batches: Batches, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    with front.search(24, optimizer=optimizer, progress=False) as search:
        for images, labels in batches * 3:
            search.step(F.cross_entropy(model(images), labels))
    slim: nn.Module = front.speedup()
    return slim


def test_neither_the_plan_nor_the_session_imports_nni() -> None:
    code = """
import sys
sys.modules["nni"] = sys.modules["torch_pruning"] = None  # whoever imports them now fails
import torch
from dnal_nni import Budget
from dnal_nni.plan import Plan
from dnal_nni.session import Session
from torch import nn
model, x = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.randn(2, 1, 8, 8)
session = Session(model, Plan.of(model, x, budget=Budget(flops=0.5)))
with session.search(4, progress=False) as search:
    for _ in range(4):
        search.step(model(x).square().mean())
assert session.speedup()[0].out_channels == 4
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_a_session_finds_what_a_pruner_finds(small: nn.Module, x: Tensor, batches: Batches, preset: Any) -> None:
    twin = copy.deepcopy(small)
    learning = preset == "default"
    pruner = DNALPruner(small, CONV, dummy_input=x, budget=HALF, preset=preset, lambda_=0.1)
    expected = run(pruner, small, batches, torch.optim.SGD(small.parameters(), 0.01) if learning else None)
    selected = dict.fromkeys(CONVS, Setting())
    session = Session(twin, Plan.of(twin, x, budget=HALF, selected=selected), Method(preset, 0.1))
    slim = run(session, twin, batches, torch.optim.SGD(twin.parameters(), 0.01) if learning else None)
    assert all(
        torch.equal(a, b) for a, b in zip(expected.state_dict().values(), slim.state_dict().values(), strict=True)
    )
    assert session.report.after == pruner.report.after and session.report.groups == pruner.report.groups
    assert set(session.report.seconds) == {"build", "search", "cut"}


def test_a_checkpoint_is_the_same_in_both(small: nn.Module, x: Tensor, batches: Batches, tmp_path: Path) -> None:
    model, twin = copy.deepcopy(small), copy.deepcopy(small)
    session = Session(model, Plan.of(model, x, budget=HALF, selected=dict.fromkeys(CONVS, Setting())))
    with session.search(16, progress=False) as search:
        for images, labels in batches:
            search.step(F.cross_entropy(model(images), labels))
        session.save_checkpoint(tmp_path / "state")
        for images, labels in batches:
            search.step(F.cross_entropy(model(images), labels))
    pruner = DNALPruner(twin, CONV, dummy_input=x, budget=HALF)
    pruner.load_checkpoint(tmp_path / "state")
    with pruner.search(16, progress=False) as search:
        assert search.done == 8
        for images, labels in batches:
            search.step(F.cross_entropy(twin(images), labels))
    pruner.harden()
    assert session.harden().keys() == pruner.gates.keys()
    assert all(torch.equal(gate.mask, pruner.gates[name].mask) for name, gate in session.gates.items())


def test_gates_come_off_and_on_again(small: nn.Module, x: Tensor, batches: Batches) -> None:
    before = copy.deepcopy(small.state_dict())
    session = Session(small, Plan.of(small, x, budget=HALF))
    with pytest.raises(DNALError, match="already has gates"):
        Plan.of(small, x)
    with pytest.raises(DNALError, match="already has gates"):
        Session(small, session.plan)
    run(session, small, batches, torch.optim.SGD(small.parameters(), 0.1))
    session.detach()
    after = small.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    slim = run(session, small, batches)  # on again
    assert measure(slim, x).flops / session.report.before.flops == pytest.approx(0.5, rel=0.06)


def test_one_plan_serves_several_budgets(small: nn.Module, x: Tensor, batches: Batches) -> None:
    plan = Plan.of(small, x)
    dense = measure(small, x).flops
    for share in (0.6, 0.4):
        session = Session(small, plan.with_budget(Budget(flops=share)))
        assert measure(run(session, small, batches), x).flops == pytest.approx(share * dense, abs=0.03 * dense)
        session.detach()
    with pytest.raises(DNALError, match="pass a Budget"):
        plan.with_budget(0.5)  # type: ignore[arg-type]


def test_a_plan_is_as_good_for_a_copy(small: nn.Module, x: Tensor) -> None:
    plan = Plan.of(small, x, selected={"conv1": Setting(), "stem": Setting(sparse_ratio=0.25)}, channel_multiple=2)
    assert [group.name for group in plan.active] == ["conv1"]  # conv2 goes with the stem
    assert plan.objective is None and plan.limits.multiples == [2]
    units = torch.arange(8) < 4
    keep = plan.by_group(units)
    for slim in (plan.slim(small, units), plan.slim(copy.deepcopy(small), keep)):
        assert slim.conv1.out_channels == 4 and plan.measured(slim, small) == measure(slim, x)
    assert plan.slim(small, {}).conv1.out_channels == 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.budget = HALF


def test_ratios_and_thresholds_rule_without_nni(small: nn.Module, x: Tensor, batches: Batches) -> None:
    for setting, method in ((Setting(sparse_ratio=0.25), None), (Setting(sparse_threshold=0.5), Method("paper", 1e6))):
        model = copy.deepcopy(small)
        session = Session(model, Plan.of(model, x, selected=dict.fromkeys(CONVS, setting)), method)
        slim = run(session, model, batches)
        kept = [slim.get_submodule(name).out_channels for name in CONVS]
        assert kept == ([9, 6, 9, 12] if method is None else [1, 1, 1, 1])
    with pytest.raises(DNALError, match="a threshold sets no size"):
        Plan.of(small, x, budget=HALF, selected=dict.fromkeys(CONVS, Setting(sparse_threshold=0.5)))


def test_errors_come_ahead_of_the_work(small: nn.Module, x: Tensor) -> None:
    wrong: Any = "half"
    with pytest.raises(DNALError, match="budget='half': pass a Budget"):
        Plan.of(small, x, budget=wrong)
    with pytest.raises(DNALError, match="preset='half': choose"):
        Method(wrong)
    session = Session(small, Plan.of(small, x))
    with pytest.raises(DNALError, match="holds no parameter of the model"):
        session.search(3, optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1))
    with pytest.raises(DNALError, match="nothing has been learned yet"):
        session.speedup()
    with pytest.raises(DNALError, match="no report yet"):
        session.report  # noqa: B018


def test_a_group_keeps_what_the_model_needs() -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.conv(x)).mean((2, 3), keepdim=True).squeeze())  # one channel: no dimension

    model = Squeezed()
    session = Session(model, Plan.of(model, torch.randn(2, 1, 8, 8)))
    with pytest.raises(DNALError, match="conv would keep 1 channels, with which the model does not run; keep 2"):
        session.harden({"conv": torch.arange(8) < 1})
    session.harden({"conv": torch.arange(8) < 2})
    assert session.speedup().conv.out_channels == 2


def test_a_cut_network_has_its_report(small: nn.Module, x: Tensor) -> None:
    session = Session(small, Plan.of(small, x))
    session.harden({})
    slim = session.speedup()
    assert report_of(slim) is session.report
    for other, said in ((small, "report_of(a Small)"), ("slim", "report_of('slim')")):
        with pytest.raises(DNALError, match=re.escape(said)):
            report_of(other)
