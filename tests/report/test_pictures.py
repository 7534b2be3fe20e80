"""What matplotlib and TensorBoard make of a report."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dnal_nni import DNALError
from dnal_nni.report.record import GroupReport, Report


def test_tensorboard(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report.to_tensorboard(tmp_path)
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"search/cost", "search/delta", "search/loss"}
    last = events.Scalars("search/cost")[-1]
    assert (last.step, last.value) == (250, pytest.approx(report.history[-1]["cost"]))
    histogram = events.Histograms("search/gates")[-1].histogram_value
    assert histogram.num == 36 and sum(histogram.bucket) == 36


def test_widths_of_many_groups_get_room_for_their_names(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.plot_widths(tmp_path / "few.png")
    names = [f"features.denseblock{i // 20}.denselayer{i}.conv1" for i in range(120)]
    many = [GroupReport(name, 128, i, "norm", 3, None) for i, name in enumerate(names)]
    Report(report.before, report.after, many).plot_widths(tmp_path / "many.png")
    with Image.open(tmp_path / "few.png") as few, Image.open(tmp_path / "many.png") as picture:
        assert few.width == picture.width and picture.height > 120 * 15


def test_a_folder_that_is_not_there(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(DNALError, match=r"nowhere/widths\.png cannot be written: No such file or directory"):
        report.plot_widths(tmp_path / "nowhere" / "widths.png")


@pytest.mark.parametrize(("method", "missing"), [("plot_widths", "matplotlib"), ("to_tensorboard", "tensorboard")])
def test_a_library_that_is_not_there(method: str, missing: str, tmp_path: Path) -> None:
    data = Path(__file__).with_name("data") / "report-0.1.json"
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from dnal_nni.errors import DNALError\nfrom dnal_nni.storage.reports import read_report\n"
        f"try: read_report({str(data)!r}).{method}({str(tmp_path / 'x')!r})\n"
        "except DNALError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{method} needs {missing}: pip install {missing}\n"
