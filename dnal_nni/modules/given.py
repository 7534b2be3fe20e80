"""The model as a user gives it: whether it can be given gates and cut, and if not, what to do first."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..arguments import shown
from ..errors import DNALError
from .layers import layer_of

_QUANTIZED = "is quantized, and numbers of a few bits cannot learn: cut the network first, then quantize what is cut"
_PREPARED = "is prepared for quantization: cut the network first, then prepare, train and convert what is cut"
_FOREIGN = {
    "torch._dynamo.": "is compiled: give its _orig_mod, the module that torch.compile was given; compile what is cut, "
    "or inside of the search",
    "torch.jit.": "was compiled by torch.jit, and its code cannot be changed: pass the module that it was made of; "
    "script or trace what is cut",
    "torch.nn.parallel.": "is wrapped in {kind}: pass model.module; train with the wrapper",
    "torch.distributed.fsdp.": "is sharded (FSDP), and a search needs whole parameters: shard what is cut",
    "torch.ao.nn.quantized.": _QUANTIZED,
    "torch.ao.nn.intrinsic.quantized.": _QUANTIZED,
    "bitsandbytes.": _QUANTIZED,
    "torch.ao.nn.qat.": _PREPARED,
    "torch.ao.nn.intrinsic.qat.": _PREPARED,
    "torch.ao.quantization.fake_quantize.": _PREPARED,
    "torch.ao.quantization.observer.": _PREPARED,
    "torchao.quantization.qat.": _PREPARED,
    "torch.export.": "is an exported program: pass the model that was exported, and export what is cut",
}
"""By the module of a class, of those that a module of the model is derived from: what is wrong with it."""


def check_model(model: object) -> None:
    """Raise where a model cannot be given gates, or cut.

    Raises:
        DNALError: names what is in the way, and what to do first.
    """
    if torch.is_inference_mode_enabled():
        raise DNALError("inside of torch.inference_mode() nothing can learn or be compared: leave it first")
    if not isinstance(model, nn.Module):
        raise DNALError(f"model must be a torch.nn.Module, and is {shown(model)}{_hint(model)}")
    for name, module in model.named_modules():
        if hasattr(module, "_nni_wrapper"):
            raise DNALError(f"{name} is already wrapped by another NNI compressor: call its unwrap_model() first")
    check_kind(model)
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    _check_tensors(tensors)
    if not any(isinstance(tensor, nn.Parameter) for _, tensor in tensors):
        raise DNALError("the model has no parameters: there is nothing to prune")
    if isinstance(model, torch.fx.GraphModule) and not any(layer_of(module) for module in model.modules()):
        raise DNALError("the model (GraphModule) is a graph of operations without layers: pass the model behind it")


def check_kind(model: nn.Module) -> None:
    """Raise where a model, or a part of it, is what another tool has made of it.

    Raises:
        DNALError: names the part and the tool, and what to do first.
    """
    for name, module in model.named_modules():
        kind = type(module)
        if reason := _foreign(kind, whole=not name):
            raise DNALError(f"{name or 'the model'} ({kind.__name__}) {reason.format(kind=kind.__name__)}")


def _check_tensors(tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        if is_lazy(tensor):
            raise DNALError(f"{name} has no shape yet: run the model once on an input, model(x), as lazy layers need")
        if tensor.is_meta:
            raise DNALError(f"{name} is on the meta device and has no values: model.to_empty(device=...), load weights")
        if tensor.is_inference():
            raise DNALError(
                f"{name} was made inside of torch.inference_mode(), and can never learn: take copy.deepcopy(model) "
                "outside of it"
            )
        if isinstance(tensor, nn.Parameter) and type(tensor.data) is not Tensor:
            raise DNALError(f"{name} is a {type(tensor.data).__name__}, no plain tensor: cut first, then convert")


def _foreign(kind: type, whole: bool) -> str | None:
    """Why not; TorchScript inside of a model runs, and is left whole."""
    homes = [f"{base.__module__}." for base in kind.__mro__]
    for home, why in _FOREIGN.items():
        if (whole or home != "torch.jit.") and any(place.startswith(home) for place in homes):
            return why
    return None


def _hint(model: object) -> str:
    if isinstance(model, type) and issubclass(model, nn.Module):
        return f"; this is the class, make one of it: {model.__name__}(...)"
    if type(model).__name__ == "ExportedProgram":
        return "; pass the model that was exported"
    if isinstance(model, dict):
        return "; a state dict goes into one: model.load_state_dict()"
    return ""
