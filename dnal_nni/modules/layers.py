"""Kinds of layers: one record says all that the package knows of a kind.

A layer is read as a whole: what its forward does inside is not followed. Its record says along which dimensions of
which tensors its channels lie; from that follow how wide it is, how it is cut, saved, gated, timed and counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

Side = Literal["out", "in", "both", "size", "choice"]
"""Output or input channels of a layer that mixes them; "both" for layers and tensors that channels pass through; "size"
for a number that a module keeps about its channels, such as ``num_heads``; "choice" for the units of a
:class:`~dnal_nni.modules.choices.Choice`. Records of layers have the first three only."""

MIXED: tuple[Side, Side] = ("in", "out")

Conv = nn.modules.conv._ConvNd
RMSNorm: Any = getattr(nn, "RMSNorm", ())  # torch 2.4
Norm: Any = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    RMSNorm,
)


class PixelNorm(nn.Module):
    """Divides by the root of ``eps`` plus the mean square along ``axis`` (arXiv 1710.10196): of any width."""

    axis: int
    eps: float
    weight = None

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (any shape, channels along ``axis``) normalised, in float32 or more; same shape and dtype."""
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * (wide.square().mean(self.axis, keepdim=True) + self.eps).rsqrt()).to(x.dtype)


_AT_ONCE = 64  # channels that are copied: what lies between two cuts then stays in the cache


def cut_tensor(module: nn.Module, name: str, keep: Mapping[int, Tensor]) -> None:
    """Keep some entries of a parameter or buffer, in place: bool by dimension. None stays None."""
    old = module._parameters[name] if name in module._parameters else getattr(module, name, None)
    keep = {dim: mask for dim, mask in keep.items() if not bool(mask.all())}
    if old is None or not keep:
        return
    left = {dim: mask.nonzero().flatten().to(old.device) for dim, mask in keep.items()}
    first, *others = left
    new = old.new_empty([len(left[dim]) if dim in left else size for dim, size in enumerate(old.shape)])
    for index, place in zip(left[first].split(_AT_ONCE), new.split(_AT_ONCE, first)):
        part = old.detach().index_select(first, index)
        for dim in others:
            part = part.index_select(dim, left[dim])
        place.copy_(part)
    if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous():
        new = new.contiguous(memory_format=torch.channels_last)
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        setattr(module, name, new)


@dataclasses.dataclass(frozen=True)
class Layer:
    """What is known of one kind of layer.

    Attributes:
        tensors: by name of a parameter or buffer, the dimension along which the channels of each side lie: sides "in"
            and "out" of a layer that mixes channels, "both" of one that they pass through, one by one.
        sizes: by name of an attribute that counts channels (an int, or a tuple of one), the side that it counts.
        axis: dimension of the channels in the input: from the front, or, negative, from the end.
        apart: for the number of dimensions of the input and the dimension of its channels, the other dimensions along
            which the layer treats every position by itself, with no statistics over them.
        zero: what makes an output channel of a layer of one side zero: "affine" where its weight and bias are, "input"
            where its input is; None: nothing that is known of.
        opaque: whether it is not known what the layer does: it may sum over channels that pass, and is gated ahead too.
    """

    tensors: Mapping[str, Mapping[Side, int]]
    sizes: Mapping[str, Side]
    axis: int = 1
    apart: Callable[[int, int], Collection[int]] = lambda dims, axis: ()
    zero: Literal["affine", "input"] | None = None
    opaque: bool = False

    @property
    def sides(self) -> list[Side]:
        """The sides that layers of this kind have."""
        return list(dict.fromkeys(side for dims in self.tensors.values() for side in dims))

    @property
    def mixes(self) -> bool:
        """Whether every output channel depends on every input channel."""
        return self.sides != ["both"]

    def reads(self, module: nn.Module) -> bool:
        """Whether this one has channels, and not one parameter for all of them."""
        return True

    def widths(self, module: nn.Module) -> dict[Side, int]:
        """Number of channels of every side."""
        return {side: _number(getattr(module, name)) for name, side in self.sizes.items()}

    def input_axis(self, module: nn.Module) -> int:
        """``axis`` of this one."""
        return self.axis

    def by_itself(self, module: nn.Module, dims: int, axis: int) -> Collection[int]:
        """``apart`` of this one."""
        return self.apart(dims, axis)

    def dims(self, module: nn.Module, name: str) -> Mapping[Side, int]:
        """The dimensions of a tensor that hold all channels of a side."""
        return self.tensors.get(name, {})

    def grows_with(self, module: nn.Module, name: str) -> Collection[Side]:
        """The sides with which the size of a tensor grows in proportion."""
        return self.tensors.get(name, {})

    def moves(self, module: nn.Module) -> set[Side]:
        """The sides with which any of the tensors grows."""
        return {side for name in self.tensors for side in self.grows_with(module, name)}

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors in which channels meet: those with more than one dimension."""
        found = {name: getattr(module, name, None) for name in self.tensors}
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor) and tensor.dim() > 1}

    def vectors(self, module: nn.Module, side: Side) -> int:
        """Number of parameters that lie along one side alone, such as a bias."""
        parameters = dict(module.named_parameters(recurse=False))
        lines = [name for name in self.tensors if set(self.grows_with(module, name)) == {side}]
        return sum(parameters[name].numel() for name in lines if name in parameters and parameters[name].dim() == 1)

    def units(self, module: nn.Module) -> dict[Side, Tensor]:
        """By side, int64 ``[channels]``: channels with one number stand and fall together. Empty: each by itself."""
        return {}

    def cut(self, module: nn.Module, keep: Mapping[Side, Tensor]) -> None:
        """Keep some channels, in place: bool ``[channels]`` for every side that loses some."""
        for name, dims in self.tensors.items():
            cut_tensor(module, name, {dim: keep[side] for side, dim in dims.items() if side in keep})
        for name, side in self.sizes.items():
            if side in keep:
                self.set_size(module, name, int(keep[side].sum()))

    def follow(self, module: nn.Module) -> None:
        """Bring the sizes up to date with tensors that somebody else has cut."""
        for attribute, side in self.sizes.items():
            found = ((getattr(module, name), dims[side]) for name, dims in self.tensors.items() if side in dims)
            for tensor, dim in found:
                if tensor is not None:
                    self.set_size(module, attribute, tensor.shape[dim])
                    break

    def state(self, module: nn.Module) -> dict[str, int]:
        """The attributes that a cut changes."""
        return {name: _number(getattr(module, name)) for name in self.sizes}

    def numbers(self, module: nn.Module) -> dict[str, Any]:
        """Numbers that a cut may change too, by dotted name inside of the module: ints, or lists of ints."""
        return {}

    def set_size(self, module: nn.Module, name: str, size: int) -> None:
        """Set an attribute of :meth:`state`."""
        setattr(module, name, (size,) if isinstance(getattr(module, name), tuple) else size)

    def shapes(self, module: nn.Module, state: Mapping[str, int]) -> dict[str, list[int]]:
        """The shapes that the tensors must have for a :meth:`state`."""
        shapes = {}
        for name, dims in self.tensors.items():
            tensor = getattr(module, name, None)
            if isinstance(tensor, Tensor):
                shapes[name] = list(tensor.shape)
                for attribute, side in self.sizes.items():
                    if side in dims:
                        shapes[name][dims[side]] = state[attribute]
        return shapes


def _number(value: Any) -> int:
    return int(value[0] if isinstance(value, tuple) else value)


def _others(dims: int, axis: int) -> Collection[int]:
    return [a for a in range(dims) if a != axis]


class _Convolution(Layer):
    """Grouped: the weight has all channels of one side in dimension 0, and of the other those of one group in 1."""

    def input_axis(self, module: Any) -> int:
        return -len(module.kernel_size) - 1

    def by_itself(self, module: Any, dims: int, axis: int) -> Collection[int]:
        # token mixing: a kernel of one over [B, tokens, C]
        alone = all(n == 1 for sizes in (module.kernel_size, module.stride) for n in sizes)
        return _others(dims, axis) if alone and set(module.padding) == {0} else self.apart(dims, axis)

    def dims(self, module: Any, name: str) -> Mapping[Side, int]:
        if name != "weight":
            return self.tensors.get(name, {})
        first, second = self._order(module)
        return {first: 0} if module.groups > 1 else {first: 0, second: 1}

    def _order(self, module: Any) -> tuple[Side, Side]:
        return ("in", "out") if getattr(module, "transposed", False) else ("out", "in")

    def grows_with(self, module: Any, name: str) -> Collection[Side]:
        return self.tensors["bias"] if whole_groups(module) else self.tensors[name]

    def units(self, module: Any) -> dict[Side, Tensor]:
        if module.groups == 1:
            return {}
        into, out = torch.arange(module.in_channels), torch.arange(module.out_channels)
        fan_in, fan_out = module.in_channels // module.groups, module.out_channels // module.groups
        if whole_groups(module):
            return {"in": into // fan_in, "out": out // fan_out}
        return {"in": into % fan_in, "out": fan_in + out % fan_out}

    def cut(self, module: Any, keep: Mapping[Side, Tensor]) -> None:
        whole, dims = whole_groups(module), self.dims(module, "weight")
        masks = {dims[side]: mask for side, mask in keep.items() if side in dims}
        if not whole and (others := keep.keys() - dims):
            masks[1] = keep[others.pop()].view(module.groups, -1)[0]
        cut_tensor(module, "weight", masks)
        if "out" in keep:
            cut_tensor(module, "bias", {0: keep["out"]})
        if whole and "in" in keep:
            module.groups = int(keep["in"].view(module.groups, -1).any(1).sum())
        for name, side in self.sizes.items():
            if side in keep:
                setattr(module, name, int(keep[side].sum()))

    def follow(self, module: Any) -> None:
        first, second = module.weight.shape[0], module.weight.shape[1] * module.groups
        for name, side in self.sizes.items():
            setattr(module, name, first if side == self._order(module)[0] else second)

    def state(self, module: Any) -> dict[str, int]:
        return {**super().state(module), "groups": module.groups}

    def shapes(self, module: Any, state: Mapping[str, int]) -> dict[str, list[int]]:
        width: dict[Side, int] = {side: state[name] for name, side in self.sizes.items()}
        first, second = self._order(module)
        shape = [width[first], width[second] // state["groups"], *module.kernel_size]
        return {"weight": shape, "bias": [width["out"]]}


class _GroupNorm(Layer):
    def units(self, module: Any) -> dict[Side, Tensor]:
        every, fan = torch.arange(module.num_channels), module.num_channels // module.num_groups
        return {} if module.num_groups == 1 else {"both": every % fan if masked_statistics(module) else every // fan}

    def cut(self, module: Any, keep: Mapping[Side, Tensor]) -> None:
        if not masked_statistics(module):
            module.num_groups = module.num_groups * int(keep["both"].sum()) // module.num_channels
        super().cut(module, keep)

    def state(self, module: Any) -> dict[str, int]:
        return {**super().state(module), "num_groups": module.num_groups}


class _LayerNorm(Layer):
    """Over the last dimension, or of shape ``[C, 1, 1]`` (GCNet) over the one ahead of dimensions of size 1."""

    def input_axis(self, module: Any) -> int:
        return int(getattr(module, "axis", -len(module.normalized_shape)))

    def reads(self, module: Any) -> bool:
        return all(n == 1 for n in module.normalized_shape[1:])

    def set_size(self, module: Any, name: str, size: int) -> None:
        setattr(module, name, (size, *getattr(module, name)[1:]))


class _PixelNorm(Layer):
    """It has as many channels as come."""

    @property
    def sides(self) -> list[Side]:
        return ["both"]

    def input_axis(self, module: Any) -> int:
        return int(module.axis)


class _InstanceNorm(Layer):
    def input_axis(self, module: Any) -> int:
        return -int(module._get_no_batch_dim())


class _PReLU(Layer):
    def reads(self, module: Any) -> bool:
        return bool(module.num_parameters != 1)


class _Recurrent(Layer):
    """The columns that read the input; states, and what comes out, are mixed at every step."""

    def weights(self, module: Any) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in module.named_parameters(recurse=False) if parameter.dim() > 1}


class _Embedding(Layer):
    def reads(self, module: Any) -> bool:
        return module.max_norm is None  # which changes the table by norms over the channels, at every forward


_EACH: Mapping[Side, int] = {"both": 0}
_MIXING: Mapping[str, Mapping[Side, int]] = {"weight": {"out": 0, "in": 1}, "bias": {"out": 0}}
_COLUMNS: Mapping[Side, int] = {"in": 1}
_AFFINE: Mapping[str, Mapping[Side, int]] = {"weight": _EACH, "bias": _EACH}
_RUNNING = {**_AFFINE, "running_mean": _EACH, "running_var": _EACH}
_CONVOLUTION = _Convolution(
    _MIXING, {"in_channels": "in", "out_channels": "out"}, apart=lambda dims, axis: (0,)
)
_EMBEDDING = _Embedding({"weight": {"out": 1}}, {"embedding_dim": "out"}, -1)
_LAYER_NORM = _LayerNorm(_AFFINE, {"normalized_shape": "both"}, -1, _others, "affine")

# by class, or, of a library that need not be there, by its name: `module.Class`
_KINDS: dict[type[nn.Module] | str, Layer] = {
    Conv: _CONVOLUTION,
    "torchvision.ops.deform_conv.DeformConv2d": _CONVOLUTION,
    nn.Linear: Layer(
        _MIXING, {"in_features": "in", "out_features": "out"}, -1, lambda dims, axis: range(axis)
    ),
    nn.Bilinear: Layer({"weight": {"out": 0}, "bias": {"out": 0}}, {"out_features": "out"}, -1),
    nn.Embedding: _EMBEDDING,
    nn.EmbeddingBag: _EMBEDDING,
    nn.RNNBase: _Recurrent(
        {"weight_ih_l0": _COLUMNS, "weight_ih_l0_reverse": _COLUMNS}, {"input_size": "in"}, -1
    ),
    nn.RNNCellBase: _Recurrent({"weight_ih": _COLUMNS}, {"input_size": "in"}, -1),
    nn.modules.batchnorm._BatchNorm: Layer(_RUNNING, {"num_features": "both"}, zero="affine"),
    nn.modules.instancenorm._InstanceNorm: _InstanceNorm(
        _RUNNING, {"num_features": "both"}, apart=lambda dims, axis: range(axis), zero="affine"
    ),
    nn.GroupNorm: _GroupNorm(_AFFINE, {"num_channels": "both"}, apart=lambda dims, axis: (0,), zero="affine"),
    nn.LayerNorm: _LAYER_NORM,
    **({RMSNorm: _LAYER_NORM} if RMSNorm else {}),
    PixelNorm: _PixelNorm({}, {}, apart=_others, zero="input"),
    nn.PReLU: _PReLU({"weight": _EACH}, {"num_parameters": "both"}, apart=_others, zero="input"),
}


def kinds() -> dict[type[nn.Module] | str, Layer]:
    """Every kind of layer that is known, by its class."""
    return dict(_KINDS)


def layer_of(module: nn.Module) -> Layer | None:
    """The record of a module's kind, that of the nearest class of its ancestry; None for what is no layer."""
    for cls in type(module).__mro__:
        layer = _KINDS.get(cls) or _KINDS.get(f"{cls.__module__}.{cls.__qualname__}")
        if layer is not None:
            return layer if layer.reads(module) else None
    return None


def mixing(module: nn.Module) -> bool:
    """Whether this is a layer whose outputs are each made of all its inputs: a convolution, a linear layer ..."""
    layer = layer_of(module)
    return layer is not None and layer.mixes


def set_kind(kind: type[nn.Module], layer: Layer | None) -> None:
    """Give modules of a class a record, or take it from them."""
    if layer is None:
        _KINDS.pop(kind, None)
    else:
        _KINDS[kind] = layer


def whole_groups(conv: Any) -> bool:
    """Whether a grouped convolution loses whole groups (input and output channels together), depthwise included.

    Otherwise every group loses the same positions. Either is exact; the one that leaves more freedom is taken.
    """
    return bool(1 < conv.groups >= conv.in_channels // conv.groups)


def masked_statistics(norm: nn.Module) -> bool:
    """Whether statistics run over channels that may be removed, and must be taken over the open ones only.

    A group norm with at least as many groups as channels in each loses whole groups instead: its statistics stay.
    """
    if isinstance(norm, nn.GroupNorm):
        return norm.num_groups < norm.num_channels // norm.num_groups
    return isinstance(norm, (nn.LayerNorm, RMSNorm, PixelNorm))
