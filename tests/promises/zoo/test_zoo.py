"""Real networks: exact, or left alone with a stated reason; no hang, no crash (see `benchmarks/zoo.py`).

Default: the list itself, and a few representatives in this process. `pytest -m slow tests/promises/zoo`: all of
them, each in a process of its own with limits on time and memory, an hour or two on one core.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torchvision
from torch import nn

from dnal_nni.channels.groups import ChannelGroup
from dnal_nni.surgery.slim import Keep, slim_copy

timm = pytest.importorskip("timm")

import zoo  # noqa: E402
import zoo_one  # noqa: E402
from zoo import WALL_SECONDS, run_isolated  # noqa: E402
from zoo_models import EXPECTED_TO_SHRINK, MODELS, NOTES, families  # noqa: E402
from zoo_one import Record, explain, reason_class, run_model  # noqa: E402
from zoo_table import NEAR, SHRUNK, bar_summary  # noqa: E402

FAST = (
    "resnet18",  # residual
    "mobilenet_v3_small",  # depthwise, squeeze and excitation
    "timm_regnety_002",  # grouped
    "timm_ese_vovnet19b_dw",  # concatenation
    "timm_edgenext_xx_small",  # linear layers behind layer norms, attention
    "timm_fasternet_t0",  # split by stored sizes
    "lraspp_mobilenet_v3_large",  # a dict of outputs
    "squeezenet1_1",  # no norm at all
    "timm_repghostnet_050",  # dropout that the forward calls itself
)
MUST_SHRINK = (
    "swin_t",
    "vit_b_16",
    "convnext_tiny",
    "shufflenet_v2_x1_0",
    "timm_res2net50_26w_4s",
    "timm_cspresnet50",
    "timm_resnest14d",
)
"""Whole families of architectures hang on these: none of the five of `EXPECTED_TO_SHRINK` that may stay whole."""

UNREAD = frozenset(
    """
    shufflenet_v2_x1_0 swin_t vit_b_16 ssdlite320_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn
    maxvit_t swin_v2_t timm_dla60_res2net timm_res2net50_26w_4s timm_resnest14d timm_eca_nfnet_l0
    timm_mobilevit_xxs timm_cspresnet50 timm_dpn68 timm_ecaresnet26t timm_gcresnet33ts timm_mixnet_s
    timm_tresnet_m timm_densenetblur121d timm_vit_tiny_patch16_224 timm_nf_resnet26 timm_edgenext_xx_small
    timm_mobilevitv2_050 timm_cspdarknet53 timm_cs3darknet_m timm_skresnet18 timm_rexnet_100 timm_poolformer_s12
    timm_inception_next_atto
    """.split()
)
"""Of the 85 of the notes, those on which torch-pruning's own pruner crashes or hangs; the last puts a split together in
another order, and its channels are confused."""

SECONDS = 120


@functools.cache
def outcome(name: str) -> Record:
    return run_isolated(MODELS[name])


def shrunk(record: Record) -> bool:
    return record["status"] == "exact" and record["flops"]["left"] <= SHRUNK


def check(record: Record) -> None:
    assert record["status"] == "exact", explain(record)
    assert record["seconds"]["total"] <= SECONDS, explain(record)
    for effect in record["effect"].values():
        # else the comparison compares nothing
        assert effect is None or effect > 1e-6 or not record["groups"]["gated"], explain(record)


@pytest.mark.parametrize("name", FAST)
def test_exact(name: str) -> None:
    record = run_model(MODELS[name])
    check(record)
    if name in EXPECTED_TO_SHRINK:
        assert shrunk(record), explain(record)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_exact_in_time(name: str) -> None:
    record = outcome(name)
    check(record)
    if name in MUST_SHRINK:
        assert shrunk(record), explain(record)


@pytest.mark.slow
def test_most_lose_a_fifth_of_their_flops() -> None:
    whole = [outcome(name) for name in sorted(EXPECTED_TO_SHRINK) if not shrunk(outcome(name))]
    assert len(EXPECTED_TO_SHRINK) - len(whole) >= 80, "\n\n".join(map(explain, whole))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXPECTED_TO_SHRINK))
def test_torch_prunings_graph_is_as_good_where_it_is_right_and_never_wrong(name: str) -> None:
    record = run_isolated(MODELS[name], wall=2 * WALL_SECONDS, options=["--graph", "torch-pruning"])
    if name in UNREAD and record["status"] == "refused":
        return
    check(record)
    if name not in UNREAD:
        assert record["flops"]["left"] <= NEAR * outcome(name)["flops"]["left"], explain(record)


def test_the_list_holds_every_family() -> None:
    offered = {torchvision.models.get_model_builder(n).__module__ for n in torchvision.models.list_models()}
    offered |= {timm.models.model_entrypoint(name).__module__ for name in timm.list_models()}
    quantized = {name for name in offered if name.startswith("torchvision.models.quantization.")}
    assert offered - quantized <= families()
    assert len(EXPECTED_TO_SHRINK) == 85 and len(NOTES) == 55 and EXPECTED_TO_SHRINK <= MODELS.keys()
    assert set(FAST) | set(MUST_SHRINK) <= MODELS.keys() and UNREAD <= EXPECTED_TO_SHRINK
    assert sum(entry.source == "timm" for entry in MODELS.values()) >= 60


def test_a_wrong_cut_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def reversed_cut(model: nn.Module, groups: Sequence[ChannelGroup], keep: Keep) -> nn.Module:
        return slim_copy(model, groups, {name: mask.flip(0) for name, mask in keep.items()})

    monkeypatch.setattr(zoo_one, "slim_copy", reversed_cut)  # as many channels, but others
    record = run_model(MODELS["mobilenet_v3_small"])
    assert record["status"] == "inexact" and min(record["relative"].values()) > 1e-3


def test_a_model_that_hangs_is_stopped() -> None:
    record = run_isolated(MODELS["resnet18"], wall=0.5)
    assert record["status"] == "timeout" and record["phase"] != "done"


def test_the_table_has_a_row_for_every_outcome(tmp_path: Path) -> None:
    common = {"task": "classification", "input": [2, 3, 64, 64], "commit": "c0ffee", "versions": {"torch": "2"}}
    exact = {
        "status": "exact",
        "phase": "done",
        "groups": {"all": 13, "gated": 12, "frozen": 1},
        "reasons": {"model output": 1},
        "flops": {"left": 0.5},
        "relative": {"eval": 1e-15, "train": 2e-15},
        "cost_error": {"cut": 0.001, "fewest": 0.0},
        "seconds": {"total": 1.0},
    }
    records = {
        "resnet18": {"model": "resnet18", **common, **exact},
        "resnet50": {"model": "resnet50", **common, "status": "timeout", "phase": "groups"},
    }
    whole = records["resnet18"] | {"groups": {"all": 13, "gated": 0, "frozen": 13}, "flops": {"left": 1.0}}
    by_graph = {"resnet18": records["resnet18"] | {"flops": {"left": 0.52}}, "vgg11": records["resnet18"]}
    ways = {"choose": {"status": "exact", "flops_left": 0.51, "half": 0.5}, "torch_pruning": {"status": "unfinished"}}
    criteria = {"resnet18": {"model": "resnet18", "commit": "c0ffee"} | ways}
    assert "reads 0 of 1 networks right" in (said := bar_summary(records, by_graph, criteria))
    assert said.endswith("Of the networks that it does not read right, 1 are exact")
    well = {"resnet18": criteria["resnet18"] | {"torch_pruning": {"status": "exact"}}}
    assert "On 1 of these" in bar_summary(records, by_graph, well)
    far = {"resnet18": by_graph["resnet18"] | {"flops": {"left": 0.53}}}
    assert "On 0 of these" in (said := bar_summary(records, far, well)) and "(the others: resnet18)" in said
    path = tmp_path / "models.md"
    hit = {"model": "resnet18", "status": "hit", "left": {"0.5": 0.5, "0.3": 0.3}, "commit": "c0ffee"}
    missed = {"model": "vgg11", "status": "missed", "left": {"0.5": 0.5, "0.3": 0.4}}
    budgets = {"resnet18": hit, "vgg11": hit | missed}
    zoo.write_table(records, by_graph, criteria, path, budgets)
    text = path.read_text()
    assert "both are met within 1 % of the dense FLOPs on 1 (vgg11: 0.5, 0.4)" in text
    line = "| resnet18 | 3x64x64 | 12/13 | 50% | 2e-15 | 0.10% | 1.0 | 52%, 1.0 s | 51% | timeout | model output 1 |"
    assert line in text
    assert "| resnet50 | 3x64x64 | - | - | - | - | - | - | - | - | timeout in groups |" in text
    assert "of 1 networks: 1 are cut and exact, 1 of them with at most 5% more FLOPs left than with our graph" in text
    assert "`choose` cuts 1 exactly, and 1 to half of the FLOPs within 1 %; torch-pruning's own pruner 0 exact" in text
    zoo.write_table(records, {"resnet18": whole}, {}, path)
    assert "0 are cut and exact" in path.read_text() and "| left whole | - | - | model output 1 |" in path.read_text()


def test_reasons_have_classes() -> None:
    assert reason_class("not verified within verify_seconds=30") == "not verified in time"
    assert reason_class("layer4.0.fn: a new reason with 3 words (of 4)") == "a new reason with words"
