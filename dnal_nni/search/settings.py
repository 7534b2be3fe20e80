"""What was asked of each layer, and what it means for coupled channel groups; in the words of NNI's config_list."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..arguments import nearest, shown
from ..channels.groups import ChannelGroup
from ..errors import DNALError
from ..modules.layers import Norm
from .objective import Limits


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the config_list says about one layer, or about the layers of one group together; NNI's keys and meanings.

    And ``channel_multiple``, in place of the one of all layers; of several in a group, a multiple of each.
    """

    sparse_ratio: float | None = None
    sparse_threshold: float | None = None
    max_sparse_ratio: float | None = None
    min_sparse_ratio: float | None = None
    global_group_id: int | str | None = None
    channel_multiple: int | None = None
    dependency_group_id: int | str | None = None


NOT_SELECTED = "config_list does not select"  # how the reason begins why such a group is left whole
VALUES = [field.name for field in dataclasses.fields(Setting)]


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
            group.frozen = f"{NOT_SELECTED} {missing}"
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
            if key == "channel_multiple":
                values[key] = math.lcm(value, values.get(key, 1))
            elif key not in values or (key != "global_group_id" and value < values[key]):
                values[key], owner[key] = value, layer
    return Setting(**values)


def limits(settings: Sequence[Setting], groups: Sequence[ChannelGroup], multiple: int) -> Limits:
    """Units that each group may keep, from max_sparse_ratio, min_sparse_ratio and the multiple of its channels.

    ``multiple`` is for those whose setting has none.
    """
    least, most, multiples = [], [], []
    for setting, group in zip(settings, groups):
        n = group.channels
        widths = [len(m.channels) // n for m in group.members if m.side == "out" and not m.bare]
        own = setting.channel_multiple or multiple
        step = own // math.gcd(own, *widths)
        asked = max(1, round((1 - setting.max_sparse_ratio) * n)) if setting.max_sparse_ratio else 0
        low = max(group.least, asked)
        high = max(1, round((1 - (setting.min_sparse_ratio or 0.0)) * n))
        multiples.append(step)
        least.append(min(n, step * math.ceil(low / step)))
        most.append(max(least[-1], n if high == n else step * (high // step)))
    return Limits(least, most, multiples, max([multiple, *(setting.channel_multiple or 1 for setting in settings)]))


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


def all_but(model: nn.Module, exclude: Any) -> dict[str, Setting]:
    """What a search may cut, where everything may lose outputs but these layers, and what is in them; by name.

    Args:
        model: the model.
        exclude: names, or modules of the model.

    Raises:
        DNALError: one of them is not in the model.
    """
    kept = set(excluded(model, exclude))
    # a norm stands for the layers ahead of it, which may be one of these
    may = [name for name, module in model.named_modules() if not kept or not isinstance(module, Norm)]
    return {name: Setting() for name in may if name not in kept}


def excluded(model: nn.Module, exclude: Any) -> list[str]:
    """The names of these layers (names, or modules themselves), and of everything in them."""
    if isinstance(exclude, (str, nn.Module)) or not isinstance(exclude, Iterable):
        raise DNALError(f"exclude={shown(exclude)}: give a list of names or modules, as [model.fc]")
    names = {name: module for name, module in model.named_modules(remove_duplicate=False)}
    found = []
    for entry in exclude:
        own = [name for name, module in names.items() if name == entry or module is entry]
        if not own:
            near = nearest(entry, names) if isinstance(entry, str) else ": give one of its own modules, or a name"
            raise DNALError(f"exclude: {shown(entry)} is no layer of the model{near}")
        found += [name for name in names for top in own if name == top or name.startswith(f"{top}.") or not top]
    return list(dict.fromkeys(found))
