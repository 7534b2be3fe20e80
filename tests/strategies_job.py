"""What `test_devices.py` runs under torchrun: strategies on two devices; every rank writes what it found.

torchrun --nproc_per_node=2 tests/strategies_job.py DIR
"""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset
from torch.utils.data.distributed import DistributedSampler

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # NNI wraps every class of torch.nn when it is imported
    from nni.nas.evaluator.pytorch import Classification, DataLoader

from nas_toys import Plain
from ranks_job import digest

from dnal_nni import Budget, DNALError, DNALStrategy, PrimeStrategy, TopologyStrategy
from dnal_nni.plugin.strategies.supernet import SupernetStrategy

BATCH, EPOCHS = 16, 4  # over all ranks

STRATEGIES: dict[str, Callable[[], SupernetStrategy]] = {
    "gates": lambda: DNALStrategy(Budget(flops=0.5), warmup=0.25),
    "paths": lambda: DNALStrategy(Budget(flops=0.5), widths=False, warmup=0.25),
    "prime": lambda: PrimeStrategy(schedule=2, arch_lr=5.0, regularizer="proximity"),
    "topology": lambda: TopologyStrategy(),
}


def conv(kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, kernel, 1, kernel // 2), nn.ReLU())


class Bare(Plain):
    """No norms: those know the images of their own rank alone."""

    conv = staticmethod(conv)


def evaluator(devices: int, strategy: str = "ddp_find_unused_parameters_true") -> Any:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(96, 1, 8, 8, generator=generator), torch.randint(0, 10, (96,), generator=generator)
    data, size = TensorDataset(images, labels), BATCH // devices
    # Lightning's own sampler would shuffle
    own = DistributedSampler(data, devices, int(os.environ["RANK"]), shuffle=False) if devices > 1 else None
    off: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return Classification(
        num_classes=10, learning_rate=1e-2, max_epochs=EPOCHS, accelerator="cpu", limit_val_batches=0,
        devices=devices, strategy=strategy if devices > 1 else "auto",
        train_dataloaders=DataLoader(data, batch_size=size, sampler=own),
        val_dataloaders=DataLoader(data, batch_size=size), **off,
    )  # fmt: skip


@contextmanager
def double_precision() -> Iterator[None]:
    """Adam makes whole steps of what is rounding alone."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@double_precision()
def searched(name: str, devices: int) -> tuple[dict[str, Any], nn.Module]:
    """What is the same on every rank, and the network found."""
    torch.manual_seed(0)
    strategy = STRATEGIES[name]()
    strategy(Bare(), evaluator(devices))
    slim = strategy.slim_model()
    session = strategy.pruner.session
    assert session.keep is not None
    return {
        "gates": digest({name: gate.s for name, gate in session.gates.items()}),
        "keep": {name: kept.tolist() for name, kept in session.keep.items()},
        "slim": digest(slim.state_dict()),
        "loss": [entry["loss"] for entry in strategy.report.history],
        "sites": [(group.name, group.site, group.frozen) for group in strategy.pruner.groups],
    }, slim


def error(ddp: str) -> str:
    try:
        STRATEGIES["gates"]()(Bare(), evaluator(2, ddp))
    except DNALError as told:
        return str(told)
    return ""


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    out, found = Path(sys.argv[1]), dict[str, Any]()
    for case in STRATEGIES:
        found[case], network = searched(case, 2)
        torch.save(network.state_dict(), out / f"{case}.rank{dist.get_rank()}.pt")
    found["errors"] = {ddp: error(ddp) for ddp in ("ddp", "ddp_spawn")}
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
