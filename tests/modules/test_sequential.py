"""Candidates of a supernet one after another: the same step, in the memory of one path."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from blocks import mbconv
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dnal_nni import Budget, DNALPruner
from dnal_nni.modules.choices import Mixture

ALL = [{"op_types": ["Conv2d", "Linear"]}]


class _Live(TorchDispatchMode):
    """Bytes of all tensors that operations made and that are still alive, and the most that there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    self._add(storage._cdata, storage.nbytes())
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _add(self, key: int, size: int) -> None:
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def peak_of(step: Callable[[], Any]) -> int:
    with _Live() as live:
        step()
    return live.peak


def net(kernels: tuple[int, ...], expands: tuple[int, ...], layers: int = 6) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, 1, 1),
        *(
            Mixture({f"k{k}e{e}": mbconv(6, 6, k, e) for k in kernels for e in expands}, f"layer{i}")
            for i in range(layers)
        ),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10),
    )  # fmt: skip


def search_step(model: nn.Module, sequential: bool) -> Callable[[], Any]:
    pruner = DNALPruner(model, ALL, dummy_input=torch.randn(1, 1, 16, 16), budget=Budget(flops=0.5))
    for module in model.modules():
        if isinstance(module, Mixture):
            module.sequential = sequential
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    search = pruner.search(10, optimizer=optimizer, progress=False)
    search.start()
    images, labels = torch.randn(32, 1, 16, 16), torch.randint(0, 10, (32,))
    return lambda: search.step(F.cross_entropy(model(images), labels))


def test_a_sequential_step_is_the_same_step_in_the_memory_of_one_path() -> None:
    torch.manual_seed(0)
    model = net((3, 5, 7), (3, 6))
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    plain = peak_of(search_step(model, False))
    torch.manual_seed(1)
    sequential = peak_of(search_step(other, True))
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(a, b, msg=name)  # weights and norm statistics: the batch was seen once

    single = net((7,), (6,))  # the largest path, trained by itself
    optimizer = torch.optim.SGD(single.parameters(), 0.01, momentum=0.9)
    images, labels = torch.randn(32, 1, 16, 16), torch.randint(0, 10, (32,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(single(images), labels).backward()
        optimizer.step()

    one_path = peak_of(step)
    assert sequential <= 1.5 * one_path
    assert plain > 3 * one_path  # what it would be otherwise
