"""The examples run as their first lines say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("pruner", ["dnal", "slim"])
def test_nnis_slim_pruning(pruner: str) -> None:
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(EXAMPLES / "nni_slim_pruning.py"),
        "--pruner",
        pruner,
        "--epochs",
        "4",
    ]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (before, _), (after, _), (accuracy,) = (
        [float(word.rstrip(",%")) for word in line.split() if word.rstrip(",%").replace(".", "").isdigit()]
        for line in out.splitlines()
    )
    assert after < 0.4 * before and accuracy > 85


@pytest.mark.slow
def test_supernet(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "supernet.py"), "--epochs", "8", "--out", str(tmp_path)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["flops"] / found["supernet_flops"] == pytest.approx(0.15, rel=0.01)
    assert found["accuracy"] > 90
    assert (tmp_path / "network.png").stat().st_size > 10_000 and (tmp_path / "network.safetensors").exists()
    assert "stage1_layer1" in out


@pytest.mark.slow
def test_nas_benchmark_goes_on_where_it_stopped(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    command = [
        sys.executable, "-W", "ignore", str(EXAMPLES.parent / "benchmarks" / "nas.py"), "run", "--data", "digits",
        "--flops", "3e5", "--epochs", "1", "--retrain", "1", "--seeds", "0", "--out", str(tmp_path), "--methods",
    ]  # fmt: skip
    for methods in (["random_one"], ["random_one", "dnal_single", "darts"]):
        subprocess.run([*command, *methods], check=True, capture_output=True)
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [run["job"]["method"] for run in runs] == ["random_one", "dnal_single", "darts"]
    assert all(run["flops"] == pytest.approx(3e5, rel=0.03) for run in runs)
