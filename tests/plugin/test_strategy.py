"""DNALStrategy on model spaces of NNI, in trainings of Lightning."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("pytorch_lightning")
import nni
import pytorch_lightning as pl
from nas_toys import QUIET, Plain, Toy, check, evaluator
from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.experiment import NasExperiment
from nni.nas.hub.pytorch import DARTS, MobileNetV3Space, ProxylessNAS
from nni.nas.nn.pytorch import LayerChoice, ModelSpace
from nni.nas.space import model_context
from supernet_space import DIGITS, Supernet

from dnal_nni import Budget, DNALError, DNALStrategy, PrimeStrategy, TopologyStrategy, measure
from dnal_nni.modules.choices import Choice, Mixture
from dnal_nni.plugin.space import Space
from dnal_nni.plugin.strategies.searching import Searching

pytestmark = QUIET


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
    assert choices["layer"].units and len(choices["depth"].depths) >= 1
    made = strategy.report.interventions
    assert made is not None and made.epochs == given.trainer.max_epochs and made.changed == {"flops": 0.3}
    assert {kind: made.searched[kind] for kind in ("operations", "depths", "inputs")} == {
        "operations": 2, "depths": 1, "inputs": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DNALStrategy(Budget(flops=0.5), width=False), "got an unexpected .* 'width'; did you mean 'widths'"),
        (lambda: DNALStrategy(), "missing a required argument: 'budget'"),
        (lambda: DNALStrategy(Budget(flops=0.5), verify_seconds="60"), r"verify_seconds=...\) is '60': give a number"),
        (lambda: PrimeStrategy(Budget(flops=0.5)), "too many positional arguments"),
        (lambda: TopologyStrategy(op="gates"), "unexpected keyword argument 'op'; did you mean 'ops'"),
        (lambda: DNALStrategy(Budget(flops=0.5))(nn.Linear(2, 2), evaluator()), "is a Linear, without choices: give"),
    ],
)
def test_wrong_arguments_are_a_sentence(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(DNALError, match=said):
        make()


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
    assert strategy.pruner.session.last is not None and strategy.pruner.session.last.done == 12


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


def test_the_page_about_supernets_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # Lightning writes its logs there
    page = (Path(__file__).parents[2] / "docs" / "supernets.md").read_text()
    first, second = (part.split("```")[0] for part in page.split("```python\n")[1:])
    names: dict[str, Any] = {}
    exec(first, names)
    assert names["strategy"].report.after.flops <= 80_000
    exec(second, names)
    assert [g.name for g in names["pruner"].groups if g.choice] == ["1", "3"]


# -- spaces -----------------------------------------------------------------------------------------------------------


HUB: dict[str, tuple[Callable[[], ModelSpace], int]] = {  # at their published widths
    "proxyless": (lambda: ProxylessNAS(10), 32),
    "mobilenetv3": (lambda: MobileNetV3Space(10), 32),
    "paper": (lambda: Supernet(10), 32),
    "darts": (lambda: DARTS(width=16, num_cells=8, dataset="cifar"), 16),
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


def test_errors_of_arguments() -> None:
    with pytest.raises(DNALError, match="budget=0.5: pass a Budget"):
        DNALStrategy(0.5)
    with pytest.raises(DNALError, match=r"warmup=1: must be a number in \[0, 1\)"):
        DNALStrategy(Budget(flops=0.5), warmup=1)
    with pytest.raises(DNALError, match="the model space is a Linear"):
        Space(nn.Linear(2, 2))
    with pytest.raises(DNALError, match="run the strategy first"):
        DNALStrategy(Budget(flops=0.5)).slim_model()
    with pytest.raises(DNALError, match="more than single_path leaves .* lower the budget or do without single_path"):
        DNALStrategy(Budget(flops=0.9), single_path=True)(Toy(), evaluator())
    with pytest.raises(DNALError, match="the evaluator is a FunctionalEvaluator"):
        DNALStrategy(Budget(flops=0.5))(Toy(), FunctionalEvaluator(lambda model: None))


@pytest.mark.parametrize(
    "trainer, message",
    [
        ({"estimated_stepping_batches": float("inf")}, "the search has no known length"),
        ({"world_size": 2}, "shares the work by SingleDeviceStrategy: a search needs the whole supernet"),
        ({"optimizers": []}, "the evaluator has 0 optimizers: a search needs one"),
    ],
)
def test_trainers_that_cannot_be_searched_with(trainer: dict[str, Any], message: str) -> None:
    usual = {"estimated_stepping_batches": 10, "world_size": 1, "optimizers": [1], "global_step": 0}
    usual["strategy"] = pl.strategies.SingleDeviceStrategy("cpu")
    pruner: Any = None
    with pytest.raises(DNALError, match=message):
        given: Any = SimpleNamespace(**{**usual, **trainer})
        Searching(pruner, evaluator(), 0.5).on_train_start(given, pl.LightningModule())


def test_data_without_images_asks_for_a_dummy_input() -> None:
    given = evaluator()
    given.train_dataloaders = [{"x": torch.zeros(1, 1, 8, 8)}]
    with pytest.raises(DNALError, match=r"the training data start with a dict: pass dummy_input=x to the strategy"):
        DNALStrategy(Budget(flops=0.5))(Toy(), given)


class _Stop(pl.Callback):
    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.after


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
    given.module.training_step = lambda batch, batch_idx: (
        step(batch, batch_idx) * (float("nan") if batch_idx == 3 else 1.0)
    )
    with pytest.raises(DNALError, match="nan or infinite at search step 3"):
        strategy(Toy(), given)
    assert all(gate.state.value == "transparent" for gate in strategy.pruner.gates.values())


# -- candidates alone -------------------------------------------------------------------------------------------------


def test_candidates_alone_are_a_network_of_the_space() -> None:
    def searched() -> DNALStrategy:
        torch.manual_seed(0)
        strategy = DNALStrategy(Budget(flops=0.5), widths=False)
        given = evaluator()
        strategy(Plain(), given)
        assert "training_step" not in vars(given.module)
        return strategy

    strategy = searched()
    slim = check(strategy)
    (model,) = strategy.list_models()
    assert set(model.sample) == {"layer", "inputs", "depth"}
    assert strategy.report.after.flops <= 0.5 * strategy.report.before.flops
    made = strategy.report.interventions
    assert made is not None and made.changed["widths"] is False and "paths" not in made.changed
    assert any("candidates alone are coarse" in note for note in strategy.report.notes)
    assert all(m.out_channels == 8 for m in slim.modules() if isinstance(m, nn.Conv2d))
    last, again = strategy.pruner.session.last, searched().pruner.session.last
    assert last is not None and again is not None
    assert torch.equal(last.score, again.score) and bool(last.score.any())


def test_candidates_alone_at_any_number() -> None:
    torch.manual_seed(0)
    strategy = DNALStrategy(Budget(flops=0.5), widths=False, single_path=False)
    strategy(Plain(), evaluator())
    check(strategy)


def test_a_step_of_candidates_alone_costs_as_many_paths_as_there_are_candidates() -> None:
    torch.manual_seed(0)
    given = evaluator(epochs=1, batches=8)
    step, calls = given.module.training_step, []

    def counted(batch: Any, batch_idx: int) -> dict[str, Any]:
        calls.append(batch_idx)
        return {"loss": step(batch, batch_idx)}

    given.module.training_step = counted
    DNALStrategy(Budget(flops=0.5), widths=False, warmup=0.5)(Plain(), given)
    # three candidates of `layer`, three depths; in the end the one that was found
    assert [calls.count(i) for i in range(8)] == [3] * 7 + [1]
    assert given.module.training_step is counted


def test_errors_of_candidates_alone() -> None:
    with pytest.raises(DNALError, match="has choices of a width: 'hidden'; fix their values, or search widths too"):
        DNALStrategy(Budget(flops=0.5), widths=False)(Toy(), evaluator())
    with pytest.raises(DNALError, match="widths=0: must be True or False"):
        DNALStrategy(Budget(flops=0.5), widths=0)
    with pytest.raises(DNALError, match="ended within the warmup of 50%"):
        DNALStrategy(Budget(flops=0.5), widths=False)(Plain(), evaluator(callbacks=[_Stop(3)]))
    given = evaluator()
    given.module.training_step = lambda batch, batch_idx: None
    with pytest.raises(DNALError, match="training_step returns no loss: a search of candidates alone"):
        DNALStrategy(Budget(flops=0.5), widths=False)(Plain(), given)
