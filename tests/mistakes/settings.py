"""Mistakes in making a pruner: the budget, the settings, the config_list."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dnal_nni import Budget, DNALPruner

from . import CONV, Mistakes

BUDGETS: Mistakes = {
    "nothing": (lambda s: Budget(), "Budget needs flops=, params= or latency=, for example Budget(flops=0.5)"),
    "zero": (
        lambda s: Budget(flops=0),
        "Budget(flops=0): must be a number > 0; up to 1 it is the fraction to keep, above 1 an absolute",
    ),
    "negative": (
        lambda s: Budget(params=-0.5),
        "Budget(params=-0.5): must be a number > 0; up to 1 it is the fraction to keep, above 1 an",
    ),
    "nan": (
        lambda s: Budget(flops=float("nan")),
        "Budget(flops=nan): must be a number > 0; up to 1 it is the fraction to keep, above 1 an",
    ),
    "infinite": (
        lambda s: Budget(flops=float("inf")),
        "Budget(flops=inf): must be a number > 0; up to 1 it is the fraction to keep, above 1 an",
    ),
    "a string": (
        lambda s: Budget(flops="0.5"),
        "Budget(flops='0.5'): must be a number > 0; up to 1 it is the fraction to keep, above 1 an",
    ),
    "per cent as text": (
        lambda s: Budget(flops="50%"),
        "Budget(flops='50%'): must be a number > 0; up to 1 it is the fraction to keep, above 1 an",
    ),
    "per cent": (
        lambda s: Budget(flops=50),
        "Budget(flops=50): 50 %? write 0.5; above 1 it is the number of flops to keep, and no network",
    ),
    "per cent of parameters": (
        lambda s: Budget(params=30.0),
        "Budget(params=30): 30 %? write 0.3; above 1 it is the number of params to keep, and no network",
    ),
    "True": (
        lambda s: Budget(flops=True),
        "Budget(flops=True): must be a number > 0; up to 1 it is the fraction to keep, above 1 an",
    ),
    "None": (lambda s: Budget(flops=None), "Budget needs flops=, params= or latency=, for example Budget(flops=0.5)"),
    "a tensor": (
        lambda s: Budget(flops=torch.tensor(0.5)),
        "Budget(flops=tensor(0.5000)): must be a number > 0; up to 1 it is the fraction to keep, above 1",
    ),
    "a list": (
        lambda s: Budget(flops=[0.5]),
        "Budget(flops=[0.5]): must be a number > 0; up to 1 it is the fraction to keep, above 1 an",
    ),
    "another unit": (
        lambda s: Budget(macs=0.5),
        "Budget: got an unexpected keyword argument 'macs'; it takes flops, params, latency",
    ),
    "misspelt": (
        lambda s: Budget(flop=0.5),
        "Budget: got an unexpected keyword argument 'flop'; did you mean 'flops'?",
    ),
    "a number for the budget": (
        lambda s: s.prune(budget=0.5),
        "budget=0.5: pass a Budget, for example Budget(flops=0.5)",
    ),
    "a dict for the budget": (
        lambda s: s.prune(budget={"flops": 0.5}),
        "budget={'flops': 0.5}: pass a Budget, for example Budget(flops=0.5)",
    ),
    "the class": (
        lambda s: s.prune(budget=Budget),
        "budget=the class Budget: pass a Budget, for example Budget(flops=0.5)",
    ),
    "more than there is": (
        lambda s: s.prune(budget=Budget(flops=1e12)),
        "Budget(flops=1000000000000) is more than the model has (582112): give less, or a fraction up to",
    ),
    "less than can be": (
        lambda s: s.prune(budget=Budget(flops=1e-5)),
        "Budget(flops=1e-05) cannot be reached: with one unit left in each of the 2 channel groups that",
    ),
    "parameters less than can be": (
        lambda s: s.prune(budget=Budget(params=1e-5)),
        "Budget(params=1e-05) cannot be reached: with one unit left in each of the 2 channel groups that",
    ),
    "a multiple beyond the layers": (
        lambda s: s.prune(channel_multiple=1000),
        "Budget(flops=0.5) cannot be reached: with what channel_multiple=1000 keeps in each of the 2",
    ),
    "a multiple of zero": (lambda s: s.prune(channel_multiple=0), "channel_multiple=0: must be a whole number >= 1"),
    "a multiple that is no whole number": (
        lambda s: s.prune(channel_multiple=8.0),
        "channel_multiple=8.0: must be a whole number >= 1",
    ),
    "a multiple as text": (
        lambda s: s.prune(channel_multiple="8"),
        "channel_multiple='8': must be a whole number >= 1",
    ),
}

SETTINGS: Mistakes = {
    "no multiple to try": (
        lambda s: s.prune(channel_multiple=[]),
        "channel_multiple=[]: must be a whole number >= 1, or several to try",
    ),
    "the type of a layer with its module": (
        lambda s: s.prune(config=[{"op_types": ["nn.Conv2d"]}]),
        "config_list[0]: the model has no layer of type 'nn.Conv2d' (op_types); did you mean 'Conv2d'?",
    ),
    "exclude by a pattern": (
        lambda s: s.prune(exclude=["conv*"]),
        "exclude: 'conv*' is no layer of the model; did you mean",
    ),
    "verify_seconds as text": (
        lambda s: s.prune(verify_seconds="60"),
        "DNALPruner(verify_seconds=...) is '60': give a number",
    ),
    "negative verify_seconds": (lambda s: s.prune(verify_seconds=-5), "verify_seconds=-5: give a number above 0"),
    "no verify_seconds": (lambda s: s.prune(verify_seconds=0), "verify_seconds=0: give a number above 0"),
    "verify_seconds is a list": (
        lambda s: s.prune(verify_seconds=[60]),
        "DNALPruner(verify_seconds=...) is [60]: give a number",
    ),
    "arch_lr as text": (
        lambda s: s.prune(arch_lr="0.3"),
        "arch_lr='0.3': must be a number >= 0, or None for the preset's own",
    ),
    "negative arch_lr": (
        lambda s: s.prune(arch_lr=-1),
        "arch_lr=-1: must be a number >= 0, or None for the preset's own",
    ),
    "arch_lr is nan": (
        lambda s: s.prune(arch_lr=float("nan")),
        "arch_lr=nan: must be a number >= 0, or None for the preset's own",
    ),
    "lambda_ as text": (lambda s: s.prune(lambda_="1e-4"), "lambda_='1e-4': must be a number >= 0"),
    "negative lambda_": (lambda s: s.prune(lambda_=-1e-4), "lambda_=-0.0001: must be a number >= 0"),
    "misspelt preset": (
        lambda s: s.prune(preset="papers"),
        "preset='papers': choose 'default' or 'paper'; did you mean 'paper'?",
    ),
    "preset is None": (lambda s: s.prune(preset=None), "preset=None: choose 'default' or 'paper'"),
    "misspelt argument": (
        lambda s: s.prune(budjet=Budget(flops=0.5)),
        "DNALPruner: got an unexpected keyword argument 'budjet'; did you mean 'budget'?",
    ),
    "unknown argument": (
        lambda s: s.prune(sparsity=0.5),
        "DNALPruner: got an unexpected keyword argument 'sparsity'; it takes model, config_list",
    ),
    "no config_list": (lambda s: DNALPruner(s.model), "DNALPruner: missing a required argument: 'config_list'"),
    "too many arguments": (
        lambda s: DNALPruner(s.model, CONV, None, s.x),
        "DNALPruner: too many positional arguments; without a name it takes model, config_list, evaluator",
    ),
    "importance by name": (
        lambda s: s.prune(importance="l1"),
        "importance='l1': pass a criterion, as tp.importance.MagnitudeImportance()",
    ),
    "importance in the paper's search": (
        lambda s: s.prune(importance=lambda group: None, preset="paper"),
        "importance= goes with preset='default': the paper's search starts with all gates alike",
    ),
    "misspelt graph": (
        lambda s: s.prune(graph="torch_pruning"),
        "graph='torch_pruning': pass None, 'torch-pruning', or a torch_pruning.DependencyGraph behind",
    ),
    "graph is True": (
        lambda s: s.prune(graph=True),
        "graph=True: pass None, 'torch-pruning', or a torch_pruning.DependencyGraph behind its",
    ),
    "a tensor for the evaluator": (
        lambda s: DNALPruner(s.model, CONV, s.x),
        "evaluator is a Tensor: pass one of NNI's, such as its TorchEvaluator",
    ),
    "a function for the evaluator": (
        lambda s: s.prune(evaluator=lambda model: 0.9),
        "evaluator is a function: pass one of NNI's, such as its TorchEvaluator",
    ),
}
CONFIGS: dict[str, tuple[Any, str]] = {
    "None": (None, "config_list=None: give a list of dicts, for example [{'op_types': ['Conv2d']}]"),
    "empty": ([], "config_list=[]: give a list of dicts, for example [{'op_types': ['Conv2d']}]"),
    "a dict": (
        {"op_types": ["Conv2d"]},
        "config_list={'op_types': ['Conv2d']}: give a list of dicts, for example [{'op_types'",
    ),
    "a string": ("Conv2d", "config_list='Conv2d': give a list of dicts, for example [{'op_types': ['Conv2d']}]"),
    "a list of strings": (["Conv2d"], "config_list[0] is 'Conv2d': give a dict, for example {'op_types': ['Conv2d']}"),
    "a list of None": ([None], "config_list[0] is None: give a dict, for example {'op_types': ['Conv2d']}"),
    "an empty dict": ([{}], "config_list[0] selects nothing: add op_types, op_names or op_names_re"),
    "only a ratio": ([{"sparse_ratio": 0.5}], "config_list[0] selects nothing: add op_types, op_names or op_names_re"),
    "op_types as text": (
        [{"op_types": "Conv2d"}],
        "config_list[0]: op_types='Conv2d' must be a list of names, for example ['Conv2d']",
    ),
    "op_types as classes": (
        [{"op_types": [nn.Conv2d]}],
        "config_list[0]: op_types=[the class Conv2d] must be a list of names, for example ['Conv2d']",
    ),
    "op_types misspelt": (
        [{"op_types": ["Conv2D"]}],
        "config_list[0]: the model has no layer of type 'Conv2D' (op_types); did you mean 'Conv2d'?",
    ),
    "op_types that the model lacks": (
        [{"op_types": ["ConvTranspose2d"]}],
        "config_list[0]: the model has no layer of type 'ConvTranspose2d' (op_types)",
    ),
    "op_types is empty": (
        [{"op_types": []}],
        "config_list=[{'op_types': []}] selects no layer of the model: widen op_types, or",
    ),
    "op_types is None": (
        [{"op_types": None}],
        "config_list[0]: op_types=None must be a list of names, for example ['Conv2d']",
    ),
    "op_names misspelt": (
        [{"op_names": ["convv1"]}],
        "config_list[0]: the model has no layer 'convv1' (op_names); did you mean 'conv1'?",
    ),
    "op_names of a parameter": (
        [{"op_names": ["conv1.weight"]}],
        "config_list[0]: the model has no layer 'conv1.weight' (op_names); see [n for n, _ in",
    ),
    "op_names as numbers": (
        [{"op_names": [1]}],
        "config_list[0]: op_names=[1] must be a list of names, for example ['conv1']",
    ),
    "op_names as modules": (
        [{"op_names": [nn.Conv2d(1, 8, 3)]}],
        "config_list[0]: op_names=[a Conv2d] must be a list of names, for example ['conv1']",
    ),
    "op_names of a norm": (
        [{"op_names": ["bn1"]}],
        "Budget(flops=0.5) cannot be reached: with one unit left in each of the 1 channel groups that",
    ),
    "op_names_re is no pattern": (
        [{"op_names_re": ["conv("]}],
        "config_list[0]: op_names_re: 'conv(' is no regular expression (missing ), unterminated",
    ),
    "op_names_re matches nothing": (
        [{"op_names_re": ["layer.*"]}],
        "config_list=[{'op_names_re': ['layer.*']}] selects no layer of the model: widen op_types,",
    ),
    "op_names_re as text": (
        [{"op_names_re": "conv.*"}],
        "config_list[0]: op_names_re='conv.*' must be a list of names, for example ['conv.*']",
    ),
    "exclude_op_names misspelt": (
        [{"op_types": ["Conv2d"], "exclude_op_names": ["conv9"]}],
        "config_list[0]: the model has no layer 'conv9' (exclude_op_names); did you mean 'conv3'?",
    ),
    "everything excluded": (
        [{"op_types": ["Conv2d"], "exclude_op_types": ["Conv2d"]}],
        "config_list=[{'op_types': ['Conv2d'], 'exclude_op_types': ['Conv2d']}] selects no layer of the",
    ),
    "a key misspelt": (
        [{"op_type": ["Conv2d"]}],
        "config_list[0]: key 'op_type' is not supported; did you mean 'op_types'?",
    ),
    "ratio misspelt": (
        [{"op_types": ["Conv2d"], "sparsity_ratio": 0.5}],
        "config_list[0]: key 'sparsity_ratio' is not supported; did you mean 'sparse_ratio'?",
    ),
    "ratio is 2": (
        [{"op_types": ["Conv2d"], "sparse_ratio": 2.0}],
        "config_list[0]: sparse_ratio=2.0 must be a float in [0, 1)",
    ),
    "ratio is 1": (
        [{"op_types": ["Conv2d"], "sparse_ratio": 1.0}],
        "config_list[0]: sparse_ratio=1.0 must be a float in [0, 1)",
    ),
    "ratio is negative": (
        [{"op_types": ["Conv2d"], "sparse_ratio": -0.1}],
        "config_list[0]: sparse_ratio=-0.1 must be a float in [0, 1)",
    ),
    "ratio is text": (
        [{"op_types": ["Conv2d"], "sparse_ratio": "0.5"}],
        "config_list[0]: sparse_ratio='0.5' must be a float in [0, 1)",
    ),
    "ratio is per cent": (
        [{"op_types": ["Conv2d"], "sparse_ratio": 50}],
        "config_list[0]: sparse_ratio=50 must be a float in [0, 1)",
    ),
    "ratio is True": (
        [{"op_types": ["Conv2d"], "sparse_ratio": True}],
        "config_list[0]: sparse_ratio=True must be a float in [0, 1)",
    ),
    "ratio is nan": (
        [{"op_types": ["Conv2d"], "sparse_ratio": float("nan")}],
        "config_list[0]: sparse_ratio=nan must be a float in [0, 1)",
    ),
    "limits that cross": (
        [{"op_types": ["Conv2d"], "max_sparse_ratio": 0.2, "min_sparse_ratio": 0.6}],
        "config_list[0]: min_sparse_ratio=0.6 is above max_sparse_ratio=0.2: exchange them",
    ),
    "threshold is 1": (
        [{"op_types": ["Conv2d"], "sparse_threshold": 1.0}],
        "config_list[0]: sparse_threshold=1.0 must be a float in (0, 1): channels whose gate is less go",
    ),
    "threshold and ratio": (
        [{"op_types": ["Conv2d"], "sparse_threshold": 0.5, "sparse_ratio": 0.5}],
        "config_list[0]: give sparse_ratio or sparse_threshold, not both",
    ),
    "threshold beside a budget": (
        [{"op_types": ["Conv2d"], "sparse_threshold": 0.5}],
        "sparse_threshold goes with neither a budget nor a sparse_ratio: a threshold sets no size",
    ),
    "granularity below channels": (
        [{"op_types": ["Conv2d"], "granularity": "per_channel"}],
        "config_list[0]: granularity='per_channel' is not supported; use 'default' or 'out_channel'",
    ),
    "apply_method add": (
        [{"op_types": ["Conv2d"], "apply_method": "add"}],
        "config_list[0]: apply_method='add' is not supported; use 'mul'",
    ),
    "target is the bias alone": (
        [{"op_types": ["Conv2d"], "target_names": ["bias"]}],
        "config_list[0]: target_names=['bias']: channels go with their weights; add 'weight'",
    ),
    "target is the output": (
        [{"op_types": ["Conv2d"], "target_names": ["_output_"]}],
        "config_list[0]: target '_output_': the output of a layer and of its norm closes with its",
    ),
    "target_settings as a list": (
        [{"op_types": ["Conv2d"], "target_settings": ["weight"]}],
        "config_list[0]: target_settings=['weight'] must be a dict of dicts, as {'weight': {...}}",
    ),
    "exclude as text": (
        [{"op_types": ["Conv2d"], "exclude": "yes"}],
        "config_list[0]: exclude='yes' must be True or False",
    ),
    "sparsity of the older schema": (
        [{"op_types": ["Conv2d"], "sparsity": 50}],
        "config_list[0]: sparsity=50 must be a float in [0, 1)",
    ),
    "total_sparsity": (
        [{"op_types": ["Conv2d"], "total_sparsity": 0.5}],
        "config_list[0]: key 'total_sparsity' is not supported; use sparse_ratio with a global_group_id",
    ),
    "global_group_id as a list": (
        [{"op_types": ["Conv2d"], "global_group_id": [1]}],
        "config_list[0]: global_group_id=[1] must be a number or a name",
    ),
    "dependency_group_id of layers that are apart": (
        [{"op_names": ["conv1", "conv2", "conv3"], "dependency_group_id": "a"}],
        "dependency_group_id='a' joins conv1 and conv2, whose channels the model does not couple: leave",
    ),
}


def _refused(config: Any) -> Any:
    return lambda stage: stage.prune(config=config)


LISTS: Mistakes = {name: (_refused(config), pattern) for name, (config, pattern) in CONFIGS.items()}
