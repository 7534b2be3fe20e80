"""The keys of NNI's config_list: honoured for coupled groups, or refused with the reason."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import CONV
from torch import Tensor, nn

from dnal_nni import Budget, DNALError, DNALPruner, measure

Batches = list[tuple[Tensor, Tensor]]


def searched(pruner: DNALPruner, batches: Batches, steps: int = 40) -> dict[str, int]:
    """Units kept by group after a search."""
    with pruner.search(steps, progress=False) as search:
        for step in range(steps):
            images, labels = batches[step % len(batches)]
            search.step(F.cross_entropy(pruner.bound_model(images), labels))
    pruner.harden()
    return {name: int(gate.mask.sum()) for name, gate in pruner.gates.items()}


def entry(name: str, **settings: Any) -> dict[str, Any]:
    return {"op_names": [name], **settings}


def test_the_smallest_ratio_of_a_coupled_group_rules(small: nn.Module, x: Tensor, batches: Batches) -> None:
    config = [entry("stem", sparse_ratio=0.75), entry("conv2", sparse_ratio=0.25), entry("conv1", sparse_ratio=0.5)]
    pruner = DNALPruner(small, config, dummy_input=x)
    assert searched(pruner, batches) == {"stem": 9, "conv1": 4}


def test_the_first_entry_that_names_a_layer_holds(small: nn.Module, x: Tensor, batches: Batches) -> None:
    config = [entry("conv1", sparse_ratio=0.25), {"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    pruner = DNALPruner(small, config, dummy_input=x)
    assert searched(pruner, batches) == {"stem": 6, "conv1": 6, "last": 8}


def test_a_global_group_shares_its_ratio(small: nn.Module, x: Tensor, batches: Batches) -> None:
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "global_group_id": 0}]
    with torch.no_grad():
        for parameter in (small.conv1.weight, small.bn1.weight):
            parameter.mul_(1e-3)  # worth nothing: the others need not give as much
    kept = searched(DNALPruner(small, config, dummy_input=x), batches, 200)
    assert sum(kept.values()) == 18 and kept != {"stem": 6, "conv1": 4, "last": 8}
    config[0] |= {"max_sparse_ratio": 0.5, "min_sparse_ratio": 0.5}
    small = type(small)()
    assert searched(DNALPruner(small, config, dummy_input=x), batches) == {"stem": 6, "conv1": 4, "last": 8}


@pytest.mark.parametrize("target_settings", [False, True])
def test_limits_hold_under_a_budget(small: nn.Module, x: Tensor, batches: Batches, target_settings: bool) -> None:
    limits = {"max_sparse_ratio": 0.25, "min_sparse_ratio": 0.125}
    settings = {"target_names": ["weight"], "target_settings": {"weight": limits}} if target_settings else limits
    config = [entry("conv1", **settings), {"op_names_re": ["stem|conv2|last"], "exclude_op_names": ["fc"]}]
    kept = searched(DNALPruner(small, config, dummy_input=x, budget=Budget(flops=0.5)), batches, 100)
    assert 6 <= kept["conv1"] <= 7
    small = type(small)()
    config = [entry("conv1", max_sparse_ratio=0.9), {"op_names": ["stem", "conv2"], "max_sparse_ratio": 0.25}]
    kept = searched(DNALPruner(small, config, dummy_input=x, budget=Budget(flops=0.6)), batches, 100)
    assert kept["stem"] >= 9


@pytest.mark.parametrize("target_settings", [False, True])
def test_channels_of_some_layers_go_by_multiples(
    small: nn.Module, x: Tensor, batches: Batches, target_settings: bool
) -> None:
    own = {"channel_multiple": 4}
    settings = {"target_names": ["weight"], "target_settings": {"weight": own}} if target_settings else own
    config = [entry("conv1", **settings), entry("last", channel_multiple=8), {"op_names": ["stem", "conv2"]}]
    pruner = DNALPruner(small, config, dummy_input=x, budget=Budget(flops=0.45), channel_multiple=1)
    assert pruner.plan.limits.multiples == [1, 4, 8]
    kept = searched(pruner, batches, 100)
    assert kept["conv1"] in (4, 8) and kept["last"] in (8, 16)
    pruner.speedup()
    assert pruner.report.interventions is not None
    assert pruner.report.interventions.changed["channel_multiple of layers"] == [4, 8]


def test_coupled_layers_keep_multiples_of_each_number(small: nn.Module, x: Tensor) -> None:
    config = [entry("stem", channel_multiple=2), entry("conv2", channel_multiple=3), entry("conv1")]
    pruner = DNALPruner(small, config, dummy_input=x, budget=Budget(flops=0.6), channel_multiple=4)
    assert pruner.plan.limits.multiples == [6, 4]
    config = [entry("conv1", channel_multiple=8), entry("last")]
    with pytest.raises(DNALError, match="cannot be reached: with what channel_multiple=8 keeps"):
        DNALPruner(type(small)(), config, dummy_input=x, budget=Budget(flops=0.2), channel_multiple=1)


def test_limits_clip_a_ratio(small: nn.Module, x: Tensor, batches: Batches) -> None:
    config = [entry("conv1", sparse_ratio=0.75, max_sparse_ratio=0.5), entry("last", min_sparse_ratio=0.5)]
    assert searched(DNALPruner(small, config, dummy_input=x), batches) == {"conv1": 4, "last": 8}


def test_a_threshold_is_compared_with_the_gates(small: nn.Module, x: Tensor, batches: Batches) -> None:
    config = [{"op_types": ["Conv2d"], "sparse_threshold": 0.6, "max_sparse_ratio": 0.75}]
    pruner = DNALPruner(small, config, dummy_input=x, lambda_=0.02)
    kept = searched(pruner, batches, 100)
    for name, gate in pruner.gates.items():
        over = int((torch.sigmoid(gate.delta * gate.s) > 0.6).sum())
        assert kept[name] == max(over, math.ceil(gate.s.numel() / 4))


def test_dependency_ids_that_the_model_has_anyway(small: nn.Module, x: Tensor, batches: Batches) -> None:
    config = [
        {"op_names": ["stem", "conv2"], "sparse_ratio": 0.5, "dependency_group_id": "a", "internal_metric_block": 1},
        entry("conv1", sparse_ratio=0.5, dependency_group_id="b"),
    ]
    assert searched(DNALPruner(small, config, dummy_input=x), batches) == {"stem": 6, "conv1": 4}


def test_ids_from_nni_are_accepted() -> None:
    pytest.importorskip("tensorboard")  # NNI imports it there and does not declare it
    from nni.compression.utils import auto_set_denpendency_group_ids

    model, x = torchvision.models.resnet18(), torch.randn(2, 3, 64, 64)
    config = auto_set_denpendency_group_ids(model, [{**CONV[0], "sparse_ratio": 0.5}], x)
    pruner = DNALPruner(model, config, dummy_input=x)
    assert list(pruner.gates) == list(DNALPruner(torchvision.models.resnet18(), CONV, dummy_input=x).gates)


def test_nnis_older_schema(small: nn.Module, x: Tensor, batches: Batches) -> None:
    config = [{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_names": ["last"], "exclude": True}]
    assert searched(DNALPruner(small, config, dummy_input=x), batches) == {"stem": 6, "conv1": 4}
    small = type(small)()
    config = [{"op_partial_names": ["conv1"], "sparsity_per_layer": 0.75, "max_sparsity_per_layer": 0.5}]
    pruner = DNALPruner(small, config, dummy_input=x)
    assert searched(pruner, batches) == {"conv1": 4}
    before = measure(small, x).flops
    assert measure(pruner.speedup(), x).flops < before


def many(**settings: Any) -> list[dict[str, Any]]:
    return [{"op_types": ["Conv2d"], **settings}]


REFUSED = {
    "unknown key": (many(gate=1), "key 'gate' is not supported; use .*sparse_ratio"),
    "total_sparsity": (many(total_sparsity=0.5), "total_sparsity.*use sparse_ratio with a global_group_id"),
    "align": (many(align={}), "align.*by themselves"),
    "ratio and threshold": (many(sparse_ratio=0.5, sparse_threshold=0.5), "sparse_ratio or sparse_threshold, not both"),
    "ratio": (many(sparse_ratio=1), "sparse_ratio=1 must be a float"),
    "max": (many(max_sparse_ratio=1.5), "max_sparse_ratio=1.5 must be a float"),
    "multiple": (many(channel_multiple=0), "channel_multiple=0 must be a whole number >= 1"),
    "no multiple": (many(channel_multiple=2.5), "channel_multiple=2.5 must be a whole number >= 1"),
    "threshold": (many(sparse_threshold=1.0), "sparse_threshold=1.0 must be a float in"),
    "granularity": (many(granularity="in_channel"), "granularity='in_channel' is not supported; use 'default' or"),
    "blocks": (many(granularity=[4, 4]), "granularity=.4, 4. is not supported"),
    "apply_method": (many(apply_method="add"), "apply_method='add' is not supported; use 'mul'"),
    "output target": (
        many(target_names=["_output_"]),
        "target '_output_': the output of a layer and of its norm closes",
    ),
    "input settings": (many(target_settings={"_input_0": {}}), "target '_input_0': DNALPruner removes output channels"),
    "other target": (many(target_names=["weight", "scale"]), "target 'scale': only weight and bias"),
    "bias alone": (many(target_names=["bias"]), "channels go with their weights; add 'weight'"),
    "setting of the weight": (many(target_settings={"weight": {"sparse_ratio": 2.0}}), "'weight'.*sparse_ratio=2.0"),
    "setting of the bias": (many(target_settings={"bias": {"sparse_ratio": 0.5}}), "'bias'.*key 'sparse_ratio'"),
    "uncoupled dependency": (
        many(dependency_group_id=1),
        "joins stem and conv1, whose channels the model does not couple",
    ),
    "two global groups": (
        [entry("stem", global_group_id=0), entry("conv2", global_group_id=1)],
        "stem and conv2 are coupled, but in the global groups 0 and 1",
    ),
    "threshold and ratio elsewhere": (
        [entry("conv1", sparse_threshold=0.5), entry("last", sparse_ratio=0.5)],
        "sparse_threshold goes with neither a budget nor a sparse_ratio",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_honoured_is_refused(name: str, small: nn.Module, x: Tensor) -> None:
    config, message = REFUSED[name]
    with pytest.raises(DNALError, match=message):
        DNALPruner(small, config, dummy_input=x)
    assert not any("parametrizations" in path for path, _ in small.named_modules())


def test_limits_and_budgets_must_fit(small: nn.Module, x: Tensor) -> None:
    with pytest.raises(DNALError, match="cannot be reached: with what max_sparse_ratio keeps"):
        DNALPruner(small, many(max_sparse_ratio=0.125), dummy_input=x, budget=Budget(flops=0.5))
    with pytest.raises(DNALError, match="more than min_sparse_ratio leaves"):
        DNALPruner(small, many(min_sparse_ratio=0.5), dummy_input=x, budget=Budget(flops=0.75))
    with pytest.raises(DNALError, match="goes with neither a budget"):
        DNALPruner(small, many(sparse_threshold=0.5), dummy_input=x, budget=Budget(flops=0.75))
