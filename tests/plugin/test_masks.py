"""`speedup`: masks of NNI's pruners become smaller networks."""

import copy
import logging
from typing import Any

import nni
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from nni.compression import TorchEvaluator
from nni.compression.pruning import (
    AGPPruner,
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LevelPruner,
    LinearPruner,
    MovementPruner,
    SlimPruner,
    TaylorPruner,
)
from torch import Tensor, nn

from dnal_nni import DNALError, DNALPruner, measure, speedup

CONV = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def trained(model: nn.Module) -> nn.Module:
    """Norms as after training: neither means of 0 nor variances, scales of 1."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2.0),
            ):  # fmt: skip
                assert tensor is not None
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model.eval()


def evaluator(model: nn.Module) -> TorchEvaluator:
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(4, 3, 32, 32, generator=generator), torch.randint(0, 10, (4,))) for _ in range(2)]

    def training(model, optimizer, training_step, scheduler, max_steps, max_epochs):
        for step in range(max_steps or 2 * max_epochs):
            optimizer.zero_grad()
            training_step(batches[step % 2], model).backward()
            optimizer.step()

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=1e-4)
    return TorchEvaluator(training, optimizer, lambda batch, model: F.cross_entropy(model(batch[0]), batch[1]))


def vgg() -> nn.Module:
    model = torchvision.models.vgg11_bn(num_classes=10)
    model.classifier = nn.Linear(512 * 7 * 7, 10)
    return trained(model)


def single_path_hard_gated(model: nn.Module, masks: Any, x: Tensor) -> Tensor:
    """What a sequential network computes when the masked channels are zero behind their norm and activation."""
    y, gone = x, None
    for name, module in model.features.named_children():
        y = module(y)
        if isinstance(module, nn.Conv2d):
            gone = masks[f"features.{name}"]["weight"].flatten(1).amax(1) == 0
        if isinstance(module, nn.ReLU) and gone is not None:
            y[:, gone] = 0
    return model.classifier(torch.flatten(model.avgpool(y), 1))


@pytest.mark.parametrize("pruner", [L1NormPruner, L2NormPruner, FPGMPruner])
def test_a_masked_channel_is_a_removed_channel(pruner: Any) -> None:
    model = vgg()
    compressor = pruner(model, CONV)
    masked_model, masks = compressor.compress()
    with torch.no_grad():
        masked = masked_model(X)
        compressor.unwrap_model()
        slim = speedup(model, masks, X)
        expected, got = single_path_hard_gated(model, masks, X), slim(X)
    assert torch.allclose(got, expected, atol=1e-5)
    assert [m.out_channels for m in slim.modules() if isinstance(m, nn.Conv2d)] == [
        32,
        64,
        128,
        128,
        256,
        256,
        256,
        256,
    ]
    # NNI's masked model leaves the norms' biases on: the report says how far that is
    gap = float((masked - got).abs().max() / masked.abs().max())
    assert gap > 1e-3 and slim.dnal_report.masked_diff == pytest.approx(gap, rel=1e-3)
    assert model.features[0].out_channels == 64 and "masked" in str(slim.dnal_report)


def slim_masks(model: nn.Module) -> Any:
    config = [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}]
    return SlimPruner(model, config, evaluator(model), training_steps=3)


def scheduled(kind: Any) -> Any:
    return lambda model: kind(
        TaylorPruner(model, CONV, evaluator(model), training_steps=1), interval_steps=1, total_times=2
    )


PRUNERS = {
    "L1": lambda model: L1NormPruner(model, CONV),
    "Slim": slim_masks,
    "Taylor": lambda model: TaylorPruner(model, CONV, evaluator(model), training_steps=2),
    "Linear": scheduled(LinearPruner),
    "AGP": scheduled(AGPPruner),
    "Movement": lambda model: MovementPruner(model, CONV, evaluator(model), warmup_step=1, cooldown_begin_step=4),
}


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("net", ["resnet18", "mobilenet_v2"])
def test_masks_of_every_pruner_shrink_residual_networks(net: str, name: str) -> None:
    model = trained(torchvision.models.get_model(net, weights=None, num_classes=10))
    dense = copy.deepcopy(model.state_dict())
    pruner = PRUNERS[name](model)
    arguments = {"max_steps": 6, "max_epochs": None} if name in ("Linear", "AGP", "Movement") else {}
    _, masks = pruner.compress(**arguments)
    pruner.unwrap_model()
    slim = speedup(model, masks, X)  # compared with the hard-gated model, or it fails
    assert slim.dnal_report.relative_diff < 1e-9 and slim.dnal_report.max_abs_diff < 1e-4
    assert measure(slim, X).flops < 0.7 * measure(model, X).flops
    if name == "L1":
        assert all(torch.equal(value, dense[key]) for key, value in model.state_dict().items())


def disputed() -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """Two coupled layers that close channels 0-3 and 2-5 of 8, and single weights of others."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.a(x) + self.b(x)))

    model = Two()
    masks = {"a": {"weight": torch.ones(8, 3, 1, 1)}, "b": {"weight": torch.ones(8, 3, 1, 1)}}
    masks["a"]["weight"][:4] = 0
    masks["b"]["weight"][2:6] = 0
    masks["a"]["weight"][7, 1] = 0
    return model, masks


def test_where_masks_disagree(caplog: pytest.LogCaptureFixture) -> None:
    model, masks = disputed()
    x = torch.randn(2, 3, 4, 4)
    with caplog.at_level(logging.WARNING, "dnal_nni"):
        widths = {
            how: speedup(model, masks, x, conflicts=how).a.out_channels for how in ("union", "intersection", "vote")
        }
    assert widths == {"union": 6, "intersection": 2, "vote": 4}
    assert (
        "disagree or a layer stays whole: 1 of" in caplog.text
        and "asked for 4 channels on average, 2 removed" in caplog.text
    )
    voted = speedup(model, masks, x)
    assert voted.dnal_report.groups[0].asked == {"a": 4, "b": 4}
    # channels 2 and 3 have two votes; of 0, 1, 4, 5 the two with the smallest weights go
    model.requires_grad_(False)
    size = model.a.weight.flatten(1).norm(dim=1).square() / model.a.weight.square().sum()
    size = size + model.b.weight.flatten(1).norm(dim=1).square() / model.b.weight.square().sum()
    size = size + model.c.weight.flatten(2).norm(dim=(0, 2)).square() / model.c.weight.square().sum()
    gone = {2, 3, *sorted([0, 1, 4, 5], key=lambda channel: float(size[channel]))[:2]}
    kept = [channel for channel in range(8) if channel not in gone]
    weights = model.a.weight.detach().clone()
    weights[7, 1] = 0  # single masked weights stay masked; whole channels are as the vote has it
    assert torch.equal(voted.a.weight, weights[kept])
    united = speedup(model, masks, x, conflicts="union")
    assert torch.equal(united.a.weight[:2], torch.zeros(2, 3, 1, 1))  # 0 and 1 stay, masked in `a`


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), policy=st.sampled_from(["union", "intersection", "vote"]))
def test_the_number_removed_is_that_of_the_policy(seed: int, policy: Any) -> None:
    model, masks = disputed()
    generator = torch.Generator().manual_seed(seed)
    closed = {name: torch.rand(8, generator=generator) < 0.4 for name in masks}
    for name, gone in closed.items():
        gone[7] = False
        masks[name]["weight"] = (~gone).float().view(8, 1, 1, 1).expand(8, 3, 1, 1)
    both, either = closed["a"] & closed["b"], closed["a"] | closed["b"]
    wanted = {
        "union": int(both.sum()),
        "intersection": int(either.sum()),
        "vote": round(float(closed["a"].sum() + closed["b"].sum()) / 2),
    }
    if wanted[policy] == 0:
        return
    slim = speedup(model, masks, torch.randn(2, 3, 4, 4), conflicts=policy)
    assert slim.a.out_channels == slim.c.in_channels == 8 - wanted[policy]


def test_a_layer_that_is_closed_whole_keeps_one_channel_that_nothing_reads() -> None:
    model, _ = disputed()
    x = torch.randn(2, 3, 4, 4)
    slim = speedup(model, {"a": {"weight": torch.zeros(8, 3, 1, 1)}}, x)
    assert slim.a.out_channels == slim.b.out_channels == slim.c.in_channels == 1
    assert torch.equal(slim(x), model.c.bias.view(1, 2, 1, 1).expand(2, 2, 4, 4))
    assert slim.dnal_report.groups[0].asked == {"a": 8}

    model = trained(torchvision.models.mobilenet_v2(num_classes=10))
    expand = model.features[3].conv[0][0]  # of a residual block, ahead of a depthwise convolution
    slim = speedup(model, {"features.3.conv.0.0": {"weight": torch.zeros_like(expand.weight)}}, X)
    assert [slim.features[3].conv[i][0].out_channels for i in (0, 1)] == [1, 1]
    model.features[3].conv[2].weight.data.zero_()  # the projection
    with torch.no_grad():
        assert torch.allclose(slim(X), model(X), atol=1e-5)


def test_masks_of_inputs_and_outputs() -> None:
    model, _ = disputed()
    x = torch.randn(2, 3, 4, 4)
    unread = torch.ones(2, 8, 1, 1)
    unread[:, :3] = 0
    assert speedup(model, {"c": {"weight": unread}}, x).a.out_channels == 5
    output = torch.ones(2, 8, 4, 4)
    output[:, 5:] = 0
    assert speedup(model, {"a": {"_output_0": output}}, x).b.out_channels == 5


def test_dnal_masks_give_the_same_network() -> None:
    model = trained(torchvision.models.resnet18(num_classes=10))
    pruner = DNALPruner(model, [{"op_types": ["Conv2d"]}], dummy_input=X)
    keep = {
        name: torch.rand(gate.s.numel(), generator=torch.Generator().manual_seed(3)) < 0.6
        for name, gate in pruner.gates.items()
    }
    masks = pruner.harden(keep)
    slim = pruner.speedup()
    gated = speedup(model, masks, X)  # with gates on
    pruner.unwrap_model()
    for other in (gated, speedup(model, masks, X)):
        assert all(
            torch.equal(a, b) for a, b in zip(slim.state_dict().values(), other.state_dict().values(), strict=True)
        )
    again = DNALPruner(model, [{"op_types": ["Conv2d"]}], dummy_input=X)
    again.update_masks(masks)
    assert all(torch.equal(gate.mask, keep[name]) for name, gate in again.gates.items())
    assert all(torch.equal(again.get_masks()[layer]["weight"], masks[layer]["weight"]) for layer in masks)


def test_norms_can_be_estimated_anew() -> None:
    model = vgg()
    pruner = L1NormPruner(model, CONV)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    batches = [(torch.randn(4, 3, 64, 64), torch.zeros(4)) for _ in range(3)]
    slim = speedup(model, masks, X, recalibrate=batches)
    first = slim.features[1]
    with torch.no_grad():
        mean = torch.cat([slim.features[0](images) for images, _ in batches]).mean((0, 2, 3))
    assert torch.allclose(first.running_mean, mean, atol=1e-4) and not slim.training and not first.training


def bad(**masks: Any) -> Any:
    return masks


WRONG = {
    "no such layer": (bad(z={"weight": torch.ones(1)}), "no layer 'z'"),
    "another shape": (bad(a={"weight": torch.ones(9, 3, 1, 1)}), r"shape \(9, 3, 1, 1\), the layer's \(8, 3, 1, 1\)"),
    "not zeros and ones": (bad(a={"weight": torch.full((8, 3, 1, 1), 0.5)}), "zeros and ones"),
    "no such tensor": (bad(a={"scale": torch.ones(8)}), "the layer has no 'scale'"),
    "not masks": ([1], "what an NNI pruner's compress"),
    "the outputs": (
        bad(c={"weight": torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 8, 1, 1)}),
        "none of the masked channels.*model returns",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_masks_are_refused(name: str) -> None:
    model, _ = disputed()
    masks, message = WRONG[name]
    with pytest.raises(DNALError, match=message):
        speedup(model, masks, torch.randn(2, 3, 4, 4))


def test_what_cannot_shrink_a_model_is_refused() -> None:
    model, masks = disputed()
    x = torch.randn(2, 3, 4, 4)
    masks["b"]["weight"] = 1 - masks["a"]["weight"][:, :1].expand(8, 3, 1, 1)
    with pytest.raises(DNALError, match="no channel is closed by all of a, b.*use conflicts='vote'"):
        speedup(model, masks, x, conflicts="union")
    with pytest.raises(DNALError, match="conflicts='any'"):
        speedup(model, masks, x, conflicts="any")
    level = LevelPruner(model, CONV)
    _, masks = level.compress()
    with pytest.raises(DNALError, match="wrapped by another NNI compressor: call its unwrap_model"):
        speedup(model, masks, x)
    level.unwrap_model()
    for target in masks.values():
        target["weight"][:, 0] = 1  # no channel whole by chance
    with pytest.raises(DNALError, match="the masks close no whole channel.*LevelPruner"):
        speedup(model, masks, x)
