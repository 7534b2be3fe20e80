"""torch-pruning in DNALPruner: its graphs as the source, its criteria to choose by or start from, our groups as its."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torch_pruning as tp
import torchvision
from cifar_models import MODELS
from conftest import CONV
from torch import Tensor, nn
from tp_graphs import PruneNormalised, unregistered

from dnal_nni import Budget, DNALError, DNALPruner, load_compressed, measure, save_compressed, speedup
from dnal_nni.modules.gates import GateState

ALL = [{"op_types": ["Conv2d", "Linear"]}]
TEN: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda build=build: build(10, 0.5)) for name, build in MODELS.items() if name != "resnet56"},
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 2, 2), 16, num_classes=10),
    "lcnet_050": lambda: timm.create_model("lcnet_050"),
    **{
        name: (lambda name=name: torchvision.models.get_model(name, weights=None))
        for name in ("squeezenet1_1", "mnasnet0_5", "mobilenet_v3_small", "shufflenet_v2_x0_5")
    },
    "dpn68": lambda: timm.create_model("dpn68"),
}
UNTRACED = ("shufflenet_v2_x0_5", "dpn68")


def chosen(name: str, fraction: float) -> float:
    """The share of the FLOPs that choose() leaves, in two lines."""
    torch.manual_seed(0)
    size = 32 if name in MODELS else 64
    model, x = TEN[name](), torch.randn(1, 3, size, size)
    pruner = DNALPruner(model, ALL, dummy_input=x, budget=Budget(flops=fraction))
    pruner.choose(tp.importance.MagnitudeImportance())
    slim = pruner.speedup()
    pruner.unwrap_model()
    return measure(slim, x).flops / measure(model, x).flops


@pytest.mark.parametrize("name", ["resnet20", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_choose_hits_the_budget_on_any_network(name: str) -> None:
    fraction = (0.3, 0.5, 0.7)[list(TEN).index(name) % 3]
    assert chosen(name, fraction) == pytest.approx(fraction, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("name", TEN)
def test_choose_hits_every_budget(name: str, fraction: float) -> None:
    assert chosen(name, fraction) == pytest.approx(fraction, rel=0.01)


@pytest.mark.filterwarnings("ignore:Maximum recursive depth")
@pytest.mark.parametrize("name", UNTRACED)
def test_two_of_the_ten_are_not_for_torch_prunings_graph(name: str) -> None:
    model, x = TEN[name](), torch.randn(1, 3, 64, 64)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ZeroDivisionError, TypeError)):
        tp.DependencyGraph().build_dependency(copy.deepcopy(model), x, verbose=False)
    with pytest.raises(DNALError, match="torch-pruning cannot build its graph of .*: leave graph= out"):
        DNALPruner(model, ALL, dummy_input=x, graph="torch-pruning")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# -- criteria ---------------------------------------------------------------------------------------------------------

HALF = Budget(flops=0.5)


def pruner_of(model: nn.Module, x: Tensor, **options: Any) -> DNALPruner:
    return DNALPruner(model, CONV, dummy_input=x, **{"budget": HALF, **options})


def test_what_is_chosen_are_the_units_with_the_lowest_scores(small: nn.Module, x: Tensor) -> None:
    pruner = pruner_of(small, x, budget=None)
    with pytest.raises(DNALError, match=r"choose\(\) needs a budget, or a sparse_ratio in the config_list"):
        pruner.choose(tp.importance.RandomImportance())
    pruner.unwrap_model()
    pruner = DNALPruner(small, [{"op_types": ["Conv2d"], "sparse_ratio": 0.25}], dummy_input=x)
    masks = pruner.choose(tp.importance.MagnitudeImportance(1, "first", None))
    weights = small.last.weight.detach().abs().flatten(1).sum(1)
    gone = masks["last"]["weight"].flatten(1).amax(1) == 0
    assert sorted(gone.nonzero().flatten().tolist()) == sorted(weights.argsort()[:4].tolist())
    assert all(gate.state is GateState.HARD for gate in pruner.gates.values())
    slim = pruner.speedup()
    assert slim.last.out_channels == 12 and slim.stem.out_channels == 9
    assert torch.allclose(slim.eval()(x), small.eval()(x), atol=1e-5)
    assert pruner.report.decided is None and "choose" in pruner.report.seconds


def test_a_criterion_of_gradients_gets_them_from_batches_or_from_the_user(
    small: nn.Module, x: Tensor, batches: list[tuple[Tensor, Tensor]]
) -> None:
    pruner = pruner_of(small, x)
    with pytest.raises(DNALError, match="needs batches="):
        pruner.choose(tp.importance.TaylorImportance())
    one = pruner.choose(tp.importance.TaylorImportance(), batches[:2])
    assert all(p.grad is None for p in small.parameters())
    pruner.unwrap_model()
    small.eval()
    for images, labels in batches[:2]:
        F.cross_entropy(small(images), labels).backward()
    again = pruner_of(small, x).choose(tp.importance.TaylorImportance())
    assert all(torch.equal(one[layer]["weight"], again[layer]["weight"]) for layer in one)
    assert any(not bool(mask["weight"].all()) for mask in one.values())


def test_a_search_starts_from_a_criterion(
    small: nn.Module, x: Tensor, batches: list[tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    pruner = pruner_of(small, x, importance=tp.importance.MagnitudeImportance(1, "first", None))
    norms = [small.get_submodule(group.name).weight.detach().abs().flatten(1).sum(1) for group in pruner.plan.active]
    with pruner.search(8, progress=False) as search:
        start = search.scores.value.clone()
        for images, labels in batches:
            search.step(F.cross_entropy(small(images), labels))
    assert torch.allclose(start, torch.cat([n / n.mean() for n in norms]).double(), rtol=1e-6)
    assert pruner.state_dict()["settings"]["importance"] == "GroupMagnitudeImportance"[5:]
    pruner.save_checkpoint(tmp_path / "search.safetensors")
    pruner.load_checkpoint(tmp_path / "search.safetensors")
    assert measure(pruner.speedup(), x).flops < 0.55 * pruner.report.before.flops


def test_what_no_search_can_start_from_is_refused(small: nn.Module, x: Tensor) -> None:
    criterion = tp.importance.MagnitudeImportance()
    with pytest.raises(DNALError, match="importance= goes with preset='default'"):
        pruner_of(small, x, importance=criterion, preset="paper")
    with pytest.raises(DNALError, match="importance='magnitude': pass a criterion, as tp.importance.Magnitude"):
        pruner_of(small, x, importance="magnitude")
    pruner = pruner_of(small, x, importance=criterion, budget=None)
    with pytest.raises(DNALError, match=r"importance= needs a budget, or a sparse_ratio"):
        pruner.search(3)


def test_groups_are_handed_out_as_torch_prunings(small: nn.Module, x: Tensor) -> None:
    pruner = pruner_of(small, x)
    found = pruner.dependency_groups()
    assert [g[0].dep.target.module for g in found] == [small.get_submodule(g.name) for g in pruner.plan.active]
    scores = [tp.importance.MagnitudeImportance()(group) for group in found]
    assert [len(score) for score in scores] == [len(gate.s) for gate in pruner.gates.values()]


# -- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mine", [True, False])
def test_a_search_over_torch_prunings_groups(
    small: nn.Module, x: Tensor, batches: list[tuple[Tensor, Tensor]], mine: bool
) -> None:
    graph = tp.DependencyGraph().build_dependency(small, x, verbose=False) if mine else "torch-pruning"
    pruner = pruner_of(small, x, graph=graph)
    assert [g.frozen is None for g in pruner.groups] == [True, True, True, False]
    assert pruner.groups[0].source == " (by torch-pruning's graph)"
    with pruner.search(20, progress=False) as search:
        for i in range(20):
            images, labels = batches[i % len(batches)]
            search.step(F.cross_entropy(small(images), labels))
    slim = pruner.speedup()
    assert torch.allclose(slim.eval()(x), small.eval()(x), atol=1e-5)
    assert pruner.report.after.flops <= 0.55 * pruner.report.before.flops


def test_masks_of_nni_are_cut_along_torch_prunings_groups(small: nn.Module, x: Tensor) -> None:
    keep = torch.ones_like(small.conv1.weight)
    keep[::2] = 0
    graph = tp.DependencyGraph().build_dependency(small, x, verbose=False)
    slim = speedup(small, {"conv1": {"weight": keep}}, x, graph=graph)
    assert slim.conv1.out_channels == slim.conv2.in_channels == 4
    with pytest.raises(DNALError, match="graph of another model"):
        speedup(copy.deepcopy(small), {"conv1": {"weight": keep}}, x, graph=graph)


class Normalised(nn.Module):
    """Every row divided by its length, then scaled: torch-pruning's example of a custom layer, written anew."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.scale, self.shift = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().sum(1, keepdim=True).sqrt().clamp(min=1e-3) * self.scale + self.shift


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.middle = Normalised(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.middle(torch.relu(self.fc2(torch.relu(self.fc1(x))))))


LOAD = """
import sys
sys.modules["torch_pruning"] = None  # as if it were not installed
sys.path.insert(0, {folder!r})
import torch
from dense import Dense
from dnal_nni import load_compressed
slim = load_compressed(Dense(), {file!r})
print(slim.middle.width, slim.fc2.out_features, float(slim.eval()(torch.ones(1, 8)).sum()))
"""


@pytest.mark.usefixtures(unregistered.__name__)
def test_a_custom_layer_is_cut_saved_and_loaded_without_torch_pruning(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Dense(), torch.randn(4, 8)
    graph = tp.DependencyGraph().build_dependency(model, x, customized_pruners={Normalised: PruneNormalised()})
    pruner = DNALPruner(model, [{"op_types": ["Linear"]}], dummy_input=x, budget=Budget(params=0.5), graph=graph)
    assert {g.name for g in pruner.plan.active} == {"fc1", "fc2"}
    with pruner.search(10, progress=False) as search:
        for _ in range(10):
            search.step(model(x).square().mean())
    slim = pruner.speedup()
    assert slim.middle.width == slim.middle.scale.numel() == slim.fc2.out_features < 16
    assert torch.allclose(slim.eval()(x), model.eval()(x), atol=1e-5)
    save_compressed(slim, tmp_path / "slim.safetensors")

    source = Path(__file__).read_text()
    body = source[source.index("class Normalised") : source.index("LOAD = ")]
    (tmp_path / "dense.py").write_text("import torch\nfrom torch import Tensor, nn\n\n\n" + body)
    script = LOAD.format(folder=str(tmp_path), file=str(tmp_path / "slim.safetensors"))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    width, features, total = done.stdout.split()
    assert int(width) == int(features) == slim.middle.width
    assert float(total) == pytest.approx(float(slim(torch.ones(1, 8)).sum().detach()), rel=1e-5)
    assert torch.equal(load_compressed(Dense(), tmp_path / "slim.safetensors").eval()(x), slim(x))
