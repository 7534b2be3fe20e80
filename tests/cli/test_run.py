"""`dnal compress`, `report` and `compare`: from a folder of images to a smaller network, and back to the table."""

import json
import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import SHORT, compress, pictures, same_networks
from safetensors.torch import load_file, save_file

from dnal_nni import load_compressed, measure
from dnal_nni.cli.main import main
from dnal_nni.cli.run import CHECKPOINT, NETWORK, PAGE
from dnal_nni.cli.settings import Settings
from dnal_nni.report.record import Report
from dnal_nni.storage.reports import REPORT, saved_report

pytestmark = pytest.mark.usefixtures("work")


def test_from_images_to_a_smaller_network(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(work / "photos" / "train", 20)
    pictures(work / "photos" / "val", 8)
    torch.manual_seed(0)
    dense = import_module("mynets").net()
    torch.save({"state_dict": dense.state_dict()}, "net.pt")
    size = ["--input", "1,3,8,8", "--batch-size", "16", "--weights", "net.pt"]
    assert compress("--data", "photos", "--tensorboard", *size) == 0
    out, err = capsys.readouterr()
    assert "FLOPs (M)" in out and "accuracy (%)" in out and f"run/{NETWORK}" in out
    assert "search: 100%" in err and "fine-tune: 100%" in err  # with the time left
    assert {p.name for p in (work / "run").iterdir()} == {NETWORK, REPORT, PAGE, "tensorboard"}
    slim = load_compressed(import_module("mynets").net(), work / "run" / NETWORK)
    x = torch.randn(1, 3, 8, 8)
    assert measure(slim, x).flops / measure(dense, x).flops == pytest.approx(0.5, rel=0.06)
    report = json.loads((work / "run" / REPORT).read_text())
    assert report["accuracy"][1] > 60 and report["max_abs_diff"] < 1e-5 and report["settings"]["flops"] == 0.5
    assert report["accuracy_cut"] is not None and "accuracy, not tuned (%)" in out
    tensors = load_file(work / "run" / NETWORK)
    assert report["file_bytes"][1] == sum(t.nbytes for t in tensors.values()) < report["file_bytes"][0]
    convolution = [3 * layer.out_channels * 9 * 64 for layer in (dense[0], slim[0])]  # on 8 x 8 pixels
    assert report["layer_flops"]["0"] == convolution
    counts = [sum(pair[i] for pair in report["layer_flops"].values()) for i in (0, 1)]
    assert counts == [report["before"]["flops"], report["after"]["flops"]]
    assert set(report["seconds"]) >= {"search", "cut", "finetune"} and report["versions"]["torch"]
    assert "mynets:net" in report["settings"]["model"] and report["command"].startswith("dnal compress mynets:net")
    assert [entry["step"] for entry in report["history"]] == list(range(1, 7))
    assert all(sum(entry["gates"]) == 28 and entry["loss"] > 0 for entry in report["history"])
    assert any((work / "run" / "tensorboard").iterdir())
    made, page = report["interventions"], (work / "run" / PAGE).read_text()
    assert {name: made["changed"][name] for name in ("flops", "batch_size")} == {"flops": 0.5, "batch_size": 16}
    assert "weights" not in made["changed"] and made["epochs"] == report["settings"]["search_epochs"]
    people = sum(made["fixed"].values()) + len(made["changed"])
    assert f"decisions that people took: {people}" in out and f"decisions that people took: {people}" in page
    # the same again: nothing is left to do
    before = (work / "run" / NETWORK).stat().st_mtime_ns
    assert compress("--data", "photos", "--tensorboard", *size) == 0
    assert (work / "run" / NETWORK).stat().st_mtime_ns == before
    assert compress("--data", "photos", "--lr", "0.02", *size) == 2
    assert "is of a run with lr 0.01, and this one has 0.02: choose another --out" in capsys.readouterr().err


def test_along_torch_prunings_groups(work: Path) -> None:
    assert compress("--data", "mydata:loaders", "--input", "1,3,8,8", "--graph", "torch-pruning") == 0
    report = json.loads((work / "run" / REPORT).read_text())
    assert report["settings"]["graph"] == "torch-pruning"
    dense, x = import_module("mynets").net(), torch.randn(1, 3, 8, 8)
    slim = load_compressed(import_module("mynets").net(), work / "run" / NETWORK)
    assert measure(slim, x).flops / measure(dense, x).flops == pytest.approx(0.5, rel=0.06)


def test_a_folder_of_classes_holds_images_out(work: Path) -> None:
    pictures(work / "photos", 20)
    assert compress("--data", "photos", "--input", "1,3,8,8", "--batch-size", "100") == 0
    assert saved_report(work / "run" / NETWORK).accuracy is not None


def test_loaders_flags_and_files(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "half.json").write_text(
        json.dumps({"model": "mynets:net", "data": "mydata:no_test", "params": 0.5, "search-epochs": 1, "epochs": 0})
    )
    assert main(["compress", "--config", "half.json", "--flops", "0.6", "--out", "a", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["targets"] == {"flops": 0.6} and report["accuracy"] is None
    if sys.version_info >= (3, 11):
        text = 'model = "mynets:net"\ndata = "mydata:loaders"\nout = "b"\nparams = 0.5\nsearch_epochs = 1\nepochs = 1\n'
        (work / "half.toml").write_text(text + "input = [1, 3, 8, 8]\n[kwargs]\nwidth = 8\n")
        assert main(["compress", "--config", "half.toml"]) == 0
        assert Report.from_dict(json.loads((work / "b" / REPORT).read_text())).targets == {"params": 0.5}


def child(folder: str, arguments: list[str]) -> None:
    sys.path.insert(0, folder)
    torch.set_num_threads(1)
    sys.exit(main(arguments))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the child has it: sums of several threads are rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("stage", ["search", "finetune"])
def test_killed_it_goes_on_with_the_same_command(stage: str, work: Path) -> None:
    arguments = ["compress", "mynets:net", "--data", "mydata:loaders", "--flops", "0.5"]
    arguments += ["--search-epochs", "40", "--epochs", "40"]
    assert main([*arguments, "--out", "whole"]) == 0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dnal_nni.plugin.pruner", "test_run"])
    process = context.Process(target=child, args=(str(work), [*arguments, "--out", "killed"]))
    process.start()
    checkpoint = work / "killed" / CHECKPOINT
    while process.is_alive() and not (checkpoint.exists() and f'"{stage}"'.encode() in quoted(checkpoint)):
        time.sleep(0.001)
    time.sleep(0.03)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (work / "killed" / REPORT).exists()
    assert main([*arguments, "--out", "killed"]) == 0
    assert same_networks(work / "whole", work / "killed")


def quoted(path: Path) -> bytes:
    """The header of a checkpoint, without the quotation marks' escapes."""
    return path.read_bytes()[:1_000_000].replace(b"\\", b"")


def test_interrupted_it_says_how_to_go_on(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dnal_nni.compression

    def interrupt(*args: Any, **others: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dnal_nni.compression, "OneCycleLR", interrupt)
    assert compress("--data", "mydata:loaders") == 130
    assert "interrupted; the same command goes on from its last epoch" in capsys.readouterr().err
    assert (work / "run" / CHECKPOINT).exists() and not (work / "run" / REPORT).exists()
    monkeypatch.undo()
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "path", [str(work), *sys.path])
    assert compress("--data", "mydata:loaders") == 0


def test_report_and_compare(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compress("--data", "mydata:loaders", out="half") == 0
    assert compress("--data", "mydata:loaders", "--flops", "0.7", out="more") == 0
    capsys.readouterr()
    printed = []
    for path in ("half", f"half/{REPORT}", f"half/{NETWORK}"):
        assert main(["report", path]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2] and "target: 50.0% of the FLOPs" in printed[0]
    assert main(["report", "half", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((work / "half" / REPORT).read_text())
    assert main(["report", "half", "--html", "page.html"]) == 0
    assert (work / "page.html").read_text() == (work / "half" / PAGE).read_text()
    capsys.readouterr()
    assert main(["compare", "half", "more"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["uncut", "half", "more"] and lines[1].startswith("FLOPs (M)")
    flops = [float(cell) for cell in lines[1].split()[2:]]
    assert flops[1] < flops[2] < flops[0] and any(line.split()[:2] == ["4", "16"] for line in lines)
    assert main(["compare", "half", "more", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"half", "more"}


D = ["--data", "mydata:loaders"]
WRONG = {
    "no data": ([], "--data is missing; see dnal compress --help"),
    "no folder": (["--data", "photos"], "there is no folder photos; a function is written package.module:function"),
    "an empty folder": (["--data", "empty"], "empty is no folder of images by class: "),
    "no function": (["--data", "mydata:loader"], "mydata has no loader; did you mean loaders?"),
    "it raises": (["--data", "mydata:raises"], r"mydata:raises\(\) fails: no disk"),
    "no pair": (["--data", "mydata:single"], "returns no pair"),
    "no length": (["--data", "mydata:endless"], "the train loader needs __iter__ and __len__"),
    "no batch": (["--data", "mydata:empty"], "gives no batch: it has fewer examples than one batch"),
    "no labels": (["--data", "mydata:images_only"], r"gives no batches \(inputs, labels\)"),
    "no classes": (["--data", "mydata:float_labels"], r"gives labels of torch.float32 and shape \[4\]"),
    "too many classes": (["--data", "mydata:too_many_classes"], "the data have a class 6, the network only 3 scores"),
    "nan": (["--data", "mydata:nan"], "no finite number for an input of mydata:nan"),
    "percent": ([*D, "--flops", "50"], r"--flops 50: 50 %\? write 0.5"),
    "more than there is": ([*D, "--flops", "1e9"], r"--flops 1000000000 is more than the model has \(50736\)"),
    "no budget": ([*D, "--flops", "nan"], "--flops nan: give a number above 0: up to 1 the fraction to keep"),
    "a budget in words": ([*D, "--params", "half"], "--params half: give a number above 0"),
    "unreachable": ([*D, "--flops", "0.001"], r"--flops 0.001 cannot be reached: .*, flops=0\.0404 remains"),
    "no epochs": ([*D, "--search-epochs", "-1"], "--search-epochs -1: give a whole number of at least 0"),
    "words": ([*D, "--epochs", "many"], "--epochs many: give a whole number of at least 0"),
    "learning rate": ([*D, "--lr", "-1"], "--lr -1: give a number above 0"),
    "normalisation": ([*D, "--mean", "0.5", "--std", "0"], "--mean and --std: give as many numbers"),
    "unreachable number": ([*D, "--flops", "400"], r"--flops 400 cannot be reached: .*, flops=20\d\d remains"),
    "seed": ([*D, "--seed", "1e99"], "--seed 1e99: give a whole number of at least 0"),
    "device": ([*D, "--device", "abacus"], "there is no device abacus on this machine"),
    "folder": ([*D, "--out", "mynets.py"], "mynets.py cannot be made: File exists"),
    "weights": ([*D, "--weights", "none.pt"], "there is no file none.pt"),
    "bad weights": ([*D, "--weights", "mynets.py"], "holds more than tensors, or is no file of torch.save: give a"),
    "weights of another": ([*D, "--weights", "other.safetensors"], r"0\.weight is \[1\], the model's is \[12, 3"),
    "no config": (["--config", "none.json"], "none.json cannot be read: No such file or directory"),
    "no text": (["--config", "latin.json"], "latin.json cannot be read: it is not text"),
    "unknown option": (["--config", "odd.json"], "there is no option 'flop'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    name: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"0.weight": torch.zeros(1)}, "other.safetensors")
    (work / "latin.json").write_bytes(b'{"data": "\xff"}')
    (work / "empty").mkdir()
    (work / "odd.json").write_text('{"flop": 0.5}')
    arguments, said = WRONG[name]
    assert compress(*arguments) == 2
    out, err = capsys.readouterr()
    sentence = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("dnal: ")]
    assert not out and len(sentence) == 1 and err.rstrip().endswith(sentence[0])
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(sentence[0])
    assert not (work / "run" / REPORT).exists()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("mynets:plain", r"returns no scores \[batch, classes\]"),
        ("mynets:breaks", "(rejects|fails)"),
        ("mynets:none", "mynets has no none"),
    ],
)
def test_networks_that_cannot_be_trained_here(target: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", target, *SHORT, *D, "--out", "run"]) == 2
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "it is not JSON"),
        ("\udcff", "it is not JSON"),
        ("[]", "is no report"),
        ("{}", "it has no 'before'"),
        ('{"before": 3}', "is no report"),
    ],
)
def test_what_is_no_report(text: str, said: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "x.json").write_bytes(text.encode(errors="surrogateescape"))
    assert main(["report", "x.json"]) == 2
    assert said in capsys.readouterr().err
    assert main(["compare", "x.json", "nowhere"]) == 2


def test_settings_say_what_every_option_is() -> None:
    """Every option of the command line is a setting, and has a line of help."""
    help = subprocess.run([sys.executable, "-m", "dnal_nni", "compress", "--help"], capture_output=True, text=True)
    assert help.returncode == 0 and "$ dnal compress mynets:resnet" in help.stdout
    for name in Settings.__dataclass_fields__:
        assert f"--{name.replace('_', '-')} " in help.stdout or name == "model"


def test_tensorboard_is_looked_for_at_the_start(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("dnal_nni.cli.run.find_spec", lambda name: None)
    assert compress(*D, "--tensorboard") == 2
    assert capsys.readouterr().err == "dnal: --tensorboard needs tensorboard: pip install tensorboard\n"
    assert not Path("run").exists()


def test_a_limit_is_missing(capsys: Any) -> None:
    assert main(["compress", "mynets:net", *D, "--out", "run"]) == 2
    assert "--flops, --params or --latency is missing, for example --flops 0.5" in capsys.readouterr().err


@pytest.mark.parametrize("closed", ["stdout", "both"])
def test_whoever_read_the_output_may_go(closed: str, work: Path) -> None:
    report = Path(__file__).parents[1] / "report" / "data" / "report-0.1.json"
    command = [sys.executable, "-W", "ignore", "-m", "dnal_nni", "report", str(report)]
    other = subprocess.STDOUT if closed == "both" else subprocess.PIPE
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=other, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        said = process.stderr.read() if process.stderr else ""
    assert process.returncode == 141 and not said
