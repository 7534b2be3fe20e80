"""NNI's ``config_list``, checked, and the setting of each layer that it selects."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nni.compression.base.config import select_modules_by_config, trans_legacy_config_list
from nni.compression.base.setting import PruningSetting
from torch import nn

from ..arguments import nearest, shown
from ..errors import DNALError
from ..modules.choices import Choice
from ..modules.layers import layer_of
from ..search.settings import VALUES, Setting, excluded

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
        example = "[{'op_types': ['Conv2d']}]"
        raise DNALError(f"config_list={shown(config_list)}: give a list of dicts, for example {example}")
    names = {name for name, _ in model.named_modules()}
    types = {c.__name__ for module in model.modules() for c in type(module).__mro__}
    for i, config in enumerate(config_list):
        where = f"config_list[{i}]"
        if not isinstance(config, Mapping):
            raise DNALError(f"{where} is {shown(config)}: give a dict, for example {{'op_types': ['Conv2d']}}")
        _check_values(where, config, [*SELECT, *LEGACY, *VALUES, *GIVEN, "target_names", "target_settings"])
        _check_forms(where, config)
        if not {"op_types", "op_names", "op_names_re", "op_partial_names"} & set(config):
            raise DNALError(f"{where} selects nothing: add op_types, op_names or op_names_re")
        for key in ("op_names", "exclude_op_names"):
            for name in config.get(key, ()):
                if name not in names:
                    see = nearest(name, names - {""}) or "; see [n for n, _ in model.named_modules()]"
                    raise DNALError(f"{where}: the model has no layer {name!r} ({key}){see}")
        missing = [name for name in config.get("op_types", ()) if name not in types]
        if missing and len(missing) == len(config["op_types"]):  # else it selects something, as NNI's examples do
            near = nearest(missing[0], sorted(types))
            raise DNALError(
                f"{where}: the model has no layer of type {' or '.join(map(repr, missing))} (op_types){near}"
            )
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
                example = "Conv2d" if key.endswith("types") else "conv.*" if key.endswith("re") else "conv1"
                raise DNALError(f"{where}: {key}={shown(value)} must be a list of names, for example [{example!r}]")
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
            reason = WHY_NOT.get(str(key), f"use {', '.join(sorted(set(supported) - set(LEGACY)))}")
            near = "" if key in WHY_NOT else nearest(str(key), supported)
            raise DNALError(f"{where}: key {key!r} is not supported{near or f'; {reason}'}")
        if value is None:
            continue
        fraction = isinstance(value, float) and 0 <= value <= 1
        if key in RATIOS and not (fraction and (value < 1 or key == "max_sparse_ratio")):
            raise DNALError(f"{where}: {key}={value!r} must be a float in [0, 1)")
        if key == "sparse_threshold" and not (fraction and 0 < value < 1):
            raise DNALError(f"{where}: {key}={value!r} must be a float in (0, 1): channels whose gate is less go")
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if key == "channel_multiple" and not whole:
            raise DNALError(f"{where}: {key}={value!r} must be a whole number >= 1")
        if key.endswith("_group_id") and not isinstance(value, (int, str)):
            raise DNALError(f"{where}: {key}={value!r} must be a number or a name")
        given = GIVEN.get(key)
        if given is not None and value not in given:
            raise DNALError(f"{where}: {key}={value!r} is not supported; use {' or '.join(map(repr, given))}")
    low, high = config.get("min_sparse_ratio"), config.get("max_sparse_ratio")
    if low is not None and high is not None and low > high:
        raise DNALError(f"{where}: min_sparse_ratio={low} is above max_sparse_ratio={high}: exchange them")
    if config.get("sparse_ratio") is not None and config.get("sparse_threshold") is not None:
        raise DNALError(f"{where}: give sparse_ratio or sparse_threshold, not both")


def without(model: nn.Module, config_list: Sequence[Mapping[str, Any]], exclude: Any) -> list[dict[str, Any]]:
    """The config_list where these layers (names, or modules of the model) are excluded, with everything in them."""
    key, names = "exclude_op_names", excluded(model, exclude)
    return [{**config, **({key: [*config.get(key, ()), *names]} if names else {})} for config in config_list]


def split_config(
    model: nn.Module, config_list: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Setting]]:
    """The config for NNI, without modules whose type it has no setting for (it refuses those); all that is selected.

    A layer of a subclass, such as timm's ``Conv2dSame``, goes with the ``op_types`` that it is derived from. A module
    derived from none of them, such as ``MultiheadAttention``, cannot be named by type: it goes with any of them. So do
    embeddings, whose columns are the width of the layers that read them; ``exclude_op_types`` leaves them out.

    Returns:
        NNI's config_list, and the setting by module name; where several entries name a layer, the first one holds.

    Raises:
        DNALError: nothing is selected.
    """
    owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    lineage = {type(m).__name__: [c.__name__ for c in type(m).__mro__] for m in owners}
    strange = {name: line for name, line in lineage.items() if name not in PruningSetting.registry}
    tables = {type(m).__name__ for m in owners if (layer := layer_of(m)) and layer.sides == ["out"]}
    choices = sorted({type(m).__name__ for m in model.modules() if isinstance(m, Choice)})
    for_nni = []
    selected: dict[str, Setting] = {}
    for config in trans_legacy_config_list([dict(config) for config in config_list]):
        theirs = _without_own(config)
        for_nni.append({**theirs, "exclude_op_types": [*config.get("exclude_op_types", ()), *strange, *choices]})
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
    if not selected:
        raise DNALError(
            f"config_list={shown(config_list)} selects no layer of the model: widen op_types, or exclude less"
        )
    return for_nni, selected


def _without_own(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the key that NNI does not know."""
    targets = {name: _without_own(values) for name, values in config.get("target_settings", {}).items()}
    left = {key: value for key, value in config.items() if key != "channel_multiple"}
    return left | ({"target_settings": targets} if targets else {})
