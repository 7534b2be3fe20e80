"""NNI's ``config_list``, checked, and what it means for coupled channel groups."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nni.compression.base.config import select_modules_by_config, trans_legacy_config_list
from nni.compression.base.setting import PruningSetting
from torch import nn

from ..channels.groups import ChannelGroup
from ..errors import DNALError
from ..modules.layers import Norm, layer_of
from ..search.objective import Limits


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the config_list says about one layer, or about the layers of one group together; NNI's keys and meanings."""

    sparse_ratio: float | None = None
    sparse_threshold: float | None = None
    max_sparse_ratio: float | None = None
    min_sparse_ratio: float | None = None
    global_group_id: int | str | None = None
    dependency_group_id: int | str | None = None


VALUES = [field.name for field in dataclasses.fields(Setting)]
RATIOS = ("sparse_ratio", "max_sparse_ratio", "min_sparse_ratio")
SELECT = ["op_types", "op_names", "op_names_re", "exclude_op_types", "exclude_op_names", "exclude_op_names_re"]
# NNI's older schema, which NNI translates
LEGACY = ["exclude", "op_partial_names", "sparsity", "sparsity_per_layer", "max_sparsity_per_layer"]
# what DNAL does anyway: masks of whole output channels; grouped convolutions lose whole groups, or equal positions
GIVEN: dict[str, tuple[str, ...] | None] = {
    "granularity": ("default", "out_channel"),
    "apply_method": ("mul",),
    "internal_metric_block": None,
}
WHY_NOT = {
    "_output_": "the output of a layer and of its norm closes with its channels: leave this target out",
    "_input_": "DNALPruner removes output channels, and what reads them follows: leave this target out",
    "align": "masks follow the coupled channels by themselves",
    "total_sparsity": "use sparse_ratio with a global_group_id",
}


def check_config(model: nn.Module, config_list: Any) -> None:
    """Raise for a ``config_list`` that NNI would refuse without saying why, or that would select nothing."""
    if not isinstance(config_list, Sequence) or isinstance(config_list, str) or not config_list:
        raise DNALError(f"config_list={config_list!r}: give a list of dicts, for example [{{'op_types': ['Conv2d']}}]")
    names = {name for name, _ in model.named_modules()}
    types = {c.__name__ for module in model.modules() for c in type(module).__mro__}
    for i, config in enumerate(config_list):
        where = f"config_list[{i}]"
        if not isinstance(config, Mapping):
            raise DNALError(f"{where} is a {type(config).__name__}, not a dict")
        _check_values(where, config, [*SELECT, *LEGACY, *VALUES, *GIVEN, "target_names", "target_settings"])
        _check_forms(where, config)
        if not {"op_types", "op_names", "op_names_re", "op_partial_names"} & set(config):
            raise DNALError(f"{where} selects nothing: add op_types, op_names or op_names_re")
        for key in ("op_names", "exclude_op_names"):
            for name in config.get(key, ()):
                if name not in names:
                    raise DNALError(
                        f"{where}: the model has no layer {name!r} ({key}); see [n for n, _ in model.named_modules()]"
                    )
        for name in config.get("op_types", ()):
            if name not in types:
                raise DNALError(f"{where}: the model has no layer of type {name!r} (op_types)")
        targets = config.get("target_names", ["weight"])
        settings = config.get("target_settings", {})
        for target in [*targets, *settings]:
            reason = next((why for key, why in WHY_NOT.items() if target.startswith(key)), None)
            if reason or target not in ("weight", "bias"):
                raise DNALError(f"{where}: target {target!r}: {reason or 'only weight and bias can be targets'}")
        if "weight" not in targets:
            raise DNALError(f"{where}: target_names={list(targets)}: channels go with their weights; add 'weight'")
        _check_values(f"{where}['target_settings']['weight']", settings.get("weight", {}), [*VALUES, *GIVEN])
        _check_values(f"{where}['target_settings']['bias']", settings.get("bias", {}), ["apply_method"])


def _check_forms(where: str, config: Mapping[str, Any]) -> None:
    """The types that NNI and the rest of this file rely on."""
    for key, value in config.items():
        if key in (*SELECT, "op_partial_names", "target_names"):
            if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
                raise DNALError(f"{where}: {key}={value!r} must be a list of names, for example ['conv1']")
        elif key == "target_settings":
            if not isinstance(value, Mapping) or not all(isinstance(v, Mapping) for v in value.values()):
                raise DNALError(f"{where}: {key}={value!r} must be a dict of dicts, as {{'weight': {{...}}}}")
        elif key == "exclude":
            if not isinstance(value, bool):
                raise DNALError(f"{where}: {key}={value!r} must be True or False")
        elif key in LEGACY and not (isinstance(value, float) and 0 <= value < 1):
            raise DNALError(f"{where}: {key}={value!r} must be a float in [0, 1)")
    for key in ("op_names_re", "exclude_op_names_re"):
        for pattern in config.get(key, ()):
            try:
                re.compile(pattern)
            except re.error as error:
                raise DNALError(f"{where}: {key}: {pattern!r} is no regular expression ({error})") from error


def _check_values(where: str, config: Mapping[str, Any], supported: Sequence[str]) -> None:
    for key, value in config.items():
        if key not in supported:
            reason = WHY_NOT.get(key, f"use {', '.join(sorted(set(supported) - set(LEGACY)))}")
            raise DNALError(f"{where}: key {key!r} is not supported; {reason}")
        if value is None:
            continue
        fraction = isinstance(value, float) and 0 <= value <= 1
        if key in RATIOS and not (fraction and (value < 1 or key == "max_sparse_ratio")):
            raise DNALError(f"{where}: {key}={value!r} must be a float in [0, 1)")
        if key == "sparse_threshold" and not (fraction and 0 < value < 1):
            raise DNALError(f"{where}: {key}={value!r} must be a float in (0, 1): channels whose gate is less go")
        if key.endswith("_group_id") and not isinstance(value, (int, str)):
            raise DNALError(f"{where}: {key}={value!r} must be a number or a name")
        given = GIVEN.get(key)
        if given is not None and value not in given:
            raise DNALError(f"{where}: {key}={value!r} is not supported; use {' or '.join(map(repr, given))}")
    if config.get("sparse_ratio") is not None and config.get("sparse_threshold") is not None:
        raise DNALError(f"{where}: give sparse_ratio or sparse_threshold, not both")


def split_config(
    model: nn.Module, config_list: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Setting]]:
    """The config for NNI, without modules whose type it has no setting for (it refuses those); all that is selected.

    A layer of a subclass, such as timm's ``Conv2dSame``, goes with the ``op_types`` that it is derived from. A module
    derived from none of them, such as ``MultiheadAttention``, cannot be named by type: it goes with any of them. So do
    embeddings, whose columns are the width of the layers that read them; ``exclude_op_types`` leaves them out.

    Returns:
        NNI's config_list, and the setting by module name; where several entries name a layer, the first one holds.
    """
    owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    lineage = {type(m).__name__: [c.__name__ for c in type(m).__mro__] for m in owners}
    strange = {name: line for name, line in lineage.items() if name not in PruningSetting.registry}
    tables = {type(m).__name__ for m in owners if (layer := layer_of(m)) and layer.sides == ["out"]}
    for_nni = []
    selected: dict[str, Setting] = {}
    for config in trans_legacy_config_list([dict(config) for config in config_list]):
        for_nni.append({**config, "exclude_op_types": [*config.get("exclude_op_types", ()), *strange]})
        wide = dict(config)
        for key in {"op_types", "exclude_op_types"} & set(config):
            wide[key] = [*config[key], *(name for name, line in strange.items() if set(line) & set(config[key]))]
        if "op_types" in config:
            wide["op_types"] += [n for n, line in strange.items() if not set(line) & set(PruningSetting.registry)]
            wide["op_types"] += sorted(tables)
        values = {**config, **config.get("target_settings", {}).get("weight", {})}
        setting = Setting(**{key: values.get(key) for key in VALUES})
        for name in select_modules_by_config(model, wide)[0]:
            selected.setdefault(name, setting)
    return for_nni, selected


def select(groups: Sequence[ChannelGroup], selected: Mapping[str, Setting], model: nn.Module) -> dict[str, Setting]:
    """Freeze the groups that the config does not select; the setting of the others.

    A group is selected where every layer that produces its channels is, or every norm that they pass: a layer that is
    excluded or not selected keeps all its outputs. Of several ratios, thresholds or limits inside one group the
    smallest rules.

    Args:
        groups: their ``frozen`` is updated.
        selected: by layer name.
        model: the ungated model.
    """
    modules = dict(model.named_modules())
    norms = {name for name, module in modules.items() if isinstance(module, Norm)}
    settings = {}
    depends: dict[int | str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))  # id -> layer -> its groups
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
        settings[group.name] = _together(layers, selected)
        for layer in layers:
            if (key := selected[layer].dependency_group_id) is not None:
                depends[key][layer].add(group.name)
    for key, places in depends.items():
        first = next(iter(places))
        for layer in places:
            if places[layer] != places[first]:
                raise DNALError(
                    f"dependency_group_id={key!r} joins {first} and {layer}, whose channels the model does not couple: "
                    "leave it out; coupled layers are found without it"
                )
    return settings


def _together(layers: Iterable[str], selected: Mapping[str, Setting]) -> Setting:
    values: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for layer in layers:
        for key in VALUES[:-1]:
            value = getattr(selected[layer], key)
            if value is None:
                continue
            if key == "global_group_id" and values.get(key, value) != value:
                raise DNALError(
                    f"{owner[key]} and {layer} are coupled, but in the global groups {values[key]!r} and {value!r}: "
                    "give them the same global_group_id"
                )
            if key not in values or (key != "global_group_id" and value < values[key]):
                values[key], owner[key] = value, layer
    return Setting(**values)


def limits(settings: Sequence[Setting], groups: Sequence[ChannelGroup], multiple: int) -> Limits:
    """Units that each group may keep, from max_sparse_ratio, min_sparse_ratio and the multiple of its channels."""
    least, most, multiples = [], [], []
    for setting, group in zip(settings, groups):
        n = group.channels
        widths = [len(m.channels) // n for m in group.members if m.side == "out" and not m.bare]
        step = multiple // math.gcd(multiple, *widths)
        asked = max(1, round((1 - setting.max_sparse_ratio) * n)) if setting.max_sparse_ratio else 0
        low = max(group.least, asked)
        high = max(1, round((1 - (setting.min_sparse_ratio or 0.0)) * n))
        multiples.append(step)
        least.append(min(n, step * math.ceil(low / step)))
        most.append(max(least[-1], n if high == n else step * (high // step)))
    return Limits(least, most, multiples)


def pools(settings: Sequence[Setting], sizes: Sequence[int], within: Limits) -> tuple[list[int], list[int]]:
    """What the ratios ask: the units to keep in each pool, and the pool of each group.

    The groups of one global_group_id are a pool, any other group is one by itself: the ratio is of the channels of the
    pool, to the nearest, and the smallest of several rules.
    """
    members: dict[object, list[int]] = defaultdict(list)
    for i, setting in enumerate(settings):
        members[i if setting.global_group_id is None else ("global", setting.global_group_id)].append(i)
    kept, pool_of = [], [0] * len(sizes)
    for pool, where in enumerate(members.values()):
        ratios = [r for i in where if (r := settings[i].sparse_ratio) is not None]
        whole = sum(sizes[i] for i in where)
        asked = round((1 - min(ratios, default=0.0)) * whole)
        kept.append(min(max(asked, sum(within.least[i] for i in where)), sum(within.most[i] for i in where)))
        for i in where:
            pool_of[i] = pool
    return kept, pool_of
