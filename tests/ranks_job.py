"""What `test_ranks.py` runs under torchrun: cases by name, or all; every rank writes what it found.

torchrun --nproc_per_node=2 tests/ranks_job.py DIR [CASE ...]
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import CONV, Small
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dnal_nni import Budget, DNALError, DNALPruner, load_compressed, save_compressed
from dnal_nni.search.ranks import from_first

STEPS = 24


def digest(tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        sha.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


def batches() -> list[tuple[Tensor, Tensor]]:
    """This rank's share of every global batch of 32."""
    generator = torch.Generator().manual_seed(0)
    whole = [
        (torch.randn(32, 1, 8, 8, generator=generator), torch.randint(0, 10, (32,), generator=generator))
        for _ in range(STEPS)
    ]
    return [
        (x[dist.get_rank() :: dist.get_world_size()], y[dist.get_rank() :: dist.get_world_size()]) for x, y in whole
    ]


def network() -> nn.Module:
    torch.manual_seed(0)
    return Small()


def searched(
    learning: bool, *, train: bool = True, budget: Budget | None = None, **kwargs: Any
) -> tuple[DNALPruner, nn.Module]:
    """A search on all ranks, and the cut network."""
    model = network().train(train)
    budget = Budget(flops=0.5) if budget is None else budget
    pruner = DNALPruner(model, CONV, dummy_input=torch.randn(2, 1, 8, 8), budget=budget, **kwargs)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    ddp = DistributedDataParallel(model)
    with pruner.search(STEPS, optimizer=optimizer if learning else None, progress=False) as search:
        for images, labels in batches():
            search.step(F.cross_entropy(ddp(images), labels))
    return pruner, pruner.speedup()


def train(model: nn.Module) -> nn.Module:
    """In place, by all ranks."""
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.01)
    for images, labels in batches():
        optimizer.zero_grad()
        F.cross_entropy(ddp(images), labels).backward()
        optimizer.step()
    return model


def found(pruner: DNALPruner, slim: nn.Module) -> dict[str, Any]:
    return {
        "gates": digest({name: gate.s for name, gate in pruner.gates.items()}),
        "keep": {name: gate.mask.tolist() for name, gate in pruner.gates.items()},
        "slim": digest(slim.state_dict()),
        "loss": [entry["loss"] for entry in pruner.report.history],
        "sites": [(group.name, group.site, group.frozen) for group in pruner.groups],
    }


def learning(out: Path) -> dict[str, Any]:
    return found(*searched(True))


def frozen(out: Path) -> dict[str, Any]:
    """The reducer waits for no gradient of a frozen weight, and goes on when they learn again."""
    pruner, slim = searched(False)
    before = digest(pruner.bound_model.state_dict())
    tuned = train(pruner.bound_model)  # hard gates are on
    assert before != digest(tuned.state_dict())
    return found(pruner, slim) | {"tuned": digest(dict(tuned.named_parameters()))}


def in_eval_mode(out: Path) -> dict[str, Any]:
    """Norms that know no batch: the global batch is all that counts."""
    return found(*searched(True, train=False))


def paper(out: Path) -> dict[str, Any]:
    return found(*searched(False, preset="paper"))


def latency(out: Path) -> dict[str, Any]:
    """With a clock that only runs on rank 0."""

    def tick(function: Callable[..., Any], model: nn.Module, *args: Any) -> float:
        assert dist.get_rank() == 0
        return 1e-3 * sum(p.numel() for p in model.parameters())

    with mock.patch("dnal_nni.cost.latency.milliseconds", tick):
        pruner, slim = searched(True, budget=Budget(latency=0.6))
    return found(pruner, slim) | {"latency": pruner.report.latency_ms}


def whole_pipeline(out: Path) -> dict[str, Any]:
    """Search, cut, fine-tune under DDP, written by rank 0, read by all; the checkpoint of the search is rank 0's."""
    pruner, slim = searched(True)
    pruner.save_checkpoint(out / f"state{dist.get_rank()}")
    train(slim)
    path = out / "slim.safetensors"
    if dist.get_rank() == 0:
        save_compressed(slim, path)
    dist.barrier()
    loaded = load_compressed(Small(), path)
    return {"loaded": digest(loaded.state_dict()), "files": sorted(p.name for p in out.glob("state*"))}


def sharded(out: Path) -> dict[str, Any]:
    """FSDP2 fine-tunes the cut network as one process does."""
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    if not hasattr(fsdp, "fully_shard"):
        return {}
    _, slim = searched(True)
    slim.eval()  # norms that know no batch
    save_compressed(slim, out / f"slim{dist.get_rank()}")
    alone = load_compressed(Small(), out / f"slim{dist.get_rank()}").eval()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for child in (slim.conv1, slim.conv2, slim):
        fsdp.fully_shard(child, mesh=mesh)
    optimizers = [torch.optim.SGD(model.parameters(), 0.05, momentum=0.9) for model in (slim, alone)]
    for images, labels in batches():
        whole = [torch.empty_like(images) for _ in range(dist.get_world_size())]
        every = [torch.empty_like(labels) for _ in range(dist.get_world_size())]
        dist.all_gather(whole, images)
        dist.all_gather(every, labels)
        data = ((images, labels), (torch.cat(whole), torch.cat(every)))
        for model, optimizer, (x, y) in zip((slim, alone), optimizers, data):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    gaps = []
    for (name, a), b in zip(slim.named_parameters(), alone.parameters()):
        assert a.device_mesh == mesh, name
        gaps.append(float((a.detach().full_tensor() - b.detach()).abs().max()))
    return {"gap": max(gaps)}


def errors(out: Path) -> dict[str, Any]:
    """What goes wrong on one rank, or on all, is the same error on all of them; nothing hangs."""
    rank = dist.get_rank()
    said = {}

    def case(name: str, run: Callable[[], object]) -> None:
        try:
            run()
        except DNALError as error:
            said[name] = str(error)

    def prune(model: nn.Module) -> DNALPruner:
        return DNALPruner(model, CONV, dummy_input=torch.randn(2, 1, 8, 8), budget=Budget(flops=0.5))

    def other_model() -> None:
        model = network()
        if rank == 1:
            model.conv1, model.bn1, model.conv2 = (
                nn.Conv2d(12, 6, 3, 1, 1),
                nn.BatchNorm2d(6),
                nn.Conv2d(6, 12, 3, 1, 1),
            )
        prune(model)

    def other_weights() -> None:
        torch.manual_seed(rank)
        with prune(Small()).search(STEPS, progress=False):
            pass

    def nan_on_one() -> None:
        model = network()
        with prune(model).search(STEPS, progress=False) as search:
            for images, labels in batches():
                factor = float("nan") if rank == 1 and search.done == 3 else 1.0
                search.step(F.cross_entropy(model(images), labels) * factor)

    def synchronised() -> None:
        prune(nn.SyncBatchNorm.convert_sync_batchnorm(network()))

    def only_rank_0() -> None:
        def fail() -> None:
            raise DNALError("on the first")

        from_first(fail)

    def another_error_on_rank_0() -> None:
        def fail() -> None:
            raise ValueError("of the user's own")

        try:
            from_first(fail)
        except ValueError as error:
            assert rank == 0
            raise DNALError("rank 0 failed: what it says is the cause") from error

    for run in (other_model, other_weights, nan_on_one, synchronised, only_rank_0, another_error_on_rank_0):
        case(run.__name__, run)
    return said


CASES = (learning, frozen, in_eval_mode, paper, latency, whole_pipeline, sharded, errors)

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    out = Path(sys.argv[1])
    results = {case.__name__: case(out) for case in CASES if case.__name__ in sys.argv[2:] or len(sys.argv) == 2}
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
