"""Strategies on two devices: the same on both ranks, and what one device finds in batches as large as both together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pytorch_lightning")
from nas_toys import QUIET
from strategies_job import STRATEGIES, Bare, evaluator, searched
from torchrun import TESTS, torchrun

from dnal_nni import BoundedStrategy, DNALError

pytestmark = QUIET


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("two")
    torchrun(2, TESTS / "strategies_job.py", str(out))
    return out, [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_devices_find_what_one_finds(name: str, two: tuple[Path, list[dict[str, Any]]]) -> None:
    out, (first, second) = two
    assert first[name] and first[name] == second[name]  # bit for bit
    alone, slim = searched(name, 1)
    assert alone["keep"] == first[name]["keep"] and not all(all(kept) for kept in alone["keep"].values())
    assert alone["loss"] == pytest.approx(first[name]["loss"], abs=1e-5)
    weights = torch.load(out / f"{name}.rank0.pt")
    assert weights.keys() == slim.state_dict().keys()
    for key, value in slim.state_dict().items():
        torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-5)


def test_what_cannot_be_searched_on_several_devices_is_told(two: tuple[Path, list[dict[str, Any]]]) -> None:
    for found in two[1]:
        waiting, spawned = found["errors"]["ddp"], found["errors"]["ddp_spawn"]
        assert waiting.startswith("closed candidates do not run") and "ddp_find_unused_parameters_true" in waiting
        assert spawned.startswith("the trainer spawns or forks the processes") and "torchrun" in spawned


def test_a_limit_of_memory_is_one_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(DNALError, match="the trainer uses 2 devices: a limit of memory is held on one, devices=1"):
        BoundedStrategy(STRATEGIES["gates"](), memory=0.9)(Bare(), evaluator(2))
