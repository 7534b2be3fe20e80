"""What could be imported from version 0.1 still can, also by a pickle."""

import pickle
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from torch import nn

PUBLIC = {
    "adapters": "register_adapter adapt restore",
    "attention": (
        "SlimMultiheadAttention SlimShiftedWindowAttention SlimShiftedWindowAttentionV2 "
        "SlimRelativePositionalMultiHeadAttention"
    ),
    "bake": "bake",
    "budget": "Budget Limits Objective best_of_group first_ranks price",
    "carry": "carry_optimizer",
    "checkpoint": "FORMAT save_compressed load_compressed saved_report",
    "choices": "Weight Choice Mixture Depth Inputs Cell choices_of",
    "cli": "compared main",
    "compress": (
        "CHECKPOINT REPORT PAGE NETWORK RECALIBRATION_BATCHES Settings compress read_report seed_everything"
    ),
    "cost": "FlopCountAnalysis Complexity flops_by_module measure WeightedSums CostModel",
    "cut": "CLOSE CORRECTIONS TOLERANCE TRIES CHUNK CANDIDATE_TRIES measured_cut exact_cut",
    "data": "Loader HELD_OUT loaders",
    "errors": "DNALError",
    "evaluators": "TorchEvaluator check_evaluator example_input ready patch_steps",
    "files": "write_whole write_tensors read_tensors check_sum",
    "flow": "Arrays Site Labels axes_of lay compress StoredSize Flow Operation",
    "gate": "GateState ScaledSigmoidGate ChannelFactor AffineGate InputGate StatisticsGate",
    "graph": (
        "Conv RMSNorm Norm Side FORWARD_ERRORS whole_groups masked_statistics flatten_tensors call "
        "seeded clone VertexKey Vertex CouplingGraph varying_axes"
    ),
    "groups": "Site Member ChannelGroup trace find_groups groups_of",
    "inject": "check_model is_gated attach detach",
    "inspection": "GroupRow WholeLayer Inspection inspect",
    "latency": "FRACTIONS WARM_UP ROUNDS LAYER_SECONDS latencies LayerLatency layer_latencies",
    "masks": "Masks Conflicts Votes REPORT speedup closed_channels votes_on decide layer_masks",
    "page": "page",
    "products": "matmul attention convolution batch_norm",
    "pruner": "DNALPruner",
    "ranks": "T world_size is_first from_first check_same mean_ broadcast_ checksum",
    "report": "GroupReport Report versions",
    "resume": "save_state load_state",
    "rules": (
        "Rule pointwise same like move strided by_number shuffle reshape pad mirror_pad split unbind concat "
        "stack reduce along windowed glu roi index index_put as_strided RULES run"
    ),
    "schedule": "DELTA_END DELTA_START delta_per_step delta_paper ramp",
    "scores": "MOMENTUM REACH CANDIDATES_REACH CANDIDATES_START SETTLED NARROWED importance Scores",
    "search": "PAPER_LR PAPER_MOMENTUM PAPER_THRESHOLD BINS ungated Search",
    "selection": "Setting VALUES RATIOS SELECT LEGACY GIVEN WHY_NOT check_config split_config select limits pools",
    "shims": "around_step lightning_max_steps lightning_max_epochs TransformersEvaluator",
    "slim": "Keep CHANGES slim_copy drop",
    "space": "supernet Space",
    "steps": "steps_per_epoch same_random_numbers",
    "strategy": "DNALStrategy",
    "targets": "told load_callable load_target load_weights",
    "trace": "Trace",
    "verify": (
        "TOLERANCE VALUES example_like difference check_equal whole_outputs random_keep hard_gated_copy "
        "verify_and_freeze"
    ),
}


@pytest.mark.filterwarnings("ignore:.*is found to be not a nn.Module:RuntimeWarning")  # of NNI, at import
@pytest.mark.parametrize("old", PUBLIC)
def test_old_imports_work(old: str) -> None:
    module = import_module(f"dnal_nni.{old}")
    for name in PUBLIC[old].split():
        assert hasattr(module, name), name
    with pytest.raises(AttributeError, match=f"dnal_nni.*{old}.* has no attribute 'nonsense'"):
        module.nonsense  # noqa: B018


def test_an_old_pickle_loads() -> None:
    from dnal_nni.modules.attention import SlimMultiheadAttention

    attention = nn.MultiheadAttention(8, 2)
    attention.__class__ = SlimMultiheadAttention
    data = pickle.dumps(attention, protocol=2)  # which has names of modules as lines
    old = data.replace(b"dnal_nni.modules.attention", b"dnal_nni.attention")
    assert old != data
    again = pickle.loads(old)
    assert type(again) is SlimMultiheadAttention
    assert torch.equal(again.in_proj_weight, attention.in_proj_weight)


def test_the_package_imports_nothing_heavy() -> None:
    code = "import sys, dnal_nni; bad = {'nni', 'matplotlib', 'torch'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)
