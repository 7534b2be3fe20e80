"""Where NNI 3.0, which is archived, does not run on what is installed today: one shim for each break.

Line numbers are those of NNI 3.0's ``nni/compression/utils/evaluator.py``. Nothing here acts at import. A context
manager acts where the installed version needs it, until it is left; :class:`TransformersEvaluator` is a class of its
own, because what is broken there are NNI's own methods.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import nni
from nni.compression import LightningEvaluator
from nni.compression import TransformersEvaluator as NNITransformersEvaluator
from torch import Tensor, nn
from torch.optim import Optimizer


def around_step(optimizer: Optimizer, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Run ``before`` between the backward pass and ``optimizer.step``, and ``after`` behind that.

    Breaks with every version of torch: NNI's ``patch_optimizer_step`` (lines 583 and 886) runs its tasks ahead of
    ``optimizer.step(closure)``. Where the backward pass is part of the closure (Lightning always, LBFGS), they see the
    gradients of the step before. It also hides the mark that schedulers leave on ``step``, for which torch then warns
    ``Seems like optimizer.step() has been overridden after learning rate scheduler initialization``
    (github.com/pytorch/pytorch/issues/20124).

    For this optimizer only, for as long as it lives. Of a closure that is called several times in a step, ``before``
    sees the first gradients.
    """
    step = optimizer.step

    def patched(_: Optimizer, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        if closure is None:
            before()
            output = step(*args, **kwargs)
        else:
            output = step(_then(closure, before), *args, **kwargs)
        after()
        return output

    # not functools.wraps: __wrapped__ would be a bound method, whose signature lacks the parameter that binding removes
    patched.__dict__.update(getattr(step, "__dict__", {}))
    optimizer.step = types.MethodType(patched, optimizer)  # type: ignore[method-assign]


def _then(closure: Callable[[], Any], task: Callable[[], None]) -> Callable[[], Any]:
    """The closure, with ``task`` behind its first call."""
    called = False

    def both() -> Any:
        nonlocal called
        output = closure()
        if not called:
            called = True
            task()
        return output

    return both


@contextlib.contextmanager
def lightning_max_steps(evaluator: LightningEvaluator) -> Iterator[None]:
    """Let ``LightningEvaluator.train(max_steps=...)`` set the number of steps.

    Breaks with pytorch_lightning >= 2.0, which removed the setter
    (github.com/Lightning-AI/pytorch-lightning/pull/16803): line 633 raises ``AttributeError: property 'max_steps' of
    '_FitLoop' object has no setter``.

    Until left, ``_FitLoop.max_steps`` has a setter again. It also lifts the Trainer's own ``max_epochs``, at which
    training would end before the steps that were asked for.
    """
    loop = type(evaluator.trainer.fit_loop)
    original = loop.max_steps
    if not isinstance(original, property) or original.fset is not None:
        yield
        return

    def set_max_steps(self: Any, steps: int) -> None:
        self.epoch_loop.max_steps = steps
        self.max_epochs = -1

    loop.max_steps = original.setter(set_max_steps)
    try:
        yield
    finally:
        loop.max_steps = original


@contextlib.contextmanager
def lightning_max_epochs(evaluator: LightningEvaluator) -> Iterator[None]:
    """Let ``LightningEvaluator.train(max_epochs=...)`` train for so many epochs.

    Breaks with every version of pytorch_lightning, where the user's Trainer has a ``max_steps``: line 635 sets the
    epochs beside it, and training ends silently at whichever comes first.

    Until left, the Trainers that the evaluator builds have no ``max_steps`` of their own.
    """
    kwargs = evaluator.trainer.trace_kwargs
    if kwargs.get("max_steps", -1) == -1:
        yield
        return
    # with neither limit Lightning warns, and takes these 1000
    evaluator.trainer.trace_kwargs = {**kwargs, "max_steps": -1, "max_epochs": kwargs.get("max_epochs") or 1000}
    try:
        yield
    finally:
        evaluator.trainer.trace_kwargs = kwargs


class TransformersEvaluator(NNITransformersEvaluator):
    """NNI's ``TransformersEvaluator`` for today's transformers: same arguments, same use, also for NNI's own pruners.

    NNI's own breaks in each of the methods below (tried: transformers 4.57.3, 5.0.0 and 5.24.0); how is said there. It
    also leaves ``Trainer.get_optimizer_cls_and_kwargs`` broken for the whole process (line 997).
    """

    def _init_optimizer_helpers(self, pure_model: nn.Module) -> None:
        """Trace the Trainer's default optimizer by its own attribute.

        Line 998: ``TypeError: patched_get_optimizer_cls_and_kwargs() takes 1 positional argument but 3 were given``,
        since ``create_optimizer`` passes the model too (github.com/huggingface/transformers/pull/29588).
        """
        trainer = self.traced_trainer
        if trainer.optimizer is None:
            given = trainer.optimizer_cls_and_kwargs
            kind, kwargs = given or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
            trainer.optimizer_cls_and_kwargs = nni.trace(kind), kwargs
            try:
                trainer.create_optimizer()
            finally:
                trainer.optimizer_cls_and_kwargs = given
        super()._init_optimizer_helpers(pure_model)

    def patch_loss(self, patch: Callable[[Tensor, Any], Tensor]) -> None:
        """Pass on what ``compute_loss`` is given, and leave the loss of an evaluation alone.

        Line 1064: ``TypeError: patched_compute_loss() got an unexpected keyword argument 'num_items_in_batch'``
        (github.com/huggingface/transformers/issues/36331).
        """
        compute_loss = self.trainer.compute_loss

        def patched(_: Any, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            result = compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
            if not model.training:
                return result
            return (patch(result[0], inputs), *result[1:]) if return_outputs else patch(result, inputs)

        self.trainer.compute_loss = types.MethodType(patched, self.trainer)

    def patch_optimizer_step(
        self, before_step_tasks: Iterable[Callable[[], Any]], after_step_tasks: Iterable[Callable[[], Any]]
    ) -> None:
        """Patch the optimizer itself; accelerate's wrapper calls its ``step``.

        Line 1080: ``AssertionError``, since every Trainer now has an attribute ``deepspeed``, which is None. The
        callback of line 1094 is a class attribute besides: of two patches, in one run or in two, the last one would run
        for both.
        """
        before, after = list(before_step_tasks), list(after_step_tasks)
        # after a first train() there is a wrapper
        optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        around_step(optimizer, lambda: _run(before), lambda: _run(after))

    def train(self, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        """Train for what is asked for, and put the arguments back after an error too.

        Line 1108 sets ``num_train_epochs`` beside a ``max_steps`` of the user's, which the Trainer prefers, silently.
        """
        args = self.trainer.args
        kept = args.max_steps, args.num_train_epochs
        if max_epochs is not None and max_steps is None:
            args.max_steps = -1
        try:
            super().train(max_steps, max_epochs)
        finally:
            args.max_steps, args.num_train_epochs = kept


def _run(tasks: Iterable[Callable[[], Any]]) -> None:
    for task in tasks:
        task()
