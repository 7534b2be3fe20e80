"""What goes wrong outside: whatever it is, the error is a DNALError or the user's own, and nothing is lost."""

import copy
import gc
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CONV, Small
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dnal_nni import Budget, DNALError, DNALPruner, speedup
from dnal_nni.storage.state import load_state

Batches = list[tuple[Tensor, Tensor]]
EXAMPLES = [80, pytest.param(10_000, marks=pytest.mark.slow)]


def fuzz(examples: int) -> Callable[[Any], Any]:
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)


def intact(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether this is the dense model, without gates, with the weights that it had."""
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)


# -- fuzzed arguments -------------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 20), st.integers(-(10**400), 10**400), st.floats(), st.text(max_size=5)
)
KEYS = st.sampled_from(
    "op_types op_names op_names_re exclude_op_types exclude_op_names sparse_ratio sparse_threshold max_sparse_ratio "
    "min_sparse_ratio global_group_id dependency_group_id granularity target_names target_settings align sparsity "
    "exclude apply_method total_sparsity".split()
)
NAMES = st.lists(st.sampled_from(["Conv2d", "Linear", "BatchNorm2d", "stem", "conv.*", "(", "fc", "default", "x", ""]))
VALUES = st.one_of(SCALARS, NAMES, st.lists(SCALARS, max_size=2), st.dictionaries(st.text(max_size=6), SCALARS))
CONFIGS = st.one_of(
    st.lists(st.dictionaries(KEYS, VALUES, max_size=4), max_size=3),
    st.lists(  # close to what is right: deeper checks are met
        st.builds(
            lambda base, more: {"op_types": ["Conv2d"], **base, **more},
            st.sampled_from([{}, {"sparse_ratio": 0.5}, {"sparse_threshold": 0.5}, {"op_names": ["stem", "conv1"]}]),
            st.dictionaries(KEYS, VALUES, max_size=2),
        ),
        min_size=1,
        max_size=2,
    ),
    VALUES,
)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_fuzzed_config_lists(examples: int, x: Tensor) -> None:
    model = Small()
    before = copy.deepcopy(model.state_dict())
    outcomes = set()

    @fuzz(examples)
    @given(CONFIGS)
    @example([{"op_types": ["Conv2d"]}])
    @example([{"op_types": ["Conv2d"], "sparse_ratio": 2}])
    def survives(config: Any) -> None:
        try:
            pruner = DNALPruner(model, config, dummy_input=x)
        except DNALError:
            outcomes.add("refused")
        else:
            outcomes.add("taken")
            pruner.unwrap_model()
        assert intact(model, before)

    survives()
    assert outcomes == {"refused", "taken"}


@pytest.mark.parametrize("examples", EXAMPLES)
def test_fuzzed_budgets(examples: int) -> None:
    limits = st.dictionaries(st.sampled_from(["flops", "params", "latency"]), st.one_of(SCALARS, VALUES), max_size=3)

    @fuzz(examples)
    @given(limits)
    def survives(arguments: dict[str, Any]) -> None:
        try:
            budget = Budget(**arguments)
        except DNALError:
            return
        assert all(0 < float(value) < float("inf") for value in budget.limits.values())

    survives()


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("what", ["loss", "weights", "gates"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf(
    value: float, what: str, preset: Any, small: nn.Module, x: Tensor, batches: Batches, tmp_path: Path
) -> None:
    """The weights come back, and the checkpoint of the steps before is whole."""
    before = copy.deepcopy(small.state_dict())
    budget = Budget(flops=0.5) if preset == "default" else None
    pruner = DNALPruner(small, CONV, dummy_input=x, budget=budget, preset=preset)
    optimizer = torch.optim.SGD(small.parameters(), 0.01) if preset == "default" else None
    with pytest.raises(DNALError, match=r"the loss is nan or infinite at search step [45]"):
        with pruner.search(20, optimizer=optimizer, progress=False) as search:
            for step, (images, labels) in enumerate(batches):
                if step == 4:
                    pruner.save_checkpoint(tmp_path / "state", optimizer)
                    with torch.no_grad():
                        if what == "weights":
                            small.fc.weight[0, 0] = value
                        if what == "gates":
                            next(iter(pruner.gates.values())).s.fill_(float("nan"))
                            search.score[0] = float("nan")
                loss = F.cross_entropy(small(images), labels)
                search.step(loss * value if what == "loss" and step == 4 else loss)
    pruner.unwrap_model()
    assert intact(small, before)
    assert load_state(tmp_path / "state")["pruner"]["search"]["done"] == 4
    again = DNALPruner(small, CONV, dummy_input=x, budget=budget, preset=preset)
    again.load_checkpoint(tmp_path / "state", optimizer)
    with again.search(20, optimizer=optimizer, progress=False) as search:
        for images, labels in batches * 2:
            search.step(F.cross_entropy(small(images), labels))
    assert again.speedup()(x).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_is_broken_already(value: float, small: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        small.conv1.weight.fill_(value)
    with pytest.raises(DNALError, match="no finite number for the dummy_input: check its weights for NaN"):
        DNALPruner(small, CONV, dummy_input=x)
    assert not any("parametrizations" in name for name, _ in small.named_modules())


def test_pressure_that_closes_everything_leaves_a_network(small: nn.Module, x: Tensor, batches: Batches) -> None:
    before = copy.deepcopy(small.state_dict())
    pruner = DNALPruner(small, CONV, dummy_input=x, preset="paper", lambda_=1e6)
    with pruner.search(50, progress=False) as search:
        for step in range(50):
            images, labels = batches[step % len(batches)]
            search.step(F.cross_entropy(small(images), labels))
    slim = pruner.speedup()
    assert [int(gate.mask.sum()) for gate in pruner.gates.values()] == [1, 1, 1]
    assert slim(x).isfinite().all()
    pruner.unwrap_model()
    assert intact(small, before)


@pytest.mark.parametrize("lambda_", [float("nan"), float("inf"), -1.0, "much", None])
def test_bad_lambda(lambda_: Any, small: nn.Module, x: Tensor) -> None:
    with pytest.raises(DNALError, match="lambda_=.*must be a number >= 0"):
        DNALPruner(small, CONV, dummy_input=x, preset="paper", lambda_=lambda_)


def test_double_precision(small: nn.Module, x: Tensor, batches: Batches) -> None:
    model = small.double()
    pruner = DNALPruner(model, CONV, dummy_input=x.double(), budget=Budget(flops=0.5))
    with pruner.search(40, optimizer=torch.optim.SGD(model.parameters(), 0.01), progress=False) as search:
        for images, labels in batches * 5:
            search.step(F.cross_entropy(model(images.double()), labels))
    slim = pruner.speedup()
    assert all(p.dtype == torch.float64 for p in slim.parameters())
    assert pruner.report.max_abs_diff is not None and pruner.report.max_abs_diff < 1e-12


# -- the user's loop, and what is around it ---------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("of the user"), MemoryError(), torch.OutOfMemoryError("no memory")])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_in_the_loop(
    where: str, error: BaseException, small: nn.Module, x: Tensor, batches: Batches, tmp_path: Path
) -> None:
    """It arrives as it is; the model runs, the search can be taken up, and the dense model is there."""
    before = copy.deepcopy(small.state_dict())
    pruner = DNALPruner(small, CONV, dummy_input=x, budget=Budget(flops=0.5))
    optimizer = torch.optim.SGD(small.parameters(), 0.01)

    def fail(*args: Any) -> None:
        raise error

    with pytest.raises(type(error)):
        with pruner.search(20, optimizer=optimizer, progress=False) as search:
            for images, labels in batches:
                loss = F.cross_entropy(small(images), labels)
                if search.done == 3:
                    pruner.save_checkpoint(tmp_path / "state", optimizer)
                    if where == "backward":
                        loss.register_hook(fail)
                    else:
                        handle = small.fc.register_forward_hook(fail)
                        small(images)
                search.step(loss)
    if where == "forward":
        handle.remove()
    assert all(p.requires_grad for p in small.parameters()) and small(x).isfinite().all()
    pruner.unwrap_model()
    assert intact(small, before)
    again = DNALPruner(small, CONV, dummy_input=x, budget=Budget(flops=0.5))
    again.load_checkpoint(tmp_path / "state", optimizer)
    with again.search(20, optimizer=optimizer, progress=False) as search:
        assert search.done == 3
        for images, labels in batches * 3:
            search.step(F.cross_entropy(small(images), labels))
    again.speedup()


class Pooled(nn.Module):
    """Batch norm over a single value per channel where the batch is one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(1, 8, 8), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.bn(self.a(x))).flatten(1))


def test_a_batch_of_one_with_batch_norm() -> None:
    """Torch refuses it in train mode: the user hears that, loses nothing, and can search in eval mode."""
    torch.manual_seed(0)
    model, one = Pooled(), torch.randn(1, 1, 8, 8)
    before = copy.deepcopy(model.state_dict())
    pruner = DNALPruner(model, CONV, dummy_input=one, budget=Budget(flops=0.5))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        with pruner.search(10, progress=False) as search:
            search.step(F.cross_entropy(model.train()(one), torch.tensor([1])))
    model.eval()
    with pruner.search(10, progress=False) as search:
        for _ in range(10):
            search.step(F.cross_entropy(model(one), torch.tensor([1])))
    slim = pruner.speedup()
    assert slim.a.out_channels == 4 and slim.eval()(one).shape == (1, 3)
    pruner.unwrap_model()
    assert intact(model, before)


def test_an_empty_dummy_input(small: nn.Module) -> None:
    with pytest.raises(DNALError, match="dummy_input has no elements"):
        DNALPruner(small, CONV, dummy_input=torch.zeros(0, 1, 8, 8))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_models_on_meta(device: str, small: nn.Module, x: Tensor) -> None:
    model = small.to("meta")
    with pytest.raises(DNALError, match="stem.weight is on the meta device and has no values"):
        DNALPruner(model, CONV, dummy_input=x.to(device))
    with pytest.raises(DNALError, match="stem.weight is on the meta device"):
        speedup(model, {"conv1": {"weight": torch.zeros(8, 12, 3, 3)}}, x.to(device))


def chosen(seed: int, batches: Batches) -> Tensor:
    """What a search keeps."""
    model = Small()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    pruner = DNALPruner(model, CONV, dummy_input=batches[0][0], budget=Budget(flops=0.5))
    with pruner.search(40, optimizer=torch.optim.SGD(model.parameters(), 0.01), progress=False) as search:
        for images, labels in batches * 5:
            search.step(F.cross_entropy(model(images), labels))
    pruner.speedup()
    return torch.cat([gate.mask for gate in pruner.gates.values()])


def test_searches_in_threads(batches: Batches) -> None:
    """Each ends as it does alone."""
    alone = [chosen(seed, batches) for seed in range(4)]
    results: dict[int, Any] = {}

    def work(seed: int) -> None:
        try:
            results[seed] = chosen(seed, batches)
        except Exception as error:  # an assertion in a thread is lost
            results[seed] = error

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, expected in enumerate(alone):
        assert isinstance(results[seed], Tensor), results[seed]
        assert torch.equal(results[seed], expected)


def test_warnings_as_errors(tmp_path: Path) -> None:
    """`python -W error`: importing, searching, cutting, saving and loading warn of nothing."""
    code = """
import torch, torch.nn.functional as F
from conftest import CONV, Small
from dnal_nni import Budget, DNALPruner, load_compressed, save_compressed
model, x = Small(), torch.randn(4, 1, 8, 8)
pruner = DNALPruner(model, CONV, dummy_input=x, budget=Budget(flops=0.5))
with pruner.search(10, optimizer=torch.optim.SGD(model.parameters(), 0.01)) as search:
    for _ in range(10):
        search.step(F.cross_entropy(model(x), torch.arange(4)))
save_compressed(pruner.speedup(), "slim", pruner.report)
load_compressed(Small(), "slim")
pruner.report.to_html()
"""
    root = Path(__file__).parents[2]
    path = {"PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_nothing_is_held_that_is_as_large_as_the_weights(small: nn.Module, x: Tensor) -> None:
    """NNI's wrappers hold a mask and a copy of each."""
    model = nn.Sequential(small, nn.Linear(small(x).shape[1], 2000), nn.ReLU(), nn.Linear(2000, 500))

    def held(thing: object) -> int:
        seen: set[int] = set()
        storages: dict[int, int] = {}
        left = [thing]
        while left:
            one = left.pop()
            if id(one) in seen or isinstance(one, (type, types.ModuleType, types.FunctionType)):
                continue
            seen.add(id(one))
            if isinstance(one, Tensor):
                storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
            left += gc.get_referents(one)
        return sum(storages.values())

    weights = sum(4 * p.numel() for p in model.parameters())
    pruner = DNALPruner(model, [{"op_types": ["Linear"]}], dummy_input=x)
    pruner.harden({name: torch.arange(len(gate.s)) % 2 == 0 for name, gate in pruner.gates.items()})
    assert weights <= held(model) <= held(pruner) < 1.1 * weights
    assert pruner.get_masks()["1"]["weight"].mean() == 0.5
