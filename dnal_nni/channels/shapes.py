"""The shapes of what goes into every module, and of what comes out."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..modules.running import FORWARD_ERRORS, call, flatten_tensors, hookable, seeded, twin


class Shapes:
    """What passes through every module, of a run in eval mode and of one in train mode, where the model has that.

    Attributes:
        inputs: by path, the shapes of the first tensor of every call.
        outputs: by path, those of the first tensor returned.
        eval: paths of the modules that ran in eval mode.
        returned: paths of modules whose output the model returns.
    """

    def __init__(self, model: nn.Module, dummy_input: Any) -> None:
        self.inputs: dict[str, list[torch.Size]] = defaultdict(list)
        self.outputs: dict[str, list[torch.Size]] = defaultdict(list)
        self.returned: set[str] = set()
        self._classes = {name: type(module) for name, module in model.named_modules()}
        model = twin(model)
        self._made: Any = WeakIdKeyDictionary()
        for name, module in hookable(model):
            module.register_forward_hook(functools.partial(self._look, name), with_kwargs=True)
        with seeded(model), torch.no_grad():
            self._run(model.eval(), dummy_input)
            self.eval = set(self.inputs)
            try:
                self._run(model.train(), dummy_input)
            except FORWARD_ERRORS:
                pass  # detection models want targets there

    def _run(self, model: nn.Module, dummy_input: Any) -> None:
        for tensor in flatten_tensors(call(model, dummy_input)):
            if (path := self._made.get(tensor)) is not None:
                self.returned.add(path)

    def _look(self, path: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        for shapes, tensors in ((self.inputs, [*args, *kwargs.values()]), (self.outputs, [out])):
            first = next(flatten_tensors(tensors), None)
            if first is not None:
                shapes[path].append(first.shape)
        if first is not None and first not in self._made:  # the innermost
            self._made[first] = path

    def of(self, kind: type[nn.Module]) -> list[str]:
        """Paths of the modules of exactly this class that ran."""
        return [path for path, cls in self._classes.items() if cls is kind and path in self.inputs]
