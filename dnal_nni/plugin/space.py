"""NNI's model spaces as supernets that sum their candidates, and what is left of one in NNI's words.

What each of NNI's mutables becomes:

- ``LayerChoice``: a :class:`~dnal_nni.modules.choices.Mixture` of its candidates;
- ``InputChoice`` (sum, mean): :class:`~dnal_nni.modules.choices.Inputs`;
- ``Repeat``: :class:`~dnal_nni.modules.choices.Depth`, which keeps the first blocks;
- ``Cell`` (all nodes concatenated): every node a mixture of every candidate on every earlier tensor;
- a choice of a width (``MutableConv2d(3, nni.choice("w", [8, 16]))``): the widest, whose channels are then gated one by
  one, free of the values of the choice and of each other;
- any other choice among the arguments of a module (a kernel size): a mixture of that module at every value.

Choices of one label share one gate.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nni.mutable import Categorical, CategoricalMultiple, Mutable, SampleValidationError, frozen_context
from nni.nas.nn.pytorch import Cell as NNICell
from nni.nas.nn.pytorch import InputChoice, LayerChoice, ModelSpace, MutableModule, ParametrizedModule, Repeat
from nni.nas.nn.pytorch.cell import create_cell_op_candidates
from torch import nn

from ..errors import DNALError
from ..modules.cells import Cell, Node, Topology
from ..modules.choices import Choice, Depth, Inputs, Mixture
from ..modules.layers import Norm, layer_of


def supernet(space: ModelSpace) -> nn.Module:
    """A network that sums the candidates of ``space``, which is not changed: what a file of a cut one is loaded into.

    Raises:
        DNALError: for a mutable that this cannot express, by name.
    """
    return Space(space).supernet


class Space:
    """A model space and its supernet.

    Args:
        space: NNI's model space; it is not changed.
        single_path: let as many candidates stay in the end as an architecture of NNI's has: one of a LayerChoice.
        topology: let the nodes of cells decide about their inputs first, and about an operation on each.

    Attributes:
        supernet: a copy whose mutables are plain modules.
    """

    def __init__(self, space: ModelSpace, single_path: bool = False, topology: Topology | None = None) -> None:
        if not isinstance(space, ModelSpace):
            raise DNALError(f"the model space is a {type(space).__name__}: pass an nni.nas.nn.pytorch.ModelSpace")
        self.space, self.single_path, self.topology = space, single_path, topology
        self._decoders: dict[str, Callable[[Choice], dict[str, Any]]] = {}
        self._widths: list[tuple[str, str, Mutable]] = []  # layer, attribute, what it is an expression of
        self._known: set[str] = set()
        self._converted: dict[int, tuple[Any, Any]] = {}  # by id, a module and what became of it
        self._widest = self._widest_sample()
        with frozen_context(self._widest):  # NNI asks for one where mutable modules are made
            self.supernet = self._convert(copy.deepcopy(space), "")
        unknown = {name: mutable for name, mutable in space.simplify().items() if name not in self._known}
        if unknown:
            what = ", ".join(f"{name!r} ({type(mutable).__name__})" for name, mutable in unknown.items())
            raise DNALError(f"the model space has mutables that DNALStrategy cannot learn: {what}; fix their values")

    @property
    def widest(self) -> Mapping[str, Any]:
        """The largest value of every choice that a width depends on, by label."""
        return self._widest

    # -- to a supernet ------------------------------------------------------------------------------------------------

    def _widest_sample(self) -> dict[str, Any]:
        """The largest value of every choice that a width depends on."""
        sample: dict[str, Any] = {}
        widths = [
            (path, name, argument)
            for path, module in self.space.named_modules()
            if isinstance(module, ParametrizedModule)
            for name, argument in _arguments(module).items()
            if isinstance(argument, Mutable) and name in _width_names(module)
        ]
        for path, name, argument in widths:
            for label, choice in argument.simplify().items():
                if not isinstance(choice, Categorical):
                    raise DNALError(f"{path}: {name} depends on {label!r}, a {type(choice).__name__}: use nni.choice")
                sample[label] = max(choice.values)
        for path, name, argument in widths:
            if argument.freeze(sample) != max(argument.grid()):
                raise DNALError(
                    f"{path}: {name}={argument} is not largest where each of its choices is: channels are gated in the "
                    "widest layer; let the width grow with its choices"
                )
        return sample

    def _convert(self, module: Any, path: str) -> Any:
        """``module`` (of the copy) as a plain one; ``path`` is its first place in the supernet."""
        if id(module) not in self._converted:
            self._converted[id(module)] = module, self._plain(module, path)
        return self._converted[id(module)][1]

    def _plain(self, module: Any, path: str) -> Any:
        within = f"{path}." if path else ""
        if isinstance(module, LayerChoice):
            names = {str(name): name for name in module.names}
            candidates = {name: self._convert(module[key], within + name) for name, key in names.items()}
            self._decode(module.label, lambda left: {module.label: _one(left, names)})
            return self._limited(Mixture(candidates, module.label), 1)
        if isinstance(module, InputChoice):
            return self._inputs(module, path)
        if isinstance(module, Repeat):
            return self._repeat(module, path)
        if isinstance(module, NNICell):
            return self._cell(module, path)
        if isinstance(module, ParametrizedModule) and module.mutables:
            return self._parametrized(module, path)
        if isinstance(module, MutableModule) and module.mutables:
            labels = ", ".join(repr(label) for mutable in module.mutables for label in mutable.simplify())
            raise DNALError(
                f"{path or 'the space'}: a {type(module).__name__} has the mutables {labels}, and how they act is in "
                "its own code: express them with LayerChoice, InputChoice, Repeat or a parametrized module"
            )
        if not isinstance(module, nn.Module):
            return module  # a function that a cell calls
        if isinstance(module, ParametrizedModule):
            _make_plain(module)
        for name, value in vars(module).items():
            if not name.startswith("_"):  # a width that a module keeps for itself
                vars(module)[name] = self._fixed(value)
        for name, child in list(module._modules.items()):  # not named_children, which names a shared one once
            module._modules[name] = self._convert(child, within + name)
        return module

    def _fixed(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)([self._fixed(one) for one in value]) if type(value) in (list, tuple) else value
        if isinstance(value, Mutable) and set(value.simplify()) <= set(self._widest):
            return value.freeze(self._widest)
        return value

    def _limited(self, choice: Choice, count: int | None) -> Any:
        if self.single_path and count is not None:
            choice.least = choice.most = count
        return choice

    def _decode(self, label: str, decoder: Callable[[Choice], dict[str, Any]]) -> None:
        self._known.add(label)
        self._decoders[label] = decoder

    def _inputs(self, module: InputChoice, path: str) -> Inputs:
        if module.reduction not in ("sum", "mean"):
            raise DNALError(
                f"{path}: InputChoice({module.label!r}, reduction={module.reduction!r}) cannot be learned, since what "
                "is left out must count zero: use reduction='sum' or 'mean'"
            )
        label, wanted = module.label, module.n_chosen

        def decoder(left: Choice) -> dict[str, Any]:
            if wanted is not None and len(left.units) != wanted:
                raise DNALError(f"{label} keeps {len(left.units)} inputs instead of {wanted}")
            return {label: [int(unit) for unit in left.units]}

        self._decode(label, decoder)
        return self._limited(Inputs(module.n_candidates, module.reduction, label), wanted)

    def _repeat(self, module: Repeat, path: str) -> nn.Module:
        depth = module.depth_choice
        learned = isinstance(depth, Mutable)
        if learned and not (isinstance(depth, Categorical) and type(module) is Repeat):
            raise DNALError(
                f"{path}: the depth of this {type(module).__name__} ({', '.join(depth.simplify())}) cannot be learned: "
                "a Repeat whose depth is (min, max) or one nni.choice can; fix it"
            )
        prefix = f"{path}.blocks" if learned else path
        blocks = [self._convert(block, f"{prefix}.{i}") for i, block in enumerate(module.blocks)]
        if not learned:
            return nn.Sequential(*blocks)
        self._decode(depth.label, lambda left: {depth.label: _depths(left)[-1]})
        return Depth(blocks, depth.values, depth.label)

    def _cell(self, module: NNICell, path: str) -> Cell:
        if module.merge_op != "all":
            raise DNALError(
                f"{path}: Cell({module.label!r}, merge_op={module.merge_op!r}) has another width for every "
                "architecture: use merge_op='all'"
            )
        per_node = module.num_ops_per_node
        nodes: list[Mixture | Node] = []
        for i, index in enumerate(range(module.num_predecessors, module.num_predecessors + module.num_nodes)):
            candidates, sources = {}, {}
            for j in range(index):
                # as NNI's one-shot cells: what a candidate is may depend on the tensor that it reads, not on its place
                source = module.op_candidates_factory or module.ops[i][0].candidates
                for op, candidate in create_cell_op_candidates(source, index, 0, j)[0].items():
                    name = f"{op}_from_{j}"
                    place = f"{path}.nodes.{i}.{name}" if self.topology is None else f"{path}.nodes.{i}.from_{j}.{name}"
                    candidates[name] = self._convert(candidate, place)
                    sources[name] = j
            label = f"{module.label}/{index}"
            labels = [(f"{module.label}/op_{index}_{k}", f"{module.label}/input_{index}_{k}") for k in range(per_node)]
            self._known |= {one for pair in labels for one in pair}
            self._decode(label, _node_decoder(label, labels))
            if self.topology is None:
                nodes.append(self._limited(Mixture(candidates, label, sources), per_node))
            else:
                nodes.append(self._node(self.topology, candidates, sources, label, per_node))
        before = self._convert(module.preprocessor, f"{path}.preprocessor")
        after = self._convert(module.postprocessor, f"{path}.postprocessor")
        return Cell(nodes, before, after, module.concat_dim)

    def _node(
        self, topology: Topology, candidates: dict[str, Any], sources: dict[str, int], label: str, per_node: int
    ) -> Node:
        inputs = len(set(sources.values()))
        edges = {}
        for j in range(inputs):
            ops = {name: candidate for name, candidate in candidates.items() if sources[name] == j}
            self._decode(f"{label}/{j}", lambda left: {})  # the node knows
            # NNI's node has so many operations, be there fewer inputs or not
            count = 1 if inputs >= per_node else per_node // inputs + (j < per_node % inputs)
            edges[j] = self._limited(Mixture(ops, f"{label}/{j}"), min(count, len(ops)))
        return Node(edges, label, *topology.sizes(inputs, per_node))

    def _parametrized(self, module: ParametrizedModule, path: str) -> nn.Module:
        arguments = _arguments(module)
        labels = {label: m for a in module.mutables for label, m in a.simplify().items()}
        self._known |= set(labels) & set(self._widest)
        others = {label: mutable for label, mutable in labels.items() if label not in self._widest}
        if len(others) > 1 or not all(isinstance(mutable, Categorical) for mutable in others.values()):
            what = ", ".join(f"{label!r} ({type(m).__name__})" for label, m in others.items())
            raise DNALError(
                f"{path}: {type(module).__name__} depends on {what}: beside widths it may depend on one nni.choice; "
                "make it a LayerChoice of modules"
            )

        def make(sample: dict[str, Any], place: str) -> Any:
            layer = module.freeze({**self._widest, **sample})
            if isinstance(layer, Norm):
                layer.eps, layer.momentum = module.eps, getattr(module, "momentum", None)
            for name in _width_names(module):
                if isinstance(arguments.get(name), Mutable):
                    self._widths.append((place, name, arguments[name]))
            return self._convert(layer, place)

        if not others:
            return make({}, path)
        ((label, choice),) = others.items()
        names = {str(value).replace(".", "_"): value for value in choice.values}
        self._decode(label, lambda left: {label: _one(left, names)})
        candidates = {name: make({label: value}, f"{path}.{name}") for name, value in names.items()}
        return self._limited(Mixture(candidates, label), 1)

    # -- back to NNI's architecture -----------------------------------------------------------------------------------

    def architecture(self, slim: nn.Module) -> dict[str, Any]:
        """NNI's architecture dict of a cut supernet.

        What a choice inside of a removed candidate would be does not matter: it gets its first value.

        Raises:
            DNALError: if ``slim`` is no member of the space; says why.
        """
        sample: dict[str, Any] = {}
        reasons = []
        for choice in slim.modules():
            if isinstance(choice, Choice):
                try:
                    sample |= self._decoders[choice.label](choice)
                except DNALError as error:
                    reasons.append(str(error))
        try:
            sample |= self._width_sample(slim)
        except DNALError as error:
            reasons.append(str(error))
        if reasons:
            reasons = list(dict.fromkeys(reasons))
            more = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
            raise DNALError(
                f"the network found is not in NNI's space, which has no words for it: {'; '.join(reasons[:5])}{more}. "
                "strategy.slim_model() is that network"
            )
        for label, mutable in self.space.simplify().items():
            if label not in sample:
                many = isinstance(mutable, CategoricalMultiple)
                sample[label] = list(mutable.values[: mutable.n_chosen or 1]) if many else mutable.values[0]
        wrong: SampleValidationError | None = self.space.check_contains(sample)
        assert wrong is None, wrong
        return sample

    def _width_sample(self, slim: nn.Module) -> dict[str, Any]:
        """Values of the width choices that give the layers the widths that they have."""
        modules = dict(slim.named_modules())
        samples: list[dict[str, Any]] = [{}]
        for path, name, expression in self._widths:
            if path not in modules:
                continue  # in a candidate that is gone
            width = getattr(modules[path], name)
            samples = [s for known in samples for s in _solutions(expression, known) if expression.freeze(s) == width]
            if not samples:
                raise DNALError(f"{path} has {name}={width}, which {', '.join(expression.simplify())} cannot give")
        return samples[0]


def _arguments(module: ParametrizedModule) -> dict[str, Any]:
    """The arguments of the constructor; NNI records them by name."""
    return dict(module.trace_kwargs)


def _width_names(module: nn.Module) -> tuple[str, ...]:
    """The arguments that are widths, which are also the attributes that tell a cut layer's width."""
    layer = layer_of(module)
    return tuple(layer.sizes) if layer is not None and "normalized_shape" not in layer.sizes else ()


def _make_plain(module: ParametrizedModule) -> None:
    """Let a layer of NNI's, whose arguments are all fixed, be the layer of torch that it stands for."""
    if module._bound_type is not None:
        for name in ("trace_args", "trace_kwargs", "_mutables"):
            vars(module).pop(name, None)
        module.__class__ = module._bound_type


def _solutions(expression: Mutable, known: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    free = {label: mutable for label, mutable in expression.simplify().items() if label not in known}
    for values in itertools.product(*(mutable.values for mutable in free.values())):
        yield {**known, **dict(zip(free, values))}


def _one(choice: Choice, names: Mapping[str, Any]) -> Any:
    if len(choice.units) != 1:
        kept = ", ".join(choice.units)
        raise DNALError(f"{choice.label} keeps {len(choice.units)} of {len(names)} candidates ({kept})")
    return names[choice.units[0]]


def _depths(choice: Choice) -> list[int]:
    assert isinstance(choice, Depth)
    return choice.depths


def _node_decoder(label: str, labels: list[tuple[str, str]]) -> Callable[[Choice], dict[str, Any]]:
    def decoder(left: Choice) -> dict[str, Any]:
        edges = left.edges.values() if isinstance(left, Node) else [left]
        units = [unit for edge in edges for unit in edge.units]
        if len(units) != len(labels):
            raise DNALError(f"node {label} keeps {len(units)} candidates instead of {len(labels)}")
        sample: dict[str, Any] = {}
        for (op, source), unit in zip(labels, units):
            name, _, j = unit.rpartition("_from_")
            sample |= {op: name, source: [int(j)]}
        return sample

    return decoder
