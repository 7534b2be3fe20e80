"""NNI's model spaces as supernets, and what is left of one in NNI's words. Nothing is trained here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("pytorch_lightning")
import nni
from nas_toys import QUIET, Toy, check, conv, evaluator
from nni.nas.nn.pytorch import (
    Cell,
    InputChoice,
    LayerChoice,
    ModelSpace,
    MutableConv2d,
    MutableLinear,
    MutableModule,
    Repeat,
)
from supernet_space import Supernet

from dnal_nni import Budget, DNALError, DNALStrategy, load_compressed, save_compressed
from dnal_nni.modules.choices import Depth, Mixture
from dnal_nni.plugin.space import supernet

pytestmark = QUIET


def searched(strategy: DNALStrategy, space: ModelSpace, keep: dict[str, list[int]]) -> DNALStrategy:
    """As after a search that decided ``keep`` (1 or 0 per unit, by label)."""
    strategy._status, strategy._model_space = "succeeded", None
    strategy.mutate_model(space)
    strategy.mutate_evaluator(evaluator())
    pruner = strategy.pruner
    label = {g.name: strategy.space.supernet.get_submodule(g.name).label for g in pruner.groups if g.choice}
    assert set(keep) <= set(label.values())
    pruner.harden({name: torch.tensor(keep[one]).bool() for name, one in label.items() if one in keep})
    return strategy


def test_architectures_that_the_space_has() -> None:
    space = Toy()
    strategy = searched(
        DNALStrategy(Budget(flops=0.5)),
        space,
        {"layer": [0, 0, 1, 0], "nested": [0, 1], "inputs": [0, 1], "depth": [1, 0]},
    )
    architecture = strategy.space.architecture(strategy.slim_model())
    assert architecture == {"layer": "nested", "nested": 1, "inputs": [1], "depth": 2, "hidden": 24}
    assert space.check_contains(architecture) is None
    # a choice inside of a candidate that is gone: any value
    searched(DNALStrategy(Budget(flops=0.5)), space, {})
    strategy = searched(
        DNALStrategy(Budget(flops=0.5)), space, {"layer": [1, 0, 0, 0], "inputs": [1, 0], "depth": [0, 0]}
    )
    assert strategy.space.architecture(strategy.slim_model())["depth"] == 1


@pytest.mark.parametrize(
    "keep, why",
    [
        ({"layer": [1, 1, 0, 0], "inputs": [0, 1]}, r"layer keeps 2 of 4 candidates \(c3, c5\)"),
        ({"layer": [1, 0, 0, 0], "inputs": [1, 1]}, "inputs keeps 2 inputs instead of 1"),
    ],
)
def test_what_the_space_has_no_word_for(keep: dict[str, list[int]], why: str) -> None:
    strategy = searched(DNALStrategy(Budget(flops=0.5)), Toy(), keep)
    with pytest.raises(DNALError, match=f"{why}.*strategy.slim_model"):
        strategy.space.architecture(strategy.slim_model())


def test_a_width_is_in_the_space_or_not() -> None:
    strategy = searched(DNALStrategy(Budget(flops=0.5)), Toy(), {"layer": [1, 0, 0, 0], "inputs": [1, 0]})
    for width, known in ((12, True), (13, False)):
        strategy.pruner.harden({
            "fc1": torch.arange(24) < width,
            **{g.name: strategy.pruner.session.keep[g.name] for g in strategy.pruner.groups if g.choice},
        })  # fmt: skip
        if known:
            assert strategy.space.architecture(strategy.slim_model())["hidden"] == 12
        else:
            with pytest.raises(DNALError, match="fc1 has out_features=13, which hidden cannot give"):
                strategy.space.architecture(strategy.slim_model())


def test_a_saved_network_is_loaded_into_a_fresh_supernet(tmp_path: Path) -> None:
    keep = {"layer": [1, 0, 1, 0], "nested": [0, 1], "depth": [1, 0]}
    strategy = searched(DNALStrategy(Budget(flops=0.5)), Toy(), keep)
    slim = strategy.slim_model()
    save_compressed(slim, tmp_path / "slim.safetensors")
    loaded = load_compressed(supernet(Toy()), tmp_path / "slim.safetensors")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded.eval()(x), slim.eval()(x))


def test_the_paper_s_space_is_the_paper_s_size() -> None:
    with torch.device("meta"):
        space = Supernet()
    network = supernet(space)
    # 16.0 M parameters, 21 layers of six candidates (arXiv 2103.02126)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(16.0e6, rel=0.02)
    assert [len(m.units) for m in network.modules() if isinstance(m, Mixture)] == [6] * 21


class KernelSpace(ModelSpace):
    """Choices as arguments: kernel size and width of one convolution, as in MobileNetV3Space."""

    def __init__(self) -> None:
        super().__init__()
        kernel, width = nni.choice("kernel", [3, 5]), nni.choice("width", [8, 16])
        self.stem = nn.Conv2d(1, 8, 3, 1, 1)
        self.conv = MutableConv2d(8, width, kernel, padding=kernel // 2)
        self.depthwise = MutableConv2d(width, width, 3, padding=1, groups=width)
        self.fc = MutableLinear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.depthwise(torch.relu(self.conv(self.stem(x))))).mean((2, 3)))


def test_choices_among_arguments() -> None:
    network = supernet(KernelSpace())
    assert [tuple(c.kernel_size) for c in network.conv.children()] == [(3, 3), (5, 5)]
    assert network.conv.get_submodule("5").out_channels == network.fc.in_features == network.depthwise.groups == 16
    assert type(network.depthwise) is nn.Conv2d and type(network.fc) is nn.Linear


def test_cells() -> None:
    class Cells(ModelSpace):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 8, 3, 1, 1)
            ops: Any = {"conv": conv(3), "pool": nn.AvgPool2d(3, 1, 1)}
            self.cells = nn.ModuleList([Cell(ops, num_nodes=2, num_ops_per_node=2, label="cell") for _ in range(2)])
            self.mix = nn.Conv2d(16, 8, 1)
            self.fc = nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.cells[1](self.mix(self.cells[0](self.stem(x)))).mean((2, 3)))

    network = supernet(Cells())
    assert network.cells[0].nodes[1].units == ["conv_from_0", "pool_from_0", "conv_from_1", "pool_from_1"]
    strategy = searched(DNALStrategy(Budget(flops=0.5)), Cells(), {"cell/1": [1, 1], "cell/2": [1, 0, 0, 1]})
    assert strategy.space.architecture(strategy.slim_model()) == {
        "cell/op_1_0": "conv", "cell/input_1_0": [0], "cell/op_1_1": "pool", "cell/input_1_1": [0],
        "cell/op_2_0": "conv", "cell/input_2_0": [0], "cell/op_2_1": "pool", "cell/input_2_1": [1],
    }  # fmt: skip


# -- errors -----------------------------------------------------------------------------------------------------------


class Custom(MutableModule):
    def __init__(self) -> None:
        super().__init__()
        self.add_mutable(nni.choice("shift", [1, 2]))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


def space_of(make: Callable[[], nn.Module]) -> ModelSpace:
    class One(ModelSpace):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 8, 3, 1, 1)
            self.part = make()

    return One()


@pytest.mark.parametrize(
    "make, message",
    [
        (Custom, "part: a Custom has the mutables 'shift'"),
        (lambda: InputChoice(2, 1, reduction="concat", label="in"), "part: InputChoice.'in', reduction='concat'"),
        (lambda: Cell({"a": nn.Identity()}, 2, merge_op="loose_end", label="c"), "part: Cell.'c', merge_op='loose"),
        (
            lambda: Repeat(lambda i: nn.Identity(), nni.choice("d", [1, 2]) + 1),
            r"part: the depth of this Repeat \(d\) cannot be learned",
        ),
        (
            lambda: MutableLinear(8, nni.quniform("w", 8, 16, 1)),
            "part: out_features depends on 'w', a Numerical",
        ),
        (
            lambda: MutableConv2d(8, 8, nni.choice("k", [1, 3]), nni.choice("s", [1, 2])),
            r"part: MutableConv2d depends on 'k' \(Categorical\), 's' \(Categorical\)",
        ),
        (lambda: MutableLinear(8, 48 // nni.choice("w", [1, 2])), "part: out_features=.* is not largest where each"),
    ],
)
def test_mutables_that_cannot_be_learned_are_named(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(DNALError, match=message):
        supernet(space_of(make))


def test_a_choice_in_two_places_is_one_module() -> None:
    class Twice(ModelSpace):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 8, 3, 1, 1)
            self.first = LayerChoice({"c3": conv(3), "c5": conv(5)}, label="both")
            self.second = self.first
            self.fc = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.second(self.first(self.stem(x))).mean((2, 3)))

    assert (network := supernet(Twice())).first is network.second
    strategy = searched(DNALStrategy(Budget(flops=0.5)), Twice(), {"both": [0, 1]})
    check(strategy)


def test_depths_need_not_follow_each_other() -> None:
    network = supernet(space_of(lambda: Repeat(lambda i: conv(3), nni.choice("d", [1, 4]))))
    depth = network.part
    assert isinstance(depth, Depth) and depth.units == ["depth 4"] and len(depth.blocks) == 4
