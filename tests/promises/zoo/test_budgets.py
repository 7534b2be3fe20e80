"""Budgets are hit on real networks, by fvcore's count of the cut network, after a search of ten steps."""

import pytest

pytest.importorskip("timm")

from budgets import BUDGETS, NAMES, WITHIN, run_model  # noqa: E402
from zoo_models import MODELS  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", NAMES)
def test_both_budgets_are_hit(name: str) -> None:
    left = run_model(MODELS[name])["left"]
    assert left == {str(budget): pytest.approx(budget, abs=WITHIN) for budget in BUDGETS}
