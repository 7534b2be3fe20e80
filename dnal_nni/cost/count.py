"""What a network costs, by fvcore's count: one fused multiply-add is one flop."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..arguments import checked
from ..budget import Complexity
from ..errors import DNALError
from ..modules.adapters import adapt
from ..modules.running import FORWARD_ERRORS, Example, call, clone, flatten_tensors, raised_in, rejected, twin
from ..surgery.inject import detach

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts at import, which torch warns of: an error under python -W error
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.flop_count import _DEFAULT_SUPPORTED_OPS
    from fvcore.nn.jit_handles import get_shape

Handle = Callable[[list[Any], list[Any]], Any]


# -- operations that fvcore counts as 0, and whose formula is known ---------------------------------------------------


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """``softmax(q k^T) v`` with q ``[*, L, E]``, k ``[*, S, E]``, v ``[*, S, F]``: two products."""
    q, k, v = (get_shape(x) for x in inputs[:3])
    return int(math.prod(q) * k[-2] + math.prod(q[:-1]) * k[-2] * v[-1])


def _recurrent(inputs: list[Any], outputs: list[Any]) -> int:
    """Every weight matrix is used once for every position (LSTM, GRU, RNN)."""
    x = get_shape(inputs[0])
    weights = next(v.node().inputs() for v in inputs if v.type().kind() == "ListType" and _of_matrices(v))
    size = sum(math.prod(shape) for w in weights if len(shape := get_shape(w)) == 2)
    return int(math.prod(x[:-1]) * size)


def _of_matrices(value: Any) -> bool:
    shapes = [get_shape(x) for x in value.node().inputs()]
    return any(shape is not None and len(shape) == 2 for shape in shapes)


def _cell(inputs: list[Any], outputs: list[Any]) -> int:
    rows = get_shape(inputs[0])[0]
    matrices = [shape for x in inputs[1:] if (shape := get_shape(x)) is not None and len(shape) == 2]
    return int(rows * sum(math.prod(shape) for shape in matrices if shape[0] != rows))


def _deformable(inputs: list[Any], outputs: list[Any]) -> int:
    weight, out = get_shape(inputs[1]), get_shape(outputs[0])
    return int(out[0] * math.prod(weight) * math.prod(out[2:]))


def _batched_product(inputs: list[Any], outputs: list[Any]) -> int:
    a, b = get_shape(inputs[1]), get_shape(inputs[2])
    return int(math.prod(a) * b[-1])


def _bilinear(inputs: list[Any], outputs: list[Any]) -> int:
    x, weight = get_shape(inputs[0]), get_shape(inputs[2])
    return int(math.prod(x[:-1]) * math.prod(weight))


HANDLES: dict[str, Handle] = {
    "aten::scaled_dot_product_attention": _attention,
    **dict.fromkeys(("aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"), _recurrent),
    **dict.fromkeys(("aten::lstm_cell", "aten::gru_cell", "aten::rnn_tanh_cell", "aten::rnn_relu_cell"), _cell),
    "torchvision::deform_conv2d": _deformable,
    "aten::baddbmm": _batched_product,
    "aten::bilinear": _bilinear,
}
"""Given to fvcore beside its own handles; docs/method.md names them."""

# what costs and cannot be counted, by parts of its name; sums, activations and moves are no multiply-adds
_COSTLY = ("PythonOp", "CallFunction", "fft_", "cdist", "conv", "mm", "matmul", "linalg", "attention", "einsum")


@dataclasses.dataclass(frozen=True)
class Count:
    """fvcore's count of one forward pass.

    Attributes:
        flops: by dotted path of a module, "" the whole.
        uncounted: operations that cost, but not in this count, by name.
    """

    flops: dict[str, int]
    uncounted: tuple[str, ...]


class _Traced(nn.Module):
    """A model as torch's tracer wants it: tensors in, tensors out."""

    def __init__(self, model: nn.Module, dummy_input: Any) -> None:
        super().__init__()
        self.model = model
        leaves, self.form = tree_flatten(dummy_input.inputs if isinstance(dummy_input, Example) else dummy_input)
        self.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors):
            leaves[place] = tensor
        return tuple(flatten_tensors(call(self.model, tree_unflatten(leaves, self.form))))


def count(model: nn.Module, dummy_input: Any) -> Count:
    """Count every module of ``model`` with fvcore, in eval mode, on a twin without gates.

    Args:
        model: any module that runs on ``dummy_input``.
        dummy_input: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.

    Raises:
        DNALError: torch's tracer, with which fvcore counts, cannot pass the model; names the module.
    """
    model = twin(model).eval()
    detach(model)
    adapt(model)  # modules that are counted by their layers, before and after a cut
    for parameter in model.parameters():  # the fast path of attention, taken without gradients, hides what it computes
        parameter.requires_grad_(parameter.is_floating_point())
    traced = _Traced(model, dummy_input)
    stubbed = _passed_over(traced)
    while True:
        try:
            return _count(traced, stubbed)
        except FORWARD_ERRORS as error:
            if not stubbed:
                _check_runs(model, dummy_input)
            culprit = raised_in(error, torch_too=True)
            path = next((name for name, module in model.named_modules() if module is culprit), "")
            if not path or path in stubbed or next(model.get_submodule(path).parameters(), None) is not None:
                where = f"{path} ({type(culprit).__name__})" if path else type(model).__name__
                raise DNALError(
                    f"the FLOPs of {where} cannot be counted: torch's tracer, with which fvcore counts, fails there "
                    f"({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}); "
                    "write its forward so that torch.jit.trace passes it"
                ) from error
            stubbed.append(path)  # without parameters: it is passed over, and what it returns is taken from a run
            _stub(traced, path)


def _check_runs(model: nn.Module, dummy_input: Any) -> None:
    """Raise where the model itself does not run on the input."""
    try:
        with torch.no_grad():
            call(model, dummy_input)
    except FORWARD_ERRORS as error:
        raise DNALError(rejected(dummy_input, error)) from error


def _count(traced: _Traced, stubbed: list[str]) -> Count:
    """With sizes that are tensors, as a forward may expect of the tracer; or else with ints."""
    try:
        return _counted(traced, stubbed, contextlib.nullcontext())
    except FORWARD_ERRORS:
        with contextlib.suppress(*FORWARD_ERRORS):
            return _counted(traced, stubbed, _Sizes())
        raise


def _counted(traced: _Traced, stubbed: list[str], sizes: contextlib.AbstractContextManager[Any]) -> Count:
    missed: set[str] = set()
    with warnings.catch_warnings(), torch.no_grad(), _as_the_tracer_needs_it(), sizes:
        warnings.simplefilter("ignore")  # the tracer's remarks on the user's forward
        analysis = FlopCountAnalysis(traced, traced.tensors)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.set_op_handle(**{
            name: _careful(name, handle, missed) for name, handle in {**_DEFAULT_SUPPORTED_OPS, **HANDLES}.items()
        })
        by_module = analysis.by_module()
        unsupported = analysis.unsupported_ops()
    missed |= {name for name in unsupported if any(part in name for part in _COSTLY)}
    flops = {path.removeprefix("model").lstrip("."): int(n) for path, n in by_module.items() if path}
    names = sorted({name.partition("::")[2].removeprefix("PythonOp.") for name in missed} | set(stubbed))
    return Count(flops, tuple(names))


class _Sizes(TorchFunctionMode):
    """Sizes that a forward reads are ints, as they are when it is not traced: it may test for that, or look them up."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (Tensor.size, Tensor.numel, Tensor.nelement) or getattr(func, "__self__", None) is Tensor.shape:
            return torch.Size(map(int, found)) if isinstance(found, tuple) else int(found)
        return found


def _careful(name: str, handle: Handle, missed: set[str]) -> Handle:
    """The handle; a form of the operation that it does not expect is not counted, and said."""

    def careful(inputs: list[Any], outputs: list[Any]) -> Any:
        try:
            return handle(inputs, outputs)
        except (*FORWARD_ERRORS, StopIteration):
            missed.add(name)
            return Counter()

    return careful


class _Compiled(nn.Module):
    """What torch.jit has compiled, out of the tracer's sight."""

    def __init__(self, compiled: nn.Module) -> None:
        super().__init__()
        self.held = (compiled,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.held[0](*args, **kwargs)


def _passed_over(traced: _Traced) -> list[str]:
    """Stub what torch.jit has compiled: it takes no hooks, with which fvcore counts; the paths."""
    paths: list[str] = []
    for path, module in list(traced.model.named_modules()):
        if isinstance(module, torch.jit.ScriptModule) and not any(path.startswith(f"{other}.") for other in paths):
            owner, _, name = path.rpartition(".")
            setattr(traced.model.get_submodule(owner), name, _Compiled(module))
            _stub(traced, path)
            paths.append(path)
    return paths


def _stub(traced: _Traced, path: str) -> None:
    """Let a module of the copy return what it returned in a run, call by call."""
    module = traced.model.get_submodule(path)
    returned: list[Any] = []
    handle = module.register_forward_hook(lambda module, args, out: returned.append(out))
    with torch.no_grad():
        traced(*traced.tensors)
    handle.remove()
    calls = itertools.cycle(returned)

    def forward(*args: Any, **kwargs: Any) -> Any:
        read = [x.reshape(-1)[0] for x in flatten_tensors([args, list(kwargs.values())]) if x.is_floating_point()]
        nothing = 0.0 * sum(read, torch.zeros(()))  # else what was computed for this module would be of no use
        return tree_map(
            lambda x: x + nothing.to(x) if isinstance(x, Tensor) and x.is_floating_point() else x, next(calls)
        )

    vars(module)["forward"] = forward


@contextlib.contextmanager
def _as_the_tracer_needs_it() -> Iterator[None]:
    """With gradients; and with torch's checks of sizes, which are tensors here: ``F.max_unpool2d`` has them (2.14)."""
    check = torch._check_with

    def of_tensors(error_type: type[BaseException], cond: Any, message: Any) -> None:
        check(error_type, bool(cond), message)

    torch._check_with = of_tensors
    try:
        with torch.enable_grad():
            yield
    finally:
        torch._check_with = check


def flops_by_module(model: nn.Module, dummy_input: Any) -> dict[str, int]:
    """The FLOPs of :func:`count`."""
    return count(model, dummy_input).flops


@checked
def measure(model: nn.Module, dummy_input: Any) -> Complexity:
    """Count ``model`` with fvcore, in eval mode, on a copy. Gates are taken off first: they cost nothing once cut.

    Args:
        model: any module that runs on ``dummy_input``.
        dummy_input: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.

    Raises:
        DNALError: torch's tracer, with which fvcore counts, cannot pass the model; names the module.
    """
    return complexity(model, count(clone(model), dummy_input))


def complexity(model: nn.Module, counted: Count) -> Complexity:
    """What ``model``, of which this is the count, costs."""
    parameters = sum(p.numel() for p in model.parameters())
    return Complexity(counted.flops[""], parameters, uncounted=counted.uncounted)
