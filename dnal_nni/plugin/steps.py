"""How many optimizer steps an epoch of a user's training has, counted without training."""

from __future__ import annotations

import contextlib
import copy
import math
import random
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import nni.compression
import numpy as np
import torch
from nni.compression.utils import evaluator as nnis
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import DNALError
from .shims import TransformersEvaluator


def steps_per_epoch(evaluator: Any, model: nn.Module, names: Mapping[str, str]) -> int:
    """Optimizer steps of one epoch of the user's training; nothing is trained, and nothing of the model changes.

    For a ``TorchEvaluator`` its training function runs for an epoch, with optimizers that only count; what that
    function keeps for itself (a GradScaler, a log, a DataLoader's own generator) sees this epoch. Lightning and
    transformers can tell. The evaluator may be bound and patched: no patch runs, and none is lost.

    Args:
        evaluator: initialised.
        model: the model that is being compressed, as it is now.
        names: the parameters' names in the plain model -> in this one.

    Raises:
        DNALError: if the training has no such number.
    """
    with same_random_numbers():
        if isinstance(evaluator, nni.compression.LightningEvaluator):
            return _lightning_steps(evaluator)
        if isinstance(evaluator, TransformersEvaluator):
            return _transformers_steps(evaluator)
        with _unchanged(model, evaluator):
            steps = _torch_steps(evaluator, model, names)
    if steps == 0:
        raise DNALError("the training function made no optimizer step in one epoch: check its data, or its max_epochs")
    return steps


def _torch_steps(evaluator: Any, model: nn.Module, names: Mapping[str, str]) -> int:
    steps = 0

    def step(self: Optimizer, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += self is optimizers[0]
        with torch.enable_grad():
            return None if closure is None else closure()

    optimizers = [helper.call(model, names) for helper in evaluator._optimizer_helpers]
    for optimizer in optimizers:
        optimizer.step = types.MethodType(step, optimizer)  # ahead of the schedulers, which wrap it
    schedulers = [
        helper.call(optimizers[evaluator._lrs_opt_map[index]])
        for index, helper in enumerate(evaluator._lr_scheduler_helpers)
    ]
    evaluator.training_func(
        model,
        optimizers[0] if evaluator._train_with_single_optimizer else optimizers,
        _stand_in(evaluator._ori_training_step, model),
        None if not schedulers else schedulers[0] if evaluator._train_with_single_scheduler else schedulers,
        None,
        1,
    )
    return steps


def _stand_in(training_step: Callable[..., Any], model: nn.Module) -> Callable[..., Any]:
    """A training step that returns what ``training_step`` does, where the loss is a constant with zero gradients.

    The real one runs for the first batch, to see what it returns; if that is more than a loss, once for each shape.
    """
    seen: dict[Any, Any] = {}

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        shapes = tuple(leaf.shape for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        real = next(iter(seen.values()), None)
        if not isinstance(real, Tensor):
            real = seen.get(shapes)
        if real is None:
            # the training may see this batch again: a step that changes it in place gets its own
            own_args, own_kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
            output = training_step(*own_args, **own_kwargs)
            real = seen[shapes] = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, output)
        loss, together = _loss_of(real)
        zero = torch.zeros((), device=loss.device, requires_grad=True)
        # every gradient exists and is zero: a GradScaler refuses to step without any
        parts = [p.reshape(-1)[:0].sum().to(loss.device) for p in model.parameters() if p.requires_grad]
        return together(loss + sum(parts, zero))

    return stand_in


def _loss_of(output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The loss in what a training step returns, and how to put another one there, as NNI's ``patch_loss`` does."""
    if isinstance(output, Tensor):
        return output, lambda loss: loss
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):

        def together(loss: Tensor) -> Any:
            changed: Any = copy.copy(output)
            changed["loss"] = loss
            return changed

        return output["loss"], together
    if isinstance(output, (list, tuple)) and output and isinstance(output[0], Tensor):
        return output[0], lambda loss: (loss, *output[1:])
    raise DNALError(
        f"training_step returns a {type(output).__name__}: NNI takes a loss, a tuple that starts with it, or a dict "
        "with a 'loss'"
    )


def _lightning_steps(evaluator: Any) -> int:
    """``Trainer.estimated_stepping_batches`` of an epoch, as Lightning tells it to a module that never trains."""
    data, accumulates = evaluator.data_module, nnis.pl.callbacks.GradientAccumulationScheduler
    if any(isinstance(callback, accumulates) for callback in evaluator.trainer.callbacks):
        raise DNALError("a GradientAccumulationScheduler makes epochs of different lengths: pass max_steps instead")
    told: list[float] = []

    class Counter(nnis.pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def training_step(self, batch: Any, batch_idx: int) -> None:
            """Never runs; a module without it is refused."""

        def configure_optimizers(self) -> Optimizer:
            told.append(self.trainer.estimated_stepping_batches)
            self.trainer.should_stop = True
            return torch.optim.SGD(self.parameters(), lr=0.0)

    # none of the user's callbacks, loggers and checkpoints, and no other limit than the epoch
    off: dict[str, Any] = dict.fromkeys(("callbacks", "profiler", "max_time", "min_epochs", "min_steps"))
    off |= dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    kwargs = {**evaluator.trainer.trace_kwargs, **off, "max_epochs": 1, "max_steps": -1}
    before = data.trainer
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning repeats them when it trains
            evaluator.trainer.trace_symbol(*evaluator.trainer.trace_args, **kwargs).fit(Counter(), data)
    finally:
        data.trainer = before
    if told[0] < 1:
        raise DNALError("the train_dataloader has no length: pass max_steps instead of max_epochs")
    return int(told[0])


def _transformers_steps(evaluator: Any) -> int:
    """As ``Trainer.set_initial_training_values`` computes them, whose arguments differ between versions."""
    trainer = evaluator.traced_trainer
    try:
        batches = len(trainer.get_train_dataloader())
    except TypeError:
        raise DNALError("the train_dataset has no length: pass max_steps instead of max_epochs") from None
    return max(1, math.ceil(batches / trainer.args.gradient_accumulation_steps))


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """Afterwards, random numbers go on as if nothing had happened."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def _unchanged(model: nn.Module, evaluator: Any) -> Iterator[None]:
    """Afterwards, the model and what NNI's hooks have collected are what they were."""
    modules = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    tensors = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    hooks = [(hook, list(hook.buffer)) for hook in evaluator.get_all_hooks()]
    for parameter in model.parameters():
        parameter.grad = None  # the training function may zero them in place
    try:
        yield
    finally:
        for module, training, buffers in modules:
            module.training = training
            module._buffers.clear()  # NNI's wrappers put new tensors there
            module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, value in tensors:
                if not torch.equal(tensor, value):  # an expanded mask can be compared only
                    tensor.copy_(value)
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for hook, collected in hooks:
            hook.buffer[:] = collected
