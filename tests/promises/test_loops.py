"""What users put into their training loops: a search goes on in them, and finds what it finds without them."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import CONV, Small
from memory import saved_bytes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dnal_nni import Budget, DNALPruner
from dnal_nni.search.loop import Search

Batches = list[tuple[Tensor, Tensor]]
Step = Callable[[Search, nn.Module, torch.optim.Optimizer, Tensor, Tensor], None]


def plain(search: Search, model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    search.step(F.cross_entropy(model(images), labels))


def accumulated(
    search: Search, model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> None:
    optimizer.zero_grad()
    for x, y in zip(images.chunk(2), labels.chunk(2)):
        (search.penalised(F.cross_entropy(model(x), y)) / 2).backward()
    search.before_optimizer_step()
    if search.learns_weights:
        optimizer.step()
    search.after_optimizer_step()


def scaled(search: Search, model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.zero_grad()
    scaler.scale(search.penalised(F.cross_entropy(model(images), labels))).backward()
    search.before_optimizer_step()
    if search.learns_weights:
        scaler.step(optimizer)
        scaler.update()
    search.after_optimizer_step()


class Checkpointed(Small):
    """Computes its block again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = checkpoint(self.block, x, use_reentrant=False)
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))

    def block(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x)


def found(model: nn.Module, batches: Batches, step: Step, learning: bool) -> tuple[Tensor, nn.Module]:
    """The scores at the end of a search, and the cut network."""
    model.eval()  # norms that know no batch: half a batch twice is the batch
    pruner = DNALPruner(model, CONV, dummy_input=batches[0][0][:2], budget=Budget(flops=0.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    with pruner.search(30, optimizer=optimizer if learning else None, progress=False) as search:
        for images, labels in (batches * 4)[:30]:
            step(search, model, optimizer, images, labels)
    assert search.done == 30
    return search.score, pruner.speedup()


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("case", ["accumulated", "scaled", "checkpointed"])
def test_the_loop_does_not_matter(small: nn.Module, batches: Batches, case: str, learning: bool) -> None:
    if case == "scaled" and not hasattr(torch.amp, "GradScaler"):
        pytest.skip("torch < 2.3 has no GradScaler for the CPU")
    if case == "checkpointed" and torch.__version__.startswith("2.2."):
        pytest.skip("torch 2.2 does not trace torch.utils.checkpoint, so fvcore cannot count it")
    other = copy.deepcopy(small)
    if case == "checkpointed":
        other.__class__ = Checkpointed
    step = {"accumulated": accumulated, "scaled": scaled, "checkpointed": plain}[case]
    score, slim = found(small, batches, plain, learning)
    same, other_slim = found(other, batches, step, learning)
    assert torch.allclose(score, same, atol=1e-4) and score.std() > 1e-3
    assert [p.shape for p in slim.parameters()] == [p.shape for p in other_slim.parameters()]
    x = batches[0][0]
    assert torch.allclose(slim(x), other_slim(x), atol=1e-3)


@pytest.mark.skipif(torch.__version__.startswith("2.2."), reason="torch 2.2 does not compile a model with gates")
@pytest.mark.parametrize("learning", [False, True])
def test_one_graph_for_the_whole_schedule(small: nn.Module, batches: Batches, learning: bool) -> None:
    """Under torch.compile nothing is compiled again as delta grows."""
    import torch._dynamo.testing

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    images, labels = batches[0]
    pruner = DNALPruner(small, CONV, dummy_input=images[:2], budget=Budget(flops=0.5))
    optimizer = torch.optim.SGD(small.parameters(), 0.01) if learning else None
    with pruner.search(20, optimizer=optimizer, progress=False) as search:
        compiled = torch.compile(small, backend=counter, fullgraph=True)
        for _ in range(20):
            search.step(F.cross_entropy(compiled(images), labels))
    assert counter.frame_count == 1 and float(pruner.gates["stem"].delta) > 1000
    slim = pruner.speedup()
    assert torch.allclose(small.eval()(images), slim.eval()(images), atol=1e-4)


def test_bf16_and_channels_last(small: nn.Module, batches: Batches) -> None:
    small.to(memory_format=torch.channels_last).train()
    pruner = DNALPruner(small, CONV, dummy_input=batches[0][0][:2], budget=Budget(flops=0.5))
    optimizer = torch.optim.SGD(small.parameters(), 0.05, momentum=0.9)
    with pruner.search(30, optimizer=optimizer, progress=False) as search:
        for images, labels in (batches * 4)[:30]:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(small(images.to(memory_format=torch.channels_last)), labels)
            search.step(loss)
    slim = pruner.speedup()
    assert pruner.report.after.flops / pruner.report.before.flops == pytest.approx(0.5, abs=0.03)
    assert slim.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert search.decided() == 1 and bool(search.score.isfinite().all())


@pytest.mark.parametrize("learning", [False, True])
def test_a_search_keeps_no_more_activations(small: nn.Module, batches: Batches, learning: bool) -> None:
    """Bytes that autograd saves for backward, parameters and gates left out."""
    images, labels = batches[0]
    plain_bytes = saved_bytes(small, lambda: small(images))
    pruner = DNALPruner(small, CONV, dummy_input=images[:2], budget=Budget(flops=0.5))
    assert {group.site for group in pruner.groups} == {"norm", "input"}
    optimizer = torch.optim.SGD(small.parameters(), 0.01) if learning else None
    with pruner.search(20, optimizer=optimizer, progress=False) as search:
        search.step(F.cross_entropy(small(images), labels))
        searching = saved_bytes(small, lambda: small(images))
    gated_input = images.shape[0] * 16 * 4 * 4 * 4  # of the one group without a norm, behind `last`, in float32
    assert searching <= 1.02 * plain_bytes + gated_input
