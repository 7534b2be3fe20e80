"""What only a GPU can show; run with  pytest -m gpu."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from conftest import CONV
from torch import Tensor, nn

from dnal_nni import Budget, DNALError, DNALPruner, measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]
STEPS = 60


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.manual_seed(0)
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.cuda.set_sync_debug_mode("default")


def resnet20() -> nn.Module:
    from cifar_models import MODELS

    return MODELS["resnet20"](10, 1.0)


def data(batch: int = 32) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 32, 32, device="cuda"), torch.randint(0, 10, (batch,), device="cuda")


def run(pruner: DNALPruner, model: nn.Module, steps: int, **kwargs: object) -> None:
    images, labels = data()
    with pruner.search(steps, progress=False, **kwargs) as search:
        for _ in range(steps):
            search.step(F.cross_entropy(model(images), labels))


@pytest.mark.parametrize("learning", [False, True])
def test_the_whole_pipeline(learning: bool) -> None:
    model = resnet20().cuda()
    x = torch.randn(2, 3, 32, 32, device="cuda")
    pruner = DNALPruner(model, CONV, dummy_input=x, budget=Budget(flops=0.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9) if learning else None
    run(pruner, model, STEPS, optimizer=optimizer)
    slim = pruner.speedup()
    assert next(slim.parameters()).is_cuda and all(gate.s.is_cuda for gate in pruner.gates.values())
    assert torch.allclose(model.eval()(x), slim.eval()(x), atol=1e-4)
    assert pruner.report.relative_diff is not None and pruner.report.relative_diff < 1e-9
    pruner.unwrap_model()
    assert measure(slim, x).flops / measure(model, x).flops == pytest.approx(0.5, rel=0.01)


def test_moving_ahead_of_or_after_building_is_the_same() -> None:
    first = resnet20()
    second = copy.deepcopy(first)
    before = DNALPruner(first.cuda(), CONV, dummy_input=torch.zeros(1, 3, 32, 32).cuda(), budget=Budget(flops=0.5))
    after = DNALPruner(second, CONV, dummy_input=torch.zeros(1, 3, 32, 32), budget=Budget(flops=0.5))
    second.cuda()
    for pruner, model in ((before, first), (after, second)):
        torch.manual_seed(1)
        run(pruner, model, 20)
        assert all(gate.s.is_cuda and gate.delta.is_cuda and gate.mask.is_cuda for gate in pruner.gates.values())
    for a, b in zip(before.gates.values(), after.gates.values()):
        assert torch.allclose(a.s, b.s, atol=1e-3)
    second.cpu()
    assert all(gate.s.device.type == "cpu" for gate in after.gates.values())


@pytest.mark.parametrize("learning", [False, True])
def test_a_search_step_never_waits_for_the_device(learning: bool) -> None:
    model = resnet20().cuda()
    pruner = DNALPruner(model, CONV, dummy_input=torch.randn(1, 3, 32, 32, device="cuda"), budget=Budget(flops=0.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9) if learning else None
    images, labels = data()
    with pruner.search(1000, optimizer=optimizer, progress=False) as search:  # an entry of the history every 10 steps
        for step in range(18):
            if step in (0, 10):  # it looks at the loss while it writes the history, at the end of step 9
                torch.cuda.set_sync_debug_mode("error")
            if step == 9:
                torch.cuda.set_sync_debug_mode("default")
            search.step(F.cross_entropy(model(images), labels))


def test_a_nan_loss_is_reported_with_its_step() -> None:
    model = resnet20().cuda()
    before = copy.deepcopy(model.state_dict())
    pruner = DNALPruner(model, CONV, dummy_input=torch.randn(1, 3, 32, 32, device="cuda"), budget=Budget(flops=0.5))
    images, labels = data()
    with pytest.raises(DNALError, match="nan or infinite at search step 3"):
        with pruner.search(1000, optimizer=torch.optim.SGD(model.parameters(), 0.1), progress=False) as search:
            for step in range(12):
                search.step(F.cross_entropy(model(images), labels) * (float("nan") if step == 3 else 1))
    pruner.unwrap_model()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_autocast_and_channels_last() -> None:
    model = resnet20().cuda().to(memory_format=torch.channels_last)
    pruner = DNALPruner(model, CONV, dummy_input=torch.randn(1, 3, 32, 32, device="cuda"), budget=Budget(flops=0.5))
    images, labels = data()
    images = images.to(memory_format=torch.channels_last)
    with pruner.search(STEPS, optimizer=torch.optim.SGD(model.parameters(), 0.01), progress=False) as search:
        for _ in range(STEPS):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(images), labels)
            search.step(loss)
    slim = pruner.speedup()
    weight = slim.get_submodule("layer1.0.conv1").weight
    assert isinstance(weight, Tensor) and weight.is_contiguous(memory_format=torch.channels_last)
    assert all(gate.s.dtype == torch.float32 for gate in pruner.gates.values())
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        gated, cut = model.eval()(images), slim.eval()(images)
    assert torch.allclose(gated.float(), cut.float(), rtol=0.05, atol=0.05 * float(gated.abs().max()))


def test_one_compilation_for_the_whole_schedule() -> None:
    import torch._dynamo.testing

    model = resnet20().cuda()
    pruner = DNALPruner(model, CONV, dummy_input=torch.randn(1, 3, 32, 32, device="cuda"), budget=Budget(flops=0.5))
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    images, labels = data()
    with pruner.search(STEPS, progress=False) as search:
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for _ in range(STEPS):
            search.step(F.cross_entropy(compiled(images), labels))
    assert counter.frame_count == 1
    slim = pruner.speedup()
    assert torch.allclose(model.eval()(images), slim.eval()(images), atol=1e-4)
