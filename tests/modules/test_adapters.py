"""Replacement classes compute the same; heads go as a whole; baked and adapted networks are saved and loaded."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dnal_nni import Budget, DNALError, DNALPruner, load_compressed, register_adapter, save_compressed
from dnal_nni.channels.groups import find_groups
from dnal_nni.modules.adapters import adapt, restore
from dnal_nni.surgery.slim import slim_copy
from dnal_nni.surgery.verify import random_keep, verify_and_freeze


class Encoder(nn.Module):
    """Patches, one attention block of the kind given, a classifier."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, 4)
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.attention = nn.MultiheadAttention(24, 4, **options)
        self.mlp = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(self.norm(x + self.mlp(self.norm2(x))).mean(1))


def perturbed(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double()


def both_modes(model: nn.Module, x: Tensor) -> list[Tensor]:
    outputs = []
    for mode in (False, True):
        torch.manual_seed(1)
        with torch.no_grad():
            outputs.append(model.train(mode)(x))
    return outputs


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (lambda: Encoder(batch_first=True), 16),
        (lambda: Encoder(batch_first=False, bias=False), 16),
        (lambda: Encoder(batch_first=True, add_bias_kv=True), 16),
        (lambda: torchvision.models.swin_t(weights=None, num_classes=5), 72),  # windows that must be padded and shifted
        (lambda: torchvision.models.swin_v2_t(weights=None, num_classes=5), 72),
    ],
)
def test_replacements_compute_the_same(build, size: int) -> None:
    model = perturbed(build())
    adapted = copy.deepcopy(model)
    adapt(adapted, revertible=True)
    x = torch.randn(2, 3, size, size).double()
    for a, b in zip(both_modes(model, x), both_modes(adapted, x)):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    assert adapted.state_dict().keys() == model.state_dict().keys()
    restore(adapted)
    assert [type(m) for m in adapted.modules()] == [type(m) for m in model.modules()]


def test_cross_attention_computes_the_same() -> None:
    plain = perturbed(nn.MultiheadAttention(24, 4, batch_first=True))
    adapted = copy.deepcopy(plain)
    adapt(adapted)
    q, kv = torch.randn(2, 5, 24).double(), torch.randn(2, 7, 24).double()
    for weights in (False, True):
        expected, got = (m(q, kv, kv, need_weights=weights) for m in (plain, adapted))
        assert torch.allclose(expected[0], got[0], atol=1e-12)
        assert (expected[1] is None) == (got[1] is None)
        assert got[1] is None or torch.allclose(expected[1], got[1], atol=1e-12)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[:, 5:] = True
    expected, got = (m(q, kv, kv, key_padding_mask=mask)[0] for m in (plain, adapted))
    assert torch.allclose(expected, got, atol=1e-12)


def test_heads_go_as_a_whole() -> None:
    model, x = Encoder(batch_first=True), torch.randn(2, 3, 16, 16)
    groups = find_groups(model, x)
    heads = next(g for g in groups if g.producers == ("attention.in_proj_weight",))
    assert heads.channels == 4 and heads.frozen is None
    assert verify_and_freeze(model, groups, x, seconds=60) == 1
    slim = slim_copy(model, groups, {heads.name: torch.tensor([True, False, True, True])})
    assert slim.attention.in_proj_weight.shape == (3 * 18, 24)
    assert slim.attention.num_heads == 3
    pruner = DNALPruner(model, [{"op_types": ["Conv2d", "Linear"]}], dummy_input=x)
    pruner.unwrap_model()
    assert type(model.attention) is nn.MultiheadAttention


@pytest.mark.parametrize("left", [1, 2, 3])
def test_torchs_encoder_layer_runs_with_any_number_of_heads(left: int) -> None:
    """In eval mode it takes a fused kernel that wants whole projections, where the number of heads is even."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model, x = nn.Sequential(nn.Linear(8, 16), layer, nn.Linear(16, 3)).eval(), torch.randn(2, 5, 8)
    groups = find_groups(model, x)
    keep = torch.arange(4) < left
    slim = slim_copy(model, groups, {"1.self_attn.in_proj_weight": keep})
    assert slim[1].self_attn.num_heads == left
    with torch.no_grad():
        layer.self_attn.out_proj.weight[:, 4 * left :] = 0
        torch.testing.assert_close(slim(x), model(x))


def test_a_network_with_heads_is_searched_and_cut() -> None:
    torch.manual_seed(0)
    model, x = Encoder(batch_first=True), torch.randn(2, 3, 16, 16)
    config = [{"op_types": ["Conv2d", "Linear"]}]
    pruner = DNALPruner(model, config, dummy_input=x, budget=Budget(params=0.8))
    cut = {g.producers[0] for g in pruner.groups if g.frozen is None}
    assert cut == {"patches", "mlp.0", "attention.in_proj_weight"}
    with pruner.search(steps=10, progress=False) as search:
        for _ in range(10):
            search.step(model(x).square().mean())
    slim = pruner.speedup()
    assert torch.allclose(model.eval()(x), slim.eval()(x), atol=1e-5)
    assert pruner.report.after.params < 0.9 * pruner.report.before.params


def test_layers_that_nni_has_no_setting_for_go_with_their_kind() -> None:
    x = torch.randn(2, 3, 16, 16)

    def reasons(**config: object) -> dict[str, str | None]:
        pruner = DNALPruner(Mixed(), [config], dummy_input=x)
        return {g.producers[0]: g.frozen for g in pruner.groups}

    by_type = reasons(op_types=["Conv2d", "Linear"])
    assert by_type["standard"] is None and by_type["encoder.attention.in_proj_weight"] is None
    without = reasons(op_types=["Conv2d", "Linear"], exclude_op_names=["standard", "encoder.attention"])
    assert without["standard"] == "config_list does not select standard"
    assert without["encoder.attention.in_proj_weight"] == "config_list does not select encoder.attention"
    assert reasons(op_names=["standard"])["standard"] is None
    assert reasons(op_types=["Linear"])["standard"] == "config_list does not select standard"


def test_a_stored_size_is_no_layer() -> None:
    """torchvision's ResNet keeps ``inplanes``, a number that a search must not take for a module."""
    model, x = torchvision.models.resnet18(num_classes=4), torch.randn(2, 3, 32, 32)
    pruner = DNALPruner(model, [{"op_types": ["Conv2d"]}], dummy_input=x, budget=Budget(flops=0.5))
    with pruner.search(steps=2, progress=False) as search:
        search.step(model(x).square().mean())
    assert pruner.speedup()(x).shape == (2, 4)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class Mixed(nn.Module):
    """A layer of every kind that a cut turns into another class, and stored sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.standard = Standardised(12, 24, 3, padding=1)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 16, 3))
        self.widths = [8, 16]
        self.encoder = Encoder(batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.last = nn.Linear(16, 10)
        self.other = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.standard(self.stem(x).relu()).relu().split(self.widths, 1)
        y = self.last(self.norm(self.normed(a).relu().mean((2, 3))))
        return y + self.encoder(self.other(b))


def test_adapted_and_baked_networks_survive_saving(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(2, 3, 16, 16)
    groups = find_groups(model, x)
    verify_and_freeze(model, groups, x, seconds=60)
    frozen = {g.name: g.frozen for g in groups if g.frozen}
    assert all("returns" in reason for reason in frozen.values()), frozen
    slim = slim_copy(model, groups, random_keep(groups))
    assert type(slim.standard) is nn.Conv2d and type(slim.normed) is nn.Conv2d
    assert slim.widths != [8, 16]
    save_compressed(slim, tmp_path / "slim.safetensors")
    fresh = Mixed()
    loaded = load_compressed(fresh, tmp_path / "slim.safetensors")
    assert torch.equal(loaded.eval()(x), slim.eval()(x))
    with pytest.raises(DNALError, match="damaged, or of another model|does not fit"):
        load_compressed(Encoder(), tmp_path / "slim.safetensors")
    again = tmp_path / "again.safetensors"
    save_compressed(loaded, again)  # what was loaded is a cut network like any other
    assert torch.equal(load_compressed(Mixed(), again).eval()(x), slim(x))


class Fixed(nn.Module):
    """Its width is in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).reshape(-1, 8, x.shape[2] - 2, x.shape[3] - 2))


class Free(Fixed):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_a_registered_adapter_wins_a_layer_back() -> None:
    x = torch.randn(2, 3, 9, 9)

    def frozen() -> str | None:
        model = nn.Sequential(Fixed(), nn.Conv2d(4, 2, 1))
        groups = find_groups(model, x)
        verify_and_freeze(model, groups, x, seconds=60)
        return groups[0].frozen

    assert "in Fixed.forward" in (frozen() or "")
    register_adapter(Fixed, Free)
    assert frozen() is None


def test_adapters_that_cannot_work_are_refused() -> None:
    with pytest.raises(DNALError, match="Linear must be a subclass of Conv2d"):
        register_adapter(nn.Conv2d, nn.Linear)

    class Local(nn.Conv2d):
        pass

    with pytest.raises(DNALError, match="module level"):
        register_adapter(nn.Conv2d, Local)
