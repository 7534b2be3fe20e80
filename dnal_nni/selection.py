"""NNI's ``config_list``, checked, and what it means for coupled channel groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nni.compression.base.config import select_modules_by_config, trans_legacy_config_list
from nni.compression.base.setting import PruningSetting
from torch import nn

from .errors import DNALError
from .gate import ChannelFactor
from .graph import Norm
from .groups import ChannelGroup

HONOURED = {
    "op_types",
    "op_names",
    "op_names_re",
    "exclude_op_types",
    "exclude_op_names",
    "exclude_op_names_re",
    "sparse_ratio",
    "exclude",  # NNI's older schema, which NNI translates
    "sparsity",
    "sparsity_per_layer",
}


def check_model(model: nn.Module) -> None:
    """Raise where a pruner cannot be put on this module."""
    if not isinstance(model, nn.Module):
        raise DNALError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if next(model.parameters(), None) is None:
        raise DNALError("the model has no parameters: there is nothing to prune")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise DNALError(f"the model is wrapped in {type(model).__name__}: pass model.module, and wrap it afterwards")
    for name, module in model.named_modules():
        if hasattr(module, "_nni_wrapper"):
            raise DNALError(
                f"{name} is already wrapped by another NNI compressor: call its unwrap_model() first"
            )
        if isinstance(module, ChannelFactor):
            raise DNALError("the model already has gates of another DNALPruner: call its unwrap_model() first")


def check_config(model: nn.Module, config_list: Any) -> None:
    """Raise for a ``config_list`` that NNI would refuse without saying why, or that would select nothing."""
    if not isinstance(config_list, Sequence) or isinstance(config_list, str) or not config_list:
        raise DNALError(f"config_list={config_list!r}: give a list of dicts, for example [{{'op_types': ['Conv2d']}}]")
    names = {name for name, _ in model.named_modules()}
    types = {c.__name__ for module in model.modules() for c in type(module).__mro__}
    for i, config in enumerate(config_list):
        if not isinstance(config, Mapping):
            raise DNALError(f"config_list[{i}] is a {type(config).__name__}, not a dict")
        for key in config:
            if key not in HONOURED:
                raise DNALError(
                    f"config_list[{i}]: key {key!r} is not supported; use {', '.join(sorted(HONOURED - {'exclude'}))}"
                )
        if not {"op_types", "op_names", "op_names_re"} & set(config):
            raise DNALError(f"config_list[{i}] selects nothing: add op_types, op_names or op_names_re")
        for key in ("op_names", "exclude_op_names"):
            for name in config.get(key, ()):
                if name not in names:
                    raise DNALError(
                        f"config_list[{i}]: the model has no layer {name!r} ({key}); see [n for n, _ in "
                        "model.named_modules()]"
                    )
        for name in config.get("op_types", ()):
            if name not in types:
                raise DNALError(f"config_list[{i}]: the model has no layer of type {name!r} (op_types)")
        ratio = config.get("sparse_ratio")
        if ratio is not None and not (isinstance(ratio, float) and 0 <= ratio < 1):
            raise DNALError(f"config_list[{i}]: sparse_ratio={ratio!r} must be a float in [0, 1)")


def split_config(
    model: nn.Module, config_list: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, float | None]]:
    """The config for NNI, and what it selects among modules whose type NNI has no setting for (it refuses those).

    A layer of a subclass, such as timm's ``Conv2dSame``, goes with the ``op_types`` that it is derived from. A module
    derived from none of them, such as ``MultiheadAttention``, cannot be named by type: it goes with any of them.

    Returns:
        NNI's config_list, and the sparse_ratio (None: none given) by module name.
    """
    owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    lineage = {type(m).__name__: [c.__name__ for c in type(m).__mro__] for m in owners}
    strange = {name: line for name, line in lineage.items() if name not in PruningSetting.registry}
    modules = dict(model.named_modules())
    for_nni, found = [], {}
    for config in trans_legacy_config_list([dict(config) for config in config_list]):
        for_nni.append({**config, "exclude_op_types": [*config.get("exclude_op_types", ()), *strange]})
        wide = dict(config)
        for key in {"op_types", "exclude_op_types"} & set(config):
            wide[key] = [*config[key], *(name for name, line in strange.items() if set(line) & set(config[key]))]
        if "op_types" in config:
            wide["op_types"] += [n for n, line in strange.items() if not set(line) & set(PruningSetting.registry)]
        for name in select_modules_by_config(model, wide)[0]:
            if type(modules[name]).__name__ in strange:
                found[name] = config.get("sparse_ratio")
    return for_nni, found


def select(
    groups: Sequence[ChannelGroup], selected: Mapping[str, float | None], model: nn.Module
) -> dict[str, float]:
    """Freeze the groups that the config does not select; the ratio of channels to remove for the others.

    A group is selected where every layer that produces its channels is, or every norm that they pass: a layer that is
    excluded or not selected keeps all its outputs. Of several ratios inside one group the smallest rules.

    Args:
        groups: their ``frozen`` is updated.
        selected: by layer name, its sparse_ratio (None: none given).
        model: the ungated model.
    """
    modules = dict(model.named_modules())
    norms = {name for name, module in modules.items() if isinstance(module, Norm)}
    ratios = {}
    for group in groups:
        if group.frozen is not None:
            continue
        through = [m.path for m in group.members if m.side == "both" and m.path in norms]
        # a parameter that a forward reads itself goes with the module that owns it
        producers = [p if p in modules else p.rpartition(".")[0] for p in group.producers]
        if all(p in selected for p in producers):
            layers = producers
        elif through and all(p in selected for p in through):
            layers = through
        else:
            missing = next(p for p in producers if p not in selected)
            group.frozen = f"config_list does not select {missing}"
            continue
        ratios[group.name] = min((r for p in layers if (r := selected[p]) is not None), default=0.0)
    return ratios
