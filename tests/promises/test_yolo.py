"""A YOLO of ultralytics, cut, goes through ultralytics' own val, save, load, train and export, and stays what it is.

Needs ultralytics, which is no dependency of anything here:  pip install ultralytics && pytest -m slow
tests/promises/test_yolo.py
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnal_nni import Budget, measure

ultralytics = pytest.importorskip("ultralytics")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # ultralytics' own, and its exporter's

SIZE = 64

IN_A_NEW_PROCESS = """
import json, sys, torch
from ultralytics import YOLO
path, data, size = sys.argv[1:]
torch.manual_seed(0)
x = torch.rand(2, 3, int(size), int(size))
yolo = YOLO(path)
with torch.no_grad():
    torch.save(yolo.model.eval()(x)[0], path + ".out")
metrics = yolo.val(data=data, imgsz=int(size), plots=False, workers=0, conf=1e-6, project=sys.argv[1] + "-val")
print(json.dumps(metrics.results_dict | {"loaded": [m for m in sys.modules if m.startswith("dnal_nni")]}))
"""


def widths(net: nn.Module) -> list[torch.Size]:
    return [p.shape for p in net.parameters()]


@pytest.fixture(scope="module")
def example() -> Any:
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    import yolo

    return yolo


@pytest.fixture(scope="module", params=["yolov8n", "yolo11n"])
def cut(request: pytest.FixtureRequest, example: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The cut network, its pruner, its checkpoint, and the data."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    data = str(example.shapes(folder / "shapes", SIZE, train=24, val=8))
    yolo = example.YOLO(f"{request.param}.yaml")
    yolo.train(
        data=data, imgsz=SIZE, epochs=2, batch=8, plots=False, workers=0, optimizer="AdamW", project=str(folder)
    )  # fmt: skip
    pruner = example.search(yolo.model, data, SIZE, 8, 2, Budget(flops=0.5), 1e-3)
    # in ultralytics' checkpoints numbers have 16 bits
    yolo.model = example.ready(pruner.speedup()).half().float()
    yolo.save(folder / "cut.pt")
    return yolo.model, pruner, folder / "cut.pt", data


def in_a_new_process(path: Path, data: str) -> tuple[Tensor, dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", "-c", IN_A_NEW_PROCESS, str(path), data, str(SIZE)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return torch.load(f"{path}.out"), json.loads(done.stdout.splitlines()[-1])


def val(yolo: Any, data: str, folder: Path) -> dict[str, float]:
    metrics = yolo.val(data=data, imgsz=SIZE, plots=False, workers=0, conf=1e-6, project=str(folder))
    return dict(metrics.results_dict)


def test_half_of_its_flops(cut: Any, example: Any) -> None:
    net, pruner, path, _ = cut
    x = torch.rand(1, 3, SIZE, SIZE)
    assert measure(net, x).flops / pruner.report.before.flops == pytest.approx(0.5, rel=0.01)
    assert pruner.report.relative_diff < 1e-9
    loaded = example.YOLO(path).model
    assert widths(loaded) == widths(net)
    for name, module in loaded.named_modules():
        if isinstance(module, ultralytics.nn.modules.C2f):  # what export splits by
            assert 2 * module.c == module.cv1.conv.out_channels, name


def test_a_new_process_loads_and_validates_the_same(cut: Any, example: Any, tmp_path: Path) -> None:
    net, _, path, data = cut
    torch.manual_seed(0)
    x = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = net.eval()(x)[0]
    found, metrics = in_a_new_process(path, data)
    assert torch.equal(found, expected)
    assert metrics.pop("loaded") == []  # nothing of this package is in the file
    assert metrics == val(example.YOLO(path), data, tmp_path)


def test_training_keeps_the_cut(cut: Any, example: Any, tmp_path: Path) -> None:
    net, _, path, data = cut
    settings = dict(data=data, imgsz=SIZE, epochs=1, batch=8, plots=False, workers=0, project=str(tmp_path))
    yolo = example.YOLO(path)
    yolo.train(**settings, name="cut", trainer=example.CutTrainer)
    assert widths(yolo.model) == widths(net)
    best = example.YOLO(tmp_path / "cut" / "weights" / "best.pt").model
    assert widths(best) == widths(net)
    moved = [not torch.equal(a, b) for a, b in zip(best.parameters(), net.parameters()) if a.dim() == 4]
    assert sum(moved) > 0.9 * len(moved)

    # what the recipe warns of: without the trainer, ultralytics builds the network anew, at full width
    yolo = example.YOLO(path)
    yolo.train(**settings, name="undone")
    assert widths(yolo.model) != widths(net)


def test_another_number_of_classes_is_refused(cut: Any, example: Any, tmp_path: Path) -> None:
    _, _, path, data = cut
    other = tmp_path / "two.yaml"
    other.write_text(Path(data).read_text().replace("[square, disc, bar]", "[square, disc, bar, star]"))
    with pytest.raises(ValueError, match="the network has 3 classes, .*two.yaml has 4"):
        example.YOLO(path).train(data=str(other), imgsz=SIZE, epochs=1, workers=0, trainer=example.CutTrainer)


def test_export(cut: Any, example: Any, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    net, _, path, data = cut
    exported = example.YOLO(path).export(format="onnx", imgsz=SIZE, simplify=False)
    session = runtime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    x = torch.rand(1, 3, SIZE, SIZE)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = net.eval()(x)[0]
    assert torch.allclose(torch.from_numpy(got), expected, rtol=1e-3, atol=1e-3)
    ours, theirs = (val(example.YOLO(file), data, tmp_path) for file in (path, exported))
    assert ours == pytest.approx(theirs, abs=1e-3)
