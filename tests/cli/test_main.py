"""`dnal inspect`: what it shows, what it says when the caller is wrong, and that it never needs nni."""

import json
import subprocess
import sys
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import dnal_nni
from dnal_nni import save_compressed
from dnal_nni.channels.groups import find_groups
from dnal_nni.cli.inspection import Inspection, inspect
from dnal_nni.cli.main import main
from dnal_nni.surgery.slim import slim_copy
from dnal_nni.surgery.verify import random_keep

NETS = """
import torch
from torch import nn

class Half(nn.Module):
    def __init__(self, width=8, classes=3):
        super().__init__()
        print("a network that talks")
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.mixed = nn.Conv2d(width, 6, 3)
        self.last = nn.Conv2d(6, classes, 1)
        self.unused = nn.Linear(2, 2)

    def forward(self, x, y=None):
        x = torch.relu(self.bn(self.stem(x)))
        if y is not None:
            x = x + y.mean()
        return self.last(torch.softmax(self.mixed(x), 1))

def fails():
    raise RuntimeError("no weights on this machine\\nand more")

ready = Half()
number = 3
not_a_network = dict
"""


@pytest.fixture(autouse=True)
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `nets` in the working directory."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    return tmp_path


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "nets:Half", "--input", "2,3,8,8"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["group", "channels", "FLOPs", "gate", "layers"]
    name, channels, share, gate, *layers = lines[1].split()
    assert (name, channels, gate, layers) == ("stem", "8", "norm", ["stem", "->", "mixed"])
    assert 90 < float(share.removesuffix("%")) < 100  # all but the norm and the last layer
    whole = {line.split()[0]: line.split(maxsplit=2) for line in lines[lines.index("") + 2 : -2]}
    assert {layer: row[1] for layer, row in whole.items()} == {"mixed": "6", "last": "3", "unused": "2"}
    assert "returns" in whole["last"][2] and "no run of the model" in whole["unused"][2]
    assert lines[-1].startswith("1 of ") and " groups can be cut; 9" in lines[-1] and lines[-1].endswith(" s")
    assert set(err.splitlines()) == {"a network that talks"}


class Reads(nn.Module):
    """A function computes with a layer's weight, as in attention with biases of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.held, self.last = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(self.first(x).relu(), self.held.weight, self.held.bias).relu())


def test_a_weight_that_a_function_reads_is_not_said_to_be_unused() -> None:
    found = inspect(Reads(), torch.randn(2, 6))
    assert [layer.name for layer in found.whole] == ["last"]
    assert {m.path for g in found.groups if g.frozen is None for m in g.members} >= {"first", "held.weight"}


def test_json_is_the_same_for_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--kwargs", '{"width": 12, "classes": 5}', "--input", "2,3,8,8", "--input", "2,2", "--json"]
    assert main(["inspect", "nets:Half", *arguments]) == 0
    got = json.loads(capsys.readouterr().out)
    stem = next(group for group in got["groups"] if group["name"] == "stem")
    assert stem["channels"] == 12 and stem["frozen"] is None
    assert stem["producers"] == ["stem"] and stem["consumers"] == ["mixed"]
    assert set(stem["members"]) == {"stem", "bn", "mixed"}
    assert next(layer for layer in got["whole"] if layer["name"] == "last")["width"] == 5
    assert got["target"] == "nets:Half" and got["params"] > 0 and got["flops"] > 0 and got["seconds"] > 0
    assert got["touched"] == pytest.approx(stem["flops"])


def test_torch_prunings_graph(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inspect", "nets:Half", "--input", "2,3,8,8", "--graph"]
    assert main([*arguments, "torch-pruning"]) == 0
    out = capsys.readouterr().out
    assert "stem" in out.splitlines()[1] and "(by torch-pruning's graph)" in out
    assert main([*arguments, "torch_pruning"]) == 2
    assert "--graph torch_pruning: give torch-pruning, or leave it out" in capsys.readouterr().err


class Two(nn.Module):
    """The second half of the first layer is returned: one layer, two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x)
        return self.c(self.b(x[:, :4])), x[:, 4:]


def test_shares_are_of_dense_flops_and_a_layer_can_stay_in_part() -> None:
    model = Two()
    result = inspect(model, torch.randn(1, 3, 4, 4))
    assert isinstance(result, Inspection) and result.flops == 16 * (3 * 8 + 4 * 6 + 6 * 2)
    assert result.params == sum(p.numel() for p in model.parameters()) and result.target == "Two"
    assert result.shares["b"] == pytest.approx((4 * 6 + 6 * 2) / 60)
    cut = [group for group in result.groups if group.frozen is None]
    assert "b" in [group.name for group in cut]
    touched = {path for group in cut for path in (*group.producers, *(m.path for m in group.consumers))}
    assert result.touched == pytest.approx(sum({"a": 24, "b": 24, "c": 12}[path] for path in touched) / 60)
    stays = {(layer.name, layer.channels, layer.width) for layer in result.whole}
    assert ("c", 2, 2) in stays and any(name == "a" and width == 8 for name, _, width in stays)
    if "a" in touched and ("a", 4, 8) in stays:
        assert "(of 8)" in str(result)


def test_weights_dense_and_compressed(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.insert(0, str(nets))
    model = import_module("nets").Half()
    save_file(model.state_dict(), "dense.safetensors")
    assert main(["inspect", "nets:Half", "--input", "2,3,8,8", "--weights", "dense.safetensors"]) == 0
    groups = find_groups(model, torch.randn(2, 3, 8, 8))
    for group in groups:
        group.frozen = group.frozen if group.name == "stem" else "kept"
    save_compressed(slim_copy(model, groups, random_keep(groups, 0.5)), "slim.safetensors")
    capsys.readouterr()
    assert main(["inspect", "nets:Half", "--input", "2,3,8,8", "--weights", "slim.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"][0]["channels"] == 4
    save_file({"stem.weight": torch.zeros(1)}, "other.safetensors")
    (nets / "bad.safetensors").write_bytes(b"\xff" * 100)
    for name, said in (("none", "no file"), ("other", "does not fit the model"), ("bad", "no safetensors file")):
        weights = f"{name}.safetensors"
        assert main(["inspect", "nets:Half", "--input", "2,3,8,8", "--weights", weights]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


X = ["--input", "2,3,8,8"]
WRONG = {
    "an unknown command": (["inspekt"], "invalid choice: 'inspekt'"),
    "no input": (["inspect", "nets:Half"], "--input"),
    "no shape": (["inspect", "nets:Half", "--input", "1,three"], "--input 1,three: give whole numbers, for example"),
    "an empty dimension": (["inspect", "nets:Half", "--input", "0,3"], "give whole numbers"),
    "kwargs": (["inspect", "nets:Half", *X, "--kwargs", "width=3"], "--kwargs width=3: give a JSON object"),
    "no colon": (["inspect", "nets", *X], "package.module:function"),
    "no module": (["inspect", "nots:Half", *X], "nots cannot be imported: No module named 'nots'"),
    "no attribute": (["inspect", "nets:Halv", *X], "nets has no Halv; did you mean Half"),
    "not callable": (["inspect", "nets:number", *X], "is a int, not a function"),
    "no network": (["inspect", "nets:not_a_network", *X], r"not_a_network\(\) returns a dict"),
    "arguments": (["inspect", "nets:Half", *X, "--kwargs", '{"depth": 3}'], r"Half\(depth=3\) fails: .*depth"),
    "it raises": (["inspect", "nets:fails", *X], "fails: no weights on this machine$"),
    "kwargs of a network": (["inspect", "nets:ready", *X, "--kwargs", '{"depth": 3}'], "leave --kwargs out"),
    "rejected input": (["inspect", "nets:ready", "--input", "2,4,8,8"], r"rejects an input of shape \(2, 4, 8, 8\)"),
    "too many inputs": (["inspect", "nets:ready", *X, *X, *X], "rejects an input of shape .* and .* and"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_sentence_and_exit_code_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, said = WRONG[name]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    sentence = [line for line in err.splitlines() if line != "a network that talks"]
    assert not out and len(sentence) == 1 and sentence[0].startswith("dnal: ")
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(sentence[0])


def test_a_network_itself_may_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "nets:ready", *X]) == 0
    assert "1 of " in capsys.readouterr().out


def test_the_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["inspect", "--help"])
    assert exit.value.code == 0
    assert "$ dnal inspect torchvision.models:resnet18 --input 1,3,224,224" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"]])
def test_without_a_command_it_says_what_there_is(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "dnal_nni", *words], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    if words == ["--version"]:
        assert done.stdout == f"dnal_nni {dnal_nni.__version__}\n"
    else:
        assert all(f"    {command} " in done.stdout for command in ("inspect", "compress", "report", "compare"))


def test_the_command_is_installed_and_needs_no_nni() -> None:
    config = ConfigParser()
    config.read(Path(__file__).parents[2] / "setup.cfg")
    assert config["options.entry_points"]["console_scripts"].strip() == "dnal = dnal_nni.cli.main:main"
    code = (
        "import sys, dnal_nni.cli as cli; assert 'torch' not in sys.modules\n"
        "assert cli.main(['inspect', 'nets:Half', '--input', '2,3,8,8']) == 0\n"
        "bad = {'nni', 'matplotlib'} & set(sys.modules); assert not bad, bad"
    )
    path = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": path},
    )
    assert done.returncode == 0 and "groups can be cut" in done.stdout, done.stderr
