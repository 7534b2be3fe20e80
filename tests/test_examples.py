"""The examples run as their first lines say."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


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
