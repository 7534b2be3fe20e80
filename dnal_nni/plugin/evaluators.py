"""NNI's evaluators: checked ahead of the work, made ready, patched in the right order."""

from __future__ import annotations

import contextlib
import inspect
import logging
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import nni.compression
import torch
from nni.common import is_traceable
from nni.common.types import SCHEDULER
from nni.compression.utils import evaluator as nnis
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import DNALError
from ..session import Session
from .shims import TransformersEvaluator, around_step, lightning_max_epochs, lightning_max_steps
from .steps import same_random_numbers, steps_per_epoch

__all__ = [
    "TorchEvaluator",
    "TransformersEvaluator",
    "check_evaluator",
    "example_input",
    "patch_steps",
    "ready",
    "search_within",
]

_logger = logging.getLogger(__name__)


class TorchEvaluator(nni.compression.TorchEvaluator):
    """NNI's ``TorchEvaluator``; says what is wrong with an argument where NNI's raises an empty AssertionError."""

    def __init__(
        self,
        training_func: Callable[..., Any],
        optimizers: Any,
        training_step: Callable[..., Any],
        lr_schedulers: Any = None,
        dummy_input: Any = None,
        evaluating_func: Callable[..., Any] | None = None,
    ) -> None:
        for name, function in (("training_func", training_func), ("training_step", training_step)):
            if not callable(function):
                raise DNALError(f"{name} is a {type(function).__name__}: pass a function")
        if not _listed(optimizers):
            raise DNALError(f"optimizers={optimizers!r}: pass an optimizer, nni.trace(torch.optim.SGD)(...)")
        _check_traced("optimizers", _listed(optimizers), Optimizer)
        _check_traced("lr_schedulers", _listed(lr_schedulers), SCHEDULER)
        super().__init__(training_func, optimizers, training_step, lr_schedulers, dummy_input, evaluating_func)


_ONE_DEVICE = "a search runs on one device, since nothing would keep the gates of several the same"


# -- checks -----------------------------------------------------------------------------------------------------------


def check_evaluator(evaluator: object, model: nn.Module) -> None:
    """Refuse an evaluator that NNI would refuse without a word, or would accept and then train nothing with.

    Args:
        evaluator: as the user gave it, or initialised already: by another compressor, or for another model.
        model: the model to be compressed, not wrapped.

    Raises:
        DNALError: says what is wrong with it and what to do.
    """
    if not isinstance(evaluator, nnis.Evaluator):
        raise DNALError(f"evaluator is a {type(evaluator).__name__}: pass one of NNI's, such as its TorchEvaluator")
    if isinstance(evaluator, nni.compression.TorchEvaluator):
        optimizers, schedulers = _torch_optimizers(evaluator)
    elif isinstance(evaluator, nni.compression.LightningEvaluator):
        optimizers, schedulers = _lightning_optimizers(evaluator, model)
    elif isinstance(evaluator, nni.compression.TransformersEvaluator):
        optimizers, schedulers = _transformers_optimizers(evaluator, model)
    else:
        raise DNALError(
            f"evaluator is a {type(evaluator).__name__}: DNALPruner works with NNI's TorchEvaluator and "
            "LightningEvaluator and with dnal_nni.plugin.evaluators.TransformersEvaluator; or search in your own loop, "
            "with pruner.search()"
        )
    if evaluator._initialization_complete:
        _check_names(evaluator, model)
    else:
        _check_traced("optimizers", optimizers, Optimizer)
        _check_traced("lr_schedulers", schedulers, SCHEDULER)
        _check_parameters(optimizers, model)
        _check_schedulers(schedulers, optimizers)


def _torch_optimizers(evaluator: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    for name, function in (("training_func", evaluator.training_func), ("training_step", evaluator._ori_training_step)):
        if not callable(function):
            raise DNALError(f"the evaluator's {name} is a {type(function).__name__}: pass a function")
    if evaluator._initialization_complete:
        return [], []
    if not evaluator._tmp_optimizers:
        raise DNALError("the evaluator has no optimizer")
    return evaluator._tmp_optimizers, evaluator._tmp_lr_schedulers


def _lightning_optimizers(evaluator: Any, model: nn.Module) -> tuple[Sequence[Any], Sequence[Any]]:
    """What ``configure_optimizers`` returns, of the forms that NNI reads (its evaluator.py:412)."""
    if not isinstance(model, nnis.pl.LightningModule):
        raise DNALError(f"a LightningEvaluator needs a LightningModule: the model is a {type(model).__name__}")
    if evaluator.trainer.world_size > 1:
        raise DNALError(f"the Trainer uses several devices, and {_ONE_DEVICE}: Trainer(devices=1)")
    if not model.automatic_optimization:
        raise DNALError(
            "the LightningModule optimizes manually (automatic_optimization = False), which NNI does not patch: let "
            "Lightning call the optimizer, or search in your own loop, with pruner.search()"
        )
    try:
        inspect.signature(model.training_step).bind(None, 0)
    except TypeError:
        raise DNALError("NNI calls training_step(batch, batch_idx): give your training_step both arguments") from None
    if evaluator._initialization_complete:
        return [], []
    try:
        made = model.configure_optimizers()
    except Exception as error:  # the user's code, which may raise anything
        raise DNALError(f"configure_optimizers() fails, which NNI calls ahead of any Trainer: {error}") from error
    if isinstance(made, (Optimizer, dict)):
        made = [made]
    if not isinstance(made, (list, tuple)) or not made:
        raise DNALError(f"configure_optimizers() returns {made!r}: NNI needs an optimizer to train with")
    if all(isinstance(one, dict) for one in made):
        configs = [one["lr_scheduler"] for one in made if "lr_scheduler" in one]
        if not all(isinstance(config, dict) and "scheduler" in config for config in configs):
            raise DNALError(
                'configure_optimizers(): NNI reads a scheduler beside an optimizer as {"optimizer": optimizer, '
                '"lr_scheduler": {"scheduler": scheduler}} only'
            )
        return [one.get("optimizer") for one in made], [config["scheduler"] for config in configs]
    if len(made) == 2 and isinstance(made[0], (list, tuple)):
        optimizers, schedulers = made
        return optimizers, _listed(schedulers)
    return made, []


def _transformers_optimizers(evaluator: Any, model: nn.Module) -> tuple[Sequence[Any], Sequence[Any]]:
    trainer, installed = evaluator.traced_trainer, version("transformers")
    if tuple(int(part) for part in installed.split(".")[:2]) < (4, 57):
        raise DNALError(f"transformers {installed} is installed: a TransformersEvaluator needs 4.57 or later")
    if not isinstance(evaluator, TransformersEvaluator):
        raise DNALError(
            f"NNI's TransformersEvaluator does not run on transformers {installed}: build it as "
            "dnal_nni.plugin.evaluators.TransformersEvaluator, with the same arguments"
        )
    if trainer.args.world_size > 1 or trainer.args.n_gpu > 1:
        raise DNALError(f"the Trainer uses several devices, and {_ONE_DEVICE}: set CUDA_VISIBLE_DEVICES=0")
    if trainer.model_init is not None:
        raise DNALError("the Trainer has a model_init, which would discard the gates: pass it the model itself")
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise DNALError(
            "the Trainer shards the model (DeepSpeed or FSDP), and a search needs it whole: switch that off"
        )
    if trainer.args.load_best_model_at_end:
        raise DNALError("load_best_model_at_end=True would undo the search at its end: switch it off for the search")
    if evaluator._initialization_complete:
        return [], []
    if trainer.model is not model:
        raise DNALError("the Trainer holds another model than the one to be compressed: pass the same to both")
    return _listed(trainer.optimizer), _listed(trainer.lr_scheduler)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _check_traced(what: str, values: Sequence[Any], kind: type) -> None:
    """NNI rebuilds optimizers and schedulers, from what ``nni.trace`` has recorded."""
    for index, value in enumerate(values):
        name = type(value).__name__
        if not isinstance(value, kind):
            raise DNALError(f"{what}[{index}] is a {name}: pass a {kind.__name__} of torch")
        if not is_traceable(value):
            first = "model.parameters()" if kind is Optimizer else "optimizer"
            home = next((m.__name__ + "." for m in (torch.optim, torch.optim.lr_scheduler) if hasattr(m, name)), "")
            raise DNALError(
                f"{what}[{index}] is an untraced {name}, which NNI cannot rebuild: make it as "
                f"nni.trace({home}{name})({first}, ...)"
            )


def _check_parameters(optimizers: Sequence[Any], model: nn.Module) -> None:
    """Parameters that are not the model's are dropped by NNI, silently (its constructor_helper.py:61)."""
    own = {id(p) for p in model.parameters()}
    for index, optimizer in enumerate(optimizers):
        kwargs = optimizer.trace_kwargs
        recorded = kwargs["params"] if "params" in kwargs else optimizer.trace_args[0]
        groups = [one["params"] if isinstance(one, dict) else [one] for one in recorded]
        found = [p for group in groups for p in ([group] if isinstance(group, Tensor) else group)]
        if any(isinstance(p, tuple) for p in found):
            raise DNALError(f"optimizers[{index}] has named_parameters(), which NNI cannot rebuild: pass parameters()")
        if any(isinstance(p, str) for p in found):
            raise DNALError(f"optimizers[{index}] belongs to another evaluator already: make a new one for this one")
        strange = sum(id(p) not in own for p in found)
        if strange == len(found):
            raise DNALError(f"optimizers[{index}] holds no parameter of the model: make it from model.parameters()")
        if strange:
            raise DNALError(
                f"optimizers[{index}] holds {strange} parameters that are not the model's (of a loss, perhaps), and "
                "NNI would not train them: make them part of the model, or search in your own loop, with "
                "pruner.search()"
            )


def _check_schedulers(schedulers: Sequence[Any], optimizers: Sequence[Any]) -> None:
    for index, scheduler in enumerate(schedulers):
        given = [*scheduler.trace_args, *scheduler.trace_kwargs.values()]
        if any(isinstance(one, SCHEDULER) for value in given for one in _listed(value)):
            raise DNALError(
                f"lr_schedulers[{index}] is a {type(scheduler).__name__} of other schedulers, which NNI cannot "
                "rebuild: use one scheduler, such as a LambdaLR"
            )
        # the Trainer of transformers may bring a scheduler, and make the optimizer by itself
        if optimizers and not any(scheduler.optimizer is optimizer for optimizer in optimizers):
            raise DNALError(f"lr_schedulers[{index}] schedules an optimizer that is not one of the evaluator's")


def _check_names(evaluator: Any, model: nn.Module) -> None:
    """An initialised evaluator knows its parameters by name; names that are not in the model are dropped silently."""
    known = {name for name, _ in model.named_parameters()}
    single = [evaluator._optimizer_helper] if hasattr(evaluator, "_optimizer_helper") else []
    for index, helper in enumerate(getattr(evaluator, "_optimizer_helpers", single)):
        groups = helper.kwargs["params"] if "params" in helper.kwargs else helper.args[0]
        names = {name for group in groups for name in group["params"]}
        if not names or not names <= known:
            raise DNALError(
                f"the evaluator has been used before, and its optimizers[{index}] was not made for this model: "
                "make a new evaluator"
            )


# -- what the pruner needs of an evaluator ----------------------------------------------------------------------------


def example_input(evaluator: Any) -> Any:
    """The evaluator's dummy input, or None.

    For a ``LightningEvaluator`` without one, NNI takes a whole batch of ``train_dataloader()``, without the
    ``prepare_data`` and ``setup`` that Lightning runs ahead of it. Such a batch is ``(images, labels)`` as a rule,
    which as an input would be two arguments; so this is its first element, after those two calls. A batch that is a
    dict does not say which of its entries the model takes: None.
    """
    if not isinstance(evaluator, nni.compression.LightningEvaluator) or evaluator._dummy_input is not None:
        return evaluator.get_dummy_input()
    with same_random_numbers():
        evaluator.data_module.prepare_data()
        evaluator.data_module.setup("fit")
        batch = next(iter(evaluator.data_module.train_dataloader()))
    first = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    return first if isinstance(first, Tensor) else None


@contextlib.contextmanager
def ready(evaluator: Any) -> Iterator[None]:
    """Everything that ``evaluator.train`` needs on the installed versions, taken back on exit."""
    with contextlib.ExitStack() as stack:
        if isinstance(evaluator, nni.compression.LightningEvaluator):
            stack.enter_context(lightning_max_steps(evaluator))
            stack.enter_context(lightning_max_epochs(evaluator))
        yield


def patch_steps(evaluator: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Run ``before`` between the backward pass and the first optimizer's step, and ``after`` behind that step.

    The evaluator must be bound; ``unbind_model`` takes it back. See :func:`dnal_nni.plugin.shims.around_step`.
    """
    if isinstance(evaluator, nni.compression.TorchEvaluator):
        around_step(evaluator._optimizers[0], before, after)
    elif isinstance(evaluator, TransformersEvaluator):
        evaluator.patch_optimizer_step([before], [after])
    else:
        configure = evaluator.model.configure_optimizers

        def patched(_: nn.Module) -> Any:
            made = configure()  # one of NNI's three forms, which keep the first optimizer in these places
            first = made[0]
            around_step(first["optimizer"] if isinstance(first, dict) else _listed(first)[0], before, after)
            return made

        evaluator.model.configure_optimizers = types.MethodType(patched, evaluator.model)


def search_within(
    evaluator: Any, session: Session, names: Callable[[], Mapping[str, str]], weights_learn: bool
) -> None:
    """Let the coming training of ``evaluator`` (bound to the session's model) be a search.

    Args:
        evaluator: one of NNI's.
        session: its gates are on.
        names: the parameters' names in the plain model -> in the model as it is at that time.
        weights_learn: whether the optimizer's steps move weights.
    """
    train = evaluator.train

    def search(max_steps: int | None = None, max_epochs: int | None = None) -> None:
        steps = max_steps
        if steps is None:
            steps = steps_per_epoch(evaluator, session.model, names()) * (max_epochs or 0)
        try:
            with ready(evaluator), session.search(steps, weights_learn=weights_learn) as run:
                evaluator.patch_loss(lambda loss, batch: run.penalised(loss))
                patch_steps(evaluator, run.before_optimizer_step, run.after_optimizer_step)
                train(max_steps, max_epochs)
        finally:
            del evaluator.train
        if run.done < steps:
            _logger.warning(
                "the training ended after %d of the %d steps that the search was planned for: let training_func "
                "respect max_steps and max_epochs, or plan fewer",
                run.done, steps,
            )  # fmt: skip

    # the number of steps is known at train() only, where another compressor may be the one that calls it
    evaluator.train = search
