"""Cut networks through torch.export, TorchScript and ONNX: each computes what the network computes."""

import copy
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import Small
from torch import Tensor, nn

from dnal_nni.channels.groups import find_groups
from dnal_nni.surgery.slim import slim_copy
from dnal_nni.surgery.verify import random_keep, verify_and_freeze


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10)


def mobile() -> nn.Module:
    return torchvision.models.mobilenet_v3_small(num_classes=10)


def swin() -> nn.Module:
    """Attention heads go: its class changes with the cut."""
    return torchvision.models.swin_transformer.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "small": (Small, (2, 1, 8, 8)),
    "resnet18": (resnet, (2, 3, 32, 32)),
    "mobilenet_v3_small": (mobile, (2, 3, 32, 32)),
    "swin": (swin, (2, 3, 32, 32)),
}


LARGE = ("resnet18", "mobilenet_v3_small")


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in NETWORKS]
)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    """Cut and in eval mode, with its norms off their first values, and an input."""
    torch.manual_seed(0)
    build, shape = NETWORKS[request.param]
    model, x = build(), torch.randn(shape)
    with torch.no_grad():
        model.train()(x)
    groups = find_groups(model, x)
    verify_and_freeze(model, groups, x, 60)
    slim = slim_copy(model, groups, random_keep(groups, 0.5)).eval()
    assert sum(p.numel() for p in slim.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    return slim, x


@torch.no_grad()
def test_torch_export(network: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    slim, x = network
    program = torch.export.export(copy.deepcopy(slim), (x,))
    assert torch.allclose(program.module()(x), slim(x), rtol=1e-4, atol=1e-5)
    torch.export.save(program, tmp_path / "slim.pt2")
    again = torch.export.load(tmp_path / "slim.pt2")
    other = torch.randn_like(x)
    assert torch.allclose(again.module()(other), slim(other), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_torchscript(network: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    slim, x = network
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated, and remarks on constants in a trace
        torch.jit.trace(slim, x).save(str(tmp_path / "slim.pt"))
        again = torch.jit.load(str(tmp_path / "slim.pt"))
    other = torch.randn_like(x)
    assert torch.allclose(again(other), slim(other), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_onnx(network: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    if "dynamo" not in inspect.signature(torch.onnx.export).parameters:
        pytest.skip("this torch has no torch.onnx.export(dynamo=True)")
    slim, x = network
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own parts
        torch.onnx.export(slim, (x,), str(tmp_path / "slim.onnx"), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "slim.onnx"), providers=["CPUExecutionProvider"])
    other = torch.randn_like(x)
    (got,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    assert torch.allclose(torch.from_numpy(got), slim(other), rtol=1e-3, atol=1e-4)
