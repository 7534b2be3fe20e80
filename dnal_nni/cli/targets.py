"""What the command line names: networks and functions as ``package.module:callable``, and files of weights."""

from __future__ import annotations

import contextlib
import difflib
import pickle
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import DNALError, told
from ..modules.running import FORWARD_ERRORS
from ..storage.compressed import FORMAT, load_compressed
from ..storage.digest import read_header


def _find(target: str, what: str) -> Any:
    name, colon, attribute = target.partition(":")
    if not (name and colon and attribute):
        module, dot, last = target.rpartition(".")
        guess = f"; did you mean {module}:{last}?" if dot and target.replace(".", "").isidentifier() else ""
        raise DNALError(f"{target!r} does not name a {what}: write package.module:function{guess}")
    if "/" in name or name.endswith(".py"):
        module = name.removesuffix(".py").removeprefix("./").replace("/", ".")
        raise DNALError(f"{name} is a file, and no module: write {module}:{attribute}, from the folder that it is in")
    with told(f"{name} cannot be imported"), _no_exit(name):
        import_module(name)
    try:
        return resolve_name(target)
    except (AttributeError, ValueError) as error:
        close = difflib.get_close_matches(attribute.rpartition(".")[2], dir(getattr(error, "obj", None)), 1)
        guess = f"; did you mean {close[0]}?" if close else ""
        raise DNALError(f"{name} has no {attribute}{guess}") from error


@contextlib.contextmanager
def _no_exit(what: str) -> Iterator[None]:
    """A module that is a script, such as one that reads the command line as it is imported, as one sentence."""
    try:
        yield
    except SystemExit as error:
        raise DNALError(
            f"{what} ends the program (sys.exit): move what a script does, such as reading its arguments, below "
            "if __name__ == '__main__'"
        ) from error


def load_callable(target: str) -> Callable[..., Any]:
    """The function that ``package.module:callable`` names."""
    found = _find(target, "function")
    if not callable(found):
        raise DNALError(f"{target} is a {type(found).__name__}, not a function")
    return found


def load_target(target: str, kwargs: dict[str, Any] | None = None) -> nn.Module:
    """The network that ``package.module:callable`` returns, or is."""
    found = _find(target, "network")
    if isinstance(found, nn.Module):
        if kwargs:
            raise DNALError(f"{target} is a network already: leave --kwargs out")
        return found
    if not callable(found):
        raise DNALError(f"{target} is a {type(found).__name__}, not a function that returns a network")
    call = f"{target}({', '.join(f'{key}={value!r}' for key, value in (kwargs or {}).items())})"
    with told(f"{call} fails"), _no_exit(call):
        model = found(**(kwargs or {}))
    if not isinstance(model, nn.Module):
        raise DNALError(f"{call} returns a {type(model).__name__}, not a torch.nn.Module")
    return model


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """The model with the state dict in a file: safetensors, of ``save_compressed``, or of ``torch.save``.

    ``torch.save`` writes pickle: only tensors are taken from it (``weights_only=True``), also from below a key
    "state_dict" or "model".
    """
    if not path.is_file():
        raise DNALError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        if read_header(path).get("format") == FORMAT:
            return load_compressed(model, path)
        with told(f"{path} is no safetensors file, or is damaged"):
            state: Any = load_file(path)
    else:
        state = _saved_by_torch(path)
    own = model.state_dict()
    for name, tensor in state.items():
        mine = own.get(name)
        if isinstance(mine, Tensor) and isinstance(tensor, Tensor) and mine.shape != tensor.shape:
            shapes = f"{list(tensor.shape)}, the model's is {list(mine.shape)}"
            raise DNALError(f"{path} does not fit the model: {name} is {shapes}")
    with told(f"{path} does not fit the model"):
        missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        what = [f"it has no {missing[0]}"] if missing else []
        what += [f"the model has no {unexpected[0]}"] if unexpected else []
        raise DNALError(f"{path} does not fit the model: {', and '.join(what)}")
    return model


def _saved_by_torch(path: Path) -> dict[str, Any]:
    """The state dict in a file of ``torch.save``."""
    remedy = "give a state dict, written by torch.save(model.state_dict(), path), or safetensors"
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DNALError(f"{path} holds more than tensors, or is no file of torch.save: {remedy}") from error
    except (OSError, EOFError, *FORWARD_ERRORS) as error:  # torch raises anything for a file that is none of its own
        raise DNALError(f"{path} is no file of torch.save, or is damaged: {remedy}") from error
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise DNALError(f"{path} holds a {type(state).__name__}: {remedy}")
    return state
