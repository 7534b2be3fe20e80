"""DNALStrategy on model spaces of NNI, in trainings of Lightning."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dnal_nni import Budget, DNALError, load_compressed, measure, save_compressed

pytest.importorskip("pytorch_lightning")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # NNI wraps every class of torch.nn when it is imported
    import nni
    from nni.nas.evaluator import FunctionalEvaluator
    from nni.nas.evaluator.pytorch import Classification, DataLoader
    from nni.nas.experiment import NasExperiment
    from nni.nas.hub.pytorch import DARTS, MobileNetV3Space, ProxylessNAS
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
    from nni.nas.space import model_context
    from supernet_space import DIGITS, Supernet

    from dnal_nni import DNALStrategy
    from dnal_nni.choices import Choice, Depth, Mixture
    from dnal_nni.space import Space, supernet

pytestmark = [
    # pytorch_lightning 2.6 with torch 2.14, and what it says of a tiny CPU run
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]


def conv(kernel: int, width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, width, kernel, 1, kernel // 2), nn.BatchNorm2d(width), nn.ReLU())


class Toy(ModelSpace):
    """NNI's primitives together: a choice of layers, one inside of another, of inputs, of a depth, of a width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, 1, 1)
        nested = nn.Sequential(conv(3), LayerChoice([conv(3), nn.Identity()], label="nested"))
        self.layer = LayerChoice({"c3": conv(3), "c5": conv(5), "nested": nested, "skip": nn.Identity()}, label="layer")
        self.inputs = InputChoice(2, 1, label="inputs")
        self.blocks = Repeat(lambda i: conv(3), (1, 3), label="depth")
        hidden = nni.choice("hidden", [12, 24])
        self.fc1 = MutableLinear(8, hidden)
        self.fc2 = MutableLinear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.blocks(self.inputs([x, self.layer(x)]))
        return self.fc2(torch.relu(self.fc1(x.mean((2, 3)))))


class Plain(ModelSpace):
    """Without a choice of width: whatever single path is found, the space can name it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, 1, 1)
        self.layer = LayerChoice({"c3": conv(3), "c5": conv(5), "skip": nn.Identity()}, label="layer")
        self.inputs = InputChoice(2, 1, label="inputs")
        self.blocks = Repeat(lambda i: conv(3), (1, 3), label="depth")
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.fc(self.blocks(self.inputs([x, self.layer(x)])).mean((2, 3)))


def evaluator(size: int = 8, channels: int = 1, epochs: int = 2, batches: int = 6, **kwargs: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batches * 8, channels, size, size, generator=generator)
    data = TensorDataset(images, torch.randint(0, 10, (len(images),), generator=generator))
    off: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return Classification(
        num_classes=10, learning_rate=1e-2, max_epochs=epochs, accelerator="cpu",
        train_dataloaders=DataLoader(data, batch_size=8), val_dataloaders=DataLoader(data, batch_size=8),
        **{**off, **kwargs},
    )  # fmt: skip


def check(strategy: DNALStrategy, size: int = 8, channels: int = 1, budget: float | None = None) -> nn.Module:
    """The network found costs what was asked for, is the gated one, and can be trained by the same evaluator."""
    slim = strategy.slim_model()
    report = strategy.report
    if budget is not None:
        assert report.after.flops / report.before.flops == pytest.approx(budget, rel=0.01)
    x = torch.randn(4, channels, size, size, dtype=torch.float64)
    gated, cut = copy.deepcopy(strategy.pruner.bound_model).double(), copy.deepcopy(slim).double()
    for module in (*gated.modules(), *cut.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for mode in (False, True):
        with torch.no_grad():
            expected, got = gated.train(mode)(x), cut.train(mode)(x)
        assert float((expected - got).abs().max()) < 1e-9 * float(expected.abs().max())
    before = [p.detach().clone() for p in slim.parameters()]
    evaluator(size, channels, epochs=1, batches=2).evaluate(slim)
    assert any(not torch.equal(a, b) for a, b in zip(before, slim.parameters()))
    return slim


def test_a_toy_space_to_a_retrained_network() -> None:
    torch.manual_seed(0)
    space = Toy()
    untouched = {name: value.clone() for name, value in space.state_dict().items()}
    strategy = DNALStrategy(Budget(flops=0.3))
    given = evaluator()
    strategy(space, given)
    slim = check(strategy)
    assert type(space.layer) is LayerChoice
    assert set(space.simplify()) == {"layer", "nested", "inputs", "depth", "hidden"}
    assert all(torch.equal(value, untouched[name]) for name, value in space.state_dict().items())
    assert not any(type(callback).__module__.startswith("dnal_nni") for callback in given.trainer.callbacks)
    choices = {m.label: m for m in slim.modules() if isinstance(m, Choice)}
    assert choices["layer"].units and len(choices["depth"].depths) >= 1  # type: ignore[attr-defined]


def test_weights_learn_in_the_warmup_and_gates_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    steps: list[tuple[int, int, float]] = []
    strategy = DNALStrategy(Budget(flops=0.5), warmup=0.25)
    original = DNALStrategy.mutate_evaluator

    def mutate(self: DNALStrategy, given: Any) -> Any:
        step = given.module.training_step

        def watched(batch: Any, batch_idx: int) -> Any:
            states = [gate.state.value for gate in self.pruner.gates.values()]
            weight = float(next(iter(self.supernet.parameters())).detach().sum())
            steps.append((states.count("soft"), states.count("hard"), weight))
            return step(batch, batch_idx)

        given.module.training_step = watched
        return original(self, given)

    monkeypatch.setattr(DNALStrategy, "mutate_evaluator", mutate)
    strategy(Toy(), evaluator(epochs=2, batches=8))
    gates, candidates = len(strategy.pruner.gates), sum(group.choice for group in strategy.pruner.groups)
    # in the last quarter of the search the structure stands: candidates are open or closed
    expected = [(0, 0)] * 4 + [(gates, 0)] * 9 + [(gates - candidates, candidates)] * 3
    assert [counts for *counts, _ in steps] == [list(pair) for pair in expected]
    assert len({weight for *_, weight in steps}) == 16  # weights moved in every step
    assert strategy.pruner._search is not None and strategy.pruner._search.done == 12


def test_in_an_experiment_of_nni(tmp_path: Path) -> None:
    torch.manual_seed(0)
    space = Plain()
    strategy = DNALStrategy(Budget(flops=0.25), single_path=True)
    experiment = NasExperiment(space, evaluator(), strategy)
    experiment.config.experiment_working_directory = tmp_path
    experiment.run()
    log = nni.runtime.log._handlers.get(experiment.id)
    slim = check(strategy)
    (architecture,) = experiment.export_top_models(formatter="dict")
    assert set(architecture) == {"layer", "inputs", "depth"}
    assert list(dict(slim.layer.named_children())) == [architecture["layer"]]
    assert slim.inputs.kept == architecture["inputs"]
    assert len(slim.blocks.blocks) == architecture["depth"]
    # NNI builds that architecture: the same operations, at the space's own widths
    with model_context(architecture):
        built = Plain()
    assert built(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert len(built.blocks) == architecture["depth"]
    experiment.stop()
    if log is not None:
        log.stream.close()  # NNI does not


def searched(strategy: DNALStrategy, space: ModelSpace, keep: dict[str, list[int]]) -> DNALStrategy:
    """As after a search that decided ``keep`` (1 or 0 per unit, by label)."""
    strategy._status, strategy._model_space = "succeeded", None  # type: ignore[assignment]
    strategy.mutate_model(space)
    strategy.mutate_evaluator(evaluator())
    pruner = strategy.pruner
    label = {g.name: strategy._space.supernet.get_submodule(g.name).label for g in pruner.groups if g.choice}  # type: ignore[union-attr]
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
    assert strategy._space is not None
    architecture = strategy._space.architecture(strategy.slim_model())
    assert architecture == {"layer": "nested", "nested": 1, "inputs": [1], "depth": 2, "hidden": 24}
    assert space.check_contains(architecture) is None
    # a choice inside of a candidate that is gone: any value
    searched(DNALStrategy(Budget(flops=0.5)), space, {})
    strategy = searched(
        DNALStrategy(Budget(flops=0.5)), space, {"layer": [1, 0, 0, 0], "inputs": [1, 0], "depth": [0, 0]}
    )
    assert strategy._space is not None
    assert strategy._space.architecture(strategy.slim_model())["depth"] == 1


@pytest.mark.parametrize(
    "keep, why",
    [
        ({"layer": [1, 1, 0, 0], "inputs": [0, 1]}, r"layer keeps 2 of 4 candidates \(c3, c5\)"),
        ({"layer": [1, 0, 0, 0], "inputs": [1, 1]}, "inputs keeps 2 inputs instead of 1"),
    ],
)
def test_what_the_space_has_no_word_for(keep: dict[str, list[int]], why: str) -> None:
    strategy = searched(DNALStrategy(Budget(flops=0.5)), Toy(), keep)
    assert strategy._space is not None
    with pytest.raises(DNALError, match=f"{why}.*strategy.slim_model"):
        strategy._space.architecture(strategy.slim_model())


def test_a_width_is_in_the_space_or_not() -> None:
    strategy = searched(DNALStrategy(Budget(flops=0.5)), Toy(), {"layer": [1, 0, 0, 0], "inputs": [1, 0]})
    assert strategy._space is not None
    for width, known in ((12, True), (13, False)):
        strategy.pruner.harden({
            "fc1": torch.arange(24) < width,
            **{g.name: strategy.pruner._keep[g.name] for g in strategy.pruner.groups if g.choice},  # type: ignore[index]
        })  # fmt: skip
        if known:
            assert strategy._space.architecture(strategy.slim_model())["hidden"] == 12
        else:
            with pytest.raises(DNALError, match="fc1 has out_features=13, which hidden cannot give"):
                strategy._space.architecture(strategy.slim_model())


def test_a_saved_network_is_loaded_into_a_fresh_supernet(tmp_path: Path) -> None:
    keep = {"layer": [1, 0, 1, 0], "nested": [0, 1], "depth": [1, 0]}
    strategy = searched(DNALStrategy(Budget(flops=0.5)), Toy(), keep)
    slim = strategy.slim_model()
    save_compressed(slim, tmp_path / "slim.safetensors")
    loaded = load_compressed(supernet(Toy()), tmp_path / "slim.safetensors")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded.eval()(x), slim.eval()(x))


def test_the_page_about_supernets_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # Lightning writes its logs there
    page = (Path(__file__).parents[1] / "docs" / "supernets.md").read_text()
    first, second = (part.split("```")[0] for part in page.split("```python\n")[1:])
    names: dict[str, Any] = {}
    exec(first, names)
    assert names["strategy"].report.after.flops <= 80_000
    exec(second, names)
    assert [g.name for g in names["pruner"].groups if g.choice] == ["1", "3"]


# -- spaces -----------------------------------------------------------------------------------------------------------


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
    assert strategy._space is not None
    assert strategy._space.architecture(strategy.slim_model()) == {
        "cell/op_1_0": "conv", "cell/input_1_0": [0], "cell/op_1_1": "pool", "cell/input_1_1": [0],
        "cell/op_2_0": "conv", "cell/input_2_0": [0], "cell/op_2_1": "pool", "cell/input_2_1": [1],
    }  # fmt: skip


HUB: dict[str, tuple[Callable[[], ModelSpace], int]] = {
    "proxyless": (lambda: ProxylessNAS(10, base_widths=(8, 8, 8, 8, 8, 8, 8, 8, 16)), 32),
    "mobilenetv3": (
        lambda: MobileNetV3Space(
            10, base_widths=(8,) * 8 + (16,), width_multipliers=(0.5, 1.0), expand_ratios=(1.0, 2.0), depth_range=(1, 2)
        ),
        32,
    ),
    "darts": (lambda: DARTS(width=4, num_cells=3, dataset="cifar"), 16),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HUB)
def test_the_hub(name: str) -> None:
    torch.manual_seed(0)
    make, size = HUB[name]
    strategy = DNALStrategy(Budget(flops=0.3), verify_seconds=600)
    strategy(make(), evaluator(size, 3, epochs=1, batches=16))
    assert [g.name for g in strategy.pruner.groups if g.frozen] in (["classifier"], ["classifier.1"])
    slim = check(strategy, size, 3, budget=0.3)
    assert measure(slim, torch.randn(1, 3, size, size)).flops < 0.31 * strategy.report.before.flops


@pytest.mark.slow
def test_a_single_path_of_the_hub_s_proxylessnas_has_a_name() -> None:
    torch.manual_seed(0)
    make, size = HUB["proxyless"]
    space = make()
    strategy = DNALStrategy(Budget(flops=0.08), single_path=True, verify_seconds=600)
    strategy(space, evaluator(size, 3, epochs=1, batches=16))
    slim = check(strategy, size, 3, budget=0.08)
    (model,) = strategy.list_models()
    assert set(model.sample) == set(space.simplify())
    kept = {m.label: m.units for m in slim.modules() if isinstance(m, Mixture)}
    assert all(model.sample[label] == unit for label, (unit,) in kept.items())
    assert model.executable_model()(torch.randn(2, 3, size, size)).shape == (2, 10)


@pytest.mark.slow
def test_the_paper_s_space_on_digits() -> None:
    torch.manual_seed(0)
    strategy = DNALStrategy(Budget(flops=0.2), sequential=True, verify_seconds=600)
    strategy(Supernet(**DIGITS), evaluator(8, epochs=2, batches=16))
    check(strategy, budget=0.2)


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


def test_errors_of_arguments() -> None:
    with pytest.raises(DNALError, match="budget=0.5: pass a Budget"):
        DNALStrategy(0.5)  # type: ignore[arg-type]
    with pytest.raises(DNALError, match=r"warmup=1: must be a number in \[0, 1\)"):
        DNALStrategy(Budget(flops=0.5), warmup=1)
    with pytest.raises(DNALError, match="the model space is a Linear"):
        Space(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(DNALError, match="run the strategy first"):
        DNALStrategy(Budget(flops=0.5)).slim_model()
    with pytest.raises(DNALError, match="the evaluator is a FunctionalEvaluator"):
        DNALStrategy(Budget(flops=0.5))(Toy(), FunctionalEvaluator(lambda model: None))
    with pytest.raises(DNALError, match="cannot resume"):
        DNALStrategy(Budget(flops=0.5)).load_state_dict({"ckpt_path": "x"})


def test_a_training_that_ends_in_the_warmup() -> None:
    with pytest.raises(DNALError, match="ended within the warmup of 50%"):
        DNALStrategy(Budget(flops=0.5))(Toy(), evaluator(callbacks=[_Stop(3)]))


def test_a_training_that_ends_early_is_told(caplog: pytest.LogCaptureFixture) -> None:
    strategy = DNALStrategy(Budget(flops=0.5), warmup=0)
    strategy(Toy(), evaluator(callbacks=[_Stop(8)]))
    assert "ended after 8 of the 12 steps" in caplog.text
    assert strategy.slim_model() is not None


def test_a_loss_that_is_nan_puts_the_weights_back() -> None:
    torch.manual_seed(0)
    strategy = DNALStrategy(Budget(flops=0.5), warmup=0)
    given = evaluator()
    step = given.module.training_step
    given.module.training_step = lambda batch, batch_idx: step(batch, batch_idx) * (
        float("nan") if batch_idx == 3 else 1.0
    )
    with pytest.raises(DNALError, match="nan or infinite at search step 3"):
        strategy(Toy(), given)
    assert all(gate.state.value == "transparent" for gate in strategy.pruner.gates.values())


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


class _Stop:
    def __new__(cls, after: int) -> Any:
        import pytorch_lightning as pl

        class Stop(pl.Callback):
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                trainer.should_stop = trainer.global_step >= after

        return Stop()
