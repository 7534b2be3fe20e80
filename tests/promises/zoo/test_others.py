"""Networks of other packages: exact, or left alone with a reason, in time (`benchmarks/zoo_others.py`).

`pytest -m slow tests/promises/zoo/test_others.py` runs those whose packages are installed, each in its own process.
"""

import importlib.util

import pytest
from zoo import run_isolated
from zoo_one import explain
from zoo_others import OTHERS, WALL
from zoo_others import __file__ as script

SECONDS = 120


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_exact_in_time(name: str) -> None:
    if importlib.util.find_spec(OTHERS[name].source) is None:
        pytest.skip(f"{OTHERS[name].source} is not installed")
    record = run_isolated(OTHERS[name], wall=WALL, script=script)
    assert record["status"] == "exact", explain(record)
    assert record["seconds"]["total"] <= SECONDS, explain(record)
    assert record["groups"]["gated"], explain(record)


def test_the_packages_that_are_promised() -> None:
    count = {source: sum(entry.source == source for entry in OTHERS.values()) for source in sources()}
    assert count.pop("segmentation_models_pytorch") == 16 and count.pop("pytorchcv") >= 20
    assert count.pop("monai") == 5 and count.pop("ultralytics") == 5 and count.pop("transformers") == 10
    assert count == {"facenet_pytorch": 1, "efficientnet_pytorch": 1, "open_clip": 1}


def sources() -> set[str]:
    return {entry.source for entry in OTHERS.values()}
