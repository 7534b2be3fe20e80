"""What people decided is counted from the network and from what was asked."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnal_nni import Budget, DNALError, DNALPruner
from dnal_nni.modules.choices import Depth, Mixture
from dnal_nni.report.interventions import Interventions
from dnal_nni.report.record import Report


def after(pruner: DNALPruner, model: nn.Module, x: Tensor) -> Interventions:
    with pruner.search(4, progress=False) as search:
        for _ in range(4):
            search.step(F.cross_entropy(model(x), torch.arange(len(x))))
    pruner.speedup()
    made = pruner.report.interventions
    assert made is not None
    return made


def test_of_a_search(small: nn.Module, x: Tensor) -> None:
    """Five layers and their coupling are the user's; what may go is searched, but what was not selected."""
    pruner = DNALPruner(small, [{"op_types": ["Conv2d"]}], dummy_input=x, budget=Budget(flops=0.6))
    made = after(pruner, small, x)
    assert made.searched == {"widths": 3} and made.fixed == {"operations": 5}
    assert made.changed == {"flops": 0.6} and made.count == 6
    assert (made.steps, made.epochs, made.candidates) == (4, None, 0)


def test_what_is_not_selected_and_what_is_set_count(small: nn.Module, x: Tensor) -> None:
    asked = [{"op_types": ["Conv2d"], "exclude_op_names": ["last"], "sparse_ratio": 0.5}]
    made = after(DNALPruner(small, asked, dummy_input=x, arch_lr=0.5, channel_multiple=2), small, x)
    assert made.searched == {"widths": 2} and made.fixed == {"operations": 5, "widths": 1}
    assert made.changed == {"sparse_ratio": [0.5], "arch_lr": 0.5, "channel_multiple": 2} and made.count == 9


def test_widths_by_hand_are_decisions(small: nn.Module, x: Tensor) -> None:
    pruner = DNALPruner(small, [{"op_types": ["Conv2d"]}], dummy_input=x)
    pruner.harden({})
    pruner.speedup()
    made = pruner.report.interventions
    assert made == Interventions(fixed={"operations": 5, "widths": 3}) and made.count == 8


def test_of_a_supernet() -> None:
    """Layers that a choice is about are searched; those of a block that may be left out are somebody's all the same."""
    layer = Mixture({"c3": nn.Conv2d(4, 4, 3, 1, 1), "c5": nn.Conv2d(4, 4, 5, 1, 2)}, label="layer")
    twin = Mixture({"c3": nn.Conv2d(4, 4, 3, 1, 1), "c5": nn.Conv2d(4, 4, 5, 1, 2)}, label="layer")
    blocks = Depth([nn.Conv2d(4, 4, 1) for _ in range(2)], depths=[1, 2], label="depth")
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)]
    model = nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.ReLU(), twin, nn.ReLU(), blocks, *head)
    x = torch.randn(4, 1, 8, 8)
    kinds = [{"op_types": ["Conv2d", "Linear"]}]
    made = after(DNALPruner(model, kinds, dummy_input=x, budget=Budget(flops=0.6)), model, x)
    assert (made.searched["operations"], made.searched["depths"], made.fixed["operations"]) == (1, 1, 4)
    assert "inputs" not in made.searched


def test_text_page_and_json(report: Report) -> None:
    report.interventions = Interventions({"widths": 3}, {"operations": 5}, {"flops": 0.5, "lr": 0.1}, 250, 2, 30)
    text, page = str(report), report.to_html()
    for said in ("arguments that are not the defaults: flops=0.5, lr=0.1", "decisions that people took: 7"):
        assert said in text and said in page
    assert "searched for 250 steps, 2 epochs; candidates trained: 30" in text
    assert ["operations", "0", "5"] in [line.split() for line in text.splitlines()]
    again = Report.from_dict(json.loads(report.to_json()))
    assert again.interventions == report.interventions


@pytest.mark.parametrize("name, value", [("searched", {"widths": "3"}), ("steps", 1.5), ("changed", [1])])
def test_wrong_types_are_a_sentence(name: str, value: Any) -> None:
    with pytest.raises(DNALError, match=rf"interventions\.{name} is .*: give "):
        Interventions(**{name: value})
