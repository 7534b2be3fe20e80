"""Norms that are no layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...modules.running import flatten_tensors
from ..flow import Arrays, Flow, Operation, lay
from .registry import rule


@rule("native_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update")
def batch_norm(flow: Flow, op: Operation) -> None:
    """Batch norm as a function: all its tensors are per channel."""
    x = flow.of(op.args[0])
    shape = op.args[0].shape
    operands: list[tuple[Sequence[int], Arrays]] = []
    arrays = flow.mix(x, [i for i in range(len(shape)) if i != 1], "batch norm over other axes than channels")
    operands.append(((1, shape[1]), tuple(a.reshape(a.shape[:2]) for a in arrays)))
    for tensor in op.args[1:5]:
        if isinstance(tensor, Tensor):
            labels = flow.of(tensor)
            operands.append((tensor.shape, labels.arrays if labels else ()))
    met = flow.meet(operands, "batch norm with fixed statistics")
    for out in flatten_tensors(op.out):  # the statistics too
        if out.numel() >= shape[1]:
            flow.put(out, [lay(a, 1 if out.dim() > 1 else 0, out.dim()) for a in met], None)


@rule("native_layer_norm", "native_group_norm", "_fused_rms_norm")
def statistics(flow: Flow, op: Operation) -> None:
    """Norms whose statistics run over channels: those of modules are taken over the open ones, a function's cannot."""
    name = op.name.removeprefix("native_").removeprefix("fused_")
    module = {"layer_norm": "nn.LayerNorm", "group_norm": "nn.GroupNorm"}.get(name, "nn.RMSNorm")
    what = f"F.{name} runs over the channels, where a module {module} could lose some,"
    x, *affine = (flow.of(op.args[0]), flow.of(op.argument("weight")), flow.of(op.argument("bias")))
    for labels in affine:
        flow.freeze(labels, what)
    if x is not None:
        axes = op.argument("normalized_shape")
        arrays = flow.mix(x, range(1 if axes is None else -len(axes), len(x.shape) if axes is None else 0), what)
        for out in flatten_tensors(op.out):  # the statistics too
            flow.put(out, [array.reshape(array.shape[: out.dim()]) for array in arrays], None)
