"""Files of cut networks: what comes back, what is refused, and that a refusal touches nothing."""

import copy
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONV, Odd, Small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo_models import MODELS

from dnal_nni import DNALError, DNALPruner, load_compressed, save_compressed
from dnal_nni.channels.groups import find_groups
from dnal_nni.modules.running import call, clone, flatten_tensors
from dnal_nni.surgery.slim import slim_copy
from dnal_nni.surgery.verify import random_keep, verify_and_freeze


def cut(model: nn.Module, x: Any, fraction: float = 0.6, seconds: float = 60) -> nn.Module:
    groups = find_groups(model, x)
    verify_and_freeze(model, groups, x, seconds)
    return slim_copy(model, groups, random_keep(groups, fraction))


@pytest.fixture
def file(small: nn.Module, x: Tensor, tmp_path: Path) -> Path:
    save_compressed(cut(small, x), tmp_path / "slim.safetensors")
    return tmp_path / "slim.safetensors"


def snapshot(model: nn.Module) -> Any:
    """Everything that a load could change."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    numbers = {
        path: {name: value for name, value in vars(module).items() if isinstance(value, (int, tuple, list, str))}
        for path, module in model.named_modules()
    }
    return tensors, numbers, [type(module) for module in model.modules()], list(map(id, model.parameters()))


def same(before: Any, after: Any) -> bool:
    tensors = all(torch.equal(a, b) for a, b in zip(before[0].values(), after[0].values()))
    return tensors and before[0].keys() == after[0].keys() and before[1:] == after[1:]


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The same file with another header, and no checksum that would give it away."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"].pop("sum")
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    return path


def edited(path: Path, part: str, change: Callable[[Any], Any]) -> Path:
    """The same file with another ``part`` of our own header."""

    def edit(header: dict[str, Any]) -> None:
        value = json.loads(header["__metadata__"][part])
        new = change(value)
        header["__metadata__"][part] = json.dumps(value if new is None else new)

    return rewritten(path, edit)


# -- what comes back --------------------------------------------------------------------------------------------------

FAST = ["mobilenet_v3_small", "timm_regnety_002", "timm_nf_regnet_b0"]


def round_trip(name: str, path: Path, seconds: float = 20) -> None:
    entry = MODELS[name]
    torch.manual_seed(0)
    model = entry.build()
    dense = clone(model)
    x = entry.inputs(0, torch.float32)
    slim = cut(model, x, seconds=seconds)
    save_compressed(slim, path)
    loaded = load_compressed(dense, path)
    for mode in (False, True):
        outputs = []
        for network in (slim, loaded):
            torch.manual_seed(1)
            with torch.no_grad():
                outputs.append(list(flatten_tensors(call(network.train(mode), x))))
        assert all(torch.equal(a, b) for a, b in zip(*outputs)) and len(outputs[0]) == len(outputs[1])
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, loaded))
    assert after < before


@pytest.mark.parametrize("name", FAST)
def test_bit_equal(name: str, tmp_path: Path) -> None:
    round_trip(name, tmp_path / "slim.safetensors")


CLASSIFIERS = [name for name, entry in MODELS.items() if entry.task == "classification"]


@pytest.mark.slow
@pytest.mark.parametrize("name", dict.fromkeys(["resnet18", "swin_t", *CLASSIFIERS[::4]]))
def test_bit_equal_on_a_quarter_of_the_zoo(name: str, tmp_path: Path) -> None:
    round_trip(name, tmp_path / "slim.safetensors", 240)


def test_computed_weights_tied_tensors_and_unsaved_buffers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(2, 3, 8, 8)
    slim = cut(model, x)
    assert slim.a.out_channels < 8 and slim.scale.shape == (slim.a.out_channels,)
    assert "scale" not in slim.state_dict()
    save_compressed(slim, tmp_path / "odd")
    loaded = load_compressed(Odd(), tmp_path / "odd")
    assert torch.equal(loaded(x), slim(x)) and loaded.d.weight is loaded.c.weight
    save_compressed(loaded, tmp_path / "again")  # and what was loaded can be saved
    assert torch.equal(load_compressed(Odd(), tmp_path / "again")(x), slim(x))


def test_the_report_travels_with_the_network(small: nn.Module, x: Tensor, tmp_path: Path) -> None:
    pruner = DNALPruner(copy.deepcopy(small), CONV, dummy_input=x)
    pruner.harden({"conv1": torch.arange(8) < 5})
    slim = pruner.speedup()
    save_compressed(slim, tmp_path / "slim", pruner.report)
    data = (tmp_path / "slim").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
    assert json.loads(header["report"])["after"]["flops"] == pruner.report.after.flops
    assert json.loads(header["versions"])["torch"] == torch.__version__
    assert torch.equal(load_compressed(small, tmp_path / "slim")(x), slim(x))


def test_nothing_is_pickled(file: Path, small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8 : 8 + size])
    entries.pop("__metadata__")
    # the header is JSON, and every byte behind it belongs to a tensor: there is no room for an opcode
    spans = sorted(entry["data_offsets"] for entry in entries.values())
    assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])] and spans[-1][1] == len(data) - 8 - size
    with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError)):
        pickle.loads(data)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a file was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    load_compressed(small, file)


# -- what is refused --------------------------------------------------------------------------------------------------


def swap(**changes: Any) -> Callable[[Path], object]:
    return lambda path: [edited(path, part, lambda value, new=new: new) for part, new in changes.items()]


def entry(layer: str, name: str, value: Any) -> Callable[[Path], object]:
    return lambda path: edited(path, "sizes", lambda sizes: sizes[layer].__setitem__(name, value))


def tensor(name: str, **changes: Any) -> Callable[[Path], object]:
    return lambda path: rewritten(path, lambda header: header[name].update(changes))


def drop(part: str) -> Callable[[Path], object]:
    return lambda path: rewritten(path, lambda header: header["__metadata__"].pop(part))


def deep(path: Path) -> None:
    rewritten(path, lambda header: header["__metadata__"].update(sizes="[" * 100_000))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(bytes(data))


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "cannot be read.*No such file"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cannot be read"),
    "cut in its header": (lambda path: path.write_bytes(path.read_bytes()[:60]), "cannot be read"),
    "longer than it says": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "cannot be read"),
    "a header of exabytes": (lambda path: path.write_bytes(b"\xff" * 7 + b"\x0f" + b"{}"), "cannot be read"),
    "a bit of a tensor": (flipped, "is damaged: its bytes do not have their checksum"),
    "another format": (lambda path: rewritten(path, lambda h: h["__metadata__"].update(format="x")), "format 'x'"),
    "no format": (lambda path: rewritten(path, lambda h: h.pop("__metadata__")), "format None"),
    "deep JSON": (deep, "is damaged: its header is no JSON"),
    "no JSON": (lambda path: rewritten(path, lambda h: h["__metadata__"].update(sizes="{")), "is no JSON"),
    "no sizes": (drop("sizes"), "'sizes' in its header"),
    "no changes": (drop("changes"), "has no 'changes'"),
    "sizes in a list": (swap(sizes=[]), "'sizes' in its header"),
    "a list of sizes": (swap(sizes={"conv1": [3]}), "'sizes' in its header"),
    "a size in words": (entry("conv1", "out_channels", "8"), "'sizes' in its header"),
    "a size of true": (entry("conv1", "groups", True), "'sizes' in its header"),
    "a negative size": (entry("conv1", "groups", -1), "conv1.groups is -1"),
    "a huge size": (entry("conv1", "out_channels", 10**100), "conv1.out_channels is 10*, not 8"),
    "a size too many": (entry("conv1", "bias", 3), "conv1.bias is only in one of them"),
    "a layer too many": (lambda path: edited(path, "sizes", lambda s: s.update(extra={})), "layer extra is only in"),
    "sizes against the tensors": (entry("conv1", "out_channels", 1), r"conv1.weight is \[.*\], but its sizes say \[1"),
    "a norm against its tensors": (entry("bn1", "num_features", 1), r"bn1.weight is \[.*\], but its sizes say \[1\]"),
    "an alias of nothing": (swap(aliases={"fc.bias": "nothing"}), "no nothing for fc.bias"),
    "an alias in place of a tensor": (swap(aliases={"fc.bias": "conv1.weight"}), "to be the same as"),
    "aliases in words": (swap(aliases="fc"), "'aliases' in its header"),
    "a choice in words": (
        swap(changes={"choices": {"fc": "no"}, "baked": [], "stored": {}}), "'choices' in its header"
    ),
    "a choice of a layer": (
        swap(changes={"choices": {"fc": [1, 0]}, "baked": [], "stored": {}}), "fc is no choice among 2"
    ),
    "a layer to bake": (swap(changes={"baked": ["nope"], "stored": {}}), "does not fit the model: .*nope"),
    "baked numbers": (swap(changes={"baked": [1], "stored": {}}), "'baked' in its header"),
    "a number of nothing": (swap(changes={"baked": [], "stored": {"nope.x": 1}}), "it has no nope.x"),
    "a flag to store": (swap(changes={"baked": [], "stored": {"training": 1}}), "training is 1, the model's is True"),
    "a method to store": (swap(changes={"baked": [], "stored": {"forward": 1}}), "it has no forward"),
    "a dict to store": (swap(changes={"baked": [], "stored": {"fc._parameters": [1]}}), "fc._parameters is"),
    "a text to store": (swap(changes={"baked": [], "stored": {"fc.in_features": "1"}}), "'stored' in its header"),
    "a buffer of nothing": (
        swap(changes={"baked": [], "stored": {}, "unsaved": ["nope"]}), "does not fit the model: .*nope"
    ),
    "a tensor renamed": (lambda path: rewritten(path, lambda h: h.update(x=h.pop("fc.bias"))), "it has no fc.bias"),
    "another dtype": (tensor("fc.bias", dtype="I32"), "fc.bias is torch.int32, the model's is torch.float32"),
    "another shape": (tensor("fc.bias", shape=[2, 5]), r"fc.bias is \[2, 5\], the model's is \[10\]"),
    "another checksum": (lambda path: rewritten(path, lambda h: h["__metadata__"].update(sum="")), "their checksum"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_file_is_refused_and_touches_nothing(name: str, file: Path, small: nn.Module) -> None:
    damage, message = HOSTILE[name]
    damage(file)
    before = snapshot(small)
    with pytest.raises(DNALError, match=message):
        load_compressed(small, file)
    assert same(before, snapshot(small))


def test_another_network_is_refused_by_the_first_mismatch(file: Path) -> None:
    narrow = Small()
    narrow.conv1 = nn.Conv2d(12, 2, 3, 1, 1, bias=False)
    extra = Small()
    extra.more = nn.Linear(2, 2)
    kernel = Small()
    kernel.conv1 = nn.Conv2d(12, 8, 5, 1, 2, bias=False)
    double, meta = Small().double(), Small().to("meta")
    for model, message in [
        (nn.Conv2d(1, 12, 3), "does not fit the model: it has no weight"),
        (extra, "it has no more.weight"),
        (narrow, r"conv1.weight is \[\d, \d+, 3, 3\], the model's is \[2, 12, 3, 3\]"),
        (kernel, r"conv1.weight is \[\d, \d+, 3, 3\], but its sizes say \[\d, \d+, 5, 5\]"),
        (double, r"\w+.\w+ is torch.float32, the model's is torch.float64"),
        (meta, "the model's stem.weight is on the meta device"),
    ]:
        with pytest.raises(DNALError, match=message):
            load_compressed(model, file)


@pytest.mark.parametrize("examples", [60, pytest.param(10_000, marks=pytest.mark.slow)])
def test_fuzzed_bytes(examples: int, file: Path) -> None:
    """Bytes changed, taken out and put in at random: a DNALError, or a network that runs on like the saved one."""
    good, model, target = file.read_bytes(), Small(), file.with_name("fuzzed")
    before = snapshot(model)
    header = 8 + struct.unpack("<Q", good[:8])[0]
    places = st.one_of(st.integers(0, header), st.integers(0, len(good) - 1))
    edit = st.tuples(places, st.integers(0, 6), st.binary(max_size=6))

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.one_of(st.lists(edit, min_size=1, max_size=5), st.binary(max_size=200)))
    def survives(edits: Any) -> None:
        data = bytearray(good)
        for place, gone, put in edits if isinstance(edits, list) else [(0, len(data), edits)]:
            data[place : place + gone] = put
        target.write_bytes(bytes(data))
        attempt = copy.deepcopy(model)
        try:
            load_compressed(attempt, target)
        except DNALError:
            assert same(before[:3], snapshot(attempt)[:3])
        else:
            attempt.eval()

    survives()
    assert {path.name for path in file.parent.iterdir()} <= {"slim.safetensors", "fuzzed"}


def test_a_file_that_cannot_be_written(small: nn.Module, x: Tensor, file: Path) -> None:
    good = file.read_bytes()
    pruner = DNALPruner(small, CONV, dummy_input=x)
    with pytest.raises(DNALError, match="still has gates: save what speedup"):
        save_compressed(small, file)
    with pytest.raises(DNALError, match="has gates: call pruner.unwrap_model"):
        load_compressed(small, file)
    pruner.unwrap_model()
    with pytest.raises(DNALError, match="nowhere/slim cannot be written"):
        save_compressed(small, file.parent / "nowhere" / "slim")
    with pytest.raises(DNALError, match="stem.weight is on the meta device"):
        save_compressed(copy.deepcopy(small).to("meta"), file)
    assert file.read_bytes() == good and list(file.parent.iterdir()) == [file]
