"""`dnal compress`: several budgets, the best epoch, ONNX, and what is said on the way."""

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from cli_tools import SHORT, compress, same_networks
from safetensors.torch import save_file

from dnal_nni import load_compressed
from dnal_nni.cli.main import main
from dnal_nni.cli.run import NETWORK, PAGE
from dnal_nni.storage.reports import REPORT, read_report

pytestmark = pytest.mark.usefixtures("work")
D = ["--data", "mydata:loaders"]


def test_several_budgets_are_a_run_each_and_a_picture(work: Path, capsys: Any) -> None:
    short = ["--search-epochs", "2", "--epochs", "1"]
    assert main(["compress", "mynets:net", *D, *short, "--flops", "0.7", "0.5", "--out", "runs"]) == 0
    out = capsys.readouterr().out
    assert {path.name for path in (work / "runs").iterdir()} == {"0.7", "0.5", "compared.html"}
    assert out.splitlines()[0].split() == ["uncut", "0.7", "0.5"] and "runs/compared.html" in out
    for flops in (0.7, 0.5):
        report = read_report(work / "runs" / str(flops))
        assert report.targets == {"flops": flops}
        assert report.after.flops / report.before.flops == pytest.approx(flops, rel=0.06)
    page = (work / "runs" / "compared.html").read_text()
    assert page.count("<circle") == 3 and "Accuracy (%)" in page
    assert main(["compress", "mynets:net", *D, *short, "--flops", "0.5", "--out", "one"]) == 0
    assert same_networks(work / "one", work / "runs" / "0.5")
    assert main(["compare", "runs/0.7", "runs/0.5", "one", "--html", "three.html"]) == 0
    assert (work / "three.html").read_text().count("<circle") == 4
    (work / "many.json").write_text('{"model": "mynets:net", "data": "mydata:loaders", "flops": [0.7, 0.5]}')
    capsys.readouterr()
    assert main(["compress", "--config", "many.json", *short, "--out", "runs", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["0.7", "0.5"]


def test_the_target_may_come_last(work: Path) -> None:
    assert main(["compress", *D, *SHORT, "--out", "first", "--flops", "0.5", "mynets:net"]) == 0
    assert read_report(work / "first").settings["model"] == "mynets:net"


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (["--flops", "0.7", "0.5", "--params", "0.7", "0.5"], "--flops and --params have several numbers each"),
        (["--flops", "0.7", "half"], "--flops half: give a number above 0"),
        (["--flops", "0.7", "50"], r"--flops 50: 50 %"),
    ],
)
def test_several_budgets_are_looked_at_first(limits: list[str], said: str, capsys: Any) -> None:
    assert main(["compress", "mynets:net", *D, *limits, "--out", "runs"]) == 2
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(capsys.readouterr().err)
    assert not Path("runs").exists()


def test_the_best_epoch_is_kept(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from dnal_nni.cli.run import Run

    measured, states, save = iter([50.0, 40.0, 60.0, 90.0, 90.0, 80.0, 90.0]), [], Run.save

    def record(run: Any, **state: Any) -> None:
        states.append({name: value.clone() for name, value in state.get("model", {}).items()})
        save(run, **state)

    monkeypatch.setattr(Run, "accuracy", lambda run, model, bar=True: next(measured))
    monkeypatch.setattr(Run, "save", record)
    assert compress(*D, "--epochs", "4", "--keep-best") == 0
    assert next(measured, None) is None
    slim = load_compressed(import_module("mynets").net(), work / "run" / NETWORK).state_dict()
    second = states[2 + 1 + 1]  # behind two of the search, and the cut
    assert all(torch.equal(value, second[name]) for name, value in slim.items())
    assert any(not torch.equal(value, states[-1][name]) for name, value in slim.items())
    report = read_report(work / "run")
    assert report.accuracy == (50.0, 90.0) and report.accuracy_cut == 40.0
    assert report.notes[-1].startswith("of 4 epochs of fine-tuning the best was kept, 2: ")
    assert compress("--data", "mydata:no_test", "--keep-best", out="none") == 2
    assert "--keep-best needs data to test on, and there are none" in capsys.readouterr().err


def test_interrupted_after_any_epoch_it_ends_the_same(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dnal_nni.cli.run import Run

    save, made, last = Run.save, 0, 0

    def stop(run: Any, **state: Any) -> None:
        nonlocal made
        save(run, **state)
        made += 1
        if made == last:
            raise KeyboardInterrupt

    assert compress(*D, "--epochs", "3", "--keep-best", out="whole") == 0
    for last in range(1, 7):
        made = 0
        monkeypatch.setattr(Run, "save", stop)
        assert compress(*D, "--epochs", "3", "--keep-best", out=f"run{last}") == 130
        monkeypatch.setattr(Run, "save", save)
        assert compress(*D, "--epochs", "3", "--keep-best", out=f"run{last}") == 0
        assert same_networks(work / "whole", work / f"run{last}")
        reports = [read_report(work / name) for name in ("whole", f"run{last}")]
        assert reports[0].accuracy == reports[1].accuracy and reports[0].notes == reports[1].notes


def test_it_says_what_it_does(work: Path, capsys: Any) -> None:
    assert compress(*D) == 0
    said = [line.strip() for line in re.split(r"[\r\n]|\x1b\[A", capsys.readouterr().err)]
    started = "no --weights were given: mynets:net starts with its own, random ones unless it loads some"
    assert started in said and started in read_report(work / "run").notes
    phases = ["reading which channels go together", "proving what can be cut", "counting every layer"]
    phases += ["choosing what goes", "weighing what removals cost", "measuring the latency"]
    cutting = "cutting, and comparing with the gated network"  # what was searched, and what is chosen without
    for phase, times in {**dict.fromkeys(phases, 1), cutting: 2}.items():
        assert said.count(f"{phase} ...") == times
        assert sum(bool(re.fullmatch(rf"{phase}: \d+\.\d s", line)) for line in said) == times
    assert any(line.startswith("searching, 8 steps: cost is ") and "; delta is " in line for line in said)
    save_file(import_module("mynets").net().state_dict(), "net.safetensors")
    assert compress(*D, "--weights", "net.safetensors", out="trained") == 0
    assert "--weights were given" not in capsys.readouterr().err and not any(
        "--weights" in note for note in read_report(work / "trained").notes
    )


def test_onnx_is_written_in_multiples_that_suit_it(work: Path, capsys: Any) -> None:
    pytest.importorskip("onnxscript")
    assert compress("--data", "mydata:loaders", "--kwargs", '{"width": 48}', "--onnx") == 0
    out = capsys.readouterr().out
    assert "run/slim.onnx" in out and "channels were kept in multiples of 8" in out
    slim = load_compressed(import_module("mynets").net(48), work / "run" / NETWORK).eval()
    assert slim[0].out_channels % 8 == 0 and slim[4].out_channels % 8 == 0
    session = onnxruntime.InferenceSession(work / "run" / "slim.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(1, 3, 8, 8)
    (scores,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(scores), slim(x).detach())


def test_onnx_is_looked_for_at_the_start(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("dnal_nni.cli.run.find_spec", lambda name: None if name == "onnxscript" else True)
    assert compress("--data", "mydata:loaders", "--onnx") == 2
    assert "--onnx needs onnx and onnxscript: pip install onnx onnxscript" in capsys.readouterr().err


def test_what_cannot_be_exported_is_said_and_the_rest_is_there(work: Path, capsys: Any) -> None:
    """A network whose forward asks the numbers in a tensor what to do, which no graph holds."""
    (work / "asking.py").write_text(
        "from mynets import net as plain\nfrom torch import nn\n"
        "class Asking(nn.Module):\n"
        "    def __init__(self):\n        super().__init__(); self.body = plain()\n"
        "    def forward(self, x):\n        return self.body(x * 1.0 if float(x.sum()) > 1e9 else x)\n"
        "def net(): return Asking()\n"
    )
    arguments = ["compress", "asking:net", *SHORT, "--data", "mydata:loaders", "--out", "run", "--onnx"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "the smaller network cannot be exported to ONNX: " in out
    assert {path.name for path in (work / "run").iterdir()} == {NETWORK, REPORT, PAGE}
