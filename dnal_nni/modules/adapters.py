"""Modules whose forward keeps a size that a cut changes, and the same modules without it."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from ..arguments import checked
from ..errors import DNALError
from .attention import SlimMultiheadAttention, SlimTransformerEncoderLayer
from .norms import recognise

_ORIGINAL = "_dnal_original_class"
_REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: SlimMultiheadAttention,
    nn.TransformerEncoderLayer: SlimTransformerEncoderLayer,
}
_OF_TORCHVISION = {  # which takes as long to import as torch itself: by name, until a model has one
    "torchvision.models.swin_transformer.ShiftedWindowAttention",
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2",
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention",
}


@checked
def register_adapter(original: type[nn.Module], replacement: type[nn.Module]) -> None:
    """Let every module of class ``original`` run as ``replacement`` while it is gated, and once it is cut.

    Args:
        original: matched exactly, not its subclasses.
        replacement: a subclass of it at module level, without an ``__init__`` of its own, that computes the same from
            the same parameters, with every size read from tensors.

    Raises:
        DNALError: if the replacement is no subclass, or is defined inside a function.
    """
    if not issubclass(replacement, original):
        raise DNALError(f"register_adapter: {replacement.__name__} must be a subclass of {original.__name__}")
    if "<locals>" in replacement.__qualname__:
        raise DNALError(
            f"register_adapter: define {replacement.__name__} at module level, or no cut model can be pickled"
        )
    _REPLACEMENTS[original] = replacement


def _replacement(kind: type[nn.Module]) -> type[nn.Module] | None:
    if kind not in _REPLACEMENTS and f"{kind.__module__}.{kind.__name__}" in _OF_TORCHVISION:
        _REPLACEMENTS[kind] = getattr(import_module(".windows", __package__), f"Slim{kind.__name__}")
    return _REPLACEMENTS.get(kind)


def adapt(model: nn.Module, *, revertible: bool = False) -> None:
    """Give the modules of ``model`` their replacement classes, in place; parameters stay the same objects.

    Norms under other names (:mod:`dnal_nni.modules.norms`) become what they compute.
    """
    for module in model.modules():
        known = _replacement(type(module))
        replacement, attributes = (known, {}) if known is not None else recognise(module) or (None, {})
        if replacement is not None:
            if revertible:
                before = {name: vars(module)[name] for name in attributes if name in vars(module)}
                vars(module)[_ORIGINAL] = type(module), list(attributes), before
            vars(module).update(attributes)
            module.__class__ = replacement


def restore(model: nn.Module) -> None:
    """Undo a revertible :func:`adapt`."""
    for module in model.modules():
        if _ORIGINAL in vars(module):
            module.__class__, added, before = vars(module).pop(_ORIGINAL)
            for name in added:
                del vars(module)[name]
            vars(module).update(before)
