"""Part of a supernet that fits in memory: what every candidate takes, single paths, and candidates for good off."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..cost.memory import kept_storages, size_of
from ..modules.choices import Choice, Mixture
from ..modules.gates import GateState, ScaledSigmoidGate
from .paths import Decision

Key = tuple[str, str]  # path of a mixture, name of a candidate
Live = Mapping[str, Sequence[str]]


@dataclasses.dataclass
class Place:
    """A sum of candidates about which a decision is taken, alone or together with others of its label.

    Attributes:
        path: of the sum in the supernet.
        mixture: the sum.
        label: of the decision.
        options: by candidate, the option of the decision that it goes with.
        within: the candidate that this sum is part of.
    """

    path: str
    mixture: Mixture
    label: str
    options: dict[str, str]
    within: Key | None = None


@dataclasses.dataclass(frozen=True)
class Holdings:
    """What a supernet holds in a step of training, by candidate.

    A candidate's own is what it keeps beside what comes in and what is inside of other candidates.

    Attributes:
        places: the sums of candidates.
        kept: bytes that autograd keeps, by candidate; what is kept outside of all has the key None. What comes into a
            sum counts as long as the sum is there, whichever of its candidates keep it.
        trained: bytes of trained parameters, likewise.
        other: bytes of other parameters and of buffers, likewise.
        states: bytes of optimizer states for a byte of a trained parameter.
        by_paths: whether a search of it runs some paths in a step, instead of the sum of all candidates.
        fair: so many paths of them at least.
    """

    places: Sequence[Place]
    kept: Mapping[Key | None, int]
    trained: Mapping[Key | None, int]
    other: Mapping[Key | None, int]
    states: float = 0.0
    by_paths: bool = False
    fair: int = 2

    def whole(self, live: Live) -> int:
        """Of a step of a search among all candidates of ``live``."""
        runs = self._paths(live) if self.by_paths else 1
        return self._held(live, None, runs, not self.by_paths) + self._weights(live)

    def path(self, live: Live) -> int:
        """Of a step in which the largest path of ``live`` runs; all candidates' parameters are there."""
        return self._held(live, None, 1, False) + self._weights(live)

    def _paths(self, live: Live) -> int:
        """How many a step runs, so that every candidate runs in as many as any other."""
        counts = [
            math.ceil(sum(option in live[place.label] for option in place.options.values()) / (place.mixture.most or 1))
            for place in self.places
        ]
        return max(self.fair, *counts)

    def _held(self, live: Live, key: Key | None, runs: int, together: bool) -> int:
        """What autograd keeps of a candidate that runs so often; inside of it run all candidates, or one each time."""
        total = runs * self.kept.get(key, 0)
        for place in (place for place in self.places if place.within == key):
            parts: dict[str, list[Key]] = {}
            for name, option in place.options.items():
                if option in live[place.label]:
                    parts.setdefault(option, []).append((place.path, name))
            once = {option: sum(self._held(live, k, 1, together) for k in keys) for option, keys in parts.items()}
            for i, option in enumerate(sorted(parts, key=lambda option: -once[option])):
                often = runs if together else runs // len(parts) + (i < runs % len(parts))
                total += sum(self._held(live, k, often, together) for k in parts[option]) if often else 0
        return total

    def _weights(self, live: Live, key: Key | None = None) -> int:
        """Parameters of a candidate and of all that are left inside of it, with gradients and states, and buffers."""
        total = round(self.trained.get(key, 0) * (2 + self.states)) + self.other.get(key, 0)
        for place in (place for place in self.places if place.within == key):
            left = [name for name, option in place.options.items() if option in live[place.label]]
            total += sum(self._weights(live, (place.path, name)) for name in left)
        return total


class Subspace:
    """Runs single paths of a supernet, and takes candidates off it.

    Args:
        model: the supernet.
        named: what a sum of candidates decides: its label, and the option that every candidate goes with; None where
            nothing is to be decided.

    Attributes:
        places: the sums of candidates about which something is decided.
        options: by label, the options that are left.
    """

    def __init__(
        self, model: nn.Module, named: Callable[[Mixture], tuple[str, dict[str, str]] | None] | None = None
    ) -> None:
        self.model = model
        self.places: list[Place] = []
        self.options: dict[str, list[str]] = {}
        owners: list[Key] = []
        for path, module in model.named_modules():
            if not isinstance(module, Mixture):
                continue
            found = (module.label, {name: name for name in module.names}) if named is None else named(module)
            if found is None:
                continue
            label, options = found
            within = [key for key in owners if f"{path}.".startswith(".".join(filter(None, key)) + ".")]
            self.places.append(Place(path, module, label, options, within[-1] if within else None))
            owners += [(path, name) for name in module.names]
            self.options.setdefault(label, list(dict.fromkeys(options.values())))
        mixtures = [place.mixture for place in self.places]
        self._others = [m for m in model.modules() if isinstance(m, Choice) and m not in mixtures]
        self._gates = {place.path: self._gated(place.mixture) for place in self.places}

    def _gated(self, choice: Choice) -> ScaledSigmoidGate:
        gate = ScaledSigmoidGate(len(choice.units))
        choice.attach(gate)
        return gate

    def run(self, path: Mapping[str, str]) -> None:
        """From now on, run these options alone."""
        for place in self.places:
            self._gates[place.path].harden(self._open(place, path))

    def _open(self, place: Place, path: Mapping[str, str]) -> Tensor:
        return torch.tensor([place.options[name] == path[place.label] for name in place.mixture.names])

    def measure(self, forward: Callable[[], object], by_paths: bool = False) -> Holdings:
        """What every candidate holds in a step, from single paths: no larger part of the supernet runs.

        They run as in a search, where what comes out of a candidate is multiplied by a weight that learns.

        Args:
            forward: runs the supernet on a batch, and returns what a backward pass would start from.
            by_paths: of the search that there will be: whether it compares paths.
        """
        kept: Counter[Key | None] = Counter()
        others = [self._gated(choice) for choice in self._others]
        for gate in others:
            gate.state = GateState.SOFT
            gate.s.requires_grad_(True)
        todo = {(place.path, name) for place in self.places for name in place.mixture.names}
        while todo:
            path, shown = self._path_with(todo)
            for place in self.places:
                gate, open_ = self._gates[place.path], self._open(place, path)
                gate.state = GateState.SOFT
                gate.s.requires_grad_(True)
                place.mixture.resting = frozenset((~open_).nonzero().flatten().tolist())
            ledger = _Ledger(self.places).write(self.model, forward)
            for key, size in ledger.found.items():
                kept[key] = max(kept[key], size)
            todo -= shown
        for place in self.places:
            place.mixture.resting = frozenset()
        for gate in (*self._gates.values(), *others):
            gate.state = GateState.TRANSPARENT
            gate.s.requires_grad_(False)
        trained, other = self._parameters()
        rest = [choice for choice in self._others if choice.units]
        fair = [Decision(len(one.units), one.most if one.least else None, not one.least).fair for one in rest]
        return Holdings(self.places, kept, trained, other, by_paths=by_paths, fair=max(2, *fair, 0))

    def _path_with(self, todo: set[Key]) -> tuple[dict[str, str], set[Key]]:
        """A path that runs some of these candidates, and those that it runs."""
        path: dict[str, str] = {}
        for place in self.places:  # the outer ones are ahead of the inner ones
            if place.label in path:
                continue
            same = [p for p in self.places if p.label == place.label]
            new = [option for p in same for name, option in p.options.items() if self._leads(p, name, todo)]
            path[place.label] = new[0] if new else self.options[place.label][0]
        shown: set[Key] = set()
        for place in self.places:
            if place.within is None or place.within in shown:
                shown |= {(place.path, n) for n, option in place.options.items() if option == path[place.label]}
        return path, shown

    def _leads(self, place: Place, name: str, todo: set[Key]) -> bool:
        """Whether a candidate, or one inside of it, is among these."""
        key = (place.path, name)
        inner = (self._leads(p, n, todo) for p in self.places if p.within == key for n in p.mixture.names)
        return key in todo or any(inner)

    def _parameters(self) -> tuple[dict[Key | None, int], dict[Key | None, int]]:
        """Bytes of trained parameters, and of others and buffers; what several candidates share is nobody's own."""
        owner: dict[int, Key | None] = {}
        tensors: dict[int, tuple[Tensor, bool]] = {}
        for path, module in self.model.named_modules():
            key = self._owner(path)
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            for tensor in own:
                owner[id(tensor)] = key if owner.get(id(tensor), key) == key else None
                tensors[id(tensor)] = tensor, tensor.requires_grad
        trained: Counter[Key | None] = Counter()
        other: Counter[Key | None] = Counter()
        for name, (tensor, learns) in tensors.items():
            (trained if learns else other)[owner[name]] += size_of([tensor])
        return trained, other

    def _owner(self, path: str) -> Key | None:
        """The innermost candidate that a module is part of."""
        found = None
        for place in self.places:
            for name in place.mixture.names:
                prefix = f"{place.path}.{name}" if place.path else name
                if f"{path}.".startswith(f"{prefix}."):
                    found = place.path, name
        return found

    def drop(self, label: str, option: str) -> list[nn.Parameter]:
        """Take an option off the supernet for good; the parameters that are no part of it any more."""
        before = list(self.model.parameters())
        gone: list[str] = []
        for place in self.places:
            names = [name for name in place.mixture.names if place.options[name] == option]
            if place.label == label and names:
                prefix = f"{place.path}." if place.path else ""
                gone += [f"{prefix}{name}." for name in names]
                place.mixture.drop(torch.tensor([name not in names for name in place.mixture.names]))
                place.options = {name: place.options[name] for name in place.mixture.names}
                self._gates[place.path] = self._gated(place.mixture)
        self.places[:] = [p for p in self.places if not any(f"{p.path}.".startswith(prefix) for prefix in gone)]
        self.options[label].remove(option)
        left = {id(parameter) for parameter in self.model.parameters()}
        return [parameter for parameter in before if id(parameter) not in left]


class _Ledger:
    """Bytes that autograd keeps from a forward pass, by the innermost candidate that they belong to.

    What comes into a candidate is not its own; what comes out of it is, whoever keeps it.

    Attributes:
        found: bytes; the key None is of what belongs to no candidate.
    """

    def __init__(self, places: Iterable[Place]) -> None:
        self.found: Counter[Key | None] = Counter()
        self._places = list(places)
        self._running: list[tuple[Key, set[int]]] = []  # candidates under way, and what came into them
        self._outputs: dict[int, Key] = {}
        self._held: list[Tensor] = []  # or an address might be another tensor's later

    def write(self, model: nn.Module, forward: Callable[[], object]) -> _Ledger:
        """Enter what ``forward()`` makes autograd keep."""
        hooks = []
        for place in self._places:
            for name in place.mixture.names:
                candidate, key = getattr(place.mixture, name), (place.path, name)
                hooks.append(candidate.register_forward_pre_hook(lambda _, args, key=key: self._enter(key, args)))
                hooks.append(candidate.register_forward_hook(lambda _, args, output: self._leave(output)))
        try:
            kept_storages(model, forward, self._seen)
        finally:
            for hook in hooks:
                hook.remove()
        return self

    def _enter(self, key: Key, args: object) -> None:
        self._running.append((key, {_address(tensor) for tensor in _tensors(args)}))

    def _leave(self, output: object) -> None:
        key, inputs = self._running.pop()
        for tensor in _tensors(output):
            if _address(tensor) not in inputs:
                self._outputs[_address(tensor)] = key
                self._held.append(tensor.detach())  # the graph refers to this ledger, which must not keep it

    def _seen(self, address: int, size: int) -> None:
        own = (key for key, inputs in reversed(self._running) if address not in inputs)
        self.found[next(own, self._outputs.get(address))] += size


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
