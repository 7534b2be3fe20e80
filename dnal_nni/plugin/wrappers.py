"""NNI's wrappers of other compressors, on the same model as the gates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..channels.groups import ChannelGroup


@contextlib.contextmanager
def without_wrappers(model: nn.Module) -> Iterator[None]:
    """Take the wrappers off for a while: a wrapped model cannot be copied. Gates stay on."""
    wrappers: list[Any] = [module._nni_wrapper for module in model.modules() if hasattr(module, "_nni_wrapper")]
    for wrapper in wrappers:
        wrapper.unwrap()
    try:
        yield
    finally:
        for wrapper in wrappers:
            wrapper.wrap()


def plain_names(model: nn.Module) -> dict[str, str]:
    """Names of the parameters of the plain model -> in the model as it is."""
    return {
        name.replace("_nni_wrapper.", ""): name
        for name, _ in model.named_parameters()
    }


def leave_wrapped_norms(model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
    """Let gates act on the readers where a wrapper computes the affine of a norm at every forward."""
    for group in groups:
        norms = [model.get_submodule(path) for path in group.norms] if group.site == "norm" else []
        if any("weight" not in norm._parameters for norm in norms):
            group.site = "input"
