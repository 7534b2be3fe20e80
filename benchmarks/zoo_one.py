"""One model of the zoo, in this process: is the sliced network the gated one, how much goes, how long does it take."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import resource
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from zoo_models import Entry

from dnal_nni import DNALError, measure
from dnal_nni.channels.groups import ChannelGroup, find_groups
from dnal_nni.cost.model import CostModel
from dnal_nni.modules.running import FORWARD_ERRORS
from dnal_nni.surgery.slim import Keep, slim_copy
from dnal_nni.surgery.verify import hard_gated_copy, random_keep, verify_and_freeze

EXACT = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest max|gated - sliced| / max|gated| of a network that counts as equal; up to 1e-4 it does where moving its input
by four units of rounding moves the gated form by a tenth of the difference, or more."""
CUT = 0.3
CUT_SEED = 7_919  # verify_and_freeze seeds its own cuts 1, 2, 3, ...
VERIFY_SECONDS = 60.0

Record = dict[str, Any]

# first match wins; a reason that matches none is its own class, without names and numbers
REASON_CLASSES = (
    ("model output", r"model returns"),
    ("not verified in time", r"not verified within"),
    ("forward fails on fewer channels", r"does not run"),
    ("output would change", r"change(s)? the output"),
    ("nothing reads it", r"no layer reads"),
    ("all or nothing", r"only be removed all at once"),
    ("graph cannot follow", r"graph gives|graph has no node|channels of .* meet|not every input|more than once"),
    ("layer mixes channels", r"mixes its channels"),
    ("computed weight", r"computed from other tensors|is not a parameter"),
    ("tied weights", r"are tied"),
)


def randomise(model: nn.Module, inputs: tuple[Any, ...], seed: int = 1) -> None:
    """Move what initialisation leaves at 0 or 1, in place, so that no branch is silent and no scale is neutral.

    Batch statistics are first taken from ``inputs`` and then perturbed: with arbitrary statistics the activations of a
    deep network die or saturate, and every comparison would pass.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=like.dtype) + 0.5

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            flat = sum(size > 1 for size in parameter.shape) <= 1  # per-channel scales and shifts
            if flat and name.rpartition(".")[2].endswith("bias"):
                parameter.add_(normal(parameter), alpha=0.2)
            elif flat and (parameter == parameter.flatten()[0]).all():  # a constant: initialised, not drawn
                parameter.copy_(uniform(parameter))
            elif not parameter.any():
                parameter.copy_(normal(parameter) * 0.02)
        norms = [m for m in model.modules() if getattr(m, "running_var", None) is not None]
        momenta = [m.momentum for m in norms]
        model.eval()
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        forward(model, inputs)
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
            assert isinstance(norm.running_var, Tensor) and isinstance(norm.running_mean, Tensor)
            norm.running_mean.add_(normal(norm.running_mean) * norm.running_var.sqrt(), alpha=0.2)
            norm.running_var.mul_(uniform(norm.running_var)).clamp_(min=1e-6)


def tensors(out: Any) -> Iterator[Tensor]:
    """Every tensor in what a model returns, in a fixed order."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, Mapping):
        for key in sorted(out):
            yield from tensors(out[key])
    elif isinstance(out, (list, tuple)):
        for value in out:
            yield from tensors(value)
    elif dataclasses.is_dataclass(out):
        for field in dataclasses.fields(out):
            yield from tensors(getattr(out, field.name))


def forward(model: nn.Module, inputs: tuple[Any, ...], heads: Sequence[str] = ()) -> list[Tensor]:
    """The outputs of ``model`` and of its submodules ``heads``: boxes of random weights are often none at all."""
    raw: list[Any] = []
    hooks = [model.get_submodule(path).register_forward_hook(lambda _, __, out: raw.append(out)) for path in heads]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), without_dropout():
            torch.manual_seed(0)  # stochastic depth draws per sample: the same in both networks
            np.random.seed(0)  # and wav2vec 2.0 the positions that it hides
            out = model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [t for t in tensors([out, raw]) if t.is_floating_point()]


def nudged(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Floating tensors moved by four units of rounding, up or down."""
    generator = torch.Generator().manual_seed(1)

    def nudge(x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            return x
        up = torch.rand(x.shape, generator=generator) < 0.5
        return x * (1 + 4 * torch.finfo(x.dtype).eps * torch.where(up, 1.0, -1.0).to(x.dtype))

    return tuple(map(nudge, inputs))


@contextmanager
def without_dropout() -> Iterator[None]:
    """Dropout that a forward calls itself, as GhostNet's does, lets everything pass."""
    names = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
    with mock.patch.multiple(F, **dict.fromkeys(names, lambda x, *_, **__: x)):
        yield


def set_mode(model: nn.Module, mode: str) -> None:
    """Eval or train mode, the latter without dropout: that draws per channel, and the networks differ in channels."""
    model.train(mode == "train")
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()


def relative_gap(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest max|a - b| / max|a| over pairs of tensors; what is not finite or not of one shape is an error."""
    if [t.shape for t in reference] != [t.shape for t in other]:
        raise RuntimeError("the shapes of the outputs differ")
    gap = 0.0
    for a, b in zip(reference, other):
        if a.numel() == 0:
            continue
        size = float(a.abs().max())
        if not (size < float("inf") and bool(b.isfinite().all())):
            raise RuntimeError("an output is not finite")
        gap = max(gap, float((a - b).abs().max()) / max(size, 1e-12))
    return gap


def count_flops(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[int, str]:
    """(multiply-adds, name of the counter): fvcore, or torch's counter of matrix products where fvcore cannot trace."""
    try:
        with torch.no_grad():
            flops = measure(model, inputs).flops
        if flops > 0:
            return flops, "fvcore"
    except FORWARD_ERRORS:
        pass  # torch.jit does not trace everything that runs
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).eval()(*inputs)
    return counter.get_total_flops() // 2, "torch"


def reason_class(reason: str) -> str:
    """The short class of a reason for which a group is left whole."""
    for name, pattern in REASON_CLASSES:
        if re.search(pattern, reason):
            return name
    plain = re.sub(r"\S*[._\d]\S*|['\"`].*?['\"`]|\(.*?\)", "", reason)
    return re.sub(r"\s+", " ", plain).strip(" :;,")[:60] or "other"


def cost_errors(
    model: nn.Module, groups: Sequence[ChannelGroup], inputs: tuple[Any, ...], keep: Keep
) -> dict[str, float] | None:
    """How far the cost model is from fvcore's count of the cut network, relative to that.

    None where it cannot count, or nothing is cut.

    At the random cut, and with as few units in every group as may be left.
    """
    active = [group for group in groups if group.frozen is None]
    fewest = {g.name: torch.arange(g.channels) < max(1, g.least) for g in active}
    if not active:
        return None
    try:
        cost = CostModel(model, groups, inputs)
        found = {}
        for name, masks in (("cut", keep), ("fewest", fewest)):
            units = torch.cat([masks[g.name] for g in active]).double()
            counted = measure(slim_copy(model, groups, masks), inputs).flops
            found[name] = abs(float(cost.flops(units)) / counted - 1) if counted else 0.0
    except DNALError:
        return None
    return {name: round(error, 6) for name, error in found.items()}


def run_model(
    entry: Entry,
    seconds: float = VERIFY_SECONDS,
    report: Callable[[Record], None] | None = None,
    graph: Literal["torch-pruning"] | None = None,
) -> Record:
    """Everything about one model, in this process. ``report`` gets the record after every phase, as far as it is.

    Args:
        entry: which model.
        seconds: the time limit given to ``verify_and_freeze``.
        report: called with the unfinished record, whose "phase" is what begins.
        graph: where the groups come from, as for `find_groups`.
    """
    record: Record = {
        "model": entry.name,
        "task": entry.task,
        "input": list(entry.shape),
        "status": "unfinished",
        "phase": "build",
        "seconds": {},
    }

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        record["phase"] = name
        if report is not None:
            report(record)
        start = time.perf_counter()
        try:
            yield
        finally:
            record["seconds"][name] = round(time.perf_counter() - start, 3)

    modes = ("eval",) if entry.task == "detection" else ("eval", "train")  # a detector in train mode wants targets
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with phase("build"):
                torch.manual_seed(0)
                model = entry.build()
                randomise(model, entry.inputs(2, torch.float32))
                model.train()
                record["params"] = sum(p.numel() for p in model.parameters())
            with phase("dense"):
                inputs = entry.inputs(3, entry.dtype)
                reference = {}
                for mode in modes:
                    dense = copy.deepcopy(model).to(entry.dtype)
                    set_mode(dense, mode)
                    reference[mode] = forward(dense, inputs, entry.heads)
                    relative_gap(reference[mode], reference[mode])
                    del dense
            with phase("groups"):
                groups = find_groups(model, entry.inputs(4, torch.float32), graph)
            with phase("verify"):
                record["trials"] = verify_and_freeze(model, groups, entry.inputs(4, torch.float32), seconds)
            reasons = [g.frozen for g in groups if g.frozen is not None]
            record["groups"] = {"all": len(groups), "gated": len(groups) - len(reasons), "frozen": len(reasons)}
            record["reasons"] = dict(Counter(reason_class(r) for r in reasons).most_common())
            record["examples"] = {reason_class(g.frozen): f"{g.name}: {plain(g.frozen)}" for g in groups if g.frozen}
            record["sites"] = dict(Counter(g.site for g in groups if g.frozen is None))
            model.to(entry.dtype)
            with phase("plan"):
                keep = random_keep(groups, CUT, CUT_SEED)
            with phase("gate"):
                gated = hard_gated_copy(model, groups, keep)
            with phase("slice"):
                slim = slim_copy(model, groups, keep)
            with phase("flops"):
                # the fused attention kernel of eval mode hides a whole layer from the counters
                torch.backends.mha.set_fastpath_enabled(False)
                before, counter = count_flops(model, inputs)
                after, _ = count_flops(slim, inputs)
                torch.backends.mha.set_fastpath_enabled(True)
                left = after / before if before else 1.0
                record["flops"] = {"dense": before, "sliced": after, "left": round(left, 4), "counter": counter}
                record["params_left"] = round(sum(p.numel() for p in slim.parameters()) / record["params"], 4)
            with phase("cost model"):
                record["cost_error"] = cost_errors(model, groups, inputs, keep)
            with phase("compare"):
                record["relative"], record["rounding"], record["effect"] = {}, {}, {}
                for mode in modes:
                    a, b = copy.deepcopy(gated), copy.deepcopy(slim)
                    set_mode(a, mode)
                    set_mode(b, mode)
                    outputs = forward(a, inputs, entry.heads)
                    record["relative"][mode] = relative_gap(outputs, forward(b, inputs, entry.heads))
                    if record["relative"][mode] >= EXACT[entry.dtype]:
                        moved = copy.deepcopy(gated)
                        set_mode(moved, mode)
                        record["rounding"][mode] = relative_gap(outputs, forward(moved, nudged(inputs), entry.heads))
                    # the cut must be felt, or equality says nothing; proposals may come out in another number
                    same = [t.shape for t in outputs] == [t.shape for t in reference[mode]]
                    record["effect"][mode] = relative_gap(reference[mode], outputs) if same else None
            within = {mode: min(10 * gap, 1e-4) for mode, gap in record["rounding"].items()}
            gaps = record["relative"].items()
            exact = all(gap < max(EXACT[entry.dtype], within.get(mode, 0.0)) for mode, gap in gaps)
            record["status"] = "exact" if exact else "inexact"
            record["phase"] = "done"
        except Exception as error:  # what it raises is the result
            memory = isinstance(error, MemoryError) or "allocate memory" in str(error)
            where = record["phase"]
            known = "refused" if isinstance(error, DNALError) else "crash"
            record["status"] = "memory" if memory else "cannot run" if where in ("build", "dense") else known
            record["error"] = plain(f"{type(error).__name__}: {error}")
    phases = ("groups", "verify", "plan", "gate", "slice")
    record["seconds"]["total"] = round(sum(record["seconds"].get(name, 0.0) for name in phases), 3)
    record["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return record


def plain(text: str) -> str:
    """The first line of a message, without the paths of this machine."""
    return re.sub(r"(/[\w.+-]+)+/", "", next(iter(text.splitlines()), ""))[:200]


def explain(record: Record) -> str:
    """What a failed test prints: how far the model came, and why its groups are frozen."""
    lines = [json.dumps({key: value for key, value in record.items() if key not in ("reasons", "examples")})]
    for name, number in record.get("reasons", {}).items():
        lines.append(f"{number:5d}  {name:32s}  {record['examples'][name]}")
    return "\n".join(lines)
