"""Several processes: the cases of `ranks_job.py` under torchrun, on two ranks and on one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchrun import torchrun

from dnal_nni.search.ranks import broadcast_, check_same, from_first, is_first, mean_, world_size

TESTS = Path(__file__).parents[1]
Found = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """By rank and case, what two ranks found."""
    out = tmp_path_factory.mktemp("two")
    torchrun(2, TESTS / "ranks_job.py", str(out))
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", ["learning", "frozen", "in_eval_mode", "paper", "latency", "whole_pipeline", "errors"])
def test_ranks_agree_bit_for_bit(two: Found, case: str) -> None:
    assert two[0][case] and two[0][case] == two[1][case]


def test_two_ranks_find_what_one_finds(two: Found, tmp_path: Path) -> None:
    """At the same global batches; of norms in train mode each rank's know its own share only."""
    torchrun(1, TESTS / "ranks_job.py", str(tmp_path), "in_eval_mode")
    one = json.loads((tmp_path / "rank0.json").read_text())["in_eval_mode"]
    both = two[0]["in_eval_mode"]
    assert one["keep"] == both["keep"] and one["sites"] == both["sites"]
    assert one["loss"] == pytest.approx(both["loss"], abs=1e-5)
    assert not all(all(kept) for kept in one["keep"].values())


def test_the_latency_is_rank_0s(two: Found) -> None:
    before, after = two[0]["latency"]["latency"]
    assert after / before == pytest.approx(0.6, rel=0.05)


def test_rank_0_writes_and_all_read(two: Found) -> None:
    assert two[1]["whole_pipeline"]["files"] == ["state0"]


def test_fsdp2_fine_tunes_as_one_process_does(two: Found) -> None:
    if not two[0]["sharded"]:
        pytest.skip("torch < 2.6 has no fully_shard")
    for rank in two:
        assert rank["sharded"]["gap"] < 1e-6


def test_errors_are_the_same_everywhere(two: Found) -> None:
    said = two[1]["errors"]
    assert said["other_model"].startswith("the model's channel groups on rank 1 are not those of rank 0")
    assert said["other_model"].endswith("make the same model on every rank")
    assert "the weights' checksum on rank 1 are not those of rank 0" in said["other_weights"]
    assert said["nan_on_one"].startswith("the loss is nan or infinite at search step 3")
    assert "SyncBatchNorm" in said["synchronised"] and "convert_sync_batchnorm(slim)" in said["synchronised"]
    assert said["only_rank_0"] == "on the first"
    assert said["another_error_on_rank_0"] == "rank 0 failed: what it says is the cause"


def test_one_process_needs_no_others() -> None:
    x = torch.ones(2)
    broadcast_(x)
    check_same("x", 1, "")
    assert world_size() == 1 and is_first() and from_first(lambda: 3) == 3 and torch.equal(mean_(x), torch.ones(2))


def test_cifar10_under_torchrun(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for label in range(2):
            folder = tmp_path / "data" / split / str(label)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 128, (32, 32, 3), dtype=np.uint8) + np.uint8(100 * label)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    out = tmp_path / "out"
    torchrun(
        2, TESTS.parent / "examples" / "cifar10.py", "--data", str(tmp_path / "data"), "--out", str(out),
        "--width", "0.25", "--epochs", "1", "--search-epochs", "8", "--finetune-epochs", "1", "--batch-size", "16",
    )  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["after"]["flops"] / report["before"]["flops"] == pytest.approx(0.5, rel=0.01)
    assert report["max_abs_diff"] < 1e-5
    log = (out / "log.txt").read_text()
    assert log.count("train epoch 1/1") == log.count("finetune epoch 1/1") == 1  # rank 0 writes
    assert {path.name for path in out.iterdir()} == {
        "train.pt", "search.pt", "cut.safetensors", "finetune.pt", "slim.safetensors", "report.json", "log.txt",
        "widths.png",
    }  # fmt: skip
