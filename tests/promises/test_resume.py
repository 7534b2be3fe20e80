"""A search that is killed and taken up again ends where it would have ended."""

import copy
import multiprocessing
import random
import signal
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CONV, Small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dnal_nni import Budget, DNALError, DNALPruner
from dnal_nni.storage.state import load_state, save_state

STEPS = 60
FILE = "search.safetensors"


def work(folder: Path, steps_made: Any = None, learning: bool = True) -> None:
    """A search that writes a checkpoint at every step, and its result: from the last checkpoint on, if there is one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, generator = Small(), torch.Generator().manual_seed(1)
    data = [(torch.randn(8, 1, 8, 8, generator=generator), torch.randint(0, 10, (8,))) for _ in range(STEPS)]
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9) if learning else None
    pruner = DNALPruner(model, CONV, dummy_input=data[0][0], budget=Budget(flops=0.5))
    if (folder / FILE).exists():
        pruner.load_checkpoint(folder / FILE, optimizer)
    with pruner.search(STEPS, optimizer=optimizer, progress=False) as search:
        for images, labels in data[search.done :]:
            search.step(F.cross_entropy(F.dropout(model(images), 0.2), labels))
            pruner.save_checkpoint(folder / FILE, optimizer)
            if steps_made is not None:
                steps_made.value = search.done
    pruner.harden()
    gates = {name: {"s": gate.s, "mask": gate.mask} for name, gate in pruner.gates.items()}
    save_state(folder / "result", {"gates": gates, "model": model.state_dict(), "score": search.score})


def flat(state: Any) -> Iterator[Any]:
    if isinstance(state, dict):
        for key, value in state.items():
            yield key
            yield from flat(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from flat(value)
    else:
        yield state


def identical(a: Any, b: Any) -> bool:
    pairs = zip(flat(a), flat(b), strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dnal_nni.plugin.pruner", "test_resume"])  # a second for every process, else
    return context


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_anywhere_and_resumed_it_ends_the_same(kills: int, server: ForkServerContext, tmp_path: Path) -> None:
    """SIGKILL after a random step, at a random moment of the next one: while it computes, or while it writes."""
    chance = random.Random(0)
    (tmp_path / "whole").mkdir()
    work(tmp_path / "whole")
    whole = load_state(tmp_path / "whole" / "result")
    for kill in range(kills):
        folder = tmp_path / str(kill)
        folder.mkdir()
        step = chance.randrange(1, STEPS - 3)
        made = server.Value("i", 0)
        process = server.Process(target=work, args=(folder, made))
        process.start()
        while made.value < step and process.is_alive():
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was not killed, it ended"
        assert not (folder / "result").exists()
        done = load_state(folder / FILE)["pruner"]["search"]["done"]
        assert step <= done < STEPS
        again = server.Process(target=work, args=(folder,))
        again.start()
        again.join()
        assert again.exitcode == 0 and identical(whole, load_state(folder / "result")), (step, done)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    nested = {
        "state": {0: {"momentum": torch.arange(6.0).view(2, 3), "step": torch.tensor(3)}, 1: {}},
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "foreach": None, "params": [0, 1], "on": True}],
        "empty": torch.zeros(0, 4, dtype=torch.bool),
        "text": "sum",
        "inf": float("-inf"),
    }
    save_state(tmp_path / "state", nested)
    back = load_state(tmp_path / "state")
    assert identical(nested, back) and back["param_groups"][0]["betas"] == (0.9, 0.999)
    assert back["empty"].dtype == torch.bool and list(back["state"]) == [0, 1]
    with pytest.raises(DNALError, match=r"state\['a'\]\[1\] is a object: only tensors, numbers"):
        save_state(tmp_path / "state", {"a": [1, object()]})
    assert identical(nested, load_state(tmp_path / "state"))  # the last good one is still there


def pruner_of(model: nn.Module, x: Tensor, **arguments: Any) -> DNALPruner:
    return DNALPruner(model, CONV, dummy_input=x, **{"budget": Budget(flops=0.5), **arguments})


@pytest.fixture
def checkpoint(small: nn.Module, x: Tensor, batches: Any, tmp_path: Path) -> Path:
    model = copy.deepcopy(small)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    pruner = pruner_of(model, x)
    with pruner.search(20, optimizer=optimizer, progress=False) as search:
        for images, labels in batches[:5]:
            search.step(F.cross_entropy(model(images), labels))
        pruner.save_checkpoint(tmp_path / FILE, optimizer)
    return tmp_path / FILE


def refused(pruner: DNALPruner, path: Path, optimizer: torch.optim.Optimizer | None, message: str) -> None:
    before = copy.deepcopy((pruner.bound_model.state_dict(), pruner.state_dict()))
    with pytest.raises(DNALError, match=message):
        pruner.load_checkpoint(path, optimizer)
    assert identical(before, (pruner.bound_model.state_dict(), pruner.state_dict()))


def test_a_checkpoint_that_does_not_fit_is_refused(small: nn.Module, x: Tensor, checkpoint: Path) -> None:
    def sgd(model: nn.Module, parameters: int | None = None) -> torch.optim.Optimizer:
        return torch.optim.SGD(list(model.parameters())[:parameters], 0.05, momentum=0.9)

    wide = copy.deepcopy(small)
    wide.fc = nn.Linear(16, 12)
    refused(pruner_of(wide, x), checkpoint, sgd(wide), r"fc.weight is \[10, 16\], the model's is \[12, 16\]")
    bigger = copy.deepcopy(small)
    refused(
        pruner_of(bigger, x, budget=Budget(flops=0.3)), checkpoint, sgd(bigger), r"budget=\{'flops': 0.5\}, here it is"
    )
    paper = copy.deepcopy(small)
    refused(pruner_of(paper, x, preset="paper"), checkpoint, sgd(paper), "preset='default', here it is 'paper'")
    pruner = pruner_of(small, x)
    refused(pruner, checkpoint, None, "needs the optimizer that the search had")
    refused(pruner, checkpoint, sgd(small, 3), "does not fit the optimizer")
    refused(pruner, checkpoint.parent / "none", sgd(small), "none cannot be read")
    save_state(checkpoint.parent / "other", {"a": 1})
    refused(pruner, checkpoint.parent / "other", sgd(small), "was not written by save_checkpoint")
    with pytest.raises(DNALError, match="not what pruner.state_dict"):
        pruner.load_state_dict({"gates": {}})
    pruner.load_checkpoint(checkpoint, sgd(small))
    with pytest.raises(DNALError, match="to be resumed was planned for 20"):
        with pruner.search(30, progress=False):
            pass


@pytest.mark.parametrize("examples", [60, pytest.param(10_000, marks=pytest.mark.slow)])
def test_fuzzed_checkpoints(examples: int, checkpoint: Path) -> None:
    """Whatever the bytes: a DNALError, or what was saved."""
    good, target = checkpoint.read_bytes(), checkpoint.with_name("fuzzed")
    saved = load_state(checkpoint)
    place = st.one_of(st.integers(0, 4000), st.integers(0, len(good) - 1))
    edit = st.tuples(place, st.integers(0, 6), st.binary(max_size=6))

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.one_of(st.lists(edit, min_size=1, max_size=5), st.binary(max_size=200)))
    def survives(edits: Any) -> None:
        data = bytearray(good)
        for at, gone, put in edits if isinstance(edits, list) else [(0, len(data), edits)]:
            data[at : at + gone] = put
        target.write_bytes(bytes(data))
        try:
            state = load_state(target)
        except DNALError:
            return
        assert identical(saved, state)

    survives()
